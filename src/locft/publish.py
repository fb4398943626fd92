"""Folders that come into being whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from locft.errors import InputError


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Build a folder beside its target, and move it there when the body is done.

    Whatever stops the body, an interrupt included, removes what it built. Parents of the target
    are created where missing, and stay.

    Args:
        target: The folder to create; it may exist if it is empty.

    Yields:
        An empty folder to fill: a hidden sibling of the target, hence on its file system.

    Raises:
        InputError: `target` is taken (at the start or, by then, at the end), or its parent cannot
            be written to.
    """
    target = target.resolve()
    refuse_taken(target)
    # Not tempfile.mkdtemp: it makes folders that only their owner can enter.
    staging = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        try:
            staging.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        except OSError as error:
            raise InputError(f"{target}: the folder cannot be created: {error}") from error
        yield staging
        try:
            staging.rename(target)
        except OSError:
            refuse_taken(target)
            raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_taken(target: Path) -> None:
    """Refuse a folder that something stands in already, or that cannot be created.

    Raises:
        InputError: `target` exists and is no empty folder, or its parent cannot be written to.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise InputError(
                f"{target}: exists and is not empty; name another folder, or remove this one"
            )
    elif target.exists():
        raise InputError(f"{target}: exists and is not a folder; name another one")
    else:
        parent = next(folder for folder in target.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{target}: the folder cannot be created: {parent} cannot be written to")
