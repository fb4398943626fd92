"""Runs a function in a process of its own, so that its peak memory and its threads are its own, too."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from locft.errors import InputError, LocftError

Result = TypeVar("Result")


def run_alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function in a fresh process, and wait for it.

    Args:
        function: A function of a module; it, its arguments and what it returns are pickled.
        arguments: What it takes.

    Returns:
        What it returns.

    Raises:
        LocftError: As raised by the function, or the process ended before it was done.
        RuntimeError: As raised by the function.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    try:
        sender.close()  # the process holds the other end, and its end shall be seen
        try:
            result, error = receiver.recv()
        except EOFError:
            process.join()
            raise LocftError(
                f"a measuring process ended with status {process.exitcode} before it was done"
            ) from None
    finally:
        if process.is_alive():
            process.join(timeout=10)
        process.kill()  # where the wait for it was interrupted
        process.join()
        receiver.close()
    if error is not None:
        raise error
    found: Result = result
    return found


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Standard output is for results, and libraries print to it.
    os.dup2(2, 1)
    answer: tuple[Any, Exception | None]
    try:
        answer = (function(*arguments), None)
    except LocftError as error:
        # An error of the same exit status: some kinds cannot be pickled.
        kind = InputError if isinstance(error, InputError) else LocftError
        answer = (None, kind(str(error)))
    except (MemoryError, RuntimeError) as error:
        answer = (None, error)
    sender.send(answer)
