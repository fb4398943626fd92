"""Gets ready what a run is trained on, and what it is to keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from locft.config import parse_augment, parse_preserve
from locft.data.encode import Encoded
from locft.evaluation.subject import Subject
from locft.model.location import Location
from locft.model.split import Split
from locft.recipe.anchoring import prepare_anchors
from locft.recipe.augmentation import Examples, prepare_examples
from locft.recipe.ordinary import OrdinaryText, gather_ordinary_text
from locft.recipe.preservation import Preservation, prepare_preservation
from locft.recipe.rephrasing import Rephraser
from locft.report.schema import PreservedInfo, TextInfo
from locft.train.cache import PrefixCache, build_cache
from locft.types import Edit


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run asks for beside its edits; the settings of the same names.

    Attributes:
        preserve: What training keeps as it is.
        augment: What further examples each edit gets.
        max_drift: The most that drift may come to.
        neutral_text: A file of ordinary text; None for the model's own.
        rephraser: Who writes other wordings.
        seed: Names what is drawn at random.
    """

    preserve: str = "none"
    augment: str = "none"
    max_drift: float | None = None
    neutral_text: str | None = None
    rephraser: Rephraser = "model"
    seed: int = 0

    @property
    def needs_text(self) -> bool:
        """Whether ordinary text is needed."""
        kept, added = parse_preserve(self.preserve), parse_augment(self.augment)
        return kept.covariance is not None or added.prefixes > 0 or self.max_drift is not None


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run is trained on, and what it is to keep.

    Attributes:
        examples: The edits, and what they are augmented by.
        preservation: What updates are multiplied by.
        anchors: Texts that are held to what the unedited model makes of them.
        held_back: Ordinary text that drift is limited on.
        text: The ordinary text that was taken; None where none was needed.
        preserved: What is kept; None for nothing.
    """

    examples: Examples
    preservation: Preservation
    anchors: tuple[Encoded, ...]
    held_back: tuple[Encoded, ...]
    text: TextInfo | None
    preserved: PreservedInfo | None


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The same as cached states."""

    examples: PrefixCache
    anchors: PrefixCache | None
    held_back: PrefixCache | None


def prepare_material(
    subject: Subject,
    location: Location | None,
    edits: Sequence[Edit],
    wanted: Wanted,
    say: Callable[[str], None] = lambda _: None,
) -> Material:
    """Get ready what a run is trained on, and what it is to keep.

    Args:
        subject: The model, unedited.
        location: What will be tuned; None where a method has no location.
        edits: The edits.
        wanted: What is asked for beside them.
        say: Called with a line where there is less than was asked for.

    Returns:
        The material.

    Raises:
        InputError: The text cannot be read, or is too short for the width of a matrix.
        ConfigError: No parameter of the location has an input that can be seen.
    """
    text: OrdinaryText | None = None
    held_back: tuple[tuple[int, ...], ...] = ()
    if wanted.needs_text:
        whole = gather_ordinary_text(subject, location, wanted.neutral_text)
        text, held_back = whole.hold_back() if wanted.max_drift is not None else (whole, ())
    preservation = prepare_preservation(subject, location, wanted.preserve, text)
    num_anchors = parse_preserve(wanted.preserve).anchors
    anchors = prepare_anchors(subject, edits, num_anchors)
    keeps = preservation.preconditioners or num_anchors or wanted.max_drift is not None
    return Material(
        examples=prepare_examples(
            subject,
            edits,
            parse_augment(wanted.augment),
            text,
            wanted.seed,
            wanted.rephraser,
            say,
        ),
        preservation=preservation,
        anchors=anchors,
        held_back=tuple(Encoded(ids=ids, target_start=1) for ids in held_back),
        text=None
        if text is None
        else TextInfo(text=text.name, sha256=text.sha256, num_tokens=text.num_tokens),
        preserved=PreservedInfo(
            strength=preservation.strength,
            num_tokens=0 if preservation.strength is None or text is None else text.num_tokens,
            left_plain=preservation.left_plain,
            num_anchors=len(anchors),
            max_drift=wanted.max_drift,
        )
        if keeps
        else None,
    )


def cache_material(
    split: Split,
    material: Material,
    folder: Path | None = None,
    cache_of: Callable[[Split, Sequence[Encoded]], PrefixCache] | None = None,
    *,
    at_once: bool = False,
) -> Caches:
    """Run the frozen layers over all of it, once.

    Args:
        split: The model, split at the tuned layer.
        material: What it is trained on and keeps.
        folder: Where files may lie; the system's folder for temporary files if None.
        cache_of: Gives the cached states of the examples; made here if None.
        at_once: Whether all target tokens are predicted from the prompt's last token.

    Returns:
        The cached states.

    Raises:
        InputError: The disk has no room for them.
    """
    examples = material.examples.encoded

    def cached(some: Sequence[Encoded]) -> PrefixCache | None:
        return build_cache(split, some, folder) if some else None

    return Caches(
        examples=build_cache(split, examples, folder, at_once=at_once)
        if cache_of is None
        else cache_of(split, examples),
        anchors=cached(material.anchors),
        held_back=cached(material.held_back),
    )
