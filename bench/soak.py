"""Many prompts of mixed length, one after the other, every way to decode in turn: memory stays what it was after the longest one,
and the first prompt's text is the same at the end as at the beginning."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from common import console, header
from flags import about, positive
from rich.progress import track
from shapes import SHAPES, random_model

from sirius_ext import Engine, SiriusConfig
from sirius_ext.config import GREEDY
from sirius_ext.engine import device_of
from sirius_ext.models.hub import parse_dtype

CONFIGS = (
    SiriusConfig(period=16),
    SiriusConfig(mode="full"),
    SiriusConfig(period=8, tree_width=4, accept="match"),
    SiriusConfig(period=8, sparsity="fsparse"),
    SiriusConfig(mode="sparse"),
)


def soak(
    engine: Engine, prompts: int, longest: int, new_tokens: int, memory: Callable[[], int], seconds: float = math.inf
) -> tuple[int, list[str]]:
    """How many prompts were decoded until the seconds were over, and what went wrong: nothing, or a line for each.

    memory: bytes in use.
    """
    end = time.monotonic() + seconds
    device, vocab = engine.model.device, engine.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def text(ids: torch.Tensor, config: SiriusConfig) -> torch.Tensor:
        return engine.generate(
            ids, attention_mask=torch.ones_like(ids), config=config, max_new_tokens=new_tokens, **GREEDY
        ).sequences.cpu()

    def prompt(length: int) -> torch.Tensor:
        return torch.randint(vocab, (1, length), generator=generator).to(device)

    # Twice: what makes room for a wider tree voids the graphs captured before it.
    first, wide = prompt(longest // 2 + 1), prompt(longest)
    for _ in range(2):
        for config in CONFIGS:
            text(wide, config)
    before = [text(first, config) for config in CONFIGS]
    start, faults = memory(), []
    lengths = torch.randint(1, longest + 1, (prompts,), generator=generator).tolist()
    done = 0
    for index, length in enumerate(track(lengths, "soaking", console=console, transient=True)):
        if time.monotonic() > end:
            break
        done += 1
        text(prompt(length), CONFIGS[index % len(CONFIGS)])
        if memory() != start:
            faults.append(f"memory: {start} bytes before, {memory()} after prompt {index} of {length} tokens")
            start = memory()
    for config, expected in zip(CONFIGS, before):
        if not torch.equal(text(first, config), expected):
            faults.append(f"text: another one at the end than at the beginning, by {config}")
    return done, faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="of the random model")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=positive, default=200, help="that are decoded, at most")
    parser.add_argument("--longest", type=int, default=1500, help="prompt, in tokens")
    parser.add_argument("--new-tokens", type=positive, default=48, help="of a text")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no more prompts are decoded")
    options = parser.parse_args(arguments)
    try:
        device_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    header()
    torch.manual_seed(0)
    device = torch.device(options.device)
    engine = Engine(random_model(options.shape, device, parse_dtype(options.dtype)))
    # On the CPU there is no such number: only texts are compared.
    memory = (lambda: torch.cuda.memory_allocated(device)) if device.type == "cuda" else (lambda: 0)
    done, faults = soak(engine, options.prompts, options.longest, options.new_tokens, memory, options.seconds)
    for fault in faults:
        console.print(f"[bold red]{fault}")
    console.print(f"{done} of {options.prompts} prompts, {len(faults)} faults, {memory() / 1e6:.1f} MB in use")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
