"""Asks a server that speaks OpenAI's API (vLLM, SGLang, llama.cpp) instead of a model in memory."""

import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2

from locft.errors import ConfigError, EvaluationError, InputError, brief, first_line
from locft.evaluation.answer_cache import AnswerCache, Request
from locft.progress import Step, progress
from locft.strictjson import load_json

Prefix = Literal["LOCFT_ENDPOINT", "LOCFT_JUDGE", "LOCFT_REPHRASER"]

_EXAMPLES = {"URL": "http://localhost:8000/v1", "MODEL": "NAME"}

# Of an answer of a few dozen tokens, and all that a server may say beside it.
_MAX_REPLY_BYTES = 10 * 2**20

_MAX_CONNECT_S = 10.0  # a server that is there accepts a connection at once, however busy it is

# Besides 5xx: time-out, conflict, too early, too many requests.
_PASSING_STATUSES = {408, 409, 425, 429}

_MAX_PORT = 65535

_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind a server, and how to ask it.

    Attributes:
        name: What its environment variables begin with; messages name them.
        base_url: The address that ``/completions`` and ``/chat/completions`` follow.
        model: The model's name there.
        key: What the server knows the user by; None if it asks for nothing.
        timeout_s: How long to wait for a reply to begin, and again for it to end.
        max_attempts: How often a request is sent before it is given up.
        max_concurrent: How many requests are under way at a time.
        first_wait_s: How long to wait before the second attempt; each further wait is twice as long.
        max_wait_s: The longest wait, also where the server asks for a longer one.

    Raises:
        ConfigError: The address or the key is none, or the address holds a secret.
    """

    name: Prefix
    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 60.0
    max_attempts: int = 6
    max_concurrent: int = 8
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0

    def __post_init__(self) -> None:
        # No message shows the value: it may be a key, in the wrong place.
        try:
            url = httpx2.URL(self.base_url)
            url.raw_host.decode().encode("idna")  # as connecting will
        except (httpx2.InvalidURL, UnicodeError):
            url = httpx2.URL("")
        if url.userinfo or url.query or url.fragment:
            raise ConfigError(
                f"{self.name}_URL holds more than an address (a user name, a password, or what follows"
                f" a '?' or '#'); a key belongs in {self.name}_KEY"
            )
        if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > _MAX_PORT:
            raise ConfigError(
                f"{self.name}_URL is no http or https address; for example:"
                f" export {self.name}_URL={_EXAMPLES['URL']}"
            )
        if self.key is not None and not re.fullmatch("[!-~]+", self.key):
            raise ConfigError(
                f"{self.name}_KEY is no key: expected visible ASCII characters without spaces"
            )

    def address(self, path: str) -> str:
        """Return where requests of one kind go."""
        return self.base_url.rstrip("/") + path


def endpoint_from_environment(prefix: Prefix, environment: Mapping[str, str] = os.environ) -> Endpoint:
    """Read where to ask, and with which key, from the environment.

    Args:
        prefix: What the variables begin with. ``_URL`` and ``_MODEL`` are needed, ``_KEY`` is not.
        environment: The variables.

    Returns:
        The endpoint.

    Raises:
        ConfigError: A variable is missing, or cannot be used.
    """
    url, model, key = (environment.get(f"{prefix}_{end}", "").strip() for end in ("URL", "MODEL", "KEY"))
    missing = [end for end, value in (("URL", url), ("MODEL", model)) if not value]
    if missing:
        raise ConfigError(
            f"no server to ask: not set: {' and '.join(f'{prefix}_{end}' for end in missing)}; for"
            f" example: export {' '.join(f'{prefix}_{end}={_EXAMPLES[end]}' for end in missing)}"
        )
    return Endpoint(name=prefix, base_url=url, model=model, key=key or None)


def complete_prompts(
    endpoint: Endpoint,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...],
    label: str,
    cache: AnswerCache | None,
    chat: bool = False,
) -> dict[str, str]:
    """Ask a server to go on with prompts, greedily, or to reply to them.

    What may pass (no connection, a time-out, a server that is busy or broken, a reply that makes no
    sense) is tried again, with growing waits. What will not ends everything at once.

    Args:
        endpoint: Whom to ask.
        prompts: The prompts; repeated ones are asked once.
        max_new_tokens: How long an answer may be.
        stop: Texts that end an answer; the server leaves them out.
        label: What the progress bar says.
        cache: Where to look first, and where each answer is kept as it comes.
        chat: Whether each prompt is a user's message, to be replied to, instead of a text to go on with.

    Returns:
        Each prompt's answer as the server gave it, in the order of the prompts. Half characters, which
        no file could hold, are replaced.

    Raises:
        InputError: The server refuses the request, or is none of this kind.
        EvaluationError: A request was tried too often; answers so far are in the cache.
    """
    requests = {
        prompt: _request(endpoint, prompt, max_new_tokens, stop, chat)
        for prompt in dict.fromkeys(prompts)
    }
    answers: dict[str, str] = {}
    if cache is not None:
        found = {prompt: cache.get(request) for prompt, request in requests.items()}
        answers = {prompt: answer for prompt, answer in found.items() if answer is not None}
    pending = {prompt: request for prompt, request in requests.items() if prompt not in answers}
    with progress(label, len(requests), "prompts") as step:
        step(len(answers))
        try:
            _ask_all(endpoint, pending, answers, cache, step)
        except _ExhaustedError as error:
            kept = "no answer is kept"
            # Of those before, too: an evaluation asks in several goes.
            if cache is not None and (num_kept := cache.num_found + cache.num_kept):
                are = "answer is" if num_kept == 1 else "answers are"
                kept = f"{num_kept:,} {are} kept in {cache.path}, and running again goes on from there"
            raise EvaluationError(f"{error}; {kept}") from error
    return {prompt: answers[prompt] for prompt in requests}


class _PassingError(Exception):
    """Something that may be gone at the next attempt."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _ExhaustedError(Exception):
    """A request failed as often as it may."""


class _StoppedError(Exception):
    """A request is not tried again, since another one has failed for good."""


class _Halt:
    """Ends what threads wait for, at once: the next attempt, or a server's reply.

    Without it, an interrupt would take until the last request under way has timed out.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._sockets: list[socket.socket] = []

    def watch(self, name: str, info: Mapping[str, Any]) -> None:
        """Note each connection that is made (httpx2 calls this with all that it does)."""
        if name.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self._event.is_set():
                self.now()

    def now(self) -> None:
        """End everything."""
        self._event.set()
        for connection in tuple(self._sockets):
            with suppress(OSError):  # closed by now
                # Not the method of an SSLSocket: that takes its state away from a thread that reads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        """Wait.

        Raises:
            _StoppedError: Everything has ended.
        """
        if self._event.wait(seconds):
            raise _StoppedError


def _request(
    endpoint: Endpoint, prompt: str, max_new_tokens: int, stop: Sequence[str], chat: bool
) -> Request:
    body: dict[str, object] = {
        "model": endpoint.model,
        **({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}),
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "n": 1,
        **({"stop": list(stop)} if stop else {}),
    }
    return Request(url=endpoint.address("/chat/completions" if chat else "/completions"), body=body)


def _ask_all(
    endpoint: Endpoint,
    requests: Mapping[str, Request],
    answers: dict[str, str],
    cache: AnswerCache | None,
    step: Step,
) -> None:
    """Send requests side by side, and add what is answered, up to the first that fails for good."""
    if not requests:
        return
    halt = _Halt()

    def ask(prompt: str, request: Request) -> None:
        answer = _ask(endpoint, client, request, halt)
        if cache is not None:
            cache.put(request, answer)
        answers[prompt] = answer

    # At its end the pool waits for its threads, so that what they have kept is known.
    with _client(endpoint) as client, ThreadPoolExecutor(endpoint.max_concurrent) as pool:
        try:
            for future in as_completed([pool.submit(ask, *item) for item in requests.items()]):
                future.result()
                step()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            halt.now()
            raise


def _client(endpoint: Endpoint) -> httpx2.Client:
    # Unpacking could make much of little, so that nothing packed is asked for.
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    return httpx2.Client(
        headers=headers,
        follow_redirects=False,  # the key would go along
        timeout=httpx2.Timeout(endpoint.timeout_s, connect=min(endpoint.timeout_s, _MAX_CONNECT_S)),
        limits=httpx2.Limits(max_connections=endpoint.max_concurrent),
    )


def _ask(endpoint: Endpoint, client: httpx2.Client, request: Request, halt: _Halt) -> str:
    """Send a request until it is answered."""
    num_failed = 0
    while True:
        try:
            return _post(endpoint, client, request, halt)
        except _PassingError as error:
            num_failed += 1
            if num_failed == endpoint.max_attempts:
                raise _ExhaustedError(
                    f"{request.url}: no answer in {num_failed} attempts; the last one: {error}"
                ) from error
            # At random: all at the same moment may be what the server cannot bear.
            own_s = endpoint.first_wait_s * 2 ** (num_failed - 1) * random.uniform(0.5, 1)
            halt.wait(min(max(own_s, error.wait_s), endpoint.max_wait_s))


def _post(endpoint: Endpoint, client: httpx2.Client, request: Request, halt: _Halt) -> str:
    """Send a request once.

    Raises:
        _PassingError: It may be answered another time.
        InputError: It will not be.
    """
    try:
        with client.stream(
            "POST", request.url, content=json.dumps(request.body), extensions={"trace": halt.watch}
        ) as response:
            body = _read(endpoint, request, response)
    except httpx2.TransportError as error:
        # Not `from error`, here and below: an error may quote the server, and the server the key.
        raise _PassingError(_without_key(endpoint, first_line(error))) from None
    status = response.status_code
    if status in _PASSING_STATUSES or status >= 500:
        raise _PassingError(
            f"the server answered {status}{_said(endpoint, body)}", _retry_after_s(response.headers)
        )
    if status >= 300:
        raise _refusal(endpoint, request, response, _said(endpoint, body))
    return _answer_in(endpoint, body)


def _read(endpoint: Endpoint, request: Request, response: httpx2.Response) -> bytes:
    # The client's own limit is for one read; a server could go on for ever, byte by byte.
    end = time.monotonic() + endpoint.timeout_s
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > _MAX_REPLY_BYTES:
            raise InputError(
                f"{request.url}: the reply is larger than {_MAX_REPLY_BYTES:,} bytes, so this is no"
                f" server for completions; see to {endpoint.name}_URL"
            )
        if time.monotonic() > end:
            raise _PassingError(f"the reply did not end within {endpoint.timeout_s:g} s")
    return bytes(body)


def _refusal(endpoint: Endpoint, request: Request, response: httpx2.Response, said: str) -> InputError:
    status = response.status_code
    if status < 400:
        target = brief(_without_key(endpoint, response.headers.get("location", "")))
        return InputError(
            f"{request.url}: the server answered {status} and points to {target}, which is not followed,"
            f" since the key would go along; set {endpoint.name}_URL to the right address"
        )
    what = f"{request.url}: the server answered {status}{said}"
    if status in (401, 403):
        state = "is missing" if endpoint.key is None else "is wrong, or may not use this model"
        return InputError(f"{what}; {endpoint.name}_KEY {state}")
    if status == 404:
        return InputError(
            f"{what}; there is no such address, or no model {brief(endpoint.model)}: see to"
            f" {endpoint.name}_URL (mostly it ends in /v1) and {endpoint.name}_MODEL"
        )
    asked = brief(request.body.get("prompt") or request.body["messages"])
    return InputError(f"{what}; it refuses this request, so it was not tried again: {asked}")


def _answer_in(endpoint: Endpoint, body: bytes) -> str:
    """Find the answer in a reply.

    Raises:
        _PassingError: There is none.
    """
    try:
        record = load_json(body.decode())
    except ValueError as error:
        reason = _without_key(endpoint, first_line(error))
        raise _PassingError(f"its reply is no JSON: {reason}{_said(endpoint, body)}") from None
    match record:
        case {"choices": [{"text": str(text)}, *_]}:
            pass
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            pass
        case {"choices": [{"message": {"content": None}}, *_]}:
            text = ""  # a model that has thought for all its tokens, or refuses
        case _:
            raise _PassingError(f"its reply holds no answer{_said(endpoint, body)}")
    # JSON may hold half characters; files and terminals may not.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _said(endpoint: Endpoint, body: bytes) -> str:
    """Show what a server says of an error, in the ways that servers have; shortened, without the key."""
    text = body.decode(errors="replace")
    with suppress(ValueError):
        match load_json(text):
            case {"error": {"message": str(message)}}:
                text = message
            case {"error": str(message)} | {"message": str(message)} | {"detail": str(message)}:
                text = message
    return f": {brief(_without_key(endpoint, text))}" if text.strip() else ""


def _without_key(endpoint: Endpoint, text: str) -> str:
    return text if endpoint.key is None else text.replace(endpoint.key, "***")


def _retry_after_s(headers: httpx2.Headers) -> float:
    """Read how long a server asks to wait: seconds or a date (RFC 9110, section 10.2.3), else 0."""
    text = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    with suppress(ValueError, OverflowError):
        date = parsedate_to_datetime(text)
        return date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    return 0.0
