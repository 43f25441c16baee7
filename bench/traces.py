"""What S proposes at every place of F's texts, how sure it is, and whether F accepts it: what `period="auto"` was made from, and
what tests/test_period.py decodes again on paper.

usage: python bench/traces.py --data FOLDER --out FILE [--model MODEL] [--weights q8] [--densities 0.5,1]

F decodes every prompt alone, greedily. Then S and F read the text in windows of 16 tokens, as after a draft that was accepted
whole: S's set is chosen by the prompt and follows after every window.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from common import console, header, machine
from flags import about
from rich.progress import track
from texts import KINDS, counts, prompts
from variants import draft_of

from sirius_ext.config import SiriusConfig
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.sequence import Request, start
from sirius_ext.decoding.sparsity import CSparse, sparsity_of
from sirius_ext.engine import Engine, prepare
from sirius_ext.loading import DEFAULT_MODEL, WEIGHTS
from sirius_ext.runtime.cache import Cache
from sirius_ext.runtime.model import Model
from sirius_ext.runtime.passes import Pass

WINDOW = 16
DENSITIES = (0.5, 0.4)
THRESHOLD, TEMPERATURE = SiriusConfig.threshold, SiriusConfig.score_temperature


@torch.no_grad()
def record(model: Model, cache: Cache, prompt: torch.Tensor, text: list[int], densities: Sequence[float]) -> list[dict]:
    """For each density, of what S proposes after every token of F's text but the last: the token, S's confidence in it in
    thousandths, and whether F accepts it by each rule, "1" or "0". cache: with room for the text."""
    cache.rewind(0)
    drafts_by = draft_of("q8" if model.weights.packed else "plain")
    sets = [sparsity_of(SiriusConfig(density=density, draft_weights=drafts_by), model.weights) for density in densities]
    drive(model, cache, read(cache, prompt, sets[0]))
    for other in sets[1:]:
        other.usage.absorb(sets[0].usage)  # of the same tokens
    drafts = [{"proposed": [], "confidence": [], "match": "", "threshold": ""} for _ in sets]
    for begin in range(0, len(text) - 1, WINDOW):
        tokens = torch.tensor(text[begin : min(begin + WINDOW, len(text) - 1)], dtype=torch.int32)
        rows, slot = len(tokens), len(prompt) + begin
        proposals = []
        for sparsity in sets:
            logits = model.compute(cache, Pass.chain(tokens, slot, sparsity)).logits
            proposals.append(torch.softmax(logits / TEMPERATURE, -1).max(-1))  # at once: the next pass overwrites the logits
        full = model.compute(cache, Pass.chain(tokens, slot, keep_z=True))
        likelihoods, best = torch.softmax(full.logits / TEMPERATURE, -1), full.logits.argmax(-1)
        for draft, (confidences, proposed) in zip(drafts, proposals):
            draft["proposed"] += proposed.tolist()
            draft["confidence"] += [round(1000 * confidence) for confidence in confidences.tolist()]
            draft["match"] += _digits(proposed == best)
            draft["threshold"] += _digits(likelihoods.gather(1, proposed[:, None])[:, 0] >= THRESHOLD)
        for sparsity in sets:
            assert isinstance(sparsity, CSparse) and full.z is not None
            if sparsity.follows:
                sparsity.follow(full.z, list(range(1, rows)))
    return drafts


def _digits(flags: torch.Tensor) -> str:
    return "".join(str(int(flag)) for flag in flags.tolist())


def shares(texts: list[dict], densities: Sequence[float]) -> None:
    """Print which share of S's tokens F accepts, by kind of text, density and rule."""
    for kind in dict.fromkeys(text["task"] for text in texts):
        for index, density in enumerate(densities):
            drafts = [text["drafts"][index] for text in texts if text["task"] == kind]
            found = {rule: "".join(draft[rule] for draft in drafts) for rule in ("match", "threshold")}
            accepted = ", ".join(f"{rule} {flags.count('1') / len(flags):.3f}" for rule, flags in found.items())
            console.print(f"{kind:<10} density {density}  {len(found['match']):>5} tokens  {accepted}")


def write(path: Path, about: dict, texts: list[dict]) -> None:
    """A text a line."""
    lines = ",\n".join(json.dumps(text, separators=(",", ":")) for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(about)[:-1]}, "texts": [\n{lines}\n]}}\n')


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id, a folder or a GGUF file; the default model without one")
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation's data, with gsm8k and humaneval")
    parser.add_argument("--new", type=int, default=96, help="tokens of a text, at most")
    parser.add_argument("--items", default="20,20,24", help=f"prompts of {', '.join(KINDS)}")
    parser.add_argument("--weights", choices=WEIGHTS, default="plain", help="what they are read as; of q8 S reads four bits")
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)), help="of S, with commas between them")
    parser.add_argument("--out", type=Path, required=True, help="file to write, anew after every text")
    options = parser.parse_args(arguments)
    try:
        options.items = counts(options.items)
    except ValueError as error:
        parser.error(str(error))
    try:
        options.densities = [SiriusConfig(density=float(density)).density for density in options.densities.split(",")]
    except ValueError as error:
        parser.error(f"densities: expected numbers from 0 to 1 with commas between them ({error})")
    if options.new < 2:
        parser.error(f"new: expected at least 2, got {options.new}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    header()
    config = SiriusConfig(draft_weights=draft_of(options.weights))
    engine = Engine.from_pretrained(options.model, config, device="cpu", weights=options.weights)
    model, ends = prepare(engine.model), engine.model.generation_config.eos_token_id
    eos = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    about = {
        "machine": machine(),
        "benchmark": "traces",
        "model": options.model or DEFAULT_MODEL,
        "dtype": str(model.weights.dtype).removeprefix("torch."),
        "weights": options.weights,
        "window": WINDOW,
        "score_temperature": TEMPERATURE,
        "threshold": THRESHOLD,
        "sparsity": "csparse, following",
        "densities": list(options.densities),
    }
    cache, texts = model.new_cache(), []
    for kind, name, prompt in track(list(prompts(engine, options.data, options.items)), "recording", console=console):
        if len(prompt) + options.new > model.weights.context:
            continue
        sequence = start(model, Request(prompt, SiriusConfig(mode="full"), options.new, eos=eos))
        sequence.run()
        if len(sequence.tokens) < 2:  # nothing for S to propose
            continue
        model.reserve(cache, len(prompt) + options.new, WINDOW)
        drafts = record(model, cache, prompt, sequence.tokens, options.densities)
        said = {"prompt": prompt.tolist(), "text": sequence.tokens}
        texts.append({"task": kind, "id": name, **said, "drafts": drafts})
        write(options.out, about, texts)
    shares(texts, options.densities)


if __name__ == "__main__":
    main()
