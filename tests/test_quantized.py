"""Checkpoints that AWQ, GPTQ and compressed-tensors have made in four bits: their numbers, and what is refused."""

import json

import pytest
import safetensors.torch
import torch
from tiny import full_text, prompt, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.engine import prepare
from sirius_ext.kernels.matrix import Format
from sirius_ext.models import hub
from sirius_ext.models.quantized import Quantized

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
COMPRESSED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True, "actorder": None}


def compressed(**changes):
    group = {"targets": ["Linear"], "weights": COMPRESSED | changes, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    "compressed": compressed(),
    "compressed, asymmetric": compressed(symmetric=False),
    "compressed, by channel": compressed(strategy="channel", group_size=None),
    "compressed, ordered": compressed(actorder="static", symmetric=True),
}

EXACT = ("gptq", "compressed", "compressed, by channel", "compressed, ordered")  # symmetric ones


def words(values: torch.Tensor, order=tuple(range(8))) -> torch.Tensor:
    """Nibble p of a word is the value at place order[p] of eight: int32 [rows, n / 8]."""
    eights = values.long().unflatten(1, (-1, 8))
    found = sum(eights[..., place] << 4 * nibble for nibble, place in enumerate(order))
    return (found - (found >> 31 << 32)).int()


def quantized(stem, weight, name, scale_dtype):
    """The parts of a matrix, and the numbers that they stand for: float64, [out, in]."""
    said = CONFIGS[name]
    symmetric = name in EXACT
    group = said.get("group_size", 64) if name != "compressed, by channel" else weight.shape[1]
    rows, cols = weight.shape
    grouped = weight.double().view(rows, -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15).to(scale_dtype)
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.double()).round().clamp(1, 15)
    codes = (grouped / scales.double()[..., None] + zeros[..., None]).round().clamp(0, 15)
    numbers = (scales.double()[..., None] * (codes - zeros[..., None])).view(rows, cols)
    codes = codes.view(rows, cols)
    if said["quant_method"] == "compressed-tensors":
        parts = {"weight_packed": words(codes), "weight_scale": scales, "weight_shape": torch.tensor([rows, cols])}
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.t()).t()
    elif said["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {"qweight": words(codes.t(), order), "qzeros": words(zeros.t(), order), "scales": scales.t()}
    else:
        stored = zeros - int(name == "gptq")  # the first format counts them from 1
        parts = {"qweight": words(codes).t(), "qzeros": words(stored.t()), "scales": scales.t()}
        parts["g_idx"] = (torch.arange(cols) // group).int()
    return {stem + key: value.contiguous() for key, value in parts.items()}, numbers


@pytest.fixture
def write(tmp_path):
    """Makes a checkpoint; returns its folder and the numbers of its matrices."""

    def write(name, scale_dtype=torch.float16, config=None, **changes):
        model, folder = tiny("qwen2", **SIZES, tie_word_embeddings=False), tmp_path / "model"
        tensors, numbers = {}, {}
        for key, weight in model.state_dict().items():
            if weight.dim() == 2 and key.startswith("model.layers"):
                parts, numbers[key] = quantized(key.removesuffix("weight"), weight, name, scale_dtype)
                tensors |= parts
            else:
                tensors[key] = weight.half().contiguous()
        tensors |= changes
        model.save_pretrained(folder)
        safetensors.torch.save_file(
            {key: value for key, value in tensors.items() if value is not None}, folder / "model.safetensors"
        )
        settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": config or CONFIGS[name]}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder, numbers

    return write


def load(folder, weights="q4"):
    return Engine.from_pretrained(str(folder), device="cpu", dtype=torch.float32, weights=weights, progress=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_have_their_own_numbers(write, name):
    """Exactly where zeros are 8, and else but for a minimum's last bits; what is not in four bits has eight."""
    folder, numbers = write(name)
    engine = load(folder)
    assert not hasattr(engine.model.config, "quantization_config")
    weights = prepare(engine.model).weights
    assert weights.lm_head.format == weights.embedding.format == Format.Q8
    for index, layer in enumerate(weights.layers):
        q, k, v = (projection.weight for projection in layer.qkv)
        matrices = {"self_attn.q": q, "self_attn.k": k, "self_attn.v": v, "self_attn.o": layer.output.weight}
        matrices |= {"mlp.gate": layer.gate, "mlp.up": layer.up, "mlp.down": layer.down}
        for key, matrix in matrices.items():
            expected = numbers[f"model.layers.{index}.{key}_proj.weight"]
            if key == "mlp.down":
                expected = expected.t()
            assert matrix.format == (Format.Q4_ACROSS if key == "mlp.down" else Format.Q4)
            if name in EXACT:
                assert torch.equal(matrix.dense(), expected.float())
            else:
                largest_step = expected.abs().amax() / 7
                assert (matrix.dense() - expected).abs().amax() <= 0.004 * largest_step
    text, ids = full_text(engine, prompt(30), 20), prompt(30)
    out = engine.generate(ids, config=SiriusConfig(accept="match", period=5), max_new_tokens=20)
    assert out.sequences[0, 30:].tolist() == text


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types(write, scale_dtype):
    """bfloat16's fit into float16, as a rule; float32's do not."""
    folder, _ = write("compressed", scale_dtype)
    if scale_dtype == torch.bfloat16:
        load(folder)
        return
    with pytest.raises(hub.ModelLoadError, match="proj.weight: expected scales that float16 holds, got others"):
        load(folder)


def test_biases_of_zeros(write):
    """Old checkpoints have one for every matrix."""
    name = "model.layers.0.mlp.up_proj.bias"
    load(write("gptq", **{name: torch.zeros(256)})[0])
    with pytest.raises(hub.ModelLoadError, match=f"1 weights are unexpected, the first is {name}"):
        load(write("gptq", **{name: torch.ones(256)})[0])


UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gptq_v2",
            {f"{UP}g_idx": torch.zeros(128, dtype=torch.int32)},
            f"{UP}g_idx: expected groups of neighbours, got another",
        ),
        ("gptq", {f"{UP}qzeros": None}, f"{UP}weight: the checkpoint has no {UP}qzeros"),
        ("compressed, asymmetric", {f"{UP}weight_zero_point": None}, f"{UP}weight: the checkpoint has no {UP}weight_zero_point"),
        ("awq", {f"{UP}scales": torch.ones(3, 256).half()}, rf"{UP}scales: expected shape \[2, 256\], got \[3, 256\]"),
        ("awq", {f"{UP}scales": torch.full((2, 256), torch.inf).half()}, f"{UP}weight: row 0 has scales that are not finite"),
        ("awq", {"model.norm.weight": None}, "1 weights are missing, the first is model.norm.weight"),
        # Eight codes are a word of 32 bits: others would be taken apart wrongly, or some of them not at all.
        ("gptq", {f"{UP}qweight": torch.ones(16, 256)}, f"{UP}qweight: expected torch.int32, got torch.float32"),
        ("gptq", {f"{UP}qweight": torch.ones(16, 256).long()}, f"{UP}qweight: expected torch.int32, got torch.int64"),
        ("awq", {f"{UP}qzeros": torch.ones(2, 32).short()}, f"{UP}qzeros: expected torch.int32, got torch.int16"),
        ("awq", {f"{UP}scales": torch.ones(2, 256).int()}, f"{UP}scales: expected torch.float16 or torch.bfloat16 or torch"),
        (
            "compressed",
            {f"{UP}weight_g_idx": torch.zeros(128, dtype=torch.int32)},
            f"1 weights are unexpected, .* {UP}weight_g_idx",
        ),
    ],
)
def test_tensors_that_are_refused(write, name, changes, message):
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use '.*': {message}"):
        load(write(name, **changes)[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "by bitsandbytes; weights='q4' reads awq, gptq, compressed-tensors, and GGUF",
        ),
        (CONFIGS["gptq"] | {"bits": 3}, "by gptq with bits 3; weights='q4' reads 4 only"),
        (CONFIGS["gptq"] | {"desc_act": True}, "by gptq with desc_act True; weights='q4' reads False only"),
        (CONFIGS["gptq"] | {"group_size": 16}, "in groups of 16; expected a multiple of 32, or -1"),
        (
            CONFIGS["gptq"] | {"checkpoint_format": "marlin"},
            "by gptq with checkpoint_format 'marlin'; weights='q4' reads 'gptq or",
        ),
        (CONFIGS["awq"] | {"version": "gemv"}, "by awq with version 'gemv'; weights='q4' reads 'gemm' only"),
        (compressed(num_bits=8), "by compressed-tensors with num_bits 8; weights='q4' reads 4 only"),
        (compressed(type="float"), "by compressed-tensors with type 'float'"),
        (compressed(actorder="group"), "by compressed-tensors with actorder 'group'; weights='q4' reads None only"),
        (compressed(strategy="tensor"), "by compressed-tensors with strategy 'tensor'"),
        (CONFIGS["gptq"] | {"group_size": None}, "in groups of None; expected a multiple of 32, or -1"),
        (compressed(group_size="x"), "in groups of 'x'; expected a multiple of 32, or -1"),
        (CONFIGS["gptq"] | {"rotation": "hadamard"}, "by gptq with rotation 'hadamard'; weights='q4' reads None only"),
        (
            compressed() | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
            "by compressed-tensors with transform_config .*; weights='q4' reads None only",
        ),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "by compressed-tensors with sparsity_config 'spa"),
        (compressed() | {"format": "int-quantized"}, "by compressed-tensors with format 'int-quantized'"),
    ],
)
def test_configs_that_are_refused(write, config, message):
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use '.*': its weights are quantized {message}"):
        load(write("gptq", config=config)[0])


@pytest.mark.parametrize("weights", ["plain", "q8"])
def test_other_weights_say_what_would_read_them(write, weights):
    message = "quantized weights are not supported.* or one of AWQ, GPTQ or compressed-tensors in four bits with weights='q4'"
    with pytest.raises(hub.ModelLoadError, match=message):
        load(write("awq")[0], weights)


def test_rows_that_groups_do_not_make_up():
    with pytest.raises(ValueError, match=r"^up.weight: expected rows of groups of 64, a multiple of 32, got rows of 96"):
        Quantized("awq", 64, 0).groups("up.weight", (8, 96), lambda name: None)
