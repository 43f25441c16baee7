"""How far a period gets on chat prompts, which no task of the evaluation has: the average advance length (AAL) and the effective
density of modes as `python -m sirius_ext eval` takes them.

usage: python bench/advance.py --out FILE [--model MODEL] [--weights q8] [--modes sirius-c,sirius-c:follow=no]

The prompts are those of `prompts.py`, through the model's chat template, decoded side by side and greedily: nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common import console, header, save
from prompts import CHAT
from rich.progress import track
from rich.table import Table
from variants import draft_of

from sirius_ext.config import SiriusConfig
from sirius_ext.decoding.sequence import Request
from sirius_ext.decoding.stats import PromptStats, Stats
from sirius_ext.engine import Engine, encode, prepare
from sirius_ext.evaluation.batched import Batch, shared_prefix
from sirius_ext.evaluation.runner import config_of
from sirius_ext.models.hub import DEFAULT_MODEL, WEIGHTS

BASE = SiriusConfig(period=16)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--weights", choices=WEIGHTS, default="plain", help="what they are read as; of q8 S reads four bits")
    parser.add_argument("--modes", default="sirius-c,sirius-c:follow=no", help="with commas between them, as eval's")
    parser.add_argument("--items", type=int, default=20, help="prompts")
    parser.add_argument("--new", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    try:
        options.configs = {mode: config_of(mode, BASE) for mode in options.modes.split(",")}
    except ValueError as error:
        parser.error(f"modes: {error}")
    if any(config.mode != "sirius" for config in options.configs.values()):
        parser.error(f"modes: expected such as draft and verify, sirius-c, sirius-f or sirius-cascade, got {options.modes}")
    if not 1 <= options.items <= len(CHAT):
        parser.error(f"items: expected 1 to {len(CHAT)}, got {options.items}")
    if options.new < 1:
        parser.error(f"new: expected at least 1, got {options.new}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    header()
    drafts_by = draft_of(options.weights)
    engine = Engine.from_pretrained(options.model, SiriusConfig(draft_weights=drafts_by), device="cpu", weights=options.weights)
    configs = {mode: replace(config, draft_weights=drafts_by) for mode, config in options.configs.items()}
    results = measure(engine, CHAT[: options.items], configs, options.new)
    table = Table("mode", "AAL", "effective density", "corrected")
    forms = {"average_advance_length": ".2f", "effective_density": ".3f", "corrected_fraction": ".1%"}
    for result in results:  # a text that is shorter than a period has none of them
        cells = ["" if result[name] is None else format(result[name], form) for name, form in forms.items()]
        table.add_row(result["mode"], *cells)
    console.print(table)
    asked = {"model": options.model, "weights": options.weights, "period": BASE.period, "max_new_tokens": options.new}
    save(options.out, {"benchmark": "advance, chat prompts", **asked, "results": results})


def measure(engine: Engine, messages: Sequence[str], configs: Mapping[str, SiriusConfig], new: int) -> list[dict]:
    """Of every mode the metrics pooled over the texts."""
    prompts = [encode(engine.tokenizer, text, chat=True) for text in messages]
    prefix = shared_prefix(prompt["input_ids"][0].tolist() for prompt in prompts)

    def requests() -> Iterator[tuple[str, Request]]:
        for prompt in prompts:
            for mode, config in configs.items():
                (request,) = engine.requests(**prompt, config=config, max_new_tokens=new, do_sample=False)
                yield mode, request

    count = len(prompts) * len(configs)
    texts = Batch(prepare(engine.model), prefix)
    found: dict[str, list[PromptStats]] = {mode: [] for mode in configs}
    for mode, sequence, error in track(texts.decode(requests(), count), "texts", count, console=console):
        if error:
            raise error
        found[mode].append(sequence.stats)
    pooled = {mode: Stats(each) for mode, each in found.items()}
    return [
        {
            "mode": mode,
            "texts": len(stats.prompts),
            "tokens": stats.tokens,
            "average_advance_length": stats.average_advance_length,
            "effective_density": stats.effective_density,
            "corrected_fraction": stats.corrected_fraction,
        }
        for mode, stats in pooled.items()
    ]


if __name__ == "__main__":
    main()
