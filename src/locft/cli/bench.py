"""The commands below `locft bench`: each measures something, and shows or writes what it found.

A benchmark NAME is a function `run_NAME` here, a parser in `locft.cli.parser`, and a module
`locft.bench.NAME`, which is imported where it is called.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from locft.cli.say import print_json, say
from locft.cli.show import make_console, show_engine, show_growth, show_scoring
from locft.config import RunConfig, with_settings
from locft.errors import InputError, LocftError
from locft.publish import refuse_taken, staged_folder

if TYPE_CHECKING:  # it takes half a second to load
    from matplotlib.figure import Figure as Picture


def run_engine(words: argparse.Namespace, config: RunConfig) -> int:
    """Time training beside what else would do it."""
    from locft.bench.engine import bench_engine
    from locft.bench.picture import draw_engine

    _refuse_taken(words)
    if words.shape is not None and words.model is not None:
        raise InputError("--shape takes the place of MODEL and EDITS: give one or the other")
    own = {"epochs": 10, "batch_size": 100 if words.shape == "llama-8b" else config.batch_size}
    config = with_settings(
        config, {name: value for name, value in own.items() if not hasattr(words, f"setting_{name}")}
    )
    # Read by the libraries in each measuring process.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    report = bench_engine(
        None if words.shape else words.model or "demo",
        words.edits or "demo",
        config,
        shape=words.shape,
        num_edits=words.num_edits,
        variants=words.variants,
        num_rounds=words.rounds,
        say=say,
    )
    _hand_over(words, report, show_engine, draw_engine)
    return 0


def run_growth(words: argparse.Namespace, config: RunConfig) -> int:
    """Time training with more edits and at other depths, and measure memory."""
    from locft.bench.growth import GrowthPlan, draw_growth, measure_growth

    _refuse_taken(words)
    plan = GrowthPlan(
        sizes=words.sizes,
        memory_sizes=words.memory_sizes,
        locations=words.locations,
        num_depth_edits=words.depth_edits,
        num_steps=words.steps,
    )
    growth = measure_growth(words.model or "demo", words.edits or "demo", plan, config, say=say)
    _hand_over(words, growth, show_growth, draw_growth)
    return 0


def run_scoring(words: argparse.Namespace, config: RunConfig) -> int:
    """Check that guessing changes no answer, and time it."""
    from locft.bench.scoring import measure_scoring

    _refuse_taken(words)
    bench = measure_scoring(
        words.model or "demo", words.edits, words.patch, words.num_edits, config, say=say
    )
    _hand_over(words, bench, show_scoring)
    if bench.is_equal:
        return 0
    say("the answers or scores with guesses are not those without")
    return LocftError.exit_status


def _refuse_taken(words: argparse.Namespace) -> None:
    """Refuse an output folder that is taken before anything is measured."""
    if words.output is not None:
        refuse_taken(Path(words.output))


def _hand_over(
    words: argparse.Namespace,
    found: Any,
    show: Callable[[Console, Any], None],
    draw: "Callable[[Any], Picture] | None" = None,
) -> None:
    """Write what was found into the output folder, if there is one, and then print or show it."""
    record = asdict(found)
    if words.output is not None:
        _keep(words, record, None if draw is None else partial(draw, found))
    if words.json:
        print_json(record)
    else:
        show(make_console(), found)


def _keep(
    words: argparse.Namespace, record: dict[str, Any], draw: "Callable[[], Picture] | None"
) -> None:
    """Write what was found into the output folder: as JSON, and drawn if it can be."""
    name = words.benchmark
    with staged_folder(Path(words.output)) as folder:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
        if draw is None:
            return
        import matplotlib

        # The same figures make the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": name}):
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})
