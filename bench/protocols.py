"""Measure one edit run by every protocol, in every context, and its capability: docs/evaluation.md.

    python bench/protocols.py ZSRE.json COUNTERFACT.json CAPABILITY_FOLDER

1,000 ZsRE edits at the reference settings are scored by locft, wild and teacher-forced, in four
contexts, and by 500 items of each of three capability tasks, before and after on the same items. 200
CounterFact edits, which name the old answer, are scored by likelihood, too. Writes
bench/results/protocols.json and prints Markdown tables. Run it alone.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import locft
from locft.report.schema import EvalReport, ProtocolScores
from locft.report.words import change_text, figure_text, seconds_text

RESULT = Path(__file__).parent / "results" / "protocols.json"
CONFIG = locft.RunConfig(location="20.mlp.down", batch_size=50, lr=2e-3, epochs=20)
TASKS = ("lambada_openai", "piqa", "arc_easy")


def measure(edits: Path, num: int, folder: Path, measures: locft.Measures) -> EvalReport:
    """Edit the embedded model with the first edits of a file, and evaluate the run."""
    config = replace(CONFIG, on_conflict="keep-last")
    given = locft.read_edits(edits).edits[:num]
    locft.edit("demo", given, folder, config, say=print)
    return locft.evaluate("demo", given, folder, None, config, measures, say=print).report


def print_scores(title: str, scores: ProtocolScores) -> None:
    """Print the figures of one protocol in one context, a row for each score."""
    for name, after in scores.after.items():
        before = "" if scores.before is None else figure_text(name, scores.before[name])
        change = "" if scores.change is None else change_text(scores.change[name])
        print(f"| {title} | {name} | {before} | {figure_text(name, after)} | {change} |")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("zsre", type=Path)
    parser.add_argument("counterfact", type=Path)
    parser.add_argument("capability", type=Path)
    parser.add_argument("--num-edits", type=int, default=1000)
    parser.add_argument("--num-items", type=int, default=500)
    words = parser.parse_args()
    everything = locft.Measures(
        protocols=("locft", "wild", "teacher-forced"),
        contexts=("raw", "qa", "chat", "prefix"),
        capability=TASKS,
        capability_data=words.capability,
        capability_limit=words.num_items,
    )
    with_old = locft.Measures(protocols=("locft", "wild", "teacher-forced", "likelihood"))
    reports: dict[str, EvalReport] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "zsre": (words.zsre, words.num_edits, everything),
            "counterfact": (words.counterfact, min(200, words.num_edits), with_old),
        }
        for name, (file, num, measures) in runs.items():
            reports[name] = measure(file, num, Path(folder) / name, measures)
            text = json.dumps({key: asdict(value) for key, value in reports.items()}, indent=1)
            # After every run, so that an interrupted measurement keeps what it has.
            RESULT.write_text(text + "\n", encoding="utf-8")
    for name, report in reports.items():
        print(
            f"\n{name}: {report.edits.num_edits:,} edits, scored in {seconds_text(report.cost.eval_s)}\n"
        )
        print(
            "| protocol or context | score | before | after | change in points |\n|---|---|---|---|---|"
        )
        for protocol, scores in report.protocols.items():
            print_scores(protocol, scores)
        for context, scores in report.contexts.items():
            print_scores(f"context {context}", scores)
        for task, of_task in report.capability.tasks.items() if report.capability else ():
            assert of_task.before is not None
            assert of_task.change is not None
            figures = (figure_text(task, of_task.before), figure_text(task, of_task.after))
            print(
                f"| capability | {task} | {figures[0]} | {figures[1]} | {change_text(of_task.change)} |"
            )
        print(f"\ncauses of failures: {report.causes}")
        print(f"seconds: {report.parts_s}")


if __name__ == "__main__":
    main()
