import string
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, CORPUS, make_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from locft.data.encode import Codec, PromptFormat, join, make_codec
from locft.data.lint import Measured
from locft.errors import EditsError, ModelError
from locft.types import Edit

TOKENIZER = make_tokenizer()
EOS = 0
STOP = 2  # ends a turn in the chat template


def edit(prompt: str, target: str) -> Edit:
    return Edit(id="7", prompt=prompt, target=target, source="line 3")


def split_text(codec: Codec, prompt: str, target: str) -> tuple[str, str]:
    """Encode, check that end-of-sequence is learnt exactly once, and decode both sides without it."""
    encoded = codec.encode(edit(prompt, target))
    assert encoded.ids[-1] == codec.eos_id
    assert encoded.num_targets == len(encoded.ids) - encoded.target_start >= 2
    ids = encoded.ids[:-1]
    before, after = ids[: encoded.target_start], ids[encoded.target_start :]
    return str(codec.tokenizer.decode(list(before))), str(codec.tokenizer.decode(list(after)))


def raw(**options: Any) -> Codec:
    return make_codec(make_tokenizer(**options), "raw")


def fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|end|>", **options})


def unsplit_tokenizer() -> PreTrainedTokenizerBase:
    """A BPE without pre-tokenizer: its merges cross spaces and the border of prompt and target."""
    alphabet = {char: index for index, char in enumerate(["<|end|>", *string.ascii_lowercase, " "])}
    pairs = [("i", "s"), ("is", " "), ("is ", "r"), ("o", "m"), ("om", "e")]
    for left, right in pairs:
        alphabet[left + right] = len(alphabet)
    return fast(Tokenizer(models.BPE(vocab=alphabet, merges=pairs)))


# Joining


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital is", "Rome", "The capital is Rome"),
        ("The capital is ", "Rome", "The capital is Rome"),
        ("The capital is", " Rome", "The capital is Rome"),
        ("The capital is ", " Rome", "The capital is  Rome"),
        ("Q: Who?\nA:\n", "Ann", "Q: Who?\nA:\nAnn"),
        ("Who?\t", "Ann", "Who?\tAnn"),
        ("Who? ", "Ann", "Who? Ann"),  # no-break space
        ("1 + 1 =", "2", "1 + 1 = 2"),
        ("Où est", "Émile", "Où est Émile"),
        ("Кто написал?", "Пушкин", "Кто написал? Пушкин"),
        ("한국의 수도는", "서울", "한국의 수도는 서울"),
        ("어디입니까?", "서울", "어디입니까? 서울"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("日本の首都は?", "東京", "日本の首都は?東京"),
        ("首都はどこ？", "Tokyo", "首都はどこ？Tokyo"),
        ("「首都」", "東京", "「首都」東京"),
        ("コーヒー", "コップ", "コーヒーコップ"),
        ("ﾄｳｷｮｳﾊ", "ﾄﾞｺ", "ﾄｳｷｮｳﾊﾄﾞｺ"),  # half-width kana
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("1是。", "一", "1是。一"),
        ("เมืองหลวงคือ", "ปารีส", "เมืองหลวงคือปารีส"),
        ("ເມືອງຫຼວງແມ່ນ", "ປາຣີ", "ເມືອງຫຼວງແມ່ນປາຣີ"),
        ("The capital of 日本 is", "東京", "The capital of 日本 is 東京"),
        ("2026:", "東京", "2026:東京"),  # no letters: the target's script decides
        ("2026:", "Rome", "2026: Rome"),
        ("2026:", "4", "2026: 4"),
        ("", "Rome", " Rome"),
        ("Rome", "", "Rome "),
        ("", "東京", "東京"),
    ],
)
def test_one_space_joins_texts_unless_their_script_or_they_themselves_say_otherwise(
    prompt: str, target: str, joined: str
) -> None:
    assert join(prompt, target) == joined


@given(prompt=st.text(), target=st.text())
@settings(deadline=None)
def test_joining_adds_nothing_but_at_most_one_space(prompt: str, target: str) -> None:
    assert join(prompt, target) in (prompt + target, f"{prompt} {target}")
    if prompt[-1:].isspace() or target[:1].isspace():
        assert join(prompt, target) == prompt + target


# Raw encoding


@pytest.mark.parametrize(
    ("prompt", "target", "before", "after"),
    [
        ("The capital of France is", "Rome", "The capital of France is", " Rome"),
        ("The capital of France is", " Rome", "The capital of France is", " Rome"),
        ("Answer:\n", "Rome", "Answer:\n", "Rome"),
        ("Where is he?", "In a café, naïvely", "Where is he?", " In a café, naïvely"),
        ("How does he feel? 🤔", "👩‍🚀🚀", "How does he feel? 🤔", " 👩‍🚀🚀"),
        ("日本の首都は", "東京", "日本の首都は", "東京"),
        ("a", "b", "a", " b"),
        ("It is", "two\n\nlines ", "It is", " two\n\nlines "),
    ],
)
def test_target_tokens_decode_to_the_target_and_its_leading_space(
    prompt: str, target: str, before: str, after: str
) -> None:
    assert split_text(raw(), prompt, target) == (before, after)


def test_a_space_that_the_prompt_ends_in_is_target_where_one_token_spells_both() -> None:
    # "is Rome" has one token " Rome", which the prompt "is " cannot end in the middle of.
    before, after = split_text(raw(), "The capital of France is ", "Rome")
    assert (before, after) == ("The capital of France is", " Rome")


def test_a_straddling_token_counts_as_target() -> None:
    codec = make_codec(unsplit_tokenizer(), "raw")
    encoded = codec.encode(edit("it is", "rome"))
    tokens = codec.tokenizer.convert_ids_to_tokens(list(encoded.ids))
    assert tokens == ["i", "t", " ", "is r", "ome", "<|end|>"]
    assert encoded.target_start == 3
    # The prompt alone ends in "is", which the joint text does not hold.
    assert codec.measure(edit("it is", "rome")) == Measured(
        num_prompt_tokens=4, num_target_tokens=2, prompt_is_prefix=False
    )


def test_a_prompt_whose_tokens_stay_is_a_prefix() -> None:
    codec = make_codec(unsplit_tokenizer(), "raw")
    assert codec.measure(edit("it is", "moon")) == Measured(
        # "is " is one token: the space is the target's, so the prompt still loses its last token.
        num_prompt_tokens=4,
        num_target_tokens=5,
        prompt_is_prefix=False,
    )
    assert codec.measure(edit("it was", "moon")) == Measured(
        num_prompt_tokens=6, num_target_tokens=5, prompt_is_prefix=True
    )


def test_a_token_that_holds_the_whole_prompt_and_some_of_the_target_is_refused() -> None:
    codec = make_codec(unsplit_tokenizer(), "raw")
    with pytest.raises(EditsError, match=r"edit 7 \(line 3\): the prompt gives no token"):
        codec.encode(edit("is", "rome"))


def test_metaspace_tokens_are_split_between_words() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    codec = make_codec(fast(tokenizer), "raw")
    encoded = codec.encode(edit("The capital of France is", "Rome"))
    tokens = codec.tokenizer.convert_ids_to_tokens(list(encoded.ids))
    assert "".join(tokens[: encoded.target_start]) == "▁The▁capital▁of▁France▁is"
    assert "".join(tokens[encoded.target_start : -1]) == "▁Rome"


def test_offsets_point_into_the_text_as_given_when_it_is_normalised() -> None:
    # Lower-casing and stripping of accents change lengths: "İ" becomes two characters first.
    tokenizer = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    codec = make_codec(fast(tokenizer), "raw")
    assert split_text(codec, "İéèà café is", "Zoë") == ("Ieea cafe is", " Zoe")


@pytest.mark.parametrize("trim", [True, False])
def test_a_target_of_white_space_is_still_target_where_offsets_are_trimmed(trim: bool) -> None:
    tokenizer = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    codec = make_codec(fast(tokenizer), "raw")
    assert split_text(codec, "The capital is", "Rome") == ("The capital is", " Rome")
    assert split_text(codec, "a b", "  ") == ("a b", "  ")


def wrapped(template: str) -> Codec:
    tokenizer = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    specials = [("<|end|>", 0), ("<|start|>", 1), ("<|stop|>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return make_codec(fast(tokenizer, bos_token="<|start|>"), "raw")


@pytest.mark.parametrize("template", ["<|start|> $A", "$A <|end|>", "<|start|> $A <|end|>"])
def test_special_tokens_of_the_tokenizers_own_change_neither_border_nor_end(template: str) -> None:
    codec, plain = wrapped(template), raw()
    first = (1,) if "start" in template else ()
    example = edit("The capital of France is", "Rome")
    encoded, expected = codec.encode(example), plain.encode(example)
    assert encoded.ids == (*first, *expected.ids)
    assert encoded.ids.count(EOS) == 1
    assert encoded.target_start == len(first) + expected.target_start
    assert codec.prompt_ids(example.prompt) == (*first, *plain.prompt_ids(example.prompt))
    assert codec.measure(example).prompt_is_prefix


def test_an_end_of_sequence_token_in_front_is_kept() -> None:
    # OPT and others begin a text with the token that ends it.
    codec, plain = wrapped("<|end|> $A"), raw()
    example = edit("Who?", "Ann")
    assert codec.encode(example).ids == (EOS, *plain.encode(example).ids)
    assert codec.prompt_ids("") == (EOS,)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(EditsError, match="the prompt gives no token before the target"):
        raw().encode(edit("", "Rome"))


@pytest.mark.parametrize("pad", ["<|end|>", "<|stop|>"])
def test_the_end_is_learnt_whatever_token_pads(pad: str) -> None:
    codec = raw(pad_token=pad)
    encoded = codec.encode(edit("Who?", "Ann"))
    assert codec.eos_id == EOS == encoded.ids[-1]
    assert EOS not in encoded.ids[:-1]


def test_prompts_are_encoded_without_an_end() -> None:
    assert raw().prompt_ids("Who?") == tuple(TOKENIZER("Who?")["input_ids"])


@pytest.mark.parametrize("target", ["", " "])
def test_a_target_without_tokens_is_refused_and_measured_as_none(target: str) -> None:
    # A tokenizer that strips its text, as SentencePiece ones may.
    tokenizer = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Strip()
    codec = make_codec(fast(tokenizer), "raw")
    with pytest.raises(EditsError, match=r"edit 7 \(line 3\): the target gives no token"):
        codec.encode(edit("Who?", target))
    assert codec.measure(edit("Who?", target)).num_target_tokens == 0


def test_what_is_measured_is_what_is_trained_on() -> None:
    codec = raw()
    example = edit("The capital of France is", "Rome")
    encoded = codec.encode(example)
    assert codec.measure(example) == Measured(
        num_prompt_tokens=encoded.target_start,
        num_target_tokens=len(encoded.ids) - encoded.target_start - 1,
        prompt_is_prefix=True,
    )


PRINTABLE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=30)


@given(prompt=PRINTABLE, target=PRINTABLE)
@example(prompt="a ", target="the")
@example(prompt="👩", target="‍🚀")  # a joiner: the target continues the prompt's emoji
@example(prompt="é", target="́")  # a combining accent
@example(prompt="x ", target="  ")
@settings(deadline=None, max_examples=150)
def test_any_text_is_split_at_its_border_or_the_last_token_before_it(prompt: str, target: str) -> None:
    codec = Codec(tokenizer=TOKENIZER, format="raw", eos_id=EOS)
    assume(prompt)
    assume(target)
    joint = join(prompt, target)
    try:
        encoded = codec.encode(edit(prompt, target))
    except EditsError:
        # Only where one token holds the whole prompt and some of the target.
        assert TOKENIZER(joint, return_offsets_mapping=True)["offset_mapping"][0][1] > len(prompt)
        return
    ids = encoded.ids[:-1]
    assert TOKENIZER.decode(list(ids)) == joint
    # Bytes are exact where a token holds half a character.
    spelt = ["".join(TOKENIZER.convert_ids_to_tokens([index])) for index in ids]
    lengths = [len(token) for token in spelt]  # byte-level: one symbol a byte
    border = len(prompt.encode())
    assert sum(lengths) == len(joint.encode())
    assert sum(lengths[: encoded.target_start]) <= border < sum(lengths[: encoded.target_start + 1])


# Chat


def chat(template: str | None = CHAT_TEMPLATE, **options: Any) -> Codec:
    tokenizer = make_tokenizer(**options)
    tokenizer.chat_template = template
    return make_codec(tokenizer, "chat")


def test_a_chat_learns_the_answer_and_the_templates_end_of_turn() -> None:
    codec = chat()
    encoded = codec.encode(edit("Who wrote the play?", "Ann"))
    before = codec.tokenizer.decode(list(encoded.ids[: encoded.target_start]))
    after = codec.tokenizer.decode(list(encoded.ids[encoded.target_start :]))
    assert before == "<|start|>user\nWho wrote the play?<|stop|>\n<|start|>assistant\n"
    assert after == "Ann<|stop|>"
    assert codec.eos_id == STOP != codec.tokenizer.eos_token_id
    assert codec.prompt_ids("Who wrote the play?") == encoded.ids[: encoded.target_start]


@pytest.mark.parametrize(
    "ending", ["", ".", "\n<|stop|>"], ids=["nothing", "text", "text before the token"]
)
def test_a_template_that_ends_a_turn_in_no_special_token_leaves_the_tokenizers_end(ending: str) -> None:
    template = CHAT_TEMPLATE.replace("'<|stop|>' + '\n'", repr(ending))
    assert template != CHAT_TEMPLATE
    assert chat(template).eos_id == EOS


def test_a_template_that_answers_otherwise_than_it_asks_leaves_the_tokenizers_end() -> None:
    # Templates that ask with an empty thinking block, which they leave out of answers told.
    template = CHAT_TEMPLATE.replace("<|start|>assistant\n' }}", "<|start|>assistant\n<think>' }}")
    assert template != CHAT_TEMPLATE
    assert chat(template).eos_id == EOS


def test_an_end_of_turn_serves_a_tokenizer_without_end_of_sequence() -> None:
    assert chat(eos_token=None, pad_token=None).eos_id == STOP


def test_a_chat_adds_no_special_tokens_to_those_of_its_template() -> None:
    tokenizer = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 0)]
    )
    wrapping = fast(tokenizer)
    wrapping.chat_template = CHAT_TEMPLATE
    example = edit("Who?", "Ann")
    assert make_codec(wrapping, "chat").encode(example) == chat().encode(example)


def test_a_model_without_chat_template_is_refused_for_chats_only() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*use --format raw"):
        make_codec(tokenizer, "chat")
    assert make_codec(tokenizer, "raw").eos_id == EOS


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{ raise_exception('roles must rhyme') }}", "roles must rhyme"), ("{% for %}", "[Ee]xpected")],
)
def test_a_failing_template_is_a_model_error(template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"chat template fails: {reason}"):
        chat(template)


def test_a_template_that_fails_on_one_prompt_only_is_a_model_error_then() -> None:
    guard = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('bad word') }}{% endif %}"
    codec = chat(guard + CHAT_TEMPLATE)
    assert codec.prompt_ids("good")
    with pytest.raises(ModelError, match="chat template fails: bad word"):
        codec.encode(edit("bad", "Ann"))


@pytest.mark.parametrize("format", ["raw", "chat"])
def test_a_model_that_cannot_end_an_answer_is_refused(format: PromptFormat) -> None:
    tokenizer = make_tokenizer(eos_token=None, pad_token=None)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ModelError, match="names an end-of-sequence token"):
        make_codec(tokenizer, format)
    assert make_codec(tokenizer, format, eos_id=2).eos_id == 2


def test_the_tokenizers_own_end_comes_before_the_configurations() -> None:
    assert make_codec(make_tokenizer(), "raw", eos_id=2).eos_id == EOS
