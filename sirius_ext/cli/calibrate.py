"""The command `calibrate`."""

from __future__ import annotations

import argparse

from rich.progress import Progress

from ..config import SiriusConfig
from ..decoding.calibrate import calibrate
from ..engine import engine_of, prepare
from .terminal import Console


def run(options: argparse.Namespace, text: str) -> int:
    engine = engine_of(options, SiriusConfig(mode="full"))  # it looks at the full model alone
    if engine.tokenizer is None:
        raise ValueError("model: it has no tokenizer, so a text cannot be read")
    tokens = engine.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    model = prepare(engine.model)
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(f"calibrating with {len(tokens)} tokens")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=len(tokens))
        found = calibrate(model, tokens, options.density, lambda read: bar.update(task, completed=read))
    found.save(options.out)
    read, held_back = found.tokens
    print(
        f"density {options.density}: on the {held_back} of {read} tokens held back the layers keep {min(found.kept):.3f} to "
        f"{max(found.kept):.3f}, {sum(found.kept) / len(found.kept):.3f} on average; written to {options.out}"
    )
    return 0
