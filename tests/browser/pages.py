"""Pages to be shown in a browser: those of samples, and those with a text wherever one may come."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, get_type_hints

from reports import (
    CHANGE,
    NONE,
    SCORES,
    make_answer,
    make_answers,
    make_endpoint,
    make_evaluation,
    make_report,
)

from locft.report.comparison import describe_comparison
from locft.report.content import Evaluated, describe_edit, describe_evaluation
from locft.report.page import Block, Command, Fold, Page, Picture, Section, Table, Text, Tile
from locft.report.pictures import draw_changes, draw_drift, draw_shares
from locft.report.schema import (
    SCHEMA_VERSION,
    ComparedRun,
    ComparisonReport,
    Difference,
    EditReport,
    EvalReport,
)
from locft.report.words import one_line
from locft.types import Epoch, Figure, Scores

Record = TypeVar("Record")

_LONGEST_CELL = 600  # as locft.report.html has it


def edit_page(text: str = "plain") -> Page:
    """Describe an edit run within which an evaluation stands."""
    evaluated = Evaluated(name=text, report=make_evaluation(text), answers=make_answers(text))
    return describe_edit(make_report(text), make_answers(text), [evaluated])


def evaluation_page(text: str = "plain") -> Page:
    """Describe an evaluation of a model."""
    return describe_evaluation(make_evaluation(text), make_answers(text))


def endpoint_page(text: str = "plain") -> Page:
    """Describe an evaluation of a server."""
    return describe_evaluation(endpoint_evaluation(text), make_answers(text))


def comparison_page(text: str = "plain") -> Page:
    """Describe a comparison of three runs, one of which was scored otherwise."""
    return describe_comparison(_comparison(text))


PAGES = {
    "edit run": edit_page,
    "evaluation": evaluation_page,
    "evaluation of a server": endpoint_page,
    "comparison": comparison_page,
}
"""What makes each page with a text in every field that a user's text may reach."""


def endpoint_evaluation(text: str) -> EvalReport:
    """Make the report of the evaluation of a server."""
    return make_evaluation(text, model=None, patch=None, drift=None, endpoint=make_endpoint(text))


def smallest_report() -> EditReport:
    """Make the report of one edit, without rephrases or locality prompts, trained for one epoch."""
    report = make_report(
        scores_before=Scores(
            reliability=Figure(value=0.0, num=1, low=0.0, high=0.793),
            generalization=NONE,
            locality=NONE,
            drift=Figure(value=0.0, num=40, low=0.0, high=0.0, reason="by definition"),
        ),
        scores=dataclasses.replace(
            SCORES,
            reliability=Figure(value=1.0, num=1, low=0.207, high=1.0),
            generalization=NONE,
            locality=NONE,
        ),
        change={},
        causes={},
        plan=None,
        settings={"lr": "auto"},
    )
    return dataclasses.replace(
        report,
        edits=dataclasses.replace(report.edits, num_edits=1, num_rephrases=0, num_locality=0),
        training=dataclasses.replace(
            report.training,
            epochs=1,
            steps=1,
            fifths=(1,),
            course=(Epoch(epoch=1, steps=1, loss=0.005, success=(1.0,)),),
        ),
        drift=dataclasses.replace(report.drift, most_moved=()),
    )


def smallest_pages() -> dict[str, Page]:
    """Describe what measured least."""
    evaluation = make_evaluation(
        contexts={}, judge=None, causes={}, drift=None, capability=None, patch=None, parts_s={}
    )
    return {
        "edit run": describe_edit(smallest_report(), ()),
        "edit run with an answer": describe_edit(smallest_report(), (make_answer(is_right=True),)),
        "evaluation": describe_evaluation(evaluation, ()),
        "comparison": describe_comparison(_comparison("plain", scores={}, differences=())),
    }


def page_full_of(text: str) -> Page:
    """Describe runs whose files hold a text wherever they may hold one, all on one page.

    What is read from a folder may be anyone's, so not only what users write is filled, but every text
    and the first key of every mapping. Nothing is measured: pictures take longest; one stands for all.
    """
    report = make_report(text, training=dataclasses.replace(make_report().training, course=()))
    inner = make_evaluation(text, drift=None)
    outer = endpoint_evaluation(text)
    answers = tuple(filled(answer, text) for answer in make_answers(text)[:2])
    report = _unmeasured(filled(report, text))
    inner, outer = (_unmeasured(filled(one, text)) for one in (inner, outer))
    pages = (
        describe_edit(report, answers, [Evaluated(name=text, report=inner, answers=answers)]),
        describe_evaluation(outer, answers),
        describe_comparison(_comparison(text, scores={text: NONE}, differences=(), of=text)),
    )
    line = one_line(text)
    drawn = Picture(svg='<svg viewBox="0 0 9 1" style="max-width: 9px"></svg>', title=line, alt=line)
    return Page(
        title=" ".join(page.title for page in pages),
        verdict=f"{pages[-1].verdict} {text}",
        tiles=(Tile(name=text, value="97.0%", note="200 prompts", change="+97.0"),),
        sections=(
            *(section for page in pages for section in page.sections),
            Section(title=text, blocks=(drawn,)),
        ),
    )


def pictures_page(texts: Sequence[str]) -> Page:
    """Draw every kind of picture that may hold texts, with all of these as labels."""
    figures = dict.fromkeys(texts, SCORES.locality)
    pictures = (
        draw_shares("shares", {}, figures),
        draw_drift(dict.fromkeys(texts, SCORES.drift)),
        draw_changes("changes", dict.fromkeys(texts, CHANGE)),
    )
    blocks = tuple(picture for picture in pictures if picture is not None)
    return Page(title="x", verdict="x", tiles=(), sections=(Section(title="x", blocks=blocks),))


def filled(record: Record, text: str) -> Record:
    """Put a text into every field of a record that may hold any, and those of what is in it."""
    hints = get_type_hints(type(record))
    changes = {
        field.name: _filled(getattr(record, field.name), hints[field.name], text)
        for field in dataclasses.fields(cast("Any", record))
    }
    return cast("Record", dataclasses.replace(cast("Any", record), **changes))


def _filled(value: Any, hint: Any, text: str) -> Any:
    if isinstance(value, str):
        return value if "Literal" in str(hint) else text
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return filled(value, text)
    if isinstance(value, tuple):
        return tuple(_filled(part, str, text) for part in value)
    if isinstance(value, dict):
        parts = {key: _filled(part, str, text) for key, part in value.items()}
        return {(text if number == 0 else key): part for number, (key, part) in enumerate(parts.items())}
    return value


def _unmeasured(record: Record) -> Record:
    """Take the value out of every figure."""
    if isinstance(record, Figure):
        return dataclasses.replace(record, value=None)
    if isinstance(record, dict):
        return cast("Record", {key: _unmeasured(part) for key, part in record.items()})
    if not dataclasses.is_dataclass(record):
        return record
    parts = {
        field.name: _unmeasured(getattr(record, field.name)) for field in dataclasses.fields(record)
    }
    return cast("Record", dataclasses.replace(cast("Any", record), **parts))


def _comparison(
    text: str,
    *,
    scores: Mapping[str, Figure] = vars(SCORES),
    differences: tuple[Difference, ...] | None = None,
    of: str = "",
) -> ComparisonReport:
    run = ComparedRun(
        name="A",
        folder=text,
        kind="edit",
        subject=text,
        location="2.mlp.down",
        num_edits=200,
        edits_sha256="e" * 64,
        protocol="locft",
        context="raw",
        scores=dict(scores),
        reason=None,
        seconds_per_edit=0.25,
        wall_s=3725.0,
        peak_memory_bytes=1_500_000_000,
        patch_bytes=9_400,
        settings={"drift_text": text, "seed": 1},
    )
    if of:
        run = dataclasses.replace(filled(run, of), name="A")
    farther = {
        "generalization": Figure(value=0.55, num=60, low=0.43, high=0.67),
        "drift": Figure(value=0.0622, num=40, low=0.0571, high=0.0688),
    }
    other = dataclasses.replace(
        run, name="B", scores={**scores, **farther} if scores else {}, settings={"drift_text": None}
    )
    unlike = dataclasses.replace(
        run, name="C", kind="evaluation", scores={}, reason=f"was not scored as {text}", settings={}
    )
    if differences is None:
        of_drift = Figure(value=0.0201, num=40, low=0.0173, high=0.0233)
        differences = (
            Difference(run="B", score="reliability", figure=CHANGE, num_items=200, num_items_first=210),
            Difference(run="B", score="drift", figure=of_drift, num_items=40, num_items_first=40),
            Difference(
                run="C",
                score="locality",
                figure=Figure(value=None, num=0, reason=f"nothing in common, {text}"),
                num_items=0,
                num_items_first=40,
            ),
        )
    return ComparisonReport(
        schema_version=SCHEMA_VERSION, runs=(run, other, unlike), differences=differences
    )


def shown_texts(page: Page) -> list[str]:
    """Give all texts of a page in the order in which they stand there, as they are to be shown."""
    texts = [page.title, page.verdict, *(tile.name for tile in page.tiles)]
    texts += [text for section in page.sections for text in _section_texts(section)]
    return [one_line(text, limit=_LONGEST_CELL) for text in texts]


def _section_texts(section: Section) -> Iterator[str]:
    if section.blocks:
        yield section.title
        for block in section.blocks:
            yield from _block_texts(block)


def _block_texts(block: Block) -> Iterator[str]:
    match block:
        case Text() | Command():
            yield block.text
        case Picture():
            yield block.title
        case Table():
            yield from (*block.columns, *(cell for row in block.rows for cell in row))
            if block.left_out:
                yield block.left_out
        case Fold():
            yield block.title
            for part in block.blocks:
                yield from _block_texts(part)
