"""Files and folders that come into being whole or not at all, whatever stops their writer.

Everything is written beside its place under a temporary name, flushed to the disk, and moved there
by one rename. A lock, which dies with its process, keeps two writers apart; what a killed writer
left behind is removed by the next one.
"""

import errno
import fcntl
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from locft.errors import InputError

_TEMPORARY = re.compile(r"\.locft-[0-9a-f]{8}-(.+)", re.DOTALL)

_LOCK = ".locft-lock-"

# File systems that have no locks (some network ones) are written to without.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

# Which thread of this process holds which lock, so that nested writers need not know of each other.
_held: dict[Path, int] = {}

# The folders that this process is building.
_being_built: set[Path] = set()


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Build a folder beside its target, and move it there when the body is done.

    Whatever stops the body, an interrupt included, removes what it built; what a kill left behind,
    the next writer in the same parent folder removes. Parents of the target are created where
    missing, and stay.

    Args:
        target: The folder to create; it may exist if it is empty.

    Yields:
        An empty folder to fill: a hidden sibling of the target, hence on its file system.

    Raises:
        InputError: `target` is taken (at the start or, by then, at the end) or a link, another
            process is writing it, or its parent cannot be written to.
    """
    with reserved(target):
        target = _with_real_parents(target)
        # Not tempfile.mkdtemp: it makes folders that only their owner can enter.
        staging = temporary_path(target)
        _being_built.add(staging)
        try:
            try:
                staging.mkdir()
            except OSError as error:
                raise _cannot_create(target, error) from error
            yield staging
            _sync_tree(staging)
            try:
                staging.rename(target)
            except OSError:
                refuse_taken(target)
                raise
            try:
                sync_folder(target.parent)
            except OSError as error:
                raise InputError(
                    f"{target}: is whole, but its disk did not confirm that it will stay"
                    f" ({error.strerror}); check the disk, and write it again elsewhere"
                ) from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            _being_built.discard(staging)


@contextmanager
def reserved(target: Path) -> Iterator[None]:
    """Keep a folder that is to be created free for the caller while the body runs.

    Args:
        target: The folder; it may exist if it is empty. Missing parents are created.

    Raises:
        InputError: As `staged_folder`.
    """
    refuse_taken(target)
    parent = _with_real_parents(target).parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
    except OSError as error:
        raise _cannot_create(target, error) from error
    with locked(target):
        _sweep_folders(parent)
        refuse_taken(target)
        yield


def add_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Add files to a folder, each whole or not at all.

    Args:
        folder: The folder; the caller holds its lock.
        files: What each file shall hold; they appear in this order, so that the last one tells that
            all are there.

    Raises:
        OSError: A file cannot be written.
    """
    staging = temporary_path(_with_real_parents(folder))
    _being_built.add(staging)
    try:
        staging.mkdir()
        for name, data in files.items():
            (staging / name).write_bytes(data)
        _sync_tree(staging)
        for name in files:
            (staging / name).replace(folder / name)
            sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _being_built.discard(staging)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; an existing one, or a link, is replaced; its mode stays.

    Args:
        path: The file.
        data: What it shall hold.

    Raises:
        OSError: It cannot be written; whatever stood there still does.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():
            keep_mode(path, temporary)
        replace_file(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def keep_mode(path: Path, new: Path) -> None:
    """Give a file that is to replace another one its mode; a link has none of its own."""
    if not path.is_symlink():
        with suppress(PermissionError):  # a file system that has no modes
            shutil.copymode(path, new)


def replace_file(source: Path, target: Path) -> None:
    """Move a finished file to its place in the same folder, and see to it that it stays there."""
    source.replace(target)
    sync_folder(target.parent)


def temporary_path(path: Path) -> Path:
    """Return a new name beside a path, one by which the next writer knows it as left behind."""
    return path.with_name(f".locft-{secrets.token_hex(4)}-{path.name}")


def is_temporary(name: str, of: str) -> bool:
    """Tell whether a name is one that `temporary_path` makes for another."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found[1] == of


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    _sync(folder, os.O_DIRECTORY)


def require_space(shown: Path, folder: Path, num_bytes: int, purpose: str = "") -> None:
    """Refuse to write more than a disk has room for.

    Args:
        shown: What the message names.
        folder: A folder on the disk.
        num_bytes: How much is to be written.
        purpose: What for, for the message: `` for ...``.

    Raises:
        InputError: There is not enough free space.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise InputError(
            f"{shown}: not enough disk space{purpose}: {num_bytes:,} bytes needed, {free:,} bytes free"
        )


def refuse_taken(target: Path) -> None:
    """Refuse a folder that something stands in already, or that cannot be created.

    Raises:
        InputError: `target` is a link, a mount point or the working directory, exists and is no
            empty folder, or its parent cannot be written to.
    """
    try:
        mode = target.lstat().st_mode  # once, as another writer may be about to put it there
    except (FileNotFoundError, NotADirectoryError):
        parent = next(folder for folder in target.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(
                f"{target}: the folder cannot be created: {parent} cannot be written to"
            ) from None
        return
    if stat.S_ISLNK(mode):
        raise InputError(f"{target}: is a link; name the folder itself")
    if not stat.S_ISDIR(mode):
        raise InputError(f"{target}: exists and is not a folder; name another one")
    # A finished folder takes the place of an empty one, which these two cannot give up.
    if target.resolve().is_mount():
        raise InputError(f"{target}: is a mount point; name a folder in it")
    if Path.cwd().is_relative_to(target.resolve()):
        raise InputError(f"{target}: is the working directory, or holds it; name a folder in it")
    if any(target.iterdir()):
        raise InputError(f"{target}: exists and is not empty; name another folder, or remove this one")


@contextmanager
def locked(target: Path, shown: Path | None = None) -> Iterator[bool]:
    """Keep every other writer away from a file or folder while the body runs.

    The lock is a file beside the target, and the system frees it when its process ends, however it
    ends. Within one thread, locks of the same target may nest.

    Args:
        target: What will be written; its parent must exist.
        shown: What messages name instead of it.

    Yields:
        Whether nobody else can be writing it; False where the file system has no locks.

    Raises:
        InputError: Another process or thread is writing it (the message names the holder), or its
            parent cannot be written to.
    """
    target = _with_real_parents(target)
    lock = target.with_name(_LOCK + target.name)
    # Nobody else writes within a folder that this process is building, and no lock shall stay in it.
    if _held.get(lock) == threading.get_ident() or not _being_built.isdisjoint(target.parents):
        yield True
        return
    descriptor = _acquire(lock, shown or target)
    if descriptor is None:
        yield False
        return
    try:
        _held[lock] = threading.get_ident()
        yield True
    finally:
        _held.pop(lock, None)
        # Removed before it is freed: the next writer makes a new one.
        with suppress(OSError):
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _sweep_folders(parent: Path) -> None:
    """Remove the staged folders and locks that killed writers left in a folder; live ones stay."""
    names = set()
    for path in parent.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink():
            names.add(found[1])
        elif path.name.startswith(_LOCK) and path.is_file():
            names.add(path.name.removeprefix(_LOCK))
    for name in names:
        # A lock that is held belongs to a live writer.
        with suppress(InputError), locked(parent / name) as is_alone:
            for path in parent.iterdir() if is_alone else ():
                found = _TEMPORARY.fullmatch(path.name)
                if found and found[1] == name and path.is_dir() and path not in _being_built:
                    shutil.rmtree(path, ignore_errors=True)


def temporary_files(folder: Path) -> list[Path]:
    """List the temporary files in a folder."""
    return [
        path
        for path in folder.iterdir()
        if _TEMPORARY.fullmatch(path.name) and (path.is_symlink() or not path.is_dir())
    ]


def _acquire(lock: Path, shown: Path) -> int | None:
    """Take a lock; None where the file system has no locks."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"{shown}: cannot be written to: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{shown}: is being written by another locft ({_holder(descriptor)});"
                    " wait for it, or stop it"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                lock.unlink(missing_ok=True)
                os.close(descriptor)
                return None
            # Whoever held the lock may have removed the file meanwhile; then it guards nothing.
            if _is_open_as(lock, descriptor):
                try:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, _describe_process().encode(errors="replace"), 0)
                except BaseException:
                    with suppress(OSError):
                        lock.unlink()
                    raise
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Read who holds a lock; it says so right after it took it."""
    for _ in range(20):
        if holder := os.pread(descriptor, 400, 0).decode(errors="replace").strip():
            return holder
        time.sleep(0.01)
    return "it just started"


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _describe_process() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"process {os.getpid()} on {socket.gethostname()}: {command[:200]}"


def _with_real_parents(path: Path) -> Path:
    # Not the path itself: it may be a link, and that is to be seen.
    path = path.absolute()
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _cannot_create(target: Path, error: OSError) -> InputError:
    return InputError(f"{target}: the folder cannot be created: {error.strerror}")


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            _sync(Path(parent, name))
        sync_folder(Path(parent))


def _raise(error: OSError) -> None:
    raise error


def sync_file(path: Path) -> None:
    """Flush a file's data to the disk."""
    _sync(path)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
