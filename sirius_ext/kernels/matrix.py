"""A weight matrix as the kernels read it."""

from __future__ import annotations

import dataclasses
import enum
import functools

import torch
import torch.nn.functional as F

from .. import _C


class Format(enum.IntEnum):
    """How a matrix's bytes are read; as in csrc/types.h."""

    F32 = 0
    F16 = 1
    BF16 = 2


_PLAIN = {torch.float32: Format.F32, torch.float16: Format.F16, torch.bfloat16: Format.BF16}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight matrix, stored row by row: a row is what one neuron, or one output, reads.

    data: of a plain format float32, float16 or bfloat16 [rows, cols], whose rows are contiguous.
    scales: of formats that have them.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def format(self) -> Format:
        return _PLAIN[self.data.dtype]

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def cols(self) -> int:
        return self.data.shape[1]

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return self.data.stride(0) * self.data.element_size()

    @property
    def device(self) -> torch.device:
        return self.data.device

    @functools.cached_property
    def raw(self) -> _C.Matrix:
        """What compiled functions take. It holds addresses only: it is of use as long as this matrix lives."""
        return _C.Matrix(
            data=self.data.data_ptr(),
            scales=0 if self.scales is None else self.scales.data_ptr(),
            format=self.format,
            rows=self.rows,
            cols=self.cols,
            stride=self.stride,
        )

    def dense(self) -> torch.Tensor:
        """The numbers: float32 [rows, cols]."""
        return self.data.float()

    def dot(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ matrix.T + bias`, by torch. x: T [m, cols]. bias: T [rows]. Returns T [m, rows]."""
        return F.linear(x, self.data, bias)

    def sum(self, z: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`residual + z @ matrix`, by torch: rows added up with coefficients. z: T [m, rows]. Returns T [m, cols]."""
        return z @ self.data if residual is None else torch.addmm(residual, z, self.data)

    def take(self, rows: slice) -> Matrix:
        """Some of the rows, side by side; nothing is copied."""
        return Matrix(self.data[rows], None if self.scales is None else self.scales[rows])


def matrix_of(weight: torch.Tensor | Matrix) -> Matrix:
    """`weight` as a matrix; a tensor is one of a plain format."""
    return weight if isinstance(weight, Matrix) else Matrix(weight)
