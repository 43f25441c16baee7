"""A file of which single parts are read whenever they are needed, and no wrong byte comes from it.

It is read, not mapped: a page of a mapped file that was cut off ends the process, and one that was changed is taken as it is.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from ..kernels.checks import checksums
from ..kernels.stream import PATIENCE

BLOCK = 1 << 14  # bytes that have a checksum
_PIECE = 1 << 22  # bytes of what is long that are read at a time
_AT_ONCE: int = getattr(os, "RWF_NOWAIT", 0)  # what the page cache has; a Python that was built for an old C library lacks it


def block_sums(data: torch.Tensor) -> torch.Tensor:
    """CRC-32C of the blocks of some bytes, uint8 [bytes], of which the last one may be shorter: int32 [blocks]."""
    whole = len(data) // BLOCK * BLOCK
    sums = checksums(data[:whole].view(-1, BLOCK))
    return torch.cat((sums, checksums(data[None, whole:]))) if whole < len(data) else sums


class CheckedFile:
    """path: the file, which stays open. sums: of its blocks, as `block_sums`, from when it was what it should be: int32 [blocks].
    patience: seconds without a byte, after which a disk is given up.

    OSError if it cannot be opened.
    """

    def __init__(self, path: Path, sums: torch.Tensor, patience: float = PATIENCE) -> None:
        self.path, self._sums, self._patience = path, sums, patience
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self, places: Sequence[int], size: int) -> torch.Tensor:
        """`size` bytes from each of some places on: uint8 [places, size]. OSError if they cannot be had, or are not what they
        were; so it is if the disk gives nothing for too long."""
        with torch.inference_mode(False):  # another thread, which is not in it, could not write to what was made in it
            out = torch.empty(len(places), size, dtype=torch.uint8, device="cpu")
            starts = range(0, size, _PIECE)
            pieces = [(at + start, row[start : start + _PIECE]) for at, row in zip(places, out) for start in starts]
        there = 0
        with contextlib.suppress(OSError):  # whatever it is, who reads again will say it
            for at, piece in pieces if _AT_ONCE else ():
                self.fill(at, piece, _AT_ONCE)
                there += 1
        if there < len(pieces):
            self._wait_for(_Reading(self, pieces[there:]))
        return out

    def _wait_for(self, reading: _Reading) -> None:
        """By another thread, which may be given up. It takes a while to start, and is left out where memory has all."""
        reading.start()
        done = -1
        while reading.is_alive() and done < reading.done:
            done = reading.done
            reading.join(self._patience)
        if reading.is_alive():
            raise OSError(f"{self.path}: the disk has not given anything for {self._patience:.0f} seconds")
        if reading.error is not None:
            raise reading.error

    def fill(self, at: int, out: torch.Tensor, flags: int = 0) -> None:
        """The bytes from a place on: into uint8 [bytes]. OSError as `read`, but for the patience. flags: of preadv."""
        first, last = at // BLOCK, -(-(at + len(out)) // BLOCK)
        data = self._bytes(first * BLOCK, (last - first) * BLOCK, last == len(self._sums), flags)
        wrong = (block_sums(data) != self._sums[first:last]).nonzero()
        if len(wrong):
            place = (first + int(wrong[0])) * BLOCK
            raise OSError(
                f"{self.path}: from byte {place} on it is not what was written: the file was changed, or the disk is failing; "
                "prepare it again"
            )
        out.copy_(data[at - first * BLOCK :][: len(out)])

    def _bytes(self, at: int, size: int, last: bool, flags: int) -> torch.Tensor:
        """uint8 [size], or fewer where the file's last block ends."""
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
        got = 0
        while got < size:
            try:
                count = os.preadv(self._file, [data[got:].numpy().data], at + got, flags)
            except OSError as error:
                raise OSError(f"{self.path}: reading at byte {at + got}: {error.strerror}") from error
            got += count
            if count == 0:
                if last and got > size - BLOCK:
                    break
                raise OSError(f"{self.path}: it ends at byte {at + got}: it was cut off")
        return data[:got]


class _Reading(threading.Thread):
    """Fills pieces, each a place and where its bytes go to. One that never returns keeps the memory that it reads into.

    done: how many pieces are there. error: why there are no more.
    """

    def __init__(self, file: CheckedFile, pieces: Sequence[tuple[int, torch.Tensor]]) -> None:
        super().__init__(daemon=True)
        self._file, self._pieces = file, pieces
        self.done = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for at, out in self._pieces:
                self._file.fill(at, out)
                self.done += 1
        except Exception as error:
            self.error = error
