"""Microbenchmarks of the ops, with weights in bf16, in eight bits and in four, against torch doing the same in bf16.

On the CPU an op is timed over enough copies of its weights (512 MB and more) that every pass reads them from memory. Its floor is
the time to read the weights that it needs at the best read bandwidth seen in the run; the table gives the share of that floor
reached. `--backend cuda` measures the CUDA ops: see ops_cuda.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import ops_cuda
import torch
import torch.nn.functional as F
from common import alternate, console, header, save, seconds
from flags import about, positive
from rich.table import Table
from shapes import SHAPES, shape_of

from sirius_ext.kernels import ops, q4, q8
from sirius_ext.kernels.matrix import Matrix

DEFAULTS = {
    "cpu": {"shapes": "smollm2-135m,qwen2.5-1.5b,llama-3-8b", "rows": "1,4,16", "densities": "1.0,0.5,0.3", "rounds": 7},
    "cuda": {
        "shapes": "llama-3-8b,llama-2-7b,llama-2-13b,llama-3-70b",
        "rows": "1,2,4,8,16",
        "densities": "1.0,0.7,0.5,0.4,0.3",
        "rounds": 15,
    },
}
COLD_BYTES = 512 << 20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """SystemExit with the reason for what cannot be run."""
    parser = argparse.ArgumentParser(description=about(__doc__))
    parser.add_argument("--backend", choices=list(DEFAULTS), default="cpu")
    default = lambda name: "; ".join(f"{backend}: {values[name]}" for backend, values in DEFAULTS.items())  # noqa: E731
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)} (default {default('shapes')})")
    parser.add_argument("--rows", help=f"of input (default {default('rows')})")
    parser.add_argument("--densities", help=f"of the MLP (default {default('densities')})")
    parser.add_argument("--rounds", type=positive, help=f"(default {default('rounds')})")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.backend].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        options.shapes = options.shapes.split(",")
        for shape in options.shapes:
            shape_of(shape)
        options.rows = [int(rows) for rows in options.rows.split(",")]
        options.densities = [float(density) for density in options.densities.split(",")]
        if not all(0 < density <= 1 for density in options.densities):
            raise ValueError(f"densities: expected more than 0 and at most 1, got {options.densities}")
        if not all(rows >= 1 and (rows <= 16 or options.backend == "cpu") for rows in options.rows):
            most = " to 16" if options.backend == "cuda" else " or more"
            raise ValueError(f"rows: expected 1{most}, got {options.rows}")
    except ValueError as error:
        parser.error(str(error))
    if options.backend == "cuda" and not torch.cuda.is_available():
        parser.error("backend: cuda was asked for, but there is no CUDA device that torch can use")
    return options


def main() -> None:
    options = parse()
    header()
    if options.backend == "cuda":
        asked = options.shapes, options.rows, options.densities, options.rounds
        with torch.no_grad():
            keep = lambda record, last=False: save(options.out, {"benchmark": "ops, cuda", **record}, last)  # noqa: E731
            keep(ops_cuda.bench(*asked, torch.device("cuda"), on_result=keep), last=True)
        return
    results = []
    for shape in options.shapes:
        for rows in options.rows:
            results += bench_mlp(shape, rows, options.densities, options.rounds)
    results += [bench_follow(shape, options.rounds) for shape in options.shapes]
    results += bench_accept(options.rounds)
    save(options.out, {"benchmark": "ops", "results": results})


def bench_mlp(shape: str, rows: int, densities: Sequence[float], rounds: int) -> list[dict]:
    hidden, intermediate = SHAPES[shape].hidden, SHAPES[shape].intermediate
    make = lambda *size: torch.randn(*size).div_(hidden**0.5).bfloat16()  # noqa: E731
    of_each = {}
    for name, (along, down) in forms(make(intermediate, hidden)).items():
        # As many copies as make what is read of them larger than a cache.
        count = -(-COLD_BYTES // along.nbytes)
        copies = [_copy(along) for _ in range(count)]
        of_each[name] = copies, copies if down is along else [_copy(down) for _ in range(count)]
    plain = [matrix.data for matrix in of_each[""][0]]
    x, dense_h = make(rows, hidden), make(rows, intermediate)
    lists = {d: torch.randperm(intermediate)[: round(d * intermediate)].sort().values.int() for d in densities if d < 1}

    variants: dict[str, Callable[[], object]] = {}
    bytes_read: dict[str, int] = {}

    def add(name: str, density: float, body: Callable[[int], object], matrices: int = 1, kind: str = "") -> None:
        """body(i) runs the op on copy i; `matrices` of them are read by a call."""
        weights = of_each[kind][name.startswith("down")]
        calls = range(0, len(weights) - matrices + 1, matrices)
        variants[name + kind] = lambda: seconds(lambda: [body(i) for i in calls]) / len(calls)
        shared = 0 if weights[0].shared is None else weights[0].shared.nbytes  # of 32 neurons: some of each are read
        rows_read = round(density * intermediate) * (weights[0].nbytes - shared) // intermediate
        bytes_read[name + kind] = (rows_read + shared) * matrices

    if rows == 1:
        add("read (torch.sum)", 1, lambda i: plain[i].view(torch.int64).sum())
    add("linear torch", 1, lambda i: F.linear(x, plain[i]))
    for kind, (weights, down) in of_each.items():
        add("linear", 1, lambda i, w=weights: ops.linear(x, w[i]), kind=kind)
        add("gate_up 1.0", 1, lambda i, w=weights: ops.gate_up(x, w[i], w[i + 1]), 2, kind)
        add("down 1.0", 1, lambda i, w=down: ops.down(dense_h, w[i]), kind=kind)
        for density, neurons in lists.items():
            h, long = dense_h[:, : len(neurons)].contiguous(), neurons.long()
            add(f"gate_up {density}", density, lambda i, n=neurons, w=weights: ops.gate_up(x, w[i], w[i + 1], n), 2, kind)
            add(f"down {density}", density, lambda i, n=neurons, h=h, w=down: ops.down(h, w[i], n), kind=kind)
            if density == 0.5 and not kind:
                add(f"gather torch {density}", density, lambda i, n=long: F.linear(x, plain[i][n]))

    for warm_up in variants.values():
        warm_up()
    times = alternate(variants, rounds, f"{shape}, {rows} rows")
    rates = {name: bytes_read[name] / times[name] / 1e9 for name in variants}
    best = max(rates.values())
    table = Table(
        title=f"{shape}: hidden {hidden}, intermediate {intermediate}, {rows} row{'s' * (rows > 1)}, bf16, packed, cold weights"
    )
    for column in ("op", "us", "GB/s", "of best read", "vs dense"):
        table.add_column(column, justify="left" if column == "op" else "right")
    records = []
    for name in variants:
        op, *rest = name.split()
        dense = " ".join([op, "1.0", *(part for part in rest if part.startswith("q"))])
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


def forms(weight: torch.Tensor) -> dict[str, tuple[Matrix, Matrix]]:
    """What is multiplied with an input (gate, up, a projection), and what is added up (down), bf16 [neurons, hidden], in every
    format; by what follows an op's name. Four bits have random codes and scales."""
    plain = Matrix(weight)
    eight = plain.in_eight_bits()
    upper = eight.in_four_bits()
    out = {"": (plain, plain), " q8": (eight, eight), " q8_upper": (upper, upper)}
    for name, supers in ((" q4", False), (" q4_k", True)):
        out[name] = Matrix.of_groups(_groups(*weight.shape, supers)), Matrix.of_groups(_groups(*weight.shape[::-1], supers), True)
    return out


def _groups(rows: int, cols: int, supers: bool) -> q4.Groups:
    codes, count = torch.randint(16, (rows, cols), dtype=torch.uint8), q8.groups(cols)
    pairs = (torch.rand(rows, -(-count // 8) if supers else count, 2) / cols).half()
    return q4.Groups(codes, pairs, torch.randint(64, (rows, count, 2), dtype=torch.uint8) if supers else None)


def _copy(matrix: Matrix) -> Matrix:
    """With bytes of its own."""
    shared = None if matrix.shared is None else matrix.shared.clone()
    return Matrix(matrix.data.clone(), matrix.packed, shared)


def bench_follow(shape: str, rounds: int, rows: int = 16, density: float = 0.5) -> dict:
    """A following set chosen anew in all layers, after a verification of which all rows joined the sequence; and beside it the
    least that the verification takes, which reads all weights once at the speed of torch.sum."""
    sizes = SHAPES[shape]
    z = torch.randn(sizes.layers, rows, sizes.intermediate).bfloat16()
    joined, squares = torch.arange(rows, dtype=torch.int32), torch.rand(sizes.layers, sizes.intermediate)
    statistic, kept = torch.rand_like(squares), round(density * sizes.intermediate)
    arena = torch.zeros(COLD_BYTES // 8, dtype=torch.int64)
    bodies = {
        "follow": lambda: ops.follow(z, joined, squares, statistic, kept, 0.98),
        "read": lambda: arena.sum(),
    }
    times = alternate({name: lambda body=body: seconds(body) for name, body in bodies.items()}, rounds, f"{shape}, follow")
    floor = 2 * sizes.parameters / (COLD_BYTES / times["read"])
    share = times["follow"] / floor
    console.print(f"{shape}: follow, {rows} rows, {times['follow'] * 1e3:.2f} ms, {share:.2%} of a verification at memory speed")
    return {"shape": shape, "rows": rows, "op": "follow", "us": times["follow"] * 1e6, "of_verification": share}


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
