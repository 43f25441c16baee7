"""Checksums: what tells bytes that were read from a disk from those that were written to it."""

from __future__ import annotations

import torch

from .. import _C


def checksums(blocks: torch.Tensor) -> torch.Tensor:
    """CRC-32C of each row. blocks: uint8 [n, bytes], contiguous, on the CPU. Returns int32 [n], whose bits are those of the
    unsigned number. ValueError for another tensor."""
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or not blocks.is_contiguous() or blocks.device.type != "cpu":
        raise ValueError(
            f"blocks: expected contiguous uint8 [n, bytes] on the CPU, got {blocks.dtype} {list(blocks.shape)} with strides "
            f"{blocks.stride()} on {blocks.device}"
        )
    sums = torch.empty(len(blocks), dtype=torch.int32, device="cpu")
    _C.checksums(blocks.data_ptr(), blocks.shape[1], len(blocks), sums.data_ptr())
    return sums
