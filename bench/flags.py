"""What the command lines of all benchmarks need."""

from __future__ import annotations

import argparse


def about(docstring: str | None) -> str:
    """Of a script, for its --help: the first paragraph of what its docstring says."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def positive(text: str) -> int:
    """Of a flag: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer, at least 1, got {text!r}")
    return int(text)
