import math

import backends
import pytest
import torch
from backends import Guarded, U, as_float, assert_close, assert_same_bits, in_turns, randn, walled

from sirius_ext import _simt
from sirius_ext.kernels import ops, reference

# (rows, heads, kv_heads, head_dim, capacity)
SHAPES = [
    (1, 1, 1, 8, 1),
    (2, 3, 1, 16, 7),
    (3, 4, 4, 40, 33),
    (5, 8, 2, 64, 19),
    (7, 9, 3, 80, 100),
    (16, 4, 1, 128, 21),
    (40, 3, 3, 64, 61),
    (17, 6, 2, 2, 151),
]
POSITIONS = 200


def tables(rotary_dim):
    angles = torch.arange(POSITIONS).unsqueeze(1) / 100.0 ** (torch.arange(rotary_dim // 2) / max(1, rotary_dim // 2))
    return angles.cos(), angles.sin()


def inputs(shape, dtype):
    m, heads, kv_heads, head_dim, capacity = shape
    qkv = randn(m, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.randint(POSITIONS, (m,), dtype=torch.int32)
    slots = torch.randperm(capacity)[:m].int()
    caches = [randn(kv_heads, capacity, head_dim, dtype=dtype) for _ in "kv"]
    return qkv, *tables(head_dim), positions, slots, *caches


def rotation_error(x):
    """Two products and one sum, of numbers as large as the pair: three roundings a side."""
    a, b = x.double().abs().chunk(2, dim=-1)
    return 6 * U * torch.cat([a + b, a + b], dim=-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, shape):
    m, heads, kv_heads, head_dim, _ = shape
    qkv, cos, sin, positions, slots, *caches = inputs(shape, dtype)
    exact = [tensor.clone() for tensor in as_float(qkv, *caches)]
    reference.rope_kv_write(exact[0], cos, sin, positions, slots, *exact[1:])

    written = [Guarded(tensor) for tensor in (qkv, *caches)]
    backend.rope_kv_write(
        written[0].tensor, walled(cos), walled(sin), walled(positions), walled(slots), written[1].tensor, written[2].tensor
    )
    out, k_cache, v_cache = (guarded.check() for guarded in written)

    split = heads * head_dim
    q, k = qkv[:, :split].view(m, heads, head_dim), qkv[:, split : split + kv_heads * head_dim].view(m, kv_heads, head_dim)
    assert_close(out[:, :split].view_as(q), exact[0][:, :split].view_as(q), rotation_error(q))
    assert_same_bits(out[:, split:], qkv[:, split:])
    assert_close(k_cache[:, slots.long()], exact[1][:, slots.long()], rotation_error(k).transpose(0, 1))
    assert_same_bits(v_cache, exact[2].to(dtype))
    others = torch.ones(k_cache.shape[1], dtype=torch.bool)
    others[slots.long()] = False
    assert_same_bits(k_cache[:, others], caches[0][:, others])


def test_position_zero_changes_nothing(backend, dtype):
    qkv, cos, sin, positions, slots, k_cache, v_cache = inputs((3, 4, 2, 40, 5), dtype)
    out = qkv.clone()
    backend.rope_kv_write(out, cos, sin, torch.zeros_like(positions), slots, k_cache, v_cache)
    assert_same_bits(out, qkv)
    assert_same_bits(k_cache[:, slots.long()].transpose(0, 1).flatten(1), qkv[:, 160:240])


@pytest.mark.parametrize("head_dim", [40, 64])
def test_batch_and_thread_invariance(kernels, dtype, head_dim):
    shape = (16, 4, 2, head_dim, 33)
    qkv, cos, sin, positions, slots, k_cache, v_cache = inputs(shape, dtype)
    together = [tensor.clone() for tensor in (qkv, k_cache, v_cache)]
    kernels.rope_kv_write(together[0], cos, sin, positions, slots, *together[1:])
    torch.set_num_threads(1)
    for i in range(16):
        row = slice(i, i + 1)
        kernels.rope_kv_write(qkv[row], cos, sin, positions[row], slots[row], k_cache, v_cache)
    for one_by_one, tensor in zip((qkv, k_cache, v_cache), together):
        assert_same_bits(one_by_one, tensor)


def heads_of(qkv, shape):
    """q, k and v, [m, heads, D] each."""
    _, heads, kv_heads, head_dim, _ = shape
    return qkv.view(len(qkv), -1, head_dim).split([heads, kv_heads, kv_heads], 1)


@pytest.mark.parametrize(
    ("shape", "rotary", "norms"),
    in_turns(5, SHAPES, [0.0, 0.5, 1.0], ["neither", "q", "both", "both, with an offset"]),
    ids=str,
)
def test_norms_and_partial_rotation(backend, dtype, shape, rotary, norms):
    head_dim = shape[3]
    rotary_dim = 2 * int(rotary * head_dim / 2)
    qkv, _, _, positions, slots, *caches = inputs(shape, dtype)
    cos, sin = tables(rotary_dim)
    weights = {"q_norm": randn(head_dim, dtype=dtype), "k_norm": randn(head_dim, dtype=dtype)}
    if norms == "neither":
        weights = {}
    elif norms == "q":
        del weights["k_norm"]
    settings = {"eps": 1e-5, "offset": 1.0 if norms.endswith("offset") else 0.0}

    exact = [tensor.clone() for tensor in as_float(qkv, *caches)]
    as_floats = {name: weight.float() for name, weight in weights.items()}
    reference.rope_kv_write(exact[0], cos, sin, positions, slots, *exact[1:], **as_floats, **settings)
    written = [Guarded(tensor) for tensor in (qkv, *caches)]
    backend.rope_kv_write(
        written[0].tensor,
        walled(cos),
        walled(sin),
        walled(positions),
        walled(slots),
        written[1].tensor,
        written[2].tensor,
        **{name: walled(weight) for name, weight in weights.items()},
        **settings,
    )
    out, k_cache, v_cache = (guarded.check() for guarded in written)

    places, (q, k, v) = slots.long(), heads_of(qkv, shape)
    written_q, *rest = heads_of(out, shape)
    for one, other in zip(rest, (k, v)):
        assert_same_bits(one, other)
    assert_same_bits(v_cache[:, places], v.transpose(0, 1))
    written_k, exact_k = (cache[:, places].transpose(0, 1) for cache in (k_cache, exact[1]))
    for name, old, new, right in (("q_norm", q, written_q, heads_of(exact[0], shape)[0]), ("k_norm", k, written_k, exact_k)):
        rotated, relative = old.float(), 0.0
        if name in weights:
            # As in test_rms_norm.py. A weight is of about the size of its parts, however its offset cancels.
            size = as_floats[name].abs() + settings["offset"]
            rotated = reference.rms_norm(old.float().reshape(-1, head_dim), size, settings["eps"]).view(old.shape)
            relative = (8 * math.sqrt(head_dim) + 18) * U
        error = relative * rotated.double().abs()
        pairs = rotation_error(rotated[..., :rotary_dim])
        error[..., :rotary_dim] = pairs + relative / (6 * U) * pairs
        assert_close(new, right, error)
        if name not in weights:
            assert_same_bits(new[..., rotary_dim:], old[..., rotary_dim:])
    untouched = torch.ones(k_cache.shape[1], dtype=torch.bool)
    untouched[places] = False
    for cache, old in zip((k_cache, v_cache), caches):
        assert_same_bits(cache[:, untouched], old[:, untouched])


@pytest.mark.parametrize("rotary_dim", [0, 24, 40])
def test_a_row_alone_with_norms(kernels, dtype, rotary_dim):
    qkv, _, _, positions, slots, *caches = inputs((7, 6, 2, 40, 33), dtype)
    settings = {"q_norm": randn(40, dtype=dtype), "k_norm": randn(40, dtype=dtype), "eps": 1e-6, "offset": 1.0}
    together = [tensor.clone() for tensor in (qkv, *caches)]
    kernels.rope_kv_write(together[0], *tables(rotary_dim), positions, slots, *together[1:], **settings)
    for row in range(7):
        alone = qkv[row : row + 1].clone()
        here = slice(row, row + 1)
        kernels.rope_kv_write(alone, *tables(rotary_dim), positions[here], slots[here], *caches, **settings)
        assert_same_bits(alone, together[0][here])
    for one_by_one, tensor in zip(caches, together[1:]):
        assert_same_bits(one_by_one, tensor)


@pytest.mark.parametrize("first_slot", [0, 3])
def test_positions_and_slots_from_memory(first_slot):
    """A replayed graph finds the committed length in device memory, and adds it to positions and slots."""
    qkv, cos, sin, positions, _, *caches = inputs((5, 4, 2, 40, 33), torch.float32)
    positions, base = torch.arange(5, dtype=torch.int32), int32(17)
    expected = [tensor.clone() for tensor in (qkv, *caches)]
    with backends.using("simt-forward") as simt:
        simt.rope_kv_write(expected[0], cos, sin, 17 + positions, 17 + first_slot + positions, *expected[1:])
    backends.call(
        _simt,
        "rope_kv_write",
        dtype=ops.DTYPES[torch.float32],
        qkv=qkv,
        cos=cos,
        sin=sin,
        positions=positions,
        first_slot=first_slot,
        base=base,
        k_cache=caches[0],
        v_cache=caches[1],
        cache=(2, 33, 40),
        num_rows=5,
        heads=4,
        rotary_dim=40,
    )
    for tensor, other in zip((qkv, *caches), expected):
        assert_same_bits(tensor, other)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(2, 64, dtype=torch.int32)}, TypeError, "^qkv: "),
        ({"qkv": torch.zeros(2, 64, device="meta")}, ValueError, "^qkv: .*on meta"),
        ({"qkv": torch.zeros(2, 63)}, ValueError, "^qkv: "),
        ({"qkv": torch.zeros(2, 56)}, ValueError, "^qkv: .*multiple of 2"),
        ({"qkv": torch.zeros(2, 32)}, ValueError, "^qkv: "),
        ({"qkv": torch.zeros(0, 64)}, ValueError, "^qkv: "),
        ({"k_cache": torch.zeros(2, 5, 8, dtype=torch.float16)}, TypeError, "^k_cache: "),
        ({"k_cache": torch.zeros(5, 8)}, ValueError, "^k_cache: expected shape"),
        ({"v_cache": torch.zeros(2, 6, 8)}, ValueError, "^v_cache: expected shape"),
        ({"v_cache": torch.zeros(2, 5, 8, device="meta")}, ValueError, "^v_cache: .*on meta"),
        ({"cos": torch.zeros(10, 8)}, ValueError, "^cos: expected shape"),
        ({"cos": torch.zeros(10, 4, dtype=torch.float16)}, TypeError, "^cos: "),
        ({"q_norm": torch.zeros(7)}, ValueError, "^q_norm: expected shape"),
        ({"k_norm": torch.zeros(8, dtype=torch.float16)}, TypeError, "^k_norm: expected torch.float32"),
        ({"k_norm": torch.zeros(8, device="meta")}, ValueError, "^k_norm: .*on meta"),
        ({"sin": torch.zeros(10, 3)}, ValueError, "^sin: expected shape"),
        ({"sin": torch.zeros(9, 4)}, ValueError, "^sin: expected shape"),
        ({"sin": torch.zeros(10, 4, dtype=torch.float64)}, TypeError, "^sin: "),
        ({"positions": int32(0)}, ValueError, "^positions: expected shape"),
        ({"positions": torch.tensor([0, 1])}, TypeError, "^positions: "),
        ({"positions": int32(0, 10)}, ValueError, "^positions: expected values in"),
        ({"slots": int32(0, -1)}, ValueError, "^slots: expected values in"),
        ({"slots": int32(0, 5)}, ValueError, "^slots: expected values in"),
        ({"slots": int32(3, 3)}, ValueError, "^slots: expected distinct"),
        ({"slots": torch.tensor([0.0, 1.0])}, TypeError, "^slots: "),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "qkv": torch.zeros(2, 64), "cos": torch.zeros(10, 4), "sin": torch.zeros(10, 4), "positions": int32(0, 1),
        "slots": int32(0, 1), "k_cache": torch.zeros(2, 5, 8), "v_cache": torch.zeros(2, 5, 8),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.rope_kv_write(**arguments | change)


def test_odd_head_size():
    cache, table = torch.zeros(1, 5, 7), torch.zeros(10, 3)
    with pytest.raises(ValueError, match="^qkv: .*even head size"):
        ops.rope_kv_write(torch.zeros(1, 21), table, table, int32(0), int32(0), cache, cache.clone())
