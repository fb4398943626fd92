"""Says what stands in a list of families (no torch)."""

from collections import Counter

from locft.families.records import Families, Verdict
from locft.report.page import Block, Page, Section, Table, Text
from locft.report.words import counted


def describe_families(found: Families) -> Page:
    """Describe verdicts on families.

    Args:
        found: The verdicts.

    Returns:
        The page.
    """
    numbers = Counter(one.status for one in found.families)
    sections = {
        "Supported": _supported(found),
        "Failed": _reasons(found, "failed"),
        "Refused": _reasons(found, "refused"),
    }
    return Page(
        title=f"Families of models, by the model_type of their configurations (transformers "
        f"{found.transformers})",
        verdict=", ".join(
            f"{numbers[status]:,} {status}"
            for status in ("supported", "refused", "failed")
            if numbers[status] or status == "supported"
        )
        + f" of {counted(len(found.families), 'family', 'families')}.",
        tiles=(),
        sections=tuple(
            Section(title=title, blocks=blocks) for title, blocks in sections.items() if blocks
        ),
    )


def _supported(found: Families) -> tuple[Block, ...]:
    rows = tuple(
        (one.name, one.class_name, ", ".join(one.modules))
        for one in found.families
        if one.status == "supported"
    )
    if not rows:
        return ()
    return (
        Text(
            "A tiny model of random weights is edited right at each of these modules of a middle layer: "
            "the tail on cached states gives the logits of the full forward, a training step changes "
            "nothing else, and the patched model, loaded again, gives the edited logits. Other layers "
            "may have other modules. mlp.expert[N] stands for any expert."
        ),
        Table(columns=("family", "class", "modules"), rows=rows),
    )


def _reasons(found: Families, status: str) -> tuple[Block, ...]:
    rows = tuple(
        (one.name, one.class_name, one.reason or "", _when(one))
        for one in found.families
        if one.status == status
    )
    return (Table(columns=("family", "class", "reason", "told"), rows=rows),) if rows else ()


def _when(one: Verdict) -> str:
    return "before weights are loaded" if one.by == "configuration" else "by a trial"
