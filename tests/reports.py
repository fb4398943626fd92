"""Reports made on the spot, with one text of a user in every field that may hold one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from locft.evaluation.metrics import mean, mean_per_token, paired_difference, share
from locft.patch.format import Patch, PatchTensor, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.report.schema import (
    SCHEMA_VERSION,
    AugmentedInfo,
    ComparedRun,
    ComparisonReport,
    Cost,
    Difference,
    DriftInfo,
    EditReport,
    EditsInfo,
    EndpointInfo,
    Environment,
    EvalCost,
    EvalReport,
    HeldBackInfo,
    JudgeInfo,
    LocationInfo,
    MatrixInfo,
    ModelInfo,
    PlannedCost,
    PreservedInfo,
    Protocol,
    ProtocolScores,
    TextInfo,
    TrainingInfo,
)
from locft.report.words import PROTOCOL_SCORES
from locft.tensorfile import hash_tensor
from locft.types import (
    KINDS,
    AnswerRecord,
    CapabilityScores,
    Cause,
    Epoch,
    Figure,
    Kind,
    MovedPassage,
    PassageDrift,
    Scores,
    TaskScores,
)

Report = TypeVar("Report", EditReport, EvalReport)

BY_DEFINITION = "by definition: the unedited model is compared with itself"
NONE = Figure(value=None, num=0, reason="the edits hold none")
SCORES = Scores(
    reliability=Figure(value=0.97, num=200, low=0.936, high=0.986),
    generalization=Figure(value=0.5, num=60, low=0.377, high=0.623),
    locality=Figure(value=0.75, num=40, low=0.598, high=0.858),
    drift=Figure(value=0.0421, num=40, low=0.0391, high=0.0455),
)
CHANGE = Figure(value=0.97, num=200, low=0.94, high=0.99)
BEFORE = Scores(
    reliability=Figure(value=0.0, num=200, low=0.0, high=0.019),
    generalization=NONE,
    locality=Figure(value=1.0, num=40, low=1.0, high=1.0, reason=BY_DEFINITION),
    drift=Figure(value=0.0, num=40, low=0.0, high=0.0, reason=BY_DEFINITION),
)


def make_report(text: str = "plain", **changes: Any) -> EditReport:
    """Make the report of an edit run."""
    report = EditReport(
        schema_version=SCHEMA_VERSION,
        model=model_info(text),
        edits=edits_info(text),
        location=LocationInfo(
            name="2.mlp.down",
            layer=2,
            module="mlp.down",
            matrices=(MatrixInfo(tensor=text, shape=(32, 64), dtype="BF16", change=0.125),),
            num_parameters=2048,
        ),
        settings={"lr": "auto", "drift_text": text, "revision": None, "stop_loss": 0.01},
        resolved={"lr": 0.002, "device": text},
        training=TrainingInfo(
            lr=0.002,
            batch_size=20,
            epochs_at_most=25,
            epochs=3,
            steps=30,
            final_loss=0.0091,
            stopped_early=True,
            fifths=(40, 40, 40, 40, 40),
            course=(
                Epoch(epoch=1, steps=10, loss=4.5, success=(0.1, 0.12, 0.09, 0.11, 0.08)),
                Epoch(epoch=2, steps=10, loss=0.5, success=(0.7, 0.72, 0.69, 0.71, 0.68)),
                Epoch(epoch=3, steps=10, loss=0.0091, success=(1.0, 0.99, 1.0, 1.0, 0.98)),
            ),
            text=TextInfo(text=text, sha256="6" * 64, num_tokens=16_384),
            preserved=PreservedInfo(
                strength=3.0, num_tokens=16_384, left_plain=(text,), num_anchors=200, max_drift=0.05
            ),
            held_back=HeldBackInfo(
                num_tokens=1024, drift=0.049, wanted=0.06, num_shrunk=2, is_met=False
            ),
            augmented=AugmentedInfo(
                num_asked=800, num_by_kind={text: 790}, num_left_out=3, num_scored=0
            ),
        ),
        protocol=protocol_info(text),
        scores_before=BEFORE,
        scores=SCORES,
        change={"reliability": CHANGE},
        causes={"reliability": {"wrong fact": 5, "empty": 1}},
        drift=_drift(text),
        cost=Cost(
            seconds_per_edit=0.25,
            load_s=1.0,
            prepare_s=5.0,
            cache_s=10.0,
            train_s=40.0,
            eval_s=125.0,
            wall_s=3725.0,
            peak_memory_bytes=1_500_000_000,
        ),
        plan=PlannedCost(
            load_s=2.0,
            cache_s=11.0,
            train_s=60.0,
            eval_s=130.0,
            wall_s=203.0,
            peak_memory_bytes=1_600_000_000,
            epochs_at_most=25,
        ),
        patch_bytes=9_400,
        environment=_environment(text),
    )
    return dataclasses.replace(report, **changes)


def fit_report(
    report: Report, answers: Sequence[AnswerRecord], passages: Sequence[PassageDrift]
) -> Report:
    """Give a report the scores and the drift that its answers and passages come to."""
    drift = report.drift
    if drift is not None:
        drift = dataclasses.replace(
            drift,
            overall=_mean_drift(passages),
            by_kind={
                kind: _mean_drift([one for one in passages if one.kind == kind])
                for kind in dict.fromkeys(one.kind for one in passages)
            },
        )
    if isinstance(report, EditReport):
        assert drift is not None
        before, after, change = _fit_scores(
            report.protocol,
            dict(vars(report.scores_before)),
            dict(vars(report.scores)),
            report.change,
            answers,
        )
        own = [
            one.kind
            for one in answers
            if (one.protocol, one.context) == (report.protocol.name, report.protocol.context)
        ]
        counts = {kind: own.count(kind) for kind in KINDS}
        edits = dataclasses.replace(
            report.edits,
            num_edits=counts["reliability"],
            num_rephrases=counts["generalization"],
            num_locality=counts["locality"],
        )
        return dataclasses.replace(
            report,
            edits=edits,
            scores_before=Scores(**before),
            scores=Scores(**{**after, "drift": drift.overall}),
            change=change,
            drift=drift,
        )
    protocols, contexts = (
        {name: _fit_protocol(one, answers) for name, one in found.items()}
        for found in (report.protocols, report.contexts)
    )
    return dataclasses.replace(report, protocols=protocols, contexts=contexts, drift=drift)


def make_whole(run: Path, edits_sha256: str = "e" * 64) -> Path:
    """Give the folder of an edit run what it holds beside what was measured, its patch included."""
    for name in ("edits.jsonl", "train.jsonl"):
        (run / name).write_text("{}\n")
    data = bytes(16)
    tensor = PatchTensor(
        dtype="F32",
        shape=(2, 2),
        data=data,
        old_sha256="0" * 64,
        new_sha256=hash_tensor("F32", (2, 2), data),
    )
    manifest = PatchManifest(
        locft_version="0.1.0",
        model=PatchModel(id="plain", revision=None),
        location=PatchLocation(name="2.mlp.down", layer=2, module="mlp.down", num_parameters=4),
        dtype="F32",
        settings={},
        num_edits=2,
        edits_sha256=edits_sha256,
    )
    write_patch(Patch(tensors={"w": tensor}, manifest=manifest), run / "patch")
    return run


def _fit_protocol(scores: ProtocolScores, answers: Sequence[AnswerRecord]) -> ProtocolScores:
    before, after, change = _fit_scores(
        scores.protocol, scores.before or {}, scores.after, scores.change or {}, answers
    )
    return dataclasses.replace(
        scores,
        before=None if scores.before is None else before,
        after=after,
        change=None if scores.change is None else change,
    )


def _mean(values: Sequence[float]) -> Figure:
    is_share = values and set(values) <= {0.0, 1.0}
    return share(round(sum(values)), len(values)) if is_share else mean(values)


def _fit_scores(
    protocol: Protocol,
    before: Mapping[str, Figure],
    after: Mapping[str, Figure],
    change: Mapping[str, Figure],
    answers: Sequence[AnswerRecord],
) -> tuple[dict[str, Figure], dict[str, Figure], dict[str, Figure]]:
    early, late, moved = dict(before), dict(after), dict(change)
    for kind, name in zip(KINDS, PROTOCOL_SCORES[protocol.name], strict=True):
        rule = (protocol.name, protocol.context, kind)
        found = [one for one in answers if (one.protocol, one.context, one.kind) == rule]
        pairs = [
            (one.score_before, one.score_after)
            for one in found
            if one.score_before is not None and one.score_after is not None
        ]
        if name in before:
            early[name] = _mean([was for was, _ in pairs])
            late[name] = _mean([now for _, now in pairs])
        elif name in after:
            late[name] = _mean([one.score_after for one in found if one.score_after is not None])
        if name in change:
            moved[name] = paired_difference([was for was, _ in pairs], [now for _, now in pairs])
    return early, late, moved


def _mean_drift(passages: Sequence[PassageDrift]) -> Figure:
    return mean_per_token(
        [one.drift * one.num_tokens for one in passages], [one.num_tokens for one in passages]
    )


def make_evaluation(text: str = "plain", **changes: Any) -> EvalReport:
    """Make the report of an evaluation that measured everything."""
    scores = ProtocolScores(
        protocol=protocol_info(text),
        before={"reliability": BEFORE.reliability, "generalization": SCORES.generalization},
        after={"reliability": SCORES.reliability, "generalization": SCORES.generalization},
        change={"reliability": CHANGE},
    )
    wild = dataclasses.replace(scores, protocol=dataclasses.replace(scores.protocol, name="wild"))
    in_chat = dataclasses.replace(scores, protocol=dataclasses.replace(scores.protocol, context="chat"))
    task = TaskScores(
        metric="acc",
        num_items=60,
        before=SCORES.locality,
        after=SCORES.generalization,
        change=Figure(value=-0.25, num=60, low=-0.35, high=-0.15),
        version="1",
        document_sha256="c" * 64,
        settings={"num_fewshot": 0, "template": text},
    )
    report = EvalReport(
        schema_version=SCHEMA_VERSION,
        model=model_info(text),
        endpoint=None,
        patch=text,
        base=None,
        edits=edits_info(text),
        protocols={"locft": scores, "wild": wild},
        contexts={"raw": scores, "chat": in_chat},
        judge=JudgeInfo(model=text, agreement=SCORES.locality, num_without_verdict=2),
        causes={"reliability": {"wrong fact": 5, "empty": 1}},
        drift=_drift(text),
        capability=CapabilityScores(
            tasks={text: task, "piqa": task},
            before=SCORES.locality,
            after=SCORES.generalization,
            change=task.change,
            lm_eval="0.4.13",
            limit=60,
            data=text,
        ),
        cost=EvalCost(load_s=1.0, eval_s=2.0, wall_s=3.5, peak_memory_bytes=1_000_000),
        parts_s={"load": 1.0, "locft, raw": 2.0},
        environment=_environment(text),
    )
    return dataclasses.replace(report, **changes)


def make_compared(name: str, text: str = "plain", **changes: Any) -> ComparedRun:
    """Make an edit run among others."""
    run = ComparedRun(
        name=name,
        folder=text,
        kind="edit",
        subject=text,
        location="2.mlp.down",
        num_edits=200,
        edits_sha256="e" * 64,
        protocol="locft",
        context="raw",
        scores=dict(vars(SCORES)),
        reason=None,
        seconds_per_edit=0.25,
        wall_s=3725.0,
        peak_memory_bytes=1_500_000_000,
        patch_bytes=9_400,
        settings={"lr": text, "revision": None},
    )
    return dataclasses.replace(run, **changes)


def make_comparison(text: str = "plain", **changes: Any) -> ComparisonReport:
    """Make a comparison of two runs, the second of which carries further and harms more."""
    further = {
        **vars(SCORES),
        "generalization": Figure(value=0.7, num=60, low=0.575, high=0.801),
        "drift": Figure(value=0.0633, num=40, low=0.0601, high=0.0668),
    }
    changed = {
        "reliability": Figure(value=-0.01, num=200, low=-0.035, high=0.015),
        "generalization": Figure(value=0.2, num=60, low=0.083, high=0.317),
        "locality": Figure(value=None, num=0, reason="the runs have no item in common"),
        "drift": Figure(value=0.0212, num=40, low=0.0187, high=0.0239),
    }
    differences = tuple(
        Difference(
            run="B",
            score=name,
            figure=figure,
            num_items=getattr(SCORES, name).num,
            num_items_first=getattr(SCORES, name).num,
        )
        for name, figure in changed.items()
    )
    report = ComparisonReport(
        schema_version=SCHEMA_VERSION,
        runs=(make_compared("A", text), make_compared("B", text, scores=further)),
        differences=differences,
    )
    return dataclasses.replace(report, **changes)


def make_endpoint(text: str) -> EndpointInfo:
    """Make the description of a server."""
    return EndpointInfo(url=text, model=text)


def make_answer(text: str = "plain", *, is_right: bool = False, **changes: Any) -> AnswerRecord:
    """Make an answer to an edit's own prompt."""
    cause: Cause | None = None if is_right else "wrong fact"
    kind: Kind = "reliability"
    record = AnswerRecord(
        protocol="locft",
        context="raw",
        edit=text,
        kind=kind,
        prompt=text,
        expected=text,
        before=text,
        after=text,
        score_before=0.0,
        score_after=float(is_right),
        cause=cause,
    )
    return dataclasses.replace(record, **changes)


def make_answers(text: str = "plain") -> tuple[AnswerRecord, ...]:
    """Make answers of every kind, right ones and wrong ones."""
    kinds: tuple[Kind, ...] = ("reliability", "generalization", "locality")
    return tuple(
        # Locality that is agreement on nothing is told apart.
        make_answer(
            text, is_right=is_right, kind=kind, expected=f"so {text}" if kind == "locality" else text
        )
        for kind in kinds
        for is_right in (True, False)
    )


def make_passages(text: str = "plain") -> tuple[PassageDrift, ...]:
    """Make the drift of two passages."""
    return (
        PassageDrift(passage=1, kind=text, num_tokens=100, drift=0.05),
        PassageDrift(passage=2, kind=text, num_tokens=300, drift=0.02),
    )


def model_info(text: str) -> ModelInfo:
    return ModelInfo(
        id=text,
        revision=None,
        architecture="LlamaForCausalLM",
        num_parameters=40_000,
        num_layers=3,
        dtype="float32",
    )


def edits_info(text: str) -> EditsInfo:
    return EditsInfo(
        file=text,
        format="locft",
        num_edits=200,
        num_rephrases=60,
        num_locality=40,
        num_dropped=1,
        num_warnings=2,
        file_sha256=None,
        sha256="e" * 64,
    )


def protocol_info(text: str) -> Protocol:
    return Protocol(
        name="locft",
        rule=f"Match answers: {text}.",
        context="raw",
        max_new_tokens=32,
        stop=(".", "\n"),
        match="normalised exact match",
        meanings={},
    )


def _drift(text: str) -> DriftInfo:
    return DriftInfo(
        text=text,
        text_sha256="d" * 64,
        num_tokens=22_655,
        overall=SCORES.drift,
        by_kind={text: SCORES.drift},
        most_moved=(MovedPassage(passage=7, kind=text, num_tokens=41, drift=0.31, text=text),),
    )


def _environment(text: str) -> Environment:
    return Environment(
        locft="0.1.0",
        python="3.11.7",
        torch="2.13.0",
        transformers="5.23.0",
        platform=text,
        device=text,
        num_threads=1,
    )
