"""Where a period's time goes on a CUDA device: every kernel of a replayed graph, as CUPTI saw it run, summed by kind.

Kernels overlap: the next one waits with its first weights already asked for. So what a kernel adds is counted from the end of the
one before it to its own, and the sums are the whole period's time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import console, header, save
from flags import about
from rich.table import Table
from shapes import SHAPES, random_model
from variants import check_known, draft_of, words

from sirius_ext import Engine, SiriusConfig
from sirius_ext.config import GREEDY
from sirius_ext.engine import device_of

CONFIGS = {
    "Full": SiriusConfig(mode="full"),
    "CSparse 0.5": SiriusConfig(mode="sparse", density=0.5),
    "FSparse 0.5": SiriusConfig(mode="sparse", sparsity="fsparse", density=0.5),
    "Sirius 16": SiriusConfig(density=0.5, period=16, threshold=0.0),
}
FEW = 32  # launches: graphs with fewer are not a period


def traced(run: Callable[[], object]) -> list[list[tuple[str, float, float]]]:
    """The kernels of each graph that is replayed meanwhile: name, begin and end in microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    graphs = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            graphs[event["args"]["correlation"]].append((event["name"], event["ts"], event["ts"] + event["dur"]))
    return [sorted(graph, key=lambda kernel: kernel[2]) for graph in graphs.values() if len(graph) >= FEW]


def short(name: str) -> str:
    """A kernel's name without namespaces, types and arguments: linear_kernel<Plain, 1>."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name)
    depth, end = 0, len(name)
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = place
            break
    return name[:end].replace("__nv_bfloat16, ", "").replace("bf16_t, ", "")


def by_kind(graphs: Sequence[Sequence[tuple[str, float, float]]]) -> tuple[float, list[dict]]:
    """Microseconds of the median graph, and of its kernels by kind: how many, what they add, and how long each runs."""
    graphs = sorted(graphs, key=lambda graph: graph[-1][2] - graph[0][1])
    graph = graphs[len(graphs) // 2]
    added, durations, last = defaultdict(list), defaultdict(list), graph[0][1]
    for name, begin, end in graph:
        added[short(name)].append(max(0.0, end - last))
        durations[short(name)].append(end - begin)
        last = max(last, end)
    records = [
        {
            "kernel": kind,
            "count": len(each),
            "us": sum(each),
            "us_each": statistics.median(each),
            "runs": statistics.median(durations[kind]),
        }
        for kind, each in added.items()
    ]
    return graph[-1][2] - graph[0][1], sorted(records, key=lambda record: -record["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b", help="of the random model")
    parser.add_argument("--weights", choices=("plain", "q8", "q4"), default="plain")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--variants", type=words, default=",".join(CONFIGS), help="of " + ", ".join(CONFIGS))
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    try:
        device_of("cuda")
        check_known("variants", options.variants, CONFIGS)
    except ValueError as error:
        parser.error(str(error))
    header()
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = random_model(options.shape, device, torch.bfloat16, options.weights)
    engine, results = Engine(model), []
    ids = torch.randint(model.config.vocab_size, (1, options.context), device=device)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "min_new_tokens": 64, **GREEDY}
    for name in options.variants:
        config = replace(CONFIGS[name], draft_weights=draft_of(options.weights))
        run = lambda config=config: engine.generate(ids, config=config, **settings)  # noqa: E731
        run()
        total, records = by_kind(traced(run))
        table = Table(title=f"{options.shape}, {options.weights}, {name}: {total:.0f} us a period")
        for column in ("kernel", "count", "us", "us each", "runs for"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for record in records:
            table.add_row(record["kernel"], str(record["count"]), *(f"{record[key]:.1f}" for key in ("us", "us_each", "runs")))
        console.print(table)
        results.append({"variant": name, "weights": options.weights, "us": total, "kernels": records})
        save(
            options.out, {"benchmark": "breakdown", "model": options.shape, "context": options.context, "results": results}, False
        )


if __name__ == "__main__":
    main()
