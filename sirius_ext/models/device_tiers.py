"""A model that is larger than its CUDA device's memory: what stays there, and what comes from the host's whenever the full model
reads.

The sparse model reads four bits of every weight, and all of those stay: the upper planes of weights in eight bits, or a copy of
plain ones. Of what the full model reads besides, the first bytes of every layer stay, and the others come layer by layer from
pinned host memory (`kernels.weight_stream`). The neurons of the full model's matrices are where they always are: nothing that
reads them knows where they came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from ..kernels.weight_stream import StreamedImage, WeightStream, granularity
from .tier_files import Image, LayerFiles, Layout, TierFiles
from .tiers import BUFFERS, Draft, Plan, Sizes, Tiers, free_memory, plan

_CHUNK = 1 << 24  # numbers of a packed matrix that a prefill writes out at a time
_OF_A_NUMBER = 16  # bytes that one takes meanwhile


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

    def image(self, image: Image, count: int) -> StreamedImage:
        """One of a layer's, of which so many neurons may stay: bytes do, in pieces that the device has."""
        nbytes = self.rows * image.bundle
        return StreamedImage(nbytes, nbytes if count == self.rows else count * image.bundle // self.grain * self.grain)

    def _images(self, layer: LayerFiles, resident: tuple[int, int]) -> list[StreamedImage]:
        return [self.image(image, count) for image, count in zip(layer.images, resident)]

    def tails(self, resident: tuple[int, int], rest: bool) -> list[int]:
        """As `Sizes.tails`."""
        return [sum(nbytes - stay for nbytes, stay in self._images(layer, resident)) for layer in self.files.layers]

    def resident(self, resident: tuple[int, int]) -> int:
        """As `Sizes.resident`."""
        return sum(self._whole(image.resident) for layer in self.files.layers for image in self._images(layer, resident))

    def ring(self, resident: tuple[int, int], rest: bool) -> int:
        """As `Sizes.ring`, of each image by itself."""
        layers = [self._images(layer, resident) for layer in self.files.layers]
        return BUFFERS * sum(max(self._whole(nbytes - stay) for nbytes, stay in images) for images in zip(*layers))

    def slots(self, slots: int) -> int:
        """There are none."""
        return 0

    def _whole(self, nbytes: int) -> int:
        return -(-nbytes // self.grain) * self.grain


def device_plan(sizes: DeviceSizes, memory: int, drafts: Iterable[Draft], device: torch.device) -> Plan:
    """For the first of some sparse models, which reads nothing that does not stay. ValueError that names the least if the memory
    does not suffice, of the device or of the host."""
    draft = next(iter(drafts))
    files = sizes.files
    try:
        found = plan(sizes, memory, dataclasses.replace(draft, neurons=files.intermediate if draft.neurons else 0))
    except ValueError as error:
        if draft.neurons and files.weights == "plain":
            raise ValueError(
                f'draft_weights: expected "auto" or "q4" on {device} where 16-bit weights are not all in its memory, got "same": '
                f"what the sparse model reads has to stay there ({error})"
            ) from error
        raise
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
        layers = [[sizes.image(image, count) for image, count in zip(each.images, plan.resident)] for each in files.layers]
        self.weights, self._device = WeightStream(device, layers, BUFFERS), device
        for layer, images in enumerate(layers):
            for number, image in enumerate(images):
                read = files.read(layer, number).flatten()
                self.weights.image(layer, number)[: image.resident].copy_(read[: image.resident])
                self.weights.host(layer, number).copy_(read[image.resident :])
            if on_progress:
                on_progress(len(layers), layer + 1)

    address = 0  # a compiled model takes none; its passes take that of `weights`

    def check(self, draft: Draft) -> None:
        """As `Tiers.check`."""
        if draft.neurons and not self.all_resident:
            raise ValueError(
                f"draft_weights, mode: on {self._device} all that the sparse model reads has to be in memory, which was divided "
                'without this one; load the model with these settings, and draft_weights="auto" or "q4"'
            )
        super().check(draft)

    def are_placed(self, four_bits: bool) -> bool:
        """As `Tiers.are_placed`: none is."""
        return False

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
