"""GGUF files: what the header says of a model, as the settings of a `transformers` config.

transformers reads the header too, but of our families neither rope scaling nor, in most, sliding windows, soft caps, the size of
a head and the scale of attention; it takes its own defaults in their place, and drops tensors that it does not know. Here all
that the header says is taken over or refused, and what it leaves out is what llama.cpp computes with then.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

ARCHITECTURES = {
    "llama": "Llama, Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3, Phi-4",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
}
# Supported families whose GGUF files transformers cannot read.
_SAFETENSORS_ONLY = ("granite", "mistral3", "smollm3")

CONVERTED = "sirius_conversion.json"  # in a folder that was made of such a file: which files belong to it

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

# Keys after the architecture's name that change nothing: the embedding has the vocabulary's size.
_IGNORED = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "mm.tokens_per_image")
# Keys of what no family has, and the value that says so.
_NEUTRAL = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
_SPECIAL = {"bos": "bos", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn and of a message: after each of them llama.cpp stops
_NO_TOKEN = (-1, 0xFFFFFFFF)  # llama.cpp's LLAMA_TOKEN_NULL, with a sign and without
_NOBODYS = b"_no"  # the end of a key that stands for no token
_OF_TOKENIZERS = ("bos", "eos", "unknown", "padding")  # what transformers looks up in the vocabulary, whatever is there
_ROPE_TENSORS = ("rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight")
_YARN = {
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """shape: as torch counts dimensions. kind: ggml's number of its type. offset: in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """values: by key; of a list of strings, such as the vocabulary, only how many there are. places: of the keys themselves, in
    the file."""

    file: Path
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    places: dict[str, int]

    def floats(self, name: str) -> list[float]:
        """The numbers of a tensor of one dimension."""
        tensor = self.tensors[name]
        if tensor.kind != 0 or len(tensor.shape) != 1:
            raise ValueError(f"{name} has shape {tensor.shape} and ggml's type {tensor.kind}; expected one dimension of F32 (0)")
        with open(self.file, "rb") as stream:
            stream.seek(tensor.offset)
            data = stream.read(4 * tensor.shape[0])
        return [_shortest(value) for value in struct.unpack(f"<{tensor.shape[0]}f", data)]


def _shortest(value: float) -> float:
    """The shortest decimal that float32 rounds to the same: what a config says is such a one, 1e-6 say."""
    return float(str(np.float32(value)))


class _Stream:
    """Reads what stands one after the other. Whatever would lie after the end is a struct.error or a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def numbers(self, formats: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + formats, self.data, self.at)
        self.at += struct.calcsize("<" + formats)
        return found

    def skip(self, size: int) -> int:
        start = self.at
        if size > len(self.data) - start:
            raise ValueError(f"something of {size} bytes at byte {start} of {len(self.data)}")
        self.at += size
        return start

    def string(self) -> str:
        (size,) = self.numbers("Q")
        start = self.skip(size)
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.numbers("IQ")
            if kind == _STRING:
                for _ in range(count):
                    self.skip(self.numbers("Q")[0])
                return count
            size = struct.calcsize("<" + self._format(kind))
            start = self.skip(count * size)
            return list(struct.unpack_from(f"<{count}{self._format(kind)}", self.data, start))
        (value,) = self.numbers(self._format(kind))
        return _shortest(value) if kind == _FLOAT32 else value

    @staticmethod
    def _format(kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError(f"a value of the unknown type {kind}")
        return _FORMATS[kind]


def read_header(file: Path) -> Header:
    """ValueError or struct.error if it is damaged, OSError if it cannot be read.

    The package `gguf` makes an array of every word of the vocabulary, for which it takes 10 s and more.
    """
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stream = _Stream(data)
        version, tensor_count, value_count = stream.numbers("4xIQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}; expected 2 or 3")
        values: dict[str, Any] = {}
        places = {}
        for _ in range(value_count):
            key = stream.string()
            places[key] = stream.at - len(key.encode())
            values[key] = stream.value(stream.numbers("I")[0])
        found = []
        for _ in range(tensor_count):
            name = stream.string()
            (dimensions,) = stream.numbers("I")
            if dimensions > 4:
                raise ValueError(f"{name!r} has {dimensions} dimensions")
            shape = stream.numbers(f"{dimensions}Q")
            kind, offset = stream.numbers("IQ")
            found.append((name, shape[::-1], kind, offset))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = math.ceil(stream.at / alignment) * alignment
        tensors = {name: Tensor(shape, kind, start + offset) for name, shape, kind, offset in found}
        return Header(file, values, tensors, places)


class _Settings:
    """The keys after the architecture's name, of which none may be left over."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.prefix = f"{architecture}."
        self.left = {key.removeprefix(self.prefix): value for key, value in header.values.items() if key.startswith(self.prefix)}

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """ValueError if the key is absent and there is no default, or its value of another kind: a list with an entry for
        each layer, say."""
        value = self.left.pop(key, default)
        if value is None:
            raise ValueError(f"its header lacks {self.prefix}{key}")
        if not isinstance(value, kind) or isinstance(value, bool):  # which Python takes for an integer
            raise ValueError(f"{self.prefix}{key} is {value!r}, which is not supported")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self.take(key, int, default)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.take(key, (int, float), default))

    def finish(self) -> None:
        for key, value in self.left.items():
            if key not in _IGNORED and not (key in _NEUTRAL and value == _NEUTRAL[key]):
                raise ValueError(f"{self.prefix + key!r} is {value!r}, which is not supported")


def config_settings(header: Header) -> dict[str, Any]:
    """Settings of a `transformers` config, `model_type` among them. ValueError, with the reason, if a config cannot say all that
    the header says."""
    architecture = header.values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        hint = "; load its safetensors instead" if architecture in _SAFETENSORS_ONLY else ""
        known = "; ".join(f"{name} ({examples})" for name, examples in ARCHITECTURES.items())
        raise ValueError(f"GGUF files of architecture {architecture!r} are not supported{hint}; supported are {known}")
    if (parts := header.values.get("split.count", 0)) > 1:
        raise ValueError(f"it is one of {parts} parts of a model; llama.cpp's llama-gguf-split --merge makes one file of them")
    if "token_embd.weight" not in header.tensors:
        raise ValueError("it has no token_embd.weight")

    said = _Settings(header, architecture)
    heads, hidden, layers = (said.integer(key) for key in ("attention.head_count", "embedding_length", "block_count"))
    if heads < 1 or layers > len(header.tensors):
        raise ValueError(f"it has {heads} heads, and {layers} layers of {len(header.tensors)} tensors")
    if (context := said.integer("context_length")) < 1:
        raise ValueError(f"{said.prefix}context_length is {context}, expected at least 1")
    head_dim = said.integer("attention.key_length", hidden // heads)
    settings: dict[str, Any] = {
        "model_type": "gemma3_text" if architecture == "gemma3" else architecture,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        # transformers leaves the rows of Llama's q and k in llama.cpp's order if the file does not say it.
        "num_key_value_heads": said.integer("attention.head_count_kv"),
        "intermediate_size": said.integer("feed_forward_length"),
        "max_position_embeddings": context,
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "eos_token_id": _ends(header),
        **{f"{name}_token_id": special_token(header, key) for name, key in _SPECIAL.items()},
    }
    special_token(header, "unknown")  # a config has no place for it, but a tokenizer has
    if said.integer("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"its heads have {head_dim} elements in keys and another number in values")
    if architecture in ("qwen2", "phi3"):
        if head_dim * heads != hidden:
            raise ValueError(f"its {heads} heads of {head_dim} elements do not make up the width of {hidden}")
    else:
        settings |= {"head_dim": head_dim, "attention_bias": "blk.0.attn_q.bias" in header.tensors}
    original = said.integer("rope.scaling.original_context_length", 0) or context  # as llama.cpp takes a 0
    if original < 1:
        raise ValueError(f"{said.prefix}rope.scaling.original_context_length is {original}, expected at least 1, or 0 for none")
    settings["rope_parameters"] = _rope(said, header, settings, head_dim, original)
    if architecture == "phi3":
        # Phi3Config has one of its own, with a default, and prefers it to the parameters'.
        settings["original_max_position_embeddings"] = original
        # 0 is Phi-4's. The first converters left it out, of models with a window and without.
        settings["sliding_window"] = said.integer("attention.sliding_window") or None
    elif architecture in ("gemma2", "gemma3"):
        settings |= _gemma(said, architecture, settings)
    elif isinstance(window := said.left.get("attention.sliding_window"), int) and window >= context:
        del said.left["attention.sliding_window"]  # as wide as the longest text
    said.finish()
    _check_tensors(header, architecture, settings)
    return settings


def special_token(header: Header, name: str) -> int | None:
    """The id of a special token, of "bos" say; None if the file has none. ValueError if the vocabulary has no such id."""
    key = _token_key(name)
    token = header.values.get(key)
    if token is None or _is_none(token):
        return None
    rows = header.tensors["token_embd.weight"].shape[0]
    named = header.values.get("tokenizer.ggml.tokens", rows)  # fewer where the embedding is padded
    size = min(rows, named) if isinstance(named, int) else rows
    if type(token) is not int or not 0 <= token < size:
        raise ValueError(f"{key} is {token!r}, expected one of the vocabulary's {size} ids, 0 to {size - 1}, or -1 for none")
    return token


def _token_key(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"


def _is_none(token: object) -> bool:
    return type(token) is int and token in _NO_TOKEN


def file_for_tokenizer(header: Header, folder: Path) -> Path:
    """The file as transformers can read its tokenizer: it takes -1 for the vocabulary's last token, and fails at 0xFFFFFFFF.
    Where the header says so of a token, a copy of it in the folder, which does not have these keys nor any tensor's numbers."""
    keys = [key for key in map(_token_key, _OF_TOKENIZERS) if _is_none(header.values.get(key))]
    if not keys:
        return header.file
    with open(header.file, "rb") as stream:
        head = bytearray(stream.read(min(tensor.offset for tensor in header.tensors.values())))
    for key in keys:
        # It becomes a key that nobody knows, and as long, so that all else stays where it is.
        end = header.places[key] + len(key)
        head[end - len(_NOBODYS) : end] = _NOBODYS
    copy = folder / "header.gguf"
    copy.write_bytes(head)
    os.truncate(copy, header.file.stat().st_size)
    return copy


def _ends(header: Header) -> int | list[int] | None:
    """The tokens that end a text, the tokenizer's own first."""
    found = [special_token(header, name) for name in _ENDS]
    ends = list(dict.fromkeys(token for token in found if token is not None))
    return ends if len(ends) > 1 else ends[0] if ends else None


def _gemma(said: _Settings, architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    newer = architecture == "gemma3"
    layers = settings["num_hidden_layers"]
    window = said.integer("attention.sliding_window", 0 if newer else 4096)
    pattern = said.take("attention.sliding_window_pattern", (int, list), 6 if newer else 2)
    if isinstance(pattern, int) and pattern >= 1:
        pattern = [index % pattern < pattern - 1 for index in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(f"{architecture}.attention.sliding_window_pattern is {pattern!r} for {layers} layers")
    changes: dict[str, Any] = {
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if slides and window else "full_attention" for slides in pattern],
        # No key has it: llama.cpp tells the largest model of each family, the odd one, by its layers.
        "query_pre_attn_scalar": settings["hidden_size"] // settings["num_attention_heads"]
        if layers == (62 if newer else 46)
        else settings["head_dim"],
        "final_logit_softcapping": said.number("final_logit_softcapping", 0.0 if newer else 30.0) or None,
    }
    if newer:
        local = {"rope_type": "default", "rope_theta": said.number("rope.freq_base_swa", 10000.0)}
        changes["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    else:
        changes["attn_logit_softcapping"] = said.number("attn_logit_softcapping", 50.0) or None
    return changes


def _rope(said: _Settings, header: Header, settings: dict[str, Any], head_dim: int, original: int) -> dict[str, Any]:
    """Parameters of the angles; of layers without a sliding window where the two kinds differ."""
    theta, context = said.number("rope.freq_base", 10000.0), settings["max_position_embeddings"]
    rotated = said.integer("rope.dimension_count", head_dim)
    linear = said.number("rope.scale_linear", 1.0)  # the key's first name
    kind, factor = said.take("rope.scaling.type", str, "linear"), said.number("rope.scaling.factor", linear) or 1.0
    if not 0.0 < factor < math.inf:
        raise ValueError(f"its rope scaling has the factor {factor}")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if not 1 <= rotated <= head_dim:
        raise ValueError(f"{said.prefix}rope.dimension_count is {rotated}, expected 1 to {head_dim}, the elements of a head")
    if settings["model_type"] == "phi3":
        parameters["partial_rotary_factor"] = rotated / head_dim
        head_dim = int(head_dim * parameters["partial_rotary_factor"])  # as transformers computes it
    if rotated != head_dim:
        raise ValueError(f"its angles turn {rotated} of a head's {head_dim} elements, which is not supported in this family")
    short, long, freqs = (name in header.tensors for name in _ROPE_TENSORS)
    if (short or long or freqs) and (factor != 1.0 or kind == "yarn"):
        raise ValueError(f"its angles are scaled twice, by tensors and by {kind} scaling of factor {factor}")
    if short or long:
        if not (short and long and "rope.scaling.attn_factor" in said.left):
            raise ValueError("it lacks one of rope_factors_short.weight, rope_factors_long.weight and rope.scaling.attn_factor")
        factor, attention = context / original, said.number("rope.scaling.attn_factor")
        if original < 2:
            raise ValueError(f"its angles are scaled from a length of {original}, expected at least 2")
        parameters |= {
            "rope_type": "longrope",
            "short_factor": header.floats(_ROPE_TENSORS[0]),
            "long_factor": header.floats(_ROPE_TENSORS[1]),
            "original_max_position_embeddings": original,
            "factor": factor,
        }
        # What transformers computes; anything else must be said.
        if not math.isclose(attention, math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original)), rel_tol=1e-6):
            parameters["attention_factor"] = attention
        for name in ("short_factor", "long_factor"):
            if len(parameters[name]) != rotated // 2:
                raise ValueError(f"its {name} has {len(parameters[name])} numbers for {rotated // 2} angles")
    elif freqs:
        divisors = header.floats(_ROPE_TENSORS[2])
        if any(divisor != 1.0 for divisor in divisors):
            parameters |= _llama3(divisors, head_dim // 2, settings | {"rope_parameters": parameters})
    elif kind == "yarn":
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name, key in _YARN.items():
            if key in said.left:
                parameters[name] = said.number(key)
    elif kind == "linear" and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise ValueError(f"its rope scaling is of type {kind!r} and has no factors")
    return parameters


def _llama3(divisors: list[float], half: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's parameters by which transformers divides the frequencies by these numbers.

    The file has nothing else of them. All published models have 1 and 4 with 8192; a power of two is what another would have.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = settings["rope_parameters"]
    wanted = rope["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    if len(divisors) != half or not all(1.0 <= divisor < math.inf for divisor in divisors):
        raise ValueError(f"its rope_freqs.weight has {len(divisors)} numbers for {half} angles, or some below 1")
    wanted /= torch.tensor(divisors, dtype=torch.float64)
    for original in (8192, *(1 << power for power in range(5, 21))):
        found = {
            "rope_type": "llama3",
            "factor": max(divisors),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        config = AutoConfig.for_model(**settings | {"rope_parameters": rope | found})
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if torch.allclose(frequencies.double(), wanted, rtol=1e-5, atol=0.0):
            return found
    raise ValueError(
        f"its rope_freqs.weight divides the angles' frequencies by up to {max(divisors)}, and not as Llama 3.1 does; "
        "load its safetensors instead"
    )


def _check_tensors(header: Header, architecture: str, settings: dict[str, Any]) -> None:
    """ValueError for a tensor that transformers would leave out. It reports itself what is missing."""
    parts = {"attn_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_up.weight", "ffn_down.weight"}
    attention = ("attn_q", "attn_k", "attn_v")
    if architecture == "phi3":
        parts |= {"attn_qkv.weight"}
    else:
        parts |= {"ffn_gate.weight", *(f"{name}.weight" for name in attention)}
    if architecture in ("qwen3", "gemma3"):
        parts |= {"attn_q_norm.weight", "attn_k_norm.weight"}
    if architecture in ("gemma2", "gemma3"):
        parts |= {"post_attention_norm.weight", "post_ffw_norm.weight"}
    if architecture == "qwen2" or settings.get("attention_bias"):
        parts |= {f"{name}.bias" for name in attention}
    if settings.get("attention_bias"):
        parts |= {"attn_output.bias"}
    known = {f"blk.{layer}.{part}" for layer in range(settings["num_hidden_layers"]) for part in parts}
    known |= {"token_embd.weight", "output_norm.weight", "output.weight", *_ROPE_TENSORS}
    if unknown := sorted(header.tensors.keys() - known):
        raise ValueError(f"{len(unknown)} of its tensors are unknown in this architecture, the first is {unknown[0]!r}")
