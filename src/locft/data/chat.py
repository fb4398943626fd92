"""Renders chat templates in a process of its own, which is ended where a template goes too far.

A chat template is code of the model's author. transformers renders it in a sandbox, which keeps it
from files and from Python's insides, but not from looping for ever or from taking all memory there is.
Nothing within a process stops that: ``10**10**10`` is one call, which heeds neither a signal's handler
nor another thread. So a child process renders, and the kernel holds it to its time and its memory.
The child stays for the next prompt, since it takes longer to start than to render thousands.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from locft.errors import ModelError, first_line

if TYPE_CHECKING:  # the child, which imports this module, too, has no need of tokenizers
    from transformers import PreTrainedTokenizerBase

# A template takes a few ten thousandths of a second, and writes little more than the prompt. Time is
# the processor's, so that a busy machine refuses no model.
_MAX_CPU_S = 5.0
_MAX_CHARS = 1_000_000
_MAX_GROWTH_MIB = 256
_MAX_REASON_CHARS = 300

# The child finds modules where this process does, and never in the working directory instead.
_START = "import sys; sys.path[:] = sys.argv[1:]; from locft.data.chat import serve; serve()"


class _Renderer:
    """The child process, started when it is first needed, and again when it was ended."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> bytes | int:
        """Send a line, and return the line that answers it, or the exit status of a child that ended."""
        with self._lock:
            process = self._process or _start()
            # Not kept while its answer is due: an answer left unread would pass for the next one's.
            self._process = None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:  # it ended before it was asked
                answer = b""
            except BaseException:
                _end(process)
                raise
            if not answer.endswith(b"\n"):
                return _end(process)
            self._process = process
            return answer

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            if self._process is not None:
                _end(self._process)
                self._process = None

    def forget(self) -> None:
        """Leave the child to the process that this one was forked from."""
        self._lock = Lock()  # a thread that was not forked may hold the other
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.returncode = 0  # not ours to wait for
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        reason = first_line(error)
        raise ModelError(f"the process that renders chat templates does not start: {reason}") from error


def _end(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    process.communicate()  # waits, and closes the pipes
    return process.returncode


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], *, prompt_only: bool
) -> str:
    """Render messages by a tokenizer's chat template, as transformers does, within bounds.

    The bounds are 5 s of computing, a million characters, and, on Linux, 256 MiB of memory beyond what
    the process that renders starts with.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The chat: a role and a content each.
        prompt_only: Whether the text ends where the model's answer begins.

    Returns:
        The same text as the tokenizer's `apply_chat_template`.

    Raises:
        ModelError: The template fails or exceeds a bound, or the process that renders ended.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(f"this model's chat template fails: {first_line(error)}") from error
    request = {
        "template": template,
        "messages": messages,
        "special_tokens": tokenizer.special_tokens_map,
        "prompt_only": prompt_only,
        "max_cpu_s": _MAX_CPU_S,
    }
    reply = _RENDERER.ask(json.dumps(request).encode() + b"\n")
    answer = json.loads(reply) if isinstance(reply, bytes) else _why_it_ended(reply)
    if "fails" in answer:
        raise ModelError(f"this model's chat template fails: {answer['fails']}")
    if "exceeds" in answer:
        excess = f"{answer['exceeds']} for one prompt"
        raise ModelError(f"this model's chat template {excess}, and is refused: use --format raw")
    return str(answer["text"])


def _why_it_ended(status: int) -> dict[str, str]:
    if status == -signal.SIGPROF:
        return {"exceeds": f"takes more than {_MAX_CPU_S:g} s of computing"}
    raise ModelError(
        f"this model's chat template is not rendered: the process that renders it ended with status "
        f"{status}. Try again, or use --format raw"
    )


def serve() -> None:
    """Answer the requests on standard input, one a line. Runs in the child, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act on
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
    # Importing may print. The import comes before the bounds, too.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["max_cpu_s"])
        answer = _answer(render_jinja_template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer + b"\n")
        answers.flush()


def _bound_memory() -> None:
    """Let this process grow no further than its bound, where the system tells how large it is."""
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # macOS, which keeps no such bound either
        return
    bound = num_pages * resource.getpagesize() + _MAX_GROWTH_MIB * 2**20
    bounds = (bound, *resource.getrlimit(resource.RLIMIT_AS))
    lowest = min(each for each in bounds if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (lowest, lowest))


def _answer(render: Any, request: Mapping[str, Any]) -> bytes:
    try:
        answer = _render(render, request)
    except MemoryError:
        answer = {"exceeds": f"takes more than {_MAX_GROWTH_MIB} MiB of memory"}
    return json.dumps(answer).encode()


def _render(render: Any, request: Mapping[str, Any]) -> dict[str, str]:
    try:
        [text], _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["prompt_only"],
            **request["special_tokens"],
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is code: anything may come
        return {"fails": first_line(error)[:_MAX_REASON_CHARS]}
    if len(text) > _MAX_CHARS:
        return {"exceeds": f"writes more than {_MAX_CHARS:,} characters"}
    return {"text": text}
