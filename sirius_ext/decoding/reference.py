"""The specification in plain torch: slow, short, and the oracle of every test. Nothing compiled is used here.

The sparse model, the decoder, the correction loop and the metrics, made of the ops in `kernels/reference.py`, whose shapes'
names are used here too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from ..config import SiriusConfig
from ..kernels import reference as ops

# ----------------------------------------------------------------------------------------------------------- sparse model


def csparse_statistic(z: torch.Tensor) -> torch.Tensor:
    """CSparse's rank of every neuron over a prompt (SPEC section 2): `stat_i = || z[:, i] / ||z[t]||_2 ||_2`.

    z: float32 [tokens, I], `silu(gate x) * (up x)` of every prompt token. One that is all zero contributes zero.
    Returns float32 [I].
    """
    norm = z.norm(dim=1, keepdim=True)
    statistic: torch.Tensor = torch.where(norm > 0, z / norm, 0.0).norm(dim=0)
    return statistic


def select_neurons(stat: torch.Tensor, density: float) -> torch.Tensor:
    """The neurons that the sparse model keeps (SPEC section 2): the `round(density * I)` with the largest statistic.

    stat: float32 [I].
    Returns int32 [K], ascending. K is at least 1; halves round to even, as Python's `round` does; of equal statistics the lower
    index wins.
    """
    return ops.largest(stat, max(1, round(density * len(stat))))


def density_of(sparsity: str, density: float, mlp_parameters: int, all_parameters: int) -> float:
    """Parameters that the sparse model touches per token over all parameters, embedding included (SPEC section 2).

    sparsity: "csparse", where gate, up and down skip neurons; "fsparse", where gate is dense and two of the three do; "cascade",
    where all three do, each a share of its own, which is 1 - density on average.
    """
    skipping = {"csparse": 1.0, "fsparse": 2 / 3, "cascade": 1.0}[sparsity]
    return 1 - (1 - density) * skipping * mlp_parameters / all_parameters


def cascade_shares(density: float, intermediate: int) -> tuple[int, int, int]:
    """The sizes of K, U and D (SPEC section 2): 1.375 d, d and 0.625 d of I, which is 3 d I together; at least one each, and
    D <= U <= K <= I."""
    everything = round(3 * density * intermediate)
    k = min(max(round(1.375 * density * intermediate), 1), intermediate)
    u = min(max(round((everything - k) / 1.625), 1), k)
    d = min(max(everything - k - u, 1), u)
    return k, u, d


@dataclasses.dataclass
class Cascade:
    """Sets within one another (SPEC section 2).

    sets: K of each layer, int32 [K].
    down_norms: `||down_i||_2` of each layer, float32 [I].
    up, down: the sizes of U and D.
    """

    sets: Sequence[torch.Tensor]
    down_norms: Sequence[torch.Tensor]
    up: int
    down: int

    def choose(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """D, by `gates = act(gate x)` and `z = gates * (up x)` of all neurons, float32 [m, I], of which only those of K count."""
        u = self._largest(gates, self.sets[layer], layer, self.up)
        return self._largest(z, u, layer, self.down)

    def _largest(self, values: torch.Tensor, among: torch.Tensor, layer: int, count: int) -> torch.Tensor:
        """By the sum of |values| over the tokens, times ||down||."""
        scores = (values.abs().sum(0) * self.down_norms[layer])[among.long()]
        return among[ops.largest(scores, count).long()]


# ---------------------------------------------------------------------------------------------------------------- decoder


# What the sparse model keeps: per layer int32 [K] (CSparse), or a choice from the layer's index and its gates (FSparse), or the
# cascade.
Neurons = Sequence[torch.Tensor] | Callable[[int, torch.Tensor], torch.Tensor] | Cascade


@dataclasses.dataclass
class Layer:
    """One decoder layer's weights, all T. A norm that the family does not have is None."""

    before_attention: torch.Tensor  # [H]; so are the next three
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor | None
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * D, H]
    qkv_bias: torch.Tensor | None
    output: torch.Tensor  # [H, heads * D]
    output_bias: torch.Tensor | None
    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [I, H]: down_proj transposed
    window: int | None  # tokens that attention sees, the row's own included
    frequencies: torch.Tensor | None  # of its rotation, float32 [rotary_dim / 2]; None without
    rope_factor: float  # of cosines and sines


class Decoder:
    """A decoder of any supported family with a key/value cache, composed of the ops.

    Built from a loaded `transformers` causal LM, in that model's dtype, and from nothing else of this package: what a family is
    is read from its modules here, which are `Any`: what attributes they have is the family's. The cache is two plain lists, `k`
    and `v`, of one tensor T [kv_heads, slots, D] a layer; a pass overwrites the slots that it is told to.
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        config, body = model.config, model.model
        gemma = config.model_type.startswith("gemma")
        self.embedding = model.get_input_embeddings().weight.detach()
        self.lm_head = model.get_output_embeddings().weight.detach()
        self.final_norm = body.norm.weight.detach()
        self.eps = config.rms_norm_eps
        self.norm_offset = 1.0 if gemma else 0.0
        self.activation = "gelu_tanh" if gemma else "silu"
        embedding_scale = config.hidden_size**0.5 if gemma else getattr(config, "embedding_multiplier", 1.0)
        # transformers rounds Gemma's scale before it multiplies.
        self.embedding_scale = float(torch.tensor(embedding_scale).to(self.embedding.dtype)) if gemma else embedding_scale
        self.residual_scale = getattr(config, "residual_multiplier", 1.0)
        self.logit_scale = 1 / getattr(config, "logits_scaling", 1.0)
        self.logit_softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        self.attention_softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = body.layers[0].self_attn.head_dim
        self.attention_scale = body.layers[0].self_attn.scaling
        self.layers = [self._layer(layer, body, gemma) for layer in body.layers]
        self.reset(0)

    def _layer(self, layer: Any, body: Any, gemma: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        if hasattr(attention, "qkv_proj"):
            qkv = [attention.qkv_proj]
            gate, up = mlp.gate_up_proj.weight.detach().chunk(2)
        else:
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        rotary, kind = body.rotary_emb, getattr(attention, "layer_type", None)
        prefix = "" if hasattr(rotary, "inv_freq") else f"{kind}_"
        # The model's own frequencies: whatever rope scaling its config asks for is already in them. Those of longrope change in
        # place while it reads a long text; what they were stays in others.
        which = "original_inv_freq" if hasattr(rotary, f"{prefix}long_inv_freq") else "inv_freq"
        frequencies = getattr(rotary, prefix + which).float() if getattr(attention, "use_rope", True) else None
        # The families whose attention does not say what its window is have the config's in every layer.
        window = (
            attention.sliding_window if hasattr(attention, "sliding_window") else getattr(body.config, "sliding_window", None)
        )

        def norm(module: Any) -> torch.Tensor | None:
            return None if module is None else module.weight.detach()

        return Layer(
            before_attention=layer.input_layernorm.weight.detach(),
            after_attention=norm(layer.post_attention_layernorm if gemma else None),
            before_mlp=(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm).weight.detach(),
            after_mlp=norm(layer.post_feedforward_layernorm if gemma else None),
            q_norm=norm(getattr(attention, "q_norm", None)),
            k_norm=norm(getattr(attention, "k_norm", None)),
            qkv=torch.cat([part.weight for part in qkv]),
            qkv_bias=None if qkv[0].bias is None else torch.cat([part.bias for part in qkv]),
            output=attention.o_proj.weight.detach(),
            output_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
            gate=gate,
            up=up,
            down=mlp.down_proj.weight.detach().T,
            window=window,
            frequencies=frequencies,
            rope_factor=float(getattr(rotary, f"{prefix}attention_scaling")),
        )

    def reset(self, slots: int) -> None:
        """An empty cache of that many slots. An empty slot holds NaN: reading one shows."""
        shape = (self.kv_heads, slots, self.head_dim)
        self.k = [torch.full(shape, math.nan, dtype=self.embedding.dtype) for _ in self.layers]
        self.v = [torch.full(shape, math.nan, dtype=self.embedding.dtype) for _ in self.layers]
        self.places = torch.zeros(slots, dtype=torch.int64)  # the position of the token in each slot

    def compact(self, start: int, path: Sequence[int]) -> None:
        """Move the tokens of slots start + path[i] to slots start + i."""
        for cache in (*self.k, *self.v):
            cache[:, start : start + len(path)] = cache[:, [start + node for node in path]]
        self.places[start : start + len(path)] = torch.arange(start, start + len(path))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return ops.rms_norm(x, weight, self.eps, residual, offset=self.norm_offset)

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        visible: torch.Tensor,
        neurons: Neurons | None = None,
        z: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One pass of m tokens through every layer; their keys and values go to `slots`.

        tokens, positions, slots: integer [m], slots distinct.
        visible: bool [m, cache slots], the slots that each row attends to, its own among them; a layer with a window leaves out
            those that are too far back.
        neurons: what the sparse model keeps; without it the pass is dense.
        z: a list to which each layer's `act(gate x) * (up x)` is appended, float32 [m, I].
        Returns the logits, float32 [m, V].
        """
        m = len(tokens)
        self.places[slots.long()] = positions.long()
        hidden = self.embedding[tokens.long()]
        if self.embedding_scale != 1.0:
            hidden = (hidden.float() * self.embedding_scale).to(hidden.dtype)
        for index, layer in enumerate(self.layers):
            x = self._norm(hidden, layer.before_attention)
            qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
            frequencies = torch.empty(0) if layer.frequencies is None else layer.frequencies
            angles = torch.arange(int(positions.max()) + 1).unsqueeze(1) * frequencies
            cos, sin = angles.cos() * layer.rope_factor, angles.sin() * layer.rope_factor
            ops.rope_kv_write(
                qkv,
                cos,
                sin,
                positions,
                slots,
                self.k[index],
                self.v[index],
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=self.eps,
                offset=self.norm_offset,
            )
            q = qkv[:, : self.heads * self.head_dim].view(m, self.heads, self.head_dim)
            seen = visible if layer.window is None else visible & (self.places > positions.unsqueeze(1) - layer.window)
            x = ops.attend(q, self.k[index], self.v[index], seen, self.attention_scale, self.attention_softcap).to(hidden.dtype)
            hidden = self._join(
                lambda **into: ops.linear(x.flatten(1), layer.output, layer.output_bias, **into),  # noqa: B023
                hidden,
                layer.after_attention,
            )

            x = self._norm(hidden, layer.before_mlp)
            kept: torch.Tensor | None
            if isinstance(neurons, Cascade):
                gates = ops.gate(x, layer.gate, activation=self.activation)
                kept = neurons.choose(index, gates, gates * (x.float() @ layer.up.float().T))
                x = ops.up(x, layer.up, gates, kept)
            elif callable(neurons):
                gates = ops.gate(x, layer.gate, activation=self.activation)
                kept = neurons(index, gates)
                x = ops.up(x, layer.up, gates, kept)
            else:
                kept = None if neurons is None else neurons[index]
                x = ops.gate_up(x, layer.gate, layer.up, kept, activation=self.activation)
            if z is not None:
                z.append(x.float())
            hidden = self._join(lambda **into: ops.down(x, layer.down, kept, **into), hidden, layer.after_mlp)  # noqa: B023
        normed = self._norm(hidden, self.final_norm)
        return ops.linear(normed, self.lm_head, scale=self.logit_scale, softcap=self.logit_softcap, out_dtype=torch.float32)

    def _join(self, product: Callable[..., torch.Tensor], hidden: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """What a block's last product adds to the residual stream, by way of a norm if the family has one there."""
        if norm is None:
            return product(residual=hidden, scale=self.residual_scale)
        return self._norm(product(), norm, hidden)

    def chain(
        self,
        tokens: Sequence[int],
        start: int,
        neurons: Neurons | None = None,
        z: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`forward` of consecutive tokens from position `start` on, each seeing itself and all before it. Slots are positions."""
        positions = torch.arange(start, start + len(tokens))
        visible = torch.arange(self.k[0].shape[1]) <= positions.unsqueeze(1)
        return self.forward(torch.tensor(tokens), positions, positions, visible, neurons, z)

    def nodes(
        self,
        tree: Tree,
        which: Sequence[int],
        position: int,
        neurons: Neurons | None = None,
        z: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`forward` of some nodes of a tree whose root stands at `position`. Node i's slot is position + i; it sees the text
        before the root, its ancestors and itself."""
        visible = torch.zeros(len(which), self.k[0].shape[1], dtype=torch.bool)
        visible[:, :position] = True
        for row, node in zip(visible, which):
            row[[position + seen for seen in [*tree.path(node), node]]] = True
        slots = torch.tensor([position + node for node in which])
        positions = torch.tensor([position + len(tree.path(node)) for node in which])
        return self.forward(torch.tensor([tree.tokens[node] for node in which]), positions, slots, visible, neurons, z)


# ------------------------------------------------------------------------------------------------------------- correction


@dataclasses.dataclass
class Tree:
    """What S drafted (SPEC section 4). Node 0 is x0; a chain is a tree of width 1."""

    tokens: list[int]
    parents: list[int] = dataclasses.field(default_factory=lambda: [-1])
    scores: list[float] = dataclasses.field(default_factory=lambda: [0.0])  # cumulative log-likelihoods under S
    # For sampling: the distribution that a node's children were drawn from.
    proposals: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def path(self, node: int) -> list[int]:
        """The ancestors of a node, the root first."""
        ancestors: list[int] = []
        while self.parents[node] >= 0:
            node = self.parents[node]
            ancestors.insert(0, node)
        return ancestors

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents) if parent == node]


@dataclasses.dataclass
class Period:
    """One verification and what led to it (SPEC section 3)."""

    drafted: int  # depth of the tree: tokens that S could have had accepted, and its passes
    nodes: int  # tokens that S proposed, in all branches
    accepted: int  # a: the longest run of them that F accepts
    branch: int | None  # which of its depth the run's last node is, likeliest first; None if nothing is accepted
    committed: int  # tokens that joined the text: a + 1, or fewer where EOS ended it
    cut: bool  # the end of the text shortened it: fewer than n - 1 were drafted, or fewer than a + 1 committed
    likelihoods: list[float]  # F's likelihood of every drafted token


class Sampling:
    """Drawing tokens. `warp` makes of logits float32 [V] those whose softmax is sampled; identity without it."""

    def __init__(
        self, generator: torch.Generator | None = None, warp: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.generator, self.warp = generator, warp

    def uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """float64 [V]."""
        return torch.softmax((logits if self.warp is None else self.warp(logits)).double(), -1)

    def draw(self, weights: torch.Tensor) -> int:
        """A token with probability weights / sum(weights), by the inverse of the distribution function at one uniform number."""
        cumulative = weights.cumsum(0)
        place = int(torch.searchsorted(cumulative, self.uniform() * cumulative[-1], right=True))
        return min(place, int(weights.nonzero()[-1]))

    def expand(self, tree: Tree, leaves: list[int], logits: torch.Tensor, width: int) -> list[int]:
        """Children of the leaves: `width` of them, each leaf's drawn without replacement."""
        added = []
        for leaf, row, count in zip(leaves, logits, apportion([tree.scores[leaf] for leaf in leaves], width)):
            proposal = self.probabilities(row)
            tree.proposals[leaf] = proposal
            left = proposal.clone()
            for index in range(min(count, int((proposal > 0).sum()))):
                token = self.draw(left)
                left[token] = 0
                added.append(len(tree.tokens))
                tree.tokens.append(token)
                tree.parents.append(leaf)
                tree.scores.append(tree.scores[leaf] + child_score(index))
        return added

    def accept(self, tree: Tree, logits: torch.Tensor) -> tuple[list[int], int]:
        """Speculative sampling, with several children by the multi-branch residual rule (SpecInfer, arXiv 2305.09781, for draws
        without replacement): the accepted nodes, and F's token after them. The text is distributed as if F had sampled it."""
        node, path = 0, []
        while True:
            target = self.probabilities(logits[node])
            left = tree.proposals.get(node, target).clone()
            for child in tree.children(node):
                token = tree.tokens[child]
                proposal = left / left.sum()
                if self.uniform() * proposal[token] < target[token]:
                    path.append(child)
                    break
                rest = (target - proposal).clamp(min=0)
                target = rest / rest.sum() if rest.sum() > 0 else target
                left[token] = 0
            else:
                return path, self.draw(target)
            node = child


def apportion(scores: Sequence[float], places: int) -> list[int]:
    """Children for the leaves, one by one to where acceptance is likeliest to arrive (the first among equals).
    scores: the leaves' log-likelihoods of being reached."""
    counts = [0] * len(scores)
    for _ in range(places):
        values = [score + child_score(count) for score, count in zip(scores, counts)]
        counts[values.index(max(values))] += 1
    return counts


def child_score(index: int) -> int:
    """1000 log 0.9, or 1000 log(0.1 * 0.5^index): the first child is taken to be accepted in 9 of 10 cases."""
    return -105 if index == 0 else -2303 - 693 * index


def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    config: SiriusConfig,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    *,
    sampling: Sampling | None = None,
    thresholds: Sequence[float] | None = None,
    periods: Iterator[int] | None = None,
) -> tuple[list[int], list[Period]]:
    """The text that `config` asks for (SPEC sections 3 to 6), greedily or by `sampling`, and its periods (none without
    correction).

    The text ends with the first token of `eos_token_ids`, which is part of it, or after `max_new_tokens`.

    thresholds: FSparse's threshold form, one a layer.
    periods: in place of config.period, that of each period.
    """
    neurons, following, logits = _prefill(decoder, prompt_ids, config, max_new_tokens, thresholds)

    def choose(row: torch.Tensor) -> int:
        return sampling.draw(sampling.probabilities(row)) if sampling else int(row.argmax())

    tokens, records = [choose(logits)], []
    while len(tokens) < max_new_tokens and tokens[-1] not in eos_token_ids:
        x0, position = tokens[-1], len(prompt_ids) + len(tokens) - 1
        if config.mode == "sirius":
            period = next(periods) if periods is not None else config.period
            assert isinstance(period, int)  # "auto" needs periods
            depth = min(period, max_new_tokens - len(tokens)) - 1
            tree = _draft(decoder, x0, position, neurons, config, depth, sampling)
            z: list[torch.Tensor] = []
            committed, path, record = _verify(decoder, tree, position, config, sampling, z)
            if following and record.drafted:  # without a draft F decodes alone, and nothing is followed
                sets = following.neurons_after(torch.stack(z), [0, *path])
                neurons = dataclasses.replace(neurons, sets=sets) if isinstance(neurons, Cascade) else sets
            record.cut = depth < period - 1
            committed = _until_eos(committed, eos_token_ids)
            record.cut |= len(committed) < record.committed
            record.committed = len(committed)
            records.append(record)
        else:
            committed = [choose(decoder.chain([x0], position, neurons if config.mode == "sparse" else None)[0])]
        tokens += committed
    return tokens, records


class Following:
    """What a set that follows the text goes by (SPEC section 2)."""

    def __init__(self, decoder: Decoder, z: list[torch.Tensor], kept: int) -> None:
        tokens = len(z[0])
        self.statistic = torch.stack([csparse_statistic(layer).square() / tokens for layer in z])
        self.down_squares = torch.stack([layer.down.float().square().sum(1) for layer in decoder.layers])
        self.kept = kept

    def neurons_after(self, z: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
        """z: float32 [L, m, I]; rows: those of tokens that joined the text."""
        joined = torch.tensor(rows, dtype=torch.int32)
        return list(ops.follow(z, joined, self.down_squares, self.statistic, self.kept, 2 ** (-1 / 32)))


def _prefill(
    decoder: Decoder, prompt_ids: Sequence[int], config: SiriusConfig, max_new_tokens: int, thresholds: Sequence[float] | None
) -> tuple[Neurons, Following | None, torch.Tensor]:
    """Step 1: F reads the prompt. Returns S's neurons, what they follow the text by if they do, and the logits after the
    prompt."""
    z: list[torch.Tensor] = []
    decoder.reset(len(prompt_ids) + max_new_tokens * config.tree_width + config.tree_width)
    logits, intermediate = decoder.chain(prompt_ids, 0, z=z)[-1], z[0].shape[1]
    kept = max(1, round(config.density_with() * intermediate))
    if thresholds is not None:
        return (lambda layer, gates: ops.select(gates, threshold=thresholds[layer])), None, logits
    if config.sparsity == "fsparse":
        return (lambda layer, gates: ops.select(gates, kept)), None, logits
    if config.sparsity == "cascade":
        kept, up, down = cascade_shares(config.density_with(), intermediate)
    following = Following(decoder, z, kept) if config.follow else None
    if following:
        sets = following.neurons_after(torch.stack(z), [])
    else:
        sets = [select_neurons(csparse_statistic(layer), kept / intermediate) for layer in z]
    if config.sparsity == "cascade":
        norms = [layer.down.float().square().sum(1).sqrt() for layer in decoder.layers]
        return Cascade(sets, norms, up, down), following, logits
    return sets, following, logits


def _draft(
    decoder: Decoder, x0: int, position: int, neurons: Neurons, config: SiriusConfig, depth: int, sampling: Sampling | None
) -> Tree:
    """Step 2: S consumes x0, then what it proposes, `depth` times, the leaves of a depth in one pass."""
    tree, leaves = Tree([x0]), [0]
    for _ in range(depth):
        logits = decoder.nodes(tree, leaves, position, neurons)
        if sampling:
            leaves = sampling.expand(tree, leaves, logits, config.tree_width)
            continue
        reach = torch.tensor([tree.scores[leaf] for leaf in leaves])
        prune = 0.95 if config.prune else 1.0
        tokens, parents, scores = ops.tree_expand(logits, reach, config.tree_width, config.score_temperature, prune)
        if len(tokens) == 0:
            break
        tree.parents += [leaves[parent] for parent in parents.tolist()]
        leaves = list(range(len(tree.tokens), len(tree.tokens) + len(tokens)))
        tree.tokens += tokens.tolist()
        tree.scores += scores.tolist()
    return tree


def _verify(
    decoder: Decoder, tree: Tree, position: int, config: SiriusConfig, sampling: Sampling | None, z: list[torch.Tensor]
) -> tuple[list[int], list[int], Period]:
    """Steps 3 to 5: F consumes the tree, rewriting its cache entries; those of the accepted path move together after x0. Each
    layer's z is appended to `z`. Returns the accepted tokens and F's own, the accepted nodes, and the period's record."""
    logits = decoder.nodes(tree, range(len(tree.tokens)), position, z=z)
    likelihoods, argmax, accepted = ops.accept(
        logits,
        torch.tensor(tree.tokens[1:], dtype=torch.int32),
        config.threshold,
        config.score_temperature,
        config.accept == "match",
        torch.tensor(tree.parents, dtype=torch.int32),
        torch.tensor(tree.scores),
    )
    if sampling:
        path, own = sampling.accept(tree, logits)
    else:
        path = accepted.tolist()
        own = int(argmax[path[-1]] if path else argmax[0])
    decoder.compact(position, [0, *path])
    committed = [tree.tokens[node] for node in path] + [own]
    depths = [len(tree.path(node)) for node in range(len(tree.tokens))]
    branch = path[-1] - depths.index(len(path)) if path else None
    period = Period(depths[-1], len(tree.tokens) - 1, len(path), branch, len(committed), False, likelihoods.tolist())
    return committed, path, period


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
    """`((n - 1) * density_sparse + 1) / AAL` (SPEC section 7), for a period that is fixed."""
    return ((period - 1) * sparse_density + 1) / advance_length


def corrected_fraction(periods: Sequence[Period]) -> float | None:
    """Tokens rejected and replaced over tokens committed (SPEC section 7): F's token of a period replaces a draft unless all of
    them were accepted, or the text ended before it. None without a period."""
    replaced = sum(period.accepted < period.drafted and period.committed == period.accepted + 1 for period in periods)
    committed = sum(period.committed for period in periods)
    return replaced / committed if committed else None


def rollback_length(periods: Sequence[Period]) -> float | None:
    """Drafted tokens thrown away per verification (SPEC section 7), those after an EOS among them. None without a period."""
    thrown_away = sum(period.nodes - min(period.accepted, period.committed) for period in periods)
    return thrown_away / len(periods) if periods else None
