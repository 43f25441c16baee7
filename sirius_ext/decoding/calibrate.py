"""FSparse's threshold form: per-layer thresholds, made from a text once (SPEC section 2)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ..models.weights import Weights
from ..runtime.cache import chunks
from ..runtime.model import Model
from ..runtime.passes import Prefill
from .thresholds import LEAST_TOKENS, Thresholds, check_density, read_thresholds

HELD_BACK = 0.2  # of the text: what the thresholds are tried on
STRETCH = 512  # tokens that are read after each other as one text
_BITS = 15  # of a float32 dropped: 65536 bins, each 1/256 of its values wide


def calibrate(model: Model, tokens: torch.Tensor, density: float, progress: Callable[[int], None] | None = None) -> Thresholds:
    """Per layer the c for which the mean fraction of neurons with |silu(gate x)| >= c is `density` on the first part of a text;
    its last fifth is held back to measure the fraction that they give.

    tokens: int64 [t], t >= 64; read in stretches of 512, or of the context if that is shorter.
    progress: called with the number of tokens read so far.
    ValueError for a text too short or a density outside (0, 1).
    """
    w = model.weights
    check_density(density)
    if len(tokens) < LEAST_TOKENS:
        raise ValueError(f"text: expected at least {LEAST_TOKENS} tokens, got {len(tokens)}")
    held_back = max(1, int(HELD_BACK * len(tokens)))
    length, cache = min(STRETCH, w.context), model.new_cache()
    model.reserve(cache, length, 1)
    read, found = 0, []
    for part in tokens.split([len(tokens) - held_back, held_back]):
        observer = _Histograms(len(w.layers))
        for stretch in part.split(length):
            for start, stop in chunks(0, len(stretch)):
                model.prefill(cache, Prefill(stretch, start, stop, observer))
            read += len(stretch)
            if progress is not None:
                progress(read)
        found.append(observer.counts)
    values = [_quantile(counts, density) for counts in found[0]]
    kept = [_share_from(counts, value) for counts, value in zip(found[1], values)]
    return Thresholds(density, values, kept, (len(tokens), held_back), w.fingerprint())


def load_thresholds(file: str | os.PathLike[str], weights: Weights, density: float) -> torch.Tensor:
    """The thresholds of a file, float32 [layers]. ValueError if it is not one, or made for another model or density."""
    values, model = read_thresholds(file, density)
    if model != weights.fingerprint() or len(values) != len(weights.layers):
        raise ValueError(f"thresholds: {file} was made for another model; calibrate this one")
    return torch.tensor(values, dtype=torch.float32)


class _Histograms:
    """Counts |silu(gate x)| by the leading bits of its float32 form, which order as the numbers do: whatever the length of the
    text, 32 layers take 16 MB."""

    def __init__(self, num_layers: int) -> None:
        self.counts = torch.zeros(num_layers, 1 << (31 - _BITS), dtype=torch.int64)

    def observe(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> None:
        bins = gates.float().abs().contiguous().view(torch.int32) >> _BITS
        self.counts[layer] += torch.bincount(bins.flatten(), minlength=self.counts.shape[1]).cpu()


def _quantile(counts: torch.Tensor, density: float) -> float:
    """The number that a fraction `density` of the counted ones reaches, by straight interpolation inside its bin."""
    total = int(counts.sum())
    above = counts.flip(0).cumsum(0).flip(0)  # how many are in this bin or a higher one
    index = int((above >= density * total).nonzero()[-1])
    inside = (int(above[index]) - density * total) / max(1, int(counts[index]))
    low, high = _edges(index)
    return low + inside * (high - low)


def _share_from(counts: torch.Tensor, value: float) -> float:
    """The fraction of the counted ones that reach `value`."""
    index = int(torch.tensor([value], dtype=torch.float32).view(torch.int32) >> _BITS)
    low, high = _edges(index)
    reached = int(counts[index + 1 :].sum()) + float(counts[index]) * (high - value) / (high - low)
    return reached / int(counts.sum())


def _edges(index: int) -> tuple[float, float]:
    low, high = torch.tensor([index << _BITS, (index + 1) << _BITS], dtype=torch.int32).view(torch.float32).tolist()
    return low, high
