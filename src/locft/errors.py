"""Every error that locft raises on purpose, in one tree.

::

    LocftError                  exit status 1
    ├── InputError              exit status 2: something the user gave cannot be used
    │   ├── ConfigError         a setting: unknown key, wrong type, out of range
    │   ├── EditsError          an edits file; the message lists its problems
    │   ├── LocationError       a tuning location that this model does not have
    │   ├── ModelError          a model that cannot be loaded, or is refused with its reason
    │   ├── PatchError          a patch that is damaged, or does not belong to this model
    │   ├── RunError            a run folder that is not whole, damaged, or of another version
    │   └── MissingExtraError   an optional dependency is not installed
    ├── TrainingError           training cannot go on (a non-finite loss, gradient or weight)
    └── EvaluationError         a model cannot be measured (its predictions are not finite)

A message says what is wrong, where, what was expected, and what to do about it.
"""

import json
import re
import reprlib

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 200  # so that the names of tensors and files stay whole
_MAX_BRIEF_CHARS = 300

_NOT_ASCII_TEXT = re.compile("[^ -~]")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's name if it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def brief(value: object) -> str:
    """Show a value from outside in a message: quoted and escaped, and shortened if it is long."""
    shown = _BRIEF.repr(value)
    return shown if len(shown) <= _MAX_BRIEF_CHARS else f"{shown[:_MAX_BRIEF_CHARS]}..."


def printable(text: str) -> str:
    """Escape what a terminal would act on or cannot show: control characters, half characters.

    Args:
        text: Any text.

    Returns:
        One line. The escapes are those of JSON, so that what is JSON stays the same JSON.
    """
    return _NOT_ASCII_TEXT.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]


class LocftError(Exception):
    """Base of all errors that locft raises on purpose."""

    exit_status = 1


class InputError(LocftError):
    """Something that the user gave cannot be used."""

    exit_status = 2


class ConfigError(InputError):
    """A setting is unknown, has the wrong type or is out of range."""


class EditsError(InputError):
    """An edits file cannot be used; the message lists its problems."""


class LocationError(InputError):
    """A tuning location does not exist in this model, or its name cannot be read."""


class ModelError(InputError):
    """A model cannot be loaded, or is refused with the reason."""


class PatchError(InputError):
    """A patch is damaged, or does not belong to this model."""


class RunError(InputError):
    """A run folder cannot be read: it is not whole, is damaged, or another version wrote it."""


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'locft[{extra}]'")


class TrainingError(LocftError):
    """Training cannot go on: a loss, gradient or weight is not finite."""


class EvaluationError(LocftError):
    """A model cannot be measured: its predictions are not finite."""
