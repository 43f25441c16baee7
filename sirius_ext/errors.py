"""How an error is told in a line."""

from __future__ import annotations

import os


def reason(error: BaseException) -> str:
    """An exception's whole message on one line, but for one of many lines, which would be no easier to read."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" " if len(lines) <= 6 else "\n").join(lines) or type(error).__name__
