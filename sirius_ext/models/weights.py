"""The weights of a loaded `transformers` model, checked and laid out as the kernels read them; nothing is stored twice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math

import torch
from torch import nn

from ..kernels.dispatch import check_device
from ..kernels.matrix import Matrix
from ..kernels.ops import DTYPES

SUPPORTED_MODEL_TYPES = {
    "llama": "Llama 2 and 3, SmolLM2, TinyLlama",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
}
# Rope types whose angles do not depend on the length of the text.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_supported(config) -> None:
    """ValueError, with a list of what is supported, if a model of this `transformers` config cannot be decoded here."""
    model_type = getattr(config, "model_type", None)
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = "; ".join(f"{name} ({examples})" for name, examples in SUPPORTED_MODEL_TYPES.items())
        raise ValueError(f"model: architecture {model_type!r} is not supported; supported are {known}")
    _check_numbers(config)
    if config.hidden_act != "silu":
        raise ValueError(f"model: hidden_act {config.hidden_act!r} is not supported; supported is silu")
    if getattr(config, "mlp_bias", False):
        raise ValueError("model: mlp_bias is not supported")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"model: rope type {rope_type!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("model: quantized weights are not supported; load the model in bfloat16, float16 or float32")


def _check_numbers(config) -> None:
    """transformers takes what it is given, and computes nonsense or fails somewhere inside."""
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"model: {name}: expected an integer of at least 1, got {value!r}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"model: num_key_value_heads: expected a divisor of the {config.num_attention_heads} heads, "
            f"got {config.num_key_value_heads}"
        )
    rope_theta = (config.rope_parameters or {}).get("rope_theta", 1.0)
    for name, value, least in (("rms_norm_eps", config.rms_norm_eps, "at least 0"), ("rope_theta", rope_theta, "more than 0")):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf or (value == 0 and least == "more than 0"):
            raise ValueError(f"model: {name}: expected a number of {least}, got {value!r}")


def context_length(config) -> int:
    """Tokens that a text may have: the trained positions, and no more than a sliding window, up to which it changes nothing."""
    return min(config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's tensors; H hidden, I intermediate, D head size. Biases are None where the model has none."""

    input_norm: torch.Tensor  # [H]
    post_norm: torch.Tensor  # [H]
    q: torch.Tensor  # [heads * D, H]
    q_bias: torch.Tensor | None
    k: torch.Tensor  # [kv_heads * D, H]
    k_bias: torch.Tensor | None
    v: torch.Tensor  # [kv_heads * D, H]
    v_bias: torch.Tensor | None
    output: torch.Tensor  # [H, heads * D]
    output_bias: torch.Tensor | None
    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [I, H]: down_proj transposed

    @property
    def qkv(self) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
        """Weight and bias of the projections to q, k and v."""
        return (self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias)

    def arguments(self, eps: float) -> dict[str, object]:
        """The fields of the extension's `LayerWeights`."""
        return {
            "before_attention": (self.input_norm.data_ptr(), eps),
            "before_mlp": (self.post_norm.data_ptr(), eps),
            "qkv": [_projection(weight, bias) for weight, bias in self.qkv],
            "output": _projection(self.output, self.output_bias),
            "gate": Matrix(self.gate).raw,
            "up": Matrix(self.up).raw,
            "down": Matrix(self.down).raw,
        }


def _projection(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[object, int]:
    return Matrix(weight).raw, 0 if bias is None else bias.data_ptr()


class Weights:
    """The tensors of a `transformers` causal language model of a supported architecture, which it goes on sharing with the model.

    Every matrix is stored neuron by neuron. `down_proj` is the one that is not: its storage is transposed in place of the
    original, and the model's own parameter becomes a view of it, so the model works as before; `restore` undoes that.

    ValueError if the model is not supported, not all on one device that this build has kernels for, or not of one dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        check_supported(model.config)
        _check_modules(model)
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.hidden, self.intermediate = config.hidden_size, config.intermediate_size
        self.vocab, self.eps = model.lm_head.weight.shape[0], config.rms_norm_eps
        self.context = context_length(config)
        self.dtype = model.lm_head.weight.dtype
        self.device = model.lm_head.weight.device
        self._check_placement(model)

        body = model.model
        self.embedding = _plain(body.embed_tokens.weight)
        self.lm_head = _plain(model.lm_head.weight)
        self.final_norm = _plain(body.norm.weight)
        self.inv_freq = body.rotary_emb.inv_freq.float()
        self.rope_scale = float(body.rotary_emb.attention_scaling)
        self.layers = [_layer(layer) for layer in body.layers]
        self._addresses = _addresses(model)

    def _check_placement(self, model: nn.Module) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model: expected float32, float16 or bfloat16 weights, got {self.dtype}")
        check_device("model", self.device)
        for name, parameter in model.named_parameters():
            if parameter.device != self.device:
                raise ValueError(
                    f"model: expected every weight on {self.device}, as lm_head is, but {name} is on {parameter.device}"
                )
            if parameter.dtype != self.dtype:
                raise ValueError(f"model: expected one dtype, but {name} is {parameter.dtype} and lm_head {self.dtype}")

    @property
    def num_parameters(self) -> int:
        """All parameters, the embedding included, tied ones counted once."""
        attention = sum(
            tensor.numel()
            for layer in self.layers
            for tensor in (*itertools.chain(*layer.qkv), layer.output, layer.output_bias)
            if tensor is not None
        )
        norms = (2 * len(self.layers) + 1) * self.hidden
        embeddings = self.embedding.numel() * (1 if self.embedding.data_ptr() == self.lm_head.data_ptr() else 2)
        return attention + norms + embeddings + self.num_mlp_parameters

    @property
    def num_mlp_parameters(self) -> int:
        return 3 * self.intermediate * self.hidden * len(self.layers)

    @functools.cached_property
    def down_squares(self) -> torch.Tensor:
        """||down_i||_2^2 of every neuron, float32 [layers, I]: what a sparse model that follows the text weighs it by."""
        return torch.stack([layer.down.float().square().sum(-1) for layer in self.layers])

    def fingerprint(self) -> str:
        """Tells models apart, and is the same for one model in float32 and in bfloat16."""
        digest = hashlib.sha256(repr((len(self.layers), self.hidden, self.intermediate, self.vocab)).encode())
        for layer in self.layers:
            digest.update(layer.gate[:4].bfloat16().view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def dtype_code(self) -> int:
        """The extension's name for the dtype."""
        return DTYPES[self.dtype]

    def arguments(self) -> dict[str, object]:
        """The fields of the extension's `ModelWeights`."""
        return {
            "dtype": self.dtype_code,
            "embedding": Matrix(self.embedding).raw,
            "final_norm": (self.final_norm.data_ptr(), self.eps),
            "lm_head": Matrix(self.lm_head).raw,
            "layers": [layer.arguments(self.eps) for layer in self.layers],
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "vocab": self.vocab,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rotary_dim": self.head_dim,
            "attention_scale": self.head_dim**-0.5,
        }

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model still uses these very tensors (it does not after `model.to(...)`, say)."""
        return _addresses(model) == self._addresses


def restore(model: nn.Module) -> None:
    """Give `down_proj` its own layout back; values, shapes and strides are then what they were before `Weights(model)`."""
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        weight.data = weight.data.contiguous()


def _plain(parameter: nn.Parameter) -> torch.Tensor:
    if not parameter.data.is_contiguous():
        parameter.data = parameter.data.contiguous()
    return parameter.data


def _layer(layer: nn.Module) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def bias(linear: nn.Linear) -> torch.Tensor | None:
        return None if linear.bias is None else _plain(linear.bias)

    down = mlp.down_proj.weight
    if not down.data.t().is_contiguous():
        down.data = down.data.t().contiguous().t()
    return Layer(
        input_norm=_plain(layer.input_layernorm.weight),
        post_norm=_plain(layer.post_attention_layernorm.weight),
        q=_plain(attention.q_proj.weight),
        q_bias=bias(attention.q_proj),
        k=_plain(attention.k_proj.weight),
        k_bias=bias(attention.k_proj),
        v=_plain(attention.v_proj.weight),
        v_bias=bias(attention.v_proj),
        output=_plain(attention.o_proj.weight),
        output_bias=bias(attention.o_proj),
        gate=_plain(mlp.gate_proj.weight),
        up=_plain(mlp.up_proj.weight),
        down=down.data.t(),
    )


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def _check_modules(model: nn.Module) -> None:
    """ValueError unless this is a causal language model whose matrices are plain linear layers. Changes nothing."""
    if not isinstance(getattr(model, "lm_head", None), nn.Module):
        raise ValueError(f"model: expected a causal language model with an lm_head, got {type(model).__name__}")
    embedding = model.model.embed_tokens
    if type(embedding) is not nn.Embedding:
        raise ValueError(f"model: expected embed_tokens to be a plain nn.Embedding, got {type(embedding).__name__}")
    modules = {"lm_head": model.lm_head}
    for layer in model.model.layers:
        modules |= {name: getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
        modules |= {name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        for name, module in modules.items():
            if type(module) is not nn.Linear:
                kind = type(module).__name__
                raise ValueError(
                    f"model: expected {name} to be a plain nn.Linear, got {kind} (merge adapters first, with merge_and_unload)"
                )
    if model.lm_head.bias is not None:
        raise ValueError("model: expected an lm_head without a bias, got one")
