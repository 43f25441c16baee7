"""Files of a tiny random model, as they come from others: a folder of safetensors, a GGUF file."""

import math
from collections.abc import Callable

import gguf
import numpy as np
import torch
import transformers

from sirius_ext.kernels import q4


def tiny_llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


# llama.cpp's architecture of each family.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}


def write_gguf(
    path,
    model: transformers.PreTrainedModel,
    architecture: str | None = None,
    values: dict | None = None,
    tensors=None,
    kinds: Callable[[str], str] = lambda name: "F32",
) -> None:
    """`model` as llama.cpp's converter would write it, with a tokenizer of single characters.

    values: added to the header, or in the place of what is there; None leaves a key out. `{arch}` in a key is the architecture.
    tensors: likewise, by name.
    kinds: ggml's type of a matrix by its name.
    """
    config = model.config
    architecture = architecture or ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _write_settings(writer, config, architecture)
    _write_tokenizer(writer, config.vocab_size, "llama" if architecture in ("gemma2", "gemma3", "phi3") else "gpt2")
    for key, value in (values or {}).items():
        key = key.format(arch=architecture)
        writer.kv_data[0].pop(key, None)
        if value is not None:
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                np.int32: writer.add_int32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            add.get(type(value), writer.add_array)(key, value)
    found = {**_layer_tensors(model, architecture), **_rope_tensors(config), **(tensors or {})}
    for name, weight in found.items():
        if weight is None:
            continue
        kind = kinds(name) if weight.dim() == 2 else "F32"
        if kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
        else:
            writer.add_tensor(name, quantized(weight, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(weight: torch.Tensor, kind: str) -> np.ndarray:
    """A matrix in one of ggml's types, uint8 [rows, bytes]. `gguf` has no way to make the K types but Q4_K: there the numbers are
    any, of about the weight's size."""
    if kind == "Q4_K":
        return q4_k_blocks(supers_of(weight))
    numbers = np.ascontiguousarray(weight.float().numpy())
    if not kind.endswith("_K"):
        return gguf.quantize(numbers, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = np.random.default_rng(len(kind)).integers(0, 256, (weight.shape[0], weight.shape[1] // 256, size), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]  # where a block's float16 are
    for at in scales:
        blocks[..., at : at + 2] = np.array([weight.std() * 2**-10], dtype=np.float16).view(np.uint8)
    return blocks.reshape(len(blocks), -1)


def supers_of(weight: torch.Tensor) -> q4.Groups:
    """Numbers, float [rows, cols], rounded as Q4_K has them."""
    found = q4.round_to_groups(weight)
    scales, minima = found.pairs.float().unbind(-1)
    wanted = torch.stack((scales, (-minima).clamp(min=0)), -1)
    padded = torch.nn.functional.pad(wanted, (0, 0, 0, -wanted.shape[1] % 8)).unflatten(1, (-1, 8))
    pairs = (padded.amax(2) / 63).half()
    fields = (padded / pairs.float().unsqueeze(2).clamp(min=1e-9)).round().clamp(0, 63).flatten(1, 2)[:, : wanted.shape[1]]
    return q4.Groups(found.codes, pairs, fields.to(torch.uint8))


def q4_k_blocks(weight: q4.Groups) -> np.ndarray:
    """As a GGUF file has them: uint8 [rows, bytes]. Written from ggml's description, not from our reading of it."""
    rows, count = weight.rows, weight.cols // 256
    blocks = np.zeros((rows, count, 144), dtype=np.uint8)
    blocks[..., :4] = weight.pairs.contiguous().numpy().view(np.uint8).reshape(rows, count, 4)
    fields, codes = weight.fields.numpy().reshape(rows, count, 8, 2), weight.codes.numpy().reshape(rows, count, 8, 32)
    for group in range(8):
        for which in range(2):
            value = fields[..., group, which]
            if group < 4:
                blocks[..., 4 + 4 * which + group] |= value
            else:
                blocks[..., 12 + group - 4] |= (value & 15) << 4 * which
                blocks[..., 4 + 4 * which + group - 4] |= value >> 4 << 6
        start = 16 + group // 2 * 32
        blocks[..., start : start + 32] |= codes[..., group, :] << 4 * (group % 2)
    return blocks.reshape(rows, -1)


def _write_settings(writer: gguf.GGUFWriter, config: transformers.PreTrainedConfig, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if architecture != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("attention_factor", "beta_fast", "beta_slow"):
            if key in rope:
                writer.add_float32(f"{architecture}.rope.scaling.yarn_{key.replace('attention', 'attn')}", rope[key])
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if architecture == "phi3":
        size = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * size))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            original = config.original_max_position_embeddings
            scale = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if architecture in ("gemma2", "gemma3"):
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, kind: str) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list(["<s>", "</s>", "ab", "cd"] + [chr(33 + i) for i in range(vocab_size - 4)])
    writer.add_token_types([3, 3] + [1] * (vocab_size - 2))
    if kind == "gpt2":
        writer.add_token_merges(["a b", "c d"])
    else:
        writer.add_token_scores([-float(i) for i in range(vocab_size)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(1)


def _layer_tensors(model: transformers.PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    gemma = architecture.startswith("gemma")
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "post_attention_norm" if gemma else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    modules = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(model.config.num_hidden_layers):
        modules |= {f"model.layers.{layer}.{long}": f"blk.{layer}.{short}" for long, short in names.items()}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    found = {}
    for name, weight in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        short = modules[module]
        if short == "output" and model.config.tie_word_embeddings:
            continue
        if architecture == "llama" and (count := heads.get(short.rsplit(".", 1)[-1])):
            # Llama's converter puts the two elements that an angle turns side by side.
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(weight.shape)
        if gemma and short.endswith("norm"):
            weight = weight + 1
        found[f"{short}.{kind}"] = weight
    return found


def _rope_tensors(config: transformers.PreTrainedConfig) -> dict[str, torch.Tensor]:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{key}.weight": torch.tensor(rope[f"{key}_factor"]) for key in ("long", "short")}
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": torch.tensor(llama3_divisors(config.head_dim, rope))}
    return {}


def llama3_divisors(head_dim: int, rope: dict) -> list[float]:
    """What each frequency is divided by."""
    found = []
    for index in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** -(index / head_dim) / (2 * math.pi)
        smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found
