"""A model behind a server, as protocols see it."""

from collections.abc import Iterable
from typing import NoReturn

from locft.data.contexts import Context, in_context
from locft.data.normalise import cut_answer
from locft.errors import InputError
from locft.evaluation.answer_cache import AnswerCache
from locft.evaluation.endpoint import Endpoint, complete_prompts
from locft.evaluation.likelihood import Pair


class RemoteReader:
    """Answers of a server; with ``chat`` its own chat template is used, which it renders itself.

    Args:
        endpoint: Whom to ask.
        context: The context that prompts are put into.
        cache: Where answers are kept as they come.
    """

    def __init__(self, endpoint: Endpoint, context: Context, cache: AnswerCache) -> None:
        self._endpoint = endpoint
        self._context: Context = context
        self._cache = cache

    def answer(self, prompts: Iterable[str], max_new_tokens: int) -> dict[str, str]:
        """Answer prompts greedily, with at most so many new tokens."""
        texts = {prompt: in_context(prompt, self._context) for prompt in prompts}
        answers = complete_prompts(
            self._endpoint,
            texts.values(),
            max_new_tokens=max_new_tokens,
            stop=(".", "\n"),
            label=f"asking {self._endpoint.model}",
            cache=self._cache,
            chat=self._context == "chat",
        )
        # Not every server heeds the stops.
        return {prompt: cut_answer(answers[text]) for prompt, text in texts.items()}

    def continuations(self, pairs: Iterable[Pair], *, as_generated: bool = False) -> NoReturn:  # noqa: ARG002
        """Refuse: such servers do not say how likely given texts are."""
        raise InputError("an endpoint answers prompts, and does not score given texts")
