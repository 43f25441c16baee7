"""The tables in docs/benchmarks.md that are made from bench/results/*.json: what was measured on GPUs, beside the paper's
figures, the time that reading the weights takes, and what bench/model.py predicts; models larger than the memory, as measured;
and the same on GPUs, as predicted.

python bench/tables.py          write it
python bench/tables.py --check  exit 1 if it is not what the results say
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from flags import about

ROOT = Path(__file__).resolve().parent.parent

# The parts of the document that are written, by name.
LATENCY, FEWER_BITS, FOUR_BITS, OFFLOAD = "latency", "fewer bits", "four bits", "offload"
TIERS, LARGER = "tiers", "larger than the card"

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


# Of one GPU and one way to store the weights, "plain", "q8" or "q4": records by variant.
Measured = dict[str, dict]


def latencies(folder: Path) -> dict[str, dict[str, Measured]]:
    """What was measured on each GPU, by how the weights are stored, of MODEL after CONTEXT tokens. Of several files for the same,
    the last by name. ValueError if a file of results is not one."""
    found: dict[str, dict[str, Measured]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if record["benchmark"] != "latency" or record["model"] != MODEL:
                continue
            name = _gpu(record["machine"].get("gpu", ""))
            measured = {r["variant"]: r for r in record["results"] if r["context"] == CONTEXT}
            for r in measured.values():
                float(r["ms_per_token"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a file that a benchmark wrote with --out ({error!r})") from error
        if name is not None:
            found.setdefault(name, {}).setdefault(record.get("stored", "plain"), {}).update(measured)
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


def table(measured: dict[str, dict[str, Measured]], predicted: dict[str, dict[str, float]]) -> str:
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
        plain = measured.get(gpu.name, {}).get("plain", {})
        rows["**here**"] = _cells({variant: r["ms_per_token"] for variant, r in plain.items()}, "not measured")
        for index, (what, cells) in enumerate(rows.items()):
            lines.append(f"| {'' if index else gpu.name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fewer_bits(measured: dict[str, dict[str, Measured]]) -> str:
    """Chains of 16 by each S that was measured, whatever bits it and F read. How far a period must get to be as fast as Full is
    its time over Full's of a token."""
    stored = {"plain": "bf16", "q8": "q8", "q4": "q4"}
    lines = []
    for gpu in GPUS:
        for kind, name in stored.items():
            records = measured.get(gpu.name, {}).get(kind, {})
            for variant, record in records.items():
                draft, _, settings = variant.removeprefix("Sirius, ").partition(", ")
                if not variant.startswith("Sirius, CSparse") or settings != "period 16, width 1":
                    continue
                if not {"Full", draft} <= records.keys():
                    continue
                density = float(draft.split()[-1])
                bits = "a copy in four bits" if "(q4)" in draft else {"plain": "bf16", "q8": "four bits of q8", "q4": "q4"}[kind]
                full, period = records["Full"]["ms_per_token"], record["ms_per_period"]
                lines.append(
                    f"| {gpu.name} | {name} | {bits}, {density:.0%} of the neurons | {full:.2f} | "
                    f"{records[draft]['ms_per_token']:.2f} | {period:.1f} | {record['ms_per_token']:.2f} | {period / full:.1f} |"
                )
    if not lines:
        return ""
    head = "| | F reads | S reads | Full | S | period of 16 | Sirius at 15.2 | as fast as Full at |"
    return "\n".join([head, "|---" * 8 + "|", *lines])


def four_bits(predicted: dict[str, dict[str, float]]) -> str:
    """What is predicted of weights in four bits, if anything is."""
    variants = list(dict.fromkeys(name for times in predicted.values() for name in times if name.startswith("q4: ")))
    if not variants:
        return ""
    lines = [f"| *predicted* | {' | '.join(variants)} |", "|---|" + "---|" * len(variants)]
    for gpu in GPUS:
        times = [predicted[gpu.name][variant] for variant in variants] if gpu.name in predicted else []
        if times:
            lines.append(f"| {gpu.name} | {' | '.join(f'*{time:.2f} ({time / times[0]:.2f})*' for time in times)} |")
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


# ---------------------------------------------------------------------------------------------------------------- larger models

BUSY = 0.05  # GB read from disk per token, below which a cell does not mention it


def offloads(folder: Path) -> list[dict]:
    """The files that bench/offload.py wrote. ValueError if one of them is not one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if record["benchmark"] == "offload":
                offload_table(record)
                found.append(record)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a file that a benchmark wrote with --out ({error!r})") from error
    return found


def offload_table(record: dict) -> str:
    """Of one file: tokens/s by variant and budget, in brackets as a multiple of Full's in the same budget."""
    budgets = list(dict.fromkeys(r["memory_bytes"] for r in record["results"]))
    cells = {(r["variant"], r["memory_bytes"]): r for r in record["results"]}
    random = ", random weights" if record["weights"] == "random" else ""
    disk = record["disk_bytes_per_second"]
    read = f"; direct reads of the disk {disk / 1e9:.1f} GB/s" if disk else ""
    lines = [
        f"{record['model']}, {record['dtype']}{random}, {record['machine']['cpu']}, {record['machine']['threads']} threads; "
        f"budget and {record['margin_bytes'] / 1e9:g} GB, {record['limit']}{read}:",
        "",
        f"| tokens/s | {' | '.join(_budget(budget) for budget in budgets)} |",
        "|---|" + "---|" * len(budgets),
    ]
    for variant in dict.fromkeys(r["variant"] for r in record["results"]):
        row = [_offload_cell(cells.get((variant, budget)), cells) for budget in budgets]
        lines.append(f"| {variant} | {' | '.join(row)} |")
    return "\n".join(lines)


def link_busy(run: dict) -> float | None:
    """Share of the full model's passes in which the disk was read; None of who streams nothing."""
    passes = run.get("full_passes")
    return passes["busy_seconds"] / passes["seconds"] if passes and passes["bytes"] else None


def _budget(budget: int | None) -> str:
    return "no limit" if budget is None else f"{budget / 1e9:g} GB"


def _offload_cell(result: dict | None, cells: dict[tuple[str, int | None], dict]) -> str:
    if result is None:
        return "not measured"
    speed, parts = result["tokens_per_second"], []
    if speed:
        full = cells.get((result["full"], result["memory_bytes"]), {}).get("tokens_per_second")
        parts.append(f"{speed:.2f}" + (f" ({speed / full:.2f})" if full and result["variant"] != result["full"] else ""))
        reads = [run["read_bytes"]["decode"] / run["tokens"] / 1e9 for run in result["runs"] if run["tokens"]]
        if reads and statistics.median(reads) >= BUSY:
            parts.append(f"{statistics.median(reads):.1f} GB/token")
        if busy := [share for share in map(link_busy, result["runs"]) if share is not None]:
            parts.append(f"link {statistics.median(busy):.0%}")
    if result["end"] != "finished":
        parts.append(result["end"])
    return ", ".join(parts) or "no token in time"


def larger(folder: Path) -> str:
    """Of models that are not all in a card's memory, as measured. ValueError if a file of results is not one."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if record["benchmark"] != "tiers":
                continue
            of_full = {r["context"]: r["ms_per_token"] for r in record["results"] if r["variant"] == "Full"}
            model = f"{record['model']}, {record['dtype'] if record['stored'] == 'plain' else record['stored']}"
            card = record["machine"].get("gpu", "no GPU")
            where = f"{_gpu(card) or card}, {_budget(record['memory_bytes'])}"
            for r in record["results"]:
                ratio = "" if r["variant"] == "Full" else f" ({r['ms_per_token'] / of_full[r['context']]:.2f})"
                advance = "" if r["advance"] is None else f"{r['advance']:.1f}"
                moved, seconds = r["moved_bytes"] / 1e9, r["ms_per_token"] / 1e3
                link = f"{moved:.1f} | {moved / seconds:.1f}" if moved else " | "
                lines.append(f"| {model} | {where} | {r['variant']} | {advance} | {seconds:.3f}{ratio} | {link} |")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a file that a benchmark wrote with --out ({error!r})") from error
    if not lines:
        return "Not measured."
    head = "| | card, memory | | AAL, given | s/token (of Full) | GB moved a token | GB/s |"
    return "\n".join([head, "|---" * 7 + "|", *lines])


def tiers(folder: Path) -> str:
    """Of models on GPUs, as predicted: a row has the plans that differ in the link alone."""
    path = folder / "predicted.json"
    plans = json.loads(path.read_text()).get("tiers", []) if path.exists() else []
    if not plans:
        return ""
    links = sorted({plan["link"] for plan in plans})
    lines = [
        "| F's weights | card | rule | on the card, GB: S (density) | of F | a period moves, GB | "
        + " | ".join(f"{link / 1e9:.0f} GB/s: n, AAL | *s/token* | *Full*" for link in links)
        + " |",
        "|---|---|---|---|---|---|" + "---|---|---|" * len(links),
    ]
    rows: dict[tuple, dict[float, dict]] = {}
    for plan in plans:
        tree = f" of {plan['tree_width']}" if plan["tree_width"] > 1 else ""
        same = (plan["weights"], f"{plan['memory']}, {plan['card']}", plan["rule"] + tree, plan["density"])
        rows.setdefault(same, {})[plan["link"]] = plan
    for (weights, card, rule, density), by_link in rows.items():
        gb = {name: value / 1e9 for name, value in next(iter(by_link.values()))["bytes"].items()}
        times = [
            f"{plan['period']}, {plan['advance']:.1f} | *{plan['s_per_token']:.3f}* | *{plan['s_per_token_of_full']:.2f}*"
            if plan
            else " | | "
            for plan in map(by_link.get, links)
        ]
        lines.append(
            f"| {weights} | {card} | {rule} | {gb['held']:.1f} ({density:g}) | {gb['resident']:.1f} of {gb['of_full']:.1f} | "
            f"{gb['moved']:.1f} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- the document


def markers(part: str) -> tuple[str, str]:
    return f"<!-- {part}: written by bench/tables.py -->", f"<!-- {part}: end -->"


def renewed(document: str, part: str, content: str) -> str:
    """The document with `content` between the markers of `part`. ValueError if it has not both of them once, in order."""
    begin, end = markers(part)
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"expected {begin!r} and {end!r} once each, in this order")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{content}{content and chr(10)}{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=about(__doc__))
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the document is stale")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():  # what has no results would be taken out of the document
        parser.error(f"results: no folder {options.results}")
    if not options.document.is_file():
        parser.error(f"document: no file {options.document}")
    before = options.document.read_text()
    try:
        predicted = predictions(options.results)
        measured = latencies(options.results)
        after = renewed(before, LATENCY, table(measured, predicted))
        after = renewed(after, FEWER_BITS, fewer_bits(measured))
        after = renewed(after, FOUR_BITS, four_bits(predicted))
        after = renewed(after, OFFLOAD, "\n\n".join(map(offload_table, offloads(options.results))))
        after = renewed(after, TIERS, tiers(options.results))
        after = renewed(after, LARGER, larger(options.results))
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
