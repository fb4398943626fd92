import os
from pathlib import Path

import pytest

from locft.openfile import open_regular, read_limited


def test_a_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"abc"
        assert read_limited(tmp_path / name, 3) == b"abc"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="is a pipe or a device, expected a regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 10**11)  # a hole: reading it would take all memory
    with pytest.raises(ValueError, match="100,000,000,000 bytes long, expected at most 10"):
        read_limited(path, 10)
    os.truncate(path, 11)
    with pytest.raises(ValueError, match="11 bytes long"):
        read_limited(path, 10)
    os.truncate(path, 10)
    assert read_limited(path, 10) == bytes(10)
