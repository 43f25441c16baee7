"""What the compiler made of the CPU's loops over weights: that their prefetches are there. GCC 12 once dropped those of a
function that did nothing else, which no result shows."""

import re
import subprocess
from pathlib import Path

import pytest
import simt_builds

from sirius_ext.kernels import ops

OBJECTS = simt_builds.USUAL / "CMakeFiles/sirius_cpu.dir/csrc/cpu"
# By instruction set: what multiplies weights in loops that prefetch, and in which functions. Those of plain weights also have
# bodies for rows that were read before.
PACKED = r"q[48]::(dot|sum)"
PRODUCTS = {
    "amx": (r"tdp\w+|vpdpbusd", rf"{PACKED}|amx_(dot|sum)"),
    "avx512": (r"vpdpbusd", PACKED),
    "avxvnni": (r"(\{vex\} )?vpdpbusd", PACKED),
    "avx2": (r"vpmaddubsw", PACKED),
}


def object_of(isa: str) -> Path:
    return OBJECTS / f"kernels_{isa}.cpp.o"


BUILT = [isa for isa in PRODUCTS if object_of(isa).exists()]


def functions(listing: str) -> dict[str, list[tuple[int, str, int | None]]]:
    """By its name a function's instructions: where each stands, what it is, and where it may jump to."""
    out: dict[str, list[tuple[int, str, int | None]]] = {}
    body: list[tuple[int, str, int | None]] = []
    for line in listing.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = out.setdefault(found[1], [])
        elif found := re.match(r"\s+([0-9a-f]+):\s+(\S.*)", line):
            target = re.match(r"j\w+\s+([0-9a-f]+) ", found[2])
            body.append((int(found[1], 16), found[2], int(target[1], 16) if target else None))
    return out


def in_loops_that_prefetch(body: list[tuple[int, str, int | None]], product: str) -> list[bool]:
    """Of every product in a function's body whether it stands in a loop in which there is a prefetch, too."""
    fetches = [at for at, text, _ in body if text.startswith("prefetch")]
    loops = [(target, at) for at, _, target in body if target is not None and body[0][0] <= target <= at]
    loops = [(first, last) for first, last in loops if any(first <= at <= last for at in fetches)]
    return [any(first <= at <= last for first, last in loops) for at, text, _ in body if re.match(rf"({product})\s", text)]


def test_what_runs_here_is_looked_at():
    assert set(PRODUCTS) & set(ops.available_isas()) <= set(BUILT), f"objects are missing in {OBJECTS}: `make test` builds them"


@pytest.mark.parametrize("isa", BUILT)
def test_loops_over_weights_prefetch(isa):
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", object_of(isa)]
    found = functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    product, where = PRODUCTS[isa]
    products = {name: in_loops_that_prefetch(body, product) for name, body in found.items() if re.search(where, name)}
    assert sum(map(len, products.values())) >= 8
    assert not [name for name, fetched in products.items() if not all(fetched)], "loops over weights without a prefetch"
