"""What a run is recorded with: model, edits, location, versions, hardware, time and memory."""

import platform
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from locft.data.gather import GatheredEdits
from locft.evaluation import protocols
from locft.evaluation.drift import Drift, NeutralText
from locft.evaluation.scoring import compare
from locft.model.load import LoadedModel, dtype_name
from locft.model.location import Location
from locft.model.structure import find_layers
from locft.patch.format import Patch
from locft.report.schema import (
    DriftInfo,
    EditsInfo,
    Environment,
    ExpertsInfo,
    LocationInfo,
    MatrixInfo,
    ModelInfo,
    Protocol,
    ProtocolScores,
)
from locft.types import KINDS, AnswerRecord, Kind


class Stopwatch:
    """Adds up the seconds spent on each part of a run."""

    def __init__(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.began = self.marked = time.perf_counter()
        self.spent: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Count the time since the last lap towards a part."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # its work is only queued until then
        now = time.perf_counter()
        self.spent[part] = self.spent.get(part, 0.0) + now - self.marked
        self.marked = now

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began


def describe_model(loaded: LoadedModel) -> ModelInfo:
    """Describe a loaded model."""
    return ModelInfo(
        id=loaded.checkpoint.name,
        revision=loaded.checkpoint.revision,
        architecture=type(loaded.model).__name__,
        num_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        num_layers=len(find_layers(loaded.model)),
        dtype=dtype_name(loaded.model.dtype),
    )


def describe_edits(gathered: GatheredEdits, num_warnings: int) -> EditsInfo:
    """Describe the edits of a run."""
    return EditsInfo(
        file=None if gathered.path is None else str(gathered.path),
        format=gathered.format,
        num_edits=len(gathered.edits),
        num_rephrases=sum(len(edit.rephrases) for edit in gathered.edits),
        num_locality=sum(len(edit.locality) for edit in gathered.edits),
        num_dropped=gathered.num_dropped,
        num_warnings=num_warnings,
        file_sha256=gathered.file_sha256,
        sha256=gathered.sha256,
    )


def describe_location(
    location: Location,
    patch: Patch,
    changes: Sequence[tuple[str, float]],
    experts: ExpertsInfo | None = None,
) -> LocationInfo:
    """Describe what was tuned, and how far it moved."""
    return LocationInfo(
        name=location.name,
        layer=location.layer,
        module=location.module,
        matrices=tuple(
            MatrixInfo(
                tensor=name,
                shape=patch.tensors[name].shape,
                dtype=patch.tensors[name].dtype,
                change=change,
            )
            for name, change in changes
        ),
        num_parameters=location.num_parameters,
        part=location.part_in_words,
        experts=experts,
    )


def describe_drift(text: NeutralText, drift: Drift) -> DriftInfo:
    """Describe the drift and the text that it was measured on."""
    return DriftInfo(
        text=text.name,
        text_sha256=text.sha256,
        num_tokens=drift.num_tokens,
        overall=drift.overall,
        by_kind=drift.by_kind,
        most_moved=drift.most_moved,
    )


def describe_protocol(protocol: protocols.Protocol, context: str) -> Protocol:
    """Describe how scores were taken."""
    answers = protocol.max_new_tokens is not None
    return Protocol(
        name=protocol.name,
        rule=protocol.rule,
        context=context,
        max_new_tokens=protocol.max_new_tokens,
        stop=(".", "\n", "end of sequence") if answers else (),
        match=protocol.match,
        meanings=dict(protocol.meanings),
    )


def describe_scores(
    protocol: protocols.Protocol,
    context: str,
    records: Sequence[AnswerRecord],
    kinds: Sequence[Kind] = KINDS,
    *,
    has_unedited: bool,
) -> ProtocolScores:
    """Draw the figures of one protocol in one context from its records, by the names of its scores."""
    figures = {
        protocol.score_names[kind]: compare(
            records,
            kind,
            is_share=protocol.is_share,
            # What it answers to a locality prompt is what is expected of the edited one.
            is_own_standard=kind == "locality" and not protocol.needs_old,
        )
        for kind in kinds
    }
    before = {name: found.before for name, found in figures.items() if found.before is not None}
    change = {name: found.change for name, found in figures.items() if found.change is not None}
    return ProtocolScores(
        protocol=describe_protocol(protocol, context),
        before=before if has_unedited else None,
        after={name: found.after for name, found in figures.items()},
        change=change if has_unedited else None,
    )


def count_causes(records: Iterable[AnswerRecord]) -> dict[str, dict[str, int]]:
    """Count the causes of failures, by kind of item."""
    counts: dict[str, dict[str, int]] = {}
    for record in records:
        if record.cause is not None:
            of_kind = counts.setdefault(record.kind, {})
            of_kind[record.cause] = of_kind.get(record.cause, 0) + 1
    return counts


def describe_environment(device: torch.device) -> Environment:
    """Describe versions, device and threads."""
    return Environment(
        locft=version("locft"),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        platform=platform.platform(),
        device=_device_name(device),
        num_threads=torch.get_num_threads(),
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was in use: of the device on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss, which a process inherits from the one that started it.
    peak = process_bytes("VmHWM")
    if peak is not None:
        return peak
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_bytes(field: str) -> int | None:
    """Read a size from Linux's account of this process; None where the system does not tell.

    Args:
        field: ``VmHWM``, the most memory that was resident, or another field of /proc/self/status.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return models[0] if models else platform.processor() or platform.machine()
    return device.type
