"""A model that is larger than its CUDA device's memory: what stays there, and what comes from the host's whenever the full model
reads.

What the sparse model reads stays: of weights in eight bits their upper planes, of plain ones a copy in four bits or themselves,
of all neurons or of those of its set, which have slots. Of what the full model reads besides, the first bytes of every layer
stay, and the others come layer by layer from pinned host memory (`kernels.weight_stream`). The neurons of the full model's
matrices are where they always are: nothing that reads them knows where they came from. Where its set has slots, the sparse model
has matrices of its own, of fewer rows; what enters the set comes from pinned host memory before its next pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

from ..config import MAX_AUTO_PERIOD_FROM_DISK, MAX_NODES_ON_CUDA, PREFILL_CHUNK, TOGETHER
from ..kernels import q8
from ..kernels.dispatch import cuda_functions
from ..kernels.matrix import Format, Matrix
from ..kernels.weight_stream import Slots, StreamedImage, WeightStream, granularity, pinned
from .tier_files import LayerFiles, Layout, Stored, TierFiles, matrix_in, rows_together
from .tiers import BUFFERS, Draft, Plan, Sizes, Tiers, best_plan, free_memory, z_bytes

_ALIGNED = 256  # matrices begin at multiples of so many bytes
_OF_A_TABLE = 4  # bytes of an entry of the tables of `kernels.weight_stream.Slots`


def free_on(device: torch.device) -> int:
    """Bytes that weights and caches may take on a device: nine tenths of those that are free."""
    if device.type == "cpu":  # the emulated device's memory is the host's
        return free_memory()
    return torch.cuda.mem_get_info(device)[0] * 9 // 10


class DeviceSizes(Sizes):
    """As `Sizes`, on a device."""

    def __init__(self, files: Layout, caches: int, device: torch.device, row: int = 0) -> None:
        super().__init__(files, caches, row=row)
        self.grain = granularity(device)
        # Of a prefill: what goes from layer to layer, and within one, in numbers of up to four bytes, gate, up and z, and the
        # parts of the last product.
        self.work += 2 * PREFILL_CHUNK * TOGETHER * files.hidden * files.dtype.itemsize
        parts = cuda_functions(device).down_workspace(PREFILL_CHUNK, files.hidden, files.intermediate)
        self.work += 4 * (PREFILL_CHUNK * 3 * files.intermediate + parts)

    def rest_may_stream(self, draft: Draft) -> bool:
        """As `Sizes.rest_may_stream`; so it may where there is no sparse model that reads any of it, and of eight bits the lower
        nibbles may in any case."""
        return self.files.weights != "q4" and (draft.copy or not draft.neurons or self.files.weights == "q8")

    def streamed(self, name: str) -> int:
        """Bytes of a matrix beside the MLPs that may stream: all, or of eight bits the lower nibbles' plane."""
        stored = self.files.fast[name]
        return stored.nbytes if stored.format is None else stored.nbytes // 2

    @property
    def mlp_images(self) -> int:
        """How many images of each layer are its MLP's; those of attention come after them."""
        return max(len(layer.images) for layer in self.files.layers)

    def places(self, layer: int) -> tuple[dict[str, int], int]:
        """Where in an image the matrices of a layer's attention begin, and bytes of it."""
        found, at = {}, 0
        for name in self.files.beside[0][layer]:
            found[name] = at
            at += -(-self.streamed(name) // _ALIGNED) * _ALIGNED
        return found, at

    @property
    def head_rows(self) -> int:
        """Of an LM head that streams, how many come at a time: whole pieces of memory, so that they lie side by side."""
        head = self.files.beside[1]
        return 0 if head is None else rows_together(self.streamed(head) // self.files.fast[head].rows, self.grain)

    def beside(self) -> list[list[StreamedImage]]:
        """What streams beside the MLPs, of every layer and then of every part of the head. Of eight bits the upper nibbles are an
        image before that of the lower ones, and stay; those of the head are all in its first part."""
        files = self.files
        two = files.weights != "plain"
        found = [[_staying(size)] * two + [StreamedImage(size, 0)] for _, size in map(self.places, range(len(files.layers)))]
        if head := files.beside[1]:
            rows, step, size = files.fast[head].rows, self.head_rows, self.streamed(head)
            for first in range(0, rows, step):
                part = size // rows * (min(first + step, rows) - first)
                found.append([_staying(0 if first else size)] * two + [StreamedImage(part, 0)])
        return found

    def layers(self, resident: tuple[int, int], slots: int, rest: bool) -> list[list[StreamedImage]]:
        """All images, of every layer and of what comes after them."""
        none = [StreamedImage(0, 0)] * self.mlp_images
        # A layer whose matrices are all of four bits has no lower nibbles beside one of which a matrix has eight.
        layers = [(self.images(layer, resident, slots) + none)[: self.mlp_images] for layer in self.files.layers]
        if not rest:
            return layers
        return [mlp + beside for mlp, beside in itertools.zip_longest(layers, self.beside(), fillvalue=none)]

    def passes(self, rows: int = MAX_AUTO_PERIOD_FROM_DISK, streams: bool = False) -> int:
        """As `Sizes.passes`. No tree is larger than this."""
        return super().passes(min(rows, MAX_NODES_ON_CUDA), streams) - (self.left(rows) if streams else 0)

    def left(self, rows: int) -> int:
        """Bytes of what a verification leaves of every neuron. If the model does not fit the device, that is in host memory:
        there is time to send it over the link while weights come the other way."""
        return min(rows, MAX_NODES_ON_CUDA) * z_bytes(len(self.files.layers), self.files.intermediate, self.files.dtype)

    def fast(self, rest: bool) -> int:
        """As `Sizes.fast`. An embedding of which rows are read is in host memory."""
        everything = super().fast(True)
        if rest:
            return everything
        attention, head = self.files.beside
        names = itertools.chain(*attention, [head] if head else [])
        stays = sum(self._whole(image.resident) for images in self.beside() for image in images)
        return everything - sum(self.files.fast[name].nbytes for name in names) + stays

    def spare(self, neurons: int) -> int:
        """None: what enters a set comes when it is known to."""
        return 0

    def images(self, layer: LayerFiles, resident: tuple[int, int], slots: int = 0) -> list[StreamedImage]:
        """A layer's, of which so many neurons may stay: bytes do, in pieces that the device has. What of the first image's
        neurons does not stay because of that has slots, too."""
        found = []
        for image, count, more in zip(layer.images, resident, (slots, 0)):
            nbytes = self.rows * image.bundle
            stays = nbytes if count == self.rows else count * image.bundle // self.grain * self.grain
            found.append(StreamedImage(nbytes, stays, (count + more) * image.bundle - stays if more else 0))
        return found

    def tails(self, resident: tuple[int, int], rest: bool) -> list[int]:
        """As `Sizes.tails`."""
        return [sum(each.nbytes - each.resident for each in images) for images in self.layers(resident, 0, rest)]

    def resident(self, resident: tuple[int, int]) -> int:
        """As `Sizes.resident`."""
        return sum(self._whole(image.resident) for layer in self.files.layers for image in self.images(layer, resident))

    def ring(self, resident: tuple[int, int], rest: bool) -> int:
        """As `Sizes.ring`, of each image by itself."""
        layers = self.layers(resident, 0, rest)
        return BUFFERS * sum(max(self._whole(each.nbytes - each.resident) for each in images) for images in zip(*layers))

    def spared(self, slots: int) -> int:
        """As `Sizes.spared`: whatever is in slots."""
        return slots * sum(layer.images[0].bundle for layer in self.files.layers)

    def slots(self, first: int, slots: int) -> int:
        """As `Sizes.slots`, with the tables that say who is where."""
        if not slots:
            return 0
        tables = len(self.files.layers) * (self.rows + 4 * (first + slots)) * _OF_A_TABLE
        return tables + sum(self._whole(self.images(layer, (first, 0), slots)[0].slots) for layer in self.files.layers)

    def _whole(self, nbytes: int) -> int:
        return -(-nbytes // self.grain) * self.grain


def _staying(nbytes: int) -> StreamedImage:
    """One that stays."""
    return StreamedImage(nbytes, nbytes)


def device_plan(sizes: DeviceSizes, memory: int, drafts: Iterable[Draft], device: torch.device) -> Plan:
    """As `best_plan`. ValueError that names the least if the memory does not suffice, of the device or of the host."""
    found = best_plan(sizes, memory, drafts)
    elsewhere = found.streamed + sizes.spared(found.slots)
    if found.streamed:
        elsewhere += sizes.files.embedding_bytes + sizes.left(found.rows)
    if elsewhere > (free := free_memory()):
        raise ValueError(
            f"memory: {elsewhere / 1e9:.2f} GB, mostly of weights, would not be on {device} and must be in host memory that is "
            f"pinned, where {free / 1e9:.2f} GB are free; weights of fewer bits, or more of the device's memory, need less"
        )
    return found


def _planes(tensor: torch.Tensor, stored: Stored) -> list[torch.Tensor]:
    """The bytes of a matrix, or of each of its two planes: uint8 [bytes]."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    return [data] if stored.format is None else list(data.view(2, -1))


class DeviceTiers(Tiers):
    """As `Tiers`, on a CUDA device.

    ValueError or OSError if the files are not what was written; MemoryError if there is no memory.

    streams: not all of it is on the device.
    """

    def __init__(
        self, files: TierFiles, plan: Plan, device: torch.device, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.files, self.plan = files, plan  # there is no `stream`: nothing comes from the disk
        sizes = DeviceSizes(files, 0, device)
        layers = sizes.layers(plan.resident, plan.slots, plan.streams_rest)
        self.streams = any(sizes.tails(plan.resident, plan.streams_rest))
        self._scales = [None if each is None else each.to(device) for each in map(files.shared, range(len(files.layers)))]
        self.weights, self._device, self._sizes = WeightStream(device, layers, BUFFERS), device, sizes
        for layer, each in enumerate(files.layers):
            for number in range(len(each.images)):
                self._fill(layer, number, files.read(layer, number).flatten())
            if plan.streams_rest:
                for name, at in sizes.places(layer)[0].items():
                    self._fill_beside(layer, name, at)
            if on_progress:
                on_progress(len(files.layers), layer + 1)
        if plan.streams_rest and files.beside[1]:
            self._fill_head(files.beside[1])
        self._pinned_embedding = None if files.embedding is None else self._pinned(files.embedding)
        self.slots: Slots | None = None
        if plan.slots:
            bundles = [each.images[0].bundle for each in files.layers]
            first, rows = [images[0] for images in layers[: len(bundles)]], plan.resident[0] + plan.slots
            self.slots = Slots(device, self.weights, first, bundles, rows, files.intermediate)

    address = 0  # a compiled model takes none; its passes take that of `weights`

    def keep(self, layer: int, neurons: Callable[[], torch.Tensor]) -> None:
        """As `Tiers.keep`: nothing is, since what a set needs comes before the pass that reads it."""

    def placed(self, layer: int) -> tuple[Matrix, Matrix, Matrix]:
        """As `Tiers.placed`: matrices of the rows that the op `hold` has filled."""
        assert self.slots is not None
        files, bundles = self.files.layers[layer], self.slots.bundles(layer)
        upper = (
            dataclasses.replace(part, format=Format.Q8_UPPER, lower_at=None) if part.format == Format.Q8 else part
            for part in files.parts
        )
        gate, up, down = (matrix_in(part, [bundles], self.files.hidden, self._shared(layer)) for part in upper)
        if down.shared is not None:
            down = dataclasses.replace(down, neuron_of=self.slots.neuron_of[layer])
        return gate, up, down

    def _bundles(self, layer: int, number: int) -> torch.Tensor:
        return self.weights.image(layer, number).view(self.files.intermediate, -1)

    def _fill(self, layer: int, number: int, read: torch.Tensor) -> None:
        resident = len(read) - len(host := self.weights.host(layer, number))
        self.weights.image(layer, number)[:resident].copy_(read[:resident])
        host.copy_(read[resident:])

    def _fill_beside(self, layer: int, name: str, at: int) -> None:
        """A matrix of a layer's attention, whose bytes begin there in its images."""
        number = self._sizes.mlp_images
        *upper, streamed = _planes(self.files.fast_tensor(name), self.files.fast[name])
        for plane in upper:
            self.weights.image(layer, number)[at : at + len(plane)].copy_(plane)
        self.weights.host(layer, number + len(upper))[at : at + len(streamed)].copy_(streamed)

    def _fill_head(self, name: str) -> None:
        first, number = len(self.files.layers), self._sizes.mlp_images
        *upper, streamed = _planes(self.files.fast_tensor(name), self.files.fast[name])
        for plane in upper:
            self.weights.image(first, number).copy_(plane)
        for layer in itertools.count(first):
            host = self.weights.host(layer, number + len(upper))
            host.copy_(streamed[: len(host)])
            streamed = streamed[len(host) :]
            if not len(streamed):
                return

    def projection(self, layer: int, name: str, cols: int) -> Matrix | None:
        """As `Tiers.projection`."""
        at = self._sizes.places(layer)[0].get(name) if self.plan.streams_rest else None
        if at is None:
            return None
        stored, size, number = self.files.fast[name], self._sizes.streamed(name), self._sizes.mlp_images
        planes = [self.weights.image(layer, number + i)[at : at + size] for i in range(1 if stored.format is None else 2)]
        return self._matrix(planes, stored, cols)

    def _pinned(self, name: str) -> Matrix:
        """A matrix in host memory, where kernels read it."""
        stored, tensor = self.files.fast[name], self.files.fast_tensor(name)
        host, found = pinned(self._device, tensor.nbytes)
        host.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        data = found.view(tensor.dtype).view(tensor.shape)
        return Matrix(data, None if stored.format is None else (stored.format, self.files.hidden))

    @property
    def embedding(self) -> Matrix | None:
        """As `Tiers.embedding`: a token reads a row over the link."""
        return self._pinned_embedding

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `Tiers.rows_of`: all rows are where they always are."""
        return tokens

    @property
    def head(self) -> Matrix | None:
        """As `Tiers.head`."""
        name = self.files.beside[1] if self.plan.streams_rest else None
        if name is None:
            return None
        stored, size = self.files.fast[name], self._sizes.streamed(name)
        first, number = len(self.files.layers), self._sizes.mlp_images
        planes = [self.weights.memory(first, number + i, size) for i in range(1 if stored.format is None else 2)]
        return self._matrix(planes, stored, self.files.hidden)

    @property
    def head_rows(self) -> int:
        """As `Tiers.head_rows`."""
        return self._sizes.head_rows if self.plan.streams_rest else 0

    def _matrix(self, planes: list[torch.Tensor], stored: Stored, cols: int) -> Matrix:
        """Of its bytes, or those of its two planes."""
        if stored.format is None:
            return Matrix(self._numbers(planes[0], (stored.rows, cols)))
        upper, lower = (plane.view(stored.rows, -1) for plane in planes)
        return Matrix(upper, (stored.format, cols), apart=lower[:, q8.scale_bytes(cols) :])

    def _shared(self, layer: int) -> torch.Tensor | None:
        return self._scales[layer]

    def each(self, first: int, last: int) -> Iterator[int]:
        """Layers in order; what is launched until the next one is asked for finds all of it."""
        try:
            self.weights.ahead(first, last)
            for layer in range(first, last):
                self.weights.need(layer)
                yield layer
                self.weights.done(layer)
        finally:
            self.weights.end()

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """From its beginning on the first layers are copied, for the pass that is launched within it."""
        self.weights.ahead()
        try:
            yield
        finally:
            self.weights.end()
