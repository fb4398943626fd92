"""Drift: how far an edit moves the model's predictions on text that it has nothing to do with."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from locft.errors import EvaluationError, InputError
from locft.evaluation.metrics import mean_per_token
from locft.model.paging import give_back_freed
from locft.progress import progress
from locft.types import Figure, MovedPassage, PassageDrift

Forward = Callable[[Tensor], Tensor]
PACKAGED = "packaged"
TOKENS_PER_PASS = 1024  # bounds the logits: 200 MB over a vocabulary of 50,000
_LONGEST_WINDOW = 1024
_POSITIONS_AT_ONCE = 64
_NUM_MOST_MOVED = 5
_EXCERPT_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A piece of neutral text and its kind."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class NeutralText:
    """Text to measure drift on.

    Attributes:
        name: ``packaged``, or the file's path.
        sha256: Hash of the file.
        passages: Its passages.
    """

    name: str
    sha256: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far predictions moved.

    Attributes:
        overall: Mean KL(unedited || edited) in nats per token, over all passages.
        by_kind: The same for each kind of text.
        num_tokens: How many predictions were compared.
        passages: The same for each passage, in the order of the text.
        most_moved: The passages on which predictions moved most, the farthest first.
    """

    overall: Figure
    by_kind: dict[str, Figure]
    num_tokens: int
    passages: tuple[PassageDrift, ...] = ()
    most_moved: tuple[MovedPassage, ...] = ()


def read_neutral_text(path: str | None) -> NeutralText:
    """Read the text to measure drift on.

    Args:
        path: A ``.jsonl`` file of objects with `text` and, if known, `kind`; any other file is
            plain text with blank lines between passages. None is the text packaged with locft,
            written for it, of four kinds: encyclopedic, narrative, dialogue, code.

    Returns:
        The passages.

    Raises:
        InputError: The file cannot be read or holds no passage.
    """
    if path is None:
        data = resources.files("locft").joinpath("resources/neutral_text.jsonl").read_bytes()
        name, is_jsonl = PACKAGED, True
    else:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"drift text {path} cannot be read: {error.strerror}") from error
        name, is_jsonl = path, path.endswith(".jsonl")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"drift text {path} is not UTF-8: {error.reason}") from error
    if is_jsonl:
        passages = [
            _passage(line, f"{name}: line {number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        blocks = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))
        passages = [Passage(kind="text", text=block.strip()) for block in blocks if block.strip()]
    if not passages:
        raise InputError(f"drift text {path} holds no passage")
    return NeutralText(name=name, sha256=hashlib.sha256(data).hexdigest(), passages=tuple(passages))


def first_passages(text: NeutralText, num: int) -> NeutralText:
    """Take some passages of a text: the first of each kind, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for number, passage in enumerate(text.passages):
        seen[passage.kind] = rank = seen.get(passage.kind, 0) + 1
        ranked.append((rank, number))
    taken = sorted(number for _, number in sorted(ranked)[:num])
    return replace(text, passages=tuple(text.passages[number] for number in taken))


def measure_drift(
    unedited: Forward,
    edited: Forward,
    tokenizer: PreTrainedTokenizerBase,
    text: NeutralText,
    device: torch.device,
    max_context_tokens: int | None = None,
) -> Drift:
    """Measure KL(unedited || edited) of the next-token distributions, in nats per token.

    Args:
        unedited: The unedited model's forward, from ids (B, T) to logits (B, T, V).
        edited: The edited model's forward.
        tokenizer: The tokenizer of both.
        text: The passages; longer ones are cut into windows of 1,024 tokens, or of what the models
            take, each of which counts as a passage.
        device: Where the models are.
        max_context_tokens: How many tokens the models take, if they have a limit.

    Returns:
        The drift, overall and by kind of text.
    """
    encoded = cut_windows(tokenizer, text, max_context_tokens)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][1]))
    sums = [0.0] * len(encoded)
    give_back_freed()
    with progress("measuring drift", len(order), "passages") as step:
        while order:
            longest = len(encoded[order[-1]][1])
            taken = order[-max(1, TOKENS_PER_PASS // longest) :]
            del order[-len(taken) :]
            rows = [encoded[index][1] for index in taken]
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            with torch.no_grad():
                before, after = unedited(ids), edited(ids)
                for row, index in enumerate(taken):
                    num = len(rows[row]) - 1
                    sums[index] = kl_sum(before[row, :num], after[row, :num])
            del before, after  # before the next ones are there
            step(len(taken))
    counts = [len(ids) - 1 for _, ids in encoded]
    kinds: dict[str, list[int]] = {}
    for index, (kind, _) in enumerate(encoded):
        kinds.setdefault(kind, []).append(index)
    passages = tuple(
        PassageDrift(passage=number, kind=kind, num_tokens=num, drift=total / num)
        for number, ((kind, _), num, total) in enumerate(zip(encoded, counts, sums, strict=True), 1)
    )
    moved = [passage for passage in passages if passage.drift > 0]
    farthest = sorted(moved, key=lambda passage: -passage.drift)[:_NUM_MOST_MOVED]
    return Drift(
        overall=mean_per_token(sums, counts),
        by_kind={
            kind: mean_per_token([sums[i] for i in members], [counts[i] for i in members])
            for kind, members in sorted(kinds.items())
        },
        num_tokens=sum(counts),
        passages=passages,
        most_moved=tuple(
            MovedPassage(**asdict(passage), text=_excerpt(tokenizer, encoded[passage.passage - 1][1]))
            for passage in farthest
        ),
    )


def _excerpt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text if len(text) <= _EXCERPT_CHARS else f"{text[: _EXCERPT_CHARS - 1]}…"


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, text: NeutralText, max_context_tokens: int | None = None
) -> list[tuple[str, list[int]]]:
    """Encode neutral text as `measure_drift` does.

    Args:
        tokenizer: The tokenizer.
        text: The passages.
        max_context_tokens: How many tokens the models take, if they have a limit.

    Returns:
        For each window its kind and its token ids, two at least.
    """
    window = min(_LONGEST_WINDOW, max_context_tokens or _LONGEST_WINDOW)
    encoded: list[tuple[str, list[int]]] = []
    for passage in text.passages:
        ids = tokenizer(passage.text)["input_ids"]
        encoded += [(passage.kind, ids[i : i + window]) for i in range(0, len(ids), window)]
    # A first token alone predicts nothing that is there to be predicted.
    return [(kind, ids) for kind, ids in encoded if len(ids) > 1]


def kl_sum(before: Tensor, after: Tensor) -> float:
    """Sum KL(before || after) over positions; both (T, V) logits."""
    total = 0.0
    # Piece by piece: it takes five tensors as large as what is compared.
    for start in range(0, len(before), _POSITIONS_AT_ONCE):
        piece = slice(start, start + _POSITIONS_AT_ONCE)
        expected = torch.log_softmax(before[piece].float(), dim=-1)
        got = torch.log_softmax(after[piece].float(), dim=-1)
        total += torch.nn.functional.kl_div(got, expected, reduction="sum", log_target=True).item()
    if not math.isfinite(total):
        raise EvaluationError(
            "drift cannot be measured: the model's predictions on neutral text are not finite"
        )
    return max(0.0, total)  # rounding may leave a hair under zero


def _passage(line: str, place: str) -> Passage:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"drift text {place}: no JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'drift text {place}: expected an object with a "text"')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise InputError(f"drift text {place}: the text holds half of a character") from error
    return Passage(kind=str(record.get("kind", "text")), text=record["text"])
