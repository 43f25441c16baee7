"""How much of a prompt is read, while nothing else can be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ..models.hub import reporting

SECONDS = 1.0  # for which nobody wants to be told


@contextlib.contextmanager
def reading(tokens: int) -> Iterator[Callable[[int], None]]:
    """The progress of a `Sequence` with a prompt of so many tokens, on stderr, if it takes long. Its line has ended when the
    first token comes."""
    with contextlib.ExitStack() as shown:
        report = shown.enter_context(reporting(f"reading the prompt of {tokens} tokens", True, after=SECONDS))

        def progress(read: int) -> None:
            report.show(f"{read} read")
            if read == tokens:
                shown.close()

        yield progress
