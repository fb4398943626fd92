"""Measure one edit run by every protocol, in every context, and its capability: docs/evaluation.md.

    python bench/protocols.py ZSRE.json COUNTERFACT.json CAPABILITY_FOLDER
    python bench/protocols.py ZSRE.json COUNTERFACT.json CAPABILITY_FOLDER --parts protocols

1,000 ZsRE edits at the reference settings are scored by locft, wild and teacher-forced (part
`protocols`), in four contexts (`contexts`), and by 500 items of each of three capability tasks, before
and after on the same items (`capability`). 200 CounterFact edits, which name the old answer, are
scored by likelihood, too (`likelihood`). Writes bench/results/protocols.json, part by part, and prints
Markdown tables. Run it alone.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import locft
from locft.data.normalise import normalise
from locft.report.markdown import draw_markdown
from locft.report.page import Page, Section, Table
from locft.report.schema import EvalReport, ProtocolScores
from locft.report.sections import with_drift
from locft.report.words import change_text, figure_text, seconds_text

RESULT = Path(__file__).parent / "results" / "protocols.json"
CONFIG = locft.RunConfig(location="20.mlp.down", batch_size=50, lr=2e-3, epochs=20)
TASKS = ("lambada_openai", "piqa", "arc_easy")
PARTS = ("protocols", "contexts", "capability", "likelihood")


def rows_of(title: str, scores: ProtocolScores, report: EvalReport) -> list[tuple[str, ...]]:
    """Word the figures of one protocol in one context, a row for each score."""
    before, change = scores.before or {}, scores.change or {}
    return [
        (
            title,
            name,
            figure_text(name, before[name]) if name in before else "",
            figure_text(name, figure),
            change_text(change[name]) if name in change else "",
        )
        for name, figure in with_drift(scores.after, report.drift).items()
    ]


def table_of(part: str, report: EvalReport) -> Table:
    """Put what a part measured into a table."""
    rows: list[tuple[str, ...]] = []
    if part in ("protocols", "likelihood"):
        for name, scores in report.protocols.items():
            rows += rows_of(name, scores, replace(report, drift=None) if rows else report)
    for context, scores in report.contexts.items():
        rows += rows_of(context, scores, replace(report, drift=None))
    for task, found in report.capability.tasks.items() if report.capability is not None else ():
        assert found.before is not None
        assert found.change is not None
        figures = (figure_text(task, found.before), figure_text(task, found.after))
        rows.append((task, found.metric, *figures, change_text(found.change)))
    columns = ("by", "score", "before", "after", "change in points")
    return Table(columns=columns, rows=tuple(rows))


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("zsre", type=Path)
    parser.add_argument("counterfact", type=Path)
    parser.add_argument("capability", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--num-edits", type=int, default=1000)
    parser.add_argument("--num-items", type=int, default=500)
    words = parser.parse_args()
    measures = {
        "protocols": locft.Measures(protocols=("locft", "wild", "teacher-forced")),
        "contexts": locft.Measures(contexts=("raw", "qa", "chat", "prefix")),
        "capability": locft.Measures(
            capability=TASKS, capability_data=words.capability, capability_limit=words.num_items
        ),
        "likelihood": locft.Measures(protocols=("locft", "wild", "teacher-forced", "likelihood")),
    }
    edited: set[Path] = set()
    with tempfile.TemporaryDirectory() as folder:
        for part in words.parts.split(","):
            file = words.counterfact if part == "likelihood" else words.zsre
            num = min(200, words.num_edits) if part == "likelihood" else words.num_edits
            given = locft.read_edits(file).edits[:num]
            config = replace(CONFIG, on_conflict="keep-last")
            run = Path(folder) / file.stem
            if run not in edited:
                locft.edit("demo", given, run, config, say=print)
                edited.add(run)
            found = locft.evaluate("demo", given, run, None, config, measures[part], say=print)
            blank = [
                answer
                for answer in found.answers
                if (answer.protocol, answer.context, answer.kind) == ("locft", "raw", "locality")
                and not normalise(answer.expected or "")
            ]
            keep(
                part,
                {
                    **asdict(found.report),
                    # Answers of which nothing is left, such as "?", agree with each other.
                    "num_blank_locality": len(blank),
                    "num_blank_locality_matched": sum(answer.score_after == 1 for answer in blank),
                },
            )
            section = Section(title=part, blocks=(table_of(part, found.report),))
            title = f"{num:,} edits, scored in {seconds_text(found.report.cost.eval_s)}"
            verdict = f"{len(blank):,} blank answers to locality prompts; causes {found.report.causes}"
            page = Page(title=title, verdict=verdict, tiles=(), sections=(section,))
            print(draw_markdown(page), found.report.parts_s)


def keep(part: str, record: dict[str, Any]) -> None:
    """Put what was found beside the other parts."""
    known = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**known, part: record}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
