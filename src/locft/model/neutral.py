"""What a model takes for ordinary: texts that it writes by itself, and what they make of its inputs.

Both are computed once and kept in the user's cache, under a hash of all that decides them: every weight
of the model, the text, and the matrices. So what is found there was made of just these.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from locft.model.split import split_model
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
    path = _path("texts", decides)
    found = _read(path)
    if found is None:
        found = {"ids": torch.tensor(sample_sequences(model, starts, length, seed))}
        _keep(path, found)
    return [tuple(row) for row in found["ids"].tolist()]


def known_moments(
    model: PreTrainedModel,
    model_sha256: str,
    groups: Sequence[tuple[int, Sequence[str]]],
    sequences: Sequence[Sequence[int]],
) -> dict[str, InputMoment]:
    """Measure what enters some matrices, as `measure_moments` does, once and for all.

    Args:
        model: The model, unedited.
        model_sha256: Its `fingerprint`.
        groups: A layer and names of its parameters, each. A group is kept by itself; those that are not
            known yet are measured together, in one pass over the text.
        sequences: Token ids.

    Returns:
        The moments, by parameter; matrices that receive the same share one.
    """
    text = hashlib.sha256(json.dumps([list(one) for one in sequences]).encode()).hexdigest()
    paths = [
        _path("moments", {"model": model_sha256, "names": sorted(names), "text": text})
        for _, names in groups
    ]
    known = [_read(path) for path in paths]
    missing = [number for number, found in enumerate(known) if found is None]
    if missing:
        split = split_model(model, max(groups[number][0] for number in missing))
        names = [name for number in missing for name in groups[number][1]]
        measured = measure_moments(split, names, sequences)
        for number in missing:
            own = {name: measured[name] for name in groups[number][1] if name in measured}
            known[number] = _as_tensors(own)
            _keep(paths[number], known[number] or {})
    moments = [_as_moments(found or {}) for found in known]
    return {
        name: of_group[name]
        for (_, names), of_group in zip(groups, moments, strict=True)
        for name in names
        if name in of_group
    }


def _as_tensors(moments: Mapping[str, InputMoment]) -> dict[str, Tensor]:
    """Turn moments into tensors by name, those that are shared once."""
    numbers: dict[int, int] = {}
    for one in moments.values():
        numbers.setdefault(id(one), len(numbers))
    tensors = {f"moment {numbers[id(one)]}": one.matrix for one in moments.values()}
    counts = {f"tokens {numbers[id(one)]}": torch.tensor(one.num_tokens) for one in moments.values()}
    of_names = {f"of {name}": torch.tensor(numbers[id(one)]) for name, one in moments.items()}
    return {**tensors, **counts, **of_names}


def _as_moments(tensors: Mapping[str, Tensor]) -> dict[str, InputMoment]:
    """Turn tensors back into the moments that they were made of."""
    moments = {
        int(key.removeprefix("moment ")): InputMoment(
            matrix=matrix, num_tokens=int(tensors[key.replace("moment", "tokens", 1)])
        )
        for key, matrix in tensors.items()
        if key.startswith("moment ")
    }
    return {
        key.removeprefix("of "): moments[int(number)]
        for key, number in tensors.items()
        if key.startswith("of ")
    }


def _path(kind: str, decides: Mapping[str, object]) -> Path:
    """Name the file that something is kept in, by what decides it."""
    text = json.dumps({"version": _VERSION, "kind": kind, **decides}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    return cache_folder() / "neutral" / name


def _keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors, if that is possible: a cache that cannot be written to only costs time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({**tensors, _DIGEST: _digest(tensors)}))


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
