"""What this process may use of the machine: the limits of its control groups (cgroups, of either version), as a container's are
set. Of the standard library alone. Where there are none, nothing is limited."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path


def groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of all groups whose limits hold for this process, its own first, then those that it lies in; and their version.

    controller: "memory" or "cpu".
    """
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and controller not in kinds.split(","):
                continue
            own = Path(path.lstrip("/"))
            for each in (own, *own.parents):
                yield root / (controller if kinds else "") / each, 1 if kinds else 2


def cpu_limit() -> int | None:
    """How many CPUs' time this process may use, the least of its limits, rounded up. None if nothing limits it."""
    found = []
    for folder, version in groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 1:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            if quota > 0 and period > 0:  # -1 and "max" are no limit
                found.append(math.ceil(quota / period))
    return min(found, default=None)
