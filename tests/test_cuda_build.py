"""What nvcc made of the CUDA kernels: that they were built where they should be, and have not lost what their speed rests on."""

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess

import model
import pytest
import sass

from sirius_ext import _C
from sirius_ext.kernels import dispatch

needs_build = pytest.mark.skipif(
    not dispatch.has_cuda_kernels(), reason="built without the CUDA kernels (no nvcc, or neither a GPU nor SIRIUS_CUDA=ON)"
)
PLAIN, Q8, UPPER, NIBBLES = "5Plain", "2Q8ILb0EE", "2Q8ILb1EE", "7Nibbles"
ACROSS, HELD = "6AcrossILb0EE", "6AcrossILb1EE"  # the second of rows in slots
DOTS = ("linear", "gate_up", "gate", "up", "qkv")
# How weights are read: nibbles are q4's, q4_k's and, but for down, q8_upper's.
OF_DOTS, OF_DOWN = (PLAIN, Q8, NIBBLES), (PLAIN, Q8, UPPER, ACROSS, HELD)


def named(op, weights, columns):
    """A product of rows of weights in bf16, from 16-byte aligned rows, for so many rows of input."""
    name = f"{op}_kernel"
    return f"{len(name)}{name}INS_6bf16_tENS0_{weights}ELb1ELi{columns}E"


PRODUCTS = {named(op, weights, columns) for op in DOTS for weights in OF_DOTS for columns in (1, 8, 16)}
PRODUCTS |= {named("down", weights, columns) for weights in OF_DOWN for columns in (8, 16)}
PRODUCTS.add(named("down", UPPER, 1))
# Whose registers do not suffice to load a step's weights before the products of the step before.
LATE = {named("gate_up", weights, 16) for weights in (Q8, NIBBLES)}
LATE |= {named("down", weights, 16) for weights in (Q8, ACROSS, HELD)}
# How often the loop over a step's groups goes round where it is one: two groups at a time of four, and of eight.
ROUNDS = {Q8: 2, NIBBLES: 4}
# Of a hot loop: the share of instructions that put words together from halves, and how many instructions there are for each KB of
# weights that is streamed, by columns. What nvcc 13 makes of them, and a tenth on top. An H100 has time for 290 if it shall read
# 3.3 TB/s. Scales that are not streamed are no part of it: of nibbles they are an eighth of a KB more, of q4 a quarter. Where
# input is normalised before the product (decode_step.cpp), a part of the instructions is passed over; and of gate_up's, in all
# steps of a tile but its last one, those that find the next tile's rows.
MOST_PRMT = 0.14
PRMT_OF_NIBBLES = 0.22  # which are numbers of bf16 by their bytes
MOST_INSTRUCTIONS = {
    ("gate_up", PLAIN): {1: 41, 8: 77, 16: 110},
    ("down", PLAIN): {8: 111, 16: 117},
    ("dot", PLAIN): {1: 37, 8: 103, 16: 161},
    ("gate_up", Q8): {1: 173, 8: 251, 16: 288},
    ("down", Q8): {8: 250, 16: 300},
    ("dot", Q8): {1: 146, 8: 327, 16: 445},
    ("down", UPPER): {1: 311, 8: 400, 16: 564},
    ("gate_up", NIBBLES): {1: 186, 8: 385, 16: 557},
    ("dot", NIBBLES): {1: 196, 8: 576, 16: 860},
    ("down", ACROSS): {8: 337, 16: 425},
    ("down", HELD): {8: 337, 16: 425},
}
# Attention by head_dim, in spans of 64, and groups of eight queries. Instructions for each KB of keys and values, as above; those
# of soft caps, a tenth, are passed over without one.
OF_ATTENTION = {(1, 1): 109, (1, 2): 166, (2, 1): 66, (2, 2): 97, (4, 1): 56}
OTHERS = {f"attention_kernelINS0_9AttentionINS_6bf16_tELb1ELi{spans}ELi{groups}E" for spans, groups in OF_ATTENTION}
OTHERS |= {"accept_kernelILb1E"}


def test_built_when_asked_for():
    """`make test` asks for it where there is an nvcc: elsewhere the tests below are skipped."""
    assert dispatch.has_cuda_kernels() or os.environ.get("SIRIUS_CUDA") != "ON"


def cuobjdump(*arguments):
    """The CUDA toolkit's, or that of the development requirements."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    for name in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        folders += [str(file.locate().parent) for file in files if file.parent.name == "bin"]
    path = os.pathsep.join(folders)
    program = shutil.which("cuobjdump", path=path)
    assert program, "no cuobjdump: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or a whole CUDA toolkit"
    command = [program, *arguments, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


def parts_of(product):
    op, weights, columns = re.match(r"\d+(\w+?)_kernelINS_6bf16_tENS0_(\w+?)ELb1ELi(\d+)E", product).groups()
    return op, weights, int(columns)


@functools.cache
def usage():
    """(registers of a thread, bytes of stack, which also holds spilled registers), by architecture and kernel."""
    out, architecture, kernel = {}, None, None
    for line in cuobjdump("-res-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (\w+):", line):
            kernel = found[1]
        elif found := re.search(r"\bREG:(\d+) STACK:(\d+)", line):
            out.setdefault(architecture, {})[kernel] = int(found[1]), int(found[2])
    return out


@functools.cache
def code(architecture):
    """The instructions of PRODUCTS, by which of them."""
    wanted = {name: product for product in PRODUCTS for name in usage()[architecture] if product in name}
    assert len(wanted) == len(PRODUCTS)
    found = sass.kernels(cuobjdump("-sass", "-arch", architecture, "-fun", ",".join(wanted)))
    return {wanted[name]: instructions for name, instructions in found.items()}


def hot_loop(loops):
    """The loop in which weights are loaded and multiplied: the innermost of one tile's steps and a block's tiles."""
    found = sorted((loop for loop in loops if _streaming(loop) and _products(loop)), key=len)
    assert [len(_products(loop)) for loop in found] in ([len(_products(found[0]))], [len(_products(found[0]))] * 2)
    return found[0]


def counted(product, loops):
    """How many instructions a step of the hot loop is: of a loop inside of it those of all rounds."""
    outer = hot_loop(loops)
    places = {each.address for each in outer}
    inner = [loop for loop in loops if _products(loop) and {each.address for each in loop} < places]
    weights = parts_of(product)[1]
    return len(outer) + sum((ROUNDS[weights] - 1) * len(loop) for loop in inner)


def _streaming(instructions):
    return [i for i, each in enumerate(instructions) if each.code.startswith("LDG") and ".NA" in each.code]


def _products(instructions):
    return [i for i, each in enumerate(instructions) if each.code.startswith("HMMA")]


def architectures():
    """Those that the build has code for. bench/gpu.sh builds for the card that is there; elsewhere it is both."""
    if not dispatch.has_cuda_kernels():
        return ["sm_80", "sm_90a"]
    return sorted(set(re.findall(r"\b(sm_\w+)\.cubin", cuobjdump("--list-elf"))))


ARCHITECTURES = architectures()


@needs_build
def test_built_for_the_cards_that_were_asked_for():
    asked = os.environ.get("SIRIUS_CUDA_ARCHITECTURES", "80;90a-real").replace("-real", "").split(";")
    assert sorted(f"sm_{number}" for number in asked) == ARCHITECTURES


@needs_build
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_body_for_speed_spills(architecture):
    kernels = usage()[architecture]
    for wanted in PRODUCTS | OTHERS:
        assert any(wanted in name for name in kernels), f"no kernel is {wanted}"
    spilling = {
        name: stack for name, (_, stack) in kernels.items() if stack and not re.search(r"_kernelI(NS0_9AttentionI)?f", name)
    }
    assert not spilling, "bytes of stack in kernels of 16-bit types"


@needs_build
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hot_loops_stream(architecture):
    """Weights come by 16 bytes and past L1. What a step needs is asked for before anything of it is used, and in most bodies
    before the products of the step before. Nothing is called, and few instructions take words apart or put them together."""
    faults = {name: found for name, body in code(architecture).items() if (found := loop_faults(name, body))}
    assert not faults


def loop_faults(product, instructions):
    """What is wrong with its hot loop."""
    loops = sass.loops(instructions)
    out, loop = [], hot_loop(loops)
    loads, products = _streaming(loop), _products(loop)
    if not all(".128" in loop[i].code for i in loads):
        out.append("weights are not read by 16 bytes")
    if any(each.code.startswith(("LDL", "STL")) or (each.code.startswith("CALL") and not each.predicate) for each in loop):
        out.append("something is called, or spilled")
    loaded = {register for i in loads for register in loop[i].registers(written=True)}
    # From a step's first load on nothing may wait for it, but for other loads' addresses in the same registers before they are
    # loaded: until its last one, or where a step is loaded ahead until the products of the one before have begun.
    end = loads[-1] if product in LATE else products[0]
    since = {register: i for i in loads for register in loop[i].registers(written=True)}
    waits = [each.text for i, each in enumerate(loop[:end]) if any(since[r] < i for r in loaded & each.registers(written=False))]
    if waits:
        out.append(f"waits for what was just asked for: {waits[0]}")
    if end < loads[-1]:
        out.append("loads come after the first product")
    kilobytes = len(loads) * 16 * 32 / 1024
    share = sum(each.code.startswith("PRMT") for each in loop) / len(loop)
    op, weights, columns = parts_of(product)
    if share > (PRMT_OF_NIBBLES if weights == NIBBLES else MOST_PRMT):
        out.append(f"{share:.0%} PRMT")
    most = MOST_INSTRUCTIONS[op if op in ("gate_up", "down") else "dot", weights][columns]
    if (count := counted(product, loops) / kilobytes) > most:
        out.append(f"{count:.0f} instructions per KB, and not at most {most}")
    return out


@functools.cache
def attention_code(architecture):
    """The instructions of attention in bf16 with aligned rows, by spans and groups."""
    pattern = r"attention_kernelINS0_9AttentionINS_6bf16_tELb1ELi(\d)ELi(\d)E"
    wanted = {name: found for name in usage()[architecture] if (found := re.search(pattern, name))}
    listings = sass.kernels(cuobjdump("-sass", "-arch", architecture, "-fun", ",".join(wanted)))
    return {(int(wanted[name][1]), int(wanted[name][2])): body for name, body in listings.items()}


@needs_build
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_streams(architecture):
    """The first keys and values of a chunk, and the queries, are asked for before the first product; in the loop those of the
    next slots are, with half of a step's products or more before any of them is used."""
    bodies = attention_code(architecture)
    assert bodies.keys() == OF_ATTENTION.keys()
    faults = {shape: found for shape, body in bodies.items() if (found := attention_faults(shape, body))}
    assert not faults


def attention_faults(shape, instructions):
    """What is wrong with a body, of spans and groups."""
    spans, groups = shape
    loop = min((each for each in sass.loops(instructions) if _products(each)), key=len)
    out, products = [], _products(loop)
    loads = [i for i, each in enumerate(loop) if each.code.startswith("LDG")]
    step = 16 * spans * 64 * 2 * 2  # bytes of a warp's keys and values
    if not all(".128" in loop[i].code for i in loads):
        out.append("keys and values are not read by 16 bytes")
    if any(each.code.startswith(("LDL", "STL", "BAR")) or (each.code.startswith("CALL") and not each.predicate) for each in loop):
        out.append("something is called, spilled, or waits for other warps")
    if len(products) != 8 * spans * groups:
        out.append(f"{len(products)} products")
    if spans <= 2:  # of more elements values are loaded when registers are free of keys, and waited for
        if len(loads) != step / 512:
            out.append(f"{len(loads)} loads")
        for i in loads:
            written, passed = loop[i].registers(written=True), 0
            for each in (*loop[i + 1 :], *loop[: i + 1]):
                if not each.code.startswith("LDG") and written & each.registers(written=False):
                    break
                passed += each.code.startswith("HMMA")
            if passed < len(products) / 2:
                out.append(f"waits for what was just asked for: {loop[i].text}")
        first = [each for each in instructions[: instructions.index(loop[0])] if each.code.startswith("LDG.E.NA.128")]
        if len(first) != step / 512 + 2 * spans * groups:
            out.append(f"{len(first)} loads before the first product")
    count = len(loop) / (step / 1024)
    if count > OF_ATTENTION[shape]:
        out.append(f"{count:.0f} instructions per KB, and not at most {OF_ATTENTION[shape]}")
    return out


@needs_build
def test_as_many_blocks_fit_as_grids_are_made_for():
    """A multiprocessor of sm_90 has 65536 registers, which a warp takes by 256."""
    if "sm_90a" not in ARCHITECTURES:
        pytest.skip("not built for sm_90")
    for name, (registers, _) in usage()["sm_90a"].items():
        product = next((each for each in PRODUCTS if each in name), None)
        if product is None:
            continue
        op, weights, columns = parts_of(product)
        launch = model.Launch(
            f"{op}_kernel<bf16_t, {'Plain' if weights == PLAIN else weights}, true, {columns}>", (1, 1, 1), 256, 0
        )
        wanted = model.resident(launch)
        assert 65536 // (256 * 8 * -(-registers // 8)) >= wanted, product


@needs_build
def test_kernels_wait_for_the_one_before():
    """From sm_90 on they overlap: each waits, and says when the next one may begin. Not so the one that writes weights, which the
    next one would read too early."""
    if "sm_90a" not in ARCHITECTURES:
        pytest.skip("not built for sm_90")
    _, *listings = re.split(r"Function : (?=\w*_kernel)", cuobjdump("-sass", "-arch", "sm_90a"))
    waiting, saying = ({text.split()[0] for text in listings if name in text} for name in ("ACQBULK", "PREEXIT"))
    silent = waiting - saying
    assert len(listings) == len(waiting) > len(PRODUCTS)
    assert len(silent) == 1 and "fill_kernel" in silent.pop()
