"""How an error is told in a line, and a warning where it helps."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

_PASSED_ON_BY = {"sirius_ext", "transformers", "torch"}  # whose lines say nothing to who is warned


def warn(message: str, category: type[Warning]) -> None:
    """A warning that shows the line by which somebody came into this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_ON_BY:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside has the file's name. Python gives it one if the file cannot be opened, but not if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(file)
        raise


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """The whole content of a file, UTF-8."""
    with naming(file), open(file, "w", encoding="utf-8") as opened:
        opened.write(text)


def reason(error: BaseException) -> str:
    """An exception's whole message on one line, but for one of many lines, which would be no easier to read."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" " if len(lines) <= 6 else "\n").join(lines) or type(error).__name__
