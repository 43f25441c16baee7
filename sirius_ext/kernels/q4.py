"""Four bits, as csrc/q4.h has them: groups of 32 weights into bytes, and back into numbers.

A weight is `scale * code + minimum`. What comes from elsewhere (GGUF's 4-bit types, other quantized checkpoints, numbers that are
rounded here) is `Groups` first; `along` and `across` make bytes of them.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .q8 import CHUNK, GROUP, GROUP_BYTES, groups

SUPER = 8  # groups that share d and e
_LARGEST = 15


@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows of weights in groups of 32, the last one of a row perhaps of fewer.

    codes: uint8 [rows, cols], 0 to 15.
    pairs: float16 [rows, groups, 2], scale and minimum of each group; or [rows, supers, 2], d and e of every eight groups.
    fields: uint8 [rows, groups, 2], s and m of each group, 0 to 63, where scale is d * s and minimum -e * m; or None.
    """

    codes: torch.Tensor
    pairs: torch.Tensor
    fields: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def cols(self) -> int:
        return self.codes.shape[1]

    def numbers(self) -> torch.Tensor:
        """float32 [rows, cols]. Only the last addition rounds."""
        scales, minima = _scales(self.pairs, self.fields, groups(self.cols))
        scales, minima = (each.repeat_interleave(GROUP, 1)[:, : self.cols] for each in (scales, minima))
        return self.codes.float() * scales + minima


def _scales(pairs: torch.Tensor, fields: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of `count` groups, float32 [rows, count] each."""
    scales, minima = pairs.float().unbind(-1)
    if fields is None:
        return scales, minima
    d, e = (each.repeat_interleave(SUPER, 1)[:, :count] for each in (scales, minima))
    s, m = fields.float().unbind(-1)
    return d * s, -(e * m)


def round_to_groups(weight: torch.Tensor) -> Groups:
    """Numbers, float [rows, cols], as the nearest codes between each group's smallest and largest. ValueError if some are not
    finite, or too large for float16."""
    rows, cols = weight.shape
    step = max(1, CHUNK // cols)
    parts = [_round(weight[first : first + step]) for first in range(0, rows, step)]
    codes, pairs = (torch.cat(each) for each in zip(*parts))
    if not bool(pairs.isfinite().all()):
        row = int((~pairs.isfinite()).flatten(1).any(-1).nonzero()[0])
        raise ValueError(f"expected finite weights of at most {torch.finfo(torch.float16).max:.0f}, row {row} has others")
    return Groups(codes, pairs)


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and pairs of some rows."""
    rows, cols = weight.shape
    count = groups(cols)
    grouped = weight.float()
    if cols % GROUP:  # the last number again: it changes neither the smallest nor the largest
        grouped = torch.cat((grouped, grouped[:, -1:].expand(rows, count * GROUP - cols)), 1)
    grouped = grouped.reshape(rows, count, GROUP)
    minima = grouped.amin(-1).half()
    scales = ((grouped.amax(-1) - minima.float()) / _LARGEST).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    codes = ((grouped - minima.float()[..., None]) * inverse[..., None]).round_().clamp_(0, _LARGEST).to(torch.uint8)
    return codes.view(rows, -1)[:, :cols], torch.stack((scales, minima), -1)


def check_finite(pairs: torch.Tensor) -> None:
    """ValueError if some of a matrix's float16 are none."""
    if not bool(pairs.isfinite().all()):
        raise ValueError(f"row {int((~pairs.isfinite()).flatten(1).any(-1).nonzero()[0])} has scales that are not finite")


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """codes: uint8 [rows, cols]. Returns uint8 [rows, 16 * groups]."""
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -cols % GROUP)) if cols % GROUP else codes
    grouped = padded.reshape(rows, -1, GROUP)
    first, second = grouped.split(GROUP_BYTES, -1)
    nibbles: torch.Tensor = first | (second << 4)
    return nibbles.view(rows, -1)


def _codes(nibbles: torch.Tensor, cols: int) -> torch.Tensor:
    """The other way round."""
    grouped = nibbles.reshape(len(nibbles), -1, GROUP_BYTES)
    return torch.cat((grouped & 15, grouped >> 4), -1).view(len(nibbles), -1)[:, :cols]


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return numbers.contiguous().view(len(numbers), -1).view(torch.uint8)


# ------------------------------------------------------------------------------------------------------ groups along the rows


def header_bytes(cols: int, supers: bool) -> int:
    return 16 * math.ceil(groups(cols) / (SUPER if supers else 4))


def row_bytes(cols: int, supers: bool) -> int:
    return header_bytes(cols, supers) + GROUP_BYTES * groups(cols)


def along(weight: Groups) -> torch.Tensor:
    """uint8 [rows, row_bytes]."""
    rows, count, supers = weight.rows, groups(weight.cols), weight.fields is not None
    data = weight.codes.new_zeros(rows, row_bytes(weight.cols, supers))
    start = header_bytes(weight.cols, supers)
    data[:, start:] = _nibbles(weight.codes)
    if weight.fields is None:
        data[:, : 4 * count] = _bytes(weight.pairs)
        return data
    # A byte of all headers side by side: torch is slow on few.
    fields = torch.nn.functional.pad(weight.fields, (0, 0, 0, -count % SUPER)).view(-1, 2 * SUPER).t().contiguous().int()
    units = fields[0::2] | fields[1::2] << 6
    dwords = units[0::2] | units[1::2] << 12  # [4, headers], of 24 bits
    three = torch.stack([dwords >> 8 * byte & 255 for byte in range(3)], 1).to(torch.uint8)  # [4, 3 bytes, headers]
    tops = torch.cat((three[:3], three[3].unsqueeze(1)), 1)  # the fourth one's bytes are the tops of the others
    header = torch.cat((_bytes(weight.pairs.view(-1, 2)), tops.flatten(0, 1).t()), 1)
    data[:, :start] = header.reshape(rows, start)
    return data


def groups_along(data: torch.Tensor, cols: int, supers: bool) -> Groups:
    """What `along` made bytes of. data: uint8 [rows, row_bytes]."""
    rows, count, start = len(data), groups(cols), header_bytes(cols, supers)
    codes = _codes(data[:, start:], cols)
    if not supers:
        return Groups(codes, data[:, : 4 * count].contiguous().view(torch.float16).view(rows, count, 2))
    header = data[:, :start].reshape(rows, -1, 16)
    pairs = header[..., :4].contiguous().view(torch.float16)
    three = header[..., 4:].reshape(rows, -1, 3, 4).int()
    dwords = torch.cat((three[..., :3], three[..., 3].unsqueeze(-2)), -2)  # [rows, supers, 4 dwords, 3 bytes]
    numbers = dwords[..., 0] | dwords[..., 1] << 8 | dwords[..., 2] << 16
    fields = torch.stack([numbers >> shift & 63 for shift in (0, 6, 12, 18)], -1).view(rows, -1, 2)
    return Groups(codes, pairs, fields[:, :count].to(torch.uint8))


# ---------------------------------------------------------------------------------------------------- groups across the rows


def shared_bytes(rows: int, cols: int, supers: bool) -> int:
    """Of the scales that rows have together."""
    columns, count = GROUP * groups(cols), groups(rows)
    return columns * (2 * count + 4 * math.ceil(count / SUPER) if supers else 4 * count)


def shared_rows(nbytes: int, cols: int, supers: bool) -> int:
    """How many rows scales of so many bytes are for, in whole groups."""
    columns = GROUP * groups(cols)
    if not supers:
        return GROUP * (nbytes // (4 * columns))
    whole, rest = divmod(nbytes, (4 + 2 * SUPER) * columns)
    return GROUP * (SUPER * whole + max(0, rest - 4 * columns) // (2 * columns))


def across(weight: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """The transpose of a matrix, row by row, so that its groups lie across the rows.

    weight: [cols, rows]. Returns uint8 [rows, 16 * groups(cols)] and uint8 [shared_bytes].
    """
    columns = GROUP * groups(weight.rows)

    def plane(numbers: torch.Tensor) -> torch.Tensor:
        """Of numbers [cols, n, 2] the bytes [n, ...] of `columns` pairs."""
        return _bytes(torch.nn.functional.pad(numbers.transpose(0, 1), (0, 0, 0, columns - weight.rows)))

    pairs, nibbles = plane(weight.pairs), _nibbles(weight.codes.t().contiguous())
    if weight.fields is None:
        return nibbles, pairs.flatten()
    parts = []
    for place, fields in enumerate(plane(weight.fields).split(SUPER)):
        parts += [pairs[place], fields.flatten()]
    return nibbles, torch.cat(parts)


def groups_across(data: torch.Tensor, shared: torch.Tensor, cols: int, supers: bool) -> Groups:
    """What `across` made bytes of: [cols, rows]."""
    columns = GROUP * groups(cols)

    def pairs_of(plane: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return plane.contiguous().view(dtype).view(-1, columns, 2)[:, :cols].transpose(0, 1)

    codes = _codes(data, cols).t()
    if not supers:
        return Groups(codes, pairs_of(shared, torch.float16))
    pieces = shared.split((4 + 2 * SUPER) * columns)
    pairs = torch.cat([piece[: 4 * columns] for piece in pieces])
    fields = torch.cat([piece[4 * columns :] for piece in pieces])
    return Groups(codes, pairs_of(pairs, torch.float16), pairs_of(fields, torch.uint8))


def decode(data: torch.Tensor, shared: torch.Tensor | None, cols: int, supers: bool) -> torch.Tensor:
    """The numbers of a matrix's rows: float32 [rows, cols]. shared: of a matrix whose groups lie across the rows."""
    if shared is None:
        return groups_along(data, cols, supers).numbers()
    return groups_across(data, shared, cols, supers).numbers().t().contiguous()
