"""Models larger than a device's memory, of published shapes and with random weights, made without a disk."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from shapes import config_of, shape_of
from transformers import PreTrainedModel

from sirius_ext.kernels.matrix import Format, Matrix
from sirius_ext.models.device_tiers import DeviceSizes, DeviceTiers, device_plan
from sirius_ext.models.packed import Source, empty, is_down
from sirius_ext.models.tier_files import Layout, TierFiles
from sirius_ext.models.tiers import Draft, cache_bytes, row_bytes

_BLOCK = 16 << 20  # random bytes that are drawn, and then repeated
# Two bits of every byte are zero, so that no number is large, whatever format the bytes are read as: a float16 is less than 2^-7,
# and a bfloat16 next to nothing.
_BITS = 0x9F
_NOWHERE = Path("of no files")


class RandomSource(Source):
    """A shape, as if there were a checkpoint of it. weights: "plain", "q8", or "q4" as GGUF's Q4_K, embedding and head in eight
    bits. It cannot be read."""

    def __init__(self, name: str, dtype: torch.dtype, weights: str) -> None:
        super().__init__(config_of(shape_of(name)), _NOWHERE, [], dtype, weights, "random")

    def format(self, name: str) -> Format:
        if self.weights == "plain":
            return Format.of(self.dtype)
        if self.weights == "q8" or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return Format.Q8
        return Format.Q4_K_ACROSS if is_down(name) else Format.Q4_K

    def read(self, name: str) -> torch.Tensor | Matrix:
        raise NotImplementedError


def random_bytes(count: int) -> torch.Tensor:
    """uint8 [count]"""
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(256, (min(count, _BLOCK),), dtype=torch.uint8, generator=generator) & _BITS
    return block.repeat(math.ceil(count / max(1, len(block))))[:count]


@dataclasses.dataclass(frozen=True, eq=False)
class RandomTiers(TierFiles):
    """As a folder of tiers. All layers have the same neurons."""

    source: RandomSource

    @classmethod
    def of_shape(cls, name: str, dtype: torch.dtype, weights: str) -> RandomTiers:
        source, none = RandomSource(name, dtype, weights), torch.empty(0, dtype=torch.int32)
        layout = Layout.of(source)
        fields = {field.name: getattr(layout, field.name) for field in dataclasses.fields(Layout)}
        checks = {"checks": none, "rest_checks": none, "fast_checks": none}
        return cls(**fields, folder=_NOWHERE, **checks, fingerprint="random", source=source)

    @functools.cached_property
    def _fast(self) -> dict[str, torch.Tensor]:
        largest = random_bytes(max(each.nbytes for each in self.fast.values()))
        tensors = {}
        for name, stored in self.fast.items():
            own = largest[: stored.nbytes]
            if stored.format is not None:
                planes = [2] if stored.format == Format.Q8 else []
                tensors[name] = own.view(*planes, stored.rows, -1)
            elif name in self.source.matrices:
                tensors[name] = own.view(self.dtype).view(self.source.shape(name))
            elif name in self.source.names:
                tensors[name] = torch.ones(self.source.shape(name), dtype=self.dtype)
            else:
                tensors[name] = own
        return tensors

    def fast_tensor(self, name: str) -> torch.Tensor:
        return self._fast[name]

    @functools.cached_property
    def down_squares(self) -> torch.Tensor:
        return torch.rand(len(self.layers), self.intermediate, generator=torch.Generator().manual_seed(0))

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        return empty(self.source.config, self.dtype)

    @functools.cached_property
    def _bundles(self) -> torch.Tensor:
        return random_bytes(self.intermediate * max(image.bundle for layer in self.layers for image in layer.images))

    def read(self, layer: int, image: int, first: int = 0, last: int | None = None) -> torch.Tensor:
        bundle, last = self.layers[layer].images[image].bundle, self.intermediate if last is None else last
        return self._bundles[first * bundle : last * bundle].view(last - first, bundle)


def random_tiered(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    memory: int,
    drafts: Callable[[Layout], Iterable[Draft]],
    on_progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """A Llama of that shape of which no more than `memory` bytes are on a CUDA device, as `Engine.from_pretrained(memory=)`
    divides them for `drafts`. ValueError if that does not suffice, or the host's memory; MemoryError if there is none left."""
    files = RandomTiers.of_shape(name, dtype, weights)
    sizes = DeviceSizes(files, cache_bytes(files.skeleton), device, row_bytes(files.skeleton))
    plan = device_plan(sizes, memory, drafts(files), device)
    model = files.model(not plan.streams_rest, on_device=True)
    model.generation_config.do_sample = False
    model.tiers = DeviceTiers(files, plan, device, on_progress)  # type: ignore[assignment]  # a module's attributes may be anything
    return model.to(device)  # type: ignore[arg-type]  # its decorator there makes `self` an argument
