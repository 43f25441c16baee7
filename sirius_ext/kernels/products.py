"""Products with a whole matrix, for passes of many tokens: torch's where they are fast, and our kernels elsewhere."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import is_cuda
from .matrix import Matrix


def dot(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ matrix.T + bias`. x: T [m, cols]. bias: T [rows]. Returns T [m, rows]."""
    return F.linear(x, matrix.data, bias) if _by_torch(x, matrix) else ops.linear(x, matrix, bias)


def add_rows(z: torch.Tensor, matrix: Matrix, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`residual + z @ matrix`: rows added up with coefficients. z: T [m, rows]. Returns T [m, cols]."""
    if not _by_torch(z, matrix):
        return ops.down(z, matrix, residual=residual)
    return z @ matrix.data if residual is None else torch.addmm(residual, z, matrix.data)


def _by_torch(x: torch.Tensor, matrix: Matrix) -> bool:
    """Whether torch knows the matrix's format and has instructions for products of x's element type."""
    return matrix.plain and (is_cuda(x.device) or x.dtype == torch.float32 or _has_instructions(x.dtype))


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies these 16 bits on this CPU. Where it does not (bfloat16 without AVX-512, float16 without its FP16
    instructions), torch multiplies number by number: in `add_rows`, whose matrix lies across, a hundredth as fast as our kernels
    (two cores: 0.9 thousand million products a second, ours 80). Ours it is, too, where a torch does not say."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    says = getattr(torch.ops.mkldnn, name, None)
    return torch.backends.mkldnn.is_available() and says is not None and bool(says())
