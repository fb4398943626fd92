"""Capability by lm-eval on tiny models and on files that are written here; nothing is fetched."""

import json
import os
import random
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, tiny_llama_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.errors import ConfigError, EvaluationError, InputError, MissingExtraError
from locft.evaluation import capability
from locft.evaluation.capability import (
    LOCAL_TASKS,
    PAPER_TASKS,
    CapabilityTasks,
    TaskResult,
    compare_capability,
    drop_verdict,
    measure_capability,
    plan_tasks,
)
from locft.evaluation.metrics import mean, paired_difference, share
from locft.types import Figure

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None or find_spec("accelerate") is None,
    reason="lm-eval is not installed: pip install 'locft[capability]'",
)

WORDS = [
    "London",
    "Berlin",
    "Madrid",
    "Vienna",
    "Oslo",
    "football",
    "tennis",
    "chess",
    "painter",
    "singer",
    "physicist",
]
NO_TASKS = CapabilityTasks(tasks=(), data=None, limit=None)


@pytest.fixture(scope="module")
def sharp_model() -> PreTrainedModel:
    """A model whose predictions are worth comparing; tests must not change it."""
    model = make_model(tiny_llama_config(max_position_embeddings=1024))
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(20)
    return model


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something went for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_jsonl(file: Path, records: Sequence[object]) -> None:
    file.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8"
    )


def questions(
    num: int, query: str = "Where does {} begin?", num_choices: int = 3
) -> list[dict[str, Any]]:
    """Make questions whose choices differ in how long they are."""
    random_words = random.Random(num_choices)
    return [
        {
            "choices": [
                " ".join(random_words.choices(WORDS, k=1 + (index + k) % 3)) for k in range(num_choices)
            ],
            "gold": index % num_choices,
            "query": query.format(WORDS[index % len(WORDS)]),
            "more": index if index % 2 else None,
        }
        for index in range(num)
    ]


def continuations(
    num: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """Make texts of which the model knows how some go on."""
    random_words = random.Random(0)
    known: list[dict[str, str]] = []
    unknown: list[dict[str, str]] = []
    while min(len(known), len(unknown)) < num // 2:
        context = "Who wrote " + " ".join(random_words.choices(WORDS, k=random_words.randint(2, 9)))
        ids = tokenizer(context)["input_ids"]
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        word: Any = tokenizer.decode([token])
        whole = tokenizer(context + word)["input_ids"]
        if word.startswith(" ") and word.strip() and whole == [*ids, token]:
            known.append({"context": context, "continuation": word[1:]})
        else:
            unknown.append({"context": context, "continuation": random_words.choice(WORDS)})
    return [pair[index % 2] for index, pair in enumerate(zip(known, unknown, strict=False))][:num]


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[float, bool]:
    """Sum over the answer's tokens in float64, one text at a time; and whether each is the likeliest."""
    head = len(prompt) - len(prompt.rstrip())  # blanks count as part of the answer
    num = len(tokenizer(prompt[: len(prompt) - head])["input_ids"])
    ids = tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        predicted = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    likely = [float(predicted[i - 1, ids[i]]) for i in range(num, len(ids))]
    return sum(likely), all(int(predicted[i - 1].argmax()) == ids[i] for i in range(num, len(ids)))


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *names: str,
    limit: int | None = None,
    batch_size: int = 4,
) -> dict[str, TaskResult]:
    tasks = plan_tasks(names, folder, limit)
    return measure_capability(model, tokenizer, tasks, batch_size=batch_size, label="capability")


def result_of(*values: float, name: str = "piqa", sha256: str = "0", metric: str = "acc") -> TaskResult:
    return TaskResult(
        name=name,
        metric=metric,
        version="1",
        num=len(values),
        values=values,
        document_sha256=sha256,
        settings={"num_fewshot": 0},
    )


def compared(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> Any:
    early, late = ({result.name: result for result in results} for results in (before, after))
    return compare_capability(early, late, NO_TASKS)


@pytest.mark.parametrize(
    ("name", "records", "prompt"),
    [
        ("piqa", questions(12, "Question: Where is {}?\n", 2), "{}Answer:"),
        ("arc_easy", questions(15, "Question: Where is {}?", 4), "{}\nAnswer:"),
        ("copa", questions(12, "She plays {}, because", 2), "{}"),
        ("openbook_qa", questions(12, "The capital is {}", 4), "{}"),
    ],
)
def test_the_likeliest_choice_is_taken_as_by_a_plain_forward(
    name: str,
    records: list[dict[str, Any]],
    prompt: str,
    sharp_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    write_jsonl(tmp_path / f"{name}.jsonl", records)
    expected = []
    for record in records:
        asked = prompt.format(record["query"])
        likely = [
            log_likelihood(sharp_model, tokenizer, asked, f" {choice}") for choice in record["choices"]
        ]
        expected.append(float(likely.index(max(likely)) == record["gold"]))
    result = measured(sharp_model, tokenizer, tmp_path, name)[name]
    assert list(result.values) == expected
    assert len(set(expected)) == 2  # or nothing would be told apart
    assert (result.name, result.metric, result.num) == (name, "acc", len(records))
    assert result.version == "1"
    assert result.settings["num_fewshot"] == 0
    assert result.settings["doc_to_text"] == LOCAL_TASKS[name].doc_to_text
    json.dumps(result.settings)


def test_a_last_word_counts_if_each_of_its_tokens_is_the_likeliest(
    sharp_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    records = continuations(12, sharp_model, tokenizer)
    write_jsonl(tmp_path / "lambada_openai.jsonl", records)
    expected = [
        float(log_likelihood(sharp_model, tokenizer, r["context"], f" {r['continuation']}")[1])
        for r in records
    ]
    result = measured(sharp_model, tokenizer, tmp_path, "lambada_openai")["lambada_openai"]
    assert list(result.values) == expected
    assert len(set(expected)) == 2


def test_the_batch_size_changes_nothing(
    sharp_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "arc_easy.jsonl", questions(13))
    write_jsonl(tmp_path / "lambada_openai.jsonl", continuations(9, sharp_model, tokenizer))
    results = [
        measured(sharp_model, tokenizer, tmp_path, "arc_easy", "lambada_openai", batch_size=size)
        for size in (1, 3, 64)
    ]
    assert list(results[0]) == ["arc_easy", "lambada_openai"]
    assert results[0] == results[1] == results[2]


def test_a_limit_asks_the_first_items_and_has_a_hash_of_its_own(
    sharp_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "piqa.jsonl", questions(9))
    whole = measured(sharp_model, tokenizer, tmp_path, "piqa")["piqa"]
    some = measured(sharp_model, tokenizer, tmp_path, "piqa", limit=4)["piqa"]
    assert some.values == whole.values[:4]
    assert (some.num, whole.num) == (4, 9)
    assert some.document_sha256 != whole.document_sha256
    more = measured(sharp_model, tokenizer, tmp_path, "piqa", limit=99)["piqa"]
    assert more == whole


def test_values_and_hash_follow_the_order_of_the_file(
    sharp_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    records = questions(9)
    write_jsonl(tmp_path / "piqa.jsonl", records)
    result = measured(sharp_model, tokenizer, tmp_path, "piqa")["piqa"]
    write_jsonl(tmp_path / "piqa.jsonl", list(reversed(records)))
    reverse = measured(sharp_model, tokenizer, tmp_path, "piqa")["piqa"]
    assert reverse.values == tuple(reversed(result.values))
    assert reverse.document_sha256 != result.document_sha256


def test_another_choice_or_another_right_one_is_another_item(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    record = questions(1)[0]
    hashes = set()
    for change in ({}, {"choices": ["chess", *record["choices"][1:]]}, {"gold": 1}, {"query": "Where?"}):
        write_jsonl(tmp_path / "piqa.jsonl", [{**record, **change}])
        hashes.add(measured(tiny_model, tokenizer, tmp_path, "piqa")["piqa"].document_sha256)
    assert len(hashes) == 4


def test_a_measurement_leaves_process_model_and_tokenizer_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make_model(tiny_llama_config()), make_tokenizer(pad_token=None)
    # Its configuration ties what is apart, as that of some checkpoints does.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(384, 32), requires_grad=False)
    model.train()
    write_jsonl(tmp_path / "piqa.jsonl", questions(5))

    def state() -> dict[str, Any]:
        numpy_state: Any = np.random.get_state()  # noqa: NPY002
        return {
            "environment": dict(os.environ),
            "random": random.getstate(),
            "numpy": (numpy_state[1].tolist(), numpy_state[2]),
            "torch": torch.get_rng_state().tolist(),
            "training": model.training,
            "weights": {name: weight.data_ptr() for name, weight in model.state_dict().items()},
            "padding": (tokenizer.pad_token, tokenizer.padding_side),
            "folder": sorted(path.name for path in tmp_path.iterdir()),
        }

    # So that importing lm-eval, which sets this, is a part of what is looked at.
    monkeypatch.delenv("HF_XET_HIGH_PERFORMANCE", raising=False)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    before = state()
    model.eval()
    measured(model, tokenizer, tmp_path, "piqa")
    model.train()
    assert state() == before
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_predictions_that_are_no_numbers_are_not_counted_as_choices(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "piqa.jsonl", questions(3))
    with torch.no_grad():
        tiny_model.get_parameter("model.embed_tokens.weight").fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"predictions on piqa are not finite"):
        measured(tiny_model, tokenizer, tmp_path, "piqa")


def test_an_answer_longer_than_the_context_of_the_model_is_refused(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_jsonl(
        tmp_path / "lambada_openai.jsonl", [{"context": "Who", "continuation": "chess " * 200 + "!"}]
    )
    with pytest.raises(EvaluationError, match="lambada_openai cannot be put to this model: its context"):
        measured(tiny_model, tokenizer, tmp_path, "lambada_openai")


def test_a_line_separator_in_a_text_ends_no_record(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    record = {"context": "One\u2028or\u0085two", "continuation": "chess"}
    lines = json.dumps(record, ensure_ascii=False) + "\r\n\n" + json.dumps(record)
    (tmp_path / "lambada_openai.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert measured(tiny_model, tokenizer, tmp_path, "lambada_openai")["lambada_openai"].num == 2


def choice_record(**change: object) -> dict[str, object]:
    return {"query": "Who?", "choices": ["chess", "tennis"], "gold": 1, **change}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "no record: "),
        ("[1]", "no record: expected a JSON object; expected a JSON object"),
        ('{"a": 1, "a": 2}', "same key twice"),
        ({"query": "Who?", "gold": 0}, "`choices` is missing, expected a list of two texts or more"),
        (
            choice_record(choices=["chess"]),
            "`choices` is ['chess'], expected a list of two texts or more",
        ),
        (choice_record(choices=["chess", ""]), "`choices[1]` is '', expected a text that is not empty"),
        (choice_record(choices=["chess", 1]), "`choices[1]` is 1, expected a text that is not empty"),
        (choice_record(gold=2), "`gold` is 2, expected the index of the right choice, 0 to 1"),
        (choice_record(gold=-1), "`gold` is -1, expected the index"),
        (choice_record(gold=True), "`gold` is True, expected the index"),
        ({"query": "Who?", "choices": ["a", "b"]}, "`gold` is missing, expected the index"),
        ({"choices": ["a", "b"], "gold": 0}, "`query` is missing, expected a text"),
        (choice_record(query="\n "), "`query` is '\\n ', expected a text that is not empty"),
        (choice_record(query="Who?\nAnswer: "), "without 'Answer:', which is added where it belongs"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "`query` holds half of a character"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(record: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "piqa.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    file.write_text(json.dumps(choice_record()) + "\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        plan_tasks(["piqa"], tmp_path)
    assert str(caught.value).startswith(f"capability data {file}: line 2: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_space_before_a_continuation_is_not_put_twice(tmp_path: Path) -> None:
    # Not every white space: LAMBADA itself has continuations that begin with line feeds.
    write_jsonl(
        tmp_path / "lambada_openai.jsonl",
        [{"context": "Who", "continuation": "\n\nplays"}, {"context": "Who", "continuation": " plays"}],
    )
    with pytest.raises(InputError, match=r"line 2: `continuation` is ' plays', .* which is added$"):
        plan_tasks(["lambada_openai"], tmp_path)


@pytest.mark.parametrize(
    ("names", "limit", "said"),
    [
        (
            ["lambda_openai"],
            None,
            "unknown capability task 'lambda_openai': did you mean 'lambada_openai'?",
        ),
        (["mmlu"], None, "unknown capability task 'mmlu': "),
        (["paper"], None, "unknown capability task 'paper': "),
        (["piqa", "copa", "piqa"], None, "capability task 'piqa' is named twice"),
        ([], None, "no capability task is named; known: paper, lambada_openai, piqa"),
        (["piqa"], 0, "capability limit is 0, expected 1 or more items"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    names: list[str], limit: int | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_tasks(names, tmp_path / "missing", limit)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_or_file_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        plan_tasks(["piqa"], tmp_path / "missing")
    with pytest.raises(InputError, match=r"there is no piqa\.jsonl in it; it holds no \.jsonl file"):
        plan_tasks(["piqa"], tmp_path)
    write_jsonl(tmp_path / "copa.jsonl", questions(1))
    (tmp_path / "arc_easy.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"it holds arc_easy\.jsonl, copa\.jsonl$"):
        plan_tasks(["copa", "piqa"], tmp_path)
    with pytest.raises(InputError, match=r"arc_easy\.jsonl holds no record"):
        plan_tasks(["arc_easy"], tmp_path)
    (tmp_path / "piqa.jsonl").mkdir()
    with pytest.raises(InputError, match=r"piqa\.jsonl cannot be read"):
        plan_tasks(["piqa"], tmp_path)


@pytest.mark.parametrize("module", ["lm_eval", "accelerate"])
def test_without_the_extra_the_pip_command_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        capability, "find_spec", lambda name: None if name == module else SimpleNamespace()
    )
    with pytest.raises(MissingExtraError, match=r"^measuring capability .*'locft\[capability\]'"):
        plan_tasks(["piqa"], tmp_path)


@pytest.fixture(scope="module")
def manager() -> Any:
    """Some of lm-eval's tasks; a list of all takes seconds to make."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks"
    some = ("glue/sst2", "gsm8k", "mmlu/default", "nq_open", "piqa", "translation")
    return TaskManager(include_defaults=False, include_path=[folder / name for name in some])


@pytest.fixture
def hub(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that holds the data sets of the paper's tasks, with a few items each."""
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: manager)

    held: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "cais/mmlu": (
            "dev test",
            [{"question": f"Which {w}?", "choices": list("abcd"), "answer": 1} for w in WORDS[:2]],
        ),
        "google-research-datasets/nq_open": (
            "train validation",
            [
                {"question": "who wrote the play", "answer": ["The Singer", "painter"]},
                {"question": "where is oslo", "answer": ["Norway"]},
            ],
        ),
        "nyu-mll/glue": (
            "train validation",
            [{"sentence": f"{word} is good", "label": i % 2} for i, word in enumerate(WORDS[:3])],
        ),
        "wmt/wmt16": (
            "train validation test",
            [
                {"translation": {"de": "Der Maler spielt.", "en": "The painter plays."}},
                {"translation": {"de": "Berlin", "en": "singer"}},
            ],
        ),
        "openai/gsm8k": (
            "train test",
            [{"question": f"{n} and 0?", "answer": f"It is so. #### {n}"} for n in range(6)],
        ),
    }

    def load(path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
        if path not in held:
            raise ConnectionError("Couldn't reach the hub\nat all")
        splits, records = held[path]
        return {split: datasets.Dataset.from_list(records) for split in splits.split()}

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_the_papers_tasks_are_scored_item_by_item(
    hub: None,
    sharp_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sacrebleu

    tasks = plan_tasks(["paper"])
    assert tuple(task.name for task in tasks.tasks) == PAPER_TASKS
    with monkeypatch.context() as patched:

        def answer(_: object, requests: list[Any]) -> list[str]:
            return [
                "singer!" if request.task_name == "nq_open" else "Painter plays. #### 1"
                for request in requests
            ]

        patched.setattr(capability._Asked, "generate_until", answer)
        results = measure_capability(sharp_model, tokenizer, tasks, batch_size=4, label="")
    assert [(result.metric, result.num) for result in results.values()] == [
        ("acc", 57 * 2),
        ("exact_match,remove_whitespace", 2),
        ("acc", 3),
        ("chrf", 2),
        ("exact_match,strict-match", 6),
    ]
    assert results["nq_open"].values == (1.0, 0.0)
    assert results["gsm8k"].values == (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert results["wmt16-de-en"].values == pytest.approx(
        [
            sacrebleu.sentence_chrf("Painter plays. #### 1", [reference]).score / 100
            for reference in ("The painter plays.", "singer")
        ]
    )
    assert results["gsm8k"].settings["num_fewshot"] == 5
    # Each subject of MMLU has a description of its own.
    assert "description" not in results["mmlu"].settings
    assert results["mmlu"].settings["dataset_path"] == "cais/mmlu"
    scores = compare_capability(results, results, tasks)
    json.dumps(asdict(scores))
    assert (scores.data, scores.limit) == (None, None)
    assert scores.lm_eval.startswith("0.")


def test_answers_are_what_the_model_generates(
    hub: None,
    sharp_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: dict[str, str] = {}
    generate_until = capability._Asked.generate_until

    def overheard(asked: Any, requests: list[Any]) -> Any:
        found = generate_until(asked, requests)
        answers.update(zip((request.args[0] for request in requests), found, strict=True))
        return found

    monkeypatch.setattr(capability._Asked, "generate_until", overheard)
    measure_capability(sharp_model, tokenizer, plan_tasks(["nq_open"]), batch_size=2, label="")
    assert len(answers) == 2
    generate: Any = sharp_model.generate
    for prompt, answer in answers.items():
        assert prompt.endswith("?\nA:")
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        alone = generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        text: Any = tokenizer.decode(alone, skip_special_tokens=True)
        [begins, *_] = re.split(r"[\n.,]", text)
        assert begins
        assert answer.startswith(begins)


def test_a_task_of_the_hub_that_cannot_be_fetched_or_compared_is_refused(hub: None) -> None:
    with pytest.raises(InputError) as caught:
        plan_tasks(["sst2", "piqa"])
    assert (
        "task piqa cannot be loaded from the Hugging Face hub (ConnectionError: Couldn't reach"
        in str(caught.value)
    )
    assert "--capability-data DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"unknown capability task 'gsm9k': did you mean 'gsm8k'\?"):
        plan_tasks(["sst2", "gsm9k"])
    with pytest.raises(ConfigError, match="'sst2' is named twice"):
        plan_tasks(["sst2", "paper"])


def fake_part(**scores: Any) -> Any:
    return SimpleNamespace(
        aggregation=lambda: scores,
        higher_is_better=lambda: dict.fromkeys(scores, True) | {"loss": False},
        get_config=lambda name: None,
    )


def test_a_task_is_compared_by_a_score_that_all_its_parts_have_for_each_item() -> None:
    from lm_eval.api.metrics import mean as of_items

    def corpus(items: object) -> float:
        return 0.0

    def chosen(*parts: Any) -> str:
        return capability._plan("odd", parts).metric

    assert chosen(fake_part(f1=corpus, acc_norm=of_items, acc=of_items)) == "acc"
    assert chosen(fake_part(f1=corpus, recall=of_items)) == "recall"
    assert chosen(fake_part(bleu=corpus, chrf=corpus)) == "chrf"
    assert chosen(fake_part(acc=of_items, recall=of_items), fake_part(recall=of_items)) == "recall"
    for parts in (
        [fake_part(f1=corpus)],
        [fake_part(loss=of_items)],
        [fake_part(acc=of_items), fake_part(recall=of_items)],
    ):
        with pytest.raises(ConfigError, match="odd has no score of single items"):
            chosen(*parts)
    unsafe = fake_part(acc=of_items)
    unsafe.UNSAFE_CODE = True
    with pytest.raises(ConfigError, match="odd runs code"):
        chosen(unsafe)


def test_scores_are_compared_item_by_item() -> None:
    early = result_of(1, 1, 0, 0, 1, 1, 1, 0)
    late = result_of(1, 0, 0, 1, 0, 1, 0, 0)
    scores = compared([early], [late]).tasks["piqa"]
    assert scores.before == share(5, 8)
    assert scores.after == share(3, 8)
    assert scores.change == paired_difference(early.values, late.values)
    assert scores.change.value == pytest.approx(-2 / 8)
    assert (scores.metric, scores.num_items) == ("acc", 8)


def test_scores_between_0_and_1_have_the_interval_of_a_mean() -> None:
    values = (0.25, 0.5, 1.0, 0.0)
    [scores] = compared([result_of(*values)], [result_of(*values)]).tasks.values()
    assert scores.after == mean(values)
    assert scores.change == paired_difference(values, values)


def test_few_items_on_which_nothing_changed_do_not_exclude_a_drop() -> None:
    few = [result_of(0, 0), result_of(1, 0, 0, name="copa")]
    change = compared(few, few).change
    assert change is not None
    assert change.value == 0
    assert drop_verdict(change, 1.0) == "cannot be excluded"
    many = [result_of(*[0.0] * 2000), result_of(*[1.0] * 2000, name="copa")]
    assert drop_verdict(compared(many, many).change, 1.0) == "excluded"


def test_each_task_weighs_the_same_however_many_items_it_has() -> None:
    long, short = result_of(*[1.0] * 300, *[0.0] * 100), result_of(1, 0, name="copa")
    worse = [result_of(*[1.0] * 200, *[0.0] * 200), result_of(0, 0, name="copa")]
    scores = compared([long, short], worse)
    assert scores.before.value == pytest.approx((0.75 + 0.5) / 2)
    assert scores.after.value == pytest.approx((0.5 + 0) / 2)
    assert scores.change.value == pytest.approx((-0.25 - 0.5) / 2)
    assert scores.change.num == 402
    assert scores.before.low < scores.before.value < scores.before.high


def test_the_interval_over_tasks_is_that_of_items_resampled_within_their_task() -> None:
    random_values = np.random.default_rng(1)
    tasks = [random_values.choice([0.0, 1.0, -1.0], size=size) for size in (200, 50, 400)]
    figure = capability._mean_over_tasks([values.tolist() for values in tasks])
    # Var(mean over tasks) = sum of Var(task's mean) / 3²; the interval is nearly normal here.
    deviation = sum(values.var() / len(values) for values in tasks) ** 0.5 / 3
    centre = sum(values.mean() for values in tasks) / 3
    assert figure.value == pytest.approx(centre)
    assert figure.low == pytest.approx(centre - 1.96 * deviation, abs=0.15 * deviation)
    assert figure.high == pytest.approx(centre + 1.96 * deviation, abs=0.15 * deviation)
    assert figure == capability._mean_over_tasks([values.tolist() for values in tasks])


def test_one_model_alone_has_scores_and_no_change() -> None:
    scores = compare_capability(None, {"piqa": result_of(1, 0)}, NO_TASKS)
    assert (scores.before, scores.change) == (None, None)
    assert scores.after.value == 0.5
    [alone] = scores.tasks.values()
    assert (alone.before, alone.change) == (None, None)


def test_what_was_not_asked_the_same_is_not_compared() -> None:
    one = result_of(1, 0)
    for other in (replace(one, document_sha256="1"), replace(one, metric="acc_norm")):
        with pytest.raises(InputError, match="piqa was measured on other items, or by another metric"):
            compared([one], [other])
    with pytest.raises(InputError, match="different tasks: piqa before, piqa, copa after"):
        compared([one], [one, replace(one, name="copa")])


@pytest.mark.parametrize(
    ("low", "high", "bound", "verdict"),
    [
        (-0.05, -0.03, 2.0, "exceeded"),
        (-0.05, -0.01, 2.0, "cannot be excluded"),
        (-0.05, 0.01, 2.0, "cannot be excluded"),
        (-0.01, 0.02, 2.0, "excluded"),
        (0.01, 0.02, 0.0, "excluded"),
        (-0.07, -0.01, 7.0, "excluded"),
        (-0.07, -0.03, 3.0, "cannot be excluded"),
        (None, None, 5.0, "cannot be excluded"),
    ],
)
def test_a_drop_is_judged_by_its_interval(
    low: float | None, high: float | None, bound: float, verdict: str
) -> None:
    assert drop_verdict(Figure(value=-0.02, num=100, low=low, high=high), bound) == verdict
