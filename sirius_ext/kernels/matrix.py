"""A weight matrix as the kernels read it."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterable

import torch

from .. import _C
from . import q4, q8
from .threads import cpu_threads


class Format(enum.IntEnum):
    """How a matrix's bytes are read; as in csrc/types.h."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    Q8_UPPER = 4
    Q4 = 5
    Q4_K = 6
    Q4_ACROSS = 7
    Q4_K_ACROSS = 8

    @classmethod
    def of(cls, dtype: torch.dtype) -> Format:
        """The plain one of float32, float16 or bfloat16."""
        return _PLAIN[dtype]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a plain one."""
        return next((dtype for dtype, form in _PLAIN.items() if form == self), None)

    @property
    def across(self) -> bool:
        """Of four bits, whether 32 rows have their scales together. Such rows are only added up, others only multiplied."""
        return self in (Format.Q4_ACROSS, Format.Q4_K_ACROSS)

    @property
    def supers(self) -> bool:
        """Of four bits, whether scales are made of numbers of 6 bits."""
        return self in (Format.Q4_K, Format.Q4_K_ACROSS)

    @property
    def four_bits(self) -> bool:
        """Whether it is one of those of `kernels.q4`."""
        return self >= Format.Q4

    def row_bytes(self, cols: int) -> int:
        """Of a row, or of a row of one of Q8's planes."""
        if self.dtype is not None:
            return self.dtype.itemsize * cols
        if not self.four_bits:
            return q8.row_bytes(cols)
        return q8.GROUP_BYTES * q8.groups(cols) if self.across else q4.row_bytes(cols, self.supers)


_PLAIN = {torch.float32: Format.F32, torch.float16: Format.F16, torch.bfloat16: Format.BF16}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight matrix, stored row by row: a row is what one neuron, or one output, reads.

    data: of a plain format float32, float16 or bfloat16 [rows, cols]; of others uint8 [rows, bytes], and of Q8 two such planes,
        [2, rows, bytes]. Rows are contiguous, and may stand apart.
    packed: of a format that is not plain, which one it is, and its columns.
    shared: of Q4_ACROSS and Q4_K_ACROSS, the scales, uint8 [bytes].
    apart: of Q8 whose planes lie apart, the lower nibbles, uint8 [rows, bytes]; `data` is then the upper plane alone.
    places: of one whose rows compiled functions find by a table: its address, and where in each place the row begins
        (`kernels.stream`). `data` then says no more than how it looks.
    neuron_of: of Q4_ACROSS and Q4_K_ACROSS on a CUDA device, of which neuron each row is, int32 [rows], where rows do not stand
        in the neurons' order; `shared` then has the scales of all neurons.
    """

    data: torch.Tensor
    packed: tuple[Format, int] | None = None
    shared: torch.Tensor | None = None
    apart: torch.Tensor | None = None
    places: tuple[int, int] | None = None
    neuron_of: torch.Tensor | None = None

    @classmethod
    def of_bytes(cls, data: torch.Tensor, form: Format, rows: int, cols: int) -> Matrix:
        """A packed matrix that is one tensor: as `data`, but with the shared scales after the rows where there are some."""
        if not form.across:
            return cls(data, (form, cols))
        size = rows * form.row_bytes(cols)
        return cls(data[:size].view(rows, -1), (form, cols), data[size:])

    @classmethod
    def of_groups(cls, weight: q4.Groups, transposed: bool = False) -> Matrix:
        """Four bits, as they are; the matrix is `weight` or its transpose."""
        supers = weight.fields is not None
        if not transposed:
            return cls(q4.along(weight), (Format.Q4_K if supers else Format.Q4, weight.cols))
        data, shared = q4.across(weight)
        return cls(data, (Format.Q4_K_ACROSS if supers else Format.Q4_ACROSS, weight.rows), shared)

    @classmethod
    def of_parts(cls, parts: Iterable[Matrix], rows: int) -> Matrix:
        """The rows of some matrices of one format without shared scales, and of Q8 of one plane, one after the other; of the
        parts no more than two are held at a time, if nobody else does. rows: of all together. ValueError if they are not."""
        whole, packed, begin = torch.empty(0), None, 0
        for part in parts:
            if part.rows == rows:
                return part
            if begin == 0:
                whole, packed = part.data.new_empty(rows, *part.data.shape[1:]), part.packed
            whole[begin : begin + part.rows] = part.data
            begin += part.rows
        if begin != rows:
            raise ValueError(f"parts: expected {rows} rows together, got {begin}")
        return cls(whole, packed)

    @property
    def bytes(self) -> torch.Tensor:
        """Of one that is not plain, what `of_bytes` takes."""
        return self.data if self.shared is None else torch.cat((self.data.flatten(), self.shared))

    @property
    def plain(self) -> bool:
        """Whether it is an array of numbers."""
        return self.packed is None

    @property
    def format(self) -> Format:
        return Format.of(self.data.dtype) if self.packed is None else self.packed[0]

    @property
    def rows(self) -> int:
        return self.data.shape[-2]

    @property
    def cols(self) -> int:
        return self.data.shape[1] if self.packed is None else self.packed[1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.cols))

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return self.data.stride(-2) * self.data.element_size()

    @functools.cached_property
    def upper(self) -> torch.Tensor:
        """Of Q8, the plane with the scales and the upper nibbles: uint8 [rows, bytes]."""
        return self.data[0] if self.apart is None else self.data

    @functools.cached_property
    def lower(self) -> torch.Tensor:
        """Of Q8, the lower nibbles: uint8 [rows, bytes]."""
        return self.data[1, :, q8.scale_bytes(self.cols) :] if self.apart is None else self.apart

    @property
    def nbytes(self) -> int:
        """What a reader of all rows reads."""
        if self.format == Format.Q8:
            return self.upper.numel() + self.lower.numel()
        shared = 0 if self.shared is None else self.shared.numel()
        return self.data.numel() * self.data.element_size() + shared

    @property
    def device(self) -> torch.device:
        return self.data.device

    @functools.cached_property
    def raw(self) -> _C.Matrix:
        """What compiled functions take. It holds addresses only: it is of use as long as this matrix lives."""
        return _C.Matrix(
            data=self.data.data_ptr(),
            format=self.format,
            rows=self.rows,
            cols=self.cols,
            stride=self.stride,
            lower=self.lower.data_ptr() if self.format == Format.Q8 else 0,
            lower_stride=self.lower.stride(0) if self.format == Format.Q8 else 0,
            shared=0 if self.shared is None else self.shared.data_ptr(),
            places=0 if self.places is None else self.places[0],
            place_at=0 if self.places is None else self.places[1],
            neuron_of=0 if self.neuron_of is None else self.neuron_of.data_ptr(),
        )

    def dense(self) -> torch.Tensor:
        """The numbers: float32 [rows, cols]. Not of rows in another order than the neurons'."""
        assert self.neuron_of is None
        if self.packed is None:
            return self.data.float()
        if self.format.four_bits:
            return q4.decode(self.data, self.shared, self.cols, self.format.supers)
        if self.format == Format.Q8:
            return q8.decode(self.upper, self.cols, self.lower)
        return q8.decode(self.data, self.cols)

    def unpack(self, out: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
        """The numbers of one that is not plain, rounded, or of a part of it: as many rows and columns as `out`, T [rows, cols],
        has, from these on, which are multiples of 32. On the CPU. Returns `out`."""
        assert not self.plain and self.device.type == "cpu" and out.is_contiguous() and row % q8.GROUP == column % q8.GROUP == 0
        assert row + out.shape[0] <= self.rows and column + out.shape[1] <= self.cols
        _C.unpack(
            dtype=int(Format.of(out.dtype)),
            matrix=self.raw,
            first_row=row,
            num_rows=out.shape[0],
            first_col=column,
            num_cols=out.shape[1],
            out=out.data_ptr(),
            threads=cpu_threads(),
        )
        return out

    def take(self, rows: slice | torch.Tensor) -> Matrix:
        """Some of the rows: of a slice those themselves, of an index copies. Not of rows that have their scales together."""
        assert self.shared is None
        return Matrix(self.data[..., rows, :], self.packed, apart=None if self.apart is None else self.apart[rows])

    def in_eight_bits(self) -> Matrix:
        """A copy of a plain one, as `Format.Q8`. ValueError if that is not possible."""
        return self._packed_as(Format.Q8)

    def in_four_bits(self) -> Matrix:
        """Itself if it is; else as `Format.Q8_UPPER`: a view of a matrix in eight bits, and of a plain one a copy."""
        if self.packed is None:
            return self._packed_as(Format.Q8_UPPER)
        if self.format.four_bits:
            return self
        return Matrix(self.upper, (Format.Q8_UPPER, self.cols))

    def _packed_as(self, form: Format) -> Matrix:
        upper = form == Format.Q8_UPPER
        if self.device.type != "cpu":
            return Matrix(q8.encode(self.data, upper), (form, self.cols))
        planes = torch.zeros(1 if upper else 2, self.rows, q8.row_bytes(self.cols), dtype=torch.uint8, device="cpu")
        data = planes[0] if upper else planes
        packed = Matrix(data, (form, self.cols))
        numbers = self.data.contiguous()
        _C.pack(dtype=int(self.format), x=numbers.data_ptr(), out=packed.raw, threads=cpu_threads())
        q8.check_scales(planes[0], self.cols)
        return packed


def matrix_of(weight: torch.Tensor | Matrix) -> Matrix:
    """`weight` as a matrix; a tensor is one of a plain format."""
    return weight if isinstance(weight, Matrix) else Matrix(weight)
