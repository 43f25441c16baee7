"""How far a period gets: the average advance length (AAL) and the effective density of modes as `python -m sirius_ext eval` takes
them.

usage: python bench/advance.py --out FILE [--model MODEL] [--weights q8] [--modes sirius-c,sirius-c:tree_width=4] [--accept match]
    [--data FOLDER --items 8,8,8]

The prompts are those of chat, or with a folder of data of tasks, too (`texts.py`), decoded side by side and greedily: nothing is
timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import console, header, save
from rich.progress import track
from rich.table import Table
from texts import KINDS, counts, prompts
from variants import draft_of

from sirius_ext.config import ACCEPT_RULES, SiriusConfig
from sirius_ext.decoding.sequence import Request
from sirius_ext.decoding.stats import PromptStats, Stats
from sirius_ext.engine import Engine, prepare
from sirius_ext.evaluation.batched import Batch, shared_prefix
from sirius_ext.evaluation.runner import config_of
from sirius_ext.models.hub import DEFAULT_MODEL, WEIGHTS

PERIOD = 16
MOST_ROWS = 1024  # of a pass, which logits and what neurons add take memory for


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--weights", choices=WEIGHTS, default="plain", help="what they are read as; of q8 S reads four bits")
    parser.add_argument("--modes", default="sirius-c,sirius-c:follow=no", help="with commas between them, as eval's")
    parser.add_argument("--accept", choices=[rule for rule in ACCEPT_RULES if rule != "sample"], default=SiriusConfig.accept)
    parser.add_argument("--items", default="0,0,20", help=f"prompts of {', '.join(KINDS)}")
    parser.add_argument("--data", type=Path, help="folder of the evaluation's data, where there are prompts of tasks")
    parser.add_argument("--new", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    try:
        base = SiriusConfig(period=PERIOD, accept=options.accept)
        options.configs = {mode: config_of(mode, base) for mode in options.modes.split(",")}
    except ValueError as error:
        parser.error(f"modes: {error}")
    if any(config.mode != "sirius" for config in options.configs.values()):
        parser.error(f"modes: expected such as draft and verify, sirius-c, sirius-f or sirius-cascade, got {options.modes}")
    try:
        options.items = counts(options.items)
    except ValueError as error:
        parser.error(str(error))
    if sum(options.items[:-1]) and options.data is None:
        parser.error("data: prompts of tasks need the folder of their data")
    if options.new < 1:
        parser.error(f"new: expected at least 1, got {options.new}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    header()
    drafts_by = draft_of(options.weights)
    engine = Engine.from_pretrained(options.model, SiriusConfig(draft_weights=drafts_by), device="cpu", weights=options.weights)
    configs = {mode: replace(config, draft_weights=drafts_by) for mode, config in options.configs.items()}
    asked = {"model": options.model, "weights": options.weights, "accept": options.accept, "period": PERIOD}
    asked |= {"items": dict(zip(KINDS, options.items)), "max_new_tokens": options.new}
    texts = [prompt for _, _, prompt in prompts(engine, options.data, options.items)]

    def keep(results: list[dict], last: bool = False) -> None:
        save(options.out, {"benchmark": "advance", **asked, "results": results}, last)

    results = measure(engine, texts, configs, options.new, keep)
    keep(results, last=True)
    table = Table("mode", "AAL", "effective density", "corrected")
    forms = {"average_advance_length": ".2f", "effective_density": ".3f", "corrected_fraction": ".1%"}
    for result in results:  # a text that is shorter than a period has none of them
        cells = ["" if result[name] is None else format(result[name], form) for name, form in forms.items()]
        table.add_row(result["mode"], *cells)
    console.print(table)


def measure(
    engine: Engine,
    prompts: Sequence[torch.Tensor],
    configs: Mapping[str, SiriusConfig],
    new: int,
    keep: Callable[[list[dict]], None] = lambda _: None,
) -> list[dict]:
    """Of every mode the metrics pooled over the texts. keep: gets them anew after every text."""
    prefix = shared_prefix(prompt.tolist() for prompt in prompts)

    def requests() -> Iterator[tuple[str, Request]]:
        for prompt in prompts:
            for mode, config in configs.items():
                (request,) = engine.requests(prompt[None], config=config, max_new_tokens=new, do_sample=False)
                yield mode, request

    count = len(prompts) * len(configs)
    texts = Batch(prepare(engine.model), prefix)
    found: dict[str, list[PromptStats]] = {mode: [] for mode in configs}
    longest = max(1 + (config.longest_period - 1) * config.tree_width for config in configs.values())
    live = max(1, MOST_ROWS // longest)
    for mode, sequence, error in track(texts.decode(requests(), live), "texts", count, console=console):
        if error:
            raise error
        found[mode].append(sequence.stats)
        keep(summed_up(found))
    return summed_up(found)


def summed_up(found: Mapping[str, Sequence[PromptStats]]) -> list[dict]:
    """The metrics of every mode."""
    pooled = {mode: Stats(each) for mode, each in found.items() if each}
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
