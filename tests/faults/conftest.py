"""What the tests of faults share: a place on a fast disk, drivers, strace, and what they counted."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.harness import Drivers, why_no_strace
from faults.trials import Bench
from faults.worlds import Operation

_LINES = pytest.StashKey[list[str]]()

_MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[_LINES]:
        terminalreporter.write_line(f"faults: {line}")


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Say something at the end of the session, whatever pytest's flags are."""
    return pytestconfig.stash[_LINES].append


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where thousands of flushes take no time; a usual one where there is none."""
    if sys.platform == "win32":
        pytest.skip("needs fork")
    if not (_MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)):
        yield tmp_path_factory.mktemp("faults")
        return
    folder = Path(tempfile.mkdtemp(prefix="locft-faults-", dir=_MEMORY))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def drivers() -> Iterator[Drivers]:
    drivers = Drivers(2)
    yield drivers
    drivers.close()


@pytest.fixture(scope="session")
def strace(drivers: Drivers, arena: Path) -> None:
    """Skip what needs strace where it cannot be used; fail instead where it must be there."""
    with drivers.lend() as driver:
        folder = arena / "strace"
        folder.mkdir()
        reason = why_no_strace(driver, folder)
    if reason is not None:
        if os.environ.get("LOCFT_REQUIRE_TOOLS"):
            pytest.fail(f"LOCFT_REQUIRE_TOOLS is set, but {reason}")
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _tools(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("strace"):
        request.getfixturevalue("strace")


@pytest.fixture(scope="session")
def benches(drivers: Drivers, arena: Path) -> Callable[[Operation], Bench]:
    """Prepare an operation for its trials, once."""
    made: dict[str, Bench] = {}

    def bench(operation: Operation) -> Bench:
        if operation.name not in made:
            made[operation.name] = Bench(operation, drivers, arena / f"bench{len(made)}")
        return made[operation.name]

    return bench
