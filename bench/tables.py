"""What was measured on GPUs, beside the paper's figures, the time that reading the weights takes, and what bench/model.py
predicts: a table in docs/benchmarks.md, made from bench/results/*.json.

python bench/tables.py          write it
python bench/tables.py --check  exit 1 if it is not what the results say
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- latency: written by bench/tables.py -->", "<!-- latency: end -->"

MODEL, CONTEXT = "llama-3-8b", 1024
VARIANTS = {
    "CSparse": "CSparse 0.5",
    "Sirius, w = 1": "Sirius, CSparse 0.5, period 16, width 1",
    "Sirius, w = 4": "Sirius, CSparse 0.5, period 16, width 4",
    "Full": "Full",
    "torch.compile": "dense, torch.compile",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """paper: ms per token of CSparse, Sirius and Full in arXiv 2409.03856, whose Sirius drafts trees of width 4; None where the
    paper has none. floor: GB/s nominal, and the ms per token in which CSparse's, Sirius' and Full's bytes move at that speed."""

    name: str
    paper: tuple[float, float, float] | None
    bandwidth: int
    floor: tuple[float, float, float]


GPUS = (
    Gpu("A40", (20.7, 24.1, 30.9), 696, (13.5, 14.7, 21.6)),
    Gpu("L40", (15.6, 18.2, 23.2), 864, (10.8, 11.9, 17.4)),
    Gpu("A100", (9.6, 11.1, 13.3), 2039, (4.6, 5.0, 7.4)),
    Gpu("H100", (6.6, 7.7, 8.6), 3350, (2.8, 3.1, 4.5)),
    Gpu("H200", None, 4800, (2.0, 2.1, 3.1)),
)


def latencies(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds per token by GPU and variant, of MODEL after CONTEXT tokens. Of several files for a GPU, the last by name.

    ValueError if a file of results is not one.
    """
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if record["benchmark"] != "latency" or record["model"] != MODEL:
                continue
            name = _gpu(record["machine"].get("gpu", ""))
            times = {r["variant"]: r["ms_per_token"] for r in record["results"] if r["context"] == CONTEXT}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a file that a benchmark wrote with --out ({error!r})") from error
        if name is not None:
            found[name] = found.get(name, {}) | times
    return found


def predictions(folder: Path) -> dict[str, dict[str, float]]:
    """As `latencies`, but what bench/model.py predicts. ValueError if the file is not one."""
    path = folder / "predicted.json"
    if not path.exists():
        return {}
    found: dict[str, dict[str, float]] = {}
    try:
        for r in json.loads(path.read_text())["results"]:
            if r["context"] == CONTEXT:
                found.setdefault(r["card"], {})[r["variant"]] = r["ms_per_token"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that bench/model.py wrote ({error!r})") from error
    return found


def _gpu(full_name: str) -> str | None:
    """Which of GPUS nvidia-smi's name means: "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"."""
    words = full_name.replace("-", " ").split()
    return next((gpu.name for gpu in GPUS if gpu.name in words), None)


def table(measured: dict[str, dict[str, float]], predicted: dict[str, dict[str, float]]) -> str:
    lines = [
        f"| | | {' | '.join(VARIANTS)} |",
        "|---|---|" + "---|" * len(VARIANTS),
    ]
    for gpu in GPUS:
        rows: dict[str, Sequence[str]] = {}
        if gpu.paper:
            csparse, sirius, full = _with_ratios(gpu.paper)
            rows["paper"] = csparse, "", sirius, full, ""
        csparse, sirius, full = _with_ratios(gpu.floor)
        rows[f"floor, {gpu.bandwidth} GB/s"] = csparse, sirius, sirius, full, full
        if times := predicted.get(gpu.name):
            rows["*predicted*"] = [f"*{cell}*" if cell else "" for cell in _cells(times, "")]
        rows["**here**"] = _cells(measured.get(gpu.name, {}), "not measured")
        for index, (what, cells) in enumerate(rows.items()):
            lines.append(f"| {'' if index else gpu.name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_ratios(times: tuple[float, float, float]) -> tuple[str, str, str]:
    """Of CSparse, Sirius and Full."""
    csparse, sirius, full = times
    return f"{csparse} ({csparse / full:.2f})", f"{sirius} ({sirius / full:.2f})", str(full)


def _cells(times: dict[str, float], nothing: str) -> list[str]:
    full = times.get("Full")
    cells = []
    for variant in VARIANTS.values():
        time = times.get(variant)
        ratio = f" ({time / full:.2f})" if time and full and variant != "Full" else ""
        cells.append(nothing if time is None else f"{time:.2f}{ratio}")
    return cells


def renewed(document: str, content: str) -> str:
    """The document with `content` between the markers. ValueError if it has not both of them once, in order."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"expected {BEGIN!r} and {END!r} once each, in this order")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the document is stale")
    options = parser.parse_args(arguments)
    before = options.document.read_text()
    try:
        after = renewed(before, table(latencies(options.results), predictions(options.results)))
    except ValueError as error:
        parser.error(str(error))
    if not options.check:
        options.document.write_text(after)
        return 0
    if before == after:
        return 0
    difference = difflib.unified_diff(before.splitlines(), after.splitlines(), "as it is", "as it should be", lineterm="")
    print("\n".join(difference), file=sys.stderr)
    print(f"{options.document}: stale; run `python bench/tables.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
