"""What a run leaves on the disk, in two steps: the finished patch, and then its scores.

Each step comes whole or not at all: a run folder always holds a patch and what it was trained with,
and one with a `report.json` is a whole run.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from locft.config import RunConfig, to_toml
from locft.data.edits import write_edits
from locft.evaluation.scoring import AnswerRecord
from locft.patch.format import PATCH_FOLDER, Patch, write_patch
from locft.publish import add_files, staged_folder
from locft.report.markdown import Example, draw_markdown
from locft.report.schema import EditReport, EvalReport, to_json
from locft.types import Edit

ANSWERS_FILE = "answers.jsonl"

EDITS_FILE = "edits.jsonl"

TRAINING_FILE = "train.jsonl"


def edits_of_run(path: Path) -> Path | None:
    """Find the edits of a run folder; None where there are none, as beside a patch by itself."""
    file = path / EDITS_FILE
    return file if file.is_file() else None


def save_trained(folder: Path, patch: Patch, edits: Iterable[Edit], config: RunConfig) -> None:
    """Write a finished patch and what it was trained with, into the staged run folder."""
    write_patch(patch, folder / PATCH_FOLDER)
    write_edits(folder / EDITS_FILE, edits)
    (folder / "run.toml").write_text(to_toml(config), "utf-8")


def save_scored(run: Path, report: EditReport, records: Sequence[AnswerRecord]) -> None:
    """Write the scores and the answers that they come from, into the run folder."""
    markdown = draw_markdown(report, examples_of(records))
    # The report comes last, so that a folder with one is a whole run.
    files = {ANSWERS_FILE: _lines(records), "report.md": markdown, "report.json": to_json(report)}
    add_files(run, {name: text.encode() for name, text in files.items()})


def save_evaluation(folder: Path, report: EvalReport, records: Sequence[AnswerRecord]) -> None:
    """Write an evaluation and the answers that it comes from, as a folder of their own."""
    with staged_folder(folder) as staging:
        (staging / ANSWERS_FILE).write_text(_lines(records), "utf-8")
        (staging / "report.json").write_text(to_json(report), "utf-8")


def _lines(records: Iterable[AnswerRecord]) -> str:
    return "".join(f"{json.dumps(asdict(record), ensure_ascii=False)}\n" for record in records)


def read_examples(run: Path) -> list[Example]:
    """Read each edit's own prompt and answers from a run folder."""
    lines = (run / ANSWERS_FILE).read_text("utf-8").split("\n")
    return examples_of([AnswerRecord(**json.loads(line)) for line in lines if line])


def examples_of(records: Sequence[AnswerRecord]) -> list[Example]:
    """Pick the edits' own prompts out of all answers, to show what became of each edit."""
    return [
        Example(
            prompt=record.prompt,
            expected=record.expected or "",
            before=record.before or "",
            after=record.after or "",
            is_match=record.score_after == 1,
        )
        for record in records
        if record.kind == "reliability"
    ]
