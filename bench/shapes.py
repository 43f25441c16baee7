"""Sizes of published models, and models of these sizes with random weights: what a token costs does not depend on the values."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sirius_ext.models.packed import pack


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """All that are stored, norms left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.vocab * self.hidden * (1 if self.tied else 2)


SHAPES = {
    "tiny": Shape(64, 131, 2, 4, 2, 149),  # for tests
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151936, tied=True),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}
MAX_POSITIONS = 1 << 15


def shape_of(name: str) -> Shape:
    """ValueError if there is none of that name."""
    if name not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_model(name: str, device: torch.device, dtype: torch.dtype, weights: str = "plain") -> PreTrainedModel:
    """A Llama of that shape, made where it is used: weights are drawn from N(0, 0.02) on the device.

    weights: "plain", or as which they are packed then, "q8" or "q4".
    RuntimeError if the device's memory does not hold it.
    """
    shape = shape_of(name)
    size = shape.parameters * dtype.itemsize
    if device.type == "cuda" and size > (free := torch.cuda.mem_get_info(device)[0]):
        raise RuntimeError(f"shape: {name} has {size / 1e9:.1f} GB of weights, but {device} has {free / 1e9:.1f} GB free")
    config = config_of(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.do_sample = False
    if weights != "plain":
        pack(model, weights)
    return model.eval()


def random_checkpoint(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """A folder like those of published models (without a tokenizer) of that shape and random weights, for what reads a model from
    disk; made in `folder` at the first call, a layer at a time, so that it may be larger than the memory. Returns it."""
    found = folder / f"{name}-{str(dtype).removeprefix('torch.')}"
    if found.exists():
        return found
    half = found.with_name(found.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    config = config_of(shape_of(name))
    config.dtype, config.architectures = dtype, ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in model.state_dict().items():
        layer = key.split("layers.")[-1].split(".")[0] if "layers." in key else "others"
        if not (shape_of(name).tied and key.startswith("lm_head")):
            shards.setdefault(f"model-{layer}.safetensors", {})[key] = tensor
    generator = torch.Generator().manual_seed(0)
    for file, tensors in shards.items():
        drawn = {
            key: torch.empty(tensor.shape, dtype=dtype).normal_(0, config.initializer_range, generator=generator)
            if tensor.ndim > 1
            else torch.ones(tensor.shape, dtype=dtype)
            for key, tensor in tensors.items()
        }
        save_file(drawn, half / file, {"format": "pt"})
    weight_map = {key: file for file, tensors in shards.items() for key in tensors}
    (half / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(half)
    half.rename(found)
    return found
