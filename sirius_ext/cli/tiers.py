"""The command `prepare`."""

from __future__ import annotations

import argparse
import shlex

from ..errors import reason
from ..models.hub import prepare_tiers
from ..models.tier_files import JOURNAL, in_bytes
from .arguments import Commands, not_empty, output_folder
from .options import add_weights_options


def add(commands: Commands) -> None:
    prepare = commands.add_parser("prepare", help="files of a model that is larger than the memory")
    prepare.set_defaults(command=run, parser=prepare)
    prepare.description = (
        "Writes a folder that is used as a model whose MLPs stay on the disk. If it is stopped, the same command goes on from "
        "where it was; a folder that is whole is checked, and mended if it is damaged."
    )
    purpose = "Hugging Face id, local folder or GGUF file"
    prepare.add_argument("model", metavar="MODEL", type=not_empty, help=purpose)
    purpose = "a new or an empty one, or one that this command has made of the same model"
    prepare.add_argument("--out", metavar="FOLDER", type=output_folder, required=True, help=purpose)
    add_weights_options(prepare)


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
