"""Products with a whole matrix, for passes of many tokens: torch's where they are fast, and our kernels elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import ops, q8
from .dispatch import is_cuda
from .matrix import Matrix

# Rows of input from which on it pays to make numbers of packed weights first, where torch multiplies numbers in tiles.
MANY = 64
NUMBERS = 1 << 22  # that are made at a time: with fewer the calls of torch cost more, with more they leave the caches


def dot(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ matrix.T + bias`. x: T [m, cols]. bias: T [rows]. Returns T [m, rows]."""
    if _by_torch(x, matrix):
        return F.linear(x, matrix.data, bias)
    if not _unpacked(x, matrix):
        return ops.linear(x, matrix, bias)
    out = x.new_empty(len(x), matrix.rows)
    for begin, end in _parts(matrix.rows, matrix.cols):
        weight = matrix.unpack(x.new_empty(end - begin, matrix.cols), row=begin)
        out[:, begin:end] = F.linear(x, weight, None if bias is None else bias[begin:end])
    return out


def add_rows(z: torch.Tensor, matrix: Matrix, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`residual + z @ matrix`: rows added up with coefficients. z: T [m, rows]. Returns T [m, cols]."""
    if _by_torch(z, matrix):
        return _added(residual, z, matrix.data)
    if not _unpacked(z, matrix):
        return ops.down(z, matrix, residual=residual)
    out = z.new_empty(len(z), matrix.cols)
    for begin, end in _parts(matrix.cols, matrix.rows):
        weight = matrix.unpack(z.new_empty(matrix.rows, end - begin), column=begin)
        out[:, begin:end] = _added(None if residual is None else residual[:, begin:end], z, weight)
    return out


def _added(residual: torch.Tensor | None, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return z @ weight if residual is None else torch.addmm(residual, z, weight)


def _parts(count: int, length: int) -> Iterator[tuple[int, int]]:
    """Of so many rows or columns, each of so many numbers: where those that are unpacked together begin and end."""
    step = max(1, NUMBERS // length // q8.GROUP) * q8.GROUP
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


def _by_torch(x: torch.Tensor, matrix: Matrix) -> bool:
    """Whether torch knows the matrix's format and has instructions for products of x's element type."""
    return matrix.plain and (is_cuda(x.device) or x.dtype == torch.float32 or _has_instructions(x.dtype))


def _unpacked(x: torch.Tensor, matrix: Matrix) -> bool:
    """Whether to make numbers of packed weights for torch. Tiles multiply bfloat16 several times as fast as our kernels multiply
    codes, and with so many rows that is more than what it takes to make them."""
    return (
        not matrix.plain
        and x.dtype == torch.bfloat16
        and len(x) >= MANY
        and not is_cuda(x.device)
        and ops.isa() == "amx"
        and _has_instructions(x.dtype)
    )


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies these 16 bits on this CPU. Where it does not (bfloat16 without AVX-512, float16 without its FP16
    instructions), torch multiplies number by number: in `add_rows`, whose matrix lies across, a hundredth as fast as our kernels
    (two cores: 0.9 thousand million products a second, ours 80). Ours it is, too, where a torch does not say."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    says = getattr(torch.ops.mkldnn, name, None)
    return torch.backends.mkldnn.is_available() and says is not None and bool(says())
