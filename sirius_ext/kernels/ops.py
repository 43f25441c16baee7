"""The kernels, one typed function each: check every argument, then call the compiled extension.

Shapes use m rows of input, H hidden, I intermediate, K kept neurons, V vocabulary, L layers, C cache capacity, D head_dim.
T is float32, float16 or bfloat16, the same for every argument marked T; sums are float32. All tensors are contiguous unless
a docstring says otherwise. Each function has a twin of the same name and signature in `reference.py`, in plain torch.

Every kernel on rows is *batch-invariant*: the bits of a row do not depend on how many rows are computed beside it, nor on the
number of threads. A wrong argument raises `TypeError` (dtype) or `ValueError` (shape, device, value) that names it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch

from .. import _C
from .dispatch import check_device, run

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def isa() -> str:
    """The kernel bodies in use: "amx", "avx512", "avx2" or "scalar"."""
    return _C.isa()


def available_isas() -> list[str]:
    """The kernel bodies that this CPU can run, best first."""
    return _C.available_isas()


def set_isa(name: str) -> None:
    """Use the bodies called `name` from now on, in every engine of the process. ValueError if this CPU lacks them."""
    _C.set_isa(name)


Function = TypeVar("Function", bound=Callable)


def _on_one_device(op: Function) -> Function:
    """All tensors of a call stand on the device of the first, and this build has kernels for it."""
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def checked(*arguments, **named):
        first = None
        for name, value in (*zip(names, arguments), *named.items()):
            if not isinstance(value, torch.Tensor):
                continue
            if first is None:
                check_device(name, value.device)
                first = value.device
            elif value.device != first:
                raise ValueError(
                    f"{name}: expected a tensor on {first}, as the arguments before it are, got one on {value.device}"
                )
        return op(*arguments, **named)

    return checked


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> int:
    """Check `tensor` and return its address. `None` in `shape` matches any size."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, tensor.shape)):
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{want}], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _check_rows(name: str, tensor: torch.Tensor, *shape: int | None) -> int:
    """Like `_check` for the argument that decides T."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    return _check(name, tensor, getattr(tensor, "dtype", None), *shape)


def _optional(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, *shape: int | None) -> int:
    return 0 if tensor is None else _check(name, tensor, dtype, *shape)


def _output(out: torch.Tensor | None, device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, int]:
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    return out, _check("out", out, dtype, *shape)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_indices(name: str, indices: torch.Tensor, limit: int) -> None:
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < limit):
        raise ValueError(f"{name}: expected values in [0, {limit}), got {int(indices.min())} to {int(indices.max())}")


def _check_neurons(neurons: torch.Tensor | None, intermediate: int) -> tuple[int, int]:
    """Address and length of a neuron list; all of them without one."""
    if neurons is None:
        return 0, intermediate
    address = _check("neurons", neurons, torch.int32, None)
    _positive("neurons", neurons.numel())
    _check_indices("neurons", neurons, intermediate)
    return address, neurons.numel()


def _check_product(x: torch.Tensor, weight: torch.Tensor, name: str = "weight") -> tuple[int, int, int, int, int]:
    """Check x, T [m, width], and weight, T [rows, width], called `name`: neither may be empty.

    Returns both addresses, m, width and rows.
    """
    px = _check_rows("x", x, None, None)
    m, width = x.shape
    pw = _check(name, weight, x.dtype, None, width)
    rows = weight.shape[0]
    for size, of in ((m, "x"), (width, "x"), (rows, name)):
        _positive(f"{of}: size", size)
    return px, pw, m, width, rows


@_on_one_device
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias + residual`, rounded once.

    x: T [m, in].
    weight: T [out, in].
    bias: T [out].
    residual: T [m, out], which may be `out`.
    Returns T [m, out], or float32 with `out_dtype=torch.float32`.
    """
    px, pw, m, width, rows = _check_product(x, weight)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in (x.dtype, torch.float32):
        raise TypeError(f"out_dtype: expected {x.dtype} or torch.float32, got {out_dtype}")
    pb = _optional("bias", bias, x.dtype, rows)
    pr = _optional("residual", residual, x.dtype, m, rows)
    out, po = _output(out, x.device, out_dtype, m, rows)
    run(x.device, "linear", DTYPES[x.dtype], px, pw, pb, pr, po, out_dtype == torch.float32, m, width, rows)
    return out


@_on_one_device
def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    neurons: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(gate x) * (up x)` for the listed neurons, or for all of them (SPEC section 1).

    x: T [m, H].
    gate, up: T [I, H].
    neurons: int32 [K], values in [0, I).
    Returns T [m, K].
    """
    px, pg, m, hidden, intermediate = _check_product(x, gate, "gate")
    pu = _check("up", up, x.dtype, intermediate, hidden)
    pn, kept = _check_neurons(neurons, intermediate)
    out, po = _output(out, x.device, x.dtype, m, kept)
    run(x.device, "gate_up", DTYPES[x.dtype], px, pg, pu, pn, po, m, hidden, kept)
    return out


@_on_one_device
def gate(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate x)` of every neuron, not rounded: what FSparse chooses its neurons by (SPEC section 2).

    x: T [m, H].
    weight: T [I, H].
    Returns float32 [m, I].
    """
    px, pw, m, hidden, intermediate = _check_product(x, weight)
    out, po = _output(out, x.device, torch.float32, m, intermediate)
    run(x.device, "gate", DTYPES[x.dtype], px, pw, po, m, hidden, intermediate)
    return out


@_on_one_device
def select(gates: torch.Tensor, kept: int | None = None, threshold: float | None = None) -> torch.Tensor:
    """FSparse's neurons (SPEC section 2), by `score = sum of |gates| over the rows`: the `kept` largest, of equals the lower
    index; or with a threshold all whose score is at least m times it.

    gates: float32 [m, I].
    kept, threshold: one of them; kept is 1 to I.
    Returns int32 [K], rising.
    """
    pg = _check("gates", gates, torch.float32, None, None)
    m, intermediate = gates.shape
    _positive("gates: rows", m)
    _positive("gates: neurons", intermediate)
    if (kept is None) == (threshold is None):
        raise ValueError(f"kept, threshold: expected one of them, got {kept} and {threshold}")
    if kept is not None and not 1 <= kept <= intermediate:
        raise ValueError(f"kept: expected 1 to {intermediate}, got {kept}")
    neurons = torch.empty(intermediate, dtype=torch.int32, device=gates.device)
    count = torch.empty(1, dtype=torch.int32, device=gates.device)
    limit = None if threshold is None else torch.tensor([threshold], dtype=torch.float32, device=gates.device)
    run(
        gates.device, "select", pg, 0 if limit is None else limit.data_ptr(), neurons.data_ptr(), count.data_ptr(), m,
        intermediate, kept or 0, workspace=(m, intermediate),
    )  # fmt: skip
    return neurons[: int(count)]


@_on_one_device
def follow(
    z: torch.Tensor,
    rows: torch.Tensor,
    down_squares: torch.Tensor,
    statistic: torch.Tensor,
    kept: int,
    decay: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sets of a sparse model that follows the text, after a verification (SPEC section 2). `statistic`, float32 [L, I],
    becomes `decay * statistic + (1 - decay) * (z / ||z||_2)^2` for each row that joined the sequence; kept are the neurons of the
    largest `statistic * down_squares`.

    z: T [L, m, I], `silu(gate x) * (up x)` of a pass through F.
    rows: int32 [a], in [0, m), in the order of the text; may be empty.
    down_squares: float32 [L, I], `||down_i||_2^2`.
    Returns int32 [L, kept], ascending; of equal scores the lower index wins.
    """
    pz = _check_rows("z", z, None, None, None)
    layers, m, intermediate = z.shape
    pr = _check("rows", rows, torch.int32, None)
    pd = _check("down_squares", down_squares, torch.float32, layers, intermediate)
    ps = _check("statistic", statistic, torch.float32, layers, intermediate)
    for name, size in (("layers", layers), ("rows", m), ("neurons", intermediate)):
        _positive(f"z: {name}", size)
    if not 1 <= kept <= intermediate:
        raise ValueError(f"kept: expected 1 to {intermediate}, got {kept}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected 0 to 1, got {decay}")
    _check_indices("rows", rows, m)
    out, po = _output(out, z.device, torch.int32, layers, kept)
    run(
        z.device, "follow", DTYPES[z.dtype], pz, pr, pd, ps, po, decay, layers, m, intermediate, kept, len(rows),
        workspace=(layers, m, intermediate),
    )  # fmt: skip
    return out


@_on_one_device
def up(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, neurons: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`gates * (up x)` for the listed neurons, rounded once: `gate_up` for gates that are known.

    x: T [m, H].
    weight: T [I, H].
    gates: float32 [m, I].
    neurons: int32 [K], values in [0, I).
    Returns T [m, K].
    """
    px, pw, m, hidden, intermediate = _check_product(x, weight)
    pg = _check("gates", gates, torch.float32, m, intermediate)
    pn = _check("neurons", neurons, torch.int32, None)
    _check_indices("neurons", neurons, intermediate)
    kept = neurons.numel()
    out, po = _output(out, x.device, x.dtype, m, kept)
    run(x.device, "up", DTYPES[x.dtype], px, pw, pg, pn, po, m, hidden, intermediate, kept)
    return out


@_on_one_device
def down(
    x: torch.Tensor,
    weight: torch.Tensor,
    neurons: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sum_i x[:, i] * weight[neurons[i]] + residual`, rounded once.

    x: T [m, K].
    weight: T [I, H], `down_proj` transposed.
    neurons: int32 [K], values in [0, I); without it K is I.
    residual: T [m, H], which may be `out`.
    Returns T [m, H].
    """
    px = _check_rows("x", x, None, None)
    pw = _check("weight", weight, x.dtype, None, None)
    hidden = weight.shape[1]
    for size, name in ((x.shape[0], "x"), (weight.shape[0], "weight"), (hidden, "weight")):
        _positive(f"{name}: size", size)
    pn, kept = _check_neurons(neurons, weight.shape[0])
    _check("x", x, x.dtype, None, kept)
    m = x.shape[0]
    pr = _optional("residual", residual, x.dtype, m, hidden)
    out, po = _output(out, x.device, x.dtype, m, hidden)
    run(x.device, "down", DTYPES[x.dtype], px, pw, pn, pr, po, m, hidden, kept, workspace=(m, hidden, kept))
    return out


@_on_one_device
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`. With a residual, `residual += x` in place and the sum is normalised.

    x, residual: T [m, H].
    weight: T [H].
    Returns T [m, H].
    """
    px = _check_rows("x", x, None, None)
    m, hidden = x.shape
    _positive("x: size", m)
    _positive("x: size", hidden)
    pw = _check("weight", weight, x.dtype, hidden)
    pr = _optional("residual", residual, x.dtype, m, hidden)
    out, po = _output(out, x.device, x.dtype, m, hidden)
    run(x.device, "rms_norm", DTYPES[x.dtype], px, pw, pr, po, float(eps), m, hidden)
    return out


def _check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> tuple[int, int]:
    pk = _check("k_cache", k_cache, dtype, *shape)
    return pk, _check("v_cache", v_cache, dtype, *k_cache.shape)


@_on_one_device
def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Rotate q and k by their positions (half-split pairs, as Llama does); q stays in `qkv`, k and v go to their cache slots.

    qkv: T [m, (heads + 2 * kv_heads) * D], its q part is overwritten.
    cos, sin: float32 [P, D / 2].
    positions: int32 [m] < P.
    slots: int32 [m] < C, distinct.
    k_cache, v_cache: T [kv_heads, C, D].
    """
    pq = _check_rows("qkv", qkv, None, None)
    m = _positive("qkv: rows", qkv.shape[0])
    pk, pv = _check_cache(k_cache, v_cache, qkv.dtype, None, None, None)
    kv_heads, capacity, head_dim = k_cache.shape
    heads, rest = divmod(qkv.shape[1] - 2 * kv_heads * head_dim, head_dim)
    if rest or heads < 1 or heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"qkv: expected [m, (heads + 2 * {kv_heads}) * {head_dim}] with heads a multiple of {kv_heads} and an even head "
            f"size, got {list(qkv.shape)}"
        )
    pc = _check("cos", cos, torch.float32, None, head_dim // 2)
    ps = _check("sin", sin, torch.float32, cos.shape[0], head_dim // 2)
    pp = _check("positions", positions, torch.int32, m)
    pl = _check("slots", slots, torch.int32, m)
    _check_indices("positions", positions, cos.shape[0])
    _check_indices("slots", slots, capacity)
    if slots.unique().numel() != m:
        raise ValueError(f"slots: expected distinct values, got {slots.tolist()}")
    run(
        qkv.device, "rope_kv_write", DTYPES[qkv.dtype], pq, pc, ps, pp, pl, pk, pv, m, heads, kv_heads, capacity, head_dim
    )  # fmt: skip


@_on_one_device
def tree_mask(parents: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tree attention mask as bits: bit b of row i is set when node b is i or an ancestor of i (SPEC section 4).

    parents: int32 [m]; parents[i] is -1 (no parent in the window), or at least 0 and smaller than i. A chain is [-1, 0, 1, ...].
    Returns int64 [m, ceil(m / 64)], bit b in word b // 64.
    """
    pp = _check("parents", parents, torch.int32, None)
    m = _positive("parents: size", parents.numel())
    if bool((parents >= torch.arange(m, dtype=torch.int32, device=parents.device)).any()) or int(parents.min()) < -1:
        raise ValueError(f"parents: expected -1 <= parents[i] < i, got {parents.tolist()}")
    words = (m + 63) // 64
    out, po = _output(out, parents.device, torch.int64, m, words)
    run(parents.device, "tree_mask", pp, po, m, words)
    return out


@_on_one_device
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix: int,
    mask: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of m rows over the shared cache: row i sees slots [0, prefix) and slot prefix + b for each bit b of mask[i]. A
    slot that no row sees is never read.

    q: T [m, heads, D]; rows may stand apart, so that q can be a view of the fused qkv.
    k_cache, v_cache: T [kv_heads, C, D].
    prefix: 0 to C.
    mask: int64 [m, words], no bit beyond slot C; every row sees at least one slot.
    Returns T [m, heads, D].
    """
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q: expected a tensor, got {type(q).__name__}")
    if q.dim() != 3 or q.stride(2) != 1 or q.stride(1) != q.shape[2] or q.stride(0) < q.shape[1] * q.shape[2]:
        raise ValueError(f"q: expected [m, heads, D] with contiguous rows, got {list(q.shape)}, strides {q.stride()}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, float16 or bfloat16, got {q.dtype}")
    m, heads, head_dim = q.shape
    _positive("q: rows", m)
    pk, pv = _check_cache(k_cache, v_cache, q.dtype, None, None, head_dim)
    kv_heads, capacity, _ = k_cache.shape
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, got {heads}")
    pm = _check("mask", mask, torch.int64, m, None)
    words = _positive("mask: words", mask.shape[1])
    if not 0 <= prefix <= capacity:
        raise ValueError(f"prefix: expected 0 to the cache's capacity {capacity}, got {prefix}")
    bits = (mask.unsqueeze(-1) >> torch.arange(64, device=mask.device)) & 1
    if prefix == 0 and not bool(bits.any(-1).any(-1).all()):
        raise ValueError("mask: every row must see at least one slot")
    beyond = bits.flatten(1)[:, max(0, min(capacity - prefix, words * 64)) :]
    if bool(beyond.any()):
        raise ValueError(f"mask: a bit points beyond the cache's capacity {capacity} (prefix {prefix})")
    out, po = _output(out, q.device, q.dtype, m, heads, head_dim)
    run(
        q.device, "tree_attention", DTYPES[q.dtype], q.data_ptr(), q.stride(0), pk, pv, pm, po, float(scale), prefix, words, m,
        heads, kv_heads, capacity, head_dim, workspace=(m, heads, head_dim, capacity),
    )  # fmt: skip
    return out


@_on_one_device
def tree_expand(
    logits: torch.Tensor, scores: torch.Tensor, width: int, score_temperature: float, prune: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more depth of a draft tree (SPEC section 4): every leaf proposes its `width` likeliest tokens, and of all proposals the
    `width` with the largest cumulative log-likelihood stay. A likelihood is `softmax(logits / tau)`.

    logits: float32 [leaves, V] of S.
    scores: float32 [leaves], the leaves' cumulative log-likelihoods.
    width: 1 to 16.
    score_temperature: tau, more than 0.
    prune: a leaf whose likeliest token has a larger likelihood proposes that one only.
    Returns c <= width proposals, likeliest first: their tokens int32 [c], the rows of the leaves that made them int32 [c] and
    their scores float32 [c].

    A token of likelihood zero is not proposed. Of equal scores the lower row, then the larger logit, then the lower token is
    likelier. A leaf with a logit that is NaN or plus infinity proposes nothing; minus infinity is a token that is impossible.
    """
    pl = _check("logits", logits, torch.float32, None, None)
    leaves, vocab = logits.shape
    _positive("logits: rows", leaves)
    _positive("logits: vocabulary", vocab)
    ps = _check("scores", scores, torch.float32, leaves)
    if not 1 <= width <= 16:
        raise ValueError(f"width: expected 1 to 16, got {width}")
    _check_temperature(score_temperature)
    empty = functools.partial(torch.empty, device=logits.device)
    tokens, parents, new_scores = empty(width, dtype=torch.int32), empty(width, dtype=torch.int32), empty(width)
    count = empty(1, dtype=torch.int32)
    run(
        logits.device, "tree_expand", pl, ps, float(score_temperature), float(prune), tokens.data_ptr(), parents.data_ptr(),
        new_scores.data_ptr(), count.data_ptr(), leaves, vocab, width, workspace=(leaves, vocab, width),
    )  # fmt: skip
    found = slice(int(count))
    return tokens[found], parents[found], new_scores[found]


@_on_one_device
def accept(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    threshold: float,
    score_temperature: float,
    match: bool = False,
    parents: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Acceptance of a chain or a tree, in one pass over the logits (SPEC sections 3, 4 and 5). A node is accepted when its
    likelihood `softmax(logits / tau)` reaches the threshold, or with `match` when it is the argmax, and the nodes before it are
    accepted too.

    logits: float32 [n, V] of F.
    drafts: int32 [n - 1], the tokens of nodes 1 to n - 1.
    threshold: least likelihood.
    score_temperature: tau, more than 0.
    match: accept by the argmax instead.
    parents: int32 [n]; node i was proposed after row parents[i], 0 <= parents[i] < i. Without it after row i - 1, a chain.
    scores: float32 [n], the nodes' cumulative log-likelihoods.
    Returns the likelihoods float32 [n - 1], the argmax of every row int32 [n] (the first of equals) and the nodes of the longest
    accepted run, int32 [a]. Of equally long ones it is the one whose last node has the larger score, then the first.

    F's own token is the argmax of the run's last row. A row with a logit that is NaN or plus infinity has the argmax -1, and so
    has one all of whose logits are minus infinity; what was proposed after it has a likelihood of NaN and is not accepted.
    """
    pl = _check("logits", logits, torch.float32, None, None)
    n, vocab = logits.shape
    _positive("logits: rows", n)
    _positive("logits: vocabulary", vocab)
    pd = _check("drafts", drafts, torch.int32, n - 1)
    _check_indices("drafts", drafts, vocab)
    _check_temperature(score_temperature)
    pp = _optional("parents", parents, torch.int32, n)
    if parents is not None and bool(((parents < 0) | (parents >= torch.arange(n, device=parents.device)))[1:].any()):
        raise ValueError(f"parents: expected 0 <= parents[i] < i behind the root, got {parents.tolist()}")
    ps = _optional("scores", scores, torch.float32, n)
    empty = functools.partial(torch.empty, device=logits.device)
    likelihoods, argmax, path = empty(n - 1), empty(n, dtype=torch.int32), empty(n - 1, dtype=torch.int32)
    accepted = empty(1, dtype=torch.int32)
    run(
        logits.device, "accept", pl, pd, pp, ps, float(threshold), float(score_temperature), bool(match), likelihoods.data_ptr(),
        argmax.data_ptr(), path.data_ptr(), accepted.data_ptr(), n, vocab, workspace=(n, vocab),
    )  # fmt: skip
    return likelihoods, argmax, path[: int(accepted)]


@_on_one_device
def argmax(logits: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The likeliest token of every row of logits that nothing has processed; -1 where a logit is NaN or infinite.

    logits: float32 [m, V].
    Returns int32 [m], the first of equals.
    """
    pl = _check("logits", logits, torch.float32, None, None)
    m, vocab = logits.shape
    _positive("logits: rows", m)
    _positive("logits: vocabulary", vocab)
    out, po = _output(out, logits.device, torch.int32, m)
    run(logits.device, "argmax", pl, m, vocab, po, workspace=(m, vocab))
    return out


def _check_temperature(score_temperature: float) -> None:
    if not score_temperature > 0:
        raise ValueError(f"score_temperature: expected more than 0, got {score_temperature}")


@_on_one_device
def kv_rewrite(k_cache: torch.Tensor, v_cache: torch.Tensor, start: int, path: torch.Tensor) -> None:
    """Compact the accepted path in place: the entries of slots start + path[i] move to slots start + i, in every layer.

    k_cache, v_cache: T [L, kv_heads, C, D].
    start: 0 to C.
    path: int32 [a], strictly increasing, start + path[-1] < C.
    """
    if isinstance(k_cache, torch.Tensor) and k_cache.dtype not in DTYPES:
        raise TypeError(f"k_cache: expected float32, float16 or bfloat16, got {k_cache.dtype}")
    pk, pv = _check_cache(k_cache, v_cache, getattr(k_cache, "dtype", None), None, None, None, None)
    pp = _check("path", path, torch.int32, None)
    layers, kv_heads, capacity, head_dim = k_cache.shape
    if not 0 <= start <= capacity:
        raise ValueError(f"start: expected 0 to the cache's capacity {capacity}, got {start}")
    _check_indices("path", path, capacity - start)
    if bool((path[1:] <= path[:-1]).any()):
        raise ValueError(f"path: expected strictly increasing values, got {path.tolist()}")
    run(
        k_cache.device, "kv_rewrite", DTYPES[k_cache.dtype], pk, pv, pp, start, path.numel(), layers, kv_heads, capacity, head_dim
    )  # fmt: skip
