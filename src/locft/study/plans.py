"""What each study compares, and by default (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
class PipelinesPlan:
    """What to compare.

    Attributes:
        methods: Names of methods.
        batches: Edits per step, breadth-first; depth-first takes one at a time.
        seeds: Each names an order of the edits, and is a trial of its own.
        num_edits: How many edits to take.
        num_passages: How many passages of neutral text to measure drift on.
        method_settings: Settings of methods, `lr` among them, by the method's name.
    """

    methods: tuple[str, ...] = ("ft-m", "lora", "adalora", "full")
    batches: tuple[int, ...] = (1, 20)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_edits: int = 100
    num_passages: int = 12
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
