"""Tiny models of families are tried out, or refused with the reason."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from locft.checkpoint import read_checkpoint
from locft.cli.main import main
from locft.errors import ModelError
from locft.families import check, suite
from locft.families.check import CheckFailedError, check_family
from locft.families.page import describe_families
from locft.families.records import Families, Verdict, read_families
from locft.families.suite import check_families
from locft.families.tiny import VOCABULARY, family_names, tiny_config, tiny_model
from locft.model.load import load_model
from locft.model.names import FAMILIES
from locft.model.refusals import REFUSED, why_quantised, why_refused
from locft.model.structure import find_layers, find_parameters
from locft.report.markdown import draw_markdown

DENSE = ("entire", "attn", "mlp", "mlp.up", "mlp.down")
# One for each way in which families differ: fused and interleaved projections, transposed matrices,
# matrices in the layer itself, soft-caps, sliding windows, latent attention, recurrence, experts.
MODULES = {
    "bert": DENSE,
    "deepseek_v3": ("entire", "attn", "mlp", "mlp.shared.up", "mlp.shared.down"),
    "gemma2": DENSE,
    "glm4": DENSE,
    "gpt2": DENSE,
    "gpt_oss": ("entire", "attn", "mlp", "mlp.experts.up", "mlp.experts.down"),
    "llama4": ("entire", "attn", "mlp", "mlp.shared.up", "mlp.shared.down"),
    "mamba": ("entire",),
    "mistral": DENSE,
    "opt": DENSE,
    "qwen3": DENSE,
    "qwen2_moe": ("entire", "attn", "mlp", "mlp.shared.up", "mlp.shared.down"),
}


@pytest.mark.parametrize("family", MODULES)
def test_a_family_is_edited_right_at_each_of_its_modules(family: str) -> None:
    found = check_family(family)
    assert (found.status, found.reason) == ("supported", None)
    expected = MODULES[family]
    assert found.modules[: len(expected)] == expected


@pytest.mark.parametrize("family", [*REFUSED, "bart", "marian"])
def test_what_cannot_be_edited_is_told_from_the_configuration(family: str) -> None:
    found = check_family(family)
    assert (found.status, found.by) == ("refused", "configuration")
    assert found.reason


def test_refused_families_are_those_that_transformers_knows() -> None:
    assert REFUSED.keys() <= set(family_names())


def test_an_encoder_is_refused_unless_its_configuration_says_decoder() -> None:
    reason = why_refused({"model_type": "bert"})
    assert reason is not None
    assert "is_decoder" in reason
    assert why_refused({"model_type": "bert", "is_decoder": True}) is None


def test_a_refused_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "zaya", "num_hidden_layers": 2}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        ModelError, match=r"is refused: its layers hand on more than .*; `locft families` lists"
    ):
        load_model(str(tmp_path))


def test_a_family_that_transformers_cannot_build_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise ImportError("it needs another library")

    monkeypatch.setattr("locft.families.tiny.AutoModelForCausalLM.from_config", fail)
    assert check_family("llama") == Verdict(
        name="llama",
        class_name="LlamaForCausalLM",
        status="refused",
        reason="transformers cannot build a tiny one: it needs another library",
        by="trial",
    )


def test_tiny_models_are_tiny_and_the_same_each_time() -> None:
    models = [tiny_model(tiny_config("qwen3")) for _ in range(2)]
    assert sum(parameter.numel() for parameter in models[0].parameters()) < 100_000
    assert models[0].config.vocab_size == VOCABULARY
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_an_edit_that_reaches_beyond_its_location_fails_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train: Any = getattr(check, "train_breadth_first")  # noqa: B009

    def spill(split: Any, *rest: Any) -> Any:
        trained = train(split, *rest)
        with torch.no_grad():
            split.model.get_input_embeddings().weight[0] += 1
        return trained

    monkeypatch.setattr(check, "train_breadth_first", spill)
    with pytest.raises(CheckFailedError, match=r"a training step changed .*embed_tokens.* frozen"):
        check_family("llama")


def test_a_tail_that_differs_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    full = check._full_logits

    def off(model: Any) -> Tensor:
        return full(model) * 1.001

    monkeypatch.setattr(check, "_full_logits", off)
    with pytest.raises(CheckFailedError, match="the tail on cached states differs"):
        check_family("llama")


@pytest.mark.parametrize(("family", "router"), [("nemotron_h", "mixer.gate"), ("jetmoe", "router")])
def test_routers_outside_of_mlps_stay_frozen_too(family: str, router: str) -> None:
    model = tiny_model(tiny_config(family))
    layers = find_layers(model)
    names = [name for layer in range(len(layers)) for name in find_parameters(layers, layer, "entire")]
    assert any(router in name for name, _ in model.named_parameters())
    assert not any(router in name for name in names)


def test_up_and_down_must_be_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gate and up are in one matrix, called like a plain up projection.
    monkeypatch.delitem(FAMILIES, "moshi")
    with pytest.raises(CheckFailedError, match="up and down differ in size, 2,048 and 1,024 numbers"):
        check_family("moshi")


def test_the_wrong_half_of_a_fused_projection_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve: Any = getattr(check, "resolve_location")  # noqa: B009

    def swap(model: Any, name: str) -> Any:
        found = resolve(model, name)
        parts = {key: (slice(0, part[0].start),) for key, part in found.parts.items()}
        return replace(found, parts=parts)

    monkeypatch.setattr(check, "resolve_location", swap)
    with pytest.raises(CheckFailedError, match="does not act as a projection"):
        check_family("phi3")


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_5", "qwen3_5_moe"])
def test_the_decoder_within_a_model_that_sees_is_edited(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    seeing = AutoModelForImageTextToText.from_config(tiny_config(family), dtype=torch.float32)
    seeing.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    model.requires_grad_(False)
    module = "mlp.experts.down" if family in ("llama4", "qwen3_5_moe") else "mlp.down"
    check._check_module(family, model, tmp_path / "model", module, tmp_path / "edited")
    entries = read_checkpoint(tmp_path / "edited")
    assert any("vision" in name or "visual" in name for name in entries)


def test_a_model_without_a_causal_language_model_is_refused_by_its_kind() -> None:
    reason = why_refused({"model_type": "llava"})
    assert reason is not None
    assert "transformers does not load its kind (llava) as a causal language model" in reason


def test_a_model_type_that_is_no_text_is_left_to_transformers() -> None:
    assert why_refused({"model_type": ["llama"]}) is None


def test_quantised_text_within_a_model_that_sees_is_refused() -> None:
    config = {"model_type": "gemma3", "text_config": {"quantization_config": {"load_in_8bit": True}}}
    reason = why_quantised(config)
    assert reason is not None
    assert "quantised (bitsandbytes)" in reason


def test_the_verdicts_that_come_with_locft_are_those_in_the_docs() -> None:
    found = read_families()
    statuses = Counter(one.status for one in found.families)
    assert statuses["supported"] >= 145
    assert statuses["failed"] == 0
    assert {one.by for one in found.families if one.status == "refused"} == {"configuration"}
    page = Path(__file__).parents[3] / "docs/families.md"
    assert page.read_text() == draw_markdown(describe_families(found))


def test_families_are_tried_in_processes_and_named_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_families(["qwen3", "bart", "bart"], num_processes=1)
    assert [(one.name, one.status) for one in found.families] == [
        ("bart", "refused"),
        ("qwen3", "supported"),
    ]
    assert found.transformers == version("transformers")


def test_what_goes_wrong_in_a_trial_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Verdict:
        raise CheckFailedError("an edit went\nwrong")

    monkeypatch.setattr(check, "check_family", fail)
    assert suite._check("llama") == Verdict(
        name="llama",
        class_name="LlamaForCausalLM",
        status="failed",
        reason="CheckFailedError: an edit went wrong",
    )


def test_the_command_prints_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "qwen3_moe", "zaya"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 supported, 1 refused of 2 families." in shown
    assert "mlp.expert[N].down" in shown
    assert main(["families", "llama", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["families"] == [
        {
            "name": "llama",
            "class_name": "LlamaForCausalLM",
            "status": "supported",
            "modules": list(DENSE),
            "reason": None,
            "by": None,
        }
    ]


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_an_unknown_family_is_told_with_those_that_come_close(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["families", "lama", *flags]) == 2
    assert "family 'lama' is unknown" in (said := capsys.readouterr().err)
    assert "did you mean llama" in said


def test_a_family_that_fails_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(names: Sequence[str]) -> Families:
        wrong = Verdict(name=names[0], class_name="A", status="failed", reason="it changes too much")
        return Families(transformers="5", families=(wrong,))

    monkeypatch.setattr(suite, "check_families", find)
    assert main(["families", "llama", "--check"]) == 1
    shown = capsys.readouterr().out
    assert "0 supported, 1 failed of 1 family." in shown
    assert "it changes too much" in shown
