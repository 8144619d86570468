"""A page to try the face parser on, served to this machine's browser only: `make try`, then http://127.0.0.1:8000.

python -m tools.serve --name b --views flip

The page sends the picture to this process, which answers with its mask; nothing leaves the machine.
"""

import contextlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import ArgumentParser, UserError, natural, run_main

from images import decode_picture, mask_image
from labels import HEX_COLOURS, NAMES
from predict import FaceParser

PAGE = Path(__file__).with_name("serve.html")
MAX_BYTES = 40_000_000
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Handler(BaseHTTPRequestHandler):
    """GET / gives the page; POST /parse or /parse?whole takes a picture's bytes and gives its mask as PNG."""

    timeout = 30  # seconds without a byte
    parser = page = None  # set by make_server
    busy = threading.Lock()

    def do_GET(self):
        status, content, faces = self.respond()
        kind = "text/plain; charset=utf-8" if isinstance(content, str) else "image/png" if faces else "text/html"
        body = content.encode() if isinstance(content, str) else content
        with contextlib.suppress(ConnectionError):  # the browser no longer waits
            self.send_response(status)
            for header in {"Content-Type": kind, "Content-Length": len(body), "X-Faces": faces, **HEADERS}.items():
                self.send_header(*map(str, header))
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET

    def respond(self):
        """(HTTP status, bytes of the page or the mask, number of faces in the mask); the reason as str if refused."""
        port, host = self.server.server_address[1], self.headers.get("Host", "").lower()
        # Pages of other sites, also those whose name was made to resolve to this machine (DNS rebinding).
        if host not in (f"{name}:{port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")):
            return 403, f"other hosts are refused; open http://127.0.0.1:{port} on this machine", ""
        if self.headers.get("Origin") not in (None, f"http://{host}"):
            return 403, "requests of other sites are refused", ""
        if self.command == "GET":
            return (200, self.page, "") if self.path == "/" else (404, "the page is at /", "")
        if self.path not in ("/parse", "/parse?whole"):
            return 404, "pictures go to /parse", ""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,12}", length):
            return 411, "the length of the picture is missing", ""
        body, rest = self.rfile.read(min(int(length), MAX_BYTES)), int(length) - MAX_BYTES
        while rest > 0 and (part := self.rfile.read(min(rest, 1 << 20))):  # clients send everything, then listen
            rest -= len(part)
        if int(length) > MAX_BYTES:
            return 413, f"the picture has more than {MAX_BYTES / 1e6:.0f} MB", ""
        with self.busy:  # decoded one at a time: a picture of 81 megapixels takes a gigabyte
            try:
                pixels, _ = decode_picture(io.BytesIO(body), "this file")
                parsed = self.parser(pixels, whole=self.path.endswith("whole"))
            except UserError as error:
                return 415, str(error), ""
        png = io.BytesIO()
        mask_image(parsed.mask).save(png, format="PNG")
        faces = "not searched" if self.path.endswith("whole") else 0 if parsed.missed else len(parsed.faces)
        return 200, png.getvalue(), str(faces)


def make_server(parser, port):
    """An HTTP server on 127.0.0.1 that parses with a FaceParser. UserError if the port is taken."""
    labels = json.dumps(list(zip(NAMES, HEX_COLOURS, strict=True)))
    page = PAGE.read_text(encoding="utf-8").replace("<!--LABELS-->", labels).encode()
    handler = type("Handler", (Handler,), {"parser": staticmethod(parser), "page": page})
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port} ({error}); choose another, PORT=8001") from None


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", "--name", help="checkpoint or run; default the release")
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers such as flip,1,1.5")
    parser.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1; 0: any free one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads; 0: torch's default")
    args = parser.parse_args()
    face_parser = FaceParser(args.weights, views=args.views, device=args.device, threads=args.threads)
    with make_server(face_parser, args.port) as server:
        print(f"weights {face_parser.source}")
        print(f"open http://127.0.0.1:{server.server_address[1]}; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    run_main(main)
