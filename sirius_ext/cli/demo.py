"""The demo: the same prompts through `transformers`' own generate and through this package, side by side."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationMixin

from ..config import GREEDY, SiriusConfig
from ..decoding.stats import PromptStats, Stats
from ..engine import Engine, encode, engine_of, prepare, release
from ..evaluation.results import show_table
from ..kernels.threads import cpu_threads
from ..loading import DEFAULT_MODEL
from .streamer import KeepingStreamer
from .terminal import Console

LARGER = "Qwen/Qwen2.5-Coder-1.5B-Instruct"  # of which the README has the speed
PROMPTS = {
    "a summary": (
        "Summarize in two sentences: The honeybee is a flying insect known for its role in pollination and for making honey. A "
        "colony has one queen, who lays up to two thousand eggs a day, some hundred drones, and tens of thousands of workers. "
        "Workers clean cells, feed larvae, build comb, guard the entrance and, in the last weeks of their lives, gather nectar, "
        "pollen and water within three kilometres of the hive. They tell each other where the flowers are by dancing."
    ),
    "arithmetic": (
        "A box holds 12 pencils. Anna buys 3 boxes and gives 7 pencils to her brother. How many are left? Explain step by step."
    ),
    "code": "Write a Python function that returns the n-th Fibonacci number using a loop, with a docstring.",
}


@dataclass
class Row:
    """One way to decode, and what came of it prompt by prompt."""

    name: str
    engine: Engine
    config: SiriusConfig | None  # None is transformers
    texts: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0  # from the first token to the last
    stats: list[PromptStats] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """None where no text has a second token, or they came all at once: nothing was timed then."""
        return sum(len(text) - 1 for text in self.texts) / self.seconds if self.seconds else None

    def speed_to(self, other: Row) -> float | None:
        mine, its = self.tokens_per_second, other.tokens_per_second
        return mine / its if mine is not None and its else None


def run(options: argparse.Namespace, config: SiriusConfig) -> int:
    packed = engine_of(options, config) if options.weights != "plain" else None
    # Beside packed weights plain ones are for the full model alone.
    alone = config if packed is None else replace(config, mode="full")
    plain = engine_of(argparse.Namespace(**{**vars(options), "weights": "plain"}), alone)
    return compare(plain, packed, options.model, options.max_new_tokens)


def compare(engine: Engine, packed: Engine | None, model_name: str, max_new_tokens: int) -> int:
    """Decode the prompts every way, streaming, and end with a table. Returns 1 if `match` and Full differ, else 0.

    packed: the same model in eight or four bits; if there is one, Sirius decodes with it, and `engine` is there to compare with.
    """
    console = Console(soft_wrap=True, highlight=False)
    fast = packed or engine
    base = fast.config
    full = [Row("Full", fast, replace(base, mode="full"))]
    if packed is not None:
        bits = 4 if prepare(packed.model).weights.layers[0].gate.format.four_bits else 8
        full = [Row("Full, 16 bits", engine, replace(base, mode="full")), Row(f"Full, {bits} bits", packed, full[0].config)]
    corrected = [Row(f"Sirius, {rule}", fast, replace(base, accept=rule)) for rule in ("threshold", "match")]
    rows = [Row("transformers", engine, None), *full, Row("CSparse", fast, replace(base, mode="sparse")), *corrected]
    chat = engine.tokenizer is not None and engine.tokenizer.chat_template is not None
    prompts = {title: encode(engine.tokenizer, prompt, chat) for title, prompt in PROMPTS.items()}
    assert engine.tokenizer is not None  # or `encode` has raised
    for row in rows:
        _decode(row, next(iter(prompts.values())), 2, None)
    # Every prompt by every row in turn: what else the machine does meanwhile then slows all of them.
    for title, inputs in prompts.items():
        for row in rows:
            console.print(f"\n[bold]{row.name}[/bold]: {title}")
            streamer = KeepingStreamer(engine.tokenizer)
            stats = _decode(row, inputs, max_new_tokens, streamer)
            row.texts.append(streamer.tokens)
            row.seconds += streamer.seconds
            row.stats += stats.prompts if stats else []
    equal = corrected[-1].texts == full[-1].texts
    console.print()
    _show_table(f"{model_name}, {engine.model.dtype}".replace("torch.", ""), base, rows, full[-1], console)
    for row in corrected:
        if (abstained := Stats(row.stats).abstained) is not None:
            console.print(f"{row.name}: {abstained}.")
    console.print(
        "Sirius under `match` gave exactly Full's text."
        if equal
        else "[bold red]Sirius under `match` differs from Full's text: a fault, please report it."
    )
    if model_name == DEFAULT_MODEL and (advice := _advice(corrected, full[-1])):
        console.print(advice)
    return 0 if equal else 1


def _decode(row: Row, inputs: dict[str, torch.Tensor], max_new_tokens: int, streamer: KeepingStreamer | None) -> Stats | None:
    """What was counted, which is nothing of transformers. That has the weights as it loaded them."""
    settings: dict[str, Any] = dict(inputs, max_new_tokens=max_new_tokens, streamer=streamer, **GREEDY)
    if row.config is not None:
        return row.engine.generate(config=row.config, **settings).stats
    model = row.engine.model
    assert isinstance(model, GenerationMixin)
    release(model)
    model.generate(**settings)
    return None


def _show_table(model: str, config: SiriusConfig, rows: list[Row], full: Row, console: Console) -> None:
    """full: what the others are compared with."""
    transformers = rows[0]
    names = ("tokens/s", "vs hf", "vs Full", "AAL", "eff. dens.", "corrected", "= Full")
    lines = []
    for row in rows:
        advance = density = corrected = None
        if row.stats:
            stats = Stats(row.stats)
            advance, density = stats.average_advance_length, stats.density
            if advance is not None:
                density, corrected = stats.effective_density, stats.corrected_fraction
        lines.append(
            (
                _shown(row.tokens_per_second, ".1f"),
                _shown(row.speed_to(transformers), ".2f"),
                _shown(row.speed_to(full), ".2f"),
                _shown(advance, ".2f"),
                _shown(density, ".3f"),
                _shown(corrected, ".1%"),
                f"{_kept(full.texts, row.texts):.0%}",
            )
        )
    title = f"{model}, {cpu_threads()} threads, density {config.density}, period {config.period}"
    caption = "vs hf: transformers' speed is 1. eff. dens.: weights read per token. = Full: share of Full's text."
    columns = {name: list(cells) for name, cells in zip(names, zip(*lines))}
    show_table(title, caption, [row.name for row in rows], columns, console)


def _advice(corrected: list[Row], full: Row) -> str | None:
    """Where to look for what the demo's own model has not shown, if it has not."""
    speeds = [speed for row in corrected if (speed := row.speed_to(full)) is not None]
    if not speeds or max(speeds) >= 1:
        return None
    return (
        "Sirius was slower than Full here: this model is small, and a sparse model has little to skip. A larger one: "
        f"make demo MODEL={LARGER}, or --model."
    )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _kept(full: list[list[int]], texts: list[list[int]]) -> float:
    """Share of Full's tokens that the other text has in the same order."""
    matchers = [difflib.SequenceMatcher(None, a, b, autojunk=False) for a, b in zip(full, texts)]
    return sum(block.size for matcher in matchers for block in matcher.get_matching_blocks()) / sum(map(len, full))
