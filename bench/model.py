"""What a token costs on a GPU, predicted: from bytes, from the launches that the backend would make, and from a few assumptions
about the card, all of which stand here. Predictions, not measurements: bench/tables.py shows them as such, beside the floor, and
what is measured beside them.

A kernel that reads weights takes the longer of two times: its bytes at the bandwidth that a read reaches, spread over the
multiprocessors as its blocks are; its instructions, as many for each KB as its loop has, at a card's rate. To that comes, for
every kernel, what passes from its launch to its first bytes and from its last ones to its end.

python bench/model.py    writes bench/results/predicted.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from shapes import SHAPES, Shape

from sirius_ext import _C
from sirius_ext.decoding.sparsity import kept_neurons
from sirius_ext.kernels.matrix import Format
from sirius_ext.kernels.ops import DTYPES

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "predicted.json"
ADDRESS = 1 << 20  # of whatever is not read when launches are only noted; a multiple of all alignments
PERIOD, AAL = 16, 15.2  # the paper's, of Llama-3-8B on GSM8K


@dataclasses.dataclass(frozen=True)
class Card:
    """bandwidth: bytes/s, nominal. clock: Hz, of the multiprocessors. overlaps: whether a kernel begins before the one before has
    ended, and asks for its first weights (sm_90 on)."""

    name: str
    bandwidth: float
    processors: int
    clock: float
    overlaps: bool

    # Assumptions, until a card has been measured.
    @property
    def read(self) -> float:
        """Bytes/s that a read of weights reaches."""
        return 0.92 * self.bandwidth

    @property
    def step(self) -> float:
        """Seconds of a kernel in a graph beside those in which it reads at full speed."""
        return 1.2e-6 if self.overlaps else 2.6e-6

    @property
    def instructions(self) -> float:
        """Of a warp, a second: four a cycle and multiprocessor, of which nine tenths are reached."""
        return 0.9 * 4 * self.processors * self.clock


CARDS = (
    Card("A40", 696e9, 84, 1.74e9, False),
    Card("L40", 864e9, 142, 2.49e9, False),
    Card("A100", 2039e9, 108, 1.41e9, False),
    Card("H100", 3350e9, 132, 1.755e9, True),
    Card("H200", 4800e9, 132, 1.755e9, True),
)

# Of hot loops, for each KB of weights in bf16, by rows of input up to which the body is for: what nvcc 13 makes of them for
# sm_90a (tests/test_cuda_build.py keeps them from growing).
INSTRUCTIONS = {"gate_up": {1: 31, 8: 56, 16: 84}, "down": {8: 82, 16: 100}, "dot": {1: 40, 8: 92, 16: 146}}
# Seconds that a kernel takes which reads no weights, beside `step`: of attention what its chunks' dependent steps take, of the
# selection its three histograms.
OTHERS = {"attention": 4e-6, "select": 8e-6}


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the backend asks for. kernel: as linear_kernel<bf16_t, Plain, true, 1>."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int

    @property
    def op(self) -> str:
        return self.kernel.split("_kernel")[0]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def resident(launch: Launch) -> int:
    """Blocks of a product that a multiprocessor of sm_90 holds at a time."""
    several = launch.op == "gate_up" or launch.kernel.endswith(", 16>")
    return 2 if several else 3


BF16 = DTYPES[torch.bfloat16]


def launches(shape: Shape, rows: int, context: int, sparsity: str, density: float, processors: int) -> list[Launch]:
    """Of a pass in bf16 over so many rows, as the CUDA sources make them (the tests' emulator is asked, and runs none). sparsity:
    "dense", "listed" (CSparse) or "largest" (FSparse)."""
    from sirius_ext import _simt  # the tests' module: `make test` builds it, or SIRIUS_SIMT=ON

    def matrix(rows: int, cols: int) -> object:
        return _C.Matrix(data=ADDRESS, format=int(Format.BF16), rows=rows, cols=cols, stride=2 * cols)

    norm = {"weight": ADDRESS, "eps": 1e-5, "offset": 0.0}
    hidden, intermediate, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    heads = [shape.heads, shape.kv_heads, shape.kv_heads]
    layer = {
        "before_attention": norm,
        "before_mlp": norm,
        "qkv": [{"weight": matrix(each * head_dim, hidden), "bias": 0} for each in heads],
        "output": {"weight": matrix(hidden, shape.heads * head_dim), "bias": 0},
        **{name: matrix(intermediate, hidden) for name in ("gate", "up", "down")},
    }
    model = _simt.Model(
        dtype=BF16,
        embedding=matrix(shape.vocab, hidden),
        final_norm=norm,
        lm_head=matrix(shape.vocab, hidden),
        layers=[layer] * shape.layers,
        hidden=hidden,
        intermediate=intermediate,
        vocab=shape.vocab,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
    )
    kept = kept_neurons(density, intermediate)
    capacity = 1 << max(8, (context + rows + 2).bit_length())
    places = ("tokens", "positions", "cos", "sin", "mask", "k_cache", "v_cache", "logits", "argmax", "base", "counters")
    _simt.set_planning(processors)
    try:
        model.step(
            **dict.fromkeys(places, ADDRESS),
            max_position=capacity,
            mask_words=1,
            sparsity=(("dense", "listed", "largest").index(sparsity), ADDRESS if sparsity == "listed" else 0, 0, kept),
            workspace=ADDRESS,
            num_rows=rows,
            first_slot=0,
            capacity=capacity,
            stream=0,
        )
        found = [Launch(re.sub(r"(\{anonymous\}|\w+)::", "", kernel), *rest) for kernel, *rest in _simt.planned()]
    finally:
        _simt.set_planning(0)
    return found


def bytes_of(found: Sequence[Launch], shape: Shape, kept: int) -> Iterator[tuple[Launch, float]]:
    """The bytes of weights that each launch reads, in bf16."""
    hidden, kv, q = shape.hidden, shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    linears = 0
    for launch in found:
        numbers = {
            "qkv": (q + 2 * kv) * hidden,
            "gate_up": 2 * kept * hidden,
            "gate": shape.intermediate * hidden,
            "up": kept * hidden,
            "down": kept * hidden,
        }.get(launch.op, 0)
        if launch.op == "linear":
            linears += 1
            numbers = shape.vocab * hidden if linears > shape.layers else q * hidden
        yield launch, 2.0 * numbers


def seconds_of(card: Card, launch: Launch, weights: float, cache: float) -> float:
    """One kernel. weights, cache: bytes that it reads of each."""
    if not weights:
        return card.step + OTHERS.get(launch.op, 0.0) + (cache / card.read if launch.op == "attention" else 0.0)
    busiest = -(-launch.blocks // card.processors)
    balance = launch.blocks / (busiest * card.processors)
    per_kb = INSTRUCTIONS[launch.op if launch.op in ("gate_up", "down") else "dot"]
    columns = int(re.search(r"(\d+)>$", launch.kernel)[1])
    issued = per_kb[columns] * weights / 1024 / card.instructions
    return card.step + max(weights / card.read, issued) / balance


def pass_seconds(card: Card, shape: Shape, rows: int, context: int, sparsity: str, density: float) -> dict[str, float]:
    """Of a pass, by op."""
    kept = shape.intermediate if sparsity == "dense" else kept_neurons(density, shape.intermediate)
    found = launches(shape, rows, context, sparsity, density, card.processors)
    cache = 2 * shape.kv_heads * shape.head_dim * (context + rows) * 2
    out: dict[str, float] = {}
    for launch, weights in bytes_of(found, shape, kept):
        out[launch.op] = out.get(launch.op, 0.0) + seconds_of(card, launch, weights, cache)
    return out


def predict(card: Card, name: str, context: int) -> list[dict]:
    """Milliseconds per token of Full, the sparse models and Sirius."""
    shape, density = SHAPES[name], 0.5

    def record(variant: str, seconds: float, ops: dict[str, float]) -> dict:
        return {
            "variant": variant,
            "ms_per_token": round(1e3 * seconds, 3),
            "ms_of_a_pass": {op: round(1e3 * each, 3) for op, each in sorted(ops.items())},
        }

    full, sparse, fsparse, verify = (
        pass_seconds(card, shape, rows, context, sparsity, density)
        for rows, sparsity in ((1, "dense"), (1, "listed"), (1, "largest"), (PERIOD, "dense"))
    )
    total = lambda ops: sum(ops.values())  # noqa: E731
    return [
        record("Full", total(full), full),
        record(f"CSparse {density}", total(sparse), sparse),
        record(f"FSparse {density}", total(fsparse), fsparse),
        record(
            f"Sirius, CSparse {density}, period {PERIOD}, width 1", ((PERIOD - 1) * total(sparse) + total(verify)) / AAL, verify
        ),
    ]


def predictions() -> dict:
    """What bench/results/predicted.json holds."""
    name, context = "llama-3-8b", 1024
    results = [{"card": card.name, "context": context, **each} for card in CARDS for each in predict(card, name, context)]
    return {"benchmark": "predicted", "model": name, "dtype": "bfloat16", "results": results}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    OUT.write_text(json.dumps(predictions(), indent=1) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
