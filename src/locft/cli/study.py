"""The commands below `locft study`: each does trials, keeps them, and shows what came of them.

A study NAME is a function `run_NAME` here, a parser in `locft.cli.parser`, and a module
`locft.study.NAME`, which is imported where it is called.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locft.cli.say import print_json, say
from locft.cli.show import make_console, show_page
from locft.config import RunConfig
from locft.report.page import Page
from locft.study.plans import LocationsPlan, PipelinesPlan
from locft.study.records import StudyReport


def run_pipelines(words: argparse.Namespace, config: RunConfig) -> int:
    """Train depth-first and breadth-first by several methods."""
    from locft.study.pipelines import study_pipelines

    settings: dict[str, dict[str, Any]] = {}
    for method, key, value in words.set:
        settings.setdefault(method, {})[key] = value
    plan = PipelinesPlan(
        methods=words.methods,
        batches=words.batches,
        seeds=words.seeds,
        num_edits=words.num_edits,
        num_passages=words.passages,
        method_settings=settings,
    )
    found = study_pipelines(words.model, words.edits, words.output, plan, config, say=say)
    return _hand_over(words, *found)


def run_locations(words: argparse.Namespace, config: RunConfig) -> int:
    """Train at each layer and module in turn."""
    from locft.study.locations import study_locations

    plan = LocationsPlan(
        layers=words.layers,
        modules=words.modules,
        batch_size=config.batch_size,
        seed=config.seed,
        num_edits=words.num_edits,
        num_passages=words.passages,
    )
    found = study_locations(words.model, words.edits, words.output, plan, config, say=say)
    return _hand_over(words, *found)


def _hand_over(words: argparse.Namespace, report: StudyReport, page: Page) -> int:
    if words.json:
        print_json(asdict(report))
    else:
        show_page(make_console(), page)
    say(f"wrote {Path(words.output) / 'report.html'}, with report.md and report.json")
    return 0
