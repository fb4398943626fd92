"""Gives memory back that frozen weights take up: they lie in a file, and can be read again.

transformers maps a checkpoint's safetensors files into memory, so weights that no dtype or device asks
to be copied come and go with the pages of those files. The system takes such pages away when it needs
room; here it is told early which ones a run is done with, so that its peak is what it needs at once.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MADV_PAGEOUT = 21  # Linux 5.4; Python's mmap module has no name for it


def page_out(tensors: Iterable[Tensor]) -> None:
    """Tell the system to drop tensors from memory that are parts of mapped files.

    Their values stay: whoever reads them has them read from the file again. Others are left alone, and
    so are all where the system has no such call.

    Args:
        tensors: Any tensors; those on other devices are left alone.
    """
    if sys.platform != "linux":
        return
    starts, ends = _file_mappings()
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or not starts:
        return
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        address = tensor.data_ptr()
        found = bisect_right(starts, address) - 1
        end = address + tensor.nbytes
        if found < 0 or end > ends[found]:
            continue
        # Whole pages within it: neighbours may still be needed.
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (end - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            # What it returns does not matter: it may fail, and nothing depends on it.
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def give_back_freed() -> None:
    """Let the system have the memory that was freed; glibc would keep it for what comes next.

    A run's phases need memory in other pieces, so that what one leaves is of little use to the other.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _file_mappings() -> tuple[list[int], list[int]]:
    """List where mapped files begin and end in memory, in order."""
    starts, ends = [], []
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], []
    for line in maps.splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, end = addresses.split("-")
            starts.append(int(start, 16))
            ends.append(int(end, 16))
    return starts, ends
