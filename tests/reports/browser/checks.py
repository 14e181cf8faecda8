"""What every page has to be, whatever it shows."""

import os
from pathlib import Path

from tests.reports.browser.chrome import Chrome

CHECKS = Path(__file__).with_name("checks.js").read_text(encoding="utf-8")


def check_page(chrome: Chrome, page: Path, width: int, scheme: str) -> None:
    """Readable at a width in a colour scheme, and asking for nothing.

    Where SCREENSHOTS names a folder, a picture of the page goes there, to be looked at.
    """
    chrome.requested(), chrome.errors()
    chrome.open(page, width, scheme)
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, f"{page.stem}-{width}-{scheme}.png").write_bytes(chrome.picture())
    assert chrome.run("return innerWidth") == width
    assert chrome.run(f"{CHECKS} return cutOff()") == []
    assert chrome.run(f"{CHECKS} return overlaps()") == []
    assert chrome.run(f"{CHECKS} return faint()") == []
    assert chrome.run(f"{CHECKS} return torn()") == []
    assert chrome.errors() == []
    assert [url for url in chrome.requested() if not url.startswith(("file:", "data:"))] == []
    dark = chrome.run("return getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") is (scheme == "light")
