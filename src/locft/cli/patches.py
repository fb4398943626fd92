"""The commands on patches and checkpoint folders. They load neither torch nor transformers."""

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from locft.cli.say import print_json, say
from locft.cli.show import make_console, make_table, plain
from locft.config import RunConfig
from locft.errors import LocftError, ModelError
from locft.model.demo import DEMO_NAME
from locft.model.resolve import resolve_checkpoint
from locft.patch.apply import revert_patches, stack_patches
from locft.patch.format import PATCH_FOLDER, Patch, manifest_record, open_patch
from locft.patch.record import short
from locft.patch.rewrite import list_other_weights, read_record
from locft.patch.status import CheckpointStatus, read_status
from locft.report.words import bytes_text, counted


def run_apply(words: argparse.Namespace) -> int:
    """Put one patch into a checkpoint."""
    return _put_in(words, [words.patch])


def run_stack(words: argparse.Namespace) -> int:
    """Put several patches into a checkpoint, all or none."""
    return _put_in(words, words.patches)


def run_revert(words: argparse.Namespace) -> int:
    """Take patches out of a checkpoint."""
    output = _output(words)
    folder = _local_folder(words.model)
    if words.all:
        wanted = []
    elif words.patch is not None:
        is_folder = Path(words.patch).is_dir()
        wanted = [_identity(open_patch(Path(words.patch))) if is_folder else words.patch]
    else:
        wanted = list(read_record(folder).ids()[-1:])
    order = revert_patches(folder, wanted, output)
    left = len(read_record(output or folder).patches)
    what = f"{counted(len(order), 'patch', 'patches')} taken out ({', '.join(map(short, order))})"
    rest = f"{counted(left, 'patch is', 'patches are')} left" if left else "none is left"
    where = output or words.model
    _tell(
        words,
        {"checkpoint": str(where), "reverted": order},
        f"{'wrote' if output else 'changed'} {where}: {what}, {rest}",
    )
    if output is None:
        _note_other_weights(folder)
    return 0


def run_status(words: argparse.Namespace) -> int:
    """Say what a checkpoint carries; exit with 1 if a matrix is not what its patch made of it."""
    status = read_status(_local_folder(words.model))
    if words.json:
        print_json(asdict(status))
    else:
        _show_status(make_console(), words.model, status)
    return 0 if status.is_intact else LocftError.exit_status


def run_inspect(words: argparse.Namespace) -> int:
    """Show what a patch is, after verifying all of it."""
    path = Path(words.patch)
    patch = open_patch(path)
    record = manifest_record(patch)
    folder = path / PATCH_FOLDER if (path / PATCH_FOLDER).is_dir() else path
    num_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if words.json:
        print_json({**record, "num_bytes": num_bytes})
        return 0
    console = make_console()
    manifest = patch.manifest
    revision = "" if manifest.model.revision is None else f" at {manifest.model.revision}"
    rows = [
        ("patch", f"{record['manifest_sha256']} (sound: every hash was checked)"),
        ("made from", f"{manifest.model.id}{revision}"),
        ("location", f"{manifest.location.name}, {manifest.location.num_parameters:,} parameters"),
        ("edits", f"{manifest.num_edits:,} (sha256 {short(manifest.edits_sha256)})"),
        ("made by", f"locft {manifest.locft_version}"),
        ("settings", ", ".join(f"{key} {value}" for key, value in manifest.settings.items())),
        ("size", bytes_text(num_bytes)),
    ]
    table = make_table("", "", "")
    for name, value in rows:
        table.add_row(name, plain(value, limit=600))
    console.print(table)
    table = make_table("", "tensor", "dtype", "shape", "sha256 before", "sha256 after")
    for name, tensor in patch.tensors.items():
        hashes = short(tensor.old_sha256), short(tensor.new_sha256)
        table.add_row(*map(plain, (name, tensor.dtype, _shape(tensor.shape), *hashes)))
    console.print(table)
    return 0


def run_diff(words: argparse.Namespace) -> int:
    """Compare two checkpoints."""
    from locft.patch.compare import compare_checkpoints  # numpy takes a while to load

    first, second = (_local_folder(name) for name in (words.first, words.second))
    comparison = compare_checkpoints(first, second)
    if words.json:
        print_json(asdict(comparison))
        return 0
    console = make_console()
    if comparison.tensors:
        table = make_table("", "tensor", "what", "changed", "relative change", "largest change")
        for one in comparison.tensors:
            sides = zip(one.dtype, one.shape, strict=True)
            what: str = one.kind
            if what in ("dtype", "shape"):
                what += ": " + " and ".join(f"{dtype} {_shape(shape)}" for dtype, shape in sides)
            changed = "" if one.num_changed is None else f"{one.num_changed:,} of {one.num_elements:,}"
            numbers = (one.relative_change, one.max_change)
            texts = ("" if number is None else f"{number:.3g}" for number in numbers)
            table.add_row(*map(plain, (one.name, what, changed, *texts)))
        console.print(table)
    num = comparison.num_tensors
    differing = counted(len(comparison.tensors), "tensor differs", "tensors differ")
    console.print(
        Text(
            f"{differing}, of {num:,} in both"
            if comparison.tensors
            else f"all {num:,} tensors are the same, bit by bit"
        )
    )
    for file in comparison.files:
        console.print(plain(file))
    return 0


def _put_in(words: argparse.Namespace, names: list[str]) -> int:
    output = _output(words)  # before a model is fetched
    patches = [open_patch(Path(name)) for name in names]
    config = RunConfig(revision=getattr(words, "setting_revision", None))
    if words.in_place:
        folder = _local_folder(words.model)
    else:
        folder = resolve_checkpoint(words.model, revision=config.revision).folder
    order = stack_patches(folder, patches, output)
    num_edits = sum(patch.manifest.num_edits for patch in patches)
    where = words.model if words.in_place else words.output
    said = f"changed {where}: put" if words.in_place else f"wrote {where}: {words.model} with"
    what = counted(num_edits, "edit")
    if len(order) > 1:
        what += f" of {counted(len(order), 'patch', 'patches')}"
    _tell(
        words,
        {"checkpoint": str(where), "patches": order},
        f"{said} {what} in it (to go back: {_way_back(output or folder, str(where), order)})",
    )
    if words.in_place:
        _note_other_weights(folder)
    return 0


def _note_other_weights(folder: Path) -> None:
    others = list_other_weights(folder)
    if others:
        names = ", ".join(file.name for file in others[:3]) + (", ..." if len(others) > 3 else "")
        say(f"note: only the safetensors weights changed; {names} beside them did not")


def _way_back(folder: Path, where: str, order: tuple[str, ...]) -> str:
    """Name the command that takes patches out again, if a single one can."""
    carried = read_record(folder).ids()
    which = "" if len(order) == 1 else " --all" if carried == order else None
    if which is None:
        return f"`locft status {shlex.quote(where)}` lists its patches, `locft revert` takes them out"
    return f"locft revert {shlex.quote(where)}{which} --in-place"


def _local_folder(name: str) -> Path:
    """Find a model that is here already; to fetch one only to look at it would surprise."""
    if name != DEMO_NAME and not Path(name).expanduser().is_dir():
        raise ModelError(f"there is no folder {name!r}: expected a model folder")
    return resolve_checkpoint(name).folder


def _output(words: argparse.Namespace) -> Path | None:
    return None if words.in_place else Path(words.output)


def _identity(patch: Patch) -> str:
    identity: str = manifest_record(patch)["manifest_sha256"]
    return identity


def _show_status(console: Console, name: str, status: CheckpointStatus) -> None:
    if not status.patches:
        console.print(plain(f"{name}: carries no patches"))
    else:
        table = make_table(
            "patches, oldest first", "patch", "location", "edits", "made from", "can be reverted"
        )
        for patch in status.patches:
            row = (short(patch.id), patch.location.name, f"{patch.num_edits:,}", patch.model.id)
            table.add_row(
                *map(plain, row), plain(f"no: {patch.obstacle}" if patch.obstacle else "yes", 400)
            )
        console.print(table)
        table = make_table("patched tensors", "tensor", "patch", "expected", "found", "")
        for tensor in status.tensors:
            found = "-" if tensor.found_sha256 is None else short(tensor.found_sha256)
            row = (tensor.name, short(tensor.patch), short(tensor.expected_sha256), found)
            style = "green" if tensor.state == "ok" else "red"
            table.add_row(*map(plain, row), Text(tensor.state, style=style))
        console.print(table)
        if status.is_intact:
            verdict = "every patched tensor is what it should be"
        elif any(tensor.state != "ok" for tensor in status.tensors):
            verdict = "something else changed what the patches had made"
        else:
            verdict = "every patched tensor is what it should be, but old values are lost"
        num_stuck = sum(patch.obstacle is not None for patch in status.patches)
        if num_stuck:
            verdict += f"; {counted(num_stuck, 'patch', 'patches')} cannot be reverted as it stands"
        console.print(Text(verdict, style="bold"))
    if status.leftovers:
        num = counted(len(status.leftovers), "file")
        console.print(
            plain(
                f"{num} of a locft that was interrupted, or is still at work; the next one that writes"
                " here clears them away"
            )
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, shape or ())) or "scalar"


def _tell(words: argparse.Namespace, value: dict[str, Any], message: str) -> None:
    if words.json:
        print_json(value)
    else:
        say(message)
