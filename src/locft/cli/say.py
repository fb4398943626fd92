"""What the command line says: the one place through which texts of its own reach a terminal."""

import json
import sys
from typing import Any, TextIO

from locft.errors import printable


def say(message: str) -> None:
    """Tell a person something, on stderr."""
    _write(sys.stderr, f"locft: {message}")


def print_lines(text: str) -> None:
    """Print a result on stdout."""
    _write(sys.stdout, text)


def print_json(value: dict[str, Any]) -> None:
    """Print a result on stdout as JSON."""
    _write(sys.stdout, json.dumps(value, indent=2, ensure_ascii=False))


def _write(stream: TextIO, text: str) -> None:
    # Line feeds are ours. Whatever else steers a terminal comes from the name of a file, a model or
    # a tensor, or from what they hold.
    stream.write("".join(f"{printable(line)}\n" for line in text.split("\n")))
