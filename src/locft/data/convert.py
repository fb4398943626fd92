"""From a record of a known format to an `Edit`."""

import re
from collections.abc import Mapping

from locft.data.formats import Format
from locft.data.problems import Problem, kind_of
from locft.types import Edit

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def convert(form: Format, record: Mapping[str, object], where: str) -> tuple[Edit | None, list[Problem]]:
    """Turn a record into an edit.

    Args:
        form: The format of the file.
        record: The record's fields.
        where: Its place in the file.

    Returns:
        The edit, with an empty id if the record names none, and what is wrong with the record.
        There is no edit if there is an error.
    """
    reader = _Reader(record, where)
    prompt = reader.required(form.prompt)
    target = reader.required(form.target)
    subject = reader.optional(form.subject)
    olds = reader.many(form.old) if form.old else []
    old = olds[0] if olds else None
    if form.fills_subject and "{}" in prompt:
        if subject is None:
            reader.fail("missing-field", f"`{form.subject}` is missing, but the prompt holds {{}}")
        else:
            prompt = prompt.replace("{}", subject)
    if form.strips_answers:
        target = target.strip()
        old = old.strip() if old else None
    edit = Edit(
        id="-".join(part for path in form.id if (part := reader.label(path)) is not None),
        prompt=prompt,
        target=target,
        subject=subject,
        rephrases=tuple(text for path in form.rephrases for text in reader.many(path)),
        locality=tuple(reader.many(form.locality)) if form.locality else (),
        train_rephrases=tuple(reader.many(form.train_rephrases)) if form.train_rephrases else (),
        train_locality=tuple(reader.many(form.train_locality)) if form.train_locality else (),
        old=old,
        source=where,
    )
    failed = any(problem.level == "error" for problem in reader.problems)
    return None if failed else edit, reader.problems


class _Reader:
    """Reads the parts of one record, and collects what is wrong with them."""

    def __init__(self, record: Mapping[str, object], where: str) -> None:
        self._record = record
        self._where = where
        self.problems: list[Problem] = []

    def fail(self, code: str, message: str) -> None:
        self.problems.append(Problem("error", code, self._where, message))

    def required(self, path: str) -> str:
        """Read a text that must be there; an empty one is returned only after a problem."""
        num_before = len(self.problems)
        text = self.optional(path)
        if text is None:
            if len(self.problems) == num_before:
                present = path.split(".")[0] in self._record
                code, state = ("empty-field", "empty") if present else ("missing-field", "missing")
                self.fail(code, f"`{path}` is {state}, expected a string with something in it")
            return ""
        if control := _CONTROL.search(text):
            message = f"`{path}` holds the control character U+{ord(control.group()):04X}"
            self.problems.append(Problem("warning", "control-character", self._where, message))
        return text

    def optional(self, path: str) -> str | None:
        """Read a text that may be missing, null or empty."""
        value = self._value(path)
        if isinstance(value, list) and len(value) == 1:
            [value] = value
        return self._text(value, path)

    def label(self, path: str) -> str | None:
        """Read a text or a whole number."""
        value = self._value(path)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(value, path)

    def many(self, path: str) -> list[str]:
        """Read all texts at a path, entering lists on the way.

        A list of texts may stand for a list of objects: prompts with answers come without the
        answers too.
        """
        first, *keys = path.split(".")
        texts: list[str] = []
        # A stack of our own: a record may be nested as deeply as the JSON parser allows.
        pending = [(self._record.get(first), 0)]
        while pending:
            value, depth = pending.pop()
            if isinstance(value, list):
                pending.extend((item, depth) for item in reversed(value))
            elif isinstance(value, dict) and depth < len(keys):
                key = keys[depth]
                items = value.values() if key == "*" else [value.get(key)]
                pending.extend((item, depth + 1) for item in reversed(list(items)))
            elif 0 < depth < len(keys):
                self.fail("wrong-type", f"`{path}` leads through {kind_of(value)}, not an object")
            elif (text := self._text(value, path, "holds", "strings only")) is not None:
                texts.append(text)
        return texts

    def _value(self, path: str) -> object:
        value: object = self._record
        for key in path.split("."):
            if value is None:
                return None
            if not isinstance(value, Mapping):
                self.fail("wrong-type", f"`{path}` leads through {kind_of(value)}, not an object")
                return None
            value = value.get(key)
        return value

    def _text(
        self, value: object, path: str, verb: str = "is", expected: str = "a string"
    ) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            message = f"`{path}` {verb} {kind_of(value)}, expected {expected}"
            if isinstance(value, int | float):
                message += "; put it in quotes"
            self.fail("wrong-type", message)
            return None
        if _SURROGATE.search(value):
            self.fail("lone-surrogate", f"`{path}` holds a lone surrogate, which is no character")
            return None
        return value if value.strip() else None
