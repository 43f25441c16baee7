"""What fewer bits cost: how far the next token's distribution is from that of the weights as they come, and perplexity.

usage: python bench/quality.py --data FOLDER --out FILE [--model MODEL] [--q4 MODEL] [--tokens N]

Texts are questions of gsm8k and prompts of humaneval. F with plain weights, F in eight bits and in four, and the sparse models
with some of the neurons (chosen by the text's first half, as by a prompt) read the second half in windows of 16. Divergence is
KL(plain || other) in nats, averaged over the tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from common import console, header, save
from flags import about, positive
from rich.progress import track
from rich.table import Table
from variants import draft_of

from sirius_ext.config import SiriusConfig
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.sparsity import CSparse, sparsity_of
from sirius_ext.engine import Engine, Tokenizer, prepare
from sirius_ext.evaluation.tasks import load_task
from sirius_ext.loading import DEFAULT_MODEL
from sirius_ext.runtime.model import Model
from sirius_ext.runtime.passes import Pass

WINDOW = 16
LENGTH = 512  # tokens of a text at most


@dataclasses.dataclass
class Reader:
    """A way to read a text, and what was counted of it so far."""

    name: str
    model: Model
    config: SiriusConfig | None  # of a sparse model
    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def count(self, logits: torch.Tensor, expected: torch.Tensor, following: torch.Tensor) -> None:
        """logits, expected: float32 [m, V], of this reader and of the plain full model. following: int64 [m], the text's
        tokens."""
        own, plain = logits.log_softmax(-1), expected.log_softmax(-1)
        self.tokens += len(own)
        self.loss -= float(own.gather(1, following[:, None]).sum())
        self.divergence += float((plain.exp() * (plain - own)).sum())
        self.agreed += int((own.argmax(-1) == plain.argmax(-1)).sum())


def texts(data: Path, tokenizer: Tokenizer, tokens: int) -> Iterator[torch.Tensor]:
    """Questions of both tasks in turns, until the second halves of the texts have so many tokens: int64 [t]."""
    left = {name: [item.question for item in load_task(name, data)[1]] for name in ("gsm8k", "humaneval")}
    read = 0
    while read < tokens and any(left.values()):
        for questions in left.values():
            ids, taken = torch.empty(0, dtype=torch.int64), 0
            while len(ids) < LENGTH and taken < len(questions):
                taken += 1
                ids = tokenizer("\n\n".join(questions[:taken]), return_tensors="pt").input_ids[0, :LENGTH]
            del questions[:taken]
            if len(ids) > 2:
                yield ids
                read += len(ids) - len(ids) // 2 - 1


@torch.no_grad()
def measure(readers: list[Reader], ids: torch.Tensor) -> None:
    """All readers read the second half of a text. The first one is the plain full model."""
    half = len(ids) // 2
    models = {id(reader.model): reader.model for reader in readers}
    caches, sets = {}, {}
    for key, model in models.items():
        cache = caches[key] = model.new_cache()
        model.reserve(cache, len(ids), WINDOW)
        usage = CSparse(len(model.weights.layers), model.weights.intermediate, 1.0)
        drive(model, cache, read(cache, ids[:half], usage))
        for index, reader in enumerate(readers):
            if reader.model is model and reader.config is not None:
                sets[index] = sparsity_of(reader.config, model.weights)
                if isinstance(sets[index], CSparse):
                    sets[index].usage.absorb(usage.usage)
    for begin in range(half, len(ids) - 1, WINDOW):
        tokens = ids[begin : min(begin + WINDOW, len(ids) - 1)].int()
        following = ids[begin + 1 : begin + 1 + len(tokens)]
        expected: torch.Tensor | None = None
        # Sparse models first in each model: its F then overwrites what they wrote. The plain F of all is the first reader.
        for index, reader in sorted(enumerate(readers), key=lambda each: (each[0] > 0, each[1].config is None)):
            cache, sparsity = caches[id(reader.model)], sets.get(index)
            logits = reader.model.compute(cache, Pass.chain(tokens, begin, sparsity)).logits.clone()
            expected = logits if expected is None else expected
            reader.count(logits, expected, following)
        # The plain model's sparse readers have overwritten its entries: it reads the window once more.
        for model in models.values():
            model.compute(caches[id(model)], Pass.chain(tokens, begin))


def records(readers: list[Reader]) -> list[dict]:
    return [
        {
            "reader": reader.name,
            "tokens": reader.tokens,
            "perplexity": math.exp(reader.loss / reader.tokens),
            "divergence": reader.divergence / reader.tokens,
            "top_1": reader.agreed / reader.tokens,
        }
        for reader in readers
    ]


def report(results: list[dict]) -> None:
    table = Table("", "tokens", "perplexity", "KL", "same top token")
    for name, tokens, perplexity, divergence, top_1 in map(dict.values, results):
        table.add_row(name, str(tokens), f"{perplexity:.4f}", f"{divergence:.5f}", f"{top_1:.2%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--q4", help="where weights in four bits are, if not to be rounded from --model: a GGUF file of it")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--tokens", type=positive, default=10_000, help="that are judged, or more: texts are read whole")
    parser.add_argument("--densities", default="1,0.7,0.5", help="of the sparse models")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"data: no folder {options.data}")
    header()
    sources = {"plain": options.model, "q8": options.model, "q4": options.q4 or options.model}
    engines = {
        weights: Engine.from_pretrained(name, SiriusConfig(draft_weights=draft_of(weights)), device="cpu", weights=weights)
        for weights, name in sources.items()
    }
    plain, models = engines["plain"], {weights: prepare(engine.model) for weights, engine in engines.items()}
    readers = [Reader(f"full, {weights}", model, None) for weights, model in models.items()]
    for density in map(float, options.densities.split(",")):
        if density < 1:
            own = SiriusConfig(density=density, draft_weights="same")
            readers.append(Reader(f"density {density}, plain", models["plain"], own))
        copy = SiriusConfig(density=density, draft_weights="q4")
        readers.append(Reader(f"density {density}, 4-bit copy of plain", models["plain"], copy))
        readers.append(Reader(f"density {density}, 4 bits of q8", models["q8"], SiriusConfig(density=density)))
    for ids in track(list(texts(options.data, plain.tokenizer, options.tokens)), "reading", console=console):
        measure(readers, ids)
        results = records(readers)
        save(options.out, {"benchmark": "quality", "model": options.model, "results": results}, last=False)
    report(results)
    save(options.out, {"benchmark": "quality", "model": options.model, "results": results})


if __name__ == "__main__":
    main()
