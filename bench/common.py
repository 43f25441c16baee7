"""What all benchmarks need: who ran it, alternating rounds, medians, results as JSON."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from sirius_ext import __version__
from sirius_ext.kernels import ops

T = TypeVar("T")

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, highlight=False)


# As nvidia-smi calls them.
GPU_FIELDS = {
    "gpu": "name",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "power_limit": "power.limit",
    "driver": "driver_version",
}


def gpu() -> dict[str, str]:
    """The first GPU's name, clocks, power limit and driver, and torch's CUDA. Empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    about = {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda or "unknown"}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        values = [value.strip() for value in answer.stdout.split(",")]
        if answer.returncode == 0 and len(values) == len(GPU_FIELDS):
            about |= dict(zip(GPU_FIELDS, values))
    return about


def commit() -> str:
    """The commit of this copy of the sources, or where that is not a clone, $SIRIUS_COMMIT."""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if git.stdout.strip():
            return git.stdout.strip()
    return os.environ.get("SIRIUS_COMMIT", "unknown")


def machine() -> dict[str, str | int]:
    """The CPU, the GPU if there is one, versions and commit that a result belongs to."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = {line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)) or "unknown",
        "isa": ops.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sirius_ext": __version__,
        "commit": commit(),
        **gpu(),
    }


def header() -> None:
    about = machine()
    if "gpu" in about:
        clocks = f"SM {about.get('sm_clock', '?')} of {about.get('max_sm_clock', '?')}, {about.get('power_limit', '?')}"
        console.print(f"[bold]{about['gpu']}[/bold], {clocks}, driver {about.get('driver', '?')}, CUDA {about['cuda']}")
    console.print(
        f"[bold]{about['cpu']}[/bold], {about['threads']} threads, {about['isa']}, torch {about['torch']}, "
        f"sirius_ext {about['sirius_ext']} ({about['commit']})"
    )


def in_turn(variants: Mapping[str, Callable[[], T]], rounds: int, title: str) -> Iterator[tuple[str, T]]:
    """Run every variant once a round, in turn, so that a change in speed touches all. Names and results as they come."""
    for _ in track(range(rounds), title, console=Console(stderr=True), transient=True):
        for name, run in variants.items():
            yield name, run()


def alternate(
    variants: dict[str, Callable[[], float]],
    rounds: int,
    title: str,
    on_median: Callable[[str, float], None] = lambda name, median: None,
) -> dict[str, float]:
    """Medians of what the (warm) variants return, run in turn. on_median: told a name and its median so far after each result, so
    that a benchmark which is ended has something to show."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for name, result in in_turn(variants, rounds, title):
        results[name].append(result)
        on_median(name, statistics.median(results[name]))
    return {name: statistics.median(values) for name, values in results.items()}


def seconds(body: Callable[[], object]) -> float:
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def save(path: Path | None, record: dict, last: bool = True) -> None:
    """Not `last`: of a benchmark that goes on. Whatever ends it, the file holds all of one of its states."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".part")
        half.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
        half.replace(path)
        if last:
            console.print(f"written to {path}")
