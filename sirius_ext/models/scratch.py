"""Folders in which something is made that then comes into its place in one step; and locks."""

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
    at the end. One that a killed process has left, with gigabytes in it perhaps, goes when the next one is made, or at its end:
    who tries again at once may not make another."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, prefix)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder, alone(Path(folder)):
        yield Path(folder)
    _remove_abandoned(parent, prefix)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # somebody else has removed it, or it is another user's
            # A clock that was set back leaves times that are still to come.
            if abs(time.time() - left.stat().st_mtime) > YOUNG_SECONDS and _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else comes here with this folder meanwhile. On a file system without locks somebody may, and what killed processes
    have left stays."""
    with opened(folder) as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_abandoned(folder: Path) -> bool:
    """Whether no process works in it."""
    with opened(folder) as handle:
        return is_free(handle)


def is_free(handle: int) -> bool:
    """Whether nobody else has the lock of a file or folder; then it is this handle's. The kernel takes a lock back from a process
    that was killed. OSError on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The handle of a file or folder, with which a lock on it goes, too. No process that is started has it."""
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)
