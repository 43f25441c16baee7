"""Which neurons the sparse model keeps (SPEC section 2)."""

from __future__ import annotations

import functools

import torch

from ..config import SiriusConfig
from ..kernels import ops
from ..models.weights import Weights
from ..runtime.passes import Kind

# Share of an MLP's parameters that a sparse model skips in a neuron left out: all three matrices, or two where gate is dense.
_SKIPPED = {"csparse": 1.0, "fsparse": 2 / 3}
# What a token counts for in the statistic of a following set, relative to the next one: half as much 32 tokens later.
DECAY = 2 ** (-1 / 32)


def kept_neurons(density: float, intermediate: int) -> int:
    """round(density * I), at least one."""
    return max(1, round(density * intermediate))


def four_bits(config: SiriusConfig, weights: Weights) -> bool:
    """Whether S reads four bits of every weight."""
    return config.draft_weights == "q4" or (config.draft_weights == "auto" and weights.packed)


def sparse_density(config: SiriusConfig, weights: Weights) -> float:
    """Parameters that the sparse model touches for a token, over all parameters (SPEC section 2), each by the bits that S and F
    read of it: with the same bits `1 - (1 - d) * M / P` for CSparse, `1 - (1 - d) * (2 / 3) * M / P` for FSparse."""
    mlp, rest = weights.num_mlp_parameters, weights.num_parameters - weights.num_mlp_parameters
    mlp_share = rest_share = 1.0  # of the bytes of a parameter that F reads
    if four_bits(config, weights):
        less, all_bits = weights.four_bits, weights.full
        mlp_share = less.mlp_bytes / all_bits.mlp_bytes
        rest_share = (less.bytes - less.mlp_bytes) / (all_bits.bytes - all_bits.mlp_bytes)
    kept = 1 - (1 - config.density) * _SKIPPED[config.sparsity]
    return (rest_share * rest + mlp_share * kept * mlp) / (rest + mlp)


class Usage:
    """What the tokens of one stretch of a prompt used of every neuron.

    squares: float32 [layers, I], `zbar_i^2` added up over the tokens.
    tokens: how many they are.
    """

    def __init__(self, num_layers: int, intermediate: int, device: torch.device | str = "cpu") -> None:
        self.squares, self.tokens = torch.zeros(num_layers, intermediate, device=device), 0

    def observe(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> None:
        """Add tokens z = silu(gate x) * (up x), T [tokens, I]. A token whose z is all zero adds nothing."""
        squares = z.float().square()
        norms = squares.sum(-1, keepdim=True)
        self.squares[layer] += (squares / norms.where(norms > 0, 1.0)).sum(0)
        if layer == 0:
            self.tokens += len(z)

    def absorb(self, other: Usage) -> None:
        """Add the tokens that another one has observed."""
        self.squares += other.squares
        self.tokens += other.tokens


class CSparse:
    """One set of neurons, by what the tokens of the prompt used: GRIFFIN's statistic `stat_i = || zbar[:, i] ||_2`, gathered
    during the full prefill.

    usage: of the prompt; it must be complete when the set is first asked for.
    down_squares: float32 [layers, I], `||down_i||_2^2`. With it the set follows the text: its statistic, the mean of `zbar_i^2`,
        goes on with every verification, and a neuron counts by what it adds to the output.
    """

    kind, thresholds = Kind.LISTED, None

    def __init__(
        self,
        num_layers: int,
        intermediate: int,
        density: float,
        device: torch.device | str = "cpu",
        down_squares: torch.Tensor | None = None,
        four_bits: bool = False,
    ) -> None:
        self.four_bits = four_bits
        self.usage: Usage = Usage(num_layers, intermediate, device)
        self.kept_neurons = kept_neurons(density, intermediate)
        self.down_squares = down_squares
        self.follows = down_squares is not None and self.kept_neurons < intermediate

    @functools.cached_property
    def _mean(self) -> torch.Tensor:
        return self.usage.squares / max(1, self.usage.tokens)

    @property
    def statistic(self) -> torch.Tensor | None:
        """Of a set that follows the text, float32 [layers, I]: at first the mean of `zbar_i^2` over the prompt."""
        return self._mean if self.follows else None

    @functools.cached_property
    def neurons(self) -> torch.Tensor:
        """Those of the largest statistic in each layer, in rising order (sorted rows read faster): int32 [layers, K]. Chosen when
        first asked for, after the prefill; `follow` rewrites them in place."""
        scores = self.usage.squares.sqrt() if self.down_squares is None else self._mean * self.down_squares
        # A stable sort lets the lower index win a tie.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return order[:, : self.kept_neurons].sort(-1).values.to(torch.int32).contiguous()

    def choose(self, layer: int, gates: torch.Tensor) -> torch.Tensor:
        """The neurons of one layer, whatever the tokens of the pass: int32 [K], rising."""
        return self.neurons[layer]

    def follow(self, z: torch.Tensor, path: list[int]) -> None:
        """Choose anew after a verification. z: T [layers, m, I], F's. The root, which is row 0, and the rows of `path` joined the
        sequence."""
        assert self.down_squares is not None
        rows = torch.tensor([0, *path], dtype=torch.int32, device=z.device)
        ops.follow(z, rows, self.down_squares, self._mean, self.kept_neurons, DECAY, out=self.neurons)

    def place(self, neurons: torch.Tensor, statistic: torch.Tensor | None) -> None:
        """Have neurons and statistic in other memory, which holds them already."""
        self.neurons = neurons
        if statistic is not None:
            self._mean = statistic

    @property
    def kept(self) -> torch.Tensor:
        """Which neurons those are: bool [layers, I]."""
        squares = self.usage.squares
        return torch.zeros(squares.shape, dtype=torch.bool, device=squares.device).scatter_(1, self.neurons.long(), True)


class FSparse:
    """A set of neurons per pass, by `|silu(gate x)|`: the largest, or with thresholds, float32 [layers], all that reach
    theirs. It is chosen by the tokens that use it, so that neither the prompt nor the text before has a say."""

    follows, neurons, statistic, usage = False, None, None, None

    def __init__(
        self, intermediate: int, density: float, thresholds: torch.Tensor | None = None, four_bits: bool = False
    ) -> None:
        self.kept_neurons, self.thresholds, self.four_bits = kept_neurons(density, intermediate), thresholds, four_bits
        self.kind = Kind.LARGEST if thresholds is None else Kind.THRESHOLD

    def choose(self, layer: int, gates: torch.Tensor) -> torch.Tensor:
        """The neurons of a pass with gates = silu(gate x), float32 [m, I]: int32 [K], rising."""
        if self.thresholds is not None:
            return ops.select(gates, threshold=float(self.thresholds[layer]))
        return ops.select(gates, self.kept_neurons)

    def place(self, neurons: torch.Tensor, statistic: torch.Tensor | None) -> None:
        """There is nothing to place."""


def sparsity_of(config: SiriusConfig, weights: Weights, thresholds: torch.Tensor | None = None) -> CSparse | FSparse:
    """What the config asks for, for one prompt."""
    less = four_bits(config, weights)
    if config.sparsity == "csparse":
        squares = weights.down_squares if config.follow else None
        return CSparse(len(weights.layers), weights.intermediate, config.density, weights.device, squares, less)
    thresholds = None if thresholds is None else thresholds.to(weights.device)
    return FSparse(weights.intermediate, config.density, thresholds, less)
