"""Folders in which something is made that then comes into its place in one step."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

YOUNG_SECONDS = 60.0  # one that is younger may not have its lock yet


@contextlib.contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder of its own, so that two processes cannot meet in it; beside the target, so that os.replace is atomic. It is gone
    at the end. One that a killed process has left, with gigabytes in it perhaps, goes when the next one is made."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # somebody else has removed it, or it is another user's
            if time.time() - left.stat().st_mtime > YOUNG_SECONDS and _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder, opened(Path(folder)) as handle:
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes what others have left
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield Path(folder)


def _is_abandoned(folder: Path) -> bool:
    """Whether no process works in it: the kernel takes a lock back from one that was killed."""
    with opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[int]:
    """The folder's handle, with which a lock on it goes, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
