"""Tiny random models of every supported architecture, prompts for them, and the ways to have them decoded."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

import sirius_ext
from sirius_ext import Engine, SiriusConfig, attach
from sirius_ext.decoding import reference

VOCAB = 149
_COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    # Large, so that logits are peaked: drafts are then accepted and rejected, and no two tokens are nearly as likely.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_CONFIGS = {
    # Heads of size 8, 16, 24 and 16.
    "llama": (transformers.LlamaConfig, {**_sizes(48, 101, 3, 6, 6), "tie_word_embeddings": True}),
    "llama3": (transformers.LlamaConfig, {**_sizes(64, 131, 3, 4, 2), "rope_parameters": _LLAMA3_ROPE}),
    "mistral": (transformers.MistralConfig, {**_sizes(72, 90, 2, 3, 1), "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {**_sizes(96, 144, 2, 6, 3), "tie_word_embeddings": True}),
}
NAMES = tuple(_CONFIGS)
WINDOW = 40  # tokens that a layer with a sliding window sees
# What each family adds to these: see models/families.py.
_CONFIGS |= {
    "mistral_windows": (transformers.MistralConfig, {**_sizes(72, 90, 2, 3, 1), "head_dim": 32, "sliding_window": WINDOW}),
    "qwen2_windows": (
        transformers.Qwen2Config,
        {**_sizes(96, 144, 3, 6, 3), "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {**_sizes(64, 131, 3, 4, 2), "head_dim": 24}),
    "smollm3": (transformers.SmolLM3Config, {**_sizes(64, 120, 4, 4, 2), "no_rope_layer_interval": 2}),
    "phi3": (
        transformers.Phi3Config,
        {
            **_sizes(64, 113, 3, 4, 2),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3_windows": (
        transformers.Phi3Config,
        {
            **_sizes(64, 113, 3, 4, 4),
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.5, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0],
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 128,
                "factor": 2.0,
            },
        },
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **_sizes(48, 100, 4, 4, 2),
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **_sizes(56, 120, 7, 4, 1),
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            **_sizes(64, 110, 3, 4, 2),
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
    ),
}
FAMILY_NAMES = tuple(name for name in _CONFIGS if name not in NAMES)


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> transformers.PreTrainedModel:
    """A random model; `config` overrides its configuration. Biases and norm weights, which start at 0 and 1, are random too."""
    make, values = _CONFIGS[name]
    torch.manual_seed(seed)
    attention = "eager" if name == "gemma2" else None  # torch's own leaves out the soft cap
    settings = make(**{**_COMMON, **values, **config})
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
            if "down_proj" in key:
                parameter.mul_(0.3)  # the sparse model then often agrees with the full one, and often does not
    model.generation_config.do_sample = False
    return model.eval().to(dtype)


def own_bits(**settings) -> SiriusConfig:
    """Settings with which S reads what F reads, as the reference has it."""
    return SiriusConfig(**{"draft_weights": "same", **settings})


def prompt(length: int) -> torch.Tensor:
    """int64 [1, length]; another one for every length."""
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


@functools.cache
def engine(name: str = "llama3", dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(tiny(name, dtype))


@functools.cache
def decoder(name: str) -> reference.Decoder:
    return reference.Decoder(tiny(name))


def full_text(engine: Engine, ids: torch.Tensor, count: int) -> list[int]:
    """What the full model says after a prompt."""
    out = engine.generate(ids, config=SiriusConfig(mode="full"), max_new_tokens=count)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    return out.sequences[0, ids.shape[1] :].tolist()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # no warpers


def by_call(model, config, ids=None, **settings):
    return model.generate(ids, custom_generate=sirius_ext.generate, sirius_config=config, **settings)


def by_attach(model, config, ids=None, **settings):
    with attach(model, config):
        return model.generate(ids, **settings)


def by_engine(model, config, ids=None, **settings):
    settings.setdefault("return_dict_in_generate", False)
    return Engine(model, config).generate(settings.pop("input_ids", ids), **settings)


every_way = pytest.mark.parametrize("way", [by_call, by_attach, by_engine], ids=lambda way: way.__name__)


class Collector:
    """A streamer that keeps what it gets: the prompt, then the tokens of each `put`."""

    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ends, "put after end"
        self.puts.append(value.clone())

    def end(self) -> None:
        self.ends += 1

    def check(self, ids: torch.Tensor, sequences: torch.Tensor) -> None:
        """The prompt came first, then exactly the tokens of the text, then one end."""
        first, *rest = self.puts
        assert torch.equal(first, ids)
        assert all(put.dim() == 1 and len(put) for put in rest)
        assert torch.cat(rest).tolist() == sequences[0, ids.shape[1] :].tolist()
        assert self.ends == 1
