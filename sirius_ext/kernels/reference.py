"""The ops in plain torch: slow, short, and what every kernel is held to. Nothing compiled is used here.

Each function is the twin of the one in `ops.py`: same name, same arguments, no checks. Shapes use m rows of input, H hidden, I
intermediate, K kept neurons, V vocabulary, L layers, C cache capacity, D head_dim. T is the element type of the inputs: every op
computes in float32 and rounds to T once, at its end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .matrix import Matrix, matrix_of


def _round(value: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """The one rounding of an op: float32 `value` as a tensor of `dtype`, in `out` if the caller gave one."""
    return value.to(dtype) if out is None else out.copy_(value)


def _dense(weight: torch.Tensor | Matrix) -> torch.Tensor:
    """A weight's numbers, float32."""
    return matrix_of(weight).dense()


def _cap(value: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(value / softcap) if softcap else value


def _act(gates: torch.Tensor, activation: str) -> torch.Tensor:
    return {"silu": F.silu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[activation](gates)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`cap(scale * (x @ weight.T + bias)) + residual`, where cap(v) is `softcap * tanh(v / softcap)`, or v if softcap is 0.

    x: T [m, in].
    weight: T [out, in].
    bias: T [out].
    residual: T [m, out].
    Returns T or float32 (`out_dtype`) [m, out].
    """
    value = x.float() @ _dense(weight).T
    if bias is not None:
        value = value + bias.float()
    value = _cap(scale * value, softcap)
    if residual is not None:
        value = value + residual.float()
    return _round(value, out_dtype or x.dtype, out)


def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor | Matrix,
    up: torch.Tensor | Matrix,
    neurons: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(gate x) * (up x)` for the listed neurons, or for all of them (SPEC section 1).

    x: T [m, H].
    gate, up: T [I, H].
    neurons: int32 [K].
    activation: "silu" or "gelu_tanh".
    Returns T [m, K].
    """
    gate, up = _dense(gate), _dense(up)
    if neurons is not None:
        gate, up = gate[neurons.long()], up[neurons.long()]
    g, u = x.float() @ gate.T, x.float() @ up.T
    return _round(_act(g, activation) * u, x.dtype, out)


def gate(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    neurons: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(gate x)`, what FSparse and the cascade choose their neurons by (SPEC section 2).

    x: T [m, H].
    weight: T [I, H].
    neurons: int32 [K]; without it all of them.
    activation: as in `gate_up`.
    Returns float32 [m, I], each neuron's value at its place; those of the others stay what they are in `out`, or are zero.
    """
    value = _act(x.float() @ _dense(weight).T, activation)
    return _placed(value, neurons, out)


def _placed(value: torch.Tensor, neurons: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    """The columns `neurons` of `value`, float32 [m, I], in place of those of `out`."""
    out = torch.zeros_like(value) if out is None else out
    places = slice(None) if neurons is None else neurons.long()
    out[:, places] = value[:, places]
    return out


def select(
    values: torch.Tensor,
    kept: int | None = None,
    threshold: float | None = None,
    *,
    among: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    taken: torch.Tensor | None = None,
) -> torch.Tensor:
    """Neurons by their values in a pass (SPEC section 2): the `kept` of largest `(sum of |values| over the rows) * weights`, or
    all for which that reaches m times the threshold.

    values: float32 [m, I].
    kept, threshold: one of them.
    among: int32 [candidates], rising: no others are chosen; without it all may be.
    weights: float32 [I]; without it 1.
    taken: T [m, kept], gets the values of those chosen, rounded.
    Returns int32 [K], rising.
    """
    scores = values[0].abs()
    for row in values[1:]:
        scores = scores + row.abs()
    if weights is not None:
        scores = scores * weights
    candidates = torch.arange(len(scores), dtype=torch.int32) if among is None else among
    scores = scores[candidates.long()]
    if threshold is not None:
        return candidates[scores >= len(values) * torch.tensor(threshold, dtype=torch.float32)]
    assert kept is not None
    chosen = candidates[largest(scores, kept).long()]
    if taken is not None:
        taken.copy_(values[:, chosen.long()])
    return chosen


def largest(statistic: torch.Tensor, kept: int) -> torch.Tensor:
    """The indices of the `kept` largest, ascending; of equals the lower index wins."""
    best_first = torch.sort(statistic, descending=True, stable=True).indices
    return best_first[:kept].sort().values.to(torch.int32)


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
    """A following set after a verification (SPEC section 2): the statistic goes on over the tokens that joined the sequence, and
    the neurons of the largest `statistic_i * ||down_i||_2^2` are kept.

    z: T [L, m, I], F's `act(gate x) * (up x)` in every layer.
    rows: int32 [a], the rows that joined the sequence, in order.
    down_squares: float32 [L, I], `||down_i||_2^2`.
    statistic: float32 [L, I], changed in place: `decay * statistic + (1 - decay) * (z / ||z||_2)^2` for each row.
    Returns int32 [L, kept], ascending; of equal scores the lower index wins.
    """
    for layer in range(len(z)):
        for row in z[layer, rows.long()].float():
            squares = row.square()
            share = squares / squares.sum() if squares.sum() > 0 else torch.zeros_like(squares)
            statistic[layer] = decay * statistic[layer] + (1 - decay) * share
    neurons = torch.stack([largest(each, kept) for each in statistic * down_squares])
    return neurons if out is None else out.copy_(neurons)


def up(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    gates: torch.Tensor,
    neurons: torch.Tensor,
    *,
    spread: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gates * (up x)` for the listed neurons.

    x: T [m, H].
    weight: T [I, H].
    gates: float32 [m, I].
    neurons: int32 [K].
    Returns T [m, K]; or with `spread` float32 [m, I], not rounded, each neuron's value at its place as in `gate`.
    """
    if spread:
        return _placed(gates * (x.float() @ _dense(weight).T), neurons, out)
    value = gates[:, neurons.long()] * (x.float() @ _dense(weight)[neurons.long()].T)
    return _round(value, x.dtype, out)


def down(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    neurons: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale * sum_i x[:, i] * weight[neurons[i]] + residual` (SPEC section 1).

    x: T [m, K].
    weight: T [I, H].
    neurons: int32 [K]; without it K is I.
    residual: T [m, H].
    Returns T [m, H].
    """
    weight = _dense(weight)
    if neurons is not None:
        weight = weight[neurons.long()]
    value = scale * (x.float() @ weight)
    if residual is not None:
        value = value + residual.float()
    return _round(value, x.dtype, out)


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """float32 `x / sqrt(mean(x^2) + eps) * (weight + offset)` over the last dimension."""
    value = x.float()
    return value / torch.sqrt(value.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset) + residual`.

    x, residual: T [m, H].
    weight: T [H].
    Returns T [m, H].
    """
    value = _normalised(x, weight, eps, offset)
    if residual is not None:
        value = value + residual.float()
    return _round(value, x.dtype, out)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[j], x[j + R/2]) of the first R elements. x: float32 [m, heads, D]. cos, sin: float32 [m, R/2]."""
    a, b, rest = x.tensor_split([cos.shape[1], 2 * cos.shape[1]], dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> None:
    """Rotate q and k by their positions (half-split pairs, as Llama does); q stays in `qkv`, k and v go to their cache slots.
    With q_norm or k_norm each head of q or k is first normalised.

    qkv: T [m, (heads + 2 * kv_heads) * D], its q part is overwritten.
    cos, sin: float32 [P, R / 2]; of each head the first R elements are rotated.
    positions, slots: int32 [m].
    k_cache, v_cache: T [kv_heads, C, D].
    q_norm, k_norm: T [D].
    """
    kv_heads, _, head_dim = k_cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(len(qkv), -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos[positions.long()], sin[positions.long()]

    def finished(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        return _rotate(x.float() if norm is None else _normalised(x, norm, eps, offset), cos, sin).to(x.dtype)

    q.copy_(finished(q, q_norm))
    k_cache[:, slots.long()] = finished(k, k_norm).transpose(0, 1)
    v_cache[:, slots.long()] = v.transpose(0, 1)


def tree_mask(parents: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tree attention mask as bits: bit b of row i is set when node b is i or an ancestor of i (SPEC section 4).

    parents: int32 [m]; parents[i] is -1 (no parent in the window), or at least 0 and smaller than i.
    Returns int64 [m, ceil(m / 64)], bit b in word b // 64.
    """
    m = len(parents)
    mask = torch.zeros(m, (m + 63) // 64, dtype=torch.int64)
    for i in range(m):
        node = i
        while node >= 0:
            mask[i, node // 64] |= torch.tensor(1) << node % 64
            node = int(parents[node])
    return mask if out is None else out.copy_(mask)


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Softmax attention of m rows, each over the slots that it sees. Query head h reads key/value head h // (heads / kv_heads).

    q: T [m, heads, D].
    k_cache, v_cache: T [kv_heads, C, D].
    visible: bool [m, C], at least one per row.
    Returns float32 [m, heads, D]. Slots that a row does not see are left out, not multiplied by zero: they may hold NaN.
    """
    group = q.shape[1] // k_cache.shape[0]
    rows = []
    for row, seen in zip(q.float(), visible):
        keys = k_cache[:, seen].float().repeat_interleave(group, dim=0)
        values = v_cache[:, seen].float().repeat_interleave(group, dim=0)
        scores = _cap(torch.einsum("hd,hsd->hs", row, keys) * scale, softcap)
        rows.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix: int,
    mask: torch.Tensor,
    scale: float,
    *,
    positions: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of m rows over the shared cache: row i sees slots [0, prefix) and slot prefix + b for each bit b of mask[i], but
    with a window none of the slots [0, positions[i] - window] (SPEC section 4). Scores are `cap(scale * q k)`, as in `linear`.

    q: T [m, heads, D].
    k_cache, v_cache: T [kv_heads, C, D].
    mask: int64 [m, words].
    positions: int32 [m], needed with a window only.
    window: tokens that a row sees at most, or 0 for no limit.
    Returns T [m, heads, D].
    """
    behind = k_cache.shape[1] - prefix
    bits = ((mask.unsqueeze(-1) >> torch.arange(64)) & 1).flatten(1).bool()[:, :behind]
    visible = torch.zeros(len(q), k_cache.shape[1], dtype=torch.bool)
    visible[:, :prefix] = True
    visible[:, prefix : prefix + bits.shape[1]] = bits
    if window:
        assert positions is not None
        visible &= torch.arange(k_cache.shape[1]) > positions[:, None] - window
    return _round(attend(q, k_cache, v_cache, visible, scale, softcap), q.dtype, out)


def tree_expand(
    logits: torch.Tensor, scores: torch.Tensor, width: int, score_temperature: float, prune: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more depth of the tree (SPEC section 4): of every leaf's `width` likeliest tokens the `width` of largest cumulative
    log-likelihood.

    logits: float32 [leaves, V] of S.
    scores: float32 [leaves].
    prune: a leaf whose likeliest token has a larger likelihood proposes no other.
    Returns tokens int32 [c], the rows of their leaves int32 [c] and scores float32 [c], likeliest first. A leaf with a logit that
    is NaN or plus infinity proposes nothing: its likelihoods are NaN.
    """
    candidates = []
    for leaf, row in enumerate(torch.log_softmax(logits / score_temperature, dim=-1)):
        order = torch.sort(logits[leaf], descending=True, stable=True).indices[:width].tolist()
        if row[order[0]].exp() > prune:
            order = order[:1]
        candidates += [
            (float(row[token] + scores[leaf]), leaf, token) for token in order if row[token] + scores[leaf] > -math.inf
        ]
    candidates.sort(key=lambda candidate: -candidate[0])  # stable: of equals the first stays first
    kept = candidates[:width]
    tokens = torch.tensor([c[2] for c in kept], dtype=torch.int32)
    leaves = torch.tensor([c[1] for c in kept], dtype=torch.int32)
    return tokens, leaves, torch.tensor([c[0] for c in kept], dtype=torch.float32)


def accept(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    threshold: float,
    score_temperature: float,
    match: bool = False,
    parents: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Acceptance (SPEC section 3, step 4; sections 4 and 5): node i's likelihood is `softmax(logits[parent] / tau)[x_i]`.

    logits: float32 [n, V] of F.
    drafts: int32 [n - 1]; drafts[i - 1] is node i's token.
    parents: int32 [n]; without it a chain.
    scores: float32 [n], cumulative log-likelihoods.
    Returns likelihoods float32 [n - 1], argmax of every row int32 [n] (the first of equals) and the nodes of the longest
    accepted run int32 [a]; of equally long ones that of the larger score, then the first. A row without probabilities, since it
    holds NaN or plus infinity or nothing but minus infinity, has the argmax -1; what follows it has a likelihood of NaN.
    """
    parent_of: list[int] = list(range(-1, len(logits) - 1)) if parents is None else parents.tolist()
    score_of: list[float] = [0.0] * len(logits) if scores is None else scores.tolist()
    probabilities = torch.softmax(logits / score_temperature, dim=-1)
    argmax = logits.argmax(dim=-1).to(torch.int32)  # documented to take the first of equals
    argmax[~(logits < math.inf).all(-1) | (logits == -math.inf).all(-1)] = -1
    likelihoods: list[torch.Tensor] = []
    best: list[int] = []
    runs: list[list[int] | None] = [[]]  # None after a node that is not accepted
    for node in range(1, len(logits)):
        parent, token = parent_of[node], int(drafts[node - 1])
        likelihoods.append(probabilities[parent, token])
        kept = token == argmax[parent] if match else likelihoods[-1] >= threshold
        before = runs[parent]
        run = [*before, node] if kept and before is not None else None
        runs.append(run)
        if run and (len(run) > len(best) or (len(run) == len(best) and score_of[node] > score_of[best[-1]])):
            best = run
    return torch.tensor(likelihoods, dtype=torch.float32), argmax, torch.tensor(best, dtype=torch.int32)


def argmax(logits: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The likeliest token of every row; -1 where a logit is NaN or infinite.

    logits: float32 [m, V].
    Returns int32 [m], the first of equals.
    """
    best = logits.argmax(-1).to(torch.int32)
    best[~logits.isfinite().all(-1)] = -1
    return best if out is None else out.copy_(best)


def kv_rewrite(k_cache: torch.Tensor, v_cache: torch.Tensor, start: int, path: torch.Tensor) -> None:
    """Compact the accepted path in place: the entries of slots start + path[i] move to slots start + i (SPEC section 4).

    k_cache, v_cache: T [L, kv_heads, C, D].
    path: int32 [a], strictly increasing.
    """
    for cache in (k_cache, v_cache):
        cache[:, :, start : start + len(path)] = cache[:, :, start + path.long()]
