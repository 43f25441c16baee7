"""What a token costs on a GPU, predicted: from bytes, from the launches that the backend would make, and from a few numbers about
the card, all of which stand here: measured on an H100 (bench/results/breakdown-llama-3-8b-h100.json), assumed of others.
Predictions, not measurements: bench/tables.py shows them as such, beside the floor, and what is measured beside them.

A kernel that reads weights takes the longer of two times: its bytes at the bandwidth that a read reaches, spread over the
multiprocessors as its blocks are; its instructions, as many for each KB as its loop has, at a card's rate. To that comes, for
every kernel, what passes from its launch to its first bytes and from its last ones to its end.

Of models that are larger than the memory it predicts less: `tiers` counts bytes, where they lie and what moves, and lets a link,
a bandwidth and the instructions of a loop say how long that takes.

python bench/model.py            writes bench/results/predicted.json
python bench/model.py --tiers    prints what the predictions for larger models are made of, byte for byte
python bench/model.py --stops    prints what a draft costs that is left out of a period's graph
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from flags import about
from shapes import SHAPES, Shape

from sirius_ext import _C
from sirius_ext.config import MAX_AUTO_PERIOD
from sirius_ext.decoding.sparsity import kept_neurons
from sirius_ext.kernels.matrix import Format
from sirius_ext.kernels.ops import DTYPES
from sirius_ext.kernels.q8 import groups

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "predicted.json"
ADDRESS = 1 << 20  # of whatever is not read when launches are only noted; a multiple of all alignments
PERIOD, AAL = 16, 15.2  # the paper's, of Llama-3-8B on GSM8K
MEASURED = ((16, 10.06), (4, 3.71))  # periods and AALs of docs/results.md: Qwen2.5-Coder-1.5B, all tasks, density 0.5
# What the matrices are: those of attention, gate and up, then down, embedding and LM head, and the LM head of S.
WEIGHTS = {
    "bf16": (Format.BF16, Format.BF16, Format.BF16, Format.BF16),
    "q4": (Format.Q4_K, Format.Q4_K_ACROSS, Format.Q8, Format.Q8_UPPER),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """bandwidth: bytes/s, nominal. clock: Hz, of the multiprocessors. overlaps: whether a kernel begins before the one before has
    ended, and asks for its first weights (sm_90 on)."""

    name: str
    bandwidth: float
    processors: int
    clock: float
    overlaps: bool

    @property
    def read(self) -> float:
        """Bytes/s that a read of weights reaches: measured on an H100, and by torch's reductions there."""
        return 0.92 * self.bandwidth

    @property
    def step(self) -> float:
        """Seconds of a kernel in a graph beside those in which it reads at full speed. On an H100 the output projection takes
        13.9 us for 33.5 MB, and `down` 22.0 for 58.7. Where kernels do not overlap 1.4 us more are assumed."""
        return 3.1e-6 if self.overlaps else 4.5e-6

    @property
    def instructions(self) -> float:
        """Of a warp, a second: four a cycle and multiprocessor, of which the loops over packed weights reach not half on an
        H100: what they wait for is loads."""
        return 0.45 * 4 * self.processors * self.clock


CARDS = (
    Card("A40", 696e9, 84, 1.74e9, False),
    Card("L40", 864e9, 142, 2.49e9, False),
    Card("A100", 2039e9, 108, 1.41e9, False),
    Card("H100", 3350e9, 132, 1.755e9, True),
    Card("H200", 4800e9, 132, 1.755e9, True),
)

# Of hot loops, for each KB of weights that is streamed, by rows of input up to which the body is for: what nvcc 13 makes of them
# for sm_90a (tests/test_cuda_build.py keeps them from growing). Several rows are normalised before: of packed weights and sixteen
# rows the instructions for that are taken off, elsewhere they are in these numbers.
INSTRUCTIONS = {
    ("gate_up", "Plain"): {1: 37, 8: 70, 16: 100},
    ("down", "Plain"): {8: 101, 16: 98},
    ("dot", "Plain"): {1: 35, 8: 94, 16: 146},
    ("dot", "Q8<false>"): {1: 132, 8: 297, 16: 185},
    ("gate_up", "Nibbles"): {1: 167, 8: 342, 16: 288},
    ("dot", "Nibbles"): {1: 178, 8: 520, 16: 339},
    ("down", "Across<false>"): {8: 300, 16: 372},
}
# The same of attention, for each KB of keys and values and each block that reads it, by head_dim up to which the body is for and
# groups of eight queries.
OF_ATTENTION = {(64, 1): 99, (64, 2): 151, (128, 1): 60, (128, 2): 88}
# Seconds that a kernel takes which reads no weights, beside `step`, measured on an H100: of attention what its keys and values do
# not explain, of the selection its passes over what one block has in registers.
OTHERS = {
    "attention": 0.5e-6,
    "combine": -0.8e-6,
    "rms_norm": -0.8e-6,
    "embed": -1.2e-6,
    "embed_packed": -1.2e-6,
    "argmax": 0.3e-6,
    "select": 5.7e-6,
}
# Seconds more of a product that normalises its input, one row.
NORMALISED, NORMALISES = ("qkv", "gate_up", "gate"), 1.7e-6
# Seconds of a conditional node in a graph with the kernel before it that decides, whether the node's part runs or not. No
# published figure is known, so this is an assumption on the dear side: kernels before and after it do not overlap with it.
CONDITION = 10e-6


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
    def weights(self) -> str:
        """How a product reads them."""
        return self.kernel.split(", ")[1]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def resident(launch: Launch) -> int:
    """Blocks of a product, or of attention, that a multiprocessor of sm_90 holds at a time."""
    if launch.op == "attention":
        return 3 if re.search(r"true, [12], 1> >$", launch.kernel) else 2
    packed_down = launch.op == "down" and launch.weights != "Plain"
    return 2 if packed_down or launch.op == "gate_up" or launch.kernel.endswith(", 16>") else 3


BF16 = DTYPES[torch.bfloat16]


def launches(
    shape: Shape, rows: int, context: int, sparsity: str, density: float, processors: int, weights: str = "bf16"
) -> list[Launch]:
    """Of a pass with activations in bf16 over so many rows, as the CUDA sources make them (the tests' emulator is asked, and runs
    none). sparsity: "dense", "listed" (CSparse) or "largest" (FSparse). weights: of WEIGHTS."""
    from sirius_ext import _simt  # the tests' module: `make test` builds it, or SIRIUS_SIMT=ON

    def matrix(form: Format, rows: int, cols: int) -> object:
        stride = 2 * cols if form == Format.BF16 else form.row_bytes(cols)
        beside = {"lower": ADDRESS, "lower_stride": 16 * groups(cols)} if form == Format.Q8 else {}
        return _C.Matrix(
            data=ADDRESS, format=int(form), rows=rows, cols=cols, stride=stride, shared=ADDRESS if form.across else 0, **beside
        )

    along, across, embedding, drafts_head = WEIGHTS[weights]
    head = embedding if sparsity == "dense" else drafts_head
    norm = {"weight": ADDRESS, "eps": 1e-5, "offset": 0.0}
    hidden, intermediate, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    heads = [shape.heads, shape.kv_heads, shape.kv_heads]
    layer = {
        "before_attention": norm,
        "before_mlp": norm,
        "qkv": [{"weight": matrix(along, each * head_dim, hidden), "bias": 0} for each in heads],
        "output": {"weight": matrix(along, hidden, shape.heads * head_dim), "bias": 0},
        **{name: matrix(along, intermediate, hidden) for name in ("gate", "up")},
        "down": matrix(across, intermediate, hidden),
    }
    model = _simt.Model(
        dtype=BF16,
        embedding=matrix(embedding, shape.vocab, hidden),
        final_norm=norm,
        lm_head=matrix(head, shape.vocab, hidden),
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


def bytes_of(found: Sequence[Launch], shape: Shape, kept: int, weights: str = "bf16") -> Iterator[tuple[Launch, float, float]]:
    """The bytes of weights that each launch reads, and of how many the instructions of its loop are asked for."""
    hidden, kv, q = shape.hidden, shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    along, across, head, drafts_head = WEIGHTS[weights]
    if kept < shape.intermediate:
        head = drafts_head
    linears = 0
    for launch in found:
        form = across if launch.op == "down" else along
        numbers = {
            "qkv": (q + 2 * kv) * hidden,
            "gate_up": 2 * kept * hidden,
            "gate": shape.intermediate * hidden,
            "up": kept * hidden,
            "down": kept * hidden,
        }.get(launch.op, 0)
        if launch.op == "linear":
            linears += 1
            numbers = q * hidden
            if linears > shape.layers:
                numbers, form = shape.vocab * hidden, head
        codes = numbers * {Format.BF16: 2.0, Format.Q8: 1.0}.get(form, 0.5)
        if form.across:
            # Of a list all groups of 32 neurons have some, whose scales are read, and a step is a group.
            everything = shape.intermediate * hidden
            yield launch, codes + everything * (2 / 32 + 4 / 256), 0.5 * everything
        else:
            yield launch, codes + (0 if form == Format.BF16 else numbers * 2 / 32), codes


def readings(shape: Shape, rows: int) -> int:
    """How many blocks read the same keys and values: each has up to sixteen queries, of whole rows where a group has no more."""
    group = shape.heads // shape.kv_heads
    slices = -(-group // 16)
    return slices * -(-rows // (16 // -(-group // slices)))


def seconds_of(
    card: Card, launch: Launch, weights: float, cache: float, issued_for: float | None = None, read_by: int = 1
) -> float:
    """One kernel. weights, cache: bytes that it reads of each. issued_for: as `bytes_of` has it, where these are not all.
    read_by: blocks that read the same of the cache, once from memory and then from L2."""
    if launch.op == "attention":
        spans, groups = map(int, re.search(r"(\d), (\d)> >$", launch.kernel).groups())
        issued = OF_ATTENTION[64 * spans, groups] * read_by * cache / 1024 / card.instructions
        return card.step + OTHERS["attention"] + max(cache / card.read, issued)
    if not weights:
        return card.step + OTHERS.get(launch.op, 0.0)
    busiest = -(-launch.blocks // card.processors)
    balance = launch.blocks / (busiest * card.processors)
    per_kb = INSTRUCTIONS[launch.op if launch.op in ("gate_up", "down") else "dot", launch.weights]
    columns = int(re.search(r"(\d+)>$", launch.kernel)[1])
    issued = per_kb[columns] * (weights if issued_for is None else issued_for) / 1024 / card.instructions
    normalises = NORMALISES if launch.op in NORMALISED and columns == 1 else 0.0
    return card.step + normalises + max(weights / card.read, issued) / balance


def pass_seconds(
    card: Card, shape: Shape, rows: int, context: int, sparsity: str, density: float, weights: str = "bf16"
) -> dict[str, float]:
    """Of a pass, by op."""
    kept = shape.intermediate if sparsity == "dense" else kept_neurons(density, shape.intermediate)
    found = launches(shape, rows, context, sparsity, density, card.processors, weights)
    cache = 2 * shape.kv_heads * shape.head_dim * (context + rows) * 2
    out: dict[str, float] = {}
    for launch, size, issued_for in bytes_of(found, shape, kept, weights):
        out[launch.op] = out.get(launch.op, 0.0) + seconds_of(card, launch, size, cache, issued_for, readings(shape, rows))
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

    def passes(weights: str, *kinds: tuple[int, str]) -> list[dict[str, float]]:
        return [pass_seconds(card, shape, rows, context, sparsity, density, weights) for rows, sparsity in kinds]

    def sirius(period: int, length: float) -> float:
        return ((period - 1) * total(sparse) + total(verify)) / length

    total = lambda ops: sum(ops.values())  # noqa: E731
    full, sparse, fsparse, verify = passes("bf16", (1, "dense"), (1, "listed"), (1, "largest"), (PERIOD, "dense"))
    records = [
        record("Full", total(full), full),
        record(f"CSparse {density}", total(sparse), sparse),
        record(f"FSparse {density}", total(fsparse), fsparse),
        record(f"Sirius, CSparse {density}, period {PERIOD}, width 1", sirius(PERIOD, AAL), verify),
    ]
    full, sparse = passes("q4", (1, "dense"), (1, "listed"))
    records += [record("q4: Full", total(full), full), record(f"q4: CSparse {density}", total(sparse), sparse)]
    for period, length in ((PERIOD, AAL), *MEASURED):
        (verify,) = passes("q4", (period, "dense"))
        variant = f"q4: Sirius, CSparse {density}, period {period}, AAL {length}"
        records.append(record(variant, sirius(period, length), verify))
    return records


def left_out(card: Card, name: str, context: int, sparsity: str = "listed", weights: str = "bf16") -> dict[str, float]:
    """Seconds that a draft takes which a period's graph has, and does not run: as a conditional part; and if its kernels, which
    read a flag after they have waited for the kernel before, return at once. sparse: those of a draft that runs."""
    shape, density = SHAPES[name], 0.5
    kernels = len(launches(shape, 1, context, sparsity, density, card.processors, weights))
    sparse = sum(pass_seconds(card, shape, 1, context, sparsity, density, weights).values())
    return {"condition": CONDITION, "flag": kernels * card.step, "sparse": sparse, "kernels": kernels}


def show_left_out() -> None:
    """Print it for every card."""
    name, context = "llama-3-8b", 1024
    print(f"{name}, CSparse 0.5, {context} tokens of context; microseconds of a draft that is left out, predicted")
    for weights, card in itertools.product(WEIGHTS, CARDS):
        found = left_out(card, name, context, weights=weights)
        times = ", ".join(f"{way} {1e6 * found[way]:.0f}" for way in ("condition", "flag"))
        print(f"{weights} {card.name}: {times} ({found['kernels']} kernels); one that runs takes {1e6 * found['sparse']:.0f}")


# ---------------------------------------------------------------------------------------------------------------- tiers

TIERS_MODEL, TIERS_CONTEXT = "llama-3-70b", 1024
LINKS = (25e9, 50e9)  # bytes/s from the host's memory: what PCIe 4 and 5 reach
RESERVED = 1.0e9  # bytes that a card loses to CUDA's context, kernels and work space
RING = 2  # layers whose missing rows have room on the card while they are on their way
LAUNCHES = 6  # of a layer
DENSITIES = [step / 100 for step in range(40, 101, 2)]
TILE = 16  # rows for which our kernels read weights once; more of 16-bit ones are a library's, which reads them once
# By which drafts are accepted, and whose average advance length that is: of texts that were decoded again on paper, of such that
# the engine decoded with trees, or of the paper.
PAPER, IN_TREES = "threshold, the paper's AAL", ", trees"
RULES = ("threshold", "match", "threshold" + IN_TREES, "match" + IN_TREES, PAPER)
PAPER_DENSITIES = (0.48, 0.5)  # the paper's, and what is nearly that where half of the neurons do not fit


@dataclasses.dataclass(frozen=True)
class Storage:
    """How F's weights are stored, and what S reads of them. Bytes per weight, scales included: `full`, `draft` of attention and
    MLP, `full_head`, `draft_head` of the LM head. copy: S has its own, beside F's; else what it reads is a part of F's. slots:
    the card may hold the neurons of S's set alone; else it holds all. texts: which recorded ones say how far a period of such an
    S advances. loop: in which F's rows are multiplied, of INSTRUCTIONS; S's are nibbles. shared: of these bytes
    of an MLP's weight, scales that neurons have together, which S reads whole, and which stay.
    """

    name: str
    full: float
    draft: float
    full_head: float
    copy: bool
    slots: bool
    texts: str
    loop: str
    draft_head: float = 4.5 / 8
    shared: float = 0.0


STORAGES = (
    Storage("bf16, S a copy in 4 bits", 2, 4.5 / 8, 2, True, False, "packed", "Plain"),
    Storage("8 bits, S the upper four", 8.5 / 8, 4.5 / 8, 8.5 / 8, False, True, "packed", "Q8<false>"),
    Storage("4 bits, S the same", 4.5 / 8, 4.5 / 8, 8.5 / 8, False, True, "q4", "Nibbles", shared=20 / 256 / 3),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A card, and the bytes that nvidia-smi shows of it."""

    card: Card
    size: float


MEMORIES = {
    "24 GB": Memory(Card("RTX 4090", 1008e9, 128, 2.52e9, False), 24564 << 20),
    "48 GB": Memory(next(card for card in CARDS if card.name == "L40"), 46068 << 20),
    "80 GB": Memory(next(card for card in CARDS if card.name == "H100"), 81559 << 20),
}


RECORDED_MODEL = "qwen2.5-coder-1.5b"


@functools.cache
def recorded(name: str) -> dict:
    """A file of bench/traces.py, or of bench/advance.py."""
    return json.loads((OUT.parent / f"{name}.json").read_text())


@functools.cache
def advance_at(name: str, rule: str, density: float, period: int) -> float:
    """Tokens that a period commits on average, of a density that was recorded: the recorded texts, decoded again on paper."""
    record = recorded(f"traces-{RECORDED_MODEL}-{name}")
    index = record["densities"].index(density)
    committed = []
    for text in record["texts"]:
        accepted, place = text["drafts"][index][rule], 0
        while place + period - 1 <= len(accepted):
            run = len(accepted[place : place + period - 1].split("0")[0])
            committed.append(run + 1)
            place += run + 1
    return sum(committed) / len(committed)


def advance(name: str, rule: str, density: float, period: int) -> float | None:
    """The same of any density, linearly between recorded ones; None outside of them."""
    known = sorted(recorded(f"traces-{RECORDED_MODEL}-{name}")["densities"])
    below = [each for each in known if each <= density]
    above = [each for each in known if each >= density]
    if not below or not above:
        return None
    low, high = below[-1], above[0]
    share = 0.0 if high == low else (density - low) / (high - low)
    low_advance, high_advance = (advance_at(name, rule, each, period) for each in (low, high))
    return low_advance + share * (high_advance - low_advance)


@dataclasses.dataclass(frozen=True)
class Drafts:
    """S's density, the period and the tree's width; tokens that such a period commits on average; and the share of all neurons
    that enters S's set after it."""

    density: float
    period: int
    width: int
    advance: float
    entering: float = 0.0

    @property
    def nodes(self) -> int:
        """That F looks at in a period."""
        return 1 + (self.period - 1) * self.width


def all_drafts(name: str, rule: str) -> Iterator[Drafts]:
    """Those whose advance is known: of every density and period on paper, the one of the paper, or those that the engine has
    decoded with trees. Of all but these, as many neurons enter a set as in the chains that it has decoded."""
    decoded = recorded(f"advance-trees-{RECORDED_MODEL}-{name}")["results"]
    if rule.endswith(IN_TREES):
        for each in decoded:
            if each["tree_width"] > 1 and each["accept"] == rule.removesuffix(IN_TREES):
                settings = each["density"], each["period"], each["tree_width"]
                yield Drafts(*settings, each["average_advance_length"], each["entering"])
        return
    entering = max(each["entering"] for each in decoded if each["tree_width"] == 1)
    if rule == PAPER:
        yield from (Drafts(density, PERIOD, 1, AAL, entering) for density in PAPER_DENSITIES)
        return
    for density, period in itertools.product(DENSITIES, range(1, MAX_AUTO_PERIOD + 1)):
        length = advance(name, rule, density, period)
        if length is not None:
            yield Drafts(density, period, 1, length, entering if density < 1 else 0.0)


def placed(
    shape: Shape,
    storage: Storage,
    memory: Memory,
    density: float | None,
    context: int,
    nodes: int = 1,
    entering: float = 0.0,
) -> dict[str, float] | None:
    """Bytes of everything, by what they are and where; None if S does not fit. density: of S; None if F decodes alone. nodes: of
    the longest verification. entering: the share of all neurons that enters S's set after it.

    sparse: what S reads of weights. held: what the card holds for that. of_full: F's weights, without the embedding, of which a
    token needs a row, which it reads in the host's memory. resident: of these on the card, those that S reads included where they
    are F's own. moved: the others, once a period. entering: moved after it, into slots. ring: where they come to, and what is in
    slots as well. verified: logits of the nodes of a verification. left: what each neuron adds in them, by which a set follows
    the text; it goes to the host.
    """
    attention = shape.layers * shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    mlp = shape.layers * 3 * shape.hidden * shape.intermediate
    head = shape.vocab * shape.hidden
    cache = 2.0 * shape.layers * 2 * shape.kv_heads * shape.head_dim * (context + nodes)
    verified = nodes * 4.0 * shape.vocab
    own = storage.draft - storage.shared  # of an MLP's weight, what is a neuron's own
    rest = storage.draft * attention + storage.shared * mlp + storage.draft_head * head  # of S's, whatever its set
    sparse = 0.0 if density is None else rest + density * own * mlp
    held = sparse if density is None or storage.slots else rest + own * mlp
    in_slots = own * density * mlp if density is not None and density < 1 and storage.slots else 0.0
    of_full = storage.full * (attention + mlp) + storage.full_head * head
    missing = of_full - (0.0 if storage.copy else held)
    room = memory.size - RESERVED - cache - verified - held
    # What is kept beside S spares its place in the ring, too.
    ring = RING / shape.layers
    more = min(missing, (room - ring * (missing + in_slots)) / (1 - ring))
    if more < 0:
        return None
    moved = missing - more
    return {
        "size": float(memory.size),
        "reserved": RESERVED,
        "cache": cache,
        "verified": verified,
        "sparse": sparse,
        "held": held,
        "of_full": of_full,
        "resident": of_full - moved,
        "moved": moved,
        "entering": entering * own * mlp if in_slots else 0.0,
        "left": 2.0 * nodes * shape.layers * shape.intermediate if density is not None and density < 1 else 0.0,
        "ring": ring * (moved + in_slots),
    }


def read_seconds(card: Card, weights: float, loop: str, rows: int) -> float:
    """Of weights that are multiplied with so many rows: as long as the bytes take, or the loop's instructions for them; of packed
    ones once for every TILE rows."""
    if loop == "Plain" and rows > TILE:
        return weights / card.read
    per_kb = INSTRUCTIONS["dot", loop]
    columns = next((each for each in per_kb if min(rows, TILE) <= each), TILE)
    return -(-rows // TILE) * max(weights / card.read, per_kb[columns] * weights / 1024 / card.instructions)


def tier_seconds(
    shape: Shape, storage: Storage, memory: Memory, link: float, bytes_: dict[str, float], drafts: Drafts | None = None
) -> tuple[float, float]:
    """Of a pass of S, and of one of F, whose rows come over the link while others are computed: read from the card's memory is
    what was resident, what has come (written there first), and the cache; what each neuron adds goes to the host between kernels.
    The first layers, for which there is a ring, come while S drafts; after F, what enters S's set, and twice what the accepted
    nodes left, which a kernel reads in the host's memory.

    drafts: none where F decodes alone.
    """
    card, (width, nodes) = memory.card, (drafts.width, drafts.nodes) if drafts else (1, 1)
    launched = shape.layers * (LAUNCHES * card.step + OTHERS["attention"])
    sparse = read_seconds(card, bytes_["sparse"], "Nibbles", width) + bytes_["cache"] / card.read + launched
    compute = read_seconds(card, bytes_["of_full"], storage.loop, nodes) + (bytes_["moved"] + bytes_["cache"]) / card.read
    compute += bytes_["left"] / link
    after = bytes_["entering"] + (2 * bytes_["left"] * drafts.advance / nodes if drafts else 0.0)
    drafting = (drafts.period - 1) * sparse if drafts else 0.0
    early = min(bytes_["moved"] * RING / shape.layers, drafting * link)
    return sparse, max((bytes_["moved"] - early) / link, compute + launched) + after / link


def tiers(storage: Storage, size: str, link: float, rule: str) -> dict | None:
    """The plan that is predicted to be fastest, of all drafts whose advance is known. None if no density fits, and where all of
    F does, so that nothing has to move."""
    shape, memory = SHAPES[TIERS_MODEL], MEMORIES[size]
    alone = placed(shape, storage, memory, None, TIERS_CONTEXT)
    if alone is None or not alone["moved"]:
        return None
    full_alone = tier_seconds(shape, storage, memory, link, alone)[1]
    best = None
    for drafts in all_drafts(storage.texts, rule):
        bytes_ = placed(shape, storage, memory, drafts.density, TIERS_CONTEXT, drafts.nodes, drafts.entering)
        if bytes_ is None:
            continue
        sparse, full = tier_seconds(shape, storage, memory, link, bytes_, drafts)
        seconds = ((drafts.period - 1) * sparse + full) / drafts.advance
        if best is None or seconds < best["s_per_token"]:
            best = {
                "weights": storage.name,
                "memory": size,
                "card": memory.card.name,
                "link": link,
                "rule": rule,
                "density": drafts.density,
                "period": drafts.period,
                "tree_width": drafts.width,
                "advance": drafts.advance,
                "s_of_sparse": sparse,
                "s_of_full": full,
                "s_per_token_of_full": full_alone,
                "s_per_token": seconds,
                "bytes": bytes_,
            }
    return best


def all_tiers() -> list[dict]:
    """Plans by storage, memory, rule and link, numbers rounded for a file: with trees where they are faster than chains."""
    found: dict[tuple, dict] = {}
    for storage, size, rule, link in itertools.product(STORAGES, MEMORIES, RULES, LINKS):
        chain = found.get((storage, size, rule.removesuffix(IN_TREES), link))  # none yet, if it is a chain's turn
        plan = tiers(storage, size, link, rule)
        if plan and (chain is None or plan["s_per_token"] < chain["s_per_token"]):
            found[storage, size, rule, link] = plan
    out = []
    for plan in found.values():
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in plan.items()}
        out.append(rounded | {"bytes": {name: round(value) for name, value in plan["bytes"].items()}})
    return out


def show_tiers() -> None:
    """Print every byte of each plan."""
    print(f"{TIERS_MODEL}, {TIERS_CONTEXT} tokens of context; s/token = ((n - 1) S + max(link, F)) / AAL; bytes in GB")
    for plan in all_tiers():
        gb = {name: value / 1e9 for name, value in plan["bytes"].items()}
        tree = f" of {plan['tree_width']} branches" if plan["tree_width"] > 1 else ""
        print(
            f"{plan['weights']}; {plan['memory']} ({plan['card']}), {plan['link'] / 1e9:.0f} GB/s, {plan['rule']}\n"
            f"  on the card: {gb['size']:.2f} = {gb['reserved']:.2f} reserved + {gb['cache']:.2f} cache + "
            f"{gb['verified']:.2f} for the verified + "
            f"{gb['held']:.2f} S (density {plan['density']}: {gb['sparse']:.2f} are read) + "
            f"{gb['ring']:.2f} ring + what is left for F; with what S shares {gb['resident']:.2f} of F's {gb['of_full']:.2f} are "
            "there\n"
            f"  a period of n = {plan['period']}{tree} moves {gb['moved']:.2f} and, of S's set, "
            f"{gb['entering']:.2f}, {gb['left']:.2f} to the host; S {1e3 * plan['s_of_sparse']:.1f} ms a pass, "
            f"F {plan['s_of_full']:.2f} s; AAL {plan['advance']:.2f}; {plan['s_per_token']:.3f} s/token, "
            f"F alone {plan['s_per_token_of_full']:.2f}"
        )


def predictions() -> dict:
    """What bench/results/predicted.json holds."""
    name, context = "llama-3-8b", 1024
    results = [{"card": card.name, "context": context, **each} for card in CARDS for each in predict(card, name, context)]
    return {"benchmark": "predicted", "model": name, "dtype": "bfloat16", "results": results, "tiers": all_tiers()}


def main() -> None:
    parser = argparse.ArgumentParser(description=about(__doc__))
    parser.add_argument("--tiers", action="store_true", help="print what is predicted of models larger than the memory")
    parser.add_argument("--stops", action="store_true", help="print what a draft costs that a graph leaves out")
    asked = parser.parse_args()
    if asked.tiers or asked.stops:
        (show_tiers if asked.tiers else show_left_out)()
        return
    OUT.write_text(json.dumps(predictions(), indent=1) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
