"""How far a period gets: the average advance length (AAL) and the effective density of modes as `python -m sirius_ext eval` takes
them, and which share of the neurons enters the sparse model's set after a period.

usage: python bench/advance.py --out FILE [--model MODEL] [--weights q8] [--data FOLDER --items 8,8,8]
    [--modes sirius-c,sirius-c:tree_width=4:accept=match]

The prompts are those of chat, or with a folder of data of tasks, too (`texts.py`), decoded side by side and greedily: nothing is
timed.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import console, header, save
from flags import about
from rich.progress import track
from rich.table import Table
from texts import KINDS, counts, prompts
from variants import draft_of

from sirius_ext.config import SiriusConfig
from sirius_ext.decoding.sparsity import CSparse
from sirius_ext.decoding.stats import PromptStats, Stats
from sirius_ext.engine import Engine, prepare
from sirius_ext.evaluation.batched import Batch, shared_prefix
from sirius_ext.evaluation.modes import config_of
from sirius_ext.loading import DEFAULT_MODEL, WEIGHTS

BASE = SiriusConfig(period=16)
SET = ("accept", "density", "period", "tree_width")  # by a mode, which results say beside its name
MOST_ROWS = 1024  # of a pass, which logits and what neurons add take memory for


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--weights", choices=WEIGHTS, default="plain", help="what they are read as; of q8 S reads four bits")
    parser.add_argument("--modes", default="sirius-c,sirius-c:follow=no", help="with commas between them, as eval's")
    parser.add_argument("--items", default="0,0,20", help=f"prompts of {', '.join(KINDS)}")
    parser.add_argument("--data", type=Path, help="folder of the evaluation's data, where there are prompts of tasks")
    parser.add_argument("--new", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    try:
        options.configs = {mode: config_of(mode, BASE) for mode in options.modes.split(",")}
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
    items = dict(zip(KINDS, options.items))
    asked = {"model": options.model, "weights": options.weights, "items": items, "max_new_tokens": options.new}
    texts = [prompt for _, _, prompt in prompts(engine, options.data, options.items)]

    def keep(results: list[dict], last: bool = False) -> None:
        save(options.out, {"benchmark": "advance", **asked, "results": results}, last)

    results = measure(engine, texts, configs, options.new, keep)
    keep(results, last=True)
    table = Table("mode", "AAL", "effective density", "corrected", "entering")
    forms = {"average_advance_length": ".2f", "effective_density": ".3f", "corrected_fraction": ".1%", "entering": ".1%"}
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
    prefix, results = shared_prefix(prompt.tolist() for prompt in prompts), []
    for mode, config in configs.items():
        settings = {"config": config, "max_new_tokens": new, "do_sample": False}
        requests = [request for prompt in prompts for request in engine.requests(prompt[None], **settings)]
        model = prepare(engine.model)
        nodes = max(request.tree(model).capacity for request in requests)
        texts = Batch(model, prefix).decode(enumerate(requests), max(1, MOST_ROWS // nodes))
        found: list[PromptStats] = []
        with entering() as shares:
            for _, sequence, error in track(texts, mode, len(prompts), console=console):
                if error:
                    raise error
                found.append(sequence.stats)
                result = {"mode": mode, **{name: getattr(config, name) for name in SET}, **summed_up(found, shares)}
                keep([*results, result])
        results.append(result)
    return results


@contextlib.contextmanager
def entering() -> Iterator[list[float]]:
    """Of every set that follows the text meanwhile, by verifications: the share of all neurons that entered it."""
    shares: list[float] = []
    follow = CSparse.follow

    def counted(self: CSparse, *arguments: object) -> None:
        before = self.kept
        follow(self, *arguments)
        shares.append(float((self.kept & ~before).float().mean()))

    CSparse.follow = counted
    try:
        yield shares
    finally:
        CSparse.follow = follow


def summed_up(texts: Sequence[PromptStats], shares: Sequence[float]) -> dict:
    """The metrics of a mode. shares: as `entering` has them."""
    stats = Stats(texts)
    return {
        "texts": len(texts),
        "tokens": stats.tokens,
        "average_advance_length": stats.average_advance_length,
        "effective_density": stats.effective_density,
        "corrected_fraction": stats.corrected_fraction,
        "entering": statistics.mean(shares) if shares else 0.0,
    }


if __name__ == "__main__":
    main()
