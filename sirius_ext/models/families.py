"""What a model family looks like, so that one generic decoder layer can compute all of them.

A `Family` says where in a `transformers` model of the family everything is; `Description` is what that comes to for one config,
as the decoder layers of every backend read it. A family that has nothing new is one entry in `FAMILIES`.

Models, their modules and configs are `Any` here: what attributes they have is the family's, and no type says it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Rope types whose angles do not depend on the length of the text; longrope's do not up to the length that it was trained with.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


class Activation(enum.IntEnum):
    """Of an MLP's gate; as in csrc/params.h."""

    SILU = 0
    GELU_TANH = 1


ACTIVATIONS = {"silu": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}


class Slides(enum.Enum):
    """Which layers of a family have a sliding window, whatever else a config says."""

    NONE = enum.auto()
    ALL = enum.auto()  # if the config has a window
    BY_TYPE = enum.auto()  # those that layer_types names


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the parts of a decoder stand in a `transformers` model: names of modules in a layer, names of settings in a config.

    examples: models of the family.
    before_attention, after_attention, before_mlp, after_mlp: the layer's RMSNorms; None where there is none.
    norm_offset: what is added to every norm's weight.
    head_norms: whether each head of q and k is normalised, by `q_norm` and `k_norm`.
    fused: whether q, k and v are one matrix, and gate and up another.
    slides: which layers have a sliding window.
    partial: whether angles may turn the first elements of a head alone.
    unread: settings that its configs have and `transformers`' modules do not read; they must be None.
    activation: the setting that names the MLP's activation.
    embedding: the class of the embedding.
    embedding_scale, residual_scale, attention_softcap, logit_softcap: made of the config.
    logit_scale: of the logits before the soft cap, made of the config.
    """

    examples: str
    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None
    norm_offset: float = 0.0
    head_norms: bool = False
    fused: bool = False
    slides: Slides = Slides.NONE
    partial: bool = False
    unread: tuple[str, ...] = ()
    activation: str = "hidden_act"
    embedding: str = "Embedding"
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    attention_softcap: Callable[[Any], float | None] = lambda config: None
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    logit_softcap: Callable[[Any], float | None] = lambda config: None

    @property
    def projections(self) -> tuple[str, ...]:
        """The layer's linear modules."""
        if self.fused:
            return "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
        attention = (f"self_attn.{name}_proj" for name in "qkvo")
        return *attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"

    @property
    def norms(self) -> tuple[str, ...]:
        """The layer's norms."""
        heads = ("self_attn.q_norm", "self_attn.k_norm") if self.head_norms else ()
        return *filter(None, (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)), *heads


_GEMMA = Family(
    "Gemma 2",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_offset=1.0,
    slides=Slides.BY_TYPE,
    activation="hidden_activation",
    embedding="Gemma2TextScaledWordEmbedding",
    embedding_scale=lambda config: config.hidden_size**0.5,
    attention_softcap=lambda config: config.attn_logit_softcapping,
    logit_softcap=lambda config: config.final_logit_softcapping,
)

FAMILIES = {
    "llama": Family("Llama 2 and 3, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama"),
    "mistral": Family("Mistral, Mistral Nemo, Mistral Small 3", slides=Slides.ALL),
    "qwen2": Family("Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", slides=Slides.BY_TYPE),
    "qwen3": Family("Qwen3", head_norms=True, slides=Slides.BY_TYPE),
    "smollm3": Family("SmolLM3", slides=Slides.BY_TYPE),
    "phi3": Family("Phi-3, Phi-4, Phi-4-mini", fused=True, slides=Slides.ALL, partial=True),
    "gemma2": _GEMMA,
    "gemma3_text": dataclasses.replace(
        _GEMMA,
        examples="Gemma 3, text",
        head_norms=True,
        embedding="Gemma3TextScaledWordEmbedding",
        unread=("attn_logit_softcapping",),
        attention_softcap=lambda config: None,
    ),
    "granite": Family(
        "Granite 3",
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1 / config.logits_scaling,
    ),
}

# Why a model that people try is not supported. The sparse model needs gated dense MLPs, which all tokens share.
_EXPERTS = "its MLPs are mixtures of experts, and Sirius needs dense ones"
_LINEAR = "its attention is linear in some layers, whose state cannot be overwritten token by token"
_REASONS = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoe"), _EXPERTS),
    **dict.fromkeys(("olmoe", "llama4", "llama4_text", "glm4_moe", "phimoe", "dbrx", "ernie4_5_moe"), _EXPERTS),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "kimi_linear", "minimax"), _LINEAR),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "jamba", "granitemoehybrid", "lfm2", "nemotron_h"), _LINEAR),
    **dict.fromkeys(("gpt2", "gpt_neox", "opt", "phi", "bloom"), "its MLPs have no gate"),
    "gemma3": "it is the model for text and images; its text model alone, a Gemma3ForCausalLM, is supported",
    "mistral3": "it is the model for text and images; a MistralForCausalLM is supported",
    "gemma3n": "its layers have more than attention and a gated MLP",
}


@dataclasses.dataclass(frozen=True)
class Description:
    """One model's decoder, as a generic layer reads it.

    norm_offset: added to every norm's weight. eps: of every norm.
    embedding_scale: of a token's embedding. residual_scale: of what attention and MLP add to the residual stream.
    attention_scale: of q . k. attention_softcap, logit_softcap: c of `c * tanh(x / c)`; 0: none. logit_scale: before that.
    rotary_dim: elements of a head that are rotated, the first ones.
    windows: of each layer, how many tokens back it sees, its own included; 0: all.
    ropes: of each layer, which table of angles it uses; -1: none.
    context: tokens that a text may have.
    """

    family: Family
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    context: int
    activation: Activation
    eps: float
    norm_offset: float
    embedding_scale: float
    residual_scale: float
    attention_scale: float
    attention_softcap: float
    logit_scale: float
    logit_softcap: float
    windows: tuple[int, ...]
    ropes: tuple[int, ...]

    @property
    def narrowest(self) -> int:
        """The smallest window of a layer; 0 if all layers see everything."""
        return min((window for window in self.windows if window), default=0)


def check_supported(config: Any) -> Family:
    """The family of a model of this `transformers` config. ValueError, with what is supported, if it cannot be decoded here."""
    model_type: Any = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)
    if family is None:
        reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
        known = "; ".join(f"{name} ({each.examples})" for name, each in FAMILIES.items())
        raise ValueError(f"model: architecture {model_type!r} is not supported{reason}; supported are {known}")
    _check_numbers(config)
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"model: {family.activation} {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    if getattr(config, "mlp_bias", False):
        raise ValueError("model: mlp_bias is not supported")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("model: use_bidirectional_attention is not supported: a text is decoded from left to right")
    for parameters in _ropes(config):
        rope_type = parameters.get("rope_type", "default")
        part = parameters.get("partial_rotary_factor", 1.0)
        if not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ValueError(f"model: partial_rotary_factor: expected a number of more than 0, at most 1, got {part!r}")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ValueError(f"model: rope type {rope_type!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}")
    for name in family.unread:
        if (value := getattr(config, name, None)) is not None:
            raise ValueError(f"model: {name}: expected None, since transformers does not read it in {model_type}, got {value!r}")
    _check_windows(config, family)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "model: quantized weights are not supported; load the model in bfloat16, float16 or float32, or one of AWQ, GPTQ or "
            "compressed-tensors in four bits with weights='q4'"
        )
    return family


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The rope parameters of every kind of layer."""
    parameters = config.rope_parameters or {}
    if any(isinstance(each, dict) for each in parameters.values()):
        yield from (each for each in parameters.values() if each is not None)
    else:
        yield parameters


def _layer_types(config: Any, family: Family) -> list[str]:
    """Of each layer."""
    if family.slides == Slides.BY_TYPE:
        return list(config.layer_types)
    slides = family.slides == Slides.ALL and config.sliding_window is not None
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def _check_windows(config: Any, family: Family) -> None:
    """ValueError for windows of which transformers' masks and its caches read something different, or that have no size."""
    types = _layer_types(config, family)
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"model: layers of {kind} are not supported; supported are full and sliding attention")
    said, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if said is not None and list(said) != types:
        raise ValueError(f"model: layer_types: expected {types}, as models of {config.model_type} are, got {list(said)}")
    if "sliding_attention" in types and window is None:
        raise ValueError("model: sliding_window: expected an integer of at least 1, since layers slide by layer_types, got None")
    if family.slides == Slides.NONE and window is not None and window < context_length(config):
        raise ValueError(
            f"model: sliding_window: expected None, since attention in {config.model_type} sees all tokens, got {window!r}"
        )


# Numbers that only some families have: what is divided by, or whose root is taken, and what is multiplied with.
_POSITIVE = ("logits_scaling", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_FACTORS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")


def _check_numbers(config: Any) -> None:
    """transformers takes what it is given, and computes nonsense or fails somewhere inside."""
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    names += [
        "max_position_embeddings",
        *(name for name in ("head_dim", "sliding_window") if getattr(config, name, None) is not None),
    ]
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"model: {name}: expected an integer of at least 1, got {value!r}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"model: num_key_value_heads: expected a divisor of the {config.num_attention_heads} heads, "
            f"got {config.num_key_value_heads}"
        )
    thetas = [("rope_theta", parameters.get("rope_theta", 1.0), "more than 0") for parameters in _ropes(config)]
    positive = [(name, getattr(config, name, None), "more than 0") for name in _POSITIVE]
    numbers = [("rms_norm_eps", config.rms_norm_eps, "at least 0"), *thetas, *(each for each in positive if each[1] is not None)]
    for name, value, least in numbers:
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf or (value == 0 and least == "more than 0"):
            raise ValueError(f"model: {name}: expected a number of {least}, got {value!r}")
    for name in _FACTORS:
        if not math.isfinite(value := getattr(config, name, 1.0)):
            raise ValueError(f"model: {name}: expected a finite number, got {value!r}")


def context_length(config: Any) -> int:
    """Tokens that a text may have: the trained positions, and with longrope those up to which its angles stay what they are."""
    lengths: list[int] = [config.max_position_embeddings]
    for parameters in _ropes(config):
        if parameters.get("rope_type") == "longrope":
            lengths.append(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(lengths)


def describe(model: Any) -> tuple[Description, list[tuple[torch.Tensor, float]]]:
    """The description of a loaded `transformers` model, and its tables of rope: inverse frequencies float32 [rotary_dim / 2]
    and the factor of the cosines and sines."""
    config = model.config
    family = check_supported(config)
    body = model.model
    layers, types, context = list(body.layers), _layer_types(config, family), context_length(config)
    if len(types) < len(layers):
        raise ValueError(f"model: layer_types: expected one for each of the {len(layers)} layers, got {len(types)}")
    kinds = [""] if hasattr(body.rotary_emb, "inv_freq") else sorted(set(types))
    prefixes = [f"{kind}_" if kind else "" for kind in kinds]
    tables = [_table(body.rotary_emb, prefix) for prefix in prefixes]
    attention = layers[0].self_attn
    _check_angles(family, config, [2 * len(frequencies) for frequencies, _ in tables], attention.head_dim)
    windows, ropes = [], []
    for layer, kind in zip(layers, types):
        window = (config.sliding_window or 0) if kind == "sliding_attention" else 0
        windows.append(window if window < context else 0)
        rotates = bool(getattr(layer.self_attn, "use_rope", True))
        ropes.append((kinds.index(kind) if kinds != [""] else 0) if rotates else -1)
    return (
        Description(
            family=family,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            rotary_dim=2 * len(tables[0][0]),
            context=context,
            activation=ACTIVATIONS[getattr(config, family.activation)],
            eps=config.rms_norm_eps,
            norm_offset=family.norm_offset,
            embedding_scale=_embedding_scale(family, body, config),
            residual_scale=family.residual_scale(config),
            attention_scale=attention.scaling,
            attention_softcap=family.attention_softcap(config) or 0.0,
            logit_scale=family.logit_scale(config),
            logit_softcap=family.logit_softcap(config) or 0.0,
            windows=tuple(windows),
            ropes=tuple(ropes),
        ),
        tables,
    )


def _table(rotary: Any, prefix: str) -> tuple[torch.Tensor, float]:
    """A table of angles, in memory of its own. After a call with a long text `inv_freq` of longrope has the long factors, which
    transformers puts there in place; `original_inv_freq` stays what it was."""
    kinds = rotary.rope_type
    kind = kinds[prefix.removesuffix("_")] if isinstance(kinds, dict) else kinds
    frequencies = getattr(rotary, f"{prefix}{'original_' if kind == 'longrope' else ''}inv_freq")
    return frequencies.float().clone(), float(getattr(rotary, f"{prefix}attention_scaling"))


def _check_angles(family: Family, config: Any, turned: list[int], head_dim: int) -> None:
    """turned: elements of a head, for each table of angles."""
    for count in turned:
        if count != head_dim and not (family.partial and count <= head_dim):
            part = ", or fewer" if family.partial else ""
            raise ValueError(
                f"model: rope_parameters: expected angles that turn a head's {head_dim} elements{part}, got {count} "
                "(partial_rotary_factor, or an odd size)"
            )


def _embedding_scale(family: Family, body: Any, config: Any) -> float:
    """A scale that is the embedding module's own is rounded as activations are; others are not."""
    scale = family.embedding_scale(config)
    return float(torch.tensor(scale, dtype=body.norm.weight.dtype)) if hasattr(body.embed_tokens, "embed_scale") else scale
