"""What the compiler made of the CPU's loops over weights: that their prefetches are there. GCC 12 once dropped those of a
function that did nothing else, which no result shows."""

import itertools
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
    """Of every product in a function's body whether it stands in a loop in which there is a prefetch, too: a prefetch leads to
    it, and it to a prefetch."""
    inside = {at for at, _, _ in body}
    after: dict[int, set[int]] = {}
    for (at, text, target), (following, _, _) in itertools.zip_longest(body, body[1:], fillvalue=(-1, "", None)):
        ends = re.match(r"(jmp|ret)\b", text)
        after[at] = {to for to in (target, None if ends else following) if to in inside}
    before: dict[int, set[int]] = {at: set() for at in inside}
    for at, targets in after.items():
        for to in targets:
            before[to].add(at)
    fetches = {at for at, text, _ in body if text.startswith("prefetch")}
    both = reached(fetches, after) & reached(fetches, before)
    return [at in both for at, text, _ in body if re.match(rf"({product})\s", text)]


def reached(start: set[int], edges: dict[int, set[int]]) -> set[int]:
    seen, new = set(start), list(start)
    while new:
        more = edges[new.pop()] - seen
        seen |= more
        new += more
    return seen


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
