"""Products with a whole matrix, for passes of many tokens: torch's where it has them, and our kernels for formats that it does
not know."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import ops
from .dispatch import is_cuda
from .matrix import Matrix

# Of a matrix that is written out as numbers at a time.
_CHUNK = 1 << 24


def dot(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ matrix.T + bias`. x: T [m, cols]. bias: T [rows]. Returns T [m, rows]."""
    if matrix.plain:
        return F.linear(x, matrix.data, bias)
    if not is_cuda(x.device):
        return ops.linear(x, matrix, bias)
    step = max(1, _CHUNK // matrix.cols)
    parts = [matrix.take(slice(first, first + step)).dense().to(x.dtype) for first in range(0, matrix.rows, step)]
    out = torch.cat([F.linear(x, part) for part in parts], 1)
    return out if bias is None else out + bias


def add_rows(z: torch.Tensor, matrix: Matrix, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`residual + z @ matrix`: rows added up with coefficients. z: T [m, rows]. Returns T [m, cols]."""
    if not matrix.plain and not is_cuda(z.device):
        return ops.down(z, matrix, residual=residual)
    data = matrix.data if matrix.plain else matrix.dense().to(z.dtype)
    return z @ data if residual is None else torch.addmm(residual, z, data)
