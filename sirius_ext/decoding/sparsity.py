"""Which neurons the sparse model keeps (SPEC section 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from ..config import SiriusConfig
from ..kernels import ops
from ..kernels.matrix import Format
from ..models.tier_files import Layout
from ..models.tiers import Draft, Plan
from ..models.weights import Weights
from ..runtime.passes import Kind
from .lookup import MOST

# Share of an MLP's parameters that a sparse model skips in a neuron left out: all three matrices, or two where gate is dense.
# The cascade reads less of down than of gate, and as much as CSparse altogether.
_SKIPPED = {"csparse": 1.0, "fsparse": 2 / 3, "cascade": 1.0}
# What a token counts for in the statistic of a following set, relative to the next one: half as much 32 tokens later.
DECAY = 2 ** (-1 / 32)
# Of "auto" where memory is too small for more, the better one first. With fewer neurons than the last S proposes little of use.
DENSITIES = tuple(step / 20 for step in range(18, 5, -1))


def kept_neurons(density: float, intermediate: int) -> int:
    """round(density * I), at least one."""
    return max(1, round(density * intermediate))


def four_bits(config: SiriusConfig, weights: Weights) -> bool:
    """Whether S reads four bits of every weight. Of "auto" that is settled now if it was not (`Weights.settle`)."""
    return weights.settle() if config.draft_weights == "auto" else config.draft_weights == "q4"


def density_of(config: SiriusConfig, weights: Weights) -> float:
    """The share of the neurons that S keeps. Of weights in four bits S has no cheaper view. Memory may be too small for what
    "auto" means elsewhere."""
    plan = None if weights.tiers is None else weights.tiers.plan
    return _density(config, four_bits(config, weights), weights.layers[0].gate.format, plan)


def _density(config: SiriusConfig, four_bits: bool, gate: Format, plan: Plan | None) -> float:
    """gate: F's."""
    if config.density == "auto" and plan is not None and plan.density is not None:
        return plan.density
    return config.density_with(_fewer_bits(four_bits, gate))


def _fewer_bits(four_bits: bool, gate: Format) -> bool:
    """Whether S reads fewer bits of a weight than F. gate: F's."""
    return four_bits and not gate.four_bits


def cascade_neurons(density: float, intermediate: int) -> tuple[int, int, int]:
    """Of how many neurons the cascade reads gate, up and down: 1.375 d, d and 0.625 d of I. Gate can be read of no more than all;
    up and down then make up for it, so that the three are 3 d I together."""
    total = round(3 * density * intermediate)
    gate = min(intermediate, kept_neurons(1.375 * density, intermediate))
    up = min(gate, max(1, round((total - gate) / 1.625)))
    return gate, up, min(up, max(1, total - gate - up))


def sparse_density(config: SiriusConfig, weights: Weights) -> float:
    """Parameters that the sparse model touches for a token, over all parameters (SPEC section 2), each by the bits that S and F
    read of it: with the same bits `1 - (1 - d) * M / P` for CSparse and the cascade, and `1 - (1 - d) * (2 / 3) * M / P` for
    FSparse."""
    mlp, rest = weights.num_mlp_parameters, weights.num_parameters - weights.num_mlp_parameters
    mlp_share = rest_share = 1.0  # of the bytes of a parameter that F reads
    if four_bits(config, weights):
        less, all_bits = weights.four_bits, weights.full
        mlp_share = less.mlp_bytes / all_bits.mlp_bytes
        rest_share = (less.bytes - less.mlp_bytes) / (all_bits.bytes - all_bits.mlp_bytes)
    kept = 1 - (1 - density_of(config, weights)) * _SKIPPED[config.sparsity]
    return (rest_share * rest + mlp_share * kept * mlp) / (rest + mlp)


def without_chance(config: SiriusConfig, settled: bool) -> SiriusConfig:
    """The same for who compares texts, which must not depend on how much memory happens to be free: what S reads of plain weights
    is then a copy in four bits, unless the config says otherwise. settled: it does not depend on that, as the weights are packed,
    or memory was divided for what S reads."""
    if config.draft_weights != "auto" or settled:
        return config
    return dataclasses.replace(config, draft_weights="q4")


def drafts_of(config: SiriusConfig, files: Layout) -> Iterator[Draft]:
    """What S may need of the memory of a model of which not all fits, the better choice first. ValueError as `draft_of`."""
    for less in (True, False) if config.draft_weights == "auto" else (config.draft_weights == "q4",):
        if not less and config.draft_weights == "auto" and files.weights != "plain":
            return  # there S has four bits of every weight anyway
        draft = draft_of(config, files, less)
        yield draft
        if config.density == "auto" and draft.neurons and config.sparsity != "fsparse":
            usual = config.density_with(_fewer_bits(less, files.layers[0].gate.format))
            for density in (each for each in DENSITIES if each < usual):
                yield dataclasses.replace(draft_of(dataclasses.replace(config, density=density), files, less), density=density)


def draft_of(config: SiriusConfig, files: Layout, four_bits: bool) -> Draft:
    """What S needs of the memory of a model of which not all fits.

    four_bits: whether S reads four bits of every weight.
    ValueError if that is not possible.
    """
    if config.mode == "full":
        return Draft(rows=1 + MOST)
    rows = 1 + (config.longest_period_with(from_disk=True) - 1) * config.tree_width if config.mode == "sirius" else 1
    if four_bits and files.weights == "plain":
        return Draft(copy=True, rows=rows)
    if not four_bits and any(part.format == Format.Q8 for layer in files.layers for part in layer.parts):
        raise ValueError(
            'draft_weights: expected "auto" or "q4" where weights of eight bits are not all in memory, got "same": the sparse '
            "model's are their upper halves"
        )
    if config.sparsity == "fsparse":
        return Draft(files.intermediate, rows=rows)
    density = config.density_with(_fewer_bits(four_bits, files.layers[0].gate.format))
    if config.sparsity == "cascade":
        return Draft(cascade_neurons(density, files.intermediate)[0], rows=rows)
    return Draft(kept_neurons(density, files.intermediate), rows=rows)


def _draft_reads_less(config: SiriusConfig, files: Layout, plan: Plan) -> bool:
    """Whether S reads four bits of every weight where memory is divided like this."""
    if config.draft_weights == "auto":
        return files.weights != "plain" or plan.copy > 0
    return config.draft_weights == "q4"


def draft_density(config: SiriusConfig, files: Layout, plan: Plan) -> float:
    """The share of the neurons that S keeps where memory is divided like this."""
    return _density(config, _draft_reads_less(config, files, plan), files.layers[0].gate.format, plan)


def draft_bytes(config: SiriusConfig, files: Layout, plan: Plan) -> int:
    """Of weights that a pass of S reads where memory is divided like this."""
    mlp, rest = files.read_bytes(_draft_reads_less(config, files, plan))
    return round(mlp * (1 - (1 - draft_density(config, files, plan)) * _SKIPPED[config.sparsity])) + rest


class Usage:
    """What the tokens of one stretch of a prompt used of every neuron.

    squares: float32 [layers, I], `zbar_i^2` added up over the tokens.
    tokens: how many they are.
    """

    def __init__(self, num_layers: int, intermediate: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(num_layers, intermediate, dtype=torch.float32, device=device)
        self.tokens = 0

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

    kind, narrowed, thresholds, decay = Kind.LISTED, (0, 0), None, DECAY

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

    @property
    def down_norms(self) -> torch.Tensor | None:
        """None: the set is that of gate, up and down."""
        return None

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

    def likely(self, later: Sequence[Usage], layer: int) -> torch.Tensor:
        """What the neurons of one layer will be once some more of the prompt is observed, of which this layer is: int32 [K],
        rising."""
        squares = torch.stack([self.usage.squares[layer], *(each.squares[layer] for each in later)]).sum(0)
        scores = squares if self.down_squares is None else squares * self.down_squares[layer]
        order = scores.argsort(descending=True, stable=True)
        return order[: self.kept_neurons].sort().values.to(torch.int32)

    def choose(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
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


class Cascade(CSparse):
    """Three sets within one another: gate is read of CSparse's, or of a set that follows the text; up of those of the largest
    `|silu(gate x)| ||down||` among them; down of those of the largest `|z| ||down||` among these. The last two are chosen by the
    tokens of each pass.

    down_norms: `||down_i||_2`, float32 [layers, I].
    The others are as of `CSparse`; `neurons` and `kept_neurons` are gate's.
    """

    kind = Kind.CASCADE

    def __init__(
        self,
        num_layers: int,
        intermediate: int,
        density: float,
        down_norms: torch.Tensor,
        device: torch.device | str = "cpu",
        down_squares: torch.Tensor | None = None,
        four_bits: bool = False,
    ) -> None:
        gate, *narrowed = cascade_neurons(density, intermediate)
        super().__init__(num_layers, intermediate, gate / intermediate, device, down_squares, four_bits)
        self.narrowed = narrowed[0], narrowed[1]
        self._down_norms = down_norms

    @property
    def down_norms(self) -> torch.Tensor:
        return self._down_norms

    def choose(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The neurons whose down is read in a pass with gates = silu(gate x) and z = gates * (up x), float32 [m, I]: int32 [K],
        rising."""
        up, down = self.narrowed
        norms = self._down_norms[layer]
        wide = ops.select(gates, up, among=self.neurons[layer], weights=norms)
        return ops.select(z, down, among=wide, weights=norms)


class FSparse:
    """A set of neurons per pass, by `|silu(gate x)|`: the largest, or with thresholds, float32 [layers], all that reach
    theirs. It is chosen by the tokens that use it, so that neither the prompt nor the text before has a say."""

    follows, narrowed, neurons, statistic, decay, down_norms, usage = False, (0, 0), None, None, 0.0, None, None

    def __init__(
        self, intermediate: int, density: float, thresholds: torch.Tensor | None = None, four_bits: bool = False
    ) -> None:
        self.kept_neurons, self.thresholds, self.four_bits = kept_neurons(density, intermediate), thresholds, four_bits
        self.kind = Kind.LARGEST if thresholds is None else Kind.THRESHOLD

    def choose(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The neurons of a pass with gates = silu(gate x), float32 [m, I]: int32 [K], rising."""
        if self.thresholds is not None:
            return ops.select(gates, threshold=float(self.thresholds[layer]))
        return ops.select(gates, self.kept_neurons)

    def place(self, neurons: torch.Tensor, statistic: torch.Tensor | None) -> None:
        """There is nothing to place."""


def sparsity_of(config: SiriusConfig, weights: Weights, thresholds: torch.Tensor | None = None) -> CSparse | FSparse:
    """What the config asks for, for one prompt."""
    less, density = four_bits(config, weights), density_of(config, weights)
    if weights.tiers is not None:
        weights.tiers.check(draft_of(dataclasses.replace(config, density=density), weights.tiers.files, less))
    if config.sparsity == "fsparse":
        return FSparse(weights.intermediate, density, None if thresholds is None else thresholds.to(weights.device), less)
    shape, squares = (len(weights.layers), weights.intermediate), weights.down_squares if config.follow else None
    if config.sparsity == "cascade":
        return Cascade(*shape, density, weights.down_norms, weights.device, squares, less)
    return CSparse(*shape, density, weights.device, squares, less)
