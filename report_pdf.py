"""Print a run's report draft, runs/NAME/report.html, as report.pdf beside it, and count its pages.

python report_pdf.py --name a
python report_pdf.py              # of the release or the best run

Chromium or Chrome prints it; where there is none, print the file from any browser (A4, no headers or footers).
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from atomic import atomic
from errors import ArgumentParser, UserError, run_main
from report_zip import MAX_PAGES, count_pages
from rundir import find_run, find_weights, make_name

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip


def find_browser():
    """The path of a Chromium-like browser, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def run_browser(browser, *flags, timeout=120):
    """Run the browser without a window on a profile of its own, which is thrown away; (standard output, error output).

    UserError where it fails or takes too long.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--disable-gpu", f"--user-data-dir={profile}", *flags]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # its sandbox refuses to run as root; the page is our own
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{browser} did not print: {error}") from None
    if done.returncode:
        raise UserError(f"{browser} failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return done.stdout, done.stderr


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--name", help="run; default the release, else the best run")
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    args = parser.parse_args()
    folder = find_run(args.name, args.runs) if args.name else find_weights(None, args.runs).parent
    source, target = folder / "report.html", folder / "report.pdf"
    if not source.is_file():
        raise UserError(f"no {source}; `make report NAME={make_name(folder)} AUTHOR= MATRIC=` drafts it")
    browser = find_browser()
    if not browser:
        raise UserError(
            f"no Chromium or Chrome here: open {source} in a browser and print it to {target}, A4, no headers"
        )
    with atomic(target) as temporary:
        page = Path(source).resolve().as_uri()
        run_browser(browser, "--no-pdf-header-footer", f"--print-to-pdf={Path(temporary).resolve()}", page)
    pages = count_pages(target)
    if pages > MAX_PAGES:
        raise UserError(f"{target} has {pages} pages, {MAX_PAGES} are allowed: shorten {source} and print it again")
    print(f"{target}: {pages} pages; next: make report-zip NAME={make_name(folder)} MATRIC=")
    return 0


if __name__ == "__main__":
    run_main(main)
