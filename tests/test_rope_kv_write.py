import backends
import pytest
import torch
from backends import Guarded, U, as_float, assert_close, assert_same_bits, randn, walled

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


def tables(head_dim):
    angles = torch.arange(POSITIONS).unsqueeze(1) / 100.0 ** (torch.arange(head_dim // 2) / (head_dim // 2))
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


@pytest.mark.parametrize("first_slot", [0, 3])
def test_positions_and_slots_from_memory(first_slot):
    """A replayed graph finds the committed length in device memory, and adds it to positions and slots."""
    qkv, cos, sin, positions, _, *caches = inputs((5, 4, 2, 40, 33), torch.float32)
    positions, base = torch.arange(5, dtype=torch.int32), int32(17)
    expected = [tensor.clone() for tensor in (qkv, *caches)]
    with backends.using("simt-forward") as simt:
        simt.rope_kv_write(expected[0], cos, sin, 17 + positions, 17 + first_slot + positions, *expected[1:])
    backends.call(
        _simt, "rope_kv_write_from", 0, qkv, cos, sin, positions, first_slot, *caches, 5, 4, 2, 33, 40, base, workspace=0
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
