"""Where a model's files are: the embedded model, a local folder, or a download from the Hub.

Imports neither torch nor transformers, so that commands that only copy files start at once.
"""

from dataclasses import dataclass
from pathlib import Path

from locft.errors import ModelError, first_line
from locft.model.demo import DEMO_NAME, demo_model_folder

_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


@dataclass(frozen=True, kw_only=True)
class CheckpointFolder:
    """A checkpoint on disk.

    Attributes:
        name: What the user called it: ``demo``, a path or a Hugging Face id.
        folder: The folder that holds its files.
        revision: The commit, for a Hugging Face id.
    """

    name: str
    folder: Path
    revision: str | None = None


def resolve_checkpoint(
    name: str, *, revision: str | None = None, weights: bool = True
) -> CheckpointFolder:
    """Find a model's files, fetching them if they are not here yet.

    Args:
        name: ``demo``, a local folder, or a Hugging Face id.
        revision: Branch, tag or commit of a Hugging Face id.
        weights: Whether the weights are needed, or only configuration and tokenizer.

    Returns:
        The folder with the files.

    Raises:
        ModelError: There is no such model here or on the Hub.
    """
    if name == DEMO_NAME:
        return CheckpointFolder(name=name, folder=demo_model_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"folder {name!r} is no model: it holds no config.json (expected a Hugging Face "
                "model folder with config.json, tokenizer files and *.safetensors)"
            )
        return CheckpointFolder(name=name, folder=folder)
    if folder.is_file():
        advice = f"; convert it first: locft convert {name} -o DIR" if name.endswith(".gguf") else ""
        raise ModelError(f"{name!r} is a file, and a model is a folder or a Hugging Face id{advice}")
    return _download(name, revision, weights)


def _download(name: str, revision: str | None, weights: bool) -> CheckpointFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = [*_CONFIG_FILES, *(["model*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(
            f"no model {name!r}: it is no folder here, and no Hugging Face id either (expected "
            "OWNER/NAME)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {name!r} is no folder here, and the Hugging Face Hub cannot be reached: check the "
            "name and the network, or give the path of a model folder"
        ) from error
    except Exception as error:  # the Hub client raises errors of several libraries
        raise ModelError(f"model {name!r} cannot be fetched: {first_line(error)}") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name!r} is no model: it holds no config.json")
    return CheckpointFolder(name=name, folder=folder, revision=folder.name)
