import backends
import pytest
import torch
from backends import Guarded, assert_same_bits, randn, walled
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext import _simt
from sirius_ext.kernels import ops


def check(backend, shape, start, path, dtype):
    path = torch.tensor(path, dtype=torch.int32)
    before = [randn(*shape, dtype=dtype) for _ in "kv"]
    caches = [Guarded(cache) for cache in before]
    backend.kv_rewrite(caches[0].tensor, caches[1].tensor, start, walled(path))
    for cache, old in zip(caches, before):
        expected = old.clone()
        expected[:, :, start : start + len(path)] = old.index_select(2, start + path.long())
        assert_same_bits(cache.check(), expected)


# (layers, kv_heads, capacity, head_dim), start, path
CASES = [
    ((1, 1, 1, 8), 0, [0]),
    ((1, 1, 1, 8), 1, []),
    ((2, 3, 33, 40), 5, []),
    ((3, 2, 21, 16), 0, [20]),
    ((2, 1, 100, 64), 63, [0, 1, 2, 3]),
    ((2, 4, 61, 80), 7, [0, 2, 5, 8, 53]),
    ((3, 3, 151, 128), 100, [1, 2, 3, 4, 5, 6, 7, 50]),
    ((1, 2, 64, 3), 10, list(range(3, 54))),
]


@pytest.mark.parametrize(("shape", "start", "path"), CASES, ids=lambda value: str(value)[:30])
def test_cases(backend, dtype, shape, start, path):
    check(backend, shape, start, path, dtype)


@given(data=st.data())
def test_against_an_index_copy(backend, data):
    capacity = data.draw(st.integers(1, 70))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), capacity, data.draw(st.integers(1, 20)))
    start = data.draw(st.integers(0, capacity))
    path = sorted(data.draw(st.sets(st.integers(0, capacity - start - 1), max_size=20))) if start < capacity else []
    check(backend, shape, start, path, data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


def test_thread_invariance(cpu_kernels, dtype):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        caches = [randn(5, 3, 77, 64, dtype=dtype) for _ in "kv"]
        cpu_kernels.kv_rewrite(*caches, 20, torch.tensor([0, 3, 4, 9, 41], dtype=torch.int32))
        results.append(caches)
    for one, two in zip(*results):
        assert_same_bits(one, two)


@pytest.mark.parametrize("length", [0, 1, 9, 12])
def test_start_and_length_from_memory(length):
    """A replayed graph finds the committed length and the accepted run's in device memory."""
    before = [randn(2, 3, 61, 40, dtype=torch.float32) for _ in "kv"]
    caches = [Guarded(cache) for cache in before]
    path = int32(0, 1, 3, 5, 6, 10, 11, 12, 20, 21, 23, 30)
    base, count = int32(15), int32(length)
    backends.call(
        _simt,
        "kv_rewrite",
        dtype=ops.DTYPES[torch.float32],
        k_cache=caches[0].tensor,
        v_cache=caches[1].tensor,
        path=path,
        base=base,
        length_at=count,
        cache=(3, 61, 40),
        layers=2,
        start=2,
    )
    for cache, old in zip(caches, before):
        expected = old.clone()
        expected[:, :, 17 : 17 + length] = old.index_select(2, 17 + path[:length].long())
        assert_same_bits(cache.check(), expected)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_cache": None}, TypeError, "^k_cache: expected a tensor"),
        ({"k_cache": torch.zeros(2, 1, 9, 8, dtype=torch.int8)}, TypeError, "^k_cache: "),
        ({"k_cache": torch.zeros(1, 9, 8)}, ValueError, "^k_cache: expected shape"),
        ({"k_cache": torch.zeros(2, 1, 9, 8, device="meta")}, ValueError, "^k_cache: .*on meta"),
        ({"k_cache": torch.zeros(2, 1, 8, 9).transpose(2, 3)}, ValueError, "^k_cache: expected a contiguous"),
        ({"v_cache": torch.zeros(2, 1, 9, 8, dtype=torch.float16)}, TypeError, "^v_cache: "),
        ({"v_cache": torch.zeros(2, 1, 8, 8)}, ValueError, "^v_cache: expected shape"),
        ({"start": -1}, ValueError, "^start: "),
        ({"start": 10}, ValueError, "^start: "),
        ({"path": torch.tensor([0, 1])}, TypeError, "^path: expected torch.int32"),
        ({"path": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, "^path: expected shape"),
        ({"path": int32(0, 5)}, ValueError, "^path: expected values in"),
        ({"path": int32(-1, 0)}, ValueError, "^path: expected values in"),
        ({"path": int32(2, 2)}, ValueError, "^path: expected strictly increasing"),
        ({"path": int32(3, 1)}, ValueError, "^path: expected strictly increasing"),
    ],
)
def test_errors(change, error, message):
    arguments = {"k_cache": torch.zeros(2, 1, 9, 8), "v_cache": torch.zeros(2, 1, 9, 8), "start": 4, "path": int32(0, 2)}
    with pytest.raises(error, match=message):
        ops.kv_rewrite(**arguments | change)
