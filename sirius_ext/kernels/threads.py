"""How many CPU threads compute: torch's own number, which every op takes, too."""

from __future__ import annotations

import os

import torch

from ..control_groups import cpu_limit
from ..loading import check_threads

_chosen = False  # by a caller, or once by `cpu_threads`


def cpu_threads() -> int:
    """The threads of torch and of our ops.

    torch begins with one for each CPU that it sees, and a container sees all of the machine's: at the first call they become as
    many as it may use (`cpu_limit`). More of them would be stopped for most of the time, each while others wait for its part.
    A number that was chosen, by OMP_NUM_THREADS or torch.set_num_threads, stays.
    """
    global _chosen
    if not _chosen:
        _chosen, limit = True, cpu_limit()
        if limit is not None and limit < torch.get_num_threads() and _is_default():
            torch.set_num_threads(limit)
    return torch.get_num_threads()


def choose_threads(count: int) -> None:
    """So many from now on. ValueError for a number that this machine cannot serve."""
    global _chosen
    torch.set_num_threads(check_threads(count))
    _chosen = True


def _is_default() -> bool:
    """Whether torch's number may be the one that it began with: of the CPUs or of the cores, which have one or two of them."""
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ):
        return False
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.get_num_threads() in (cpus, cpus // 2)
