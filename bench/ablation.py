"""Measure what each part of the engine brings: leave out one at a time, and time an epoch.

    python bench/ablation.py ZSRE.json                     the embedded model, 100 edits, 20.mlp.down
    python bench/ablation.py ZSRE.json --location 29.mlp.down

All ways are timed in turn, round after round, in one process; a row shows the fastest epoch of each.
Writes bench/results/ablation.json and prints a Markdown table. Run it alone.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import locft
from locft.evaluation.subject import load_subject
from locft.model import attention, products
from locft.model import split as split_module
from locft.model.location import resolve_location
from locft.model.split import Split, split_model
from locft.provenance import describe_environment
from locft.train import objective
from locft.train.cache import build_cache
from locft.train.defaults import choose_schedule
from locft.train.loop import Engine, train_breadth_first
from locft.types import Epoch

RESULT = Path(__file__).parent / "results" / "ablation.json"
Part = Callable[[], AbstractContextManager[Any]]


def plain_layout(weight: Tensor) -> products.Product:
    """Multiply with a weight as it lies."""
    return lambda x: nn.functional.linear(x, weight)


@contextmanager
def without_round_sizes() -> Iterator[None]:
    """Take batches of any size."""
    with (
        patch.object(split_module, "_NODES_MULTIPLE", 1),
        patch.object(split_module, "_ASKED_MULTIPLE", 1),
    ):
        yield


# What is left out, and how.
SPLITS: dict[str, dict[str, Any]] = {
    "packing (padded batches)": {"longest_packed": 0},
    "the last layer at target positions only": {"pointwise": ()},
}
PATCHES: dict[str, Part] = {
    "plain products for short attention": lambda: patch.object(attention, "_SHORT", 0),
    "weights laid out for oneDNN": lambda: patch.object(products, "_lay_out", plain_layout),
    "bfloat16 within the MLP": lambda: patch.object(products, "_gates", lambda _: ()),
    "the loss piece by piece": lambda: patch.object(objective, "_PIECE", 2**62),
    "batches of few sizes": without_round_sizes,
}


def measure(file: Path, location_name: str, num_edits: int, rounds: int) -> dict[str, Any]:
    """Time an epoch in every way.

    Returns:
        Seconds of the fastest epoch by what is left out, and where they were measured.
    """
    config = locft.RunConfig(location=location_name, lr=2e-3, epochs=2, stop_loss=0.0)
    subject = load_subject("demo", config)
    model = subject.loaded.model
    location = resolve_location(model, config.location)
    edits = locft.read_edits(file).edits[:num_edits]
    shapes = [model.get_parameter(name).shape for name in location.parameters]
    schedule = choose_schedule(config, len(edits), shapes)
    split = split_model(model, location.layer)
    cache = build_cache(split, [subject.codec.encode(edit) for edit in edits])
    own = [model.get_parameter(name).detach().clone() for name in location.parameters]
    fastest: dict[str, float] = {}

    def time_epoch(name: str, split: Split, engine: Engine, part: Part | None = None) -> None:
        ends = [time.perf_counter()]

        def note(_: Epoch) -> None:
            ends.append(time.perf_counter())

        with ExitStack() as stack:
            if part is not None:
                stack.enter_context(part())
            train_breadth_first(split, location, cache, schedule, note, engine=engine)
        with torch.no_grad():
            for parameter, value in zip(location.parameters, own, strict=True):
                model.get_parameter(parameter).copy_(value)
        # The first epoch makes copies and code.
        fastest[name] = min(fastest.get(name, math.inf), ends[2] - ends[1])

    best = Engine(in_bfloat16=True)
    for _ in range(rounds):
        time_epoch("nothing", split, best)
        time_epoch("bfloat16 products", split, Engine())
        for name, fields in SPLITS.items():
            time_epoch(name, dataclasses.replace(split, **fields), best)
        for name, part in PATCHES.items():
            time_epoch(name, split, best, part)
        plain = dataclasses.replace(split, longest_packed=0, pointwise=())
        time_epoch("all of these (a padded tail in float32)", plain, Engine())
    return {
        "location": location.name,
        "num_edits": len(edits),
        "seconds_per_epoch_without": fastest,
        "environment": dataclasses.asdict(describe_environment(model.device)),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--location", default="20.mlp.down")
    parser.add_argument("--num-edits", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    found = measure(words.file, words.location, words.num_edits, words.rounds)
    seconds = found["seconds_per_epoch_without"]
    print("| left out | seconds an epoch | |")
    print("|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / seconds['nothing']:.2f}x |")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
