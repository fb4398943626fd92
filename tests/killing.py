"""Stacks and reverts patches in forked children, and kills each child at an event of its choosing.

Started as a script, which loads no torch, so that a fork takes a millisecond: each line of its input
is an operation, and each line of its output says what became of it.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy  # noqa: F401 (else each child would load it)

import locft
from locft.errors import LocftError
from locft.patch.apply import revert_patches, stack_patches
from locft.patch.format import open_patch

# What Python tells before it changes something on the disk. A child is killed instead.
EVENTS = {
    "fcntl.flock",
    "fcntl.ioctl",
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
}

DONE, REFUSED, FAILED = 0, 3, 4


def perform(words: Mapping[str, Any]) -> tuple[str, ...]:
    """Carry out an operation: `folder`, `output` or None, and either `patches` or `ids`."""
    folder, output = Path(words["folder"]), words["output"]
    where = None if output is None else Path(output)
    if "ids" in words:
        return revert_patches(folder, words["ids"], where)
    return stack_patches(folder, [open_patch(Path(path)) for path in words["patches"]], where)


class Killer:
    """The process in whose children operations are killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(*locft.__path__).parent)},
        )

    def perform(self, words: Mapping[str, Any], kill_at: int) -> int:
        """Carry out an operation in a child that is killed before its event of this number, from 1.

        Returns:
            The child's exit status; minus the signal that killed it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**words, "kill_at": kill_at}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _serve() -> None:
    gc.freeze()  # so that children do not copy what is here
    for line in sys.stdin:
        words = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(words)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _run(words: dict[str, Any]) -> None:
    left = words.pop("kill_at")

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        is_write = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_write or event in EVENTS or event.startswith("shutil."):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    status = FAILED
    try:
        sys.addaudithook(count)
        perform(words)
        status = DONE
    except LocftError:
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
