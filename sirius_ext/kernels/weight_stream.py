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
    slots: bytes of slots behind these, for a sparse model (`WeightStream.slots`).
    """

    nbytes: int
    resident: int
    slots: int = 0


def granularity(device: torch.device) -> int:
    """Bytes of a device's memory that can be had by itself."""
    with dispatch.guard(device):
        found: int = dispatch.cuda_functions(device).WeightStream.granularity()
    return found


def pinned(device: torch.device, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pinned memory of the host: uint8 [nbytes], as the host sees it, and as the device does, which reads it where it is.
    MemoryError if there is none."""
    with dispatch.guard(device):
        raw = dispatch.cuda_functions(device).PinnedMemory(nbytes)
    return memory_at(raw.address, nbytes, raw), _on_device(device, raw.address, nbytes, raw)


def to_host(data: torch.Tensor, to: torch.Tensor) -> None:
    """Copy contiguous memory of a device to pinned memory of the host, as the device sees it, on torch's current stream: what is
    launched after this finds it there."""
    device = data.device
    with dispatch.guard(device):
        dispatch.cuda_functions(device).to_host(data.data_ptr(), to.data_ptr(), data.nbytes, dispatch.stream(device))


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
        return self._memory(self._raw.image(layer, number), self._layers[layer][number].nbytes)

    def host(self, layer: int, number: int) -> torch.Tensor:
        """What of an image is not resident, uint8 in pinned host memory. To be filled before anything else."""
        nbytes, resident, _ = self._layers[layer][number]
        return memory_at(self._raw.host(layer, number), nbytes - resident, self._raw)

    def slots(self, layer: int, number: int) -> torch.Tensor:
        """Of an image that has slots, its resident bytes once more, and the slots behind them: uint8 [resident + slots]."""
        _, resident, slots = self._layers[layer][number]
        return self._memory(self._raw.slots(layer, number), resident + slots)

    def share(self, held: torch.Tensor, row_of: torch.Tensor) -> None:
        """What is in slots is copied from there while the full model reads: see `Slots`, whose tables these are."""
        self._raw.share(held.data_ptr(), row_of.data_ptr(), row_of.shape[1])

    def _memory(self, address: int, size: int) -> torch.Tensor:
        """The device's memory from an address on: uint8 [size]."""
        return _on_device(self._device, address, size, self._raw)

    def memory(self, layer: int, number: int, size: int) -> torch.Tensor:
        """Bytes from where an image begins, which may go on in the images of the next layers: uint8 [size] on the device."""
        return self._memory(self._raw.image(layer, number), size)

    def ahead(self, first: int = 0, last: int | None = None) -> None:
        """The first layers of the pass that comes next, which is of layers `first` to `last` - 1, are copied from here on."""
        self._call("ahead", first, len(self._layers) if last is None else last)

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


class Slots:
    """Which neurons a sparse model finds on a device that does not have room for all, in rows of matrices that are its own: row i
    is neuron i for good among the first ones of a layer, and the others are slots. What the op `hold` (csrc/cuda/ops.h) needs.

    stream: it has the slots, of every layer's first image.
    bundles: bytes of a neuron in each layer's first image.
    intermediate: neurons of a layer.
    rows: of the sparse model's matrices, at most as many.

    Afterwards `neuron_of` says of which neuron each row is: int32 [layers, rows], -1 of a slot that has had none.
    """

    def __init__(
        self,
        device: torch.device,
        stream: WeightStream,
        layers: Sequence[StreamedImage],
        bundles: Sequence[int],
        rows: int,
        intermediate: int,
    ) -> None:
        self._stream, self._bundles, self.rows = stream, bundles, rows
        self._firsts = [-(-image.resident // bundle) for image, bundle in zip(layers, bundles)]
        held = []
        for layer, (image, bundle, first) in enumerate(zip(layers, bundles, self._firsts)):
            memory = stream.slots(layer, 0)
            # The resident bytes may end within a neuron: what is left of it is where the slots would begin.
            left = first * bundle - image.resident
            memory[image.resident : image.resident + left].copy_(stream.host(layer, 0)[:left])
            held.append((stream.host(layer, 0).data_ptr() - image.resident, memory.data_ptr(), bundle, first))

        def table(cols: int) -> torch.Tensor:
            return torch.full((len(layers), cols), -1, dtype=torch.int32, device=device)

        self._held = torch.tensor(held, dtype=torch.int64, device=device)
        self._row_of, self.neuron_of = table(intermediate), table(rows)
        for row_of, neuron_of, first in zip(self._row_of, self.neuron_of, self._firsts):
            row_of[:first] = neuron_of[:first] = torch.arange(first, dtype=torch.int32, device=device)
        self._taken, self.listed_rows, self._count = torch.zeros_like(self.neuron_of), table(rows), table(1)
        self.row_weights = torch.zeros(len(layers), rows, dtype=torch.float32, device=device)
        stream.share(self._held, self._row_of)
        self._sizes = {"layers": len(layers), "intermediate": intermediate, "rows": rows}

    def bundles(self, layer: int) -> torch.Tensor:
        """What the sparse model has for an image of a layer: uint8 [rows, bundle]."""
        return self._stream.slots(layer, 0)[: self.rows * self._bundles[layer]].view(self.rows, -1)

    def fields(self, neurons: int, kept: int, weights: torch.Tensor | None) -> dict[str, object]:
        """The arguments of `hold` for a set of so many neurons at an address, int32 [layers, kept]. listed_rows then begins with
        their rows, int32 [layers, kept]. weights: of all neurons, float32 [layers, I]; row_weights are then those of these rows.
        """
        return {
            "neurons": neurons,
            "kept": kept,
            "weights": weights,
            "held": self._held,
            "row_of": self._row_of,
            "neuron_of": self.neuron_of,
            "listed_rows": self.listed_rows,
            "taken": self._taken,
            "count": self._count,
            "row_weights": self.row_weights,
            **self._sizes,
        }


def _on_device(device: torch.device, address: int, size: int, owner: object) -> torch.Tensor:
    """What a device reads from an address on, as long as the owner lives: uint8 [size]."""
    if device.type == "cpu":  # the emulated device's memory is the host's
        return memory_at(address, size, owner)
    return torch.as_tensor(_OnDevice(owner, address, size), device=device)


class _OnDevice:
    """Memory of a device, as torch takes it without a copy."""

    def __init__(self, owner: object, address: int, size: int) -> None:
        self.owner = owner  # which lives as long as the tensor
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
