"""Compare what `locft edit --plan` predicts with what the run then takes.

    python bench/plan.py                                  three locations, 20 and 60 of the demo's edits
    python bench/plan.py --locations 10.mlp --nums 5 --epochs 3

Training goes on for exactly the epochs that were planned, so that its time can be compared. Each run is
alone in a process of its own, so that its peak memory is its own, too. Writes bench/results/plan.json.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import locft
from locft.bench.process import run_alone
from locft.data.gather import read_source

RESULT = Path(__file__).parent / "results" / "plan.json"


def compare(model: str, edits: str, num: int, config: locft.RunConfig) -> dict[str, Any]:
    """Plan and run an edit of the first edits of a file.

    Returns:
        Predicted and measured seconds of each part, and bytes of memory and of the patch.
    """
    given = list(read_source(edits).edits[:num])
    predicted = run_alone(locft.plan, model, given, config)
    report = run_alone(_edit, model, given, config)
    cost = report.cost
    return {
        "location": predicted.location,
        "num_edits": num,
        "epochs": report.training.epochs,
        "predicted": {
            **asdict(predicted.cost),
            "patch_bytes": predicted.disk.patch_bytes,
        },
        "measured": {
            "load_s": cost.load_s,
            "cache_s": cost.cache_s,
            "train_s": cost.train_s,
            "eval_s": cost.eval_s,
            "wall_s": cost.wall_s,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "patch_bytes": report.patch_bytes,
        },
        "phases": [asdict(phase) for phase in predicted.phases],
        "environment": asdict(report.environment),
    }


def _edit(model: str, edits: list[locft.Edit], config: locft.RunConfig) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return locft.edit(model, edits, Path(folder) / "run", config)


def main() -> None:
    """Compare every location with every number of edits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--edits", default="demo", help="a file of edits, or demo")
    parser.add_argument("--locations", nargs="+", default=["10.mlp.down", "20.mlp.down", "25"])
    parser.add_argument("--nums", nargs="+", type=int, default=[20, 60])
    parser.add_argument("--epochs", type=int, default=10)
    words = parser.parse_args()
    results = []
    for location in words.locations:
        for num in words.nums:
            config = locft.RunConfig(location=location, epochs=words.epochs, stop_loss=0)
            result = compare(words.model, words.edits, num, config)
            results.append(result)
            print(f"{location}, {num} edits: predicted / measured = ratio")
            for name, measured in result["measured"].items():
                predicted = result["predicted"][name]
                print(f"  {name:<18} {predicted:,.4g} / {measured:,.4g} = {predicted / measured:.2f}")
            # After every run, so that an interrupted measurement keeps what it has.
            RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
