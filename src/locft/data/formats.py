"""The shapes in which edit sets are published.

A part of an edit is found by its path in a record: ``requested_rewrite.target_new.str`` goes
from object to object, and ``*`` stands for all values of an object.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Format:
    """One shape of record, recognised by its fields.

    Attributes:
        name: What the shape is called in reports.
        prompt: Path of the prompt.
        target: Path of the target.
        id: Paths of the values that, joined by ``-``, name the record.
        subject: Path of the subject.
        rephrases: Paths of the rephrases.
        locality: Path of the locality prompts.
        train_rephrases: Path of rephrases that may be trained on.
        train_locality: Path of locality prompts that training may keep as they are.
        old: Path of the answer before the edit; the first one counts if there are several.
        marks: Fields that tell the shape, besides those that hold prompt and target.
        ignored: Fields that belong to the shape but have no meaning for an edit.
        fills_subject: Whether ``{}`` in the prompt stands for the subject.
        strips_answers: Whether white space around answers is an accident of the data set.
    """

    name: str
    prompt: str
    target: str
    id: tuple[str, ...] = ("case_id", "id")
    subject: str = "subject"
    rephrases: tuple[str, ...] = ()
    locality: str | None = None
    train_rephrases: str | None = None
    train_locality: str | None = None
    old: str | None = None
    marks: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    fills_subject: bool = False
    strips_answers: bool = True

    @property
    def required(self) -> frozenset[str]:
        """The fields without which no record can be an edit."""
        return _roots(self.prompt, self.target)

    @property
    def lists(self) -> frozenset[str]:
        """The fields that may hold several texts."""
        return _roots(*self.rephrases, self.locality, self.train_rephrases, self.train_locality)

    @property
    def known(self) -> frozenset[str]:
        """All fields that belong to this shape."""
        others = _roots(*self.id, self.subject, self.old)
        return self.required | self.lists | others | self.marks | self.ignored


def _roots(*paths: str | None) -> frozenset[str]:
    return frozenset(path.split(".")[0] for path in paths if path is not None)


LOCFT = Format(
    name="locft",
    prompt="prompt",
    target="target",
    id=("id",),
    rephrases=("rephrases",),
    locality="locality",
    train_rephrases="train_rephrases",
    train_locality="train_locality",
    old="old",
    strips_answers=False,
)

# From the most to the least specific: among equally good fits the first one counts.
FORMATS: tuple[Format, ...] = (
    Format(
        name="memit",
        prompt="requested_rewrite.prompt",
        target="requested_rewrite.target_new.str",
        subject="requested_rewrite.subject",
        rephrases=("paraphrase_prompts",),
        locality="neighborhood_prompts",
        old="requested_rewrite.target_true.str",
        ignored=frozenset({"attribute_prompts", "generation_prompts", "pararel_idx"}),
        fills_subject=True,
    ),
    Format(
        name="zsre",
        prompt="src",
        target="alt",
        rephrases=("rephrase",),
        locality="loc",
        ignored=frozenset({"answers", "cond", "loc_ans", "pred"}),
    ),
    Format(
        name="mededit",
        prompt="ori_q",
        target="gta",
        subject="subj_word",
        # `re` is no rephrase: it is the reference that explains, and states, the answer.
        ignored=frozenset({"0shot_ori_a", "gen_qa", "re", "ret_qa", "sgr", "shuffle_ori_qa"}),
    ),
    Format(
        name="qaedit",
        prompt="prompt",
        target="target",
        # An id counts within one source only: there is an NQ 1104 and there may be a TQA 1104.
        id=("source", "id"),
        rephrases=("rephrase",),
        locality="locality.loc",
        marks=frozenset({"rephrase", "locality"}),
    ),
    Format(
        name="counterfact",
        prompt="prompt",
        target="target_new",
        rephrases=("rephrase_prompt",),
        locality="locality_prompt",
        old="ground_truth",
        marks=frozenset({"ground_truth"}),
        ignored=frozenset({"locality_ground_truth"}),
    ),
    Format(
        name="wikibigedit",
        prompt="prompt",
        target="target_new",
        rephrases=("rephrase_prompt",),
        locality="locality_prompt",
        marks=frozenset({"locality_prompt"}),
        ignored=frozenset({"locality_ground_truth", "mhop", "mhop_ans", "personas", "tag", "update"}),
    ),
    Format(
        name="knowedit",
        prompt="prompt",
        target="target_new",
        rephrases=("rephrase_prompt", "rephrase"),
        locality="locality.*.prompt",
        old="ground_truth",
        # Portability asks for consequences of the edit; those are not rephrases.
        ignored=frozenset({"cond", "portability"}),
    ),
    LOCFT,
)


def choose_format(records: Iterable[Iterable[str]]) -> Format:
    """Choose the format that the most records of a file fit.

    A record fits the format whose fields it all has, and among several the one that leaves the
    fewest of the record's own fields unknown, then the more specific one.

    Args:
        records: The field names of each record.

    Returns:
        One of `FORMATS`; our own if no record fits any.
    """
    votes: Counter[str] = Counter()
    # Records of one file share few sets of fields.
    for fields, num in Counter(frozenset(record) for record in records).items():
        fitting = [form for form in FORMATS if form.required | form.marks <= fields]
        if fitting:
            best = min(fitting, key=lambda form: len(fields - form.known))
            votes[best.name] += num
    return max(FORMATS, key=lambda form: votes[form.name]) if votes else LOCFT
