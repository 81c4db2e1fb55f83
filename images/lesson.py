"""A screenshot of lesson 05 in JupyterLab, for the README.

Unlike the other pictures this one needs a browser: ``pip install playwright``, and Chromium. The
variable ``CHROMIUM`` says where it is, if not at /usr/bin/chromium. Without them it is kept as it
is.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from course_lib.style import GREY

ROOT = Path(__file__).resolve().parent.parent
PICTURE = Path(__file__).with_suffix(".png")
LESSON = "notebooks/05_pipeline_parallelism.ipynb"
RADIUS, THICK = 10, 2  # of the frame, in pixels
LAST_WORDS = "There is the answer to the first guess"
# To the bottom of the window, and a little further: words do not touch the line below them.
SCROLL = """element => {
  element.scrollIntoView({block: 'end'});
  element.closest('.jp-WindowedPanel-outer').scrollBy(0, 12);
}"""
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"


def main() -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("  no playwright: images/lesson.png is kept as it is")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1",
         f"--port={port}", f"--IdentityProvider.token={token}", "--allow-root"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with sync_playwright() as playwright:
            path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
            page = browser.new_page(viewport={"width": 1080, "height": 868})
            _open(page, f"http://127.0.0.1:{port}/doc/tree/{LESSON}?token={token}")
            reading = page.get_by_role("paragraph").filter(has_text=LAST_WORDS)
            reading.wait_for(timeout=180_000)
            news = page.get_by_role("button", name="No", exact=True)
            if news.is_visible():
                news.click()
            if page.locator("#filebrowser").is_visible():
                page.keyboard.press("Control+b")  # room for the lesson
            for _ in range(3):  # cells are laid out as they come into view, and move the rest
                reading.evaluate(SCROLL)
                page.wait_for_timeout(1500)
            with_frame(page.screenshot()).save(PICTURE, optimize=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def with_frame(screenshot: bytes) -> Image.Image:
    """With round corners, and a line around it that is seen on a white page and on a dark one."""
    picture = Image.open(BytesIO(screenshot)).convert("RGB")
    corners = Image.new("L", (2 * picture.width, 2 * picture.height))  # halved below: smooth
    box = (0, 0, corners.width - 1, corners.height - 1)
    ImageDraw.Draw(corners).rounded_rectangle(box, 2 * RADIUS, fill=255)
    large = picture.resize(corners.size, Image.Resampling.NEAREST)
    ImageDraw.Draw(large).rounded_rectangle(box, 2 * RADIUS, outline=GREY, width=2 * THICK)
    framed = large.resize(picture.size, Image.Resampling.BOX)
    framed.putalpha(corners.resize(picture.size, Image.Resampling.BOX))
    return framed


def _open(page, address: str) -> None:
    """Go to ``address`` as soon as the server answers."""
    for _ in range(60):
        try:
            page.goto(address)
            return
        except Exception:
            page.wait_for_timeout(500)
    raise RuntimeError("JupyterLab did not start")


if __name__ == "__main__":
    main()
