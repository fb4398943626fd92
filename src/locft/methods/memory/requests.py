"""What an editor is asked for: prompts with the place of their subject, alone and behind other text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locft.data.encode import Codec, Encoded
from locft.errors import EditsError
from locft.types import Edit

_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt with its target, and where its subject ends.

    Attributes:
        ids: Token ids of prompt, target and end-of-sequence token.
        target_start: Index of the first target token.
        lookup: Index of the subject's last token.
    """

    ids: tuple[int, ...]
    target_start: int
    lookup: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """An edit as editors see it.

    Attributes:
        encoded: Prompt, target and end-of-sequence token.
        bare: The same with the place of the subject.
        prefixed: The prompt behind each context template.
        essence: "SUBJECT is a", without a target; what it predicts at the subject is to stay.
    """

    encoded: Encoded
    bare: Row
    prefixed: tuple[Row, ...]
    essence: Row


def refuse_without_subject(edits: Sequence[Edit]) -> None:
    """Refuse edits that do not name a subject which their prompt holds.

    Raises:
        EditsError: There are such; the message names the first of them.
    """
    lacking = [edit for edit in edits if not edit.subject or edit.subject not in edit.prompt]
    if lacking:
        named = ", ".join(edit.source or f"edit {edit.id}" for edit in lacking[:_NUM_NAMED])
        more = f", and {len(lacking) - _NUM_NAMED:,} more" if len(lacking) > _NUM_NAMED else ""
        raise EditsError(
            f"{len(lacking):,} of {len(edits):,} edits name no `subject` that stands in their prompt, "
            f"as this method needs: {named}{more}. Name it in the file, or choose another method"
        )


def make_request(codec: Codec, edit: Edit, prefixes: Sequence[str]) -> Request:
    """Encode an edit, alone and behind each context template.

    Args:
        codec: How prompts become token ids.
        edit: The edit; its prompt holds its subject.
        prefixes: What stands before the prompt, from `write_prefixes`.

    Returns:
        The request.
    """
    return Request(
        encoded=codec.encode(edit),
        bare=_row(codec, edit, ""),
        prefixed=tuple(_row(codec, edit, f"{prefix}. ") for prefix in prefixes),
        essence=_essence(codec, edit),
    )


def _row(codec: Codec, edit: Edit, before: str) -> Row:
    """Encode an edit's prompt behind a text; the first place of the subject in the prompt counts."""
    subject = edit.subject or ""
    end = len(before) + edit.prompt.index(subject) + len(subject)
    encoded = codec.encode(
        Edit(id=edit.id, prompt=before + edit.prompt, target=edit.target, source=edit.source)
    )
    lookup = codec.last_token_within(before + edit.prompt, edit.target, end)
    return Row(ids=encoded.ids, target_start=encoded.target_start, lookup=lookup)


def _essence(codec: Codec, edit: Edit) -> Row:
    subject = edit.subject or ""
    ids = codec.prompt_ids(f"{subject} is a")
    lookup = codec.last_token_within(f"{subject} is a", "", len(subject))
    return Row(ids=ids, target_start=len(ids), lookup=lookup)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Rows of unequal length, padded on the right. R rows of at most T tokens.

    Attributes:
        ids: (R, T) token ids; what pads is never looked at.
        lookup: (R,) where each row's subject ends.
    """

    ids: Tensor
    lookup: Tensor


def pad(rows: Sequence[Row], device: torch.device) -> Padded:
    """Lay rows side by side."""
    longest = max(len(row.ids) for row in rows)
    return Padded(
        ids=torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows], device=device),
        lookup=torch.tensor([row.lookup for row in rows], device=device),
    )
