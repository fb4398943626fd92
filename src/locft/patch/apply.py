"""Puts patches into a checkpoint, and takes them out again, byte for byte."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from locft.checkpoint import refuse_quantised
from locft.errors import InputError, PatchError, brief
from locft.model.demo import cache_folder
from locft.patch.format import Patch, manifest_record
from locft.patch.record import (
    MAX_RECORD_BYTES,
    NEXT_FILE,
    RECORD_FOLDER,
    Record,
    dump_record,
    read_undo,
    short,
)
from locft.patch.rewrite import (
    Base,
    Rewrite,
    opened_in_place,
    read_base,
    read_steadily,
    write_copy,
    write_in_place,
)
from locft.tensorfile import TensorData, TensorEntry, hash_tensor, read_tensor


def apply_patch(checkpoint: str | Path, patch: Patch, output: str | Path | None) -> None:
    """Put a patch into a checkpoint: `stack_patches` of a single one."""
    stack_patches(checkpoint, [patch], output)


def stack_patches(
    checkpoint: str | Path, patches: Sequence[Patch], output: str | Path | None
) -> tuple[str, ...]:
    """Put patches into a checkpoint, all of them or none.

    Patches of different matrices may come in any order; of those that change the same matrix, each
    must have been made from what another one leaves. The result keeps what is needed to go back.

    Args:
        checkpoint: The checkpoint folder that the patches were made from.
        patches: The patches; they are put in in an order in which they follow on each other.
        output: The folder to create, a copy with the patches in it (it may exist if it is empty);
            None to change `checkpoint` itself. A copy has the safetensors weights and the other
            files that transformers needs; weights in other formats, adapters, Python code, hidden
            files and subfolders stay behind.

    Returns:
        The identities of the patches, in the order in which they were put in.

    Raises:
        InputError: `output` is taken, lies within the checkpoint, or does not fit on its disk;
            `checkpoint` cannot be changed in place, or is being written by somebody else.
        ModelError: The checkpoint is damaged, quantised, or has no safetensors weights.
        PatchError: A patch does not belong to this checkpoint, or is in it already.
    """
    return _carry_out(Path(checkpoint), output, lambda base: _plan_stack(base, patches))


def revert_patches(
    checkpoint: str | Path, patch_ids: Sequence[str], output: str | Path | None
) -> tuple[str, ...]:
    """Take patches out of a checkpoint; what they changed gets its old bytes back.

    Args:
        checkpoint: The edited checkpoint folder.
        patch_ids: The identities of the patches, or their beginnings; empty for all of them.
        output: The folder to create, a copy without the patches; None to change `checkpoint` itself.

    Returns:
        The identities of the patches, in the order in which they were taken out.

    Raises:
        InputError: As for `stack_patches`.
        PatchError: The checkpoint does not carry a patch, a later one builds on it, or its matrices
            were changed since.
    """
    return _carry_out(Path(checkpoint), output, lambda base: _plan_revert(base, patch_ids))


def write_plain(checkpoint: str | Path, patch: Patch, output: str | Path) -> None:
    """Write a copy of a checkpoint with a patch in it that says nothing of locft.

    Args:
        checkpoint: The checkpoint folder that the patch was made from.
        patch: The patch.
        output: The folder to create; it may exist if it is empty.

    Raises:
        InputError: As for `stack_patches`.
    """
    base = _settled_base(Path(checkpoint))
    rewrite, _ = _plan_stack(base, [patch])
    write_copy(base, Path(output), Rewrite(values=rewrite.values, record=Record(), undo={}))


def refuse_in_place(checkpoint: Path) -> None:
    """Refuse to change a checkpoint that others rely on.

    Raises:
        InputError: It lies in the cache of the Hugging Face Hub, or in locft's own.
    """
    folder = checkpoint.resolve()
    is_hub = any(
        parent.name == "snapshots" and (parent.parent / "blobs").is_dir() for parent in folder.parents
    )
    if is_hub or cache_folder().resolve() in folder.parents:
        whose = "the Hugging Face Hub's cache" if is_hub else "locft's cache"
        raise InputError(
            f"{checkpoint}: lies in {whose}, which others read, too; make a copy with -o DIR instead"
        )


def check_base(checkpoint: Path, entries: Mapping[str, TensorEntry], patch: Patch) -> None:
    """Check that a checkpoint holds what a patch was made from.

    Args:
        checkpoint: The checkpoint folder, for the message.
        entries: Its tensors.
        patch: The patch.

    Raises:
        PatchError: It does not, or it carries the patch already.
    """
    reason = _misfit(_Draft(checkpoint, entries), patch)
    if reason is not None:
        raise PatchError(reason)


def _carry_out(
    checkpoint: Path,
    output: str | Path | None,
    plan: Callable[[Base], tuple[Rewrite, tuple[str, ...]]],
) -> tuple[str, ...]:
    """Carry out a plan in a copy of a checkpoint, or in place; return what the plan says of itself."""
    if output is not None:

        def prepare() -> tuple[Base, Rewrite, tuple[str, ...]]:
            base = _settled_base(checkpoint)
            return base, *plan(base)

        base, rewrite, order = read_steadily([checkpoint], prepare)
        write_copy(base, Path(output), rewrite)
        return order
    refuse_in_place(checkpoint)
    with opened_in_place(checkpoint) as folder:
        base = read_base(folder)
        rewrite, order = plan(base)
        write_in_place(base, rewrite)
    return order


@dataclass
class _Draft:
    """A checkpoint's tensors as they are going to be.

    Attributes:
        folder: The checkpoint, for messages.
        entries: Its tensors as they are.
        values: Those that were read or changed.
        changed: Names of those that were changed.
        makers: The patch that made a tensor what it is, by the tensor's name, where one did.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    values: dict[str, TensorData] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    makers: dict[str, str] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)

    def value(self, name: str) -> TensorData:
        """Return a tensor's value."""
        if name not in self.values:
            entry = self.entries[name]
            self.values[name] = TensorData(entry.dtype, entry.shape, read_tensor(entry))
        return self.values[name]

    def hash(self, name: str) -> str:
        """Return what a tensor hashes to."""
        if name not in self._hashes:
            value = self.value(name)
            self._hashes[name] = hash_tensor(value.dtype, value.shape, value.data)
        return self._hashes[name]

    def put(self, name: str, value: TensorData) -> None:
        """Give a tensor another value."""
        self.values[name] = value
        self.changed.add(name)
        self._hashes.pop(name, None)

    def rewrite(self, record: Record, undo: Mapping[str, Mapping[str, TensorData]]) -> Rewrite:
        """Say what is to be written."""
        return Rewrite({name: self.values[name] for name in sorted(self.changed)}, record, undo)


def _settled_base(checkpoint: Path) -> Base:
    if (checkpoint / RECORD_FOLDER / NEXT_FILE).exists():
        # Somebody was interrupted while the folder was changed in place.
        with opened_in_place(checkpoint):
            pass
    return read_base(checkpoint)


def _plan_stack(base: Base, patches: Sequence[Patch]) -> tuple[Rewrite, tuple[str, ...]]:
    refuse_quantised(base.folder)
    newest = base.record.newest()
    makers = {name: manifest["manifest_sha256"] for name, manifest in newest.items()}
    draft = _Draft(base.folder, base.entries, makers=makers)
    for patch in patches:
        _refuse_changed(base, draft, patch.tensors)
    undo: dict[str, dict[str, TensorData]] = {}
    manifests = []
    waiting = list(patches)
    while waiting:
        reasons = [_misfit(draft, patch) for patch in waiting]
        if None not in reasons:
            raise PatchError(next(reason for reason in reasons if reason))
        patch = waiting.pop(reasons.index(None))
        manifest = manifest_record(patch)
        manifests.append(manifest)
        undo[manifest["manifest_sha256"]] = {name: draft.value(name) for name in patch.tensors}
        for name, tensor in patch.tensors.items():
            draft.put(name, TensorData(tensor.dtype, tensor.shape, tensor.data))
            draft.makers[name] = manifest["manifest_sha256"]
    record = Record((*base.record.patches, *manifests))
    if len(dump_record(record)) > MAX_RECORD_BYTES:
        raise PatchError(f"{base.folder}: carries too many patches to record more; revert some first")
    return draft.rewrite(record, undo), tuple(one["manifest_sha256"] for one in manifests)


def _refuse_changed(base: Base, draft: _Draft, names: Iterable[str]) -> None:
    """Refuse to put a patch on tensors that are no longer what a recorded patch made of them."""
    newest = base.record.newest()
    for name in names:
        if name not in newest or name not in base.entries:
            continue
        below = newest[name]
        if draft.hash(name) != below["tensors"][name]["new_sha256"]:
            raise PatchError(
                f"{base.folder}: tensor {brief(name)} is no longer what patch"
                f" {short(below['manifest_sha256'])} made of it: something else changed it. If it is as"
                f" it should be, remove {base.folder / RECORD_FOLDER} and try again: the patches in"
                " it can then not be reverted"
            )


def _plan_revert(base: Base, patch_ids: Sequence[str]) -> tuple[Rewrite, tuple[str, ...]]:
    patches = list(base.record.patches)
    if not patches:
        raise PatchError(f"{base.folder}: carries no patches, so there is nothing to revert")
    chosen = {_find(base, wanted) for wanted in patch_ids} or set(range(len(patches)))
    draft = _Draft(base.folder, base.entries)
    built_on: dict[str, str] = {}  # tensors that a patch changes which stays, and that patch
    order = []
    for i in reversed(range(len(patches))):
        patch_id, tensors = patches[i]["manifest_sha256"], patches[i]["tensors"]
        if i not in chosen:
            # The newest of several is the one to revert first.
            built_on = dict.fromkeys(tensors, patch_id) | built_on
            continue
        for name, fields in tensors.items():
            where = f"{base.folder}: patch {short(patch_id)} cannot be reverted: tensor {brief(name)}"
            if name in built_on:
                raise PatchError(
                    f"{where} was changed again by patch {short(built_on[name])}; revert that one first"
                )
            if name not in base.entries or draft.hash(name) != fields["new_sha256"]:
                raise PatchError(
                    f"{where} is no longer what the patch made of it: something else"
                    " changed it, and reverting would lose that change"
                )
        for name, value in read_undo(base.folder, patches[i], base.entries).items():
            draft.put(name, value)
        order.append(patch_id)
    left = Record(tuple(patch for i, patch in enumerate(patches) if i not in chosen))
    return draft.rewrite(left, {}), tuple(order)


def _find(base: Base, wanted: str) -> int:
    """Find a patch by its identity or the beginning of it; of the same patch twice, the newer."""
    ids = base.record.ids()
    found = [i for i, patch_id in enumerate(ids) if patch_id.startswith(wanted)]
    if not found or not wanted:
        carried = ", ".join(map(short, ids))
        raise PatchError(f"{base.folder}: carries no patch {brief(wanted)}; it carries {carried}")
    if len({ids[i] for i in found}) > 1:
        several = ", ".join(dict.fromkeys(ids[i] for i in found))
        raise PatchError(f"{base.folder}: {wanted!r} may mean several patches: {several}")
    return found[-1]


def _misfit(draft: _Draft, patch: Patch) -> str | None:
    """Say why a patch does not belong to a checkpoint; None if it does."""
    model = patch.manifest.model
    origin = f"the patch was made from {brief(model.id)}"
    if model.revision is not None:
        origin += f" at revision {brief(model.revision)}"
    for name, tensor in patch.tensors.items():
        if name not in draft.entries:
            return f"{draft.folder}: has no tensor {brief(name)}, which the patch changes; {origin}"
        entry = draft.entries[name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            return (
                f"{draft.folder}: tensor {brief(name)} is {entry.dtype} {list(entry.shape)}, but the"
                f" patch expects {tensor.dtype} {list(tensor.shape)}; {origin}"
            )
    is_applied = all(draft.hash(name) == tensor.new_sha256 for name, tensor in patch.tensors.items())
    for name, tensor in patch.tensors.items():
        if draft.hash(name) == tensor.old_sha256:
            continue
        if name in draft.makers and not is_applied:
            return (
                f"{draft.folder}: tensor {brief(name)} was changed by patch"
                f" {short(draft.makers[name])}, and this patch was not made from its result. Put in"
                " one of the two, or make this edit again, on the model with the other one in it"
            )
        if not is_applied:
            advice = "apply it to that checkpoint"
        elif name in draft.changed:
            advice = "the patch was named twice"
        else:
            advice = "this checkpoint carries the patch already"
        return (
            f"{draft.folder}: tensor {brief(name)} is not the one that the patch was made from:"
            f" expected sha256 {tensor.old_sha256[:12]}, found {draft.hash(name)[:12]}; {origin};"
            f" {advice}"
        )
    return None
