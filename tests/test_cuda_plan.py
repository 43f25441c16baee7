"""What the CUDA backend would launch for models of published sizes, on an H100: noted, not run. And the time that bench/model.py
makes of it."""

import json
import math
import re

import model
import pytest
import torch
from backends import call
from shapes import SHAPES

from sirius_ext import _simt
from sirius_ext.kernels import q4
from sirius_ext.kernels.matrix import Format
from sirius_ext.kernels.ops import DTYPES

PUBLISHED = ["qwen2.5-1.5b", "llama-3-8b", "llama-2-7b", "llama-2-13b", "llama-3-70b"]
DENSITIES = [0.7, 0.5, 0.4, 0.3]
PASSES = [("dense", 1.0), *((kind, density) for kind in ("listed", "largest") for density in DENSITIES)]
H100 = next(card for card in model.CARDS if card.name == "H100")
PRODUCTS = {"linear", "qkv", "gate_up", "gate", "up", "down"}


def products(name, rows, kind, density):
    """One launch of each kind that reads weights."""
    found = model.launches(SHAPES[name], rows, 1024, kind, density, H100.processors)
    assert {launch.op for launch in found} <= PRODUCTS | set(model.OTHERS)
    return {launch for launch in found if launch.op in PRODUCTS}


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_read_by_16_bytes_at_every_density(name, rows):
    """10035, 5734 and 4301 neurons of 14336 are no multiples of four: that concerns the input of down alone."""
    for kind, density in PASSES:
        launches = products(name, rows, kind, density)
        assert {launch.op for launch in launches} == PRODUCTS - ({"gate", "up"} if kind != "largest" else {"gate_up"})
        for launch in launches:
            assert ", Plain, true, " in launch.kernel, (launch, kind, density)
            columns = 1 if rows == 1 and launch.op != "down" else 8 if rows <= 8 else 16
            assert launch.kernel.endswith(f", {columns}>")


@pytest.mark.parametrize("weights", model.WEIGHTS)
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3-8b"])
def test_a_draft_that_is_left_out_costs_least_as_a_conditional_part(name, weights):
    """On every card, by far: what a conditional node costs is assumed."""
    for card in model.CARDS:
        found = model.left_out(card, name, 1024, weights=weights)
        assert 5 * found["condition"] < found["flag"] < found["sparse"]
        assert found["condition"] < 0.05 * found["sparse"]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", PUBLISHED[1:])
def test_all_multiprocessors_have_equally_much_to_read(name, rows):
    """One wave, at least three, or nine tenths of the time of all of them used."""
    unfair = []
    for kind, density in PASSES:
        for launch in products(name, rows, kind, density):
            waves = launch.blocks / (model.resident(launch) * H100.processors)
            share = launch.blocks / (math.ceil(launch.blocks / H100.processors) * H100.processors)
            if not (waves <= 1 or waves >= 3 or share >= 0.9):
                unfair.append((launch, round(waves, 2), round(share, 2)))
            if launch.op == "down" and waves > (1 if rows == 1 else 2):
                unfair.append((launch, round(waves, 2)))
    assert not unfair


def test_a_large_workspace_is_not_asked_for_at_once():
    """A tree of 121 nodes over 128k tokens: as many rows at a time as the workspace is for, 22."""
    fields = {"dtype": DTYPES[torch.bfloat16], "q": 0, "k_cache": 0, "v_cache": 0, "mask": 0, "out": 0, "q_stride": 32 * 128}
    _simt.set_planning(H100.processors)
    try:
        call(_simt, "tree_attention", **fields, cache=(8, 1 << 17, 128), mask_words=2, num_rows=121, heads=32)
        assert len(_simt.planned()) == 2 * 6  # and what combines their chunks
    finally:
        _simt.set_planning(0)


def test_bytes_of_a_pass_are_those_of_its_weights():
    for name in PUBLISHED:
        shape = SHAPES[name]
        found = model.launches(shape, 1, 0, "dense", 1.0, H100.processors)
        weights = sum(size for _, size, _ in model.bytes_of(found, shape, shape.intermediate))
        embedding = 0 if shape.tied else shape.vocab * shape.hidden
        assert weights == 2 * (shape.parameters - embedding)


def test_bytes_of_a_pass_in_four_bits():
    """As the matrices themselves count them: a pass of F, and one of S with half of the neurons."""
    shape = SHAPES["llama-3-8b"]
    hidden, intermediate, kv = shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim
    attention = 2 * (hidden + kv) * Format.Q4_K.row_bytes(hidden)
    head = {"dense": (8 + 8 + 1) / 16, "listed": (8 + 1) / 16}  # of q8 a byte and an f16 for 32, of its upper half a nibble
    for sparsity, kept in (("dense", intermediate), ("listed", intermediate // 2)):
        found = model.launches(shape, 1, 0, sparsity, kept / intermediate, H100.processors, "q4")
        mlp = 2 * kept * Format.Q4_K.row_bytes(hidden) + kept * Format.Q4_K_ACROSS.row_bytes(hidden)
        mlp += q4.shared_bytes(intermediate, hidden, supers=True)
        size = sum(size for _, size, _ in model.bytes_of(found, shape, kept, "q4"))
        assert size == shape.layers * (attention + mlp) + shape.vocab * hidden * head[sparsity]


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_four_bits_are_read_by_the_bodies_for_speed(rows):
    for kind, density in PASSES:
        found = model.launches(SHAPES["llama-3-8b"], rows, 1024, kind, density, H100.processors, "q4")
        for launch in found:
            if launch.op in PRODUCTS:
                wanted = {"down": "Across<false>", "linear": "(Nibbles|Q8<false>)"}.get(launch.op, "Nibbles")
                assert re.match(rf"\w+<bf16_t, {wanted}, true, ", launch.kernel), launch
        norms = sum(launch.op == "rms_norm" for launch in found)
        assert norms == (2 * SHAPES["llama-3-8b"].layers + 1 if rows > 1 else 0)


def test_how_many_launches_a_layer_is():
    """As decode_step.cpp says, and the model of tiers counts; beside the layers there are embedding, LM head and argmax."""
    shape = SHAPES["llama-3-8b"]
    for kind, launches in (("dense", model.LAUNCHES), ("listed", model.LAUNCHES), ("largest", model.LAUNCHES + 2)):
        assert len(model.launches(shape, 1, 1024, kind, 0.5, H100.processors)) == shape.layers * launches + 3


def test_predictions_are_never_below_the_floor():
    for card in model.CARDS:
        for each in model.predict(card, "llama-3-8b", 1024):
            if each["variant"] == "Full":
                assert each["ms_per_token"] > 1e3 * 15.0e9 / card.bandwidth


def test_what_the_time_depends_on():
    """Arithmetic on one launch: bytes, multiprocessors that have nothing to do, instructions, and the step."""
    launch = model.Launch("linear_kernel<bf16_t, Plain, true, 1>", (132, 1, 1), 256, 0)
    full = model.seconds_of(H100, launch, 3e6, 0)
    assert full == pytest.approx(H100.step + 3e6 / H100.read)
    half = model.Launch(launch.kernel, (66, 1, 1), 256, 0)
    assert model.seconds_of(H100, half, 3e6, 0) == pytest.approx(H100.step + 2 * 3e6 / H100.read)
    slow = model.Card("slow", 1e15, 132, 1e9, True)
    issued = 3e6 / 1024 * model.INSTRUCTIONS["dot", "Plain"][1] / slow.instructions
    assert model.seconds_of(slow, launch, 3e6, 0) == pytest.approx(slow.step + issued)
    attention = model.Launch("attention_kernel<Attention<bf16_t, true, 2, 2> >", (264, 1, 1), 128, 0)
    least = H100.step + model.OTHERS["attention"]
    assert model.seconds_of(H100, attention, 0, 1e6) == pytest.approx(least + 1e6 / H100.read)
    issued = 1e6 / 1024 * model.OF_ATTENTION[128, 2] / slow.instructions
    assert model.seconds_of(slow, attention, 0, 1e6, None, 4) == pytest.approx(slow.step + model.OTHERS["attention"] + 4 * issued)


def test_how_often_the_cache_is_read():
    """Four rows of four heads are a block's sixteen queries, and so are sixteen rows of one head."""
    times = {name: [model.readings(SHAPES[name], rows) for rows in (1, 4, 5, 16)] for name in ("llama-3-8b", "llama-2-7b")}
    assert times == {"llama-3-8b": [1, 1, 2, 4], "llama-2-7b": [1, 1, 1, 1]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_s_attention_is_one_wave(name):
    """Its grid is no more than what the card holds at a time."""
    for rows, groups in ((1, 1), (16, 2)):
        found = {
            each for each in model.launches(SHAPES[name], rows, 1024, "dense", 1.0, H100.processors) if each.op == "attention"
        }
        (launch,) = found
        assert launch.kernel == f"attention_kernel<Attention<bf16_t, true, 2, {groups}> >"
        assert launch.blocks <= model.resident(launch) * H100.processors


def test_the_file_of_predictions_is_what_the_model_says():
    assert json.loads(model.OUT.read_text()) == model.predictions()
