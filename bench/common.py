"""What both benchmarks need: who ran it, alternating rounds, medians, results as JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from sirius_ext import __version__, ops

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, highlight=False)


def machine() -> dict[str, str | int]:
    """The CPU, versions and commit that a result belongs to."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = {line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "cpu": ", ".join(sorted(names)) or "unknown",
        "isa": ops.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sirius_ext": __version__,
        "commit": git.stdout.strip() or "unknown",
    }


def header() -> None:
    about = machine()
    console.print(
        f"[bold]{about['cpu']}[/bold], {about['threads']} threads, {about['isa']}, torch {about['torch']}, "
        f"sirius_ext {about['sirius_ext']} ({about['commit']})"
    )


def alternate(variants: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, float]:
    """Run every (warm) variant once a round, in turn, so that a change in speed touches all. Medians of the results."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for _ in track(range(rounds), title, console=Console(stderr=True), transient=True):
        for name, run in variants.items():
            results[name].append(run())
    return {name: statistics.median(values) for name, values in results.items()}


def seconds(body: Callable[[], object]) -> float:
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def save(path: Path | None, record: dict) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
        console.print(f"written to {path}")
