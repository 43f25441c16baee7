"""Checkpoints of safetensors that were made in four bits: by AWQ, GPTQ, or in the form `pack-quantized` of compressed-tensors.

All have groups along a matrix's input (of 128 as a rule, which are several of our 32), a code from 0 to 15 for each weight, and
for each group a scale s and a zero z: a weight is `s * (code - z)`. Codes and scales are taken over as they are. Of the minimum
-s * z float16 keeps eleven bits: with z = 8, which symmetric ones have, it is exact, and else off by 0.004 of a step at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch

from ..kernels import q4
from ..kernels.q8 import GROUP

METHODS = ("awq", "gptq", "compressed-tensors")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word AWQ has the first, the second, ... of eight outputs
# The parts of a matrix called NAME.weight, after NAME and a dot.
_PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
}

_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """How a checkpoint's matrices are made.

    method: one of METHODS.
    group: weights that share a scale; -1: all of a row.
    zero: what is added to stored zeros; of a symmetric checkpoint without them, the zero itself.
    symmetric: whether matrices may have no stored zeros.
    """

    method: str
    group: int
    zero: int
    symmetric: bool = False

    @classmethod
    def of(cls, config: Any) -> Quantized | None:
        """What a config says; None of one without quantized weights. ValueError for those that are not read here."""
        said = getattr(config, "quantization_config", None)
        if said is None:
            return None
        said = said if isinstance(said, dict) else said.to_dict()
        method = str(said.get("quant_method"))
        if method not in METHODS:
            raise ValueError(f"its weights are quantized by {method}; weights='q4' reads {', '.join(METHODS)}, and GGUF files")
        if method == "compressed-tensors":
            return cls._of_compressed(said)
        group = _group(said.get("group_size", 128))
        _expect(method, "bits", said.get("bits"), 4)
        if method == "awq":
            _expect(method, "version", str(said.get("version", "gemm")).lower(), "gemm")
            _expect(method, "zero_point", said.get("zero_point", True), True)
            return cls(method, group, 0)
        _expect(method, "desc_act", said.get("desc_act", False), False)
        _expect(method, "rotation", said.get("rotation"), None)
        form = said.get("checkpoint_format") or said.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            _expect(method, "checkpoint_format", form, "gptq or gptq_v2")
        return cls(method, group, 1 if form == "gptq" else 0)

    @classmethod
    def _of_compressed(cls, said: dict[str, Any]) -> Quantized:
        method = "compressed-tensors"
        _expect(method, "format", said.get("format"), "pack-quantized")
        # Of weights that are stored in other numbers than they stand for: rotated ones, and sparse ones.
        _expect(method, "transform_config", said.get("transform_config") or None, None)
        _expect(method, "sparsity_config", (said.get("sparsity_config") or {}).get("format") or "dense", "dense")
        kinds = list(said.get("config_groups", {}).values())
        _expect(method, "number of config_groups", len(kinds), 1)
        weights = kinds[0].get("weights") or {}
        for key, value in (("num_bits", 4), ("type", "int")):
            _expect(method, key, weights.get(key, value), value)
        # Ordered by activations while they were rounded ("weight", or by its other name "static"), they are stored as they were.
        if weights.get("actorder") not in ("weight", "static"):
            _expect(method, "actorder", weights.get("actorder") or None, None)
        for key in ("input_activations", "output_activations"):
            _expect(method, key, kinds[0].get(key), None)
        _expect(method, "format of a group", kinds[0].get("format") or "pack-quantized", "pack-quantized")
        if weights.get("strategy") not in ("group", "channel"):
            _expect(method, "strategy", weights.get("strategy"), "group or channel")
        group = _group(weights.get("group_size")) if weights["strategy"] == "group" else -1
        return cls(method, group, 8, weights.get("symmetric", True) is True)

    def parts(self, name: str, there: Collection[str]) -> list[str]:
        """The tensors that a weight consists of, of those that are there; none if it is a tensor itself."""
        if not name.endswith(".weight") or name in there:
            return []
        stem = name.removesuffix("weight")
        return [stem + part for part in _PARTS[self.method] if stem + part in there]

    def groups(self, name: str, shape: tuple[int, ...], get: Callable[[str], torch.Tensor | None]) -> q4.Groups:
        """A matrix. shape: what it must have. get: a tensor of the checkpoint by its name, None if there is none."""
        rows, cols = shape
        group = cols if self.group == -1 else self.group
        if cols % group or group % GROUP:
            raise ValueError(f"{name}: expected rows of groups of {group}, a multiple of {GROUP}, got rows of {cols}")
        stem, count = name.removesuffix("weight"), cols // group

        def part(which: str, *wanted: int) -> torch.Tensor:
            tensor = get(stem + which)
            if tensor is None:
                raise ValueError(f"{name}: the checkpoint has no {stem}{which}")
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{stem}{which}: expected shape {list(wanted)}, got {list(tensor.shape)}")
            kinds = _SCALES if which in ("scales", "weight_scale") else (torch.int32,)
            if tensor.dtype not in kinds:
                raise ValueError(f"{stem}{which}: expected {' or '.join(map(str, kinds))}, got {tensor.dtype}")
            return tensor

        if self.method == "compressed-tensors":
            codes = _nibbles(part("weight_packed", rows, cols // 8))
            scales = part("weight_scale", rows, count)
            if self.symmetric and get(f"{stem}weight_zero_point") is None:
                zeros = torch.full((rows, count), self.zero)
            else:
                zeros = _nibbles(part("weight_zero_point", -(-rows // 8), count).t().contiguous()).t()[:rows]
        else:
            scales = part("scales", count, rows).t()
            if self.method == "gptq":
                order = get(f"{stem}g_idx")
                if order is not None and not torch.equal(order.long(), torch.arange(cols) // group):
                    raise ValueError(f"{stem}g_idx: expected groups of neighbours, got another order (desc_act)")
                codes = _nibbles(part("qweight", cols // 8, rows).t().contiguous())
                zeros = _nibbles(part("qzeros", count, rows // 8)).t() + self.zero
            else:
                codes = _nibbles(part("qweight", cols, rows // 8), _AWQ_PLACES).t().contiguous()
                zeros = _nibbles(part("qzeros", count, rows // 8), _AWQ_PLACES).t()
        halves = scales.half()
        if not torch.equal(halves.float(), scales.float()):
            raise ValueError(f"{name}: expected scales that float16 holds, got others")
        pairs = torch.stack((halves, (-halves.float() * zeros).half()), -1)
        try:
            q4.check_finite(pairs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return q4.Groups(codes, pairs.repeat_interleave(group // GROUP, 1))


def _group(said: Any) -> int:
    try:
        group = int(said)
    except (TypeError, ValueError):
        group = 0
    if group != -1 and (group < GROUP or group % GROUP):
        raise ValueError(f"its weights are quantized in groups of {said!r}; expected a multiple of {GROUP}, or -1")
    return group


def _expect(method: str, key: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise ValueError(f"its weights are quantized by {method} with {key} {got!r}; weights='q4' reads {wanted!r} only")


def _nibbles(words: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """words: int32 [rows, n], of eight nibbles each, the first one at the given places. Returns uint8 [rows, 8 * n]."""
    pairs = words.contiguous().view(torch.uint8).view(len(words), -1, 4, 1)
    found = torch.cat((pairs & 15, pairs >> 4), -1).flatten(2)
    return found[..., list(places)].flatten(1)
