"""The command `generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..config import SiriusConfig
from ..decoding.stats import Stats
from ..engine import encode, engine_of, prepare
from ..errors import write_text
from .options import generator_of
from .reading import reading
from .streamer import KeepingStreamer


def run(options: argparse.Namespace, config: SiriusConfig, sampling: dict[str, Any], prompt: str) -> int:
    engine = engine_of(options, config)
    tokenizer = engine.tokenizer
    inputs = encode(tokenizer, prompt, options.chat)
    assert tokenizer is not None  # or `encode` has raised
    length, context = inputs["input_ids"].shape[1], prepare(engine.model).weights.context
    if length >= context:
        raise ValueError(f"prompt: it has {length} tokens; the model's context holds {context}, one for the answer")
    streamer = KeepingStreamer(tokenizer, stderr=str(options.json) == "-")

    def keep(stats: Stats | None) -> None:
        if options.json is not None:
            record = {
                "model": options.model,
                "dtype": options.dtype,
                "config": dataclasses.asdict(config) | {"thresholds": config.thresholds and str(config.thresholds)},
                "sampling": {**sampling, "seed": getattr(options, "seed", None)},
                "prompt": prompt,
                "text": tokenizer.decode(streamer.tokens, skip_special_tokens=True),
                "token_ids": streamer.tokens,
                "interrupted": stats is None,
                "stats": None if stats is None else stats.to_dict(),
            }
            text = json.dumps(record, indent=1) + "\n"
            if str(options.json) == "-":
                print(text, end="")
            else:
                write_text(options.json, text)

    settings = {
        "max_new_tokens": options.max_new_tokens,
        "stop_strings": options.stop,
        "generator": generator_of(options),
        **sampling,
    }
    try:
        sequence = engine.start(inputs["input_ids"], inputs["attention_mask"], streamer=streamer, **settings)
        with reading(length) as progress:
            stats = Stats([sequence.run(progress)])
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        if isinstance(stop, KeyboardInterrupt):
            streamer.end()  # type: ignore[no-untyped-call]  # prints what it has held back; transformers has no types for it
        keep(None)
        raise
    print(summary(stats), file=sys.stderr)
    for line in filter(None, (stats.advice, stats.abstained)):
        print(f"sirius_ext: {line}", file=sys.stderr)
    keep(stats)
    return 0


def summary(stats: Stats) -> str:
    """One line on a call: tokens, speed, and what the correction did."""
    assert stats.prefill_seconds is not None and stats.decode_seconds is not None  # only texts side by side have no times
    seconds = stats.prefill_seconds + stats.decode_seconds
    parts = [
        f"{stats.tokens} tokens in {seconds:.2f} s (prefill {stats.prefill_seconds:.2f} s), {stats.ms_per_token:.1f} ms/token"
    ]
    if stats.average_advance_length is not None:
        of = "" if stats.period == "auto" else f" of {stats.period}"
        nodes = f", {stats.drafted_nodes:.1f} drafted" if stats.tree_width > 1 else ""
        parts.append(
            f"AAL {stats.average_advance_length:.2f}{of}{nodes}, effective density {stats.effective_density:.3f}, "
            f"corrected {stats.corrected_fraction:.1%}"
        )
    return "; ".join(parts)
