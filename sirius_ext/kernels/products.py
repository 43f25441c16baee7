"""Products with a whole matrix, for passes of many tokens: torch's where they are fast, and our kernels elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import ops, q8
from .dispatch import is_cuda
from .matrix import Matrix

# Rows of input from which on it pays to make numbers of packed weights first, where torch multiplies numbers in tiles.
MANY = 96
# That are made at a time. Where `add_rows` makes a part of every row, reading is slower; but pages of arrays beyond 32 MB come
# from the system anew every time.
NUMBERS = 15 << 20


def dot(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ matrix.T + bias`. x: T [m, cols]. bias: T [rows]. Returns T [m, rows]."""
    if _by_torch(x, matrix):
        return F.linear(x, matrix.data, bias)
    if not _unpacked(x, matrix):
        return ops.linear(x, matrix, bias)

    def part(begin: int, end: int) -> torch.Tensor:
        weight = matrix.unpack(x.new_empty(end - begin, matrix.cols), row=begin)
        return F.linear(x, weight, None if bias is None else bias[begin:end])

    return _in_parts(part, matrix.rows, matrix.cols)


def add_rows(z: torch.Tensor, matrix: Matrix, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`residual + z @ matrix`: rows added up with coefficients. z: T [m, rows]. Returns T [m, cols]."""
    if _by_torch(z, matrix):
        return _added(residual, z, matrix.data)
    if not _unpacked(z, matrix):
        return ops.down(z, matrix, residual=residual)

    def part(begin: int, end: int) -> torch.Tensor:
        weight = matrix.unpack(z.new_empty(matrix.rows, end - begin), column=begin)
        return _added(None if residual is None else residual[:, begin:end], z, weight)

    return _in_parts(part, matrix.cols, matrix.rows)


def _added(residual: torch.Tensor | None, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return z @ weight if residual is None else torch.addmm(residual, z, weight)


def _in_parts(part: Callable[[int, int], torch.Tensor], count: int, length: int) -> torch.Tensor:
    """What `part` makes of all rows or columns, `count` of them with `length` numbers each. It gets where those that are unpacked
    together begin and end."""
    step = max(1, NUMBERS // length // q8.GROUP) * q8.GROUP
    parts = [part(begin, min(begin + step, count)) for begin in range(0, count, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


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
