"""Shows reports in headless Chromium, and tells what they do there."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Playwright
    from playwright.sync_api import Page as Tab

PHONE, DESKTOP = 390, 1200
_HEIGHT = 900
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n')


def find_chromium(playwright: "Playwright") -> str | None:
    """Find Chromium: the system's, or else playwright's own; None where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    own = Path(playwright.chromium.executable_path)
    return found or (str(own) if own.is_file() else None)


@contextmanager
def open_browser() -> Iterator["Browser | str"]:
    """Start Chromium, or say why it cannot be used here."""
    if find_spec("playwright") is None:
        yield "playwright is not installed (pip install 'locft[browser]')"
        return
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            yield "Chromium is not installed (apt-get install chromium, or playwright install chromium)"
            return
        try:
            # The sandbox needs rights that root and containers lack; no page here is a stranger's.
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            yield f"Chromium cannot be started here: {error.message.splitlines()[0]}"
            return
        try:
            yield browser
        finally:
            browser.close()


def without_policy(html: str) -> str:
    """Take away what forbids the browser to do anything, so that only escaping is left."""
    html, num = _POLICY.subn("", html)
    assert num == 1, "the page has no content security policy"
    return html


class Viewer:
    """A tab of a browser, which notes whatever a page does beyond being shown.

    Attributes:
        tab: The tab.
        notes: What it did, in words: requests, dialogs, messages on the console, new windows.
    """

    def __init__(self, browser: "Browser", folder: Path, **options: Any) -> None:
        self._context: BrowserContext = browser.new_context(
            viewport={"width": DESKTOP, "height": _HEIGHT}, **options
        )
        self._context.set_offline(True)
        self._file = folder / "page.html"
        self.notes: list[str] = []
        self.tab: Tab = self._context.new_page()
        self.tab.on("request", lambda request: self._note_request(request.url))
        self.tab.on("console", lambda said: self.notes.append(f"console: {said.text}"))
        self.tab.on("pageerror", lambda error: self.notes.append(f"error: {error}"))
        self.tab.on("popup", lambda tab: self.notes.append(f"window: {tab.url}"))
        self.tab.on("download", lambda found: self.notes.append(f"download: {found.url}"))
        self.tab.on("dialog", self._note_dialog)

    def show(self, html: str, width: int = DESKTOP) -> None:
        """Open a page from a file, as users do."""
        self.notes.clear()
        self._file.write_bytes(html.encode())
        self.resize(width)
        self.tab.goto(self._file.as_uri())

    def write(self, html: str, width: int = DESKTOP) -> None:
        """Write a page into the tab: twice as fast, but a policy stays in force for all that follow."""
        self.notes.clear()
        self.resize(width)
        self.tab.set_content(html)

    def resize(self, width: int) -> None:
        """Give the window a width."""
        if self.tab.viewport_size != {"width": width, "height": _HEIGHT}:
            self.tab.set_viewport_size({"width": width, "height": _HEIGHT})

    def close(self) -> None:
        """Close the tab, and forget all that it kept."""
        self._context.close()

    def _note_request(self, url: str) -> None:
        if url != self._file.as_uri():
            self.notes.append(f"request: {url[:200]}")

    def _note_dialog(self, dialog: Any) -> None:
        self.notes.append(f"dialog: {dialog.message[:200]}")
        dialog.dismiss()
