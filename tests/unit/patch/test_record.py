"""The record of an edited checkpoint says exactly what is in it, or is refused."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    DOWN_0,
    SHARDED,
    UP_0,
    id_of,
    make_patch,
    patch_of,
    read_weights,
    signed,
    tree,
)

from locft.errors import PatchError
from locft.patch.apply import apply_patch, revert_patches, stack_patches
from locft.patch.format import manifest_record
from locft.patch.manifest import read_manifest
from locft.patch.record import (
    MAX_RECORD_BYTES,
    Record,
    dump_record,
    read_recorded,
    require_undo,
    short,
    undo_file,
)
from locft.patch.status import read_status

ORIGINAL = SHARDED.tensors()

FIRST, AFTER_FIRST = patch_of(ORIGINAL, (DOWN_0,), 1)

SECOND, AFTER_SECOND = patch_of(AFTER_FIRST, (DOWN_0, UP_0), 2)

RECORD = Record((manifest_record(FIRST), manifest_record(SECOND)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a checkpoint with two patches in it."""
    made = SHARDED.make(tmp_path / "folder")
    stack_patches(made, [FIRST, SECOND], None)
    return made


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / ".locft" / "record.json"


def refuse(folder: Path) -> str:
    """See to it that everything refuses a folder for the same reason and changes nothing; tell it."""
    third, _ = patch_of(AFTER_SECOND, (UP_0,), 3)
    before = tree(folder.parent)
    operations: list[Callable[[], object]] = [
        lambda: read_status(folder),
        lambda: apply_patch(folder, third, None),
        lambda: apply_patch(folder, third, folder.parent / "copy"),
        lambda: revert_patches(folder, [], None),
        lambda: revert_patches(folder, [id_of(SECOND)], folder.parent / "copy"),
    ]
    said = set()
    for operation in operations:
        with pytest.raises(PatchError) as caught:
            operation()
        said.add(str(caught.value))
        assert tree(folder.parent) == before
    [message] = said
    return message


def test_the_record_holds_the_manifests_as_they_are_from_the_oldest_to_the_newest(file: Path) -> None:
    expected = {"format_version": 1, "patches": [manifest_record(FIRST), manifest_record(SECOND)]}
    assert file.read_bytes() == signed(expected, "record_sha256")
    assert read_recorded(file.parents[1]) == RECORD
    assert RECORD.ids() == (id_of(FIRST), id_of(SECOND))
    assert {name: manifest["manifest_sha256"] for name, manifest in RECORD.newest().items()} == {
        DOWN_0: id_of(SECOND),
        UP_0: id_of(SECOND),
    }


def test_a_recorded_manifest_is_that_of_the_patch(tmp_path: Path, file: Path) -> None:
    manifest = tmp_path / "patch.json"
    manifest.write_bytes((json.dumps(RECORD.patches[0], sort_keys=True, indent=2) + "\n").encode())
    assert read_manifest(manifest) == read_recorded(file.parents[1]).patches[0]


def test_a_folder_without_a_record_carries_nothing(tmp_path: Path) -> None:
    assert read_recorded(tmp_path) == Record()
    (tmp_path / ".locft").mkdir()
    assert read_recorded(tmp_path) == Record()


def test_a_patch_is_known_by_twelve_digits() -> None:
    assert short("0123456789abcdef") == "0123456789ab"


def test_every_flipped_bit_of_a_record_is_noticed(folder: Path, file: Path) -> None:
    raw = file.read_bytes()
    bits = random.Random(0).sample(range(8 * len(raw)), 500)
    for bit in bits:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(PatchError, match=f"^{file}: "):
            read_recorded(folder)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_record_is_refused(length: int, folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:length])
    said = refuse(folder)
    assert said.startswith(f"{file}: is damaged: ")
    assert said.endswith("; put it back as it was, or remove the folder .locft and give up reverting")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda body: body.update(format_version=2),
            "format_version is 2, this locft reads 1: a newer locft wrote it",
        ),
        (lambda body: body.update(format_version=True), "format_version: expected 1, found True"),
        (lambda body: body.update(format_version="1"), "format_version: expected 1, found '1'"),
        (lambda body: body.update(format_version="1" * 99), "format_version: expected 1, found '1111"),
        (lambda body: body.pop("format_version"), "format_version: expected 1, found None"),
        (lambda body: body.pop("patches"), "patches: expected a list of objects"),
        (lambda body: body.update(patches=[1]), "patches: expected a list of objects"),
        (lambda body: body.update(patches=[{}]), "patches[0]: format_version: expected 1, found None"),
        (
            lambda body: body["patches"][1].update(format_version=9),
            "patches[1]: format_version is 9, this locft reads 1: a newer locft",
        ),
        (lambda body: body["patches"][1].update(num_edits=9), "patches[1]: is damaged, or was changed"),
        (
            lambda body: body["patches"][1].update(more=9),
            "patches[1]: 'more': unknown field, expected only format_version, ",
        ),
        (
            lambda body: body.update(more=1),
            "is damaged, or was changed by hand: its record_sha256 does not match, or it has unknown"
            " fields; put it back as it was, or remove the folder .locft and give up reverting",
        ),
        (
            lambda body: body["patches"].reverse(),
            f"patches[1]: tensor '{DOWN_0}' does not follow on the one before",
        ),
    ],
)
def test_a_record_that_locft_did_not_write_is_refused_with_its_field(
    change: Callable[[dict[str, Any]], None], said: str, folder: Path, file: Path
) -> None:
    body = json.loads(file.read_bytes())
    change(body)
    file.write_bytes(signed(body, "record_sha256"))
    message = refuse(folder)
    assert message.startswith(f"{file}: ")
    assert said in message


@pytest.mark.parametrize("raw", [b"[]", b"{", b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 1}', b"[" * 10**6])
def test_a_record_that_is_no_strict_json_is_refused(raw: bytes, folder: Path, file: Path) -> None:
    file.write_bytes(raw)
    assert refuse(folder).startswith(f"{file}: is damaged: ")


def test_a_record_without_its_hash_or_with_another_one_is_refused(folder: Path, file: Path) -> None:
    body = json.loads(file.read_bytes())
    for changed in (
        {**body, "record_sha256": "0" * 64},
        {key: body[key] for key in body if key != "record_sha256"},
    ):
        file.write_bytes((json.dumps(changed, sort_keys=True, indent=2) + "\n").encode())
        assert "its record_sha256 does not match" in refuse(folder)


def test_a_record_in_other_spaces_is_refused(folder: Path, file: Path) -> None:
    file.write_bytes(json.dumps(json.loads(file.read_bytes())).encode())
    assert f"{file}: is damaged: it was changed by hand; put it back" in refuse(folder)


def test_a_record_that_is_a_link_is_refused(tmp_path: Path, folder: Path, file: Path) -> None:
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert refuse(folder) == (
        f"{file}: is a link, which no part of a checkpoint's record may be; put what it leads to in its"
        " place"
    )
    (tmp_path / "elsewhere.json").unlink()
    assert "is a link" in refuse(folder)


def test_a_record_folder_that_is_a_link_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / ".locft").rename(tmp_path / "elsewhere")
    (folder / ".locft").symlink_to(tmp_path / "elsewhere")
    assert refuse(folder).startswith(f"{folder / '.locft'}: is a link")
    (folder / ".locft").unlink()
    (folder / ".locft").symlink_to(tmp_path / "nowhere")
    assert refuse(folder).startswith(f"{folder / '.locft'}: is a link")


def test_a_record_folder_that_is_a_file_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / ".locft").rename(tmp_path / "elsewhere")
    (folder / ".locft").touch()
    assert refuse(folder) == f"{folder / '.locft' / 'record.json'}: cannot be read: Not a directory"


def test_a_record_that_is_no_regular_file_is_refused_without_waiting_for_it(
    folder: Path, file: Path
) -> None:
    file.unlink()
    os.mkfifo(file)
    assert "cannot be read: is a pipe or a device, expected a regular file" in refuse(folder)
    file.unlink()
    file.mkdir()
    assert refuse(folder) == f"{file}: cannot be read: Is a directory"


def test_a_record_beyond_all_reason_is_not_read(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_RECORD_BYTES == 100_000_000
    length = file.stat().st_size
    monkeypatch.setattr("locft.patch.record.MAX_RECORD_BYTES", length)
    assert read_recorded(folder) == RECORD
    monkeypatch.setattr("locft.patch.record.MAX_RECORD_BYTES", length - 1)
    said = refuse(folder)
    assert said.startswith(f"{file}: is damaged: {length:,} bytes long, expected at most {length - 1:,}")


def test_a_record_that_is_removed_gives_up_reverting_and_nothing_else(folder: Path, file: Path) -> None:
    file.unlink()
    assert read_status(folder).patches == ()
    third, after = patch_of(AFTER_SECOND, (UP_0,), 3)
    apply_patch(folder, third, None)
    assert read_weights(folder) == after
    revert_patches(folder, [], None)
    assert read_weights(folder) == AFTER_SECOND


def test_a_record_of_no_patches_is_none(folder: Path, file: Path) -> None:
    file.write_bytes(dump_record(Record()))
    assert read_status(folder).patches == ()


def test_old_values_must_be_a_file_in_the_record_folder(tmp_path: Path, folder: Path) -> None:
    undo = undo_file(folder, id_of(FIRST))
    assert undo == folder / ".locft" / f"{id_of(FIRST)}.safetensors"
    assert require_undo(folder, id_of(FIRST)) == undo
    undo.rename(tmp_path / "elsewhere")
    with pytest.raises(PatchError) as caught:
        require_undo(folder, id_of(FIRST))
    assert str(caught.value) == (
        f"{undo}: is missing; without these old values patch {id_of(FIRST)[:12]} cannot be reverted:"
        " take the model as it was before that patch"
    )
    undo.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PatchError, match="is a link"):
        require_undo(folder, id_of(FIRST))


def test_patches_with_names_that_need_escapes_come_out_again(tmp_path: Path) -> None:
    name = 'weird "név" \\ \u2028 🙂'
    tensors = {**ORIGINAL, UP_0: ORIGINAL[UP_0]}
    folder = SHARDED.make(tmp_path / "folder")
    shard = folder / SHARDED.file_of(UP_0)
    renamed = json.dumps(name)[1:-1].encode()
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:start].replace(UP_0.encode(), renamed)
    shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[start:])
    index = folder / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(UP_0.encode(), renamed))
    before = tree(folder)
    tensors[name] = tensors.pop(UP_0)
    patch = make_patch(tensors, {name: SECOND_VALUE})
    apply_patch(folder, patch, None)
    assert read_weights(folder)[name] == SECOND_VALUE
    assert read_status(folder).tensors[0].name == name
    revert_patches(folder, [], None)
    assert tree(folder) == before


SECOND_VALUE = AFTER_SECOND[UP_0]
