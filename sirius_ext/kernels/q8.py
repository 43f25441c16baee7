"""Eight bits in two planes, as csrc/q8.h has them: numbers into rows of bytes, and back.

Weights are rounded in groups of 32 along a row, with one float16 scale a group. The upper and the lower nibbles of the codes lie
in two planes of the row, so that a reader of the upper ones alone reads half.
"""

from __future__ import annotations

import torch

GROUP = 32
GROUP_BYTES = 16  # of a plane
ZERO = 128  # the code of a weight of zero
LOWER_MEAN = 7.5  # what a reader of the upper plane takes for the lower nibble
_LARGEST = 127
_CHUNK = 1 << 22  # weights at a time: temporaries then stay small


def groups(cols: int) -> int:
    return -(-cols // GROUP)


def scale_bytes(cols: int) -> int:
    return -(-2 * groups(cols) // 16) * 16


def row_bytes(cols: int, upper: bool = False) -> int:
    """Of a whole row, or of what a reader of the upper plane reads."""
    return scale_bytes(cols) + GROUP_BYTES * groups(cols) * (1 if upper else 2)


def encode(weight: torch.Tensor, upper: bool = False) -> torch.Tensor:
    """weight: float [rows, cols]. Returns uint8 [rows, row_bytes]. ValueError if it has values that are not finite, or too large
    for a float16 scale."""
    rows, cols = weight.shape
    out = torch.zeros(rows, row_bytes(cols, upper), dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK // cols)
    for first in range(0, rows, step):
        _encode(weight[first : first + step], out[first : first + step], upper)
    check_scales(out, cols)
    return out


def check_scales(data: torch.Tensor, cols: int) -> None:
    """ValueError if rows were made of weights that are not finite, or too large for a float16 scale."""
    scales = data[:, : 2 * groups(cols)].contiguous().view(torch.float16)
    if not bool(scales.isfinite().all()):
        row = int((~scales.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"expected finite weights of at most {_LARGEST * 65504:.2g}, row {row} has others")


def _encode(weight: torch.Tensor, out: torch.Tensor, upper: bool) -> None:
    rows, cols = weight.shape
    count, start = groups(cols), scale_bytes(cols)
    grouped = torch.zeros(rows, count * GROUP, device=weight.device)
    grouped[:, :cols] = weight
    grouped = grouped.view(rows, count, GROUP)
    scales = (grouped.abs().amax(-1) / _LARGEST).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    # A scale that was rounded down would make the largest weight's code 128, or more if it is subnormal.
    codes = (grouped.mul_(inverse[..., None]).round_().clamp_(-_LARGEST, _LARGEST) + ZERO).to(torch.uint8)
    first, second = codes.split(GROUP_BYTES, -1)
    out[:, : 2 * count] = scales.view(torch.uint8).view(rows, 2 * count)
    planes = out[:, start:].view(rows, -1, count, GROUP_BYTES)
    planes[:, 0] = (first >> 4) | (second & 0xF0)
    if not upper:
        planes[:, 1] = (first & 0xF) | (second << 4)


def decode(data: torch.Tensor, cols: int, upper: bool = False) -> torch.Tensor:
    """The numbers that a reader, of the upper plane alone if `upper`, takes rows for. data: uint8 [rows, row_bytes]. Returns
    float32 [rows, cols]."""
    rows, count, start = len(data), groups(cols), scale_bytes(cols)
    scales = data[:, : 2 * count].contiguous().view(torch.float16).float()
    size = count * GROUP_BYTES
    plane = data[:, start : start + size].view(rows, count, GROUP_BYTES)
    codes = torch.cat((plane << 4, plane & 0xF0), -1).float()
    if upper:
        codes += LOWER_MEAN
    else:
        plane = data[:, start + size : start + 2 * size].view(rows, count, GROUP_BYTES)
        codes += torch.cat((plane & 0xF, plane >> 4), -1)
    return ((codes - ZERO) * scales[..., None]).view(rows, count * GROUP)[:, :cols]


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Input as the CPU's kernels multiply it: rounded to integers of up to 127 times a scale, in groups of 32 along its rows.
    x: float32 [..., cols]."""
    cols = x.shape[-1]
    grouped = torch.nn.functional.pad(x, (0, -cols % GROUP)).unflatten(-1, (-1, GROUP))
    largest = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, _LARGEST) / largest, 0.0)  # a number / tensor rounds twice
    integers = (grouped * inverse).round()
    result: torch.Tensor = (integers * (largest / _LARGEST)).flatten(-2)[..., :cols]
    return result
