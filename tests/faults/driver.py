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
from pathlib import Path
from typing import Any

# Loaded before the children are forked, so that what they do is their command alone.
import numpy  # noqa: F401

import locft.cli.patches  # noqa: F401
from locft.cli import parser
from locft.cli.main import main
from locft.config import RunConfig
from locft.errors import LocftError
from locft.evaluation.scoring import AnswerRecord
from locft.patch.format import read_patch
from locft.patch.rewrite import opened_in_place
from locft.publish import reserved, staged_folder
from locft.recipe.run_folder import TRAINING_FILE, save_scored, save_trained
from locft.report.schema import (
    SCHEMA_VERSION,
    Cost,
    DriftInfo,
    EditReport,
    EditsInfo,
    Environment,
    LocationInfo,
    MatrixInfo,
    ModelInfo,
    Protocol,
    TrainingInfo,
)
from locft.types import Edit, Figure, Scores

_EDIT = Edit(id="1", prompt="The sky is", target="green", rephrases=("Above us is",))

_FIGURE = Figure(value=0.5, num=10, low=0.2, high=0.8)

_SCORES = Scores(reliability=_FIGURE, generalization=_FIGURE, locality=_FIGURE, drift=_FIGURE)

_REPORT = EditReport(
    schema_version=SCHEMA_VERSION,
    model=ModelInfo(
        id="some/model",
        revision=None,
        architecture="LlamaForCausalLM",
        num_parameters=40_000,
        num_layers=3,
        dtype="float32",
    ),
    edits=EditsInfo(
        file=None,
        format="python",
        num_edits=1,
        num_rephrases=1,
        num_locality=0,
        num_dropped=0,
        num_warnings=0,
        file_sha256=None,
        sha256="e" * 64,
    ),
    location=LocationInfo(
        name="2.mlp.down",
        layer=2,
        module="mlp.down",
        matrices=(MatrixInfo(tensor="layers.2.w", shape=(32, 64), dtype="BF16", change=0.125),),
        num_parameters=2048,
    ),
    settings={"lr": "auto"},
    training=TrainingInfo(
        lr=0.002,
        batch_size=20,
        epochs_at_most=25,
        epochs=7,
        steps=70,
        final_loss=0.0091,
        stopped_early=True,
    ),
    protocol=Protocol(
        name="free",
        rule="Answers begin right.",
        context="raw",
        max_new_tokens=8,
        stop=("\n",),
        match="prefix",
        meanings={},
    ),
    scores_before=_SCORES,
    scores=_SCORES,
    change={"reliability": _FIGURE},
    drift=DriftInfo(
        text="packaged",
        text_sha256="d" * 64,
        num_tokens=100,
        overall=_FIGURE,
        by_kind={"prose": _FIGURE},
    ),
    cost=Cost(
        load_s=1.0,
        eval_s=1.0,
        wall_s=4.0,
        peak_memory_bytes=1000,
        seconds_per_edit=1.0,
        cache_s=1.0,
        train_s=1.0,
    ),
    patch_bytes=1000,
    environment=Environment(
        locft="0",
        python="3",
        torch="2",
        transformers="5",
        platform="test",
        device="cpu",
        num_threads=1,
    ),
)

_ANSWERS = [
    AnswerRecord(
        protocol="free",
        context="raw",
        edit="1",
        kind="reliability",
        prompt=_EDIT.prompt,
        expected=_EDIT.target,
        before="blue",
        after="green",
        score_before=0.0,
        score_after=1.0,
    )
]


def serve(connection: socket.socket) -> None:
    """Answer requests until the other side hangs up.

    A request holds the words of a command, the folder to run it in, and optionally: `is_stopped`, to
    leave the child stopped before its command until SIGCONT comes; `kill_after_s`; `umask`. The
    answers are lines `{"pid": ...}`, `{"status": ..., "text": ...}` unless the child was killed
    before, and `{"signal": ..., "wall_s": ...}`, the last one.
    """
    parser.build_parser = functools.cache(parser.build_parser)  # a third of a command's time
    parser.build_parser()
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
            save_trained(staging, read_patch(patch), [_EDIT], RunConfig())
        save_scored(folder, _REPORT, _ANSWERS)


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
