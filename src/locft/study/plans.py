"""What each study compares, and by default (no torch)."""

from dataclasses import dataclass
from pathlib import Path

ALL_METHODS = ("ft-m", "lora", "adalora", "full")


@dataclass(frozen=True, kw_only=True)
class LocationsPlan:
    """Which locations to compare.

    Attributes:
        layers: Layers, from 0; every third if there are none.
        modules: Modules of a layer.
        batch_size: Edits per step.
        seed: Names the order of the edits.
        num_edits: How many edits to take.
        num_passages: How many passages of neutral text to measure drift on.
    """

    layers: tuple[int, ...] = ()
    modules: tuple[str, ...] = ("entire", "attn", "mlp", "mlp.up", "mlp.down")
    batch_size: int = 20
    seed: int = 0
    num_edits: int = 200
    num_passages: int = 8


@dataclass(frozen=True, kw_only=True)
class ScalePlan:
    """How many edits to compare.

    Attributes:
        sizes: Numbers of edits, from the first of the file on.
        num_scored: How many of them are scored, from the first on, so that all sizes are scored alike.
        num_passages: How many passages of neutral text to measure drift on.
    """

    sizes: tuple[int, ...] = (100, 300, 1000, 3000, 10000)
    num_scored: int = 300
    num_passages: int = 12


@dataclass(frozen=True, kw_only=True)
class PipelinesPlan:
    """What to compare.

    Attributes:
        methods: Methods with their settings, as `parse_specs` reads them.
        batches: Edits per step, breadth-first; depth-first takes one at a time.
        seeds: Each names an order of the edits, and is a trial of its own.
        num_edits: How many edits to take.
        num_passages: How many passages of neutral text to measure drift on.
    """

    methods: tuple[str, ...] = ALL_METHODS
    batches: tuple[int, ...] = (1, 20)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_edits: int = 100
    num_passages: int = 12


@dataclass(frozen=True, kw_only=True)
class ComparePlan:
    """Which methods to compare.

    Attributes:
        methods: Methods with their settings, as `parse_specs` reads them.
        seeds: Each names an order of the edits, and is a trial of its own.
        num_edits: How many edits to take, from the first on; all if None.
        num_passages: How many passages of neutral text to measure drift on.
        capability: Tasks of lm-eval to measure capability on.
        capability_data: A folder with their items; None fetches them.
        capability_limit: How many items of each task to ask at most.
    """

    methods: tuple[str, ...] = ALL_METHODS
    seeds: tuple[int, ...] = (0,)
    num_edits: int | None = None
    num_passages: int = 12
    capability: tuple[str, ...] = ()
    capability_data: Path | None = None
    capability_limit: int | None = None
