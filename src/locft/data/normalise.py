"""How the scoring protocol compares an answer with a target."""

import re
import string

_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_END_OF_ANSWER = re.compile(r"[.\n]")


def normalise(text: str) -> str:
    """Reduce an answer to what counts when answers are compared, in the manner of SQuAD.

    Args:
        text: An answer or a target.

    Returns:
        The text in lower case, without ASCII punctuation and without the words a, an and the;
        words are separated by one space. It is empty if nothing else was there.
    """
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return " ".join(word for word in words if word not in _ARTICLES)


def cut_answer(text: str) -> str:
    """Take the part of a generated text that is scored as the answer.

    Args:
        text: What a model generated after a prompt.

    Returns:
        The text up to the first full stop or line feed, without it.
    """
    return _END_OF_ANSWER.split(text, maxsplit=1)[0]


def collapse_spaces(text: str) -> str:
    """Reduce a prompt to what makes two prompts the same one.

    Args:
        text: A prompt.

    Returns:
        The text without white space at its ends, each run of white space within as one space.
    """
    return " ".join(text.split())
