"""The page of `make try`: what it shows and saves in Chromium, and the requests that its server refuses."""

import base64
import http.client
import io
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import UserError

import numpy as np
import pytest
from PIL import Image

from checks.conftest import cases, untrained
from images import read_image
from labels import COLOURS
from predict import FaceParser, overlay
from tools import serve
from tools.course_report import BROWSERS

PHOTO = "docs/astronaut.jpg"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server of an untrained network for 64 pixels."""
    path = tmp_path_factory.mktemp("serve") / "a.pt"
    untrained(path)
    with serve.make_server(FaceParser(path, device="cpu"), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method="POST", path="/parse?whole", body=None, **headers):
    """(status, body) of a request; a header's value of None leaves the header out."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Host": f"127.0.0.1:{port}", "Content_Length": len(body or b"")} | headers
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), str(value))
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_the_answer_is_the_mask_of_predict(server):
    status, body = ask(server, body=Path(PHOTO).read_bytes())
    mask = np.asarray(Image.open(io.BytesIO(body)))
    assert status == 200 and np.array_equal(mask, server.RequestHandlerClass.parser(PHOTO, whole=True).mask)


REFUSED = [
    *[({"Host": "example.com"}, 403, "other hosts"), ({"Host": "127.0.0.1:1"}, 403, "other hosts")],
    *[({"Origin": "http://example.com"}, 403, "other sites"), ({"Origin": "null"}, 403, "other sites")],
    *[({"Content_Length": None}, 411, "length"), ({"Content_Length": "-1"}, 411, "length")],
    *[({"body": bytes(serve.MAX_BYTES + 1)}, 413, "more than 40 MB"), ({"body": b"x"}, 415, "unknown format")],
    *[({"path": "/mask"}, 404, "/parse"), ({"method": "GET", "path": "/../Makefile"}, 404, "the page is at /")],
]


@cases(("request_", "status", "text"), REFUSED, ids=range(len(REFUSED)))
def test_refused_requests_have_a_clear_answer(server, request_, status, text):
    answer, body = ask(server, **request_)
    assert answer == status and text in body.decode() and body.count(b"\n") == 0


def test_pictures_are_decoded_one_at_a_time(server, monkeypatch):
    running, most = [], []

    def decode(*_):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        raise UserError("no picture")

    monkeypatch.setattr(serve, "decode_picture", decode)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(server, body=b"x")[0], range(4)))
    assert answers == [415] * 4 and max(most) == 1


def saved(page, name):
    with page.expect_download() as download:
        page.click(f"#{name}")
    with Image.open(download.value.path()) as image:
        return download.value.suggested_filename, np.array(image.convert("RGBA"))


@pytest.fixture
def page(server):
    """The page in Chromium; an error in its scripts fails the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip("no Chromium")
    problems, flags = [], ["--no-sandbox", "--disable-background-networking"]
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=path, args=flags) as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: problems.append(error))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}")
        yield page
    assert not problems


DROP = """const files = new DataTransfer();
files.items.add(new File([Uint8Array.from(atob("%s"), c => c.charCodeAt())], "dropped.jpg"));
document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));"""


def test_page_shows_and_saves_a_picture_and_names_a_wrong_file(server, page):
    from playwright.sync_api import expect

    page.add_script_tag(content=DROP % base64.b64encode(Path(PHOTO).read_bytes()).decode())
    answered = re.compile("No face found in dropped.jpg|dropped.jpg, .* faces: ")
    expect(page.locator("#message")).to_have_text(answered, timeout=60000)
    page.check("#whole")
    page.set_input_files("#file", PHOTO)
    expect(page.locator("#message")).to_contain_text("faces: not searched", timeout=60000)
    pixels, mask = read_image(PHOTO), server.RequestHandlerClass.parser(PHOTO, whole=True).mask
    colours = np.array(COLOURS, np.uint8)[mask]
    assert (saved(page, "mask")[1][..., :3] == colours).all()
    name, blended = saved(page, "overlay")
    assert name == "astronaut-overlay.png" and abs(blended[..., :3].astype(int) - overlay(pixels, mask)).max() <= 2
    label = np.bincount(mask.ravel()).argmax()
    page.locator("#legend input").nth(label).uncheck()
    page.locator("#legend input").nth(0).set_checked(label > 0)
    assert ((saved(page, "cutout")[1][..., 3] == 0) == (mask == label)).all()
    page.focus("#view")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#where")).to_have_text(re.compile(r"^[a-z_]+ at \d+, \d+$"))
    page.set_input_files("#file", "Makefile")
    expect(page.locator("#message.error")).to_contain_text("Makefile: cannot read this file", timeout=60000)
