"""Runs one command with one fault injected by strace, and tells how it ended."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

# Everything that changes a file system. The question marks are for systems that lack a call.
_WRITE_CLASS = (
    "?write,?pwrite64,?writev,?pwritev,?pwritev2,?copy_file_range,?sendfile,?splice,?truncate,"
    "?ftruncate,?fallocate,?open,?openat,?openat2,?creat,?rename,?renameat,?renameat2,?link,?linkat,"
    "?symlink,?symlinkat,?unlink,?unlinkat,?mkdir,?mkdirat,?rmdir,?mknod,?mknodat,?fsync,?fdatasync,"
    "?sync,?syncfs,?sync_file_range,?msync,?ioctl,?chmod,?fchmod,?fchmodat,?chown,?fchown,?lchown,"
    "?fchownat,?utimensat,?setxattr,?lsetxattr,?fsetxattr"
)

# Opening to read changes nothing; of ioctl, only the one that clones a file writes.
_WRITES = {
    "open": re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC)"),
    "openat": re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC)"),
    "openat2": re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC)"),
    "ioctl": re.compile(r"FICLONE"),
}

_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(.*)")

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Call:
    """A system call in a trace.

    Attributes:
        name: Its name.
        arguments: Its arguments as strace writes them.
        result: What it returned; None if the process was killed before.
        number: Which call of this name it is, from 1, whether or not the others wrote.
    """

    name: str
    arguments: str
    result: int | None
    number: int

    @property
    def is_write(self) -> bool:
        """Whether it is of the write class."""
        mark = _WRITES.get(self.name)
        return mark is None or mark.search(self.arguments) is not None

    def __str__(self) -> str:
        return f"{self.name} {self.number} ({self.arguments[:200]})"


@dataclass(frozen=True)
class Fault:
    """What is to happen at a system call: the process is killed before it, or it fails.

    Attributes:
        name: SIGKILL, or an error's name.
        lasts: Whether all later calls of the same name fail, too.
    """

    name: str
    lasts: bool = False

    def __str__(self) -> str:
        return self.name + (" from then on" if self.lasts else "")

    def at(self, call: Call) -> str:
        """Say it in strace's words."""
        kind = "signal" if self.name.startswith("SIG") else "error"
        return f"{call.name}:{kind}={self.name}:when={call.number}{'+' if self.lasts else ''}"


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        pid: The process.
        status: Its exit status; None if it was killed.
        text: What it wrote to stdout and stderr.
        signal: What it was killed by, if not 0.
        wall_s: How long it took.
        calls: Its system calls, if they were traced.
        is_faulty: Whether the fault that was to be injected took place.
    """

    pid: int
    status: int | None
    text: str
    signal: int
    wall_s: float
    calls: tuple[Call, ...] = ()
    is_faulty: bool = False

    @property
    def writes(self) -> list[Call]:
        """Its calls of the write class."""
        return [call for call in self.calls if call.is_write]


class Driver:
    """A process of `driver.py`, which runs one command at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_TIMEOUT_S)
        hidden = ("COV_CORE", "COVERAGE", "PYTHONWARNINGS")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        shared = str(Path(__file__).parents[1])  # where what tests share is
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (shared, os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-B", str(Path(__file__).with_name("driver.py"))],
                stdin=theirs.fileno(),
                env=environment | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self._lines = self._socket.makefile("r")

    def close(self) -> None:
        """End the process."""
        self._lines.close()
        self._socket.close()
        try:
            self._process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def start(self, folder: Path, words: Sequence[str], **options: object) -> int:
        """Start a command in a folder; see `driver.serve` for the options. Return its process id."""
        request = {"folder": str(folder), "words": list(words), **options}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        pid: int = self.answer()["pid"]
        return pid

    def answer(self) -> dict[str, Any]:
        """Wait for what the driver or the command says next."""
        found: dict[str, Any] = json.loads(self._lines.readline())
        return found

    def finish(self, pid: int) -> Ending:
        """Wait for the end of a command that was started."""
        status, text = None, ""
        while True:
            answer = self.answer()
            if "status" in answer:
                status, text = answer["status"], answer["text"]
            if "signal" in answer:
                return Ending(pid, status, text, **answer)

    def run(self, folder: Path, words: Sequence[str], **options: object) -> Ending:
        """Run a command in a folder."""
        return self.finish(self.start(folder, words, **options))

    def trace(
        self,
        folder: Path,
        words: Sequence[str],
        fault: tuple[Fault, Call] | None = None,
        **options: object,
    ) -> Ending:
        """Run a command under strace, with a fault at one of its system calls.

        Raises:
            RuntimeError: strace cannot attach to the process.
        """
        log = folder.with_name(f"{folder.name}.strace")
        # Paths are always written in full; of what is written to files, nothing need be.
        command = ["strace", "-y", "-s", "0", "-o", str(log)]
        if fault is None:
            command += ["-e", f"trace={_WRITE_CLASS}"]
        else:
            injected, call = fault
            command += ["-e", f"trace={call.name}", "-e", f"inject={injected.at(call)}"]
        pid = self.start(folder, words, is_stopped=True, **options)
        try:
            with _attached(command, pid):
                os.kill(pid, signal.SIGCONT)
                ending = self.finish(pid)
        except RuntimeError:
            os.kill(pid, signal.SIGKILL)
            self.finish(pid)
            raise
        told = log.read_text(errors="replace")
        is_faulty = "(INJECTED)" in told or "+++ killed by SIGKILL +++" in told
        return replace(ending, calls=tuple(_parse(told)), is_faulty=is_faulty)


@contextmanager
def _attached(command: Sequence[str], pid: int) -> Iterator[None]:
    words = [*command, "-p", str(pid)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        line = strace.stderr.readline()
        if "attached" not in line:
            raise RuntimeError(line.strip() or "strace said nothing")
        try:
            yield
        finally:
            try:
                strace.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                strace.kill()


def _parse(log: str) -> Iterator[Call]:
    numbers: Counter[str] = Counter()
    for line in log.splitlines():
        if found := _CALL.fullmatch(line):
            name, arguments, result, _ = found.groups()
            numbers[name] += 1
            yield Call(name, arguments, None if result == "?" else int(result), numbers[name])


def why_no_strace(driver: Driver, folder: Path) -> str | None:
    """Say why strace cannot be used here; None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt-get install strace)"
    try:
        ending = driver.trace(folder, ["sweep", "nothing"])
    except RuntimeError as error:
        return f"strace cannot trace processes here: {error}"
    finally:
        with suppress(OSError):
            folder.with_name(f"{folder.name}.strace").unlink()
    return None if ending.writes else "strace traces nothing here"


class Drivers:
    """A driver for each processor, lent to whoever needs one."""

    def __init__(self, num: int) -> None:
        self._all = [Driver() for _ in range(num)]
        self._free: SimpleQueue[Driver] = SimpleQueue()
        for driver in self._all:
            self._free.put(driver)
        self.num = num

    @contextmanager
    def lend(self) -> Iterator[Driver]:
        """Lend a driver."""
        driver = self._free.get()
        try:
            yield driver
        finally:
            self._free.put(driver)

    def close(self) -> None:
        """End all of them."""
        for driver in self._all:
            driver.close()
