"""Runs locft's commands in forked children, which start at once and can be traced, failed and killed.

Start it as a script with a socket as its standard input; each request is a line of JSON, and each
answer, too. Nothing here needs torch, and nothing but the command itself writes to a file: what a
child has to say goes through the socket.
"""

import functools
import gc
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Loaded before the children are forked, so that what they do is their command alone.
import numpy  # noqa: F401
from reports import fit_report, make_answers, make_passages, make_report

import locft.cli.patches  # noqa: F401
from locft.cli import parser
from locft.cli.main import main
from locft.config import RunConfig
from locft.data.augment import Example
from locft.errors import LocftError
from locft.patch.format import read_patch
from locft.patch.rewrite import opened_in_place
from locft.publish import reserved, staged_folder
from locft.recipe import run_folder
from locft.recipe.run_folder import TRAINING_FILE, Run, draw, save_scored, save_trained
from locft.types import Edit

_RUN = Run(
    Path(),
    fit_report(make_report(), make_answers(), make_passages()),
    make_answers(),
    make_passages(),
)

_EXAMPLE = Example(kind="prefix", prompt="It rained. The sky is", format="raw")
_EDIT = Edit(id="1", prompt="The sky is", target="green", rephrases=("Above us is",))


def serve(connection: socket.socket) -> None:
    """Answer requests until the other side hangs up.

    A request holds the words of a command, the folder to run it in, and optionally: `is_stopped`, to
    leave the child stopped before its command until SIGCONT comes; `kill_after_s`; `umask`. The
    answers are lines `{"pid": ...}`, `{"status": ..., "text": ...}` unless the child was killed
    before, and `{"signal": ..., "wall_s": ...}`, the last one.
    """
    parser.build_parser = functools.cache(parser.build_parser)  # a third of a command's time
    parser.build_parser()
    _draw_beforehand()
    gc.disable()
    gc.freeze()
    for line in connection.makefile("r"):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run_child(connection, request)
        os.waitpid(pid, os.WUNTRACED)
        _tell(connection, pid=pid)
        start = time.perf_counter()
        if not request.get("is_stopped"):
            os.kill(pid, signal.SIGCONT)
        delay = request.get("kill_after_s")
        if delay is not None:
            time.sleep(max(0.0, start + delay - time.perf_counter()))
            os.kill(pid, signal.SIGKILL)
        _, code = os.waitpid(pid, 0)
        _tell(connection, signal=os.WTERMSIG(code), wall_s=time.perf_counter() - start)


def _draw_beforehand() -> None:
    """Draw the report once, for all children: it takes long, and fills matplotlib's cache of fonts."""
    page = _RUN.page()
    files = draw(page)
    vars(run_folder).update(describe_edit=lambda *_: page, draw=lambda _: files)


def _tell(connection: socket.socket, **fields: object) -> None:
    connection.sendall(json.dumps(fields).encode() + b"\n")


def _run_child(connection: socket.socket, request: dict[str, Any]) -> None:
    status, text = -1, io.StringIO()
    try:
        os.chdir(request["folder"])
        os.umask(request.get("umask", 0o022))
        words = request["words"]
        sys.argv = ["locft", *words]
        sys.stdout = sys.stderr = text
        os.kill(os.getpid(), signal.SIGSTOP)
        command = _COMMANDS.get(words[0])
        status = main(words) if command is None else _run(command, connection, words[1:])
    except BaseException:
        traceback.print_exc(file=text)
    finally:
        _tell(connection, status=status, text=text.getvalue())
        os._exit(0)


def _run(command: Callable[..., None], connection: socket.socket, words: list[str]) -> int:
    """Run what is no command of its own, with errors as the command line tells them."""
    try:
        if command is _hold:
            command(connection, *words)
        else:
            command(*words)
    except (LocftError, OSError) as error:
        sys.stderr.write(f"locft: error: {error}\n")
        return getattr(error, "exit_status", LocftError.exit_status)
    return 0


def _save_edit(run: str, patch: str) -> None:
    """Save what an edit leaves, in the order of `recipe/edit.py`."""
    folder = Path(run)
    with reserved(folder):
        with staged_folder(folder) as staging:
            with (staging / TRAINING_FILE).open("w", encoding="utf-8") as log:
                for epoch in range(3):
                    log.write(json.dumps({"epoch": epoch}) + "\n")
                    log.flush()
            save_trained(staging, read_patch(patch), [_EDIT], [[_EXAMPLE]], RunConfig())
        save_scored(replace(_RUN, folder=folder))


def _recover(folder: str) -> None:
    """Do what every writer in place does first."""
    with opened_in_place(Path(folder)):
        pass


def _sweep(target: str) -> None:
    """Do what every writer of a new folder does first."""
    with reserved(Path(target)):
        pass


def _hold(connection: socket.socket, how: str, target: str) -> None:
    """Hold a writer's lock, with something half-written, until a file `release` appears."""
    folder = Path(target)
    if how == "in-place":
        with opened_in_place(folder):
            folder.joinpath(".locft-01234567-model.safetensors").write_bytes(b"half")
            _wait(connection)
    elif how == "copy":
        with staged_folder(folder) as staging:
            (staging / "half").write_bytes(b"half")
            _wait(connection)
    else:
        with reserved(folder), staged_folder(folder) as staging:  # as an edit does
            (staging / "half").write_bytes(b"half")
            _wait(connection)


def _wait(connection: socket.socket) -> None:
    _tell(connection, ready=True)
    end = time.monotonic() + 60  # whoever asked may be dead
    while not Path("release").exists() and time.monotonic() < end:
        time.sleep(0.002)


def _repeat(start: str, count: str, *words: str) -> None:
    """Run a command again and again from an appointed time on; the outcomes go to standard error.

    Args:
        start: The time, in seconds of the system's monotonic clock.
        count: How often, each time in its own folder: `0`, `1` and so on.
        words: The command.
    """
    home = Path.cwd()
    for number in range(int(count)):
        os.chdir(home / str(number))
        # Each attempt at the same time in all processes, unless the one before took too long.
        time.sleep(max(0.0, float(start) + 0.02 * number - time.monotonic()))
        sys.stderr.write(f"status {main(list(words))}\n")


_COMMANDS: dict[str, Callable[..., None]] = {
    "save-edit": _save_edit,
    "recover": _recover,
    "sweep": _sweep,
    "hold": _hold,
    "repeat": _repeat,
}


if __name__ == "__main__":
    serve(socket.socket(fileno=0))
