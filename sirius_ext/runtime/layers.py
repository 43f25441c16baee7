"""The decoder layer of every family in plain torch: for passes of many tokens, which are a library's work.

Prefill, batched evaluation and the dense baseline of the benchmarks are made of it. They differ in where keys and values go and
who looks at the neurons, so the caller hands both in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..kernels import ops
from ..models.families import Activation
from ..models.weights import Layer, Weights

# (layer, q T [t, heads, D], k and v T [t, kv_heads, D], rotated) -> attention's result, T [t, heads * D]; keeps k and v.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (layer, gates = act(gate x), z = gates * (up x); T [t, I] each) -> z, changed or not.
Neurons = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class Layers:
    """A model's layers. T is the model's dtype; every method takes and gives tensors on its device."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 [t]. Returns T [t, H]."""
        x, scale = F.embedding(tokens, self.weights.embedding.data), self.weights.description.embedding_scale
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype, device=x.device)

    def layer(
        self,
        x: torch.Tensor,
        index: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
        neurons: Neurons | None = None,
    ) -> torch.Tensor:
        """One layer. x: T [t, H]. angles: cosines and sines, float32 [tables, t, rotary_dim / 2]. Returns T [t, H]."""
        layer, w = self.weights.layers[index], self.weights
        normed = self.norm(x, layer.before_attention)
        q, k, v = (each(normed).view(len(x), -1, w.head_dim) for each in (layer.q, layer.k, layer.v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.norm(q, layer.q_norm), self.norm(k, layer.k_norm)
        if layer.rope >= 0:
            cos, sin = (table[layer.rope, :, None] for table in angles)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        x = self._join(x, layer.output(attend(index, q, k, v)), layer.after_attention)
        normed = self.norm(x, layer.before_mlp)
        gates = self._act(layer.gate.dot(normed))
        z = gates * layer.up.dot(normed)
        if neurons is not None:
            z = neurons(index, gates, z)
        if layer.after_mlp is None and w.description.residual_scale == 1.0:
            return layer.down.sum(z, x)
        return self._join(x, layer.down.sum(z), layer.after_mlp)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of the last dimension."""
        d = self.weights.description
        if d.norm_offset:
            return F.rms_norm(x.float(), weight.shape, weight.float() + d.norm_offset, d.eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, d.eps)

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, self.weights.final_norm)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Behind the final norm: T [t, H] to float32 [t, V]."""
        # Our own product: it gives float32, where torch would round to 16 bits and make ties of the likeliest tokens.
        d = self.weights.description
        return ops.linear(normed, self.weights.lm_head, scale=d.logit_scale, softcap=d.logit_softcap, out_dtype=torch.float32)

    def _join(self, x: torch.Tensor, added: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """The residual stream after a block."""
        scale = self.weights.description.residual_scale
        added = added if norm is None else self.norm(added, norm)
        return x + (added if scale == 1.0 else added * scale)

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        if self.weights.description.activation == Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        return F.silu(x)


def attention(
    weights: Weights,
    layer: Layer,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """Causal attention of tokens that stand after `start` others.

    q: T [t, heads, D]. keys, values: T [kv_heads, start + t, D]. Returns T [t, heads * D].
    """
    d, t, end = weights.description, len(q), start + len(q)
    first = max(0, start - layer.window + 1) if layer.window else 0  # what no token sees is not read
    keys, values, start, end = keys[:, first:], values[:, first:], start - first, end - first
    windowed = layer.window and end > layer.window
    visible = None
    if start or windowed or d.attention_softcap:
        visible = torch.ones(t, end, dtype=torch.bool, device=q.device).tril(start)
        if windowed:
            visible = visible.triu(start - layer.window + 1)
    queries = q.transpose(0, 1)
    if d.attention_softcap:
        group = d.heads // d.kv_heads
        scores = queries.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * d.attention_scale
        scores = torch.tanh(scores / d.attention_softcap) * d.attention_softcap
        weight = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = (weight @ values.float().repeat_interleave(group, 0)).to(q.dtype)
    else:
        attended = F.scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            attn_mask=visible,
            is_causal=visible is None,
            scale=d.attention_scale,
            enable_gqa=True,
        )[0]
    return attended.transpose(0, 1).reshape(t, -1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads: T [t, heads, D]; the first elements are rotated in pairs of halves. cos, sin: float32 [t, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    first, second, rest = heads.float().split((half, half, heads.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(heads.dtype)
