"""Takes the pictures of docs/pictures anew, in headless Chromium: the demo, asked something, and a run's report.

    python scripts/pictures.py demo runs/small-stage2        # docs/pictures/demo.png
    python scripts/pictures.py report runs/small-stage2      # docs/pictures/report.png, of the run's report.html

Run it in the checkout after scripts/quickstart.sh; it needs Chromium, and the extras `demo` and `dev`. The quickstart's
model is asked about a scene that it was not trained on; --picture and --question ask something else.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
WIDTH, DEMO_HEIGHT, REPORT_HEIGHT = 1200, 700, 1160
MAX_BYTES = 150_000
_PICTURE = "data/scenes/images/held-out-00000.png"
_QUESTIONS = ["What colour is the object?", "Where is the purple star?", "Is there a red circle?"]


@contextmanager
def browser_page(height: int) -> Iterator[Any]:
    """An empty page of Chromium, light."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("no Chromium found; install one, e.g. apt install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH, "height": height}, color_scheme="light")
        browser.close()


@contextmanager
def demo_of(run: str) -> Iterator[str]:
    """The address of `llava-train demo`, as long as it is asked."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llava_train", "demo", run, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if not any("answers at" in line for line in process.stdout):
                sys.exit("the demo did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def take_demo(run: str, picture: Path, questions: list[str], out: Path) -> None:
    with demo_of(run) as address, browser_page(DEMO_HEIGHT) as page:
        page.goto(address)
        page.get_by_role("button", name="Ask").wait_for()
        page.locator('input[type="file"]').first.set_input_files(picture)
        page.locator('#picture img[src$=".webp"]').wait_for()
        for n_answers, question in enumerate(questions, 1):
            page.get_by_placeholder("Your question").fill(question)
            page.get_by_role("button", name="Ask").click()
            page.wait_for_function(f"document.querySelectorAll('[data-testid=\"bot\"]').length == {n_answers}")
            page.get_by_role("button", name="Ask").wait_for()
        page.mouse.move(0, 0)
        save(page.screenshot(), out)


def take_report(run: str, out: Path) -> None:
    report = Path(run) / "report.html"
    if not report.is_file():
        sys.exit(f"{report} is not there; make it: llava-train report {run}")
    with browser_page(REPORT_HEIGHT) as page:
        page.goto(report.resolve().as_uri())
        page.wait_for_load_state("networkidle")
        save(page.screenshot(), out)


def save(png: bytes, out: Path) -> None:
    """Writes a screenshot with as many colours of a palette as `MAX_BYTES` allow."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for n_colours in (256, 128, 64, 32):
        written = io.BytesIO()
        picture.quantize(n_colours, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
        if written.tell() <= MAX_BYTES:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(written.getvalue())
    print(f"{out}: {picture.width} x {picture.height}, {written.tell() / 1000:.0f} KB, {n_colours} colours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "report"])
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--out", type=Path, help="default: docs/pictures/WHAT.png")
    parser.add_argument("--picture", type=Path, default=Path(_PICTURE))
    parser.add_argument("--question", action="append", help="may be given several times")
    args = parser.parse_args()
    out = args.out or PICTURES / f"{args.what}.png"
    if args.what == "demo":
        take_demo(args.run, args.picture, args.question or _QUESTIONS, out)
    else:
        take_report(args.run, out)


if __name__ == "__main__":
    main()
