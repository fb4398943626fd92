"""Take the pictures of a report that docs/pictures holds.

    python bench/screenshots.py RUN             RUN/report.html on a desktop, on a phone, and in the dark
    python bench/screenshots.py STUDY --charts  the charts of STUDY/report.html, in one picture

The first are the top of the page, in headless Chromium. It needs the extra `browser`, and Chromium.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
# Name, width and height in pixels, and the scheme of colours.
VIEWS = (
    ("report-desktop", 1200, 1500, "light"),
    ("report-phone", 390, 1600, "light"),
    ("report-dark", 1200, 1500, "dark"),
)


CHARTS_WIDTH = 1100


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser while the body runs.

    Raises:
        LookupError: There is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(own)
        if path is None:
            raise LookupError(
                "Chromium is not installed (apt-get install chromium, or playwright install chromium)"
            )
        # The sandbox needs rights that root and containers lack; the page is one that was made here.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def take_pictures(page: Path, folder: Path) -> list[Path]:
    """Take all pictures of a page.

    Args:
        page: The page.
        folder: Where the pictures go; it is made.

    Returns:
        The pictures.

    Raises:
        LookupError: There is no Chromium.
    """
    files = []
    with chromium() as browser:
        folder.mkdir(parents=True, exist_ok=True)
        for name, width, height, scheme in VIEWS:
            size = {"width": width, "height": height}
            tab = browser.new_page(viewport=size, color_scheme=scheme, java_script_enabled=False)
            tab.goto(page.resolve().as_uri())
            file = folder / f"{name}.png"
            tab.screenshot(path=file)
            tab.close()
            files.append(file)
    return files


def take_charts(page: Path, folder: Path) -> list[Path]:
    """Take one picture of the first part of a page that holds charts, named after the page's folder."""
    file = folder / f"{page.resolve().parent.name}.png"
    with chromium() as browser:
        folder.mkdir(parents=True, exist_ok=True)
        tab = browser.new_page(
            viewport={"width": CHARTS_WIDTH, "height": 900},
            device_scale_factor=1.5,
            color_scheme="light",
            java_script_enabled=False,
        )
        tab.goto(page.resolve().as_uri())
        tab.locator("section:has(figure)").first.screenshot(path=file)
    return [file]


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--charts", action="store_true", help="only the charts of a study")
    parser.add_argument("-o", "--output", type=Path, default=PICTURES, help="a folder (%(default)s)")
    words = parser.parse_args()
    page = words.run / "report.html"
    if not page.is_file():
        sys.exit(f"{page}: there is no such file; `locft report {words.run}` draws the report of a run")
    if find_spec("playwright") is None:
        sys.exit("playwright is not installed; pip install 'locft[browser]'")
    try:
        files = (take_charts if words.charts else take_pictures)(page, words.output)
    except LookupError as error:
        sys.exit(str(error))
    for file in files:
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
