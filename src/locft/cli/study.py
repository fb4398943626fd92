"""The commands below `locft study`, and `locft compare`: each does trials, keeps and shows them.

A study NAME is a function `run_NAME` here, a parser in `locft.cli.parser`, and a module
`locft.study.NAME`, which is imported where it is called.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from locft.cli.say import print_json, say
from locft.cli.show import make_console, show_page
from locft.config import RunConfig
from locft.report.page import Page
from locft.study.plans import ALL_METHODS, ComparePlan, LocationsPlan, PipelinesPlan, ScalePlan
from locft.study.records import StudyReport


def run_pipelines(words: argparse.Namespace, config: RunConfig) -> int:
    """Train depth-first and breadth-first by several methods."""
    from locft.study.pipelines import study_pipelines

    plan = PipelinesPlan(
        methods=tuple(words.method or ALL_METHODS),
        batches=words.batches,
        seeds=words.seeds,
        num_edits=words.num_edits,
        num_passages=words.passages,
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


def run_compare(words: argparse.Namespace, config: RunConfig) -> int:
    """Compare methods or settings on the same edits."""
    from locft.study.compare import compare

    plan = ComparePlan(
        methods=tuple(words.method or ALL_METHODS),
        seeds=words.seeds,
        num_edits=words.num_edits,
        num_passages=words.passages,
        capability=words.capability,
        capability_data=None if words.capability_data is None else Path(words.capability_data),
        capability_limit=words.capability_limit,
    )
    found = compare(words.model, words.edits, words.output, plan, config, say=say)
    return _hand_over(words, *found)


def run_scale(words: argparse.Namespace, config: RunConfig) -> int:
    """Train more and more edits."""
    from locft.study.scale import study_scale

    plan = ScalePlan(sizes=words.sizes, num_scored=words.scored, num_passages=words.passages)
    found = study_scale(words.model, words.edits, words.output, plan, config, say=say)
    return _hand_over(words, *found)


def _hand_over(words: argparse.Namespace, report: StudyReport, page: Page) -> int:
    if words.json:
        print_json(asdict(report))
    else:
        show_page(make_console(), page)
    say(f"wrote {Path(words.output) / 'report.html'}, with report.md and report.json")
    return 0
