import math

import backends
import pytest
import torch
from backends import U, assert_close, assert_same_bits, in_turns, poisoned, randn, small_integers, sum_error, walled

from sirius_ext.kernels import ops, reference

# (rows, heads, kv_heads, head_dim, prefix, capacity)
SHAPES = [
    (1, 1, 1, 8, 0, 1),
    (1, 4, 1, 64, 576, 601),
    (2, 3, 3, 16, 31, 40),
    (3, 3, 1, 40, 0, 7),
    (5, 8, 2, 64, 100, 129),
    (7, 4, 4, 80, 63, 77),
    (16, 9, 3, 64, 151, 200),
    (17, 4, 1, 128, 33, 151),
    (40, 6, 2, 8, 64, 129),
    (3, 2, 1, 200, 130, 140),
    (2, 21, 1, 16, 130, 140),
    # On CUDA chunks are longer from 4096, 8192 and 16384 on.
    (2, 2, 1, 8, 4095, 4100),
    (1, 1, 1, 8, 16895, 16900),
]


def chain(m):
    return torch.arange(-1, m - 1, dtype=torch.int32)


def tree(m):
    """A random tree: every node hangs below one of the five before it."""
    return torch.tensor([-1] + [int(torch.randint(max(0, i - 5), i, ())) for i in range(1, m)], dtype=torch.int32)


def visible_of(mask, prefix, capacity):
    visible = torch.zeros(len(mask), capacity, dtype=torch.bool)
    visible[:, :prefix] = True
    for i, row in enumerate(mask.tolist()):
        for word, value in enumerate(row):
            for b in range(64):
                if value >> b & 1:
                    visible[i, prefix + 64 * word + b] = True
    return visible


def attention_error(q, k_cache, v_cache, visible, scale, softcap=0.0):
    """Weights w sum to 1, so an output is off by at most what its weights are off by, times |v|.

    A score's error (a sum of D products) is a relative error of its weight, and again of the sum they are divided by; the
    exponential adds a few units. Bodies may round the exponentials, which lie in [0, 1], to T before they multiply V: half an ulp
    of T each, or half of the least number where T is float16. The sum over the slots adds its own. A cap's slope is at most 1,
    and its tanh adds a few units.
    """
    k = torch.where(visible.any(0)[:, None], k_cache.float(), 0.0)
    v = torch.where(visible.any(0)[:, None], v_cache.float(), 0.0)
    weights_times_v = reference.attend(q, k, v.abs(), visible, scale, softcap)
    group = q.shape[1] // k.shape[0]
    products = torch.einsum("mhd,hsd->mhs", q.float().abs(), k.abs().repeat_interleave(group, 0)).amax(-1, keepdim=True) * scale
    relative = 2 * sum_error(products, q.shape[2]) + 4 * U * products + 32 * U + torch.finfo(q.dtype).eps / 2
    relative = relative + 2 * 24 * U * softcap
    least = 2.0**-25 if q.dtype == torch.float16 else 0.0
    slots = int(visible.sum(1).max())
    all_v = torch.einsum("ms,hsd->mhd", visible.float(), v.abs()).repeat_interleave(group, 1)
    return relative * weights_times_v + sum_error(weights_times_v, slots) + least * all_v


def inputs(shape, dtype, parents):
    m, heads, kv_heads, head_dim, prefix, capacity = shape
    q = randn(m, heads, head_dim, dtype=dtype)
    mask = reference.tree_mask(parents)
    visible = visible_of(mask, prefix, capacity)
    unseen = ~visible.any(0)
    caches = [randn(kv_heads, capacity, head_dim, dtype=dtype) for _ in "kv"]
    for cache in caches:
        cache[:, unseen] = math.nan
    return q, *caches, mask, visible


def named(value):
    """Of a case: a function's name, not its address."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [chain, tree], ids=lambda kind: kind.__name__)
def test_against_reference(backend, dtype, shape, kind):
    m, heads, _, head_dim, prefix, _ = shape
    q, k_cache, v_cache, mask, visible = inputs(shape, dtype, kind(m))
    scale = head_dim**-0.5
    exact = reference.attend(q, k_cache, v_cache, visible, scale)
    error = attention_error(q, k_cache, v_cache, visible, scale)
    out = poisoned(m, heads, head_dim, dtype=dtype)
    result = backend.tree_attention(walled(q), walled(k_cache), walled(v_cache), prefix, walled(mask), scale, out=out.tensor)
    assert result is out.tensor
    assert_close(out.check(), exact, error)


def test_sharp_scores(backend, dtype):
    """Scores of several hundred: the exponentials overflow without a running maximum."""
    q, k_cache, v_cache, mask, visible = inputs((5, 4, 2, 64, 100, 129), dtype, chain(5))
    q, k_cache = q * 32, k_cache * 4
    exact = reference.attend(q, k_cache, v_cache, visible, 0.3)
    out = backend.tree_attention(q, k_cache, v_cache, 100, mask, 0.3)
    assert_close(out, exact, attention_error(q, k_cache, v_cache, visible, 0.3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_scores_give_the_mean(backend, dtype, shape):
    """With q = 0 every weight is the same and every exponential exactly 1: nothing hides a slot that is missing or read twice."""
    m, heads, kv_heads, head_dim, prefix, capacity = shape
    q, k_cache, v_cache, mask, visible = inputs(shape, dtype, tree(m))
    q.zero_()
    values = small_integers(*v_cache.shape, dtype=dtype)
    v_cache = torch.where(v_cache.isnan(), v_cache, values)

    def mean(v):
        sums = torch.einsum("ms,hsd->mhd", visible.double(), v.double()).repeat_interleave(heads // kv_heads, 1)
        return sums / visible.sum(1)[:, None, None]

    out = backend.tree_attention(q, k_cache, v_cache, prefix, mask, 0.125)
    assert_close(out, mean(values), sum_error(mean(values.abs()), prefix + m))


def test_one_visible_slot_is_copied(backend, dtype):
    v_cache = torch.full((2, 9, 40), math.nan, dtype=dtype)
    k_cache = v_cache.clone()
    v_cache[:, 4], k_cache[:, 4] = randn(2, 40, dtype=dtype), randn(2, 40, dtype=dtype)
    out = backend.tree_attention(randn(1, 4, 40, dtype=dtype), k_cache, v_cache, 0, torch.tensor([[16]]), 0.1)
    assert_same_bits(out, v_cache[:, 4].repeat_interleave(2, 0).unsqueeze(0))


@pytest.mark.parametrize("bit", [0, 62, 63, 64, 126, 127, 128])
def test_every_word_of_the_mask(backend, bit):
    """Also bit 63, the sign of its word."""
    v_cache = torch.full((1, 140, 16), math.nan)
    v_cache[:, 3 + bit] = 5.0
    v_cache[:, :3] = 1.0
    mask = torch.zeros(1, 3, dtype=torch.int64)
    mask[0, bit // 64] = torch.tensor(1) << bit % 64
    out = backend.tree_attention(torch.zeros(1, 1, 16), v_cache, v_cache, 3, mask, 1.0)
    assert_same_bits(out, torch.full((1, 1, 16), 2.0))


def test_prefix_only(backend, dtype):
    """A row may see no slot of the window, and the window may lie at the very end of the cache."""
    q, k_cache, v_cache = randn(2, 2, 16, dtype=dtype), randn(1, 33, 16, dtype=dtype), randn(1, 33, 16, dtype=dtype)
    visible = torch.ones(2, 33, dtype=torch.bool)
    out = backend.tree_attention(q, k_cache, v_cache, 33, torch.zeros(2, 1, dtype=torch.int64), 0.25)
    exact = reference.attend(q, k_cache, v_cache, visible, 0.25)
    assert_close(out, exact, attention_error(q, k_cache, v_cache, visible, 0.25))


def test_rows_of_q_may_stand_apart(backend, dtype):
    q, k_cache, v_cache, mask, _ = inputs((5, 4, 2, 40, 33, 50), dtype, tree(5))
    qkv = torch.full((5, 8 * 40), math.nan, dtype=dtype)
    qkv[:, : 4 * 40] = q.flatten(1)
    view = qkv.view(5, 8, 40)[:, :4]
    assert not view.is_contiguous()
    out = backend.tree_attention(view, k_cache, v_cache, 33, mask, 0.2)
    assert_same_bits(out, backend.tree_attention(q, k_cache, v_cache, 33, mask, 0.2))


# (heads, kv_heads, head_dim, position of the row)
INVARIANT = [(4, 1, 64, 300), (3, 3, 40, 129), (4, 2, 128, 63), (9, 3, 64, 16), (2, 1, 200, 70), (2, 1, 8, 4097)]


@pytest.mark.parametrize("shape", INVARIANT, ids=str)
def test_a_row_alone_and_in_a_chain(kernels, dtype, shape):
    """A token's bits do not depend on where the window starts, nor on the rows beside it."""
    heads, kv_heads, head_dim, position = shape
    capacity = position + 41
    q, k_cache, v_cache = (
        randn(n, s, head_dim, dtype=dtype) for n, s in ((1, heads), (kv_heads, capacity), (kv_heads, capacity))
    )
    alone = kernels.tree_attention(q, k_cache, v_cache, position, reference.tree_mask(chain(1)), 0.2)
    for m, j in ((2, 0), (2, 1), (3, 2), (7, 3), (16, 0), (16, 15), (17, 16), (40, 13)):
        rows = randn(m, heads, head_dim, dtype=dtype)
        rows[j] = q[0]
        out = kernels.tree_attention(rows, k_cache, v_cache, position - j, reference.tree_mask(chain(m)), 0.2)
        assert_same_bits(out[j : j + 1], alone)


@pytest.mark.parametrize("shape", INVARIANT, ids=str)
def test_a_row_alone_and_in_a_tree(kernels, dtype, shape):
    """A node's bits do not depend on the other branches, whose entries lie between those of its own."""
    heads, kv_heads, head_dim, position = shape
    capacity = position + 41
    q, k_cache, v_cache = (
        randn(n, s, head_dim, dtype=dtype) for n, s in ((1, heads), (kv_heads, capacity), (kv_heads, capacity))
    )
    alone = kernels.tree_attention(q, k_cache, v_cache, position, reference.tree_mask(chain(1)), 0.2)
    # Three branches of depth 4 below one root: nodes 1 + 3 * depth + branch.
    parents = torch.tensor([-1, 0, 0, 0, *range(1, 10)], dtype=torch.int32)
    path = [0, 2, 5, 8, 11]
    prefix = position - 4
    scattered = [randn(kv_heads, capacity, head_dim, dtype=dtype) for _ in "kv"]
    for cache, contiguous in zip(scattered, (k_cache, v_cache)):
        cache[:, :prefix] = contiguous[:, :prefix]
        for depth, node in enumerate(path):
            cache[:, prefix + node] = contiguous[:, prefix + depth]
    rows = randn(len(parents), heads, head_dim, dtype=dtype)
    rows[path[-1]] = q[0]
    out = kernels.tree_attention(rows, *scattered, prefix, reference.tree_mask(parents), 0.2)
    assert_same_bits(out[path[-1] :][:1], alone)


@pytest.mark.parametrize(("shape", "softcap"), in_turns(2, SHAPES, [0.5, 20.0]), ids=str)
def test_softcap(backend, dtype, shape, softcap):
    m, heads, _, head_dim, prefix, _ = shape
    q, k_cache, v_cache, mask, visible = inputs(shape, dtype, tree(m))
    exact = reference.attend(q, k_cache, v_cache, visible, 0.3, softcap)
    out = poisoned(m, heads, head_dim, dtype=dtype)
    backend.tree_attention(q, k_cache, v_cache, prefix, mask, 0.3, softcap=softcap, out=out.tensor)
    assert_close(out.check(), exact, attention_error(q, k_cache, v_cache, visible, 0.3, softcap))


# ----------------------------------------------------------------------------------------------------------- sliding windows

# As SHAPES, and the window
WINDOWS = [
    ((1, 1, 1, 8, 0, 1), 1),
    ((1, 4, 1, 64, 576, 601), 1),
    ((1, 4, 1, 64, 576, 601), 200),
    ((2, 3, 3, 16, 31, 40), 7),
    ((5, 8, 2, 64, 300, 310), 64),
    ((7, 4, 4, 80, 400, 410), 128),
    ((16, 9, 3, 64, 255, 280), 129),
    ((17, 4, 1, 128, 383, 400), 256),
    ((40, 6, 2, 8, 515, 560), 100),
    ((3, 2, 1, 200, 258, 263), 131),
    ((70, 2, 1, 16, 700, 775), 90),
    ((3, 2, 1, 8, 8450, 8460), 4200),
]


def positions_of(mask, prefix):
    """The slots of a row's bits hold the tokens up to its own."""
    seen = [sum((value & (1 << 64) - 1).bit_count() for value in row) for row in mask.tolist()]
    return torch.tensor(seen, dtype=torch.int32) + prefix - 1


def windowed_inputs(shape, dtype, parents, window):
    """As `inputs`, and the rows' positions. What no row's window reaches is NaN too."""
    q, *caches, mask, visible = inputs(shape, dtype, parents)
    positions = positions_of(mask, shape[4])
    visible &= torch.arange(shape[5]) > positions[:, None] - window
    for cache in caches:
        cache[:, ~visible.any(0)] = math.nan
    return q, *caches, mask, visible, positions


@pytest.mark.parametrize(("windowed", "kind", "softcap"), in_turns(3, WINDOWS, [chain, tree], [0.0, 5.0]), ids=named)
def test_window(backend, dtype, windowed, kind, softcap):
    shape, window = windowed
    m, heads, _, head_dim, prefix, _ = shape
    q, k_cache, v_cache, mask, visible, positions = windowed_inputs(shape, dtype, kind(m), window)
    exact = reference.attend(q, k_cache, v_cache, visible, 0.3, softcap)
    settings = {"positions": walled(positions), "window": window, "softcap": softcap}
    out = poisoned(m, heads, head_dim, dtype=dtype)
    result = backend.tree_attention(
        walled(q), walled(k_cache), walled(v_cache), prefix, walled(mask), 0.3, **settings, out=out.tensor
    )
    assert result is out.tensor
    assert_close(out.check(), exact, attention_error(q, k_cache, v_cache, visible, 0.3, softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 3, 63, 64, 127, 128, 129, 256, 300])
def test_every_edge_of_a_window(backend, prefix, dtype):
    """With q = 0 every weight is the same. Slot i has a 1 in column i, of the one head or the other, so that the result is the
    list of the slots seen."""
    values = torch.eye(310, dtype=dtype).view(310, 2, 155).transpose(0, 1).contiguous()
    mask, q = reference.tree_mask(chain(3)), torch.zeros(3, 2, 155, dtype=dtype)
    positions = prefix + torch.arange(3, dtype=torch.int32)
    for window in (3, 4, 63, 64, 65, 127, 128, 129, 200, 299, 1000):
        settings = {"positions": positions, "window": window}
        out = backend.tree_attention(q, torch.ones_like(values), values, prefix, mask, 1.0, **settings)
        for row, position in zip(out.flatten(1), positions.tolist()):
            seen = list(range(max(0, position - window + 1), position + 1))
            assert row.nonzero().flatten().tolist() == seen
            share = torch.full((len(seen),), 1 / len(seen))
            assert_close(row[seen].float(), share, 2 * U if dtype == torch.float32 else 2**-8 / len(seen))


@pytest.mark.parametrize("window", [1000, 350])
def test_a_window_that_holds_everything(kernels, dtype, window):
    q, k_cache, v_cache, mask, _ = inputs((16, 9, 3, 64, 300, 340), dtype, tree(16))
    settings = {"positions": positions_of(mask, 300), "window": window}
    whole = kernels.tree_attention(q, k_cache, v_cache, 300, mask, 0.2)
    assert_same_bits(kernels.tree_attention(q, k_cache, v_cache, 300, mask, 0.2, **settings), whole)


# (heads, kv_heads, head_dim, position of the row, window)
INVARIANT_WINDOWS = [
    (4, 1, 64, 300, 40),
    (3, 3, 40, 129, 41),
    (4, 2, 128, 400, 128),
    (9, 3, 64, 400, 129),
    (9, 3, 64, 639, 300),
    (4, 2, 16, 640, 257),
    (2, 1, 8, 4097, 300),
]


@pytest.mark.parametrize("shape", INVARIANT_WINDOWS, ids=str)
def test_a_windowed_row_alone_in_a_chain_and_in_a_tree(kernels, dtype, shape):
    """A token's bits depend on its own position and on what it sees: not on where the drafts start, nor on the rows beside it,
    whose windows begin elsewhere."""
    heads, kv_heads, head_dim, position, window = shape
    capacity = position + 41
    q, k_cache, v_cache = (
        randn(n, s, head_dim, dtype=dtype) for n, s in ((1, heads), (kv_heads, capacity), (kv_heads, capacity))
    )

    def attended(q, caches, prefix, parents):
        mask = reference.tree_mask(parents)
        settings = {"positions": positions_of(mask, prefix), "window": window}
        return kernels.tree_attention(q, *caches, prefix, mask, 0.2, **settings)

    # Alone, it reads nothing that lies before its window.
    caches = [cache.clone() for cache in (k_cache, v_cache)]
    for cache in caches:
        cache[:, : position - window + 1] = math.nan
    alone = attended(q, caches, position, chain(1))
    assert alone.isfinite().all()
    for m, j in ((2, 0), (2, 1), (3, 2), (7, 3), (16, 0), (16, 15), (17, 16), (40, 13)):
        rows = randn(m, heads, head_dim, dtype=dtype)
        rows[j] = q[0]
        assert_same_bits(attended(rows, (k_cache, v_cache), position - j, chain(m))[j : j + 1], alone)

    # Three branches of depth 4 below one root: nodes 1 + 3 * depth + branch.
    parents = torch.tensor([-1, 0, 0, 0, *range(1, 10)], dtype=torch.int32)
    path = [0, 2, 5, 8, 11]
    prefix = position - 4
    scattered = [randn(kv_heads, capacity, head_dim, dtype=dtype) for _ in "kv"]
    for cache, contiguous in zip(scattered, (k_cache, v_cache)):
        cache[:, :prefix] = contiguous[:, :prefix]
        for depth, node in enumerate(path):
            cache[:, prefix + node] = contiguous[:, prefix + depth]
    rows = randn(len(parents), heads, head_dim, dtype=dtype)
    rows[path[-1]] = q[0]
    assert_same_bits(attended(rows, scattered, prefix, parents)[path[-1] :][:1], alone)


@pytest.mark.parametrize("m", [1, 16])
def test_thread_invariance_with_a_window(cpu_kernels, dtype, m):
    q, k_cache, v_cache, mask, _, positions = windowed_inputs((m, 9, 3, 64, 576, 601), dtype, tree(m), 300)
    settings = {"positions": positions, "window": 300, "softcap": 20.0}
    torch.set_num_threads(1)
    one = cpu_kernels.tree_attention(q, k_cache, v_cache, 576, mask, 0.125, **settings)
    torch.set_num_threads(2)
    assert_same_bits(cpu_kernels.tree_attention(q, k_cache, v_cache, 576, mask, 0.125, **settings), one)


@pytest.mark.parametrize("m", [1, 16])
def test_thread_invariance(cpu_kernels, dtype, m):
    q, k_cache, v_cache, mask, _ = inputs((m, 9, 3, 64, 576, 601), dtype, tree(m))
    torch.set_num_threads(1)
    one = cpu_kernels.tree_attention(q, k_cache, v_cache, 576, mask, 0.125)
    torch.set_num_threads(2)
    assert_same_bits(cpu_kernels.tree_attention(q, k_cache, v_cache, 576, mask, 0.125), one)


@pytest.mark.parametrize(("prefix", "m"), [(0, 1), (127, 3), (128, 16), (3000, 1)])
def test_prefix_from_memory(cuda_functions, dtype, prefix, m):
    """A replayed graph finds the prefix in device memory: its grid is the same for every prefix that the cache has room for, and
    its last chunk may be any."""
    shape = m, 6, 2, 40, prefix, 3072
    q, k_cache, v_cache, mask, _ = inputs(shape, dtype, tree(m))
    out, base = poisoned(*q.shape, dtype=dtype), torch.tensor([prefix], dtype=torch.int32)
    backends.call(
        cuda_functions,
        "tree_attention",
        workspace=cuda_functions.tree_attention_workspace(m, 6, 40, 3072),
        dtype=ops.DTYPES[dtype],
        q=q,
        q_stride=q.stride(0),
        k_cache=k_cache,
        v_cache=v_cache,
        cache=(2, 3072, 40),
        base=base,
        mask=mask,
        mask_words=1,
        out=out.tensor,
        scale=0.2,
        num_rows=m,
        heads=6,
    )
    assert_same_bits(out.check(), ops.tree_attention(q, k_cache, v_cache, prefix, mask, 0.2))


def test_more_rows_than_counters():
    """Then the rows are taken in several launches."""
    m, kv_heads = 2, 2049
    q = randn(m, 9 * kv_heads, 8, dtype=torch.float32)
    caches = [randn(kv_heads, m, 8, dtype=torch.float32) for _ in "kv"]
    mask = reference.tree_mask(chain(m))
    visible = visible_of(mask, 0, m)
    with backends.using("simt-forward") as simt:
        out = simt.tree_attention(q, *caches, 0, mask, 0.3)
    exact = reference.attend(q, *caches, visible, 0.3)
    assert_close(out, exact, attention_error(q, *caches, visible, 0.3))


def test_head_too_large():
    cache = torch.zeros(1, 2, 258)
    with backends.using("simt-forward") as simt, pytest.raises(ValueError, match="head_dim of at most 256, got 258"):
        simt.tree_attention(torch.zeros(1, 1, 258), cache, cache, 2, torch.tensor([[0]]), 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 0}, TypeError, "^q: expected a tensor"),
        ({"q": torch.zeros(2, 4, 8, dtype=torch.int32)}, TypeError, "^q: "),
        ({"q": torch.zeros(2, 32)}, ValueError, "^q: expected "),
        ({"q": torch.zeros(2, 8, 4).transpose(1, 2)}, ValueError, "^q: .*contiguous rows"),
        ({"q": torch.zeros(2, 3, 8)}, ValueError, "^q: expected a multiple of 2"),
        ({"q": torch.zeros(0, 4, 8)}, ValueError, "^q: "),
        ({"q": torch.zeros(2, 4, 8, device="meta")}, ValueError, "^q: .*on meta"),
        ({"k_cache": torch.zeros(2, 5, 8, dtype=torch.float16)}, TypeError, "^k_cache: "),
        ({"k_cache": torch.zeros(2, 5, 9)}, ValueError, "^k_cache: expected shape"),
        ({"k_cache": torch.zeros(2, 5, 8, device="meta")}, ValueError, "^k_cache: .*on meta"),
        ({"v_cache": torch.zeros(2, 4, 8)}, ValueError, "^v_cache: expected shape"),
        ({"v_cache": torch.zeros(2, 8, 5).transpose(1, 2)}, ValueError, "^v_cache: expected a contiguous"),
        ({"mask": torch.zeros(2, 1, dtype=torch.int32)}, TypeError, "^mask: "),
        ({"mask": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "^mask: expected shape"),
        ({"mask": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "^mask: "),
        ({"mask": torch.tensor([[1], [4]])}, ValueError, "^mask: .*beyond"),
        ({"mask": torch.tensor([[1, 0], [1, 1]])}, ValueError, "^mask: .*beyond"),
        ({"prefix": 0, "mask": torch.tensor([[1], [0]])}, ValueError, "^mask: every row"),
        ({"prefix": -1}, ValueError, "^prefix: "),
        ({"prefix": 6}, ValueError, "^prefix: "),
        ({"prefix": 5}, ValueError, "^mask: .*beyond"),
        ({"softcap": -1.0}, ValueError, "^softcap: "),
        ({"window": -1}, ValueError, "^window: "),
        ({"window": 4}, ValueError, "^positions: expected a tensor, since there is a window"),
        ({"window": 4, "positions": torch.tensor([3, 4])}, TypeError, "^positions: expected torch.int32"),
        ({"window": 4, "positions": torch.zeros(3, dtype=torch.int32)}, ValueError, "^positions: expected shape"),
        ({"window": 4, "positions": torch.tensor([3, 3], dtype=torch.int32)}, ValueError, "^positions: expected prefix - 1"),
        ({"window": 1, "positions": torch.tensor([3, 4], dtype=torch.int32)}, ValueError, "^positions: expected prefix - 1"),
        ({"out": torch.zeros(2, 4, 9)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 4, 8, dtype=torch.float16)}, TypeError, "^out: "),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "q": torch.zeros(2, 4, 8), "k_cache": torch.zeros(2, 5, 8), "v_cache": torch.zeros(2, 5, 8), "prefix": 3,
        "mask": torch.tensor([[1], [3]]), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.tree_attention(**arguments | change)
