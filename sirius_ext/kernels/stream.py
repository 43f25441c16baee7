"""Neurons that arrive from a file while the full model reads (csrc/cpu/stream.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _C

PAGE = 4096  # of a disk, and of memory
GRAIN = 64  # resident neurons are as many at a time, so that whole pages are resident
PATIENCE = 60.0  # seconds without a byte, after which a disk is given up


class Image(NamedTuple):
    """One of a layer's, an array of bundles: of neurons, or blocks of something else.

    at: where it is in the file, a multiple of PAGE.
    bundle: bytes of each; of a neuron a multiple of 64.
    nbytes: of the image, a multiple of PAGE.
    rows: how many bundles.
    resident: the first ones, that are in memory for good: all, or as many as fill whole pages (of neurons a multiple of GRAIN).
    """

    at: int
    bundle: int
    nbytes: int
    rows: int
    resident: int


def memory_at(address: int, size: int, owner: object) -> torch.Tensor:
    """The host's memory from an address on: uint8 [size]. owner: whose it is, which lives as long as the tensor."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=torch.uint8)


class Statistics(NamedTuple):
    """What has been read since the stream was made.

    bytes: from the file, without those that are resident.
    fetched: of these, for slots alone.
    busy: seconds in which something was being read.
    waited: seconds in which a pass waited for it.
    """

    bytes: int
    fetched: int
    busy: float
    waited: float


class Stream:
    """The images of a model's layers as memory, of which a part is there for good, and another comes with `need` and may be gone
    after `done`. One reader at a time.

    path: the file.
    layers: the images of each; the last ones may have no neurons. They stand one after the other in memory.
    rows: neurons of a layer.
    checks: CRC-32C of every bundle, one after the other: int32.
    buffers: layers that may be there at a time.
    slots: of every layer, for neurons of the first image that are not resident.
    OSError if the file cannot be opened; MemoryError if there is no memory.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[Sequence[Image]],
        rows: int,
        checks: torch.Tensor,
        buffers: int = 2,
        slots: int = 0,
        readers: int = 4,
        patience: float = PATIENCE,
    ) -> None:
        self._layers, self.slots = layers, slots
        self._raw = _C.Stream(
            path=str(path),
            rows=rows,
            layers=[
                [(image.at, image.bundle, image.nbytes, image.rows, image.resident) for image in images] for images in layers
            ],
            checks=checks.contiguous().data_ptr(),
            buffers=buffers,
            slots=slots,
            readers=readers,
            patience=patience,
        )

    @property
    def address(self) -> int:
        """What a compiled model takes."""
        address: int = self._raw.address
        return address

    def bundles(self, layer: int, number: int) -> torch.Tensor:
        """An image as uint8 [rows, bundle]. What is not resident may be read between `need` and `done` alone."""
        image = self._layers[layer][number]
        return self.memory(layer, number, image.rows * image.bundle).view(image.rows, image.bundle)

    def memory(self, layer: int, number: int, size: int) -> torch.Tensor:
        """Bytes from where an image begins: uint8 [size]."""
        return memory_at(self._raw.image(layer, number), size, self._raw)

    def places(self, layer: int) -> int:
        """The address of a table of addresses: where the neurons of the first image are that are resident or have a slot."""
        address: int = self._raw.places(layer)
        return address

    def fill(self, layer: int) -> None:
        """Read what is resident of a layer. To be called for all layers before anything else. OSError."""
        self._raw.fill(layer)

    def need(self, layer: int) -> None:
        """Wait until all of a layer is there; the next ones are read on meanwhile. OSError if it cannot be had."""
        self._raw.need(layer)

    def done(self, layer: int) -> None:
        """Nobody reads the layer any more."""
        self._raw.done(layer)

    def hold(self, neurons: torch.Tensor) -> None:
        """Have sets of neurons, int32 [layers, count], where `places` says. OSError if they cannot be had."""
        self._raw.hold(neurons.data_ptr(), neurons.shape[1])

    def keep(self, layer: int, neurons: torch.Tensor) -> None:
        """Of the layer that is needed right now, have neurons, int32 [count], where `places` says, as far as there are slots."""
        self._raw.keep(layer, neurons.data_ptr(), len(neurons))

    @property
    def statistics(self) -> Statistics:
        return Statistics(*self._raw.statistics())
