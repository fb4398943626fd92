"""The commands on patches and checkpoints, from words to exit status."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    DOWN_0,
    DOWN_1,
    SHARDED,
    SINGLE,
    UP_0,
    changes,
    id_of,
    make_patch,
    pack,
    patch_of,
    plain,
    read_weights,
    tree,
)

import locft
from locft.cli.main import main
from locft.patch.apply import stack_patches
from locft.patch.compare import compare_checkpoints
from locft.patch.format import manifest_record, write_patch
from locft.patch.manifest import PatchModel
from locft.patch.status import read_status

ORIGINAL = SHARDED.tensors()

FIRST, AFTER_FIRST = patch_of(ORIGINAL, (DOWN_0,), 1)

SECOND, AFTER_SECOND = patch_of(AFTER_FIRST, (DOWN_0, DOWN_1), 2)

BESIDE, _ = patch_of(ORIGINAL, (UP_0,), 4)

PATCHES = {"first": FIRST, "second": SECOND, "beside": BESIDE}

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a checkpoint and patches, and go there."""
    SHARDED.make(tmp_path / "base")
    for name, patch in PATCHES.items():
        write_patch(patch, tmp_path / "patches" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give what runs a command, and returns what it says on stdout and stderr."""

    def run_words(*words: str, status: int = 0) -> tuple[str, str]:
        assert main(words) == status
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run_words


def flat(table: str) -> str:
    """Make the cells of a table one line, with single spaces."""
    return " ".join(table.replace("│", " ").replace("┃", " ").split())


def refusal(run: Run, *words: str, status: int = 2) -> str:
    """Tell the one line that a refused command says; it changes nothing."""
    before = tree(Path())
    out, err = run(*words, status=status)
    assert out == ""
    assert tree(Path()) == before
    [line] = err.splitlines()
    assert line.startswith("locft: error: ")
    return line.removeprefix("locft: error: ")


# apply, stack


def test_apply_makes_a_copy_and_says_so(run: Run) -> None:
    before = tree(Path("base"))
    out, err = run("apply", "base", "patches/first", "-o", "copy")
    assert out == ""
    assert err == (
        "locft: wrote copy: base with 3 edits in it (to go back: locft revert copy --in-place)\n"
    )
    assert plain(Path("copy")) == SHARDED.files(AFTER_FIRST)
    assert tree(Path("base")) == before


def test_apply_changes_a_folder_in_place_and_says_so(run: Run) -> None:
    out, err = run("apply", "base", "patches/first", "--in-place")
    assert out == ""
    assert err == ("locft: changed base: put 3 edits in it (to go back: locft revert base --in-place)\n")
    assert plain(Path("base")) == SHARDED.files(AFTER_FIRST)


def test_apply_of_one_edit_says_it_in_the_singular(run: Run) -> None:
    write_patch(make_patch(ORIGINAL, changes(ORIGINAL, [DOWN_0], 1), number=1), Path("single"))
    assert "base with 1 edit in it" in run("apply", "base", "single", "-o", "copy")[1]


def test_stack_counts_edits_and_patches(run: Run) -> None:
    words = ("patches/second", "patches/beside", "patches/first")
    _, err = run("stack", "base", *words, "-o", "a copy")
    assert err == (
        "locft: wrote a copy: base with 9 edits of 3 patches in it (to go back:"
        " locft revert 'a copy' --all --in-place)\n"
    )
    ids = [patch.id for patch in read_status("a copy").patches]
    assert ids == [id_of(BESIDE), id_of(FIRST), id_of(SECOND)]


def test_the_way_back_that_is_named_leads_back(run: Run) -> None:
    run("apply", "base", "patches/beside", "--in-place")
    before = tree(Path("base"))
    _, err = run("apply", "base", "patches/first", "--in-place")
    words = err.split("to go back: locft ")[1].rstrip(")\n").split()
    run(*words)
    assert tree(Path("base")) == before
    # Of several on top of others, no single command takes out just those.
    _, err = run("stack", "base", "patches/first", "patches/second", "--in-place")
    assert err.endswith(
        "(to go back: `locft status base` lists its patches, `locft revert` takes them out)\n"
    )


def test_weights_of_other_formats_beside_those_changed_in_place_are_named(run: Run) -> None:
    others = ("consolidated.safetensors", "model.gguf", "pytorch_model.bin", "tf_model.h5")
    for name in (*others, "training_args.bin"):
        (Path("base") / name).write_bytes(b"other")
    note = (
        "locft: note: only the safetensors weights changed; consolidated.safetensors, model.gguf,"
        " pytorch_model.bin, ... beside them did not"
    )
    _, err = run("apply", "base", "patches/first", "-o", "copy")
    assert "note" not in err
    for words in (("apply", "base", "patches/first"), ("revert", "base")):
        _, err = run(*words, "--in-place")
        assert err.splitlines()[1:] == [note]
    (Path("base") / "model.gguf").unlink()
    _, err = run("apply", "base", "patches/first", "--in-place")
    assert err.splitlines()[1:] == [
        note.replace("model.gguf, ", "").replace("bin, ...", "bin, tf_model.h5")
    ]


@pytest.mark.parametrize("place", [("-o", "copy"), ("--in-place",)], ids=["copy", "in place"])
def test_json_tells_where_and_in_which_order_patches_were_put_in(
    place: tuple[str, ...], run: Run
) -> None:
    where = "copy" if "copy" in place else "base"
    out, err = run("stack", "base", "patches/second", "patches/first", *place, "--json")
    assert json.loads(out) == {"checkpoint": where, "patches": [id_of(FIRST), id_of(SECOND)]}
    assert err == ""
    out, err = run("apply", where, "patches/beside", "--in-place", "--json")
    assert json.loads(out) == {"checkpoint": where, "patches": [id_of(BESIDE)]}
    assert err == ""


def test_a_run_folder_will_do_as_a_patch(home: Path, run: Run) -> None:
    (home / "runs").mkdir()
    write_patch(FIRST, home / "runs" / "one" / "patch")
    run("apply", "base", "runs/one", "--in-place")
    assert read_weights(Path("base")) == AFTER_FIRST
    assert id_of(FIRST) in flat(run("inspect", "runs/one")[0])
    run("revert", "base", "--patch", "runs/one", "--in-place")
    assert read_weights(Path("base")) == ORIGINAL


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("apply", "m", "p"), "one of the arguments -o/--output --in-place is required"),
        (("stack", "m", "p", "q"), "one of the arguments -o/--output --in-place is required"),
        (("revert", "m"), "one of the arguments -o/--output --in-place is required"),
        (("apply", "m", "p", "-o", "d", "--in-place"), "not allowed with argument -o/--output"),
        (("stack", "m", "p", "--in-place", "-o", "d"), "not allowed with argument --in-place"),
        (("revert", "m", "-o", "d", "--in-place"), "not allowed with argument -o/--output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_where_the_result_goes_must_be_said_in_one_way(
    words: tuple[str, ...], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.endswith(f"(see locft {words[0]} --help)")


def test_a_model_is_fetched_at_the_revision_that_is_named(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, *, revision: str | None = None) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(folder=home / "base")

    monkeypatch.setattr("locft.cli.patches.resolve_checkpoint", fetch)
    run("apply", "some/model", "patches/first", "-o", "one", "--revision", "v1")
    run("stack", "some/model", "patches/first", "-o", "two")
    assert asked == [("some/model", "v1"), ("some/model", None)]


def test_a_patch_that_does_not_fit_exits_with_2_and_changes_nothing(run: Run) -> None:
    for place in (("--in-place",), ("-o", "copy")):
        said = refusal(run, "apply", "base", "patches/second", *place)
        assert f"base: tensor '{DOWN_0}' is not the one that the patch was made from" in said
        assert "the patch was made from 'some/model' at revision 'abc'" in said
    run("apply", "base", "patches/first", "--in-place")
    assert "this checkpoint carries the patch already" in refusal(
        run, "apply", "base", "patches/first", "--in-place"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("apply", "base", "nothing", "--in-place"), "nothing: is not a patch"),
        (("stack", "base", "patches/first", "nothing", "--in-place"), "nothing: is not a patch"),
        (("inspect", "nothing"), "nothing: is not a patch"),
        (("apply", "empty", "patches/first", "--in-place"), "folder 'empty' is no model"),
        (("status", "empty"), "folder 'empty' is no model"),
        (("revert", "empty", "--in-place"), "folder 'empty' is no model"),
        (("diff", "base", "empty"), "folder 'empty' is no model"),
        (("diff", "empty", "base"), "folder 'empty' is no model"),
        (("status", "base/config.json"), "there is no folder 'base/config.json': expected a model"),
        (("status", "some/model"), "there is no folder 'some/model': expected a model folder"),
        (("diff", "base", "some/model"), "there is no folder 'some/model': expected a model folder"),
        (("revert", "some/model", "-o", "x"), "there is no folder 'some/model': expected a model"),
        (("apply", "some/model", "patches/first", "--in-place"), "there is no folder 'some/model'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_no_patch_or_no_model_exits_with_2(
    words: tuple[str, ...], said: str, home: Path, run: Run
) -> None:
    (home / "empty").mkdir()
    assert said in refusal(run, *words)


def test_the_hub_cache_is_not_changed_in_place(home: Path, run: Run) -> None:
    cache = home / "hub" / "models--some--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (home / "base").rename(cache / "snapshots" / "abc")
    said = refusal(run, "apply", str(cache / "snapshots" / "abc"), "patches/first", "--in-place")
    assert "lies in the Hugging Face Hub's cache, which others read, too; make a copy with -o" in said


def test_an_output_that_is_taken_exits_with_2(run: Run) -> None:
    assert refusal(run, "apply", "base", "patches/first", "-o", "patches") == (
        "patches: exists and is not empty; name another folder, or remove this one"
    )
    assert "is or lies within the checkpoint base" in refusal(
        run, "apply", "base", "patches/first", "-o", "base/new"
    )


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (OSError(5, "broken"), 1, "locft: error: [Errno 5] broken; "),
        (KeyboardInterrupt(), 130, "locft: interrupted: "),
    ],
    ids=["fault", "interrupt"],
)
def test_what_is_stopped_in_place_says_how_to_find_out_what_became_of_it(
    fault: BaseException, status: int, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise fault

    before = tree(Path("base"))
    monkeypatch.setattr("locft.patch.rewrite._switch", fail)
    _, err = run("apply", "base", "patches/first", "--in-place", status=status)
    assert err == f"{said}`locft status base` says what the folder holds now\n"
    assert tree(Path("base")) == before


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty folder"])
def test_what_fails_in_a_copy_says_that_nothing_was_kept(
    is_there: bool, home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if is_there:
        (home / "copy").mkdir()
    monkeypatch.setattr("locft.patch.rewrite._put", fail)
    _, err = run("apply", "base", "patches/first", "-o", "copy", status=1)
    assert err == "locft: error: [Errno 28] No space left on device; nothing was kept\n"
    assert tree(home / "copy") == {}


# revert


def test_revert_takes_the_newest_patch_out_unless_told_otherwise(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/second", "--in-place")
    out, err = run("revert", "base", "--in-place")
    assert out == ""
    assert err == f"locft: changed base: 1 patch taken out ({id_of(SECOND)[:12]}), 1 patch is left\n"
    assert read_weights(Path("base")) == AFTER_FIRST
    _, err = run("revert", "base", "-o", "copy")
    assert err == f"locft: wrote copy: 1 patch taken out ({id_of(FIRST)[:12]}), none is left\n"
    assert tree(Path("copy")) == SHARDED.files(ORIGINAL)
    assert read_weights(Path("base")) == AFTER_FIRST


def test_revert_all_takes_all_out(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/second", "patches/beside", "--in-place")
    _, err = run("revert", "base", "--all", "--in-place")
    taken = ", ".join(id_of(patch)[:12] for patch in (BESIDE, SECOND, FIRST))
    assert err == f"locft: changed base: 3 patches taken out ({taken}), none is left\n"
    assert tree(Path("base")) == SHARDED.files(ORIGINAL)


@pytest.mark.parametrize(
    "name", ["patches/first", id_of(FIRST), id_of(FIRST)[:12], id_of(FIRST)[:6]], ids=len
)
def test_revert_takes_a_patch_by_its_folder_or_its_identity(name: str, run: Run) -> None:
    run("stack", "base", "patches/first", "patches/beside", "--in-place")
    _, err = run("revert", "base", "--patch", name, "--in-place")
    assert err == f"locft: changed base: 1 patch taken out ({id_of(FIRST)[:12]}), 1 patch is left\n"
    assert [patch.id for patch in read_status("base").patches] == [id_of(BESIDE)]


def test_revert_counts_what_is_left(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/second", "patches/beside", "--in-place")
    assert "2 patches are left" in run("revert", "base", "--in-place")[1]


def test_revert_tells_json_on_request(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/second", "--in-place")
    out, err = run("revert", "base", "--all", "-o", "copy", "--json")
    assert json.loads(out) == {"checkpoint": "copy", "reverted": [id_of(SECOND), id_of(FIRST)]}
    assert err == ""
    out, _ = run("revert", "base", "--in-place", "--json")
    assert json.loads(out) == {"checkpoint": "base", "reverted": [id_of(SECOND)]}


def test_revert_of_what_is_not_there_exits_with_2(run: Run) -> None:
    for words in ([], ["--all"], ["--patch", "patches/first"], ["--patch", "abc"]):
        for place in (["--in-place"], ["-o", "copy"]):
            assert refusal(run, "revert", "base", *words, *place).endswith(
                "base: carries no patches, so there is nothing to revert"
            )
    run("apply", "base", "patches/first", "--in-place")
    assert refusal(run, "revert", "base", "--patch", "nope", "-o", "copy") == (
        f"base: carries no patch 'nope'; it carries {id_of(FIRST)[:12]}"
    )
    assert refusal(run, "revert", "base", "--patch", "patches/beside", "-o", "copy") == (
        f"base: carries no patch '{id_of(BESIDE)}'; it carries {id_of(FIRST)[:12]}"
    )


def test_revert_of_what_others_build_on_exits_with_2(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/second", "--in-place")
    said = refusal(run, "revert", "base", "--patch", "patches/first", "--in-place")
    assert f"was changed again by patch {id_of(SECOND)[:12]}; revert that one first" in said


def test_all_and_one_patch_cannot_both_be_meant(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["revert", "base", "--all", "--patch", "x", "--in-place"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


# status


def test_status_of_an_unedited_folder_is_one_line(run: Run) -> None:
    assert run("status", "base") == ("base: carries no patches\n", "")


def test_status_shows_patches_and_tensors(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/second", "patches/beside", "--in-place")
    before = tree(Path("base"))
    out, err = run("status", "base")
    assert err == ""
    shown = flat(out)
    assert "patches, oldest first" in shown
    assert f"{id_of(FIRST)[:12]} 0.mlp.down 3 some/model no: patch {id_of(SECOND)[:12]} builds" in shown
    assert f"{id_of(SECOND)[:12]} 0.mlp.down 3 some/model yes" in shown
    new = SECOND.tensors[DOWN_1].new_sha256[:12]
    assert f"{DOWN_1} {id_of(SECOND)[:12]} {new} {new} ok" in shown
    verdict = "every patched tensor is what it should be; 1 patch cannot be reverted as it stands"
    assert verdict in out.splitlines()
    assert max(map(len, out.splitlines())) <= 120
    assert "\x1b" not in out
    assert tree(Path("base")) == before


def test_status_of_what_something_else_changed_exits_with_1(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/beside", "--in-place")
    tuned = changes(ORIGINAL, [DOWN_0], 50)
    now = {name: tensor for name, tensor in {**AFTER_FIRST, **tuned}.items() if name != UP_0}
    for name, data in SHARDED.files(now).items():
        (Path("base") / name).write_bytes(data)
    out, err = run("status", "base", status=1)
    assert err == ""
    shown = flat(out)
    assert "0.mlp.down 3 some/model no: tensor" in shown
    assert f"{FIRST.tensors[DOWN_0].new_sha256[:12]}" in shown
    assert f"{BESIDE.tensors[UP_0].new_sha256[:12]} - missing" in shown
    verdict = "something else changed what the patches had made; 2 patches cannot be reverted"
    assert out.endswith(f"{verdict} as it stands\n")
    out, _ = run("status", "base", "--json", status=1)
    told = json.loads(out)
    assert told["is_intact"] is False
    assert [tensor["state"] for tensor in told["tensors"]] == ["changed", "missing"]
    assert told["tensors"][1]["found_sha256"] is None


def test_status_tells_json_on_request(run: Run) -> None:
    run("stack", "base", "patches/first", "patches/beside", "--in-place")
    out, err = run("status", "base", "--json")
    assert json.loads(out) == json.loads(json.dumps(asdict(read_status("base"))))
    assert err == ""
    assert json.loads(run("revert", "base", "--all", "--in-place", "--json")[0])["reverted"]
    assert json.loads(run("status", "base", "--json")[0]) == {
        "checkpoint": "base",
        "is_intact": True,
        "patches": [],
        "tensors": [],
        "leftovers": [],
    }


@pytest.mark.parametrize(("num", "words"), [(1, "1 file of a locft"), (2, "2 files of a locft")])
def test_status_counts_what_an_interrupted_writer_left(num: int, words: str, run: Run) -> None:
    for i in range(num):
        (Path("base") / f".locft-0123456{i}-model.safetensors").touch()
    lines = run("status", "base")[0].splitlines()
    assert lines == [
        "base: carries no patches",
        f"{words} that was interrupted, or is still at work; the next one that writes here clears them"
        " away",
    ]


def test_status_of_a_damaged_record_exits_with_2(run: Run) -> None:
    run("apply", "base", "patches/first", "--in-place")
    file = Path("base/.locft/record.json")
    file.write_bytes(file.read_bytes()[:-10])
    said = refusal(run, "status", "base")
    assert said.startswith("base/.locft/record.json: is damaged: ")
    assert said.endswith("; put it back as it was, or remove the folder .locft and give up reverting")


def test_status_of_old_values_that_are_gone_exits_with_1(run: Run) -> None:
    run("apply", "base", "patches/first", "--in-place")
    Path(f"base/.locft/{id_of(FIRST)}.safetensors").unlink()
    shown = flat(run("status", "base", status=1)[0]).replace(" ", "")
    assert "ismissing;withouttheseoldvalues" in shown
    assert "everypatchedtensoriswhatitshouldbe,butoldvaluesarelost;1patchcannot" in shown


# inspect


def test_inspect_shows_what_a_patch_is(run: Run) -> None:
    out, err = run("inspect", "patches/second")
    assert err == ""
    shown = flat(out)
    for part in (
        f"patch {id_of(SECOND)} (sound: every hash was checked)",
        "made from some/model at abc",
        "location 0.mlp.down, 15 parameters",
        "edits 3 (sha256 eeeeeeeeeeee)",
        "made by locft 0.1.0",
        "settings lr 0.001",
        f"{DOWN_0} F16 5 x 3 {SECOND.tensors[DOWN_0].old_sha256[:12]}"
        f" {SECOND.tensors[DOWN_0].new_sha256[:12]}",
        f"{DOWN_1} F16 5 x 2 ",
    ):
        assert part in shown
    num_bytes = sum(file.stat().st_size for file in Path("patches/second").iterdir())
    assert f"size {num_bytes / 1e3:.1f} kB" in shown


def test_inspect_of_a_patch_without_a_revision_names_the_model_alone(run: Run) -> None:
    other = replace(
        FIRST, manifest=replace(FIRST.manifest, model=PatchModel(id="./mine", revision=None))
    )
    write_patch(other, Path("other"))
    assert "made from ./mine location" in flat(run("inspect", "other")[0])


def test_inspect_tells_json_on_request(run: Run) -> None:
    out, err = run("inspect", "patches/first", "--json")
    num_bytes = sum(file.stat().st_size for file in Path("patches/first").iterdir())
    assert json.loads(out) == {**manifest_record(FIRST), "num_bytes": num_bytes}
    assert err == ""


def test_inspect_of_a_damaged_patch_exits_with_2(run: Run) -> None:
    file = Path("patches/first/patch.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert "its data is damaged: expected new_sha256" in refusal(run, "inspect", "patches/first")
    assert "its data is damaged" in refusal(run, "apply", "base", "patches/first", "--in-place")


# diff


def test_diff_of_equals_is_one_line(run: Run) -> None:
    SINGLE.make(Path("other"), ORIGINAL)
    assert run("diff", "base", "other") == ("all 7 tensors are the same, bit by bit\n", "")


def test_diff_shows_what_differs(run: Run) -> None:
    run("apply", "base", "patches/second", "-o", "x", status=2)
    run("stack", "base", "patches/first", "patches/second", "-o", "copy")
    Path("copy/config.json").write_text("{ }")
    out, err = run("diff", "base", "copy")
    assert err == ""
    shown = flat(out)
    old, new = (
        np.frombuffer(side[DOWN_0].data, "<f2").astype(float) for side in (ORIGINAL, AFTER_SECOND)
    )
    changed = f"{np.count_nonzero(old != new)} of 15"
    relative = np.linalg.norm(new - old) / np.linalg.norm(old)
    largest = np.abs(new - old).max()
    assert f"{DOWN_0} changed {changed} {relative:.3g} {largest:.3g}" in shown
    assert out.splitlines()[-2:] == ["2 tensors differ, of 7 in both", "config.json: differs"]


def test_diff_of_one_tensor_is_in_the_singular(run: Run) -> None:
    run("apply", "base", "patches/first", "-o", "copy")
    assert run("diff", "base", "copy")[0].endswith("1 tensor differs, of 7 in both\n")


def test_diff_shows_shapes_dtypes_and_what_is_on_one_side_alone(run: Run) -> None:
    SINGLE.make(Path("other"))
    tensors = dict(ORIGINAL)
    first, second, third, *_ = tensors
    tensors[first] = replace(tensors[first], shape=(5, 7))
    tensors[second] = replace(tensors[second], dtype="BF16")
    tensors["[red]new[/red]"] = replace(tensors.pop(third), shape=(), data=b"\0\0")
    Path("other/model.safetensors").write_bytes(pack(tensors))
    shown = flat(run("diff", "base", "other")[0])
    assert f"{first} shape: F16 7 x 5 and F16 5 x 7" in shown
    assert f"{second} dtype: F16 5 x 3 and BF16 5 x 3" in shown
    assert f"{third} only in the first" in shown
    assert "[red]new[/red] only in the second" in shown
    assert "4 tensors differ, of 6 in both" in shown


def test_diff_tells_json_on_request(run: Run) -> None:
    run("apply", "base", "patches/first", "-o", "copy")
    out, err = run("diff", "base", "copy", "--json")
    expected = asdict(compare_checkpoints("base", "copy"))
    assert json.loads(out) == json.loads(json.dumps(expected))
    assert json.loads(out)["tensors"][0]["name"] == DOWN_0
    assert err == ""


# All of them


def test_what_names_hold_does_not_steer_the_terminal(home: Path, run: Run) -> None:
    name = "evil\x1b[31m[bold]\n"
    odd = {**ORIGINAL, name: ORIGINAL[UP_0]}
    path = Path("odd\x1b[31m")
    SINGLE.make(path)
    (path / "model.safetensors").write_bytes(pack(odd))
    model = PatchModel(id="\x1b[31mred", revision="\x07")
    patch = make_patch(odd, {name: changes(ORIGINAL, [UP_0], 3)[UP_0]})
    patch = replace(patch, manifest=replace(patch.manifest, model=model))
    write_patch(patch, Path("evil"))
    said = [
        run("inspect", "evil"),
        run("inspect", "evil", "--json"),
        run("apply", str(path), "evil", "-o", "copy"),
        run("apply", str(path), "evil", "--in-place"),
        run("apply", str(path), "evil", "--in-place", status=2),
        run("status", str(path)),
        run("status", str(path), "--json"),
        run("diff", str(path), "copy"),
        run("diff", str(path), "base"),
        run("revert", str(path), "--patch", "\x1b", "--in-place", status=2),
        run("revert", str(path), "--in-place"),
    ]
    assert not any("\x1b" in text or "\x07" in text for both in said for text in both)
    assert any("[bold]" in out for out, _ in said)


def test_none_of_the_commands_loads_torch_or_transformers(home: Path) -> None:
    code = """
import sys
from locft.cli.main import main

words = [
    "inspect patches/first",
    "apply base patches/first -o one",
    "stack one patches/second patches/beside --in-place",
    "status one",
    "diff base one",
    "revert one --patch patches/beside -o two",
    "revert one --all --in-place",
    "status one --json",
]
assert [main(line.split()) for line in words] == [0] * len(words)
print("loaded:", {"torch", "transformers", "safetensors", "tokenizers"} & sys.modules.keys())
"""
    path = os.pathsep.join(map(str, {Path(entry).parent for entry in locft.__path__}))
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "loaded: set()"


def test_a_patch_in_a_checkpoint_of_its_own_is_found_by_python_too(home: Path) -> None:
    assert stack_patches("base", [FIRST], "copy") == (id_of(FIRST),)
    assert locft.read_status("copy").patches[0].id == id_of(FIRST)
