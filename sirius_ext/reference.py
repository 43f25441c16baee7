"""SPEC.md in plain torch: slow, short, and the oracle of every test. Nothing compiled is used here.

First the twins of the kernels in `ops.py` (same names, same arguments, no checks), then the sparse model, the decoder, the
correction loop and the metrics. Shapes use m rows of input, H hidden, I intermediate, K kept neurons, V vocabulary, L layers,
C cache capacity, D head_dim. T is the element type of the inputs: every op computes in float32 and rounds to T once, at its end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch

from .config import SiriusConfig

# ---------------------------------------------------------------------------------------------------------------- kernels


def _round(value: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """The one rounding of an op: float32 `value` as a tensor of `dtype`, in `out` if the caller gave one."""
    return value.to(dtype) if out is None else out.copy_(value)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias + residual`.

    x: T [m, in]. weight: T [out, in]. bias: T [out]. residual: T [m, out]. Returns T or float32 (`out_dtype`) [m, out].
    """
    value = x.float() @ weight.float().T
    if bias is not None:
        value = value + bias.float()
    if residual is not None:
        value = value + residual.float()
    return _round(value, out_dtype or x.dtype, out)


def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    neurons: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(gate x) * (up x)` for the listed neurons, or for all of them (SPEC section 1).

    x: T [m, H]. gate, up: T [I, H]. neurons: int32 [K]. Returns T [m, K].
    """
    if neurons is not None:
        gate, up = gate[neurons.long()], up[neurons.long()]
    g, u = x.float() @ gate.float().T, x.float() @ up.float().T
    return _round(g * torch.sigmoid(g) * u, x.dtype, out)


def down(
    x: torch.Tensor,
    weight: torch.Tensor,
    neurons: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sum_i x[:, i] * weight[neurons[i]] + residual` (SPEC section 1).

    x: T [m, K]. weight: T [I, H]. neurons: int32 [K]; without it K is I. residual: T [m, H]. Returns T [m, H].
    """
    if neurons is not None:
        weight = weight[neurons.long()]
    value = x.float() @ weight.float()
    if residual is not None:
        value = value + residual.float()
    return _round(value, x.dtype, out)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`. With a residual, `residual += x` in place and that sum, as rounded, is normalised.

    x, residual: T [m, H]. weight: T [H]. Returns T [m, H].
    """
    if residual is not None:
        residual.copy_(residual.float() + x.float())
        x = residual
    value = x.float()
    value = value / torch.sqrt(value.square().mean(-1, keepdim=True) + eps) * weight.float()
    return _round(value, x.dtype, out)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[j], x[j + D/2]). x: T [m, heads, D]. cos, sin: float32 [m, D/2]. Returns T [m, heads, D]."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


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

    qkv: T [m, (heads + 2 * kv_heads) * D], its q part is overwritten. cos, sin: float32 [P, D / 2]. positions, slots: int32 [m].
    k_cache, v_cache: T [kv_heads, C, D].
    """
    kv_heads, _, head_dim = k_cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(len(qkv), -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos[positions.long()], sin[positions.long()]
    q.copy_(_rotate(q, cos, sin))
    k_cache[:, slots.long()] = _rotate(k, cos, sin).transpose(0, 1)
    v_cache[:, slots.long()] = v.transpose(0, 1)


def tree_mask(parents: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tree attention mask as bits: bit b of row i is set when node b is i or an ancestor of i (SPEC section 4).

    parents: int32 [m]; parents[i] is -1 (no parent in the window) or smaller than i. Returns int64 [m, ceil(m / 64)], bit b in
    word b // 64.
    """
    m = len(parents)
    mask = torch.zeros(m, (m + 63) // 64, dtype=torch.int64)
    for i in range(m):
        node = i
        while node >= 0:
            mask[i, node // 64] |= torch.tensor(1) << node % 64
            node = int(parents[node])
    return mask if out is None else out.copy_(mask)


def attend(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of m rows, each over the slots that it sees. Query head h reads key/value head h // (heads / kv_heads).

    q: T [m, heads, D]. k_cache, v_cache: T [kv_heads, C, D]. visible: bool [m, C], at least one per row. Returns float32
    [m, heads, D]. Slots that a row does not see are left out, not multiplied by zero: they may hold NaN.
    """
    group = q.shape[1] // k_cache.shape[0]
    rows = []
    for row, seen in zip(q.float(), visible):
        keys = k_cache[:, seen].float().repeat_interleave(group, dim=0)
        values = v_cache[:, seen].float().repeat_interleave(group, dim=0)
        scores = torch.einsum("hd,hsd->hs", row, keys) * scale
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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of m rows over the shared cache: row i sees slots [0, prefix) and slot prefix + b for each bit b of mask[i].

    q: T [m, heads, D]. k_cache, v_cache: T [kv_heads, C, D]. mask: int64 [m, words]. Returns T [m, heads, D]. (SPEC section 4)
    """
    window = k_cache.shape[1] - prefix
    bits = ((mask.unsqueeze(-1) >> torch.arange(64)) & 1).flatten(1).bool()[:, :window]
    visible = torch.zeros(len(q), k_cache.shape[1], dtype=torch.bool)
    visible[:, :prefix] = True
    visible[:, prefix : prefix + bits.shape[1]] = bits
    return _round(attend(q, k_cache, v_cache, visible, scale), q.dtype, out)


def accept(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    threshold: float,
    score_temperature: float,
    match: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A chain's acceptance (SPEC section 3, step 4; section 5): `p_j = softmax(logits[j-1] / tau)[x_j]`.

    logits: float32 [n, V] of F. drafts: int32 [n - 1]; drafts[j - 1] was proposed after row j - 1.
    Returns likelihoods p_j float32 [n - 1], argmax of every row int32 [n] (the first of equals) and a, the length of the longest
    run from the start with p_j >= threshold, or with `match` of drafts that equal the argmax.
    """
    probabilities = torch.softmax(logits[:-1] / score_temperature, dim=-1)
    likelihoods = probabilities.gather(1, drafts.long().unsqueeze(1)).squeeze(1)
    argmax = logits.argmax(dim=-1).to(torch.int32)  # documented to take the first of equals
    keep = drafts == argmax[:-1] if match else likelihoods >= threshold
    accepted = 0
    while accepted < len(drafts) and keep[accepted]:
        accepted += 1
    return likelihoods, argmax, accepted


def kv_rewrite(k_cache: torch.Tensor, v_cache: torch.Tensor, start: int, path: torch.Tensor) -> None:
    """Compact the accepted path in place: the entries of slots start + path[i] move to slots start + i (SPEC section 4).

    k_cache, v_cache: T [L, kv_heads, C, D]. path: int32 [a], strictly increasing.
    """
    for cache in (k_cache, v_cache):
        cache[:, :, start : start + len(path)] = cache[:, :, start + path.long()]


# ----------------------------------------------------------------------------------------------------------- sparse model


def csparse_statistic(z: torch.Tensor) -> torch.Tensor:
    """CSparse's rank of every neuron over a prompt (SPEC section 2): `stat_i = || z[:, i] / ||z[t]||_2 ||_2`.

    z: float32 [tokens, I], `silu(gate x) * (up x)` of every prompt token. Returns float32 [I]. A token whose z is all zero
    contributes zero.
    """
    norm = z.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, z / norm, 0.0).norm(dim=0)


def select_neurons(stat: torch.Tensor, density: float) -> torch.Tensor:
    """The neurons that the sparse model keeps (SPEC section 2): the `round(density * I)` with the largest statistic.

    stat: float32 [I]. Returns int32 [K], ascending. K is at least 1; halves round to even, as Python's `round` does; of equal
    statistics the lower index wins.
    """
    kept = max(1, round(density * len(stat)))
    best_first = torch.sort(stat, descending=True, stable=True).indices
    return best_first[:kept].sort().values.to(torch.int32)


def density_of(sparsity: str, density: float, mlp_parameters: int, all_parameters: int) -> float:
    """Parameters that the sparse model touches per token over all parameters, embedding included (SPEC section 2).

    sparsity: "csparse", where gate, up and down skip neurons, or "fsparse", where gate is dense and two of the three do.
    """
    skipping = {"csparse": 1.0, "fsparse": 2 / 3}[sparsity]
    return 1 - (1 - density) * skipping * mlp_parameters / all_parameters


# ---------------------------------------------------------------------------------------------------------------- decoder


@dataclasses.dataclass
class Layer:
    """One decoder layer's weights, all T."""

    input_norm: torch.Tensor  # [H]
    post_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * D, H]
    qkv_bias: torch.Tensor | None
    output: torch.Tensor  # [H, heads * D]
    output_bias: torch.Tensor | None
    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [I, H]: down_proj transposed


class Decoder:
    """A Llama-family decoder (Llama 2 and 3, Mistral, SmolLM2, Qwen2) with a key/value cache, composed of the twins above.

    Built from a loaded `transformers` causal LM, in that model's dtype. The cache is two plain lists, `k` and `v`, of one tensor
    T [kv_heads, slots, D] a layer; a pass overwrites the slots that it is told to. Sliding windows are not modelled.
    """

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module) -> None:
        config = model.config
        self.embedding = model.get_input_embeddings().weight.detach()
        self.lm_head = model.get_output_embeddings().weight.detach()
        self.final_norm = model.model.norm.weight.detach()
        self.layers = [self._layer(layer) for layer in model.model.layers]
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = model.model.layers[0].self_attn.head_dim
        # The model's own frequencies: whatever rope scaling its config asks for is already in them.
        self.rope_frequencies = model.model.rotary_emb.inv_freq.float()  # [D / 2]
        self.rope_scaling = model.model.rotary_emb.attention_scaling
        self.reset(0)

    @staticmethod
    def _layer(layer: torch.nn.Module) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        return Layer(
            input_norm=layer.input_layernorm.weight.detach(),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            qkv=torch.cat([part.weight for part in qkv]),
            qkv_bias=None if qkv[0].bias is None else torch.cat([part.bias for part in qkv]),
            output=attention.o_proj.weight.detach(),
            output_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
            gate=mlp.gate_proj.weight.detach(),
            up=mlp.up_proj.weight.detach(),
            down=mlp.down_proj.weight.detach().T,
        )

    def reset(self, slots: int) -> None:
        """An empty cache of that many slots. An empty slot holds NaN: reading one shows."""
        shape = (self.kv_heads, slots, self.head_dim)
        self.k = [torch.full(shape, math.nan, dtype=self.embedding.dtype) for _ in self.layers]
        self.v = [torch.full(shape, math.nan, dtype=self.embedding.dtype) for _ in self.layers]

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        visible: torch.Tensor,
        neurons: Sequence[torch.Tensor] | None = None,
        z: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One pass of m tokens through every layer; their keys and values go to `slots`.

        tokens, positions, slots: integer [m], slots distinct. visible: bool [m, cache slots], the slots that each row attends to,
        its own among them. neurons: per layer int32 [K], what the sparse model keeps; without it the pass is dense. z: a list to
        which each layer's `silu(gate x) * (up x)` is appended, float32 [m, I]. Returns the logits, float32 [m, V].
        """
        m = len(tokens)
        angles = torch.arange(int(positions.max()) + 1).unsqueeze(1) * self.rope_frequencies
        cos, sin = angles.cos() * self.rope_scaling, angles.sin() * self.rope_scaling
        hidden = self.embedding[tokens.long()]
        for index, layer in enumerate(self.layers):
            kept = None if neurons is None else neurons[index]

            x = rms_norm(hidden, layer.input_norm, self.eps)
            qkv = linear(x, layer.qkv, layer.qkv_bias)
            rope_kv_write(qkv, cos, sin, positions, slots, self.k[index], self.v[index])
            q = qkv[:, : self.heads * self.head_dim].view(m, self.heads, self.head_dim)
            x = attend(q, self.k[index], self.v[index], visible, self.head_dim**-0.5).to(hidden.dtype)
            hidden = linear(x.flatten(1), layer.output, layer.output_bias, hidden)

            x = rms_norm(hidden, layer.post_norm, self.eps)
            x = gate_up(x, layer.gate, layer.up, kept)
            if z is not None:
                z.append(x.float())
            hidden = down(x, layer.down, kept, hidden)
        return linear(rms_norm(hidden, self.final_norm, self.eps), self.lm_head, out_dtype=torch.float32)

    def chain(
        self,
        tokens: Sequence[int],
        start: int,
        neurons: Sequence[torch.Tensor] | None = None,
        z: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`forward` of consecutive tokens from position `start` on, each seeing itself and all before it. Slots are positions."""
        positions = torch.arange(start, start + len(tokens))
        visible = torch.arange(self.k[0].shape[1]) <= positions.unsqueeze(1)
        return self.forward(torch.tensor(tokens), positions, positions, visible, neurons, z)


# ------------------------------------------------------------------------------------------------------------- correction


@dataclasses.dataclass
class Period:
    """One verification and what led to it (SPEC section 3)."""

    drafted: int  # tokens that S proposed
    accepted: int  # a: the longest run of them that F accepts
    committed: int  # tokens that joined the text: a + 1, or fewer where EOS ended it
    cut: bool  # the end of the text shortened it: fewer than n - 1 were drafted, or fewer than a + 1 committed
    likelihoods: list[float]  # p_j of every drafted token


def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    config: SiriusConfig,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
) -> tuple[list[int], list[Period]]:
    """The text that `config` asks for, greedily (SPEC section 3, chain; section 6), and its periods (none without correction).

    The text ends with the first token of `eos_token_ids`, which is part of it, or after `max_new_tokens`.
    """
    sparse_sets, tokens = _prefill(decoder, prompt_ids, config, max_new_tokens)
    periods = []
    while len(tokens) < max_new_tokens and tokens[-1] not in eos_token_ids:
        x0, position = tokens[-1], len(prompt_ids) + len(tokens) - 1
        if config.mode == "sirius":
            drafts = _draft(decoder, x0, position, sparse_sets, min(config.period, max_new_tokens - len(tokens)) - 1)
            committed, period = _verify(decoder, x0, position, drafts, config)
            committed = _until_eos(committed, eos_token_ids)
            period.cut = period.drafted < config.period - 1 or len(committed) < period.committed
            period.committed = len(committed)
            periods.append(period)
        else:
            logits = decoder.chain([x0], position, sparse_sets if config.mode == "sparse" else None)
            committed = [int(logits.argmax())]
        tokens += committed
    return tokens, periods


def _prefill(
    decoder: Decoder, prompt_ids: Sequence[int], config: SiriusConfig, max_new_tokens: int
) -> tuple[list[torch.Tensor], list[int]]:
    """Step 1: F reads the prompt. Returns the sparse sets, one int32 [K] a layer, and [x0]."""
    z = []
    decoder.reset(len(prompt_ids) + max_new_tokens)
    logits = decoder.chain(prompt_ids, 0, z=z)
    sparse_sets = [select_neurons(csparse_statistic(layer), config.density) for layer in z]
    return sparse_sets, [int(logits[-1].argmax())]


def _draft(decoder: Decoder, x0: int, position: int, sparse_sets: list[torch.Tensor], count: int) -> list[int]:
    """Step 2: S consumes x0, then what it proposes, `count` times. Returns x1 .. x(count)."""
    chain = [x0]
    for step in range(count):
        logits = decoder.chain(chain[-1:], position + step, sparse_sets)
        chain.append(int(logits.argmax()))
    return chain[1:]


def _verify(decoder: Decoder, x0: int, position: int, drafts: list[int], config: SiriusConfig) -> tuple[list[int], Period]:
    """Steps 3 to 5: F consumes x0 and the drafts, rewriting their cache entries. Returns x1 .. xa, x' and the period's record."""
    logits = decoder.chain([x0, *drafts], position)
    likelihoods, argmax, accepted = accept(
        logits, torch.tensor(drafts, dtype=torch.int32), config.threshold, config.score_temperature, config.accept == "match"
    )
    committed = drafts[:accepted] + [int(argmax[accepted])]
    return committed, Period(len(drafts), accepted, len(committed), False, likelihoods.tolist())


def _until_eos(tokens: list[int], eos_token_ids: Collection[int]) -> list[int]:
    """The tokens up to the first EOS, which is kept (SPEC section 6)."""
    for count, token in enumerate(tokens, start=1):
        if token in eos_token_ids:
            return tokens[:count]
    return tokens


# ---------------------------------------------------------------------------------------------------------------- metrics


def average_advance_length(periods: Sequence[Period]) -> float | None:
    """AAL (SPEC section 7): tokens committed per verification. Periods cut short by the end of the text are left out, and so is
    x0, which belongs to none. None without a whole period."""
    whole = [period.committed for period in periods if not period.cut]
    return sum(whole) / len(whole) if whole else None


def effective_density(advance_length: float, period: int, sparse_density: float) -> float:
    """`((n - 1) * density_sparse + 1) / AAL` (SPEC section 7)."""
    return ((period - 1) * sparse_density + 1) / advance_length


def corrected_fraction(periods: Sequence[Period]) -> float | None:
    """Tokens rejected and replaced over tokens committed (SPEC section 7): F's token of a period replaces a draft unless all of
    them were accepted, or the text ended before it. None without a period."""
    replaced = sum(period.accepted < period.drafted and period.committed == period.accepted + 1 for period in periods)
    committed = sum(period.committed for period in periods)
    return replaced / committed if committed else None


def rollback_length(periods: Sequence[Period]) -> float | None:
    """Drafted tokens thrown away per verification (SPEC section 7), those behind an EOS among them. None without a period."""
    thrown_away = sum(period.drafted - min(period.accepted, period.committed) for period in periods)
    return thrown_away / len(periods) if periods else None
