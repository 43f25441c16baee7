"""How fast a disk and the memory are read here: measured, in moments."""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import threading
import time
from pathlib import Path

import torch

_ARENA = 1 << 30  # bytes: twice the largest caches that there are


def direct_read_speed(file: Path, seconds: float = 2.0, block: int = 1 << 20, threads: int = 4) -> float | None:
    """Bytes a second that reads past the page cache reach: blocks of `block` bytes in order, `threads` in flight; what a disk can
    give. None where the file system takes no direct reads or the file is smaller than a block."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    blocks = os.fstat(opened).st_size // block
    numbers, done, deadline = itertools.count(), [0] * threads, time.monotonic() + seconds

    def read(thread: int) -> None:
        with mmap.mmap(-1, block) as buffer:  # aligned to a page
            while (number := next(numbers)) < blocks and time.monotonic() < deadline:
                done[thread] += os.preadv(opened, [buffer], number * block)

    try:
        started = time.monotonic()
        workers = [threading.Thread(target=read, args=(thread,)) for thread in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) / (time.monotonic() - started) if sum(done) else None
    finally:
        os.close(opened)


def memory_read_speed(seconds: float = 0.5) -> float:
    """Bytes a second at which torch's threads add up an array that no cache holds: the median of some reads."""
    arena = torch.ones(_ARENA // 8, dtype=torch.int64)  # written, so that each page is one of its own
    deadline = time.perf_counter() + seconds
    taken: list[float] = []
    while (begun := time.perf_counter()) < deadline or not taken:
        arena.sum()
        taken.append(time.perf_counter() - begun)
    return arena.nbytes / statistics.median(taken)
