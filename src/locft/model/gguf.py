"""Converts a GGUF file into an ordinary Hugging Face model folder, dequantised to float32."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from locft.errors import MissingExtraError, ModelError, first_line


def require_gguf() -> None:
    """Check that the optional packages are there before anything long begins.

    Raises:
        MissingExtraError: They are not.
    """
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise MissingExtraError("reading GGUF files", "gguf")


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file as config, tokenizer and safetensors files.

    Args:
        file: A GGUF file with a causal language model and its tokenizer.
        folder: An existing folder to write into; the caller stages it.

    Raises:
        MissingExtraError: The extra `gguf` is not installed.
        ModelError: The file cannot be read, or transformers does not know its architecture.
    """
    require_gguf()
    _check_magic(file)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # Releases that can keep GGUF weights quantised must be told not to; older ones never do.
    gguf_config = getattr(transformers, "GgufConfig", None)
    quantised: dict[str, Any] = {}
    if gguf_config is not None:
        quantised["quantization_config"] = gguf_config(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **arguments, **quantised
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
    except Exception as error:  # the readers raise errors of several libraries
        raise ModelError(f"{file} cannot be converted: {first_line(error)}") from error
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes its files readable by their owner only; take the mode that umask gave the rest.
    mode = (folder / "config.json").stat().st_mode
    for written in folder.glob("*.safetensors"):
        written.chmod(mode)


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"{file} is no GGUF file: it begins with {magic!r}, b'GGUF' was expected")
