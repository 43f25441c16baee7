"""What a model can be asked to compute, and what it must know of a sparse model for that."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..kernels import ops


class Kind(enum.IntEnum):
    """How the neurons of a pass are chosen. As in csrc/params.h, `Sparsity`."""

    DENSE = 0
    LISTED = 1
    LARGEST = 2
    THRESHOLD = 3
    CASCADE = 4


class Sparsity(Protocol):
    """The neurons that S keeps.

    kind: any but DENSE.
    kept_neurons: of every layer; of THRESHOLD it says nothing. Of CASCADE those whose gate is read.
    narrowed: of CASCADE, of how many of these up is read, and of how many of those down.
    follows: the set is chosen anew after every verification.
    four_bits: S reads four bits of every weight (`Weights.four_bits`).
    """

    kind: Kind
    kept_neurons: int
    narrowed: tuple[int, int]
    follows: bool
    four_bits: bool

    @property
    def neurons(self) -> torch.Tensor | None:
        """Of LISTED and CASCADE, int32 [layers, kept_neurons], rising."""

    @property
    def statistic(self) -> torch.Tensor | None:
        """Of a set that follows the text, float32 [layers, I]."""

    @property
    def decay(self) -> float:
        """What a token counts for in the statistic, relative to the next one."""

    @property
    def thresholds(self) -> torch.Tensor | None:
        """Of THRESHOLD, float32 [layers]."""

    @property
    def down_norms(self) -> torch.Tensor | None:
        """Of CASCADE, `||down_i||_2`, float32 [layers, I]."""

    def place(self, neurons: torch.Tensor, statistic: torch.Tensor | None) -> None:
        """Have neurons and statistic in other memory, which holds them already."""

    def choose(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The neurons whose down is read in one layer, for a pass with gates = silu(gate x) and z = gates * (up x), float32
        [m, I]: int32 [kept], rising."""


def reads_four_bits(sparsity: Sparsity | None) -> bool:
    """Whether a pass of S with this sparsity, or of F, reads four bits of every weight."""
    return sparsity is not None and sparsity.four_bits


class Observer(Protocol):
    """Who wants to know what happens inside a prefill."""

    def observe(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> None:
        """Some tokens of the text, in order: gates = silu(gate x) and z = gates * (up x), T [tokens, I]."""


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A chunk of a prompt through F.

    prompt: int64 [t], all of it, in the host's memory.
    start, stop: the chunk's place in it; the cache holds what comes before.
    observer: sees every layer's gates.
    later: chunks after this one that are read together with it, layer by layer: with the same result, but a model whose layers
        come from a disk reads them once.
    keep: of the last ones of a prompt, the neurons that S will want of a layer whose gates have been seen, int32 [count]; if they
        are from a disk they are kept as they come by.
    """

    prompt: torch.Tensor
    start: int
    stop: int
    observer: Observer | None = None
    later: tuple[Prefill, ...] = ()
    keep: Callable[[int], torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Pass:
    """m tokens of a sequence, side by side or in a tree, through F, or with a sparsity through S.

    tokens, positions: int32 [m].
    mask: int64 [m, words] (`ops.tree_mask`); row i sees slots [0, prefix) and the slots prefix + b for the bits b of mask[i].
    first_slot: row i's key and value go to slot first_slot + i.
    argmax: int32 [m], where the argmax goes; without it to the cache's own.
    keep_z: of a pass through F, keep silu(gate x) * (up x).
    follower: of a pass through F, the sparse model whose set will follow what z says, if that is known.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    prefix: int
    first_slot: int
    sparsity: Sparsity | None = None
    argmax: torch.Tensor | None = None
    keep_z: bool = False
    follower: Sparsity | None = None

    @classmethod
    def chain(cls, tokens: torch.Tensor, first: int, sparsity: Sparsity | None = None, keep_z: bool = False) -> Pass:
        """Of tokens, int32 [m], one after another from position `first` on, after all that stand before it."""
        rows = len(tokens)
        positions = torch.arange(first, first + rows, dtype=torch.int32, device="cpu")
        mask = ops.tree_mask(torch.arange(-1, rows - 1, dtype=torch.int32, device="cpu"))
        return cls(tokens, positions, mask, first, first, sparsity, keep_z=keep_z)


@dataclasses.dataclass(frozen=True)
class Fault:
    """The search for the first value that is not finite: tokens, int64 [t], are read once more after the `start` ones before
    them, whose cache entries are finite."""

    tokens: torch.Tensor
    start: int
    sparsity: Sparsity | None = None


_NOTHING = torch.empty(0)


class Result(NamedTuple):
    """What comes of it; a cache's own tensors are overwritten by later passes over it.

    logits: of a `Pass`, float32 [m, V]. Of a `Prefill` those after the prompt's last token, float32 [V], and a zero if that is
        not among what was read; NaN if a query or key was not finite.
    argmax: of the logits of a `Pass`, int32 [m], -1 where one is not finite.
    z: what a `Pass` was asked to keep, T [layers, m, I].
    fault: what a `Fault` has found, as an error has it.
    """

    logits: torch.Tensor = _NOTHING
    argmax: torch.Tensor = _NOTHING
    z: torch.Tensor | None = None
    fault: str | None = None
