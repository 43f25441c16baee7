"""A model that is larger than the memory it may have: which of its neurons stay there, and where the others come from.

Everything but the MLPs stays, unless the sparse model has a copy of all and memory is short. Of the MLPs' neurons those stay that
the sparse model reads, and of the others the first ones of every layer, as many as there is room for; what is left arrives from
the file, layer by layer, whenever the full model reads (`kernels.stream`). Neighbours stay and neighbours stream, because a disk
reads far more in large pieces than in small ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import MAX_AUTO_PERIOD_FROM_DISK
from ..control_groups import groups
from ..kernels.matrix import Format, Matrix
from ..kernels.stream import GRAIN, Image, Statistics, Stream
from .families import describe
from .tier_files import EMBEDDING, Layout, TierFiles, matrix_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUFFERS = 2
CACHE_TOKENS = 4096  # of keys and values for which room is left, or as many as the model's context has
# Bytes that Python and its libraries may take beside the memory that was asked for. Of the 300 MB that are promised, the rest is
# for what processes were seen to take beside what is counted.
_OWN = 50_000_000
_WORK = 48_000_000  # bytes of activations and what else passes need, whatever the model
_SLACK = 8  # one slot more for each so many, for neurons that are about to enter the set


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a sparse model needs of the memory.

    neurons: those of every layer's set, if it reads of the weights what is in the first image of a layer; all of them where the
        choice among all is made anew for every token; 0 if it reads none of that.
    copy: it reads a copy of all weights in four bits.
    density: the share of neurons that this is for, if nobody has said one.
    rows: tokens of the longest pass of the full model over a draft.
    """

    neurons: int = 0
    copy: bool = False
    density: float | None = None
    rows: int = MAX_AUTO_PERIOD_FROM_DISK


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays in memory, in bytes and neurons.

    memory: what weights and caches may take.
    resident: of every layer's first and second image, neurons that stay.
    slots: of every layer, neurons more of the first image, for the sparse model's set.
    density: what "auto" means for that, if it means something else than it does elsewhere.
    copy: bytes of the sparse model's copy.
    streams_rest: attention and LM head of the full model come from the file, too.
    caches: bytes left for keys and values.
    used: bytes of all together.
    streamed: bytes that a pass of the full model reads from the file, or from a device's host.
    parts: what `used` is made of, by words.
    rows: tokens of the longest pass that there is room for.
    """

    memory: int
    resident: tuple[int, int]
    slots: int
    copy: int
    streams_rest: bool
    caches: int
    used: int
    streamed: int
    density: float | None = None
    parts: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: int = MAX_AUTO_PERIOD_FROM_DISK

    def summary(self, source: str | Path) -> str:
        """For people. source: where the rest comes from."""
        if not self.streamed:
            return f"all of it, {self.used / 1e9:.2f} GB"
        return f"{self.used / 1e9:.2f} GB; the full model reads {self.streamed / 1e9:.2f} GB of {source} besides"


def cache_bytes(model: PreTrainedModel) -> int:
    """Of keys and values of as many tokens as room is left for."""
    d, _ = describe(model)
    return 2 * len(d.windows) * d.kv_heads * d.head_dim * model.dtype.itemsize * min(d.context, CACHE_TOKENS)


def z_bytes(layers: int, intermediate: int, dtype: torch.dtype) -> int:
    """Of what a verification leaves of every neuron for a token."""
    return layers * intermediate * dtype.itemsize


def row_bytes(model: PreTrainedModel) -> int:
    """Of what a pass needs for a token: mostly logits, and what a verification leaves."""
    config = model.config
    row: int = 4 * config.vocab_size + z_bytes(config.num_hidden_layers, config.intermediate_size, model.dtype)
    return row


def beside_weights(model: PreTrainedModel) -> int:
    """Bytes of caches and activations for which room is left beside a model that is loaded whole."""
    return cache_bytes(model) + _WORK + MAX_AUTO_PERIOD_FROM_DISK * row_bytes(model)


class Sizes:
    """Bytes of a model's parts. caches: of keys and values. own: of the process without the model. row: as `row_bytes` has it."""

    def __init__(self, files: Layout, caches: int, own: int = 0, row: int = 0) -> None:
        self.files, self.rows, self.caches, self.row = files, files.intermediate, caches, row
        self.work = _WORK
        self.own = max(0, own - _OWN)  # of what was asked for

    def passes(self, rows: int = MAX_AUTO_PERIOD_FROM_DISK, streams: bool = False) -> int:
        """Of what passes need, with so many tokens in the longest one. streams: not all of the model is in memory."""
        return self.work + rows * self.row

    def rest_may_stream(self, draft: Draft) -> bool:
        """Whether what is beside the MLPs, attention and LM head, may: a sparse model that has a copy needs nothing of it."""
        return draft.copy

    def fast(self, rest: bool) -> int:
        """Of all but the MLPs that is in memory, with attention and LM head or without."""
        return self.files.fast_bytes(rest)

    def copy(self) -> int:
        """Of all matrices but the embedding in four bits."""
        return sum(self.files.read_bytes(four_bits=True))

    def tails(self, resident: tuple[int, int], rest: bool) -> list[int]:
        """Of each layer what is not resident, with what is beside the MLP or without; with it also of what comes after them."""
        files = self.files
        tails = [
            sum(0 if count == self.rows else image.nbytes - count * image.bundle for image, count in zip(layer.images, resident))
            for layer in files.layers
        ]
        if not rest:
            return tails
        besides = [each.image.nbytes for each in files.rest]
        return [sum(each) for each in itertools.zip_longest(tails, besides, fillvalue=0)]

    def resident(self, resident: tuple[int, int]) -> int:
        """Of the neurons that stay."""
        return sum(
            image.nbytes if count == self.rows else count * image.bundle
            for layer in self.files.layers
            for image, count in zip(layer.images, resident)
        )

    def ring(self, resident: tuple[int, int], rest: bool) -> int:
        """Of the layers that come and go."""
        return BUFFERS * max(self.tails(resident, rest))

    def spare(self, neurons: int) -> int:
        """Slots beside those of a set of so many, for neurons that are about to enter it."""
        return -(-neurons // _SLACK)

    def slots(self, first: int, slots: int) -> int:
        """Of so many in every layer, whose first neurons stay."""
        return slots * sum(layer.images[0].bundle for layer in self.files.layers)

    def spared(self, slots: int) -> int:
        """Bytes that a pass of the full model takes from slots for sure, so that they are not read."""
        return 0

    def neurons(self, resident: tuple[int, int], slots: int, rest: bool) -> int:
        """Of all that stays of the MLPs, and the ring."""
        return self.resident(resident) + self.ring(resident, rest) + self.slots(resident[0], slots)


class TooLittle(ValueError):
    """The memory does not suffice. least: bytes that do."""

    def __init__(self, memory: int, least: Plan) -> None:
        self.least = least.used
        expected, got = -(-least.used // 10**7) / 100, memory // 10**7 / 100  # in GB, so that what is named suffices
        super().__init__(
            f"memory: expected at least {expected:.2f} GB for this model and these settings ({shown(least.parts)}), got "
            f"{got:.2f} GB; a lower density, or weights of fewer bits, need less"
        )


def plan(sizes: Sizes, memory: int, draft: Draft) -> Plan:
    """The best use of the memory: the one that leaves least to read. TooLittle if there is none."""
    ways = (False, True) if sizes.rest_may_stream(draft) else (False,)
    tried = [_divided(sizes, memory, draft, streams_rest) for streams_rest in ways]
    if fitting := [each for each in tried if each.used <= memory]:
        return min(fitting, key=lambda each: each.streamed)
    least = min(tried, key=lambda each: each.used)
    while least.used > least.memory:  # with more memory there is more room for caches, too
        least = _divided(sizes, least.used, draft, least.streams_rest)
    raise TooLittle(memory, least)


def _divided(sizes: Sizes, memory: int, draft: Draft, streams_rest: bool) -> Plan:
    """With as much of the MLPs in memory as there is room for; if there is none even for the least, that, which uses more."""
    files, rows = sizes.files, sizes.rows
    copy, kept = (sizes.copy() if draft.copy else 0), min(sizes.caches, memory // 16)
    fixed = copy + kept + sizes.own + sizes.fast(not streams_rest)

    def work(first: int, second: int) -> int:
        return sizes.passes(draft.rows, streams=any(sizes.tails((first, second), streams_rest)))

    def used(first: int, second: int, slots: int) -> int:
        return fixed + work(first, second) + sizes.neurons((first, second), slots, streams_rest)

    def most(fits: Callable[[int], bool]) -> int:
        """The most neurons with which it fits: all, or a multiple of GRAIN."""
        if fits(rows):
            return rows
        low, high = 0, (rows - 1) // GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * GRAIN) else (low, middle - 1)
        return low * GRAIN

    slots = min(rows, draft.neurons + sizes.spare(draft.neurons)) if draft.neurons else 0
    # With all of the first image in memory the sparse model needs no slots, and the ring is for the second one.
    ends = [(rows, 0, 0), (rows, rows, 0)] + ([(0, 0, slots)] if draft.neurons < rows else [])
    if min(used(*end) for end in ends[:2]) <= memory:
        first, slots = rows, 0
    else:
        first = most(lambda count: used(count, 0, min(slots, rows - count)) <= memory)
        slots = min(slots, rows - first)
    two = any(len(layer.images) > 1 for layer in files.layers)
    second = most(lambda count: used(first, count, slots) <= memory) if two and first == rows else 0
    if draft.neurons >= rows > first or used(first, second, slots) > memory:
        first, second, slots = min(ends, key=lambda end: used(*end))
    parts = {
        "all but the MLPs": sizes.fast(not streams_rest),
        "the sparse model": copy + sizes.slots(first, slots),
        "neurons": sizes.resident((first, second)),
        "layers that come and go": sizes.ring((first, second), streams_rest),
        "caches and activations": kept + work(first, second),
        "the process itself": sizes.own,
    }
    streamed = sum(sizes.tails((first, second), streams_rest)) - sizes.spared(slots)
    density = draft.density if streamed else None
    total = sum(parts.values())
    return Plan(memory, (first, second), slots, copy, streams_rest, kept, total, streamed, density, parts, draft.rows)


def whole_plan(sizes: Sizes, memory: int, drafts: Iterable[Draft]) -> Plan | None:
    """Of a model that is loaded whole, with the first of some sparse models for which there is room beside it. None if there is
    room for none of them."""
    plans = (everything(sizes, memory, draft) for draft in drafts)
    return next((each for each in plans if each.used <= memory), None)


def everything(sizes: Sizes, memory: int, draft: Draft = Draft()) -> Plan:
    """What there is of a model that is loaded whole, and of a sparse model's copy, whether there is room for it or not."""
    files, rows = sizes.files, sizes.rows
    copy = sizes.copy() if draft.copy else 0
    parts = {
        "all but the MLPs": sum(each.nbytes for each in files.fast.values()),
        "the sparse model": copy,
        "neurons": sizes.resident((rows, rows)),
        "caches and activations": sizes.caches + sizes.passes(),
        "the process itself": sizes.own,
    }
    return Plan(memory, (rows, rows), 0, copy, False, sizes.caches, sum(parts.values()), 0, None, parts)


def shown(parts: Mapping[str, int]) -> str:
    """Bytes by what they are of, for people, in GB."""
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)


def best_plan(sizes: Sizes, memory: int, drafts: Iterable[Draft]) -> Plan:
    """For the first of some sparse models for which there is room. TooLittle if there is none, of the one that needs least."""
    refused = []
    for draft in drafts:
        try:
            return plan(sizes, memory, draft)
        except TooLittle as error:
            refused.append(error)
    raise min(refused, key=lambda error: error.least)


def free_memory() -> int:
    """Bytes that weights and caches may take if nobody says otherwise: of those that are free, or of those that this process's
    group may still take, nine tenths. Without any word of that, more than any model needs."""
    free = [1 << 62]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
    for folder, version in groups("memory"):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        with contextlib.suppress(OSError, ValueError):
            most, now = (int((folder / name).read_text()) for name in names)
            free.append(most - now + _pages_of_files(folder))
    return min(free) * 9 // 10


def _pages_of_files(group: Path) -> int:
    """Bytes that a control group uses for what is on a disk as well, and gives back when it is asked."""
    with contextlib.suppress(OSError, ValueError):
        said = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # With "total_" those of groups inside it count, too, as they do without it in the newer kind of group.
        names = ("total_inactive_file", "total_active_file") if "total_cache" in said else ("inactive_file", "active_file")
        return sum(int(said.get(name, 0)) for name in names)
    return 0


def memory_in_use() -> int:
    """Bytes of this process that are in memory, but for pages of files, which can be read again."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class EmbeddingRows:
    """An embedding of which the rows of a pass are read from the disk.

    matrix: as large as all of it. Its first rows are those that were asked for last; what no row has come to takes no memory.
    """

    def __init__(self, files: TierFiles) -> None:
        planes, rows, size = files.embedding_shape
        form = files.fast[EMBEDDING].format
        memory = mmap.mmap(-1, planes * rows * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._files, self._data = files, torch.frombuffer(memory, dtype=torch.uint8).view(planes, rows, size)
        if form is None:
            self.matrix = Matrix(self._data[0].view(files.dtype))
        else:
            self.matrix = Matrix(self._data if planes > 1 else self._data[0], (form, files.hidden))

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `Tiers.rows_of`."""
        distinct, rows = torch.unique(tokens, return_inverse=True)
        self._data[:, : len(distinct)] = self._files.embedding_rows(distinct.tolist())
        found: torch.Tensor = rows.to(tokens.dtype)
        return found


class Tiers:
    """The MLPs of a model whose neurons are in memory in part.

    on_progress: told how many layers there are, and of how many all is read that stays.
    OSError if the file cannot be read, or is not what was written.
    """

    def __init__(self, files: TierFiles, plan: Plan, on_progress: Callable[[int, int], None] | None = None) -> None:
        self.files, self.plan = files, plan
        rows, checks = files.intermediate, files.checks.split([len(layer.images) for layer in files.layers])
        images = [
            [Image(image.at, image.bundle, image.nbytes, rows, count) for image, count in zip(layer.images, plan.resident)]
            for layer in files.layers
        ]
        sums = [each.flatten() for each in checks]
        if plan.streams_rest:
            blocks = files.rest_checks.split([each.blocks for each in files.rest])
            for index, (each, own) in enumerate(zip(files.rest, blocks)):
                image = Image(each.image.at, each.image.bundle, each.image.nbytes, each.blocks, 0)
                if index < len(images):
                    images[index].append(image)
                    sums[index] = torch.cat((sums[index], own))
                else:
                    images.append([image])
                    sums.append(own)
        self._embedding = EmbeddingRows(files) if files.rows_are_read(not plan.streams_rest) else None
        self.stream = Stream(files.neurons, images, rows, torch.cat(sums), BUFFERS, plan.slots)
        for layer in range(len(files.layers)):
            self.stream.fill(layer)
            if on_progress:
                on_progress(len(files.layers), layer + 1)

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

    def projection(self, layer: int, name: str, cols: int) -> Matrix | None:
        """A matrix of a layer's attention, as the full model reads it between `need` and `done`; None if it is in memory."""
        if not self.plan.streams_rest:
            return None
        at, shape = self.files.rest[layer].tensors[name]
        bytes_ = self.stream.bundles(layer, len(self.files.layers[layer].images)).flatten()
        return Matrix(self._numbers(bytes_[at:], shape))

    @property
    def embedding(self) -> Matrix | None:
        """Of which rows are read from elsewhere, where `rows_of` says; None if it is the model's own parameter."""
        return None if self._embedding is None else self._embedding.matrix

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which rows of the embedding are those of tokens, an integer tensor [t], until it is asked for others: of the same dtype
        and shape. OSError if they cannot be read, or are not what was written."""
        return tokens if self._embedding is None else self._embedding.rows_of(tokens)

    @property
    def head(self) -> Matrix | None:
        """The LM head, of which `head_rows` are there at a time; None if it is in memory."""
        if not self.plan.streams_rest:
            return None
        first, parts = len(self.files.layers), self.files.rest[len(self.files.layers) :]
        shapes = [shape for part in parts for _, shape in part.tensors.values()]
        rows, cols = sum(shape[0] for shape in shapes), shapes[0][1]
        return Matrix(self._numbers(self.stream.memory(first, 0, rows * cols * self.files.dtype.itemsize), (rows, cols)))

    @property
    def head_rows(self) -> int:
        """Rows of the LM head that come at a time, each lot like one layer more; 0 if it is in memory."""
        if not self.plan.streams_rest:
            return 0
        ((_, (rows, _)),) = self.files.rest[len(self.files.layers)].tensors.values()
        return rows

    def _numbers(self, data: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        return data[: shape[0] * shape[1] * self.files.dtype.itemsize].view(self.files.dtype).view(shape)

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

    def keep(self, layer: int, neurons: Callable[[], torch.Tensor]) -> None:
        """Of a layer that is there right now, keep what `neurons` says that a sparse model will want, int32 [count], if there are
        slots."""
        if self.plan.slots:
            self.stream.keep(layer, neurons())

    def each(self, first: int, last: int) -> Iterator[int]:
        """Layers in order, each while it is there."""
        for layer in range(first, last):
            self.stream.need(layer)
            try:
                yield layer
            finally:
                self.stream.done(layer)
