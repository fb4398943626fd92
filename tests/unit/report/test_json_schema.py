import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from reports import make_comparison, make_endpoint, make_evaluation, make_report

from locft.report.json_schema import describe_reports
from locft.report.schema import ComparisonReport, EditReport, EvalReport, to_json

SCHEMA = describe_reports()
VALIDATOR = Draft202012Validator(SCHEMA)
DOCS = Path(__file__).parents[3] / "docs" / "report.schema.json"
REPORTS: dict[str, EditReport | EvalReport | ComparisonReport] = {
    "edit": make_report(),
    "edit without a plan": make_report(plan=None),
    "evaluation": make_evaluation(),
    "evaluation of a server": make_evaluation(
        model=None, endpoint=make_endpoint("x"), patch=None, drift=None, capability=None, judge=None
    ),
    "comparison": make_comparison(),
}
Path_ = tuple[str | int, ...]


def read(name: str) -> Any:
    return json.loads(to_json(REPORTS[name]))


def fields(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Find every field of every class within a report: those of the JSON that the classes made."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield (*path, field.name)
            yield from fields(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, dict):
        for name, part in [*value.items()][:1]:
            yield from fields(part, (*path, name))
    elif isinstance(value, tuple):
        for number, part in enumerate(value[:1]):
            yield from fields(part, (*path, number))


def at(value: Any, path: Path_) -> Any:
    for step in path:
        value = value[step]
    return value


def test_the_documented_schema_is_that_of_the_classes() -> None:
    hint = "outdated: run `python -m locft.report.json_schema > docs/report.schema.json`"
    assert DOCS.read_text("utf-8") == json.dumps(SCHEMA, indent=2) + "\n", hint


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_is_as_the_schema_says(name: str) -> None:
    assert list(VALIDATOR.iter_errors(read(name))) == []


def of_kind(kind: str) -> Draft202012Validator:
    """Validate against one class, so that an error is of its own fields."""
    part = {"edit": "EditReport", "evaluation": "EvalReport", "comparison": "ComparisonReport"}[kind]
    return Draft202012Validator({"$ref": f"#/$defs/{part}", "$defs": SCHEMA["$defs"]})


@pytest.mark.parametrize("name", ["edit", "evaluation", "comparison"])
def test_no_field_may_be_missing_unknown_or_of_another_type(name: str) -> None:
    whole, validator = read(name), of_kind(name)
    assert validator.is_valid(whole)
    for path in fields(REPORTS[name]):
        *parents, last = path
        parent = at(whole, tuple(parents))
        value = parent.pop(last)
        assert not validator.is_valid(whole), f"without {path}"
        parent[last] = [[["x"]]]  # nothing in a report is an array of arrays
        assert not validator.is_valid(whole), f"{path} as another type"
        parent[last] = value
        parent[f"{last}_2"] = 1
        assert not validator.is_valid(whole), f"with {last}_2 beside {path}"
        del parent[f"{last}_2"]
    assert validator.is_valid(whole)


@pytest.mark.parametrize("name", ["edit", "evaluation", "comparison"])
def test_a_report_is_of_one_kind_and_version(name: str) -> None:
    for change in ({"kind": "other"}, {"kind": None}, {"schema_version": 2}, {"schema_version": "3"}):
        assert not VALIDATOR.is_valid({**read(name), **change})


def test_every_class_and_every_field_is_described() -> None:
    for name, part in SCHEMA["$defs"].items():
        assert part["description"].endswith("."), name
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
        for field, schema in part["properties"].items():
            assert schema["description"].endswith("."), f"{name}.{field}"
            assert "default" not in schema
    parts = SCHEMA["$defs"]
    assert parts["Cost"]["properties"]["wall_s"]["description"] == "All of it."
    assert parts["Figure"]["properties"]["num"]["description"].startswith("How many items")


def test_json_holds_the_classes_field_by_field() -> None:
    text = "two\nlines and\u2028more"
    report = make_report(text)
    written = to_json(report)
    assert written.endswith("}\n")
    found = json.loads(written)
    assert list(found) == [field.name for field in dataclasses.fields(EditReport)]
    assert found == json.loads(json.dumps(dataclasses.asdict(report)))
    assert found["scores"]["reliability"] == {
        "value": 0.97,
        "num": 200,
        "low": 0.936,
        "high": 0.986,
        "reason": None,
    }
    assert found["scores_before"]["generalization"]["value"] is None
    assert found["scores_before"]["generalization"]["reason"] == "the edits hold none"
    assert found["cost"] == {
        "load_s": 1.0,
        "eval_s": 125.0,
        "wall_s": 3725.0,
        "peak_memory_bytes": 1_500_000_000,
        "seconds_per_edit": 0.25,
        "prepare_s": 5.0,
        "cache_s": 10.0,
        "train_s": 40.0,
    }
    assert found["edits"]["file"] == text
    assert found["drift"]["by_kind"][text]["value"] == 0.0421


def test_json_of_an_evaluation_without_a_base_says_null() -> None:
    main = dataclasses.replace(make_evaluation().protocols["locft"], before=None, change=None)
    found = json.loads(to_json(make_evaluation(protocols={"locft": main}, drift=None)))
    assert list(found) == [field.name for field in dataclasses.fields(EvalReport)]
    scores = found["protocols"]["locft"]
    assert (scores["before"], scores["change"], found["drift"], found["base"]) == (None,) * 4
    assert scores["after"]["reliability"]["num"] == 200
