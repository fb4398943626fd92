"""What is known of families: the verdicts that come with locft (no torch)."""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from typing import Literal

import msgspec

from locft.errors import InputError

Status = Literal["supported", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a family can be edited.

    Attributes:
        name: The `model_type` of its configurations.
        class_name: The class of its models.
        status: ``supported``; ``refused``; or ``failed`` where nothing refuses it, and an edit of a tiny
            model goes wrong all the same.
        modules: Which modules of a middle layer of a tiny model can be tuned.
        reason: Why it is refused, or what goes wrong; None if it is supported.
        by: What refuses it: its ``configuration``, before weights are loaded, or a ``trial``.
    """

    name: str
    class_name: str
    status: Status
    modules: tuple[str, ...] = ()
    reason: str | None = None
    by: Literal["configuration", "trial"] | None = None


@dataclass(frozen=True, kw_only=True)
class Families:
    """Verdicts on families.

    Attributes:
        transformers: The version of transformers that they were tried with.
        families: The verdicts, by name.
    """

    transformers: str
    families: tuple[Verdict, ...]

    def choose(self, names: tuple[str, ...]) -> "Families":
        """Keep some of the families; all where none are named.

        Raises:
            InputError: There is no such family.
        """
        known = {one.name: one for one in self.families}
        for name in names:
            if name not in known:
                raise InputError(unknown_family(name, tuple(known)))
        chosen = tuple(known[name] for name in sorted(set(names))) or self.families
        return Families(transformers=self.transformers, families=chosen)


def unknown_family(name: str, known: tuple[str, ...]) -> str:
    """Say that there is no such family, and which come close."""
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}" if near else "locft families names those there are"
    return f"family {name!r} is unknown: expected the model_type of a configuration; {hint}"


def read_families() -> Families:
    """Read the verdicts that come with locft."""
    data = resources.files("locft").joinpath("resources/families.json").read_bytes()
    return msgspec.json.decode(data, type=Families)
