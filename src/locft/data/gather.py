"""Gets a run's edits ready: read, checked, free of contradictions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from locft.data.edits import IN_MEMORY, EditFile, duplicate_ids, edits_sha256, hold_edits, read_edits
from locft.data.lint import Measured, lint, resolve_conflicts
from locft.data.problems import Problem, format_problems
from locft.errors import EditsError
from locft.progress import progress
from locft.types import Edit

if TYPE_CHECKING:  # so that reading and linting need no transformers
    from locft.data.encode import Codec

DEMO_NAME = "demo"
_NUM_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class GatheredEdits:
    """Edits that are fit to be trained on.

    Attributes:
        edits: The edits, in the order of their file.
        path: The file; None where they were given directly.
        format: The data set shape of the file.
        num_dropped: How many the policy on conflicts dropped.
        file_sha256: Hash of the file's bytes; None where there is no file.
        sha256: Hash of the edits' meaning, whatever the format of their file.
        warnings: What the linter warns of.
    """

    edits: tuple[Edit, ...]
    path: Path | None
    format: str
    num_dropped: int
    file_sha256: str | None
    sha256: str
    warnings: tuple[Problem, ...]


def gather_edits(
    source: str | Path | EditFile | Sequence[Edit],
    on_conflict: Literal["error", "keep-last", "keep-first"] = "error",
) -> GatheredEdits:
    """Read edits and check everything that needs no model.

    Args:
        source: A file, ``demo`` for the facts packaged with locft, what `read_edits` gave, or the
            edits themselves.
        on_conflict: Which of contradicting edits to keep; ``error`` refuses them.

    Returns:
        The edits, with the linter's warnings.

    Raises:
        EditsError: There are errors; the message lists the first 20 (`lint` lists all).
    """
    file = read_source(source)
    kept = file
    if on_conflict != "error":
        edits = resolve_conflicts(file.edits, on_conflict)
        # An update may reuse the id of what it replaces.
        others = (problem for problem in file.problems if problem.code != "duplicate-id")
        kept = replace(file, edits=edits, problems=(*others, *duplicate_ids(edits)))
    problems = lint(kept)
    refuse_errors(problems, file.path)
    return GatheredEdits(
        edits=kept.edits,
        path=None if file.format == IN_MEMORY else file.path,
        format=file.format,
        num_dropped=len(file.edits) - len(kept.edits),
        file_sha256=file.sha256 or None,
        sha256=edits_sha256(kept.edits),
        warnings=problems,
    )


def read_source(source: str | Path | EditFile | Sequence[Edit]) -> EditFile:
    """Read edits from a file, from the packaged demo facts, or from memory."""
    if isinstance(source, str | Path):
        if source != DEMO_NAME:
            return read_edits(Path(source))
        packaged = resources.files("locft").joinpath("resources/demo_facts.jsonl")
        with resources.as_file(packaged) as path:
            return replace(read_edits(path), path=Path("demo"))
    return source if isinstance(source, EditFile) else hold_edits(source)


def check_tokens(
    gathered: GatheredEdits, codec: "Codec", max_context_tokens: int | None
) -> tuple[Problem, ...]:
    """Check what needs the model's tokenizer, too.

    Returns:
        All warnings about the edits.

    Raises:
        EditsError: There are errors; the message lists all of them.
    """
    path = gathered.path or Path("edits")
    file = EditFile(path, gathered.format, gathered.edits, (), "")
    problems = lint_tokens(file, codec, max_context_tokens)
    refuse_errors(problems, path)
    # Those of reading the file are in the earlier warnings only.
    return tuple(dict.fromkeys((*gathered.warnings, *problems)))


def lint_tokens(file: EditFile, codec: "Codec", max_context_tokens: int | None) -> tuple[Problem, ...]:
    """Report all problems of an edits file, those that a model's tokenizer makes included."""
    with progress("tokenising", len(file.edits), "edits") as step:

        def measure(edit: Edit) -> Measured:
            step()
            return codec.measure(edit)

        return lint(file, measure=measure, max_context_tokens=max_context_tokens)


def refuse_errors(problems: Sequence[Problem], path: Path) -> None:
    """Raise an EditsError that lists the problems, if one of them is an error."""
    if any(problem.level == "error" for problem in problems):
        raise EditsError(
            "the edits cannot be used:\n" + format_problems(problems, path, limit=_NUM_SHOWN)
        )


def say_warnings(
    gathered: GatheredEdits, warnings: Sequence[Problem], say: Callable[[str], None]
) -> None:
    """Tell of the linter's warnings, if there are any: the first ones, and how many there are."""
    if warnings:
        say(format_problems(warnings, gathered.path or Path("edits"), limit=_NUM_SHOWN))
