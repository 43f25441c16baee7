"""A pass over all layers is the ops one after the other: with the same bits, whatever a family of models has."""

import dataclasses

import pytest
import torch
from backends import assert_same_bits, poisoned, randn

from sirius_ext import _C
from sirius_ext.decoding.sparsity import Kind
from sirius_ext.kernels import ops
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
    """Random weights of a family, and both ways through them."""

    def __init__(self, family, dtype):
        self.family, self.dtype = family, dtype

        def weight(rows, cols):
            return (randn(rows, cols, dtype=torch.float32) * cols**-0.5).to(dtype)

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
                "down": weight(INTERMEDIATE, HIDDEN),
            }
            for _ in range(2)
        ]
        angles = torch.randn(2, MAX_POSITION, family.rotary_dim // 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def handle(self):
        family = self.family
        norm = lambda weight: (0 if weight is None else weight.data_ptr(), EPS, family.offset)  # noqa: E731
        layers = [
            {name: norm(layer[name]) for name in layer if name.startswith(("before", "after")) or name.endswith("norm")}
            | {name: Matrix(layer[name]).raw for name in ("gate", "up", "down")}
            | {
                "qkv": [
                    (Matrix(weight).raw, 0 if bias is None else bias.data_ptr())
                    for weight, bias in zip(layer["qkv"], layer["biases"])
                ],
                "output": (Matrix(layer["output"]).raw,),
                "window": family.windows[index],
                "rope": family.ropes[index],
            }
            for index, layer in enumerate(self.layers)
        ]
        return _C.Model(
            dtype=ops.DTYPES[self.dtype],
            embedding=Matrix(self.embedding).raw,
            final_norm=norm(self.final_norm),
            lm_head=Matrix(self.lm_head).raw,
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

    def by_ops(self, tokens, positions, mask, prefix, caches, neurons):
        """Logits, and z of every layer."""
        family, m = self.family, len(tokens)

        def normed(x, weight, residual=None):
            return x if weight is None else ops.rms_norm(x, weight, EPS, residual, offset=family.offset)

        def joined(x, after, product, *arguments):
            """What a product of attention or MLP makes joins x."""
            if after is None:
                return product(*arguments, residual=x, scale=family.residual_scale)
            return normed(product(*arguments), after, x)

        x = (self.embedding[tokens.long()].float() * torch.tensor(family.embedding_scale)).to(self.dtype)
        kept_z = []
        for index, layer in enumerate(self.layers):
            y = normed(x, layer["before_attention"])
            qkv = torch.cat([ops.linear(y, weight, bias) for weight, bias in zip(layer["qkv"], layer["biases"])], 1)
            rope, cache = family.ropes[index], [each[index] for each in caches]
            cos, sin = (table[rope] if rope >= 0 else table[0, :, :0].contiguous() for table in (self.cos, self.sin))
            slots = torch.arange(prefix, prefix + m, dtype=torch.int32)
            norms = {"q_norm": layer["q_norm"], "k_norm": layer["k_norm"], "eps": EPS, "offset": family.offset}
            ops.rope_kv_write(qkv, cos, sin, positions, slots, *cache, **norms)
            q = qkv.view(m, -1, HEAD_DIM)[:, :HEADS]
            settings = {"positions": positions, "window": family.windows[index], "softcap": family.attention_softcap}
            attended = ops.tree_attention(q, *cache, prefix, mask, SCALE, **settings).flatten(1)
            x = joined(x, layer["after_attention"], ops.linear, attended, layer["output"])
            y = normed(x, layer["before_mlp"])
            chosen = None if neurons is None else neurons[index]
            z = ops.gate_up(y, layer["gate"], layer["up"], chosen, activation=family.activation)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", PARENTS)
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "listed"])
def test_a_pass_is_its_ops(isa, dtype, family, shape, sparse):
    layers, mask = Layers(FAMILIES[family], dtype), ops.tree_mask(PARENTS[shape].int())
    m, prefix = len(mask), 300
    tokens = torch.randint(VOCAB, (m,), dtype=torch.int32)
    positions = prefix - 1 + torch.tensor([row.bit_count() for row in mask.flatten().tolist()], dtype=torch.int32)
    caches = [randn(2, KV_HEADS, CAPACITY, HEAD_DIM, dtype=dtype) for _ in "kv"]
    neurons = torch.stack([torch.randperm(INTERMEDIATE)[:41].sort().values.int() for _ in range(2)]) if sparse else None
    written = [cache.clone() for cache in caches]
    expected, expected_z = layers.by_ops(tokens, positions, mask, prefix, written, neurons)

    handle, logits, argmax = layers.handle(), poisoned(m, VOCAB, dtype=torch.float32), poisoned(m, dtype=torch.int32)
    z, workspace = poisoned(2, m, INTERMEDIATE, dtype=dtype), torch.zeros(handle.workspace(m, CAPACITY), dtype=torch.uint8)
    for threads in (1, 2, 3):
        here = [cache.clone() for cache in caches]
        handle.step(
            tokens=tokens.data_ptr(),
            positions=positions.data_ptr(),
            cos=layers.cos.data_ptr(),
            sin=layers.sin.data_ptr(),
            max_position=MAX_POSITION,
            mask=mask.data_ptr(),
            mask_words=mask.shape[1],
            k_cache=here[0].data_ptr(),
            v_cache=here[1].data_ptr(),
            sparsity=(Kind.LISTED, neurons.data_ptr(), 0, 41) if sparse else (Kind.DENSE,),
            logits=logits.tensor.data_ptr(),
            argmax=argmax.tensor.data_ptr(),
            workspace=workspace.data_ptr(),
            z=0 if sparse else z.tensor.data_ptr(),
            num_rows=m,
            first_slot=prefix,
            prefix=prefix,
            capacity=CAPACITY,
            threads=threads,
        )
        assert_same_bits(logits.check(), expected)
        assert argmax.check().tolist() == expected.argmax(1).tolist()
        for cache, wanted in zip(here, written):
            assert_same_bits(cache, wanted)
        if not sparse:
            assert_same_bits(z.check(), expected_z)
