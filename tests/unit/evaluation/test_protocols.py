import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from reports import make_answer

from locft.data.contexts import Context
from locft.errors import ConfigError, InputError
from locft.evaluation.likelihood import Continuation, Pair
from locft.evaluation.measure import Way, measure_model, measure_unedited, record_answers
from locft.evaluation.metrics import paired_difference, share
from locft.evaluation.protocols import (
    PROTOCOLS,
    Measurable,
    Protocol,
    choose_protocols,
    refuse_without_old,
    wild,
)
from locft.evaluation.scoring import Item, compare, items_of
from locft.provenance import count_causes, describe_scores
from locft.report.schema import ProtocolScores
from locft.report.words import PROTOCOL_SCORES
from locft.types import KINDS, AnswerRecord, Edit, Figure

EDITS = (
    Edit(
        id="australia",
        prompt="The capital of Australia is",
        target="Sydney",
        rephrases=("Australia's capital:", "Capital of Australia?"),
        locality=("The capital of Peru is",),
        old="Canberra",
    ),
    Edit(
        id="hamlet",
        prompt="Who wrote Hamlet?",
        target="the painter",
        locality=("Who wrote Emma?",),
        old="William Shakespeare",
    ),
)
UNEDITED = {
    "The capital of Australia is": "Canberra",
    "Australia's capital:": "Canberra",
    "Capital of Australia?": "",
    "The capital of Peru is": "Lima",
    "Who wrote Hamlet?": "Shakespeare",
    "Who wrote Emma?": "Jane Austen",
}
EDITED = {
    "The capital of Australia is": "sydney!",
    "Australia's capital:": "Sydney Harbour",
    "Capital of Australia?": "Canberra",
    "The capital of Peru is": "Sydney",
    "Who wrote Hamlet?": "A painter",
    "Who wrote Emma?": "jane austen",
}
LOCFT, WILD = PROTOCOLS["locft"], PROTOCOLS["wild"]
FORCED, LIKELIHOOD = PROTOCOLS["teacher-forced"], PROTOCOLS["likelihood"]


@dataclass
class Model:
    """A model that knows by heart what it answers, and how likely texts are."""

    answers: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[Pair, Continuation] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    scored: list[tuple[Pair, bool]] = field(default_factory=list)

    def answer(self, prompts: Iterable[str], max_new_tokens: int) -> Mapping[str, str]:
        prompts = list(prompts)
        self.asked += [(prompt, max_new_tokens) for prompt in prompts]
        return {prompt: self.answers[prompt] for prompt in prompts}

    def continuations(
        self, pairs: Iterable[Pair], *, as_generated: bool = False
    ) -> Mapping[Pair, Continuation]:
        pairs = list(pairs)
        self.scored += [(pair, as_generated) for pair in pairs]
        return {pair: self.texts[pair] for pair in pairs}


def text(num_tokens: int, num_right: int, nll: float) -> Continuation:
    return Continuation(num_tokens=num_tokens, num_right=num_right, nll=nll)


def records_of(
    protocol: Protocol, unedited: Model | None, edited: Model, edits: Iterable[Edit] = EDITS
) -> list[AnswerRecord]:
    way = Way(protocol, "raw")
    items = {way: items_of(edits)}
    before = None
    if unedited is not None:
        items, before = measure_unedited({"raw": unedited}, items)
    return record_answers(items, before, measure_model({"raw": edited}, items))[way]


def scores_of(
    protocol: Protocol, unedited: Model | None, edited: Model, edits: Iterable[Edit] = EDITS
) -> ProtocolScores:
    records = records_of(protocol, unedited, edited, edits)
    return describe_scores(protocol, "raw", records, has_unedited=unedited is not None)


def test_the_named_scores_are_those_that_are_measured() -> None:
    measured = {
        name: tuple(protocol.score_names[kind] for kind in KINDS) for name, protocol in PROTOCOLS.items()
    }
    assert measured == PROTOCOL_SCORES
    for protocol in PROTOCOLS.values():
        assert set(protocol.meanings) == set(protocol.score_names.values())


@pytest.mark.parametrize("protocol", [*PROTOCOLS.values(), wild.judged_by(lambda _: {})])
def test_each_protocol_states_its_rule_and_its_source(protocol: Protocol) -> None:
    documented = inspect.getdoc(protocol.measure)
    assert documented is not None
    assert "Source: " in documented
    assert "arXiv" in documented
    assert protocol.rule == documented.split("\n")[0]
    assert protocol.rule.endswith(".")


def test_locft_counts_answers_that_match_the_target_or_the_unedited_answer() -> None:
    edited = Model(EDITED)
    scores = scores_of(LOCFT, Model(UNEDITED), edited)
    assert scores.after == {
        "reliability": share(2, 2),
        "generalization": share(0, 2),
        "locality": share(1, 2),
    }
    assert scores.before is not None
    assert scores.before["reliability"] == share(0, 2)
    own = scores.before["locality"]
    assert (own.value, own.low, own.high, own.num) == (1, 1, 1, 2)
    assert own.reason is not None
    assert "by definition" in own.reason
    assert scores.change == {
        "reliability": paired_difference([0, 0], [1, 1]),
        "generalization": paired_difference([0, 0], [0, 0]),
        "locality": less_one(share(1, 2)),
    }
    assert {limit for _, limit in edited.asked} == {32}


def less_one(figure: Figure) -> Figure:
    assert figure.value is not None
    assert figure.low is not None
    assert figure.high is not None
    return replace(figure, value=figure.value - 1, low=figure.low - 1, high=figure.high - 1)


@pytest.mark.parametrize("num_kept", [0, 3, 5])
def test_a_change_from_what_holds_by_definition_is_as_sure_as_what_is_left(num_kept: int) -> None:
    kept = [1.0] * num_kept + [0.0] * (5 - num_kept)
    records = [make_answer(kind="locality", score_before=1.0, score_after=score) for score in kept]
    compared = compare(records, "locality", is_share=True, is_own_standard=True)
    assert compared.after == share(num_kept, 5)
    assert compared.change == less_one(compared.after)


def test_wild_answers_are_longer() -> None:
    edited = Model(EDITED)
    scores = scores_of(WILD, Model(UNEDITED), edited)
    assert {limit for _, limit in edited.asked} == {50}
    assert scores.after["reliability"] == share(2, 2)
    assert (scores.protocol.name, scores.protocol.max_new_tokens) == ("wild", 50)


def test_a_judge_decides_where_there_is_a_target_and_matches_decide_on_locality() -> None:
    seen: list[tuple[str, str, str]] = []

    def judge(triples: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str, str], bool | None]:
        triples = list(triples)
        seen.extend(triples)
        says = {"Sydney Harbour": True, "sydney!": None}
        return {triple: says.get(triple[2], False) for triple in triples}

    scores = scores_of(wild.judged_by(judge), Model(UNEDITED), Model(EDITED))
    assert scores.after["reliability"] == share(0, 1)  # what has no verdict is left out
    assert scores.after["generalization"] == share(1, 2)
    assert scores.after["locality"] == share(1, 2)
    assert ("Australia's capital:", "Sydney", "Sydney Harbour") in seen
    assert not any(prompt in ("The capital of Peru is", "Who wrote Emma?") for prompt, _, _ in seen)


def test_teacher_forced_scores_are_means_of_shares_of_tokens() -> None:
    expected = {item.prompt: item.target for item in items_of(EDITS) if item.expected is not None}
    own = {"The capital of Peru is": "Lima", "Who wrote Emma?": "Jane Austen"}
    pairs = [*expected.items(), *own.items()]
    unedited = Model(UNEDITED, {pair: text(4, 1, 9.0) for pair in pairs})
    rights = dict(zip(pairs, (4, 2, 0, 3, 1, 4), strict=True))
    edited = Model({}, {pair: text(4, right, 9.0) for pair, right in rights.items()})
    scores = scores_of(FORCED, unedited, edited)
    # In the order of the items: two prompts, two rephrases; then locality.
    shares = [rights[item.prompt, expected[item.prompt]] / 4 for item in items_of(EDITS, KINDS[:1])]
    assert scores.after["reliability"].value == pytest.approx(sum(shares) / 2)
    assert scores.after["locality"].value == pytest.approx(5 / 8)
    assert scores.before is not None
    assert scores.before["reliability"].value == 0.25
    assert scores.before["locality"].value == 1
    assert {limit for _, limit in unedited.asked} == {32}
    assert edited.asked == []  # nothing is generated by the edited model


def test_an_empty_answer_of_the_unedited_model_has_no_tokens_to_keep() -> None:
    edits = [Edit(id="1", prompt="p", target="t", locality=("a", "b"))]
    texts = {("p", "t"): text(2, 1, 1.0), ("a", ""): text(0, 0, 0.0), ("b", "x"): text(2, 1, 1.0)}
    scores = scores_of(FORCED, Model({"a": "", "b": "x"}, texts), Model({}, texts), edits)
    assert (scores.after["locality"].value, scores.after["locality"].num) == (0.5, 1)


def test_likelihood_compares_means_over_tokens_of_new_and_old() -> None:
    nlls: dict[str, tuple[Continuation, Continuation]] = {
        # new, old: a long text has a larger sum and may have a smaller mean.
        "The capital of Australia is": (text(4, 0, 6.0), text(2, 0, 5.0)),
        "Australia's capital:": (text(4, 0, 12.0), text(2, 0, 5.0)),
        "Capital of Australia?": (text(4, 0, 10.0), text(2, 0, 5.0)),  # a tie
        "The capital of Peru is": (text(4, 0, 12.0), text(2, 0, 5.0)),
        "Who wrote Hamlet?": (text(3, 0, 9.0), text(3, 0, 3.0)),
        "Who wrote Emma?": (text(3, 0, 3.0), text(3, 0, 3.0)),  # a tie
    }
    texts: dict[Pair, Continuation] = {}
    for item in items_of(EDITS):
        new, old = nlls[item.prompt]
        texts |= {(item.prompt, item.target): new, (item.prompt, item.old or ""): old}
    swapped = {pair: text(one.num_tokens, 0, 20 - one.nll) for pair, one in texts.items()}
    scores = scores_of(LIKELIHOOD, Model({}, swapped), Model({}, texts))
    assert scores.after == {
        "efficacy": share(1, 2),
        "paraphrase": share(0, 2),
        "neighbourhood": share(1, 2),
    }
    assert scores.before is not None
    assert scores.before["neighbourhood"].reason is None  # measured, not by definition
    # Nothing but the model itself is needed.
    alone = scores_of(LIKELIHOOD, None, Model({}, texts))
    assert (alone.after, alone.before, alone.change) == (scores.after, None, None)


def test_edits_without_an_old_answer_are_refused_by_name() -> None:
    others = [replace(edit, old=None, source=f"line {n}") for n, edit in enumerate(EDITS, 1)]
    with pytest.raises(InputError, match=r"protocol likelihood .* 2 of .*australia \(line 1\), hamlet"):
        refuse_without_old(LIKELIHOOD, others)
    refuse_without_old(LIKELIHOOD, EDITS)
    refuse_without_old(LOCFT, others)


@pytest.mark.parametrize("names", [[], ["locft", "locft"], ["bleu"], ["locft", ""]])
def test_unknown_protocols_and_doubles_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="locft, wild, teacher-forced, likelihood"):
        choose_protocols(names)


def test_a_prompt_that_two_edits_name_counts_twice() -> None:
    edits = [Edit(id=str(i), prompt=f"p{i}", target="t", locality=("same",)) for i in range(2)]
    model = Model({"p0": "t", "p1": "t", "same": "x"})
    assert scores_of(LOCFT, model, model, edits).after["locality"] == share(2, 2)


def test_edits_without_rephrases_and_locality_prompts_have_no_such_scores() -> None:
    model = Model({"p": "t"})
    scores = scores_of(LOCFT, model, model, [Edit(id="1", prompt="p", target="t")])
    for name in ("generalization", "locality"):
        figure = scores.after[name]
        assert (figure.value, figure.num, figure.low, figure.high) == (None, 0, None, None)
        assert figure.reason


def test_without_an_unedited_model_locality_is_not_measured() -> None:
    scores = scores_of(LOCFT, None, Model(EDITED))
    assert (scores.before, scores.change) == (None, None)
    assert scores.after["reliability"] == share(2, 2)
    figure = scores.after["locality"]
    assert (figure.value, figure.num) == (None, 0)
    assert figure.reason is not None
    assert "--base" in figure.reason
    records = records_of(LOCFT, None, Model(EDITED))
    assert all(record.before is None and record.score_before is None for record in records)
    of_locality = [record for record in records if record.kind == "locality"]
    assert all(record.expected is None and record.cause is None for record in of_locality)
    assert [record.after for record in of_locality] == ["Sydney", "jane austen"]


def test_each_failure_has_its_cause_and_nothing_else_has_one() -> None:
    records = records_of(LOCFT, Model(UNEDITED), Model(EDITED))
    causes = {record.prompt: record.cause for record in records}
    assert causes == {
        "The capital of Australia is": None,
        "Australia's capital:": "rambling",
        "Capital of Australia?": "wrong fact",
        "The capital of Peru is": "answered otherwise",
        "Who wrote Hamlet?": None,
        "Who wrote Emma?": None,
    }
    assert count_causes(records) == {
        "generalization": {"rambling": 1, "wrong fact": 1},
        "locality": {"answered otherwise": 1},
    }


def test_a_prompt_that_is_right_in_another_context_says_so() -> None:
    raw, qa = Way(LOCFT, "raw"), Way(LOCFT, "qa")
    items: dict[Way, list[Item]] = {way: items_of(EDITS, KINDS[:1]) for way in (raw, qa)}
    readers: dict[Context, Measurable] = {
        "raw": Model({**EDITED, "Who wrote Hamlet?": "Shakespeare"}),
        "qa": Model({**EDITED, "The capital of Australia is": ""}),
    }
    records = record_answers(items, None, measure_model(readers, items))
    assert [record.cause for record in records[raw]] == [None, "right elsewhere"]
    assert [record.cause for record in records[qa]] == ["right elsewhere", None]
    assert [record.context for record in records[qa]] == ["qa", "qa"]


def test_without_any_verdict_nothing_is_measured_and_nothing_has_a_cause() -> None:
    nobody = wild.judged_by(lambda triples: dict.fromkeys(triples))
    scores = scores_of(nobody, Model(UNEDITED), Model(EDITED))
    figure = scores.after["reliability"]
    assert (figure.value, figure.reason) == (None, "none of the items could be scored")
    records = records_of(nobody, Model(UNEDITED), Model(EDITED))
    assert all(record.cause is None for record in records if record.kind != "locality")


def test_a_match_that_a_judge_denies_has_no_cause() -> None:
    denied = wild.judged_by(lambda triples: dict.fromkeys(triples, False))
    records = records_of(denied, Model(UNEDITED), Model(EDITED))
    causes = {record.prompt: record.cause for record in records}
    assert causes["The capital of Australia is"] is None
    assert causes["Australia's capital:"] == "rambling"


def test_what_scores_without_answers_are_made_of_is_recorded() -> None:
    texts = {("p", "new"): text(4, 3, 6.0), ("p", "old"): text(2, 0, 5.0)}
    edits = [Edit(id="1", prompt="p", target="new", old="old")]
    [record] = records_of(LIKELIHOOD, None, Model({}, texts), edits)
    assert record.details_after == {"nll_target": 1.5, "nll_old": 2.5}
    [record] = records_of(FORCED, None, Model({}, texts), edits)
    assert record.details_after == {"num_tokens": 4, "num_right": 3}
    assert record.details_before is None


def test_teacher_forced_takes_targets_as_running_text_and_own_answers_as_they_were_generated() -> None:
    known = {(edit.prompt, edit.target): text(2, 1, 3.0) for edit in EDITS}
    known |= {(prompt, edit.target): text(2, 1, 3.0) for edit in EDITS for prompt in edit.rephrases}
    prompts = [prompt for edit in EDITS for prompt in edit.locality]
    answers = dict.fromkeys(prompts, " so ")
    own = {(prompt, " so"): text(1, 1, 0.1) for prompt in prompts}
    unedited, edited = Model(answers, known), Model({}, {**known, **own})
    records_of(FORCED, unedited, edited)
    assert {pair for pair, as_generated in edited.scored if as_generated} == own.keys()
    assert {pair for pair, as_generated in edited.scored if not as_generated} == known.keys()
