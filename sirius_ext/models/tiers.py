"""A model that is larger than the memory it may have: which of its neurons stay there, and where the others come from.

Everything but the MLPs stays. Of the MLPs' neurons those stay that the sparse model reads, and of the others the first ones of
every layer, as many as there is room for; what is left arrives from the file, layer by layer, whenever the full model reads
(`kernels.stream`). Neighbours stay and neighbours stream, because a disk reads far more in large pieces than in small ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..kernels import q8
from ..kernels.matrix import Format, Matrix
from ..kernels.stream import GRAIN, Image, Statistics, Stream
from .families import describe
from .tier_files import LayerFiles, TierFiles, matrix_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUFFERS = 2
CACHE_TOKENS = 4096  # of keys and values for which room is left, or as many as the model's context has
_OWN = 300_000_000  # bytes that Python and its libraries may take beside the memory that was asked for
_WORK = 96_000_000  # bytes of activations, logits and what else passes need
_SLACK = 8  # one slot more for each so many, for neurons that are about to enter the set


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a sparse model needs of the memory.

    neurons: those of every layer's set, if it reads of the weights what is in the first image of a layer; all of them where the
        choice among all is made anew for every token; 0 if it reads none of that.
    copy: it reads a copy of all weights in four bits.
    """

    neurons: int = 0
    copy: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays in memory, in bytes and neurons.

    memory: what weights and caches may take.
    resident: of every layer's first and second image, neurons that stay.
    slots: of every layer, neurons more of the first image, for the sparse model's set.
    copy: bytes of the sparse model's copy.
    caches: bytes left for keys and values.
    used: bytes of all together.
    streamed: bytes that a pass of the full model reads from the file.
    """

    memory: int
    resident: tuple[int, int]
    slots: int
    copy: int
    caches: int
    used: int
    streamed: int

    def summary(self, files: TierFiles) -> str:
        """For people."""
        if not self.streamed:
            return f"all of it, {self.used / 1e9:.2f} GB"
        return f"{self.used / 1e9:.2f} GB; the full model reads {self.streamed / 1e9:.2f} GB of {files.neurons} besides"


def cache_bytes(model: PreTrainedModel) -> int:
    """Of keys and values of as many tokens as room is left for."""
    d, _ = describe(model)
    return 2 * len(d.windows) * d.kv_heads * d.head_dim * model.dtype.itemsize * min(d.context, CACHE_TOKENS)


class Sizes:
    """Bytes of a model's parts. caches: of keys and values. own: of the process without the model."""

    def __init__(self, files: TierFiles, caches: int, own: int = 0) -> None:
        self.files, self.rows, self.caches = files, files.intermediate, caches
        self.fast = files.fast_bytes  # of all but the MLPs
        self.own = max(0, own - _OWN)  # of what was asked for
        # A prefill has plain matrices of a layer once more, row by row.
        self.work = _WORK + (files.layers[0].images[0].nbytes if files.weights == "plain" else 0)

    def copy(self) -> int:
        """Of all matrices but the embedding in four bits."""
        files, rest = self.files, self.files.fast_bytes
        mlp = 3 * len(files.layers) * files.intermediate * q8.row_bytes(files.hidden)
        return mlp + int(rest / files.dtype.itemsize * q8.row_bytes(1024) / 1024)

    def tail(self, layer: LayerFiles, resident: tuple[int, int]) -> int:
        """Of a layer that is not resident."""
        return sum(
            0 if count == self.rows else image.nbytes - count * image.bundle for image, count in zip(layer.images, resident)
        )

    def neurons(self, resident: tuple[int, int], slots: int) -> int:
        """Of all that stays of the MLPs, and the ring."""
        layers = self.files.layers
        stay = sum(
            image.nbytes if count == self.rows else count * image.bundle
            for layer in layers
            for image, count in zip(layer.images, resident)
        )
        ring = BUFFERS * max(self.tail(layer, resident) for layer in layers)
        return stay + ring + slots * sum(layer.images[0].bundle for layer in layers)


def plan(sizes: Sizes, memory: int, draft: Draft) -> Plan:
    """The best use of the memory. ValueError that names the least if that is too little."""
    rows, two = sizes.rows, any(len(layer.images) > 1 for layer in sizes.files.layers)
    copy = sizes.copy() if draft.copy else 0
    caches = sizes.caches + sizes.work
    fixed = sizes.fast + copy + caches + sizes.own

    def used(first: int, second: int, slots: int) -> int:
        return fixed + sizes.neurons((first, second), slots)

    def most(fits: Callable[[int], bool]) -> int:
        """The most neurons with which it fits: all, or a multiple of GRAIN."""
        if fits(rows):
            return rows
        low, high = 0, (rows - 1) // GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * GRAIN) else (low, middle - 1)
        return low * GRAIN

    # With all of the first image in memory the sparse model needs no slots, and the ring is for the second one.
    if draft.neurons and (used(rows, 0, 0) <= memory or draft.neurons >= rows):
        first, slots = rows, 0
    else:
        slots = min(rows, draft.neurons + -(-draft.neurons // _SLACK)) if draft.neurons else 0
        first = most(lambda count: used(count, 0, min(slots, rows - count)) <= memory)
        slots = min(slots, rows - first)
    second = most(lambda count: used(first, count, slots) <= memory) if two and first == rows else 0
    needed = used(first, second, slots)
    if needed > memory:
        parts = {
            "all but the MLPs": sizes.fast,
            "caches and activations": caches,
            "the process itself": sizes.own,
            "the sparse model": copy + slots * sum(layer.images[0].bundle for layer in sizes.files.layers),
            "layers that come and go": sizes.neurons((first, second), 0),
        }
        said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
        raise ValueError(
            f"memory: expected at least {needed / 1e9:.2f} GB for this model and these settings ({said}), got "
            f"{memory / 1e9:.2f} GB; a lower density, or weights of fewer bits, need less"
        )
    resident = first, second
    streamed = sum(sizes.tail(layer, resident) for layer in sizes.files.layers)
    return Plan(memory, resident, slots, copy, sizes.caches, needed, streamed)


def best_plan(sizes: Sizes, memory: int, drafts: Iterable[Draft]) -> Plan:
    """For the first of some sparse models for which there is room. ValueError for the last one if there is for none."""
    refused = ValueError("memory: there is no sparse model to divide it for")
    for draft in drafts:
        try:
            return plan(sizes, memory, draft)
        except ValueError as error:
            refused = error
    raise refused


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


def parse_memory(memory: int | str) -> int:
    """Bytes: of a number, or of a text like 6GB, 1.5 GiB or 800M. ValueError for anything else."""
    wrong = ValueError(f"memory: expected a number of bytes, or one like 6GB or 1.5GiB, got {memory!r}")
    if isinstance(memory, bool) or not isinstance(memory, (int, str)):
        raise wrong
    if isinstance(memory, str):
        found = _SIZE.fullmatch(memory)
        if found is None or (found[3] and not found[2]):
            raise wrong
        unit = _UNITS[found[2].lower()]
        memory = int(float(found[1]) * (1024 ** round(math.log(unit, 1000)) if found[3] else unit))
    if memory <= 0:
        raise wrong
    return memory


def free_memory() -> int:
    """Bytes that weights and caches may take if nobody says otherwise: of those that are free, or of those that this process's
    group may still take, nine tenths. Without any word of that, more than any model needs."""
    free = [1 << 62]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            most, now = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
            free.append(most - now)
    return min(free) * 9 // 10


def memory_in_use() -> int:
    """Bytes of this process that are in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Tiers:
    """The MLPs of a model whose neurons are in memory in part.

    on_progress: told how many layers there are, and of how many all is read that stays.
    OSError if the file cannot be read, or is not what was written.
    """

    def __init__(self, files: TierFiles, plan: Plan, on_progress: Callable[[int, int], None] | None = None) -> None:
        self.files, self.plan = files, plan
        images = [
            [Image(image.at, image.bundle, image.nbytes, count) for image, count in zip(layer.images, plan.resident)]
            for layer in files.layers
        ]
        self.stream = Stream(files.neurons, images, files.intermediate, files.checks, BUFFERS, plan.slots)
        for layer in range(len(images)):
            self.stream.fill(layer)
            if on_progress:
                on_progress(len(images), layer + 1)

    @property
    def address(self) -> int:
        """What a compiled model takes that reads all."""
        return self.stream.address

    @property
    def statistics(self) -> Statistics:
        return self.stream.statistics

    def check(self, draft: Draft) -> None:
        """ValueError unless there is room for what a sparse model needs."""
        if draft.copy and not self.plan.copy:
            raise ValueError('draft_weights: "q4" needs a copy in memory, which was divided without it; load the model with it')
        left = self.files.intermediate - self.plan.resident[0]
        if min(draft.neurons, left) > self.plan.slots:
            raise ValueError(
                f"density: expected a sparse model of at most {self.plan.slots} of {self.files.intermediate} neurons, for which "
                f"memory was divided, got one of {draft.neurons}; load the model with it, or with more memory"
            )

    @property
    def all_resident(self) -> bool:
        """Whether a sparse model that reads the first images finds all of them in memory."""
        return self.plan.resident[0] == self.files.intermediate

    def matrices(self, layer: int) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up and down of a layer, as the full model reads them between `need` and `done`."""
        files = self.files.layers[layer]
        images = [self._bundles(layer, number) for number in range(len(files.images))]
        shared = self._shared(layer)
        gate, up, down = (matrix_in(part, images, self.files.hidden, shared) for part in files.parts)
        return gate, up, down

    def _bundles(self, layer: int, number: int) -> torch.Tensor:
        """An image as uint8 [rows, bundle]."""
        return self.stream.bundles(layer, number)

    def _shared(self, layer: int) -> torch.Tensor | None:
        return self.files.shared(layer)

    def are_placed(self, four_bits: bool) -> bool:
        """Whether a sparse model, one that reads four bits of every weight or not, finds its neurons by their places."""
        return not self.all_resident and not (four_bits and self.plan.copy)

    def placed(self, layer: int) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up and down of a layer as a sparse model reads them at any time: what is in the first image of the neurons that
        `hold` was asked for."""
        files, places = self.files.layers[layer], self.stream.places(layer)
        gate, up, down = (
            dataclasses.replace(matrix.in_four_bits() if matrix.format == Format.Q8 else matrix, places=(places, part.at))
            for matrix, part in zip(self.matrices(layer), files.parts)
        )
        return gate, up, down

    def each(self, layers: int) -> Iterator[int]:
        """The layers in order, each while it is there."""
        for layer in range(layers):
            self.stream.need(layer)
            try:
                yield layer
            finally:
                self.stream.done(layer)
