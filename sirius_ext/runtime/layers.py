"""The decoder layer of every family in plain torch: for passes of many tokens, which are a library's work.

Prefill, batched evaluation and the dense baseline of the benchmarks are made of it. They differ in where keys and values go and
who looks at the neurons, so the caller hands both in. T is the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..kernels import ops, products
from ..models.families import Activation, Description
from ..models.weights import Layer, Weights

# (q T [t, heads, D], k and v T [t, kv_heads, D], rotated) -> attention's result, T [t, heads * D]; keeps k and v.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (gates = act(gate x), z = gates * (up x); T [t, I] each) -> z, changed or not.
Neurons = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Cosines and sines, float32 [tables, t, rotary_dim / 2] each.
Angles = tuple[torch.Tensor, torch.Tensor]


def embed(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: int64 [t]. Returns T [t, H]."""
    table, scale, rows = weights.embedding, weights.description.embedding_scale, weights.embedding_rows(tokens)
    x = F.embedding(rows, table.data) if table.plain else table.take(rows).dense().to(weights.dtype)
    return x if scale == 1.0 else (x.float() * scale).to(x.dtype)


def decoder_layer(
    d: Description, layer: Layer, x: torch.Tensor, angles: Angles, attend: Attend, neurons: Neurons | None = None
) -> torch.Tensor:
    """One layer over t tokens. x: T [t, H]. Returns T [t, H]."""
    normed = norm(d, x, layer.before_attention)
    parts = [project(normed) for project in layer.qkv]
    qkv = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(len(x), -1, d.head_dim)
    q, k, v = qkv.split((d.heads, d.kv_heads, d.kv_heads), 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = norm(d, q, layer.q_norm), norm(d, k, layer.k_norm)
    if layer.rope >= 0:
        cos, sin = (table[layer.rope, :, None] for table in angles)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    x = _join(d, x, layer.output(attend(q, k, v)), layer.after_attention)
    normed = norm(d, x, layer.before_mlp)
    gates = _act(d, products.dot(normed, layer.gate))
    z = gates * products.dot(normed, layer.up)
    if neurons is not None:
        z = neurons(gates, z)
    if layer.after_mlp is None and d.residual_scale == 1.0:
        return products.add_rows(z, layer.down, x)
    return _join(d, x, products.add_rows(z, layer.down), layer.after_mlp)


def norm(d: Description, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of the last dimension."""
    if d.norm_offset:
        return F.rms_norm(x.float(), weight.shape, weight.float() + d.norm_offset, d.eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, d.eps)


def logits(weights: Weights, normed: torch.Tensor, four_bits: bool = False) -> torch.Tensor:
    """What the final norm gave, T [t, H], to float32 [t, V], by the LM head of a view."""
    # Our own product: it gives float32, where torch would round to 16 bits and make ties of the likeliest tokens.
    d = weights.description
    parts = [
        ops.linear(normed, part, scale=d.logit_scale, softcap=d.logit_softcap, out_dtype=torch.float32)
        for part in weights.each_part_of_head(four_bits)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _join(d: Description, x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The residual stream after a block, whose result goes through a norm if the family has one there."""
    if weight is not None:
        return x + norm(d, added, weight)
    return x + (added if d.residual_scale == 1.0 else added * d.residual_scale)


def _act(d: Description, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh") if d.activation == Activation.GELU_TANH else F.silu(x)


def attention(
    d: Description, layer: Layer, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
) -> torch.Tensor:
    """Causal attention of tokens that stand after `start` others.

    q: T [t, heads, D]. keys, values: T [kv_heads, start + t, D]. Returns T [t, heads * D].
    """
    t, end = len(q), start + len(q)
    first = max(0, start - layer.window + 1) if layer.window else 0  # what no token sees is not read
    keys, values, start, end = keys[:, first:], values[:, first:], start - first, end - first
    if start == 0 and not (layer.window and end > layer.window):
        return attention_of(d, q, keys, values, None)
    visible = torch.ones(t, end, dtype=torch.bool, device=q.device).tril(start)
    return attention_of(d, q, keys, values, visible.triu(start - layer.window + 1) if layer.window else visible)


def attention_of(
    d: Description, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    """Attention of t tokens to the slots that each sees.

    q: T [t, heads, D]. keys, values: T [kv_heads, slots, D]. visible: bool [t, slots]; None: causal, and as many slots as tokens.
    Returns T [t, heads * D].
    """
    if d.attention_softcap:  # torch's own attention has none
        group = d.heads // d.kv_heads
        scores = q.transpose(0, 1).float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * d.attention_scale
        scores = soft_capped(scores, d.attention_softcap)
        if visible is None:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
        weight = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = (weight @ values.float().repeat_interleave(group, 0)).to(q.dtype)
    else:
        queries = q.transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(
            queries, keys[None], values[None], visible, is_causal=visible is None, scale=d.attention_scale, enable_gqa=True
        )[0]
    return attended.transpose(0, 1).reshape(len(q), -1)


def soft_capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(scores / cap)`."""
    return torch.tanh(scores / cap) * cap


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads: T [t, heads, D]; the first elements are rotated in pairs of halves. cos, sin: float32 [t, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    first, second, rest = heads.float().split((half, half, heads.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(heads.dtype)
