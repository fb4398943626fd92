import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import tiny_llama_config
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, GPT2Config, PreTrainedConfig, T5Config

from locft.errors import ModelError
from locft.model.load import choose_device, choose_dtype, context_tokens, load_model, load_tokenizer
from locft.model.resolve import resolve_checkpoint

SaveModel = Callable[..., Path]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder, to be spoilt."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    return copy


def edit_json(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, **changes}), encoding="utf-8")


def refusal(name: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_model_is_loaded_frozen_and_in_evaluation_mode(model_folder: Path) -> None:
    loaded = load_model(str(model_folder))
    stored = load_file(model_folder / "model.safetensors")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    parameters = dict(loaded.model.named_parameters())
    assert stored.keys() == parameters.keys()  # the tied head is no parameter of its own
    assert all(torch.equal(parameters[name], value) for name, value in stored.items())
    assert loaded.checkpoint.folder == model_folder
    assert loaded.checkpoint.name == str(model_folder)
    assert loaded.checkpoint.revision is None
    assert loaded.tokenizer.eos_token_id == 0


def test_a_sharded_checkpoint_gives_the_same_weights(save_model: SaveModel, model_folder: Path) -> None:
    sharded = save_model(tiny_llama_config(), max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    ours = load_model(str(sharded)).model.state_dict()
    for name, value in load_model(str(model_folder)).model.state_dict().items():
        assert torch.equal(ours[name], value), name


def test_a_missing_shard_is_refused_by_its_name(save_model: SaveModel) -> None:
    sharded = save_model(tiny_llama_config(), max_shard_size="40KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.float16, "bfloat16", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_weights_run_in_the_dtype_chosen(
    save_model: SaveModel, stored: torch.dtype, asked: str, expected: torch.dtype
) -> None:
    folder = save_model(tiny_llama_config(), dtype=stored)
    file = load_file(folder / "model.safetensors")
    assert {value.dtype for value in file.values()} == {stored}
    model = load_model(str(folder), dtype=asked).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected, name
        assert torch.equal(parameter, file[name].to(expected)), name


def test_an_older_checkpoint_says_torch_dtype(save_model: SaveModel) -> None:
    folder = save_model(tiny_llama_config(), dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_model(str(folder)).model.dtype == torch.bfloat16


def test_a_checkpoint_that_names_no_dtype_runs_in_float32() -> None:
    assert choose_dtype("auto", "None") == torch.float32


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "holds no config.json" in message
    assert str(tmp_path) in message


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    message = refusal(file)
    assert "is a file, and a model is a folder" in message
    assert "convert" not in message


def test_a_gguf_file_is_to_be_converted_first(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_1.gguf"
    file.touch()
    assert f"locft convert {file} -o DIR" in refusal(file)


def test_pickled_weights_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "safetensors" in refusal(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "gguf"])
def test_quantised_weights_are_refused_by_their_method(method: str, folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method})
    message = refusal(folder)
    assert f"its weights are quantised ({method})" in message
    assert "original checkpoint" in message


def test_an_encoder_decoder_is_refused(folder: Path) -> None:
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    config.save_pretrained(folder)
    assert "it is an encoder-decoder, not a decoder" in refusal(folder)


def test_a_model_of_images_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="vit")
    assert "transformers does not load its kind (vit) as a causal language model" in refusal(folder)


def test_weights_missing_from_the_files_are_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.input_layernorm.weight"):
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(folder)
    assert "lack 2 of its weights (model.layers.1.mlp.down_proj.weight is one)" in message


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=96)
    assert "cannot be loaded" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"model_type": "llama", "quantization_config": 4}', "\xff"]
)
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refusal(folder)
    if "quantization" not in text:
        with pytest.raises(ModelError):
            load_tokenizer(str(folder))


def test_an_unknown_model_type_is_refused_by_its_name(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="wondernet")
    assert "wondernet" in refusal(folder)
    with pytest.raises(ModelError, match="wondernet"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("model_type", ["wondernet", "llama"])
def test_code_in_the_models_folder_is_never_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    marker = tmp_path / "was_run"
    code = f"open({str(marker)!r}, 'w').close()\n"
    code += "from transformers import LlamaConfig as WonderConfig, LlamaForCausalLM as WonderModel\n"
    (folder / "wonder.py").write_text(code, encoding="utf-8")
    edit_json(
        folder / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "wonder.WonderConfig", "AutoModelForCausalLM": "wonder.WonderModel"},
    )
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "wonder.WonderTokenizer"]}
    )
    # A known model type has its code in transformers: that is run instead, or the model refused.
    if model_type == "wondernet":
        refusal(folder)
    for load in (load_model, load_tokenizer):
        try:
            load(str(folder))
        except ModelError:
            continue
    assert not marker.exists()


def test_a_tokenizer_without_character_offsets_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    message = refusal(folder)
    assert "ByT5Tokenizer" in message
    assert "no character offsets" in message


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_tokenizer_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    assert "the tokenizer of model" in refusal(folder)


def test_a_tokenizer_is_loaded_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tokenizer, config = load_tokenizer(str(folder))
    assert tokenizer.eos_token_id == 0
    assert config.model_type == "llama"


def test_cpu_is_always_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_prefers_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "tpu", "", "cpu:x", "cuda:x", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError) as caught:
        choose_device(name)
    assert f"device {name!r} is not available" in str(caught.value)
    assert str(caught.value).endswith("sees cpu here")


@pytest.mark.parametrize(("name", "there"), [("cuda:1", True), ("cuda:2", False), ("cuda:x", False)])
def test_a_numbered_gpu_must_be_one_of_those_there(
    monkeypatch: pytest.MonkeyPatch, name: str, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if there:
        assert choose_device(name) == torch.device(name)
    else:
        with pytest.raises(ModelError, match=f"device '{name}' is not available"):
            choose_device(name)


def test_a_missing_device_is_found_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fail_download(monkeypatch, AssertionError("nothing is to be fetched"))
    assert "device 'cuda' is not available" in refusal("owner/name", device="cuda")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (tiny_llama_config(), 128),
        (GPT2Config(n_positions=77), 77),
        (PreTrainedConfig(), None),
        (PreTrainedConfig.from_dict({"max_seq_len": 0, "seq_length": 64}), 64),
    ],
)
def test_the_context_is_what_the_configuration_says(config: PreTrainedConfig, limit: int | None) -> None:
    assert context_tokens(config) == limit


def fail_download(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


# Of what library the Hub client takes its responses differs between its releases.
RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("no network\nand more"), "the Hugging Face Hub cannot be reached"),
        (HFValidationError("Repo id must be in the form\nof a name"), "no Hugging Face id either"),
        (
            RepositoryNotFoundError("404 Not Found\nfor url", response=RESPONSE),
            "cannot be fetched: 404 Not Found",
        ),
        (TimeoutError(), "cannot be fetched: TimeoutError"),
    ],
)
def test_an_id_that_cannot_be_fetched_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    fail_download(monkeypatch, error)
    message = refusal("owner/name")
    assert reason in message
    assert "'owner/name'" in message


def test_a_path_that_is_not_there_is_no_id_either() -> None:
    # The Hub client itself refuses it, before any network.
    assert "it is no folder here" in refusal("./no/such/folder")


@pytest.mark.parametrize("weights", [True, False])
def test_a_download_takes_safetensors_and_no_code(
    monkeypatch: pytest.MonkeyPatch, folder: Path, weights: bool
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_checkpoint("owner/name", revision="v1", weights=weights)
    assert found.folder == folder
    assert found.revision == folder.name  # a snapshot's folder is named by its commit
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert ("model*.safetensors" in asked["allow_patterns"]) is weights
    assert {"*.json", "*.jinja", "*.model"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_a_download_without_config_is_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A repository of GGUF files, say.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "config.json" in refusal("owner/name")
