"""How likely a model finds given texts after prompts: one teacher-forced pass, nothing generated."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from locft.data.encode import Codec, Encoded
from locft.errors import EvaluationError, brief
from locft.model.split import logits_at
from locft.progress import progress

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model makes of a text after a prompt.

    Attributes:
        num_tokens: The text's tokens, without an end of sequence.
        num_right: Those that are the likeliest at their place, the true ones standing before them.
        nll: Their negative log-likelihood in all, in nats.
    """

    num_tokens: int
    num_right: int
    nll: float

    @property
    def share_right(self) -> float | None:
        """Share of the tokens that are the likeliest; None if there is no token."""
        return self.num_right / self.num_tokens if self.num_tokens else None

    @property
    def mean_nll(self) -> float | None:
        """Negative log-likelihood per token, in nats; None if there is no token."""
        return self.nll / self.num_tokens if self.num_tokens else None


def score_continuations(
    model: PreTrainedModel,
    codec: Codec,
    pairs: Iterable[Pair],
    *,
    batch_size: int,
    label: str,
    as_generated: bool = False,
) -> dict[Pair, Continuation]:
    """Score texts after prompts, teacher-forced.

    Prompt and text are joined and tokenised as an edit's are, and a token that reaches beyond the
    prompt's last character belongs to the text. Where two tokens are equally likely, the one of the
    lower id counts as the likeliest; batches of another size round otherwise, which only such ties,
    or all but ties, can notice.

    Args:
        model: The model, in evaluation mode.
        codec: How prompts become token ids.
        pairs: Each a prompt and the text after it; repeated ones are scored once.
        batch_size: How many to score at a time.
        label: What the progress bar says.
        as_generated: Whether the texts are what a model generated there, to be taken as they are.

    Returns:
        What the model makes of each; a text that gives no token has none.

    Raises:
        EvaluationError: A likelihood is not finite.
    """
    found: dict[Pair, Continuation] = {}
    encoded = {
        pair: codec.encode_pair(*pair, as_generated=as_generated) for pair in dict.fromkeys(pairs)
    }
    for pair, example in encoded.items():
        # What nothing stands before is not predicted.
        if not example.num_targets or not example.target_start:
            found[pair] = Continuation(num_tokens=0, num_right=0, nll=0.0)
    order = sorted(encoded.keys() - found.keys(), key=lambda pair: (-len(encoded[pair].ids), pair))
    with progress(label, len(order), "texts") as step:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found |= _score_batch(model, batch, [encoded[pair] for pair in batch])
            step(len(batch))
    return found


def _score_batch(
    model: PreTrainedModel, pairs: Sequence[Pair], examples: Sequence[Encoded]
) -> dict[Pair, Continuation]:
    # Padding on the right, behind what is scored: a position depends on those before it only.
    longest = max(len(example.ids) for example in examples)
    padded = [[*example.ids, *[0] * (longest - len(example.ids))] for example in examples]
    mask = [[int(i < len(example.ids)) for i in range(longest)] for example in examples]
    places = [
        (row, column - 1)
        for row, example in enumerate(examples)
        for column in range(example.target_start, len(example.ids))
    ]
    device = model.device
    rows, columns = torch.tensor(places, device=device).unbind(dim=1)
    ids = torch.tensor(padded, device=device)
    with torch.no_grad():
        logits = logits_at(
            model, rows, columns, input_ids=ids, attention_mask=torch.tensor(mask, device=device)
        )
        wanted = ids[rows, columns + 1]
        right = logits.argmax(dim=1).eq(wanted).tolist()
        nlls = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").tolist()
    found: dict[Pair, Continuation] = {}
    for pair, example in zip(pairs, examples, strict=True):
        num = example.num_targets
        nll = math.fsum(nlls[:num])
        if not math.isfinite(nll):
            raise EvaluationError(
                f"the likelihood of {brief(pair[1])} after {brief(pair[0])} is not finite"
            )
        found[pair] = Continuation(num_tokens=num, num_right=sum(right[:num]), nll=nll)
        right, nlls = right[num:], nlls[num:]
    return found
