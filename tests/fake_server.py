"""A server on this machine that speaks OpenAI's API, and fails as its script says."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# How long a reply may hang, if its test never ends.
MAX_HANG_S = 20.0


@dataclass(frozen=True)
class Received:
    """A request as it came in."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        text = self.body["messages"][0]["content"] if "messages" in self.body else self.body["prompt"]
        assert isinstance(text, str)
        return text


class FakeServer(ThreadingHTTPServer):
    """Answers each prompt by a function, after the faults of its script, one a request.

    Attributes:
        answer: What it answers to a prompt.
        script: What it does with the next requests instead.
        received: Every request, in the order of arrival.
        is_dead: Whether it hangs up on everything.
        most_at_once: How many requests it worked on at the same time, at most.
    """

    daemon_threads = False  # so that closing waits for them, and none is left at work
    allow_reuse_address = True

    def __init__(self, answer: Callable[[str], str], script: Sequence["Fault"]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.script = list(script)
        self.received: list[Received] = []
        self.is_dead = False
        self.most_at_once = 0
        self.num_at_work = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.received]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    is_at_work = False

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        received = Received(self.path, headers, body)
        with server.lock:
            self.is_at_work = True
            server.received.append(received)
            server.num_at_work += 1
            server.most_at_once = max(server.most_at_once, server.num_at_work)
            fault = hang_up if server.is_dead else server.script.pop(0) if server.script else None
        try:
            if fault is not None:
                fault(self)
            else:
                text = server.answer(received.prompt)
                choice = {"message": {"content": text}} if "messages" in body else {"text": text}
                self.reply(200, json.dumps({"choices": [choice]}).encode())
        finally:
            self.leave()

    def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.leave()  # before the client can send its next request
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def leave(self) -> None:
        with self.server.lock:
            self.server.num_at_work -= self.is_at_work
            self.is_at_work = False

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


Fault = Callable[[_Handler], None]


def replies(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Fault:
    """Reply with anything."""
    return lambda handler: handler.reply(status, body, headers)


def hang_up(handler: _Handler) -> None:
    """Close the connection without a reply."""
    handler.close_connection = True


def hang(handler: _Handler) -> None:
    """Reply nothing for as long as the test takes."""
    handler.server.closing.wait(MAX_HANG_S)
    handler.close_connection = True


def drip(handler: _Handler) -> None:
    """Reply a byte at a time, without end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    end = time.monotonic() + MAX_HANG_S
    while time.monotonic() < end and not handler.server.closing.wait(0.02):
        handler.wfile.write(b"1\r\n \r\n")  # raises once the client has gone


@contextmanager
def serving(
    answer: Callable[[str], str] = lambda prompt: f"Answer to {prompt}", *script: Fault
) -> Iterator[FakeServer]:
    """Run a server while the body runs; faults come first, in their order."""
    server = FakeServer(answer, script)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
