"""Says what a report looks like to machines: JSON Schema, drawn from the classes and their docstrings.

python -m locft.report.json_schema > docs/report.schema.json
"""

import inspect
import json
import re
import sys
from typing import Any

import msgspec

from locft.report.schema import SCHEMA_VERSION, ComparisonReport, EditReport, EvalReport

REPORTS = (EditReport, EvalReport, ComparisonReport)


def describe_reports() -> dict[str, Any]:
    """Give the JSON Schema (draft 2020-12) of every `report.json`."""
    _, parts = msgspec.json.schema_components(REPORTS, ref_template="#/$defs/{name}")
    classes = {kind.__name__: kind for kind in _classes(REPORTS)}
    for name, part in parts.items():
        summary, attributes = _documented(classes[name])
        part["description"] = summary
        part["additionalProperties"] = False
        part["required"] = list(part["properties"])
        for field, schema in part["properties"].items():
            schema["description"] = attributes[field]
            schema.pop("default", None)
    for kind in REPORTS:
        parts[kind.__name__]["properties"]["schema_version"] |= {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"report.json of locft, version {SCHEMA_VERSION}",
        "oneOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in REPORTS],
        "$defs": dict(sorted(parts.items())),
    }


def _classes(roots: tuple[type, ...]) -> set[type]:
    """Find every class that reports are made of."""
    found: set[type] = set()

    def visit(kind: object) -> None:
        if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__") and kind not in found:
            found.add(kind)
            for hint in inspect.get_annotations(kind).values():
                visit(hint)
            for base in kind.__bases__:
                visit(base)
        for part in getattr(kind, "__args__", ()):
            visit(part)

    for root in roots:
        visit(root)
    return found


def _documented(kind: type) -> tuple[str, dict[str, str]]:
    """Read what the docstrings of a class and its bases say of it and of its attributes."""
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    attributes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", listed, re.MULTILINE):
            attributes[name] = " ".join(text.split())
    return summary, attributes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe_reports(), indent=2) + "\n")
