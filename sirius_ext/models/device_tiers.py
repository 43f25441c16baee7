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
from collections.abc import Callable, Iterable, Iterator

import torch

from ..kernels.matrix import Format, Matrix
from ..kernels.weight_stream import Slots, StreamedImage, WeightStream, granularity
from .tier_files import LayerFiles, Layout, TierFiles, matrix_in
from .tiers import BUFFERS, Draft, Plan, Sizes, Tiers, best_plan, free_memory

_CHUNK = 1 << 24  # numbers of a packed matrix that a prefill writes out at a time
_OF_A_NUMBER = 16  # bytes that one takes meanwhile
_OF_A_TABLE = 4  # bytes of an entry of the tables of `kernels.weight_stream.Slots`


def free_on(device: torch.device) -> int:
    """Bytes that weights and caches may take on a device: nine tenths of those that are free."""
    if device.type == "cpu":  # the emulated device's memory is the host's
        return free_memory()
    return torch.cuda.mem_get_info(device)[0] * 9 // 10


class DeviceSizes(Sizes):
    """As `Sizes`, on a device."""

    rest_may_stream = False

    def __init__(self, files: Layout, caches: int, device: torch.device) -> None:
        super().__init__(files, caches)
        self.grain = granularity(device)
        if files.weights != "plain":  # torch wants matrices written out: of down all at once
            numbers = files.intermediate * files.hidden
            self.work += _OF_A_NUMBER * (numbers + min(numbers, _CHUNK))

    def fast(self, rest: bool) -> int:
        """As `Sizes.fast`, with all of the embedding, whose rows kernels read."""
        return super().fast(rest) + self.files.embedding_bytes

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
        return [sum(each.nbytes - each.resident for each in self.images(layer, resident)) for layer in self.files.layers]

    def resident(self, resident: tuple[int, int]) -> int:
        """As `Sizes.resident`."""
        return sum(self._whole(image.resident) for layer in self.files.layers for image in self.images(layer, resident))

    def ring(self, resident: tuple[int, int], rest: bool) -> int:
        """As `Sizes.ring`, of each image by itself."""
        layers = [self.images(layer, resident) for layer in self.files.layers]
        return BUFFERS * sum(max(self._whole(each.nbytes - each.resident) for each in images) for images in zip(*layers))

    def slots(self, first: int, slots: int) -> int:
        """As `Sizes.slots`, with the tables that say who is where."""
        if not slots:
            return 0
        tables = len(self.files.layers) * (self.rows + 4 * (first + slots)) * _OF_A_TABLE
        return tables + sum(self._whole(self.images(layer, (first, 0), slots)[0].slots) for layer in self.files.layers)

    def _whole(self, nbytes: int) -> int:
        return -(-nbytes // self.grain) * self.grain


def device_plan(sizes: DeviceSizes, memory: int, drafts: Iterable[Draft], device: torch.device) -> Plan:
    """As `best_plan`. ValueError that names the least if the memory does not suffice, of the device or of the host."""
    files = sizes.files
    if any(part.format.across for layer in files.layers for part in layer.parts):
        # Rows that share scales find them by their numbers: all of what the sparse model reads stays where it is.
        drafts = (dataclasses.replace(each, neurons=files.intermediate if each.neurons else 0) for each in drafts)
    found = best_plan(sizes, memory, drafts)
    if found.streamed > (free := free_memory()):
        raise ValueError(
            f"memory: of the weights {found.streamed / 1e9:.2f} GB would not be on {device} and must be in host memory that is "
            f"pinned, where {free / 1e9:.2f} GB are free; weights of fewer bits, or more of the device's memory, need less"
        )
    return found


class DeviceTiers(Tiers):
    """As `Tiers`, on a CUDA device.

    ValueError if the files are not what was written; MemoryError if there is no memory.
    """

    def __init__(
        self, files: TierFiles, plan: Plan, device: torch.device, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.files, self.plan = files, plan  # there is no `stream`: nothing comes from the disk
        sizes = DeviceSizes(files, 0, device)
        layers = [sizes.images(each, plan.resident, plan.slots) for each in files.layers]
        self.weights, self._device = WeightStream(device, layers, BUFFERS), device
        for layer, images in enumerate(layers):
            for number, image in enumerate(images):
                read = files.read(layer, number).flatten()
                self.weights.image(layer, number)[: image.resident].copy_(read[: image.resident])
                self.weights.host(layer, number).copy_(read[image.resident :])
            if on_progress:
                on_progress(len(layers), layer + 1)
        self.slots: Slots | None = None
        if plan.slots:
            bundles = [each.images[0].bundle for each in files.layers]
            first, rows = [images[0] for images in layers], plan.resident[0] + plan.slots
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
        gate, up, down = (matrix_in(part, [bundles], self.files.hidden) for part in upper)
        return gate, up, down

    def _bundles(self, layer: int, number: int) -> torch.Tensor:
        return self.weights.image(layer, number).view(self.files.intermediate, -1)

    def _shared(self, layer: int) -> torch.Tensor | None:
        shared = self.files.shared(layer)
        return None if shared is None else shared.to(self._device)

    def each(self, first: int, last: int) -> Iterator[int]:
        """The layers in order, which are all; what is launched until the next one is asked for finds all of it."""
        try:
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
