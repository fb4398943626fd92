"""What a model takes for ordinary: texts that it writes by itself, and what they make of its inputs.

Both are computed once and kept in the user's cache, under a hash of all that decides them: every weight
of the model, the text, and the matrices. So what is found there was made of just these.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from locft.model.demo import cache_folder
from locft.model.moments import InputMoment, measure_moments
from locft.model.sampling import sample_sequences
from locft.model.split import Split
from locft.publish import write_file

_VERSION = 1  # of what is kept
_THREADS = 4
_DIGEST = "digest"


def fingerprint(model: PreTrainedModel) -> str:
    """Hash every weight of a model: its name, dtype, shape and bytes.

    Returns:
        A SHA-256, as hex digits.
    """
    return _hash(model.state_dict()).hex()


def written_texts(
    model: PreTrainedModel,
    model_sha256: str,
    starts: Sequence[Sequence[int]],
    length: int,
    seed: int,
) -> list[tuple[int, ...]]:
    """Give texts that the model itself writes, as `sample_sequences` does, once and for all.

    Args:
        model: The model, unedited.
        model_sha256: Its `fingerprint`.
        starts: What texts begin with.
        length: How many tokens each comes to.
        seed: Names what is drawn.

    Returns:
        The texts' token ids.
    """
    decides = {
        "model": model_sha256,
        "starts": [list(one) for one in starts],
        "length": length,
        "seed": seed,
    }

    def make() -> dict[str, Tensor]:
        return {"ids": torch.tensor(sample_sequences(model, starts, length, seed))}

    return [tuple(row) for row in _kept("texts", decides, make)["ids"].tolist()]


def known_moments(
    split: Split, model_sha256: str, names: Sequence[str], sequences: Sequence[Sequence[int]]
) -> dict[str, InputMoment]:
    """Measure what enters some matrices, as `measure_moments` does, once and for all.

    Args:
        split: The model, unedited, split at their layer.
        model_sha256: Its `fingerprint`.
        names: The parameters.
        sequences: Token ids.

    Returns:
        The moments, by parameter; matrices that receive the same share one.
    """
    decides = {
        "model": model_sha256,
        "names": sorted(names),
        "text": hashlib.sha256(json.dumps([list(one) for one in sequences]).encode()).hexdigest(),
    }

    def make() -> dict[str, Tensor]:
        found = measure_moments(split, names, sequences)
        numbers = {id(moment): number for number, moment in enumerate(found.values())}
        tensors = {f"moment {numbers[id(one)]}": one.matrix for one in found.values()}
        counts = {f"tokens {numbers[id(one)]}": torch.tensor(one.num_tokens) for one in found.values()}
        of_names = {f"of {name}": torch.tensor(numbers[id(one)]) for name, one in found.items()}
        return {**tensors, **counts, **of_names}

    kept = _kept("moments", decides, make)
    moments = {
        int(key.removeprefix("moment ")): InputMoment(
            matrix=matrix, num_tokens=int(kept[key.replace("moment", "tokens", 1)])
        )
        for key, matrix in kept.items()
        if key.startswith("moment ")
    }
    return {name: moments[int(kept[f"of {name}"])] for name in names if f"of {name}" in kept}


def _kept(
    kind: str, decides: Mapping[str, object], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Find tensors in the cache by what decides them; make and keep them where they are not there."""
    text = json.dumps({"version": _VERSION, "kind": kind, **decides}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    path = cache_folder() / "neutral" / name
    found = _read(path)
    if found is not None:
        return found
    made = make()
    with suppress(OSError):  # a cache that cannot be written to only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({**made, _DIGEST: _digest(made)}))
    return made


def _read(path: Path) -> dict[str, Tensor] | None:
    """Read tensors that were kept; None if they are not there, or not what was written."""
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    expected = tensors.pop(_DIGEST, None)
    is_whole = expected is not None and torch.equal(expected, _digest(tensors))
    return tensors if is_whole else None


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """Hash tensors as `_hash` does: (32,) bytes."""
    return torch.frombuffer(bytearray(_hash(tensors)), dtype=torch.uint8)


def _hash(tensors: Mapping[str, Tensor]) -> bytes:
    """Hash tensors by their names, dtypes, shapes and bytes."""

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, value = item
        head = json.dumps([name, str(value.dtype), list(value.shape)]).encode()
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return hashlib.sha256(head + hashlib.sha256(flat.numpy().data).digest()).digest()

    with ThreadPoolExecutor(_THREADS) as pool:  # hashing leaves the interpreter to others
        return hashlib.sha256(b"".join(pool.map(digest, sorted(tensors.items())))).digest()
