"""Export an edit for serving, as a LoRA adapter: how small it can be, and what that loses."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from locft.config import RunConfig
from locft.data.edits import EditFile
from locft.data.gather import GatheredEdits, check_tokens, gather_edits
from locft.errors import InputError
from locft.evaluation.metrics import is_match
from locft.evaluation.subject import Subject, load_subject
from locft.model.load import context_tokens
from locft.model.resolve import CheckpointFolder
from locft.model.weights import swapped_in
from locft.patch.base import resolve_base
from locft.patch.format import Patch, manifest_record, open_patch
from locft.patch.lora import (
    MAX_RANK,
    Factors,
    adapted,
    adapter_config,
    cut,
    factorise,
    find_changes,
    largest_rank,
    num_bytes,
    rank_ladder,
    relative_error,
    vllm_rank,
    write_adapter,
)
from locft.patch.weights import patched_values
from locft.publish import refuse_taken, reserved, staged_folder
from locft.recipe.run_folder import EDITS_FILE, edits_of_run
from locft.report.words import bytes_text, counted
from locft.types import Edit


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """What an adapter of one rank takes, and what it loses.

    Attributes:
        rank: The rank.
        num_bytes: Bytes of its tensors.
        error: Frobenius norm of what it leaves out of the change, over that of the change.
        num_right: How many edits are answered right with it; None if it was not asked.
        num_lost: How many edits it answers wrong that the full patch answers right; None likewise.
    """

    rank: int
    num_bytes: int
    error: float
    num_right: int | None = None
    num_lost: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoraExport:
    """An adapter that was written, and how its rank came about.

    Attributes:
        model: The model that it belongs to.
        location: The tuning location that it changes.
        rank: Its rank.
        max_lora_rank: What vLLM's --max-lora-rank must be at least.
        largest_rank: The largest rank at which it is not larger than the matrices themselves.
        matrices_bytes: Bytes of the matrices that it changes.
        num_edits: How many edits were asked; None if none are known.
        num_right: How many of them the full patch answers right; None likewise.
        ranks: The figures by rank, ascending.
    """

    model: str
    location: str
    rank: int
    max_lora_rank: int
    largest_rank: int
    matrices_bytes: int
    num_edits: int | None
    num_right: int | None
    ranks: tuple[RankFigures, ...]

    @property
    def chosen(self) -> RankFigures:
        """The figures of the adapter that was written."""
        return next(figures for figures in self.ranks if figures.rank == self.rank)


def export_lora(
    patch: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    edits: str | Path | EditFile | Sequence[Edit] | None = None,
    rank: int | Literal["auto"] = "auto",
    config: RunConfig | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LoraExport:
    """Export a patch as a LoRA adapter that PEFT and vLLM load.

    With ``auto``, the smallest rank is taken that answers every edit right that the full patch answers
    right: powers of two are tried from 1 up, and then the ranks between the last two, by halving. With
    a given rank, that one and the powers of two under it are tried; of others only size and error are
    told.

    Args:
        patch: A patch folder, or a run folder that holds one.
        output: The adapter folder to make; it may exist if it is empty.
        model: Where the unedited model is; if None, where it was when the patch was made.
        edits: The edits to ask; if None, those of the run folder.
        rank: The rank of the adapter, or ``auto``.
        config: The settings; `device`, `dtype`, `eval_batch_size`, `format`, `on_conflict` and
            `revision` count. If None, the defaults, in the format that the patch was trained in.
        say: Called with a line at each step.

    Returns:
        What was written, with size, error and loss by rank.

    Raises:
        InputError: The patch, the model or the edits cannot be used, the location cannot be put in
            an adapter, or no rank fits. Nothing is written.
    """
    found, output = open_patch(Path(patch)), Path(output)
    config = config or RunConfig(format=found.manifest.format)
    refuse_taken(output)
    if rank != "auto" and not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank {rank}: vLLM serves ranks from 1 to {MAX_RANK}")
    edits = edits_of_run(Path(patch)) if edits is None else edits
    if edits is None and rank == "auto":
        raise InputError(
            f"{patch}: is no run folder with {EDITS_FILE}, so there are no edits to choose a rank by: "
            "name them with --edits FILE, or give --rank N"
        )
    gathered = None if edits is None else gather_edits(edits, config.on_conflict)
    base = resolve_base(found, model, config.revision)
    with reserved(output):
        return _export(found, base, gathered, output, rank, config, say)


def _export(
    found: Patch,
    base: CheckpointFolder,
    gathered: GatheredEdits | None,
    output: Path,
    rank: int | Literal["auto"],
    config: RunConfig,
    say: Callable[[str], None],
) -> LoraExport:
    # 1. The change of each matrix, and its components.
    say(f"loading {base.name}")
    subject = load_subject(base.name, replace(config, revision=base.revision))
    network = subject.loaded.model
    values = patched_values(network, base.folder, found)
    changes = find_changes(network, base.folder, found, values)
    largest = largest_rank(changes)
    matrices_bytes = sum(change.num_bytes for change in changes)
    _refuse_size(rank, largest, matrices_bytes)
    location = found.manifest.location
    say(f"factorising the change of {location.name} ({location.num_parameters:,} parameters)")
    components = [factorise(change, largest) for change in changes]

    # 2. What the full patch answers right is what an adapter can lose.
    asked: tuple[Edit, ...] = ()
    right: set[str] = set()
    if gathered is not None:
        asked = gathered.edits
        check_tokens(gathered, subject.codec, context_tokens(network.config))
        if gathered.sha256 != found.manifest.edits_sha256:
            say("the edits are not those that the patch was made of")
        say(f"answering {counted(len(asked), 'edit')} with the full patch")
        with swapped_in(network, values):
            right = _answered_right(subject, asked, "answering, full patch")
        if rank == "auto" and not right:
            raise InputError(
                "the full patch answers none of the edits right, so they cannot choose a rank: name "
                "its own edits with --edits FILE, or give --rank N"
            )

    # 3. Rank by rank. The saved factors count, run as they are served: beside the old weights.
    measured: dict[int, RankFigures] = {}

    def measure(step: int, is_asked: bool = True) -> RankFigures:
        factors = [cut(each, step) for each in components]
        figures = RankFigures(
            rank=step, num_bytes=num_bytes(factors), error=relative_error(changes, factors)
        )
        if asked and is_asked:
            with adapted(network, factors):
                kept = _answered_right(subject, asked, f"answering, rank {step}")
            figures = replace(figures, num_right=len(kept), num_lost=len(right - kept))
            say(f"rank {step}: {len(kept):,} of {len(asked):,} edits, {figures.num_lost:,} lost")
        measured[step] = figures
        return figures

    if rank == "auto":
        chosen = _find_rank(measure, largest)
    else:
        chosen = rank
        for step in sorted({*rank_ladder(largest), rank}):
            measure(step, is_asked=step <= rank)
    table = [figures for _, figures in sorted(measured.items())]

    # 4. The adapter.
    report = LoraExport(
        model=base.name,
        location=location.name,
        rank=chosen,
        max_lora_rank=vllm_rank(chosen),
        largest_rank=largest,
        matrices_bytes=matrices_bytes,
        num_edits=len(asked) if asked else None,
        num_right=len(right) if asked else None,
        ranks=tuple(table),
    )
    with staged_folder(output) as staging:
        factors = [cut(each, chosen) for each in components]
        write_adapter(staging, factors, base)
        (staging / "README.md").write_text(_draw_readme(report, found, base, factors), "utf-8")
    return report


def _refuse_size(rank: int | Literal["auto"], largest: int, matrices_bytes: int) -> None:
    if largest == 0:
        raise InputError(
            "an adapter of any rank would be larger than the matrices that it changes: export with "
            "--full"
        )
    if rank != "auto" and rank > largest:
        raise InputError(
            f"rank {rank}: the adapter would be larger than the matrices that it changes "
            f"({bytes_text(matrices_bytes)}); the largest rank allowed here is {largest}"
        )


def _answered_right(subject: Subject, edits: Sequence[Edit], label: str) -> set[str]:
    """Name the edits whose prompts are answered with their targets."""
    guesses = {edit.prompt: edit.target for edit in edits}
    answers = subject.answer(guesses, label, guesses=guesses)
    return {edit.id for edit in edits if is_match(answers[edit.prompt], edit.target)}


def _find_rank(measure: Callable[[int], RankFigures], largest: int) -> int:
    """Find the smallest rank that loses no edit: by powers of two, and then by halving what is between.

    Halving takes for granted that a rank over one that loses nothing loses nothing, too. That holds as
    a rule, and the rank that is returned was measured in any case.
    """
    table: list[RankFigures] = []
    below = 0
    for step in rank_ladder(largest):
        table.append(measure(step))
        if table[-1].num_lost == 0:
            break
        below = step
    else:
        best = min(table, key=lambda figures: (figures.num_lost, figures.rank))
        raise InputError(
            f"no rank up to {largest} keeps every edit that the full patch answers right; the best, "
            f"rank {best.rank}, loses {best.num_lost:,}: take it with --rank {best.rank}, or export "
            "with --full"
        )
    found = table[-1].rank
    while found - below > 1:
        middle = (below + found) // 2
        if measure(middle).num_lost == 0:
            found = middle
        else:
            below = middle
    return found


def _draw_readme(
    report: LoraExport, patch: Patch, base: CheckpointFolder, factors: Sequence[Factors]
) -> str:
    name = str(adapter_config(factors, base)["base_model_name_or_path"])
    figures = report.chosen
    measured = (
        "It was not asked any edits."
        if figures.num_right is None
        else f"With it, {figures.num_right:,} of {report.num_edits:,} edits are answered right; "
        f"{figures.num_lost:,} are lost of the {report.num_right:,} that the full patch answers right."
    )
    return f"""\
# {counted(patch.manifest.num_edits, "edit")} as a LoRA adapter of rank {report.rank}

Belongs to `{name}`{f" at revision `{base.revision}`" if base.revision else ""}, and changes
{", ".join(f"`{each.module}`" for each in factors)}. Made by locft from patch
`{manifest_record(patch)["manifest_sha256"][:12]}`.

It leaves {100 * figures.error:.1f}% of the patch's change out (Frobenius norm). {measured}

```python
base = transformers.AutoModelForCausalLM.from_pretrained({json.dumps(name)})
model = peft.PeftModel.from_pretrained(base, "FOLDER")
```

```console
$ vllm serve {shlex.quote(name)} --enable-lora \\
    --max-lora-rank {report.max_lora_rank} --lora-modules edited=FOLDER
```

`FOLDER` is this folder.
"""
