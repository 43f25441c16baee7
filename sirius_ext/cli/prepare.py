"""The command `prepare`."""

from __future__ import annotations

import argparse
import shlex

from ..errors import reason
from ..models.hub import prepare_tiers
from ..models.tier_files import JOURNAL, in_bytes


def run(options: argparse.Namespace) -> int:
    try:
        files = prepare_tiers(options.model, options.out, options.dtype, options.weights)
    except FileExistsError as error:
        raise ValueError(f"out: {reason(error)}") from error
    except KeyboardInterrupt as stop:
        if not (options.out / JOURNAL).is_file():
            raise
        raise KeyboardInterrupt(f"what is done stays in {options.out}, and the same command goes on from there") from stop
    print(
        f"{options.out}: {in_bytes(files.fast_bytes())} for the memory, {in_bytes(files.size)} of neurons that stay on the disk; "
        f"use it as --model {shlex.quote(str(options.out))}"
    )
    return 0
