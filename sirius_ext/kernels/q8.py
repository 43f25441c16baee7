"""Eight bits in two planes, as csrc/q8.h has them: numbers into rows of bytes, and back.

Weights are rounded in groups of 32 along a row, with one float16 scale a group. A matrix is two planes of rows, of one shape: the
first has the scales and the upper nibbles of the codes, the second, in the same places, the lower nibbles. A reader of the upper
nibbles alone reads the first.
"""

from __future__ import annotations

import torch

GROUP = 32
GROUP_BYTES = 16  # of a plane
ZERO = 128  # the code of a weight of zero
LOWER_MEAN = 7.5  # what a reader of the upper plane takes for the lower nibble
_LARGEST = 127
CHUNK = 1 << 22  # weights at a time: temporaries then stay small


def groups(cols: int) -> int:
    return -(-cols // GROUP)


def scale_bytes(cols: int) -> int:
    return -(-2 * groups(cols) // 16) * 16


def row_bytes(cols: int) -> int:
    """Of a row of a plane."""
    return scale_bytes(cols) + GROUP_BYTES * groups(cols)


def encode(weight: torch.Tensor, upper: bool = False) -> torch.Tensor:
    """weight: float [rows, cols]. Returns uint8 [2, rows, row_bytes], or with `upper` the first plane alone. ValueError if it has
    values that are not finite, or too large for a float16 scale."""
    rows, cols = weight.shape
    planes = torch.zeros(1 if upper else 2, rows, row_bytes(cols), dtype=torch.uint8, device=weight.device)
    step = max(1, CHUNK // cols)
    for first in range(0, rows, step):
        _encode(weight[first : first + step], planes[:, first : first + step])
    check_scales(planes[0], cols)
    return planes[0] if upper else planes


def check_scales(upper: torch.Tensor, cols: int) -> None:
    """ValueError if rows, of the upper plane, were made of weights that are not finite, or too large for a float16 scale."""
    scales = upper[:, : 2 * groups(cols)].contiguous().view(torch.float16)
    if not bool(scales.isfinite().all()):
        row = int((~scales.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"expected finite weights of at most {_LARGEST * 65504:.2g}, row {row} has others")


def _encode(weight: torch.Tensor, planes: torch.Tensor) -> None:
    rows, cols = weight.shape
    count, start = groups(cols), scale_bytes(cols)
    grouped = torch.zeros(rows, count * GROUP, dtype=torch.float32, device=weight.device)
    grouped[:, :cols] = weight
    grouped = grouped.view(rows, count, GROUP)
    scales = (grouped.abs().amax(-1) / _LARGEST).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    # A scale that was rounded down would make the largest weight's code 128, or more if it is subnormal.
    codes = (grouped.mul_(inverse[..., None]).round_().clamp_(-_LARGEST, _LARGEST) + ZERO).to(torch.uint8)
    first, second = codes.split(GROUP_BYTES, -1)
    planes[0, :, : 2 * count] = scales.view(torch.uint8).view(rows, 2 * count)
    planes[0, :, start:] = ((first >> 4) | (second & 0xF0)).view(rows, -1)
    if len(planes) == 2:
        planes[1, :, start:] = ((first & 0xF) | (second << 4)).view(rows, -1)


def decode(upper: torch.Tensor, cols: int, lower: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers that a reader takes rows for. upper: the plane, uint8 [rows, row_bytes]. lower: the lower nibbles, uint8 [rows,
    GROUP_BYTES * groups], if they are read too. Returns float32 [rows, cols]."""
    rows, count, start = len(upper), groups(cols), scale_bytes(cols)
    scales = upper[:, : 2 * count].contiguous().view(torch.float16).float()
    nibbles = upper[:, start:].reshape(rows, count, GROUP_BYTES)
    codes = torch.cat((nibbles << 4, nibbles & 0xF0), -1).float()
    if lower is None:
        codes += LOWER_MEAN
    else:
        nibbles = lower.reshape(rows, count, GROUP_BYTES)
        codes += torch.cat((nibbles & 0xF, nibbles >> 4), -1)
    return ((codes - ZERO) * scales[..., None]).view(rows, count * GROUP)[:, :cols]
