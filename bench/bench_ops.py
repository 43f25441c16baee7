"""Microbenchmarks of the CPU ops, in bf16, against torch doing the same.

An op is timed over enough copies of its weights (512 MB and more) that every pass reads them from memory. Its floor is the time
to read the weights that it needs at the best read bandwidth seen in the run; the table gives the share of that floor reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import alternate, console, header, save, seconds
from rich.table import Table

from sirius_ext import ops

# hidden, intermediate
SHAPES = {"smollm2-135m": (576, 1536), "qwen2.5-1.5b": (1536, 8960), "llama-3-8b": (4096, 14336)}
COLD_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--densities", default="1.0,0.5,0.3")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    header()
    results = []
    for shape in options.shapes.split(","):
        for rows in map(int, options.rows.split(",")):
            densities = [float(density) for density in options.densities.split(",")]
            results += bench_mlp(shape, rows, densities, options.rounds)
    results += bench_accept(options.rounds)
    save(options.out, {"benchmark": "ops", "results": results})


def bench_mlp(shape: str, rows: int, densities: Sequence[float], rounds: int) -> list[dict]:
    hidden, intermediate = SHAPES[shape]
    copies = -(-COLD_BYTES // (intermediate * hidden * 2))
    make = lambda *size: torch.randn(*size).div_(hidden**0.5).bfloat16()  # noqa: E731
    one = make(intermediate, hidden)
    weights = [one.clone() for _ in range(copies)]
    x, dense_h = make(rows, hidden), make(rows, intermediate)
    lists = {d: torch.randperm(intermediate)[: round(d * intermediate)].sort().values.int() for d in densities if d < 1}

    variants: dict[str, Callable[[], object]] = {}
    bytes_read: dict[str, int] = {}

    def add(name: str, density: float, body: Callable[[int], object], matrices: int = 1) -> None:
        """body(i) runs the op on copy i; `matrices` of them are read by a call."""
        calls = range(0, copies - matrices + 1, matrices)
        variants[name] = lambda: seconds(lambda: [body(i) for i in calls]) / len(calls)
        bytes_read[name] = round(density * intermediate) * hidden * 2 * matrices

    if rows == 1:
        add("read (torch.sum)", 1, lambda i: weights[i].view(torch.int64).sum())
    add("linear", 1, lambda i: ops.linear(x, weights[i]))
    add("linear torch", 1, lambda i: F.linear(x, weights[i]))
    add("gate_up 1.0", 1, lambda i: ops.gate_up(x, weights[i], weights[i + 1]), 2)
    add("down 1.0", 1, lambda i: ops.down(dense_h, weights[i]))
    for density, neurons in lists.items():
        h, long = dense_h[:, : len(neurons)].contiguous(), neurons.long()
        add(f"gate_up {density}", density, lambda i, n=neurons: ops.gate_up(x, weights[i], weights[i + 1], n), 2)
        add(f"down {density}", density, lambda i, n=neurons, h=h: ops.down(h, weights[i], n))
        if density == 0.5:
            add(f"gather torch {density}", density, lambda i, n=long: F.linear(x, weights[i][n]))

    for warm_up in variants.values():
        warm_up()
    times = alternate(variants, rounds, f"{shape}, {rows} rows")
    rates = {name: bytes_read[name] / times[name] / 1e9 for name in variants}
    best = max(rates.values())
    table = Table(
        title=f"{shape}: hidden {hidden}, intermediate {intermediate}, {rows} row{'s' * (rows > 1)}, bf16, cold weights"
    )
    for column in ("op", "us", "GB/s", "of best read", "vs dense"):
        table.add_column(column, justify="left" if column == "op" else "right")
    records = []
    for name in variants:
        dense = name.split()[0] + " 1.0"
        ratio = times[name] / times[dense] if dense in times and name != dense else None
        table.add_row(
            name,
            f"{times[name] * 1e6:.0f}",
            f"{rates[name]:.1f}",
            f"{rates[name] / best:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
        )
        records.append(
            {
                "shape": shape,
                "rows": rows,
                "op": name,
                "us": times[name] * 1e6,
                "gb_per_s": rates[name],
                "share": rates[name] / best,
            }
        )
    console.print(table)
    return records


def bench_accept(rounds: int, vocab: int = 128256, nodes: int = 16) -> list[dict]:
    logits = torch.randn(nodes, vocab)
    drafts = logits[:-1].argmax(-1).int()

    def torch_accept() -> None:
        likelihoods = (logits[:-1] / 0.6).softmax(-1).gather(1, drafts.long()[:, None])
        ((likelihoods >= 0.1).int().cumprod(0).sum().item(), logits.argmax(-1))

    times = alternate(
        {"accept": lambda: seconds(lambda: ops.accept(logits, drafts, 0.1, 0.6)), "accept torch": lambda: seconds(torch_accept)},
        rounds,
        "accept",
    )
    ratio = times["accept torch"] / times["accept"]
    console.print(f"accept, {nodes} rows of {vocab} logits: {times['accept'] * 1e3:.2f} ms, {ratio:.1f} times as fast as torch")
    return [{"op": name, "rows": nodes, "vocab": vocab, "us": time * 1e6} for name, time in times.items()]


if __name__ == "__main__":
    main()
