"""Files that others made: opened only if they are files, and read only if they are not too large."""

import errno
import os
import stat
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read its bytes, without ever waiting for one.

    Args:
        path: The file; a link to one will do.

    Returns:
        The open file.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
        ValueError: There is a NUL in the path.
    """
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb", opener=_open_at_once))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is a pipe or a device, expected a regular file")
        opened.pop_all()
        return file


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a file that is not larger than it has reason to be.

    Args:
        path: The file.
        max_bytes: The most that it may hold.

    Returns:
        Its contents.

    Raises:
        OSError: As `open_regular`.
        ValueError: It is larger, and was not read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{size:,} bytes long, expected at most {max_bytes:,}")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    # Opening a pipe would wait for its writer. Windows has no such flag, and no such pipes.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
