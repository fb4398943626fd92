"""A loaded model that can be asked: the subject of every measurement."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from locft.checkpoint import read_checkpoint
from locft.config import RunConfig
from locft.data.contexts import Context, in_context
from locft.data.encode import Codec, PromptFormat, make_codec
from locft.errors import InputError, brief
from locft.evaluation.drift import Drift, NeutralText, measure_drift
from locft.evaluation.generate import Stop, answer_prompts, decode_prompts, read_answers
from locft.evaluation.likelihood import Continuation, Pair, score_continuations
from locft.model.load import LoadedModel, context_tokens, end_of_sequence, load_model, load_tokenizer
from locft.model.weights import swapped_in
from locft.tensorfile import TensorEntry
from locft.types import Figure


@dataclass(frozen=True)
class Subject:
    """A loaded model, how prompts are put to it, and how many at a time."""

    loaded: LoadedModel
    codec: Codec
    batch_size: int

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The tensors of its checkpoint."""
        return read_checkpoint(self.loaded.checkpoint.folder)

    def answer(
        self,
        prompts: Iterable[str],
        label: str,
        stop: Stop = "protocol",
        guesses: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Answer prompts as `answer_prompts` does; `label` stands beside the progress bar."""
        return answer_prompts(
            self.loaded.model,
            self.codec,
            prompts,
            batch_size=self.batch_size,
            label=label,
            stop=stop,
            guesses=guesses,
        )

    def codec_for(self, context: Context) -> Codec:
        """Make the codec that puts prompts into a context.

        Raises:
            ModelError: The model has no chat template.
        """
        wanted: PromptFormat = "chat" if context == "chat" else "raw"
        if wanted == self.codec.format:
            return self.codec
        eos = end_of_sequence(self.loaded.model.config)
        return make_codec(self.loaded.tokenizer, wanted, eos_id=eos)

    def logits(self, ids: Tensor) -> Tensor:
        """Run the full forward, from ids (B, T) to logits (B, T, V)."""
        logits: Tensor = self.loaded.model(input_ids=ids, use_cache=False).logits
        return logits


class Reader:
    """A loaded model in one state, as protocols see it: it answers a prompt once for all of them.

    Args:
        subject: The model.
        context: The context that prompts are put into.
        label: Which model it is, for the progress bar.
        max_new_tokens: The longest answer that any protocol asks for.
        guesses: What prompts may be answered with; they change the time, never an answer.
    """

    def __init__(
        self,
        subject: Subject,
        context: Context,
        *,
        label: str,
        max_new_tokens: int,
        guesses: Mapping[str, str],
    ) -> None:
        self._subject = subject
        self._context: Context = context
        self._codec = subject.codec_for(context)
        self._label = label
        self._longest = max_new_tokens
        self._guesses = guesses
        self._rows: dict[str, list[int]] = {}

    def answer(self, prompts: Iterable[str], max_new_tokens: int) -> dict[str, str]:
        """Answer prompts greedily, with at most so many new tokens."""
        texts = {prompt: in_context(prompt, self._context) for prompt in prompts}
        missing = [text for text in texts.values() if text not in self._rows]
        if missing:
            self._refuse_too_long(missing)
            self._rows |= decode_prompts(
                self._subject.loaded.model,
                self._codec,
                missing,
                batch_size=self._subject.batch_size,
                label=f"answering, {self._label}",
                max_new_tokens=self._longest,
                guesses={
                    texts[prompt]: guess for prompt, guess in self._guesses.items() if prompt in texts
                },
            )
        # What an answer begins with does not depend on how long it may be.
        rows = {prompt: self._rows[text][:max_new_tokens] for prompt, text in texts.items()}
        return read_answers(self._codec, rows)

    def _refuse_too_long(self, texts: Iterable[str]) -> None:
        limit = context_tokens(self._subject.loaded.model.config)
        if limit is None:
            return
        too_long = [text for text in texts if len(self._codec.prompt_ids(text)) + self._longest > limit]
        if too_long:
            raise InputError(
                f"{len(too_long):,} prompts of context {self._context} with {self._longest} new "
                f"tokens do not fit into the {limit:,} tokens that this model takes, such as "
                f"{brief(too_long[0])}: leave them out, or choose another context or protocol"
            )

    def continuations(
        self, pairs: Iterable[Pair], *, as_generated: bool = False
    ) -> dict[Pair, Continuation]:
        """Score texts after prompts, teacher-forced."""
        put = {(prompt, text): (in_context(prompt, self._context), text) for prompt, text in pairs}
        found = score_continuations(
            self._subject.loaded.model,
            self._codec,
            put.values(),
            batch_size=self._subject.batch_size,
            label=f"scoring, {self._label}",
            as_generated=as_generated,
        )
        return {pair: found[texts] for pair, texts in put.items()}


def load_subject(name: str, config: RunConfig) -> Subject:
    """Load a model under the settings of a run.

    Raises:
        ModelError: There is no such model, or it is refused with the reason.
    """
    loaded = load_model(name, dtype=config.dtype, device=config.device, revision=config.revision)
    eos = end_of_sequence(loaded.model.config)
    codec = make_codec(loaded.tokenizer, config.format, eos_id=eos)
    return Subject(loaded, codec, config.eval_batch_size)


def load_codec(name: str, config: RunConfig) -> tuple[Codec, int | None]:
    """Load what linting needs of a model: how it reads edits, and how many tokens it takes.

    Raises:
        ModelError: There is no such model, or its tokenizer cannot be used.
    """
    tokenizer, model_config = load_tokenizer(name, revision=config.revision)
    eos = end_of_sequence(model_config)
    return make_codec(tokenizer, config.format, eos_id=eos), context_tokens(model_config)


def drift_between(unedited: Subject, edited: Subject, text: NeutralText) -> Drift:
    """Measure the drift from one loaded model to another.

    Without value where they do not predict over the same vocabulary: a tokenizer that was given
    tokens of its own, or an output head that was padded otherwise.
    """
    if _vocabulary(unedited) != _vocabulary(edited):
        reason = "the two models have different vocabularies"
        return Drift(overall=Figure(value=None, num=0, reason=reason), by_kind={}, num_tokens=0)
    limits = [context_tokens(one.loaded.model.config) for one in (unedited, edited)]
    return measure_drift(
        unedited.logits,
        edited.logits,
        edited.loaded.tokenizer,
        text,
        edited.loaded.model.device,
        min((limit for limit in limits if limit is not None), default=None),
    )


def _vocabulary(subject: Subject) -> tuple[dict[str, int], int]:
    config = subject.loaded.model.config.get_text_config(decoder=True)
    return subject.loaded.tokenizer.get_vocab(), config.vocab_size


def drift_of_values(subject: Subject, values: Mapping[str, Tensor], text: NeutralText) -> Drift:
    """Measure the drift that new values of some parameters cause; one model in memory is enough."""
    model = subject.loaded.model

    def edited(ids: Tensor) -> Tensor:
        with swapped_in(model, values):
            return subject.logits(ids)

    limit = context_tokens(model.config)
    return measure_drift(subject.logits, edited, subject.loaded.tokenizer, text, model.device, limit)
