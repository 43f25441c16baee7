"""A process in limited memory: run in a memory cgroup of its own, and what it took there. Linux only."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

SAMPLE_SECONDS = 0.02  # between two looks at the memory
REMOVAL_SECONDS = 5.0  # in which the kernel has let go of a cgroup whose processes have ended
LAST_WORDS = 1500  # characters of a failed process' stderr that are kept

_numbers = itertools.count()


class NoCgroup(RuntimeError):
    """No memory cgroup can be made here; the text says what is missing."""


class Cgroup:
    """A memory cgroup for one process, of version 1 or 2 as the machine has it. Page cache that the process reads counts, as do
    its own pages; where both reach `limit` (bytes; None: no limit, memory is only counted), the kernel takes cache back, and
    where that does not help, kills the process. There is no swap in it.

    NoCgroup if none can be made.
    """

    def __init__(self, limit: int | None) -> None:
        reasons = []
        for version, parent in _parents():
            try:
                self._folder = _made(version, parent)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror or error}")
                continue
            self.kind, self._version = f"cgroup v{version}", version
            try:
                self._limit(limit)
            except OSError as error:
                self.close()
                reasons.append(f"{parent}: {error.strerror or error}")
                continue
            return
        raise NoCgroup(
            "memory cgroup: expected the memory controller, mounted, and the right to make a cgroup in it (root's, as a rule); "
            + ("; ".join(reasons) or "/proc/self/mounts names no cgroup with that controller")
        )

    def _limit(self, limit: int | None) -> None:
        if limit is None:
            return
        if self._version == 1:
            self._write("memory.limit_in_bytes", limit)
            if (self._folder / "memory.memsw.limit_in_bytes").exists():
                self._write("memory.memsw.limit_in_bytes", limit)
        else:
            self._write("memory.max", limit)
            if (self._folder / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)

    def _write(self, file: str, value: int) -> None:
        (self._folder / file).write_text(f"{value}\n")

    def _table(self, file: str) -> dict[str, int]:
        return {name: int(value) for name, value in map(str.split, (self._folder / file).read_text().splitlines())}

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` inside, from its first page on."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs"), *command]

    def look(self, pid: int) -> tuple[int, int]:
        """Bytes of anonymous memory and of page cache."""
        names = ("rss", "cache") if self._version == 1 else ("anon", "file")
        found = self._table("memory.stat")
        return found[names[0]], found[names[1]]

    def peak(self) -> int | None:
        """Bytes, as the kernel has counted them; None where it does not (version 2 before Linux 5.19)."""
        file = self._folder / ("memory.max_usage_in_bytes" if self._version == 1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    def killed(self) -> bool:
        """Whether the kernel has killed the process for want of memory."""
        return self._table("memory.oom_control" if self._version == 1 else "memory.events").get("oom_kill", 0) > 0

    def close(self) -> None:
        """Remove it, once its process has ended."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        while True:
            try:
                return self._folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(SAMPLE_SECONDS)


class Watched:
    """In place of a cgroup: the process' anonymous memory is looked at, and the process killed once that is above `limit` bytes.
    Page cache is neither limited nor counted, so that whoever reads a model through it has all of the machine's: not what a
    cgroup measures, and named `kind` in every result."""

    kind = "watched"

    def __init__(self, limit: int | None) -> None:
        self._limit, self._killed = limit, False

    def command(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def look(self, pid: int) -> tuple[int, int]:
        """Bytes of anonymous memory, and of files that are mapped."""
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found = {line[0]: 1024 * int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssFile:")}
        anonymous = found.get("RssAnon:", 0)
        if self._limit is not None and anonymous > self._limit:
            self._killed = True
            os.kill(pid, signal.SIGKILL)
        return anonymous, found.get("RssFile:", 0)

    def peak(self) -> None:
        return None

    def killed(self) -> bool:
        return self._killed

    def close(self) -> None:
        pass


LIMITS = {"cgroup": Cgroup, "watch": Watched}


def _parents() -> Iterator[tuple[int, Path]]:
    """Version and folder of each cgroup in which one for memory may be made: the root first, then down to our own."""
    own = {}  # by the controllers of a hierarchy, "" for version 2
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        root = Path(mount)
        if kind == "cgroup" and "memory" in options.split(","):
            version, path = 1, own.get("memory", "/")
        elif kind == "cgroup2" and "memory" in (root / "cgroup.controllers").read_text().split():
            version, path = 2, own.get("", "/")
        else:
            continue
        yield version, root
        parts = Path(path.lstrip("/")).parts
        for depth in range(1, len(parts) + 1):
            if (inner := root.joinpath(*parts[:depth])).is_dir():  # in a container the path may be that of outside
                yield version, inner


def _made(version: int, parent: Path) -> Path:
    """A new cgroup. OSError if there is none to be had."""
    if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        raise OSError("its cgroup.subtree_control does not pass on memory (as root: echo +memory > cgroup.subtree_control)")
    folder = parent / f"sirius-bench-{os.getpid()}-{next(_numbers)}"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------------------------------------------------- a run


@dataclasses.dataclass
class Outcome:
    """How a process ended, and what it took.

    end: "finished"; "killed", for want of memory; "timed out"; or "failed".
    lines: what it wrote to standard output.
    error: the last it wrote to standard error, where it failed.
    peak: bytes of the cgroup at their most; None where nothing has counted them.
    anonymous, file: bytes of each at their most, as far as looks at them have seen; not at the same time.
    """

    end: str
    lines: list[str]
    error: str
    peak: int | None
    anonymous: int
    file: int


def run(command: Sequence[str], stdin: str, limit: Cgroup | Watched, timeout: float) -> Outcome:
    """Run `command` within `limit`, which is closed afterwards, for `timeout` seconds at most; never raises for what it does."""
    lines: list[str] = []
    anonymous = file = total = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            limit.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reader.start()
        try:
            try:
                process.stdin.write(stdin)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended: the end says how
            deadline = time.monotonic() + timeout
            timed_out = False
            while process.poll() is None:
                try:
                    seen = limit.look(process.pid)
                except (FileNotFoundError, ProcessLookupError):
                    seen = 0, 0  # it ended just now
                anonymous, file, total = max(anonymous, seen[0]), max(file, seen[1]), max(total, sum(seen))
                if time.monotonic() > deadline:
                    timed_out = True
                    process.kill()
                    process.wait()
                time.sleep(SAMPLE_SECONDS)
            reader.join()
            peak = limit.peak()
            if peak is None and isinstance(limit, Cgroup):
                peak = total
            killed = limit.killed()
        finally:
            process.kill()
            process.wait()
            limit.close()
        errors.seek(0)
        words = errors.read()[-LAST_WORDS:]
    end = "killed" if killed else "timed out" if timed_out else "finished" if process.returncode == 0 else "failed"
    error = words or f"ended with status {process.returncode}"
    return Outcome(end, lines, error if end == "failed" else "", peak, anonymous, file)


# ---------------------------------------------------------------------------------------------------------------- files


def files_in(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and all below the folders among them; each once."""
    found = (file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))))
    return list(dict.fromkeys(file.resolve() for file in found if file.is_file()))


def make_cold(files: Iterable[Path]) -> int:
    """Drop these files from the page cache. Returns how many of their bytes are still there: those that another process has
    mapped, or all where the file system does not listen."""
    left = 0
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what has not been written yet stays in the cache
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left += cached_bytes(file)
    return left


def cached_bytes(file: Path) -> int:
    """Of a file, those in the page cache. OSError if the kernel does not tell."""
    size = file.stat().st_size
    if size == 0:
        return 0
    mapped = np.memmap(file, np.uint8, "r")
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    if libc.mincore(address(mapped), ctypes.c_size_t(size), address(pages)):
        raise OSError(ctypes.get_errno(), "mincore failed", str(file))
    return min(size, int((pages & 1).sum()) * mmap.PAGESIZE)
