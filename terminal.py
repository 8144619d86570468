"""What a terminal shows and a pipe or file does not: colours, and a line rewritten in place.

NO_COLOR (no-color.org) and TERM=dumb turn colours off.
"""

import os
import shutil
import sys

CODES = {"good": "32", "warning": "33", "error": "31", "bold": "1"}


def style(text, name, stream):
    """`text` in a colour or weight (a key of CODES) where `stream` is a terminal that wants it, else as it is."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{CODES[name]}m{text}\x1b[0m"


def printable(text):
    """`text` as one line that a terminal takes as text: no control characters, no bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def show_line(text, stream):
    """Show `text` in the place of the last such line, cut to the terminal's width; "" clears it. Nothing in a pipe."""
    if stream.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="" if text else "\r", file=stream, flush=True)


def show_count(doing, done, total, seconds):
    """The running line, on stderr, of work on `total` things, `done` of them in so many seconds; gone after the last.

    Nothing where there is but one.
    """
    speed = done / max(seconds, 1e-9)
    text = f"{doing} {done}/{total} {speed:.1f}/s ETA {duration((total - done) / speed)}"
    if total > 1:
        show_line(text if done < total else "", sys.stderr)


def duration(seconds):
    """A length of time as people say it: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
