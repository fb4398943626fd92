"""Measure the figures that docs/defaults.md shows, on a file of ZsRE edits.

    python bench/figures.py reference ZSRE.json   200 edits at the published settings, seeds 0, 1, 2,
                                                  with products in float32, and in bfloat16
    python bench/figures.py defaults ZSRE.json    no flags: 1, 5, 20, 200 and 1,000 edits, and the demo

Each writes one JSON file into bench/results and prints a Markdown table. Run them alone: a second
busy process on the same cores makes times meaningless.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import locft
from locft.bench.process import run_alone
from locft.report.schema import EditReport
from locft.report.words import bytes_text, figure_text, seconds_text

REFERENCE = locft.RunConfig(location="20.mlp.down", batch_size=20, lr=2e-3, epochs=20)
DTYPES: tuple[Literal["float32"], Literal["bfloat16"]] = ("float32", "bfloat16")
NUM_EDITS = (1, 5, 20, 200, 1000)
RESULTS = Path(__file__).parent / "results"


def measure_reference(file: Path) -> Iterator[tuple[str, EditReport]]:
    """Edit the first 200 facts at the published settings, with products in float32, and in bfloat16."""
    edits = locft.read_edits(file).edits[:200]
    for seed in (0, 1, 2):
        for dtype in DTYPES:
            config = replace(REFERENCE, seed=seed, compute_dtype=dtype)
            yield f"seed {seed}, {dtype}", run(edits, config)


def measure_defaults(file: Path) -> Iterator[tuple[str, EditReport]]:
    """Edit the first n facts, and the packaged ones, without any setting."""
    yield "demo facts", run("demo", locft.RunConfig())
    for num in NUM_EDITS:
        yield f"{num:,} ZsRE", run(locft.read_edits(file).edits[:num], locft.RunConfig())


MEASUREMENTS = {
    "reference": measure_reference,
    "defaults": measure_defaults,
}


def run(edits: str | Sequence[locft.Edit], config: locft.RunConfig) -> EditReport:
    """Edit the embedded model in a process of its own, so that its peak memory is its own, too."""
    return run_alone(_edit, edits, config)


def _edit(edits: str | Sequence[locft.Edit], config: locft.RunConfig) -> EditReport:
    with tempfile.TemporaryDirectory() as folder:
        return locft.edit("demo", edits, Path(folder) / "run", config)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("file", type=Path)
    words = parser.parse_args()
    reports: dict[str, EditReport] = {}
    print(
        "| run | reliability | generalization | locality | drift | epochs | training | in all | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, report in MEASUREMENTS[words.what](words.file):
        reports[name] = report
        scores, cost = report.scores, report.cost
        cells = [
            name,
            figure_text("reliability", scores.reliability),
            figure_text("generalization", scores.generalization),
            figure_text("locality", scores.locality),
            figure_text("drift", scores.drift),
            str(report.training.epochs),
            seconds_text(cost.train_s + cost.cache_s),
            seconds_text(cost.wall_s),
            bytes_text(cost.peak_memory_bytes),
        ]
        print("|", " | ".join(cells), "|", flush=True)
        RESULTS.mkdir(exist_ok=True)
        # After every run, so that an interrupted measurement keeps what it has.
        text = json.dumps({key: asdict(value) for key, value in reports.items()}, indent=1)
        (RESULTS / f"{words.what}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
