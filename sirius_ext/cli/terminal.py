"""Standard output and error of a command: readers that leave early, characters that cannot be written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import rich.console

from ..errors import naming

BROKEN_PIPE = 141  # what shells show for a process that SIGPIPE has ended


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process with status 1."""
        raise BrokenPipeError


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """What is printed inside reaches its reader before the end, or raises here: at the interpreter's end it would be a message
    that cannot be caught."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the beginning: then print takes the other one
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no text is lost to a terminal that knows fewer characters
    try:
        yield
    finally:
        with naming("standard output"):
            sys.stdout.flush()


def drop_output() -> None:
    """What could not be written to stdout and stderr, and what is written to them from now on, goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
