"""Weights that come to a CUDA device from pinned host memory while the full model reads (csrc/cuda/weight_stream.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import dispatch
from .stream import memory_at


class StreamedImage(NamedTuple):
    """One of a layer's, in bytes.

    nbytes: of the image.
    resident: its first ones that are on the device for good: all, or a multiple of `granularity`.
    """

    nbytes: int
    resident: int


def granularity(device: torch.device) -> int:
    """Bytes of a device's memory that can be had by itself."""
    with dispatch.guard(device):
        found: int = dispatch.cuda_functions(device).WeightStream.granularity()
    return found


class WeightStream:
    """The images of a model's layers on a device, of which a part is there for good, and another for what is launched between
    `need` and `done` alone. These, and `ahead` and `end`, are for torch's current stream; they wait for nothing and can be
    captured.

    layers: the images of each, as many for every layer.
    buffers: layers that may be there at a time.
    MemoryError that says whose if there is no memory.
    """

    def __init__(self, device: torch.device, layers: Sequence[Sequence[StreamedImage]], buffers: int) -> None:
        self._device, self._layers = device, layers
        with dispatch.guard(device):
            self._raw = dispatch.cuda_functions(device).WeightStream(
                layers=[[tuple(image) for image in images] for images in layers], buffers=buffers
            )

    @property
    def address(self) -> int:
        """What a compiled pass takes."""
        address: int = self._raw.address
        return address

    def image(self, layer: int, number: int) -> torch.Tensor:
        """An image, uint8 [nbytes] on the device."""
        size = self._layers[layer][number].nbytes
        if self._device.type == "cpu":  # the emulated device's memory is the host's
            return memory_at(self._raw.image(layer, number), size, self._raw)
        return torch.as_tensor(_OnDevice(self._raw, self._raw.image(layer, number), size), device=self._device)

    def host(self, layer: int, number: int) -> torch.Tensor:
        """What of an image is not resident, uint8 in pinned host memory. To be filled before anything else."""
        nbytes, resident = self._layers[layer][number]
        return memory_at(self._raw.host(layer, number), nbytes - resident, self._raw)

    def ahead(self) -> None:
        """The first layers of the pass that comes next are copied from here on."""
        self._call("ahead")

    def need(self, layer: int) -> None:
        """What is launched after this finds all of a layer. Layers come in order."""
        self._call("need", layer)

    def done(self, layer: int) -> None:
        """Nothing that is launched after this reads the layer."""
        self._call("done", layer)

    def end(self) -> None:
        """The pass goes no further, if there is one."""
        self._call("end")

    def _call(self, name: str, *arguments: int) -> None:
        with dispatch.guard(self._device):
            getattr(self._raw, name)(*arguments, dispatch.stream(self._device))


class _OnDevice:
    """Memory of a device, as torch takes it without a copy."""

    def __init__(self, owner: object, address: int, size: int) -> None:
        self.owner = owner  # which lives as long as the tensor
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
