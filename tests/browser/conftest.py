"""What the tests in a browser share: one Chromium, and a tab in it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser.harness import Viewer, open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser


# Not for the whole session: playwright keeps an event loop running, which other tests start themselves.
@pytest.fixture(scope="package")
def browser() -> Iterator["Browser"]:
    """Skip what needs a browser where there is none; fail instead where one must be there."""
    with open_browser() as found:
        if isinstance(found, str):
            if os.environ.get("LOCFT_REQUIRE_TOOLS"):
                pytest.fail(f"LOCFT_REQUIRE_TOOLS is set, but {found}")
            pytest.skip(found)
        yield found


@pytest.fixture(scope="package")
def viewer(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    """A tab that all tests share; each shows pages of its own in it."""
    viewer = Viewer(browser, tmp_path_factory.mktemp("viewer"))
    yield viewer
    viewer.close()


@pytest.fixture(scope="package")
def bare_viewer(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    """A tab for pages without a policy, which are written into it."""
    viewer = Viewer(browser, tmp_path_factory.mktemp("viewer"))
    yield viewer
    viewer.close()


@pytest.fixture
def open_viewer(browser: "Browser", tmp_path: Path) -> Iterator[Callable[..., Viewer]]:
    """Open tabs with settings of their own."""
    opened: list[Viewer] = []

    def open_one(**options: Any) -> Viewer:
        opened.append(Viewer(browser, tmp_path, **options))
        return opened[-1]

    yield open_one
    for viewer in opened:
        viewer.close()
