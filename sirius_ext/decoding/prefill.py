"""A prompt read by F, chunk by chunk, after what its cache holds of it already."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import TypeVar

import torch

from ..runtime.cache import Cache, chunks
from ..runtime.model import Model, not_finite
from ..runtime.passes import Fault, Pass, Prefill, Result
from .sparsity import CSparse, FSparse, Usage

T = TypeVar("T")
# What computes something out of passes: it yields what it asks for, and is sent what comes of it.
Passes = Generator[Prefill | Pass | Fault, Result, T]


def drive(model: Model, cache: Cache, passes: Passes[T], progress: Callable[[int], None] | None = None) -> T:
    """Compute what is asked for, one after the other, over a cache. Returns what comes of it all.

    progress: called after every chunk of a prompt with the number of its tokens that are read, before anything else is made of
        them.
    """
    try:
        asked = next(passes)
        while True:
            computed = model.compute(cache, asked)
            if progress is not None and isinstance(asked, Prefill):
                progress((asked, *asked.later)[-1].stop)
            asked = passes.send(computed)
    except StopIteration as end:
        result: T = end.value
        return result


def read(cache: Cache, prompt: torch.Tensor, sparsity: CSparse | FSparse | None = None) -> Passes[torch.Tensor]:
    """Have F read a prompt, int64 [t], that begins with all that the cache holds. The last token is always read.

    sparsity: learns what the prompt's tokens used of every neuron, if that decides about it.
    Returns the logits after the last token, float32 [V]. ValueError if they, or a query or key of any token, are not finite: the
    cache then holds nothing.
    """
    tokens, held = prompt.tolist(), len(cache.tokens)
    usage = None if sparsity is None else sparsity.usage
    if usage is not None:
        for stretch in cache.stretches:
            assert isinstance(stretch.observed, Usage)
            usage.absorb(stretch.observed)
    asked = []
    for start, stop in chunks(min(held, len(tokens) - 1), len(tokens)):
        known = start < held  # the last token, which has been observed
        observer = None if usage is None or known else Usage(len(usage.squares), usage.squares.shape[1], usage.squares.device)
        asked.append(Prefill(prompt, start, stop, observer))
    # Zeros, and the logits after the last chunk; NaN stays NaN.
    logits = torch.zeros((), dtype=torch.float32, device=cache.weights.device)
    for first in range(0, len(asked), cache.chunks_together):
        some = tuple(asked[first : first + cache.chunks_together])
        keep = None
        if isinstance(sparsity, CSparse) and some[-1].stop == len(tokens):
            keep = functools.partial(sparsity.likely, [each.observer for each in some if isinstance(each.observer, Usage)])
        logits = logits + (yield dataclasses.replace(some[0], later=some[1:], keep=keep)).logits
        for chunk in some:
            if usage is not None and isinstance(chunk.observer, Usage):
                usage.absorb(chunk.observer)
            if chunk.start >= held:
                cache.hold(tokens[chunk.start : chunk.stop], chunk.observer, prefilled=True)
    if not bool(logits.isfinite().all()):
        cache.rewind(0)  # what it held is overwritten in the search
        raise not_finite(len(tokens), 0, "the prefill (full model)", (yield Fault(prompt, 0)).fault)
    return logits
