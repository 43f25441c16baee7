"""A pass over all layers is the ops one after the other: with the same bits, whatever a family of models has."""

import dataclasses
import itertools

import pytest
import torch
from backends import assert_same_bits, in_turns, poisoned, randn
from model_files import supers_of

from sirius_ext import _C
from sirius_ext.decoding.sparsity import Kind
from sirius_ext.kernels import ops, q4
from sirius_ext.kernels.matrix import Matrix

HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 72, 100, 151, 6, 2, 24
CAPACITY, MAX_POSITION = 400, 500
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


@dataclasses.dataclass
class Family:
    """What a model of two layers has. eps and offset are those of every norm; windows, ropes: of each layer."""

    before: bool = True
    after: bool = False
    head_norms: bool = False
    bias: bool = False
    offset: float = 0.0
    activation: str = "silu"
    rotary_dim: int = HEAD_DIM
    windows: tuple[int, int] = (0, 0)
    ropes: tuple[int, int] = (0, 0)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(bias=True),
    "qwen3": Family(head_norms=True),
    "gemma2": Family(
        after=True, offset=1.0, activation="gelu_tanh", windows=(130, 0), embedding_scale=8.5, attention_softcap=5.0,
        logit_softcap=3.0,
    ),
    "gemma3": Family(
        after=True, head_norms=True, offset=1.0, activation="gelu_tanh", windows=(16, 0), ropes=(1, 0), embedding_scale=8.5
    ),
    "granite": Family(embedding_scale=12.0, residual_scale=0.22, logit_scale=0.125),
    "olmo2": Family(before=False, after=True),
    "norms on neither side": Family(before=False),
    "partial rotation": Family(rotary_dim=12),
    "a layer without rotation": Family(ropes=(0, -1), windows=(200, 0)),
}  # fmt: skip
EPS, SCALE = 1e-5, 0.2


class Layers:
    """Random weights of a family, and both ways through them. packed: makes the matrices of layers, those of embedding and LM
    head, and `down` if it is not as the layers' others, from plain ones."""

    def __init__(self, family, dtype, packed=(Matrix, Matrix)):
        self.family, self.dtype = family, dtype

        def weight(rows, cols, pack=None):
            pack = pack or packed[rows == VOCAB]
            return pack((randn(rows, cols, dtype=torch.float32) * cols**-0.5).to(dtype))

        def norm(present, width=HIDDEN):
            return randn(width, dtype=dtype) if present else None

        self.embedding, self.lm_head, self.final_norm = weight(VOCAB, HIDDEN), weight(VOCAB, HIDDEN), norm(True)
        self.layers = [
            {
                "before_attention": norm(family.before),
                "after_attention": norm(family.after),
                "before_mlp": norm(family.before),
                "after_mlp": norm(family.after),
                "q_norm": norm(family.head_norms, HEAD_DIM),
                "k_norm": norm(family.head_norms, HEAD_DIM),
                "qkv": [weight(rows * HEAD_DIM, HIDDEN) for rows in (HEADS, KV_HEADS, KV_HEADS)],
                "biases": [randn(rows * HEAD_DIM, dtype=dtype) if family.bias else None for rows in (HEADS, KV_HEADS, KV_HEADS)],
                "output": weight(HIDDEN, HEADS * HEAD_DIM),
                "gate": weight(INTERMEDIATE, HIDDEN),
                "up": weight(INTERMEDIATE, HIDDEN),
                "down": weight(INTERMEDIATE, HIDDEN, packed[-1] if len(packed) > 2 else None),
            }
            for _ in range(2)
        ]
        angles = torch.randn(2, MAX_POSITION, family.rotary_dim // 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def handle(self, functions):
        family = self.family
        norm = lambda weight: (0 if weight is None else weight.data_ptr(), EPS, family.offset)  # noqa: E731
        layers = [
            {name: norm(layer[name]) for name in layer if name.startswith(("before", "after")) or name.endswith("norm")}
            | {name: layer[name].raw for name in ("gate", "up", "down")}
            | {
                "qkv": [
                    (weight.raw, 0 if bias is None else bias.data_ptr()) for weight, bias in zip(layer["qkv"], layer["biases"])
                ],
                "output": (layer["output"].raw,),
                "window": family.windows[index],
                "rope": family.ropes[index],
            }
            for index, layer in enumerate(self.layers)
        ]
        return functions.Model(
            dtype=ops.DTYPES[self.dtype],
            embedding=self.embedding.raw,
            final_norm=norm(self.final_norm),
            lm_head=self.lm_head.raw,
            layers=layers,
            hidden=HIDDEN,
            intermediate=INTERMEDIATE,
            vocab=VOCAB,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            rotary_dim=family.rotary_dim,
            activation=ops.ACTIVATIONS[family.activation],
            embedding_scale=family.embedding_scale,
            residual_scale=family.residual_scale,
            attention_scale=SCALE,
            attention_softcap=family.attention_softcap,
            logit_scale=family.logit_scale,
            logit_softcap=family.logit_softcap,
        )

    def by_ops(self, tokens, positions, mask, prefix, caches, choose, fused):
        """Logits, and z of every layer.

        choose: makes a layer's neurons and z of the layer, the MLP's input and the layer's number.
        fused: the product of q, k and v is not rounded before it is rotated.
        """
        family, m = self.family, len(tokens)

        def normed(x, weight, residual=None):
            return x if weight is None else ops.rms_norm(x, weight, EPS, residual, offset=family.offset)

        def joined(x, after, product, *arguments):
            """What a product of attention or MLP makes joins x."""
            if after is None:
                return product(*arguments, residual=x, scale=family.residual_scale)
            return normed(product(*arguments), after, x)

        x = (self.embedding.dense()[tokens.long()] * torch.tensor(family.embedding_scale)).to(self.dtype)
        kept_z = []
        for index, layer in enumerate(self.layers):
            y = normed(x, layer["before_attention"])
            wide = torch.float32 if fused else self.dtype
            parts = [ops.linear(y, weight, bias, out_dtype=wide) for weight, bias in zip(layer["qkv"], layer["biases"])]
            qkv = torch.cat(parts, 1)
            rope, cache = family.ropes[index], [each[index] for each in caches]
            cos, sin = (table[rope] if rope >= 0 else table[0, :, :0].contiguous() for table in (self.cos, self.sin))
            slots = torch.arange(prefix, prefix + m, dtype=torch.int32)
            norms = {"q_norm": layer["q_norm"], "k_norm": layer["k_norm"], "eps": EPS, "offset": family.offset}
            entries = [each.to(wide) for each in cache]
            ops.rope_kv_write(qkv, cos, sin, positions, slots, *entries, **norms)
            for each, entry in zip(cache, entries):
                each.copy_(entry)
            q = qkv.to(self.dtype).view(m, -1, HEAD_DIM)[:, :HEADS]
            settings = {"positions": positions, "window": family.windows[index], "softcap": family.attention_softcap}
            attended = ops.tree_attention(q, *cache, prefix, mask, SCALE, **settings).flatten(1)
            x = joined(x, layer["after_attention"], ops.linear, attended, layer["output"])
            y = normed(x, layer["before_mlp"])
            chosen, z = choose(layer, y, index)
            kept_z.append(z)
            x = joined(x, layer["after_mlp"], ops.down, z, layer["down"], chosen)
        x = normed(x, self.final_norm)
        logits = ops.linear(x, self.lm_head, scale=family.logit_scale, softcap=family.logit_softcap, out_dtype=torch.float32)
        return logits, torch.stack(kept_z)


PARENTS = {
    "a token": torch.tensor([-1]),
    "a chain": torch.arange(-1, 6),
    "a tree": torch.tensor([-1, 0, 0, 0, 1, 2, 3, 4, 4]),
}


KEPT, KEPT_UP, KEPT_DOWN = 41, 29, 18


class Pass:
    """Inputs of one pass, and what it must give."""

    def __init__(self, family, shape, dtype, kind, fused=False, packed=(Matrix, Matrix)):
        self.layers, self.mask, self.kind = Layers(FAMILIES[family], dtype, packed), ops.tree_mask(PARENTS[shape].int()), kind
        self.m, self.prefix = len(self.mask), 300
        self.tokens = torch.randint(VOCAB, (self.m,), dtype=torch.int32)
        seen = torch.tensor([row.bit_count() for row in self.mask.flatten().tolist()], dtype=torch.int32)
        self.positions = self.prefix - 1 + seen
        self.caches = [randn(2, KV_HEADS, CAPACITY, HEAD_DIM, dtype=dtype) for _ in "kv"]
        self.neurons = torch.stack([torch.randperm(INTERMEDIATE)[:KEPT].sort().values.int() for _ in range(2)])
        self.norms = torch.rand(2, INTERMEDIATE)
        self.written = [cache.clone() for cache in self.caches]
        self.logits, self.z = self.layers.by_ops(
            self.tokens, self.positions, self.mask, self.prefix, self.written, self.choose, fused
        )

    def choose(self, layer, y, index):
        """The neurons of a layer, and its z."""
        activation = {"activation": self.layers.family.activation}
        if self.kind == Kind.CASCADE:
            among, taken = self.neurons[index], torch.empty(self.m, KEPT_DOWN, dtype=self.layers.dtype)
            gates = ops.gate(y, layer["gate"], among, **activation)
            wide = ops.select(gates, KEPT_UP, among=among, weights=self.norms[index])
            z = ops.up(y, layer["up"], gates, wide, spread=True)
            return ops.select(z, KEPT_DOWN, among=wide, weights=self.norms[index], taken=taken), taken
        if self.kind == Kind.LARGEST:
            gates = ops.gate(y, layer["gate"], **activation)
            chosen = ops.select(gates, KEPT)
            return chosen, ops.up(y, layer["up"], gates, chosen)
        chosen = self.neurons[index] if self.kind == Kind.LISTED else None
        return chosen, ops.gate_up(y, layer["gate"], layer["up"], chosen, **activation)

    def check(self, handle, base=None, **beside):
        """That `handle.step` gives the same. base: int32 [1], from where on positions and slots are counted."""
        m, start = self.m, 0 if base is None else int(base)
        listed = self.kind in (Kind.LISTED, Kind.CASCADE)
        kept = KEPT, self.norms.data_ptr(), KEPT_UP, KEPT_DOWN
        logits, argmax = poisoned(m, VOCAB, dtype=torch.float32), poisoned(m, dtype=torch.int32)
        z = poisoned(2, m, INTERMEDIATE, dtype=self.layers.dtype)
        workspace = torch.zeros(handle.workspace(m, CAPACITY), dtype=torch.uint8)
        caches, positions = [cache.clone() for cache in self.caches], self.positions - start
        if base is not None:
            beside["base"] = base.data_ptr()
        handle.step(
            tokens=self.tokens.data_ptr(),
            positions=positions.data_ptr(),
            cos=self.layers.cos.data_ptr(),
            sin=self.layers.sin.data_ptr(),
            max_position=MAX_POSITION,
            mask=self.mask.data_ptr(),
            mask_words=self.mask.shape[1],
            k_cache=caches[0].data_ptr(),
            v_cache=caches[1].data_ptr(),
            sparsity=(self.kind, self.neurons.data_ptr() if listed else 0, 0, *kept),
            logits=logits.tensor.data_ptr(),
            argmax=argmax.tensor.data_ptr(),
            workspace=workspace.data_ptr(),
            z=z.tensor.data_ptr() if self.kind == Kind.DENSE else 0,
            num_rows=m,
            first_slot=self.prefix - start,
            prefix=self.prefix - start,
            capacity=CAPACITY,
            **beside,
        )
        assert_same_bits(logits.check(), self.logits)
        assert argmax.check().tolist() == self.logits.argmax(1).tolist()
        for cache, wanted in zip(caches, self.written):
            assert_same_bits(cache, wanted)
        if self.kind == Kind.DENSE:
            assert_same_bits(z.check(), self.z)


KINDS = {"full": Kind.DENSE, "listed": Kind.LISTED, "largest": Kind.LARGEST, "cascade": Kind.CASCADE}
# Attention is the same whatever the MLP does: of the cascade a family with norms around the MLP and another activation will do.
SOME = [(family, shape, "cascade") for family in ("llama", "gemma3") for shape in PARENTS]


@pytest.mark.parametrize(
    ("family", "shape", "kind"), [*itertools.product(FAMILIES, PARENTS, ("full", "listed", "largest")), *SOME]
)
def test_a_pass_is_its_ops(isa, dtype, family, shape, kind):
    each = Pass(family, shape, dtype, KINDS[kind])
    handle = each.layers.handle(_C)
    for threads in (1, 2, 3):
        each.check(handle, threads=threads)


@pytest.mark.parametrize(
    ("family", "shape", "kind"),
    [
        *((family, *case) for family in FAMILIES for case in (("a token", "full"), ("a chain", "listed"), ("a tree", "full"))),
        *((family, "a tree", "largest") for family in FAMILIES),
        *SOME[1:-1:3],
    ],
)
def test_a_pass_of_cuda_is_its_ops(cuda_functions, dtype, family, shape, kind):
    check_on_cuda(cuda_functions, Pass(family, shape, dtype, KINDS[kind], fused=not FAMILIES[family].head_norms))


def check_on_cuda(cuda_functions, each):
    handle, counters = each.layers.handle(cuda_functions), torch.zeros(cuda_functions.counters, dtype=torch.int32)
    for base in (None, torch.tensor([each.prefix], dtype=torch.int32)):
        each.check(handle, base, counters=counters.data_ptr(), stream=0)
        assert not counters.any()


def eight_bits(numbers):
    return Matrix(numbers).in_eight_bits()


def four_bits(numbers):
    return eight_bits(numbers).in_four_bits()


# The matrices of the layers; embedding and LM head.
PACKED = {
    "eight bits": (eight_bits, eight_bits),
    "four bits": (four_bits, four_bits),
    "eight bits, and a plain head": (eight_bits, Matrix),
    "four bits, and a head of eight": (four_bits, eight_bits),
}


def pairs(numbers):
    return Matrix.of_groups(q4.round_to_groups(numbers))


def supers(numbers):
    return Matrix.of_groups(supers_of(numbers))


def in_turn(*forms):
    """Each matrix in another format than the one before it: q, k and v, gate and up."""
    turns = itertools.cycle(forms)
    return lambda numbers: next(turns)(numbers)


# Of four bits; and the matrices of `down`.
FOUR_BITS = {
    "q4": lambda: (pairs, pairs, lambda numbers: Matrix.of_groups(q4.round_to_groups(numbers.t()), transposed=True)),
    "q4_k": lambda: (supers, eight_bits, lambda numbers: Matrix.of_groups(supers_of(numbers.t()), transposed=True)),
    "all that a file may have": lambda: (in_turn(supers, eight_bits, pairs), supers, eight_bits),
}
# (family, tokens, neurons): heads that are normalised or not, a scale of the embedding, biases.
CASES = [
    ("qwen2", "a token", "full"),
    ("gemma3", "a chain", "listed"),
    ("llama", "a tree", "full"),
    ("granite", "a tree", "largest"),
]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(("family", "shape", "kind"), CASES)
def test_a_pass_of_packed_weights_is_its_ops(isa, dtype, family, shape, kind, packed):
    each = Pass(family, shape, dtype, KINDS[kind], packed=PACKED[packed])
    each.check(each.layers.handle(_C), threads=2)


@pytest.mark.parametrize("packed", FOUR_BITS)
@pytest.mark.parametrize(("family", "shape", "kind"), CASES)
def test_a_pass_of_four_bits_is_its_ops(isa, dtype, family, shape, kind, packed):
    each = Pass(family, shape, dtype, KINDS[kind], packed=FOUR_BITS[packed]())
    for threads in (1, 3):
        each.check(each.layers.handle(_C), threads=threads)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(("family", "shape", "kind"), CASES)
def test_a_pass_of_packed_weights_of_cuda_is_its_ops(cuda_functions, dtype, family, shape, kind, packed):
    fused = not FAMILIES[family].head_norms
    check_on_cuda(cuda_functions, Pass(family, shape, dtype, KINDS[kind], fused, PACKED[packed]))


@pytest.mark.parametrize(("case", "packed"), in_turns(3, CASES, list(FOUR_BITS)), ids=str)
def test_a_pass_of_four_bits_of_cuda_is_its_ops(cuda_functions, dtype, case, packed):
    """Also where q, k and v, or gate and up, are of formats that no kernel has in common."""
    family, shape, kind = case
    fused = not FAMILIES[family].head_norms
    check_on_cuda(cuda_functions, Pass(family, shape, dtype, KINDS[kind], fused, FOUR_BITS[packed]()))
