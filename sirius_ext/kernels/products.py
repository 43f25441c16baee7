"""Products with a whole matrix, for passes of many tokens: torch's where it has them, and our kernels for formats that it does
not know."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import ops
from .matrix import Matrix


def dot(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ matrix.T + bias`. x: T [m, cols]. bias: T [rows]. Returns T [m, rows]."""
    return F.linear(x, matrix.data, bias) if matrix.plain else ops.linear(x, matrix, bias)


def add_rows(z: torch.Tensor, matrix: Matrix, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`residual + z @ matrix`: rows added up with coefficients. z: T [m, rows]. Returns T [m, cols]."""
    if not matrix.plain:
        return ops.down(z, matrix, residual=residual)
    return z @ matrix.data if residual is None else torch.addmm(residual, z, matrix.data)
