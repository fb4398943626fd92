"""A study's folder keeps what was done, wherever writing was cut short."""

from dataclasses import replace
from pathlib import Path

import pytest
from reports import edits_info, model_info, protocol_info

from locft.errors import InputError
from locft.study.records import STUDY_VERSION, Topic, Trial
from locft.study.run import failed_trial
from locft.study.store import TRIALS_FILE, is_study, open_store, read_topic, read_trials

TOPIC = Topic(
    version=STUDY_VERSION,
    study="locations",
    model=model_info("tiny"),
    edits=edits_info("edits.jsonl"),
    settings={"epochs": "auto"},
    protocol=protocol_info("a rule"),
    drift_text_sha256="0" * 64,
    num_passages=2,
    num_scored=2,
)
RESULTS = [
    failed_trial(
        Trial(
            method="ft-m",
            settings={},
            location=f"{layer}.mlp.down",
            pipeline="breadth-first",
            batch_size=20,
            lr=0.001,
            seed=0,
            num_edits=2,
        ),
        "Die Gewichte sind nicht endlich: ∞",
    )
    for layer in range(2)
]


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "study", TOPIC) as store:
        for result in RESULTS:
            store.add(result)
    assert is_study(tmp_path / "study")
    assert read_topic(tmp_path / "study") == TOPIC
    assert read_trials(tmp_path / "study") == RESULTS
    with open_store(tmp_path / "study", TOPIC) as store:
        assert [store.find(result.trial) for result in RESULTS] == RESULTS
        assert store.find(replace(RESULTS[0].trial, seed=1)) is None


def test_wherever_a_line_was_cut_short_the_lines_before_it_are_kept(tmp_path: Path) -> None:
    with open_store(tmp_path / "study", TOPIC) as store:
        for result in RESULTS:
            store.add(result)
    file = tmp_path / "study" / TRIALS_FILE
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        kept = RESULTS[: 1 if end >= first else 0]
        assert read_trials(tmp_path / "study") == kept
        assert file.read_bytes() == whole[:end]  # reading mends nothing
        with open_store(tmp_path / "study", TOPIC) as store:
            for result in RESULTS[len(kept) :]:
                store.add(result)
        assert file.read_bytes() == whole


def test_a_folder_that_was_begun_and_not_named_yet_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / TRIALS_FILE).write_bytes(b"")
    assert not is_study(tmp_path / "study")
    with (
        pytest.raises(InputError, match=r"exists and is no study \(no study.json\)"),
        open_store(tmp_path / "study", TOPIC),
    ):
        pass
