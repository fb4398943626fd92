"""The protocols that scores are taken by, each one small file; `PROTOCOLS` names them all."""

from collections.abc import Iterable, Sequence

from locft.errors import ConfigError, InputError
from locft.evaluation.protocols import likelihood, locft, teacher_forced, wild
from locft.evaluation.protocols.base import Measurable, Protocol
from locft.types import Edit

__all__ = [
    "PROTOCOLS",
    "Measurable",
    "Protocol",
    "choose_protocols",
    "locft",
    "refuse_without_old",
    "wild",
]

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (locft.PROTOCOL, wild.PROTOCOL, teacher_forced.PROTOCOL, likelihood.PROTOCOL)
}

_NUM_SHOWN = 3


def choose_protocols(names: Sequence[str]) -> tuple[Protocol, ...]:
    """Find protocols by their names.

    Raises:
        ConfigError: A name is unknown or given twice, or there is none.
    """
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names or len(set(names)) < len(names):
        what = f"unknown protocol {unknown[0]!r}" if unknown else "protocols are named once each"
        raise ConfigError(f"{what}: expected one or more of {', '.join(PROTOCOLS)}")
    return tuple(PROTOCOLS[name] for name in names)


def refuse_without_old(protocol: Protocol, edits: Iterable[Edit]) -> None:
    """Refuse edits without an old answer, where a protocol compares with it.

    Raises:
        InputError: Some edits have none.
    """
    missing = [edit for edit in edits if not edit.old]
    if protocol.needs_old and missing:
        places = ", ".join(f"{edit.id} ({edit.source})" for edit in missing[:_NUM_SHOWN])
        raise InputError(
            f"protocol {protocol.name} compares the target with the answer before the edit, and "
            f"{len(missing):,} of the edits have no `old`: {places}. Add it, or choose another protocol"
        )
