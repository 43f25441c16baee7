"""The tensors of a GGUF file as they are, by the names and in the order of rows that `transformers` has for them.

Four-bit matrices are groups of codes (`kernels.q4`), which are what the file holds; others are numbers, by the package `gguf`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..kernels import q4
from .gguf_files import Header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# ggml's types of four bits, and all others that become numbers.
_FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")
TYPES = ("F32", "F16", "BF16", *_FOUR_BITS, "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q5_K", "Q6_K")

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What names of a family's modules differ in from these.
_DIFFERENT = {"phi3": {"ffn_up": "mlp.gate_up_proj"}, "gemma2": _GEMMA, "gemma3": _GEMMA}


def names_of(header: Header) -> dict[str, str]:
    """The file's names of its tensors, by transformers'."""
    layer = _LAYER | _DIFFERENT.get(header.values["general.architecture"], {})
    names = {}
    for name in header.tensors:
        module, _, kind = name.rpartition(".")
        if module in _OUTSIDE:
            names[f"{_OUTSIDE[module]}.{kind}"] = name
        elif module.startswith("blk."):
            _, index, part = module.split(".", 2)
            names[f"model.layers.{index}.{layer[part]}.{kind}"] = name
    return names


class Tensors:
    """Of a file whose header `gguf_files.config_settings` takes for `config`. ValueError that names a tensor of a type that is
    not supported, or that the file does not hold as a whole."""

    def __init__(self, header: Header, config: PreTrainedConfig) -> None:
        self._architecture: str = header.values["general.architecture"]
        self._header, self._config = header, config
        self._data: np.ndarray[Any, Any] = np.memmap(header.file, dtype=np.uint8, mode="r").view(np.ndarray)
        self.names = names_of(header)
        for name in self.names.values():
            self._blocks(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header.tensors[self.names[name]].shape

    def is_four_bits(self, name: str) -> bool:
        return self._kind(self.names[name]) in _FOUR_BITS

    def has_supers(self, name: str) -> bool:
        """Whether the groups of a matrix of four bits are `kernels.q4`'s with fields."""
        return self._kind(self.names[name]) == "Q4_K"

    def numbers(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Of rows `first` to `last` - 1, or of all: float32, a copy."""
        from gguf import GGMLQuantizationType, dequantize

        own = self.names[name]
        rows = self._rows(name, first, last)
        numbers = dequantize(rows, GGMLQuantizationType[self._kind(own)]).reshape(*rows.shape[:-1], -1)
        if len(self.shape(name)) == 1:
            numbers = numbers.reshape(-1)
            if (order := self._order(name)) is not None:
                numbers = numbers[order]
        if self._architecture.startswith("gemma") and own.endswith("norm.weight"):
            numbers = numbers - np.float32(1.0)  # which llama.cpp's converter has added
        return torch.from_numpy(np.array(numbers, dtype=np.float32))

    def groups(self, name: str, first: int = 0, last: int | None = None) -> q4.Groups:
        """Of rows `first` to `last` - 1, or of all, of a matrix of four bits."""
        blocks = _Blocks(self._rows(name, first, last), self._kind(self.names[name]))
        try:
            q4.check_finite(blocks.groups.pairs)
        except ValueError as error:
            raise ValueError(f"{self.names[name]}: {error}") from error
        return blocks.groups

    def _rows(self, name: str, first: int, last: int | None) -> np.ndarray[Any, Any]:
        """The bytes of some rows, uint8 [rows, bytes]; a tensor of one dimension is one row."""
        blocks, order = self._blocks(self.names[name]), self._order(name)
        if len(self.shape(name)) == 1:
            return blocks
        return blocks[first:last] if order is None else blocks[order[first:last]]

    def _kind(self, name: str) -> str:
        from gguf import GGMLQuantizationType

        number = self._header.tensors[name].kind
        try:
            return str(GGMLQuantizationType(number).name)
        except ValueError:
            return str(number)

    def _blocks(self, name: str) -> np.ndarray[Any, Any]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensor, kind = self._header.tensors[name], self._kind(name)
        if kind not in TYPES:
            raise ValueError(f"{name} is of ggml's type {kind}; supported are {', '.join(TYPES)}")
        if len(tensor.shape) not in (1, 2):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected one or two dimensions")
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        *rows, cols = tensor.shape
        if cols % weights:
            raise ValueError(f"{name} has rows of {cols} weights, which blocks of {weights} do not make up")
        width = cols // weights * size
        end = tensor.offset + math.prod(rows) * width
        if end > len(self._data):
            raise ValueError(f"{name} ends at byte {end} of a file of {len(self._data)}")
        return self._data[tensor.offset : end].reshape(math.prod(rows), width)

    def _order(self, name: str) -> np.ndarray[Any, Any] | None:
        """Where the rows of Llama's q and k are in the file, which has the two that an angle turns side by side."""
        if self._architecture != "llama":
            return None
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
        module = name.split(".")[-2]
        return _order(heads[module], self.shape(name)[0]) if module in heads else None


@functools.lru_cache(maxsize=4)
def _order(heads: int, rows: int) -> np.ndarray[Any, Any]:
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


class _Blocks:
    """Rows of blocks of one of the four-bit types. rows: uint8 [rows, bytes]."""

    def __init__(self, rows: np.ndarray[Any, Any], kind: str) -> None:
        size, halves = {"Q4_0": (18, 1), "Q4_1": (20, 2), "Q4_K": (144, 2)}[kind]
        blocks = torch.from_numpy(rows.copy()).view(len(rows), -1, size)
        pairs = blocks[..., : 2 * halves].contiguous().view(torch.float16)
        if kind == "Q4_K":
            self.groups = q4.Groups(_codes(blocks[..., 16:].unflatten(-1, (4, 32))), pairs, _fields(blocks[..., 4:16]))
            return
        if kind == "Q4_0":  # codes without their 8
            pairs = torch.cat((pairs, -8 * pairs), -1)
        self.groups = q4.Groups(_codes(blocks[..., 2 * halves :].unsqueeze(2)), pairs)


def _codes(nibbles: torch.Tensor) -> torch.Tensor:
    """nibbles: uint8 [rows, blocks, n, bytes], each piece's lower ones before its upper ones. Returns uint8 [rows, cols]."""
    return torch.cat((nibbles & 15, nibbles >> 4), -1).flatten(1)


def _fields(packed: torch.Tensor) -> torch.Tensor:
    """s and m, of 6 bits each, of the eight groups of a block of Q4_K. packed: uint8 [rows, blocks, 12]. Returns uint8
    [rows, groups, 2].

    Of groups 0 to 3 bytes 0 to 3 have s and bytes 4 to 7 have m, in their lower six bits; of groups 4 to 7 the two upper bits of
    these bytes are s' and m's upper ones, and bytes 8 to 11 have the lower four, m's in the upper half."""
    s, m, both = packed.flatten(0, 1).t().contiguous().split(4)  # a byte of all blocks side by side: torch is slow on few
    first = torch.stack((s & 63, m & 63), 1)
    second = torch.stack(((both & 15) | (s >> 6 << 4), (both >> 4) | (m >> 6 << 4)), 1)
    return torch.cat((first, second)).flatten(0, 1).t().reshape(len(packed), -1, 2)
