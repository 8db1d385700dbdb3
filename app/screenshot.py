"""The picture of the page: python -m app.screenshot RUN AUDIO --transcript … --out page.png

It opens the page of a run in a headless chromium, asks about a recording, and looks inside.
"""

import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from lab.programs import run_program
from support.files import PROJECT, UserError, unused
from support.options import RunFolder, called

PORT = 7863


@dataclass
class ScreenshotOptions:
    run: RunFolder
    """a run folder with a trained recipe"""
    audio: called("AUDIO")
    """the recording that is heard"""
    transcript: str
    """what is said in it"""
    out: str
    """the picture to write"""
    question: str = "Repeat this."
    """what is asked"""
    chromium: str = "/usr/bin/chromium"
    """the browser"""


def take_screenshot(options):
    """Open the page, ask, look inside, and write what is seen."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("a screenshot needs playwright: pip install playwright") from None
    out = unused(options.out, "--out")
    command = [sys.executable, "mtbi.py", "serve", str(Path(options.run).resolve())]
    server = subprocess.Popen([*command, "--port", str(PORT)], cwd=PROJECT)
    try:
        wait_for_page(server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox"]
            )
            tab = browser.new_page(viewport={"width": 1300, "height": 900})
            ask_on_page(tab, options)
            tab.screenshot(path=out, full_page=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    print(f"{out}: written")


def wait_for_page(server):
    """Until the page is there; UserError if its program ended instead."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}", timeout=5)
            return
        except OSError:
            time.sleep(0.25)
    raise UserError("the page could not be opened; `serve` says why")


def ask_on_page(tab, options):
    """Upload, ask, wait for every answer, and open the inside."""
    tab.goto(f"http://127.0.0.1:{PORT}")
    tab.click("#speech button[aria-label='Upload file']")
    tab.set_input_files("#speech input[type=file]", options.audio)
    tab.wait_for_timeout(3000)  # what is heard anew has no transcript yet: it is taken away
    tab.fill("#transcript textarea, #transcript input", options.transcript)
    tab.fill("#question textarea, #question input", options.question)
    tab.click("#ask")
    tab.wait_for_function(
        "document.querySelectorAll('#chat-text .message').length >= 2", timeout=120_000
    )
    tab.wait_for_timeout(3000)
    tab.click("text=look inside")
    tab.click("#look")
    tab.wait_for_selector("#inside img", timeout=120_000)
    tab.wait_for_timeout(2000)


if __name__ == "__main__":
    sys.exit(run_program("screenshot", ScreenshotOptions, take_screenshot, "app"))
