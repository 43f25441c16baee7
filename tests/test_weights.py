"""Which models are taken, what is counted, and how their weights are shared and given back."""

import functools
import math
import weakref

import pytest
import torch
import transformers
from tiny import FAMILY_NAMES, NAMES, own_bits, prompt, tiny
from torch import nn

from sirius_ext import Engine, SiriusConfig
from sirius_ext.kernels.matrix import Matrix
from sirius_ext.models.families import FAMILIES, SUPPORTED_ROPE_TYPES, check_supported, context_length
from sirius_ext.models.weights import Projection, Weights, restore

FULL = SiriusConfig(mode="full")

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------------------- what is taken


SUPPORTED = [
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Qwen2Config,
    transformers.Qwen3Config,
    transformers.SmolLM3Config,
    transformers.Phi3Config,
    transformers.Gemma2Config,
    transformers.Gemma3TextConfig,
    transformers.GraniteConfig,
]


def test_supported_architectures():
    assert {make.model_type for make in SUPPORTED} == set(FAMILIES)
    for make in SUPPORTED:
        assert check_supported(make()) is FAMILIES[make.model_type]


UNSUPPORTED = [
    transformers.GPT2Config,
    transformers.GemmaConfig,
    transformers.Qwen2MoeConfig,
    transformers.MixtralConfig,
    transformers.MambaConfig,
    transformers.Gemma3Config,
    transformers.T5Config,
]
REASONS = {
    "gpt2": "no gate",
    "qwen2_moe": "mixtures of experts",
    "mixtral": "mixtures of experts",
    "mamba": "linear",
    "gemma3": "images",
}


@pytest.mark.parametrize("make", UNSUPPORTED, ids=lambda make: make.__name__)
def test_other_architectures(make):
    """The error says why where people may wonder, and lists what is supported."""
    kind = make.model_type
    with pytest.raises(ValueError, match=f"^model: architecture '{kind}' is not supported.*; supported are ") as error:
        check_supported(make())
    assert REASONS.get(kind, "is not supported; supported") in str(error.value)
    for name in (*FAMILIES, "Llama 2 and 3", "SmolLM2", "Qwen2.5"):
        assert name in str(error.value)


def test_no_architecture_at_all():
    with pytest.raises(ValueError, match="^model: architecture"):
        check_supported(transformers.PreTrainedConfig())
    with pytest.raises(ValueError, match="^model: architecture None"):
        check_supported(object())


def test_an_engine_around_an_unsupported_model():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match="^model: architecture 'gpt2' is not supported"):
        Engine(model)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (transformers.LlamaConfig, {"mlp_bias": True}, "mlp_bias is not supported"),
        (transformers.LlamaConfig, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported are silu"),
        (transformers.Qwen2Config, {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported"),
        (transformers.LlamaConfig, {"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not supported"),
        # What transformers' masks, caches and attention do not read alike, or not at all.
        (transformers.LlamaConfig, {"sliding_window": 30}, "sliding_window: expected None, since attention in llama sees all"),
        (transformers.GraniteConfig, {"sliding_window": 30}, "sliding_window: expected None, since attention in granite sees"),
        (
            transformers.GraniteConfig,
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            r"layer_types: expected \['full_attention'\], as models of granite are, got \['sliding_attention'\]",
        ),
        (
            transformers.MistralConfig,
            {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: expected .'sliding_attention', 'sliding_attention'., as models of mistral are, got .'full_attention', ",
        ),
        (transformers.Gemma2Config, {"sliding_window": None}, "sliding_window: expected an integer of at least 1, since layers"),
        (transformers.Gemma3TextConfig, {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping: expected None, since trans"),
        (transformers.Gemma2Config, {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: expected a number of more than 0"),
        (transformers.Gemma2Config, {"query_pre_attn_scalar": -16}, "query_pre_attn_scalar: expected a number of more than 0"),
        (
            transformers.Phi3Config,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
            "partial_rotary_factor: expected a number of more than 0, at most 1, got 1000000000.0",
        ),
        (transformers.GraniteConfig, {"logits_scaling": 0}, "logits_scaling: expected a number of more than 0, got 0"),
        (transformers.GraniteConfig, {"residual_multiplier": math.nan}, "residual_multiplier: expected a finite number, got nan"),
    ],
)
def test_variants_that_are_not_supported(make, values, message):
    with pytest.raises(ValueError, match=f"^model: {message}"):
        check_supported(make(**values))


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 128, "short_factor": [1.5] * 8, "long_factor": [2.0] * 8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def rope(kind):
    return {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}


def test_a_rope_type_that_changes_with_the_length():
    model = tiny("llama3", rope_parameters=rope("dynamic"))
    with pytest.raises(ValueError, match="^model: rope type 'dynamic' is not supported; supported are default, linear"):
        Engine(model)


def test_layers_and_weights_that_the_family_does_not_have():
    model = tiny("llama")
    model.model.layers[1].self_attn.q_norm = nn.RMSNorm(8)
    with pytest.raises(ValueError, match="^model: it has a weight model.layers.1.self_attn.q_norm.weight, which models of this"):
        Engine(model)
    config = transformers.Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ValueError, match="^model: layers of chunked_attention are not supported"):
        check_supported(config)
    with pytest.raises(ValueError, match="^model: use_bidirectional_attention is not supported"):
        check_supported(transformers.Gemma3TextConfig(use_bidirectional_attention=True))


def test_windows_that_hide_nothing():
    """transformers reads them nowhere, and neither do we."""
    for make in (transformers.LlamaConfig, transformers.GraniteConfig):
        check_supported(make(max_position_embeddings=64, sliding_window=64))
    check_supported(transformers.MistralConfig(num_hidden_layers=1, sliding_window=None, layer_types=["full_attention"]))


def test_angles_of_a_part_of_a_head():
    """Of our families Phi-3 alone can have them; transformers fails in the others."""
    model = tiny("mistral", rope_parameters=rope("linear") | {"partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match="^model: rope_parameters: expected angles that turn a head's 24 elements, got 12 "):
        Engine(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["phi3_windows", "gemma3"])
def test_longrope_after_a_text_that_was_too_long(name, when):
    """transformers puts the long factors in place of the short ones while it reads such a text, and leaves them there."""
    values = {}
    if name == "gemma3":
        long = {"short_factor": [1.5] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 128, "factor": 2.0}
        kinds = {"full_attention": rope("default"), "sliding_attention": {"rope_type": "longrope", "rope_theta": 1e4, **long}}
        values = {"rope_parameters": kinds}
    model, ids = tiny(name, **values), prompt(20)
    expected = model.generate(ids, max_new_tokens=20)
    if when == "after":
        engine = Engine(model, FULL)
    with torch.no_grad():
        model(prompt(150))
    if when == "before":
        engine = Engine(model, FULL)
    assert torch.equal(engine.generate(ids, max_new_tokens=20).sequences, expected)


@pytest.mark.parametrize("kind", SUPPORTED_ROPE_TYPES)
def test_rope_types(kind):
    """The text is that of `transformers`, and with scaling another one than without."""
    model, ids = tiny("llama3", rope_parameters=rope(kind)), prompt(40)
    expected = model.generate(ids, max_new_tokens=40)
    assert torch.equal(Engine(model, FULL).generate(ids, max_new_tokens=40).sequences, expected)
    if kind != "default":
        unscaled = tiny("llama3", rope_parameters=rope("default")).generate(ids, max_new_tokens=40)
        assert not torch.equal(expected, unscaled)


def test_a_theta_of_its_own():
    model = tiny("mistral", rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    expected = model.generate(prompt(30), max_new_tokens=30)
    assert not torch.equal(expected, tiny("mistral").generate(prompt(30), max_new_tokens=30))
    assert torch.equal(Engine(model, FULL).generate(prompt(30), max_new_tokens=30).sequences, expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"head_dim": 16}),  # not hidden / heads
        ("llama", {"tie_word_embeddings": False}),
        ("llama3", {"tie_word_embeddings": True}),
        ("llama3", {"num_key_value_heads": 1}),
        ("mistral", {"head_dim": 32, "rms_norm_eps": 1e-2}),
        ("qwen2", {"tie_word_embeddings": False, "num_hidden_layers": 1}),
        ("qwen2", {"vocab_size": 1000, "intermediate_size": 1}),
    ],
    ids=str,
)
def test_configs_of_all_kinds(name, values):
    model = tiny(name, **values)
    expected = model.generate(prompt(9), max_new_tokens=25)
    for config in (FULL, SiriusConfig(accept="match", period=5)):
        assert torch.equal(Engine(model, config).generate(prompt(9), max_new_tokens=25).sequences, expected)


# --------------------------------------------------------------------------------------------------------------------- context


def test_context_length():
    llama = functools.partial(transformers.LlamaConfig, max_position_embeddings=100)
    mistral = functools.partial(transformers.MistralConfig, max_position_embeddings=100)
    assert context_length(llama()) == 100
    assert context_length(mistral(sliding_window=30)) == 100  # texts go on beyond a window
    assert context_length(tiny("phi3_windows").config) == 128  # where longrope's angles would change


# ---------------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(name, tied):
    model = tiny(name, tie_word_embeddings=tied)
    weights = Weights(model)
    assert weights.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    mlp = sum(parameter.numel() for key, parameter in model.named_parameters() if ".mlp." in key)
    assert weights.num_mlp_parameters == mlp > 0
    if tied:
        assert weights.num_parameters < Weights(tiny(name, tie_word_embeddings=False)).num_parameters


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_density_of_the_sparse_model(density):
    """SPEC section 2: 1 - (1 - d) * M / P, in the stats."""
    model = tiny("qwen2")
    mlp = sum(parameter.numel() for key, parameter in model.named_parameters() if ".mlp." in key)
    everything = sum(parameter.numel() for parameter in model.parameters())
    for mode in ("sirius", "sparse"):
        out = Engine(model, own_bits(mode=mode, density=density)).generate(prompt(4), max_new_tokens=3)
        assert out.stats.density == pytest.approx(1 - (1 - density) * mlp / everything)
    assert Engine(model, SiriusConfig(mode="full", density=density)).generate(prompt(4), max_new_tokens=3).stats.density == 1


# ------------------------------------------------------------------------------------------------------------- shared, restored


def storage_bytes(model):
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("name", NAMES + FAMILY_NAMES)
def test_nothing_is_stored_twice(name):
    model = tiny(name)
    before = storage_bytes(model)
    weights = Weights(model)
    assert storage_bytes(model) == before
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = [weights.embedding.data, weights.lm_head.data, weights.final_norm]
    for layer in weights.layers:
        parts = [part for value in vars(layer).values() for part in (value if isinstance(value, tuple) else (value,))]
        tensors += [part.bias for part in parts if isinstance(part, Projection) and part.bias is not None]
        tensors += [part.weight.data for part in parts if isinstance(part, Projection)]
        tensors += [part.data for part in parts if isinstance(part, Matrix)]
        tensors += [part for part in parts if isinstance(part, torch.Tensor)]
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == pointers
    assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_model(name):
    model = tiny(name)
    weights = Weights(model)
    for index, layer in enumerate(weights.layers):
        theirs = model.model.layers[index]
        own = (*layer.qkv, layer.output)
        for projection, linear in zip(own, (getattr(theirs.self_attn, f"{name}_proj") for name in "qkvo"), strict=True):
            assert torch.equal(projection.weight.data, linear.weight)
            assert (projection.bias is None) == (linear.bias is None)
            assert projection.bias is None or torch.equal(projection.bias, linear.bias)
        assert torch.equal(layer.gate.data, theirs.mlp.gate_proj.weight)
        assert torch.equal(layer.up.data, theirs.mlp.up_proj.weight)
        assert torch.equal(layer.down.data.t(), theirs.mlp.down_proj.weight)
        assert torch.equal(layer.before_attention, theirs.input_layernorm.weight)
        assert torch.equal(layer.before_mlp, theirs.post_attention_layernorm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_restore(dtype):
    model, untouched = tiny("qwen2", dtype), tiny("qwen2", dtype)
    for _ in range(2):
        Weights(model)
        down = model.model.layers[0].mlp.down_proj.weight
        assert down.stride() == (1, 96) and isinstance(down, nn.Parameter)
        # Before and after, the model computes the same thing.
        torch.testing.assert_close(model(prompt(9)).logits, untouched(prompt(9)).logits)
        restore(model)
        for (name, value), (_, wanted) in zip(model.named_parameters(), untouched.named_parameters()):
            assert torch.equal(value, wanted) and value.stride() == wanted.stride(), name
        assert torch.equal(model(prompt(9)).logits, untouched(prompt(9)).logits)


def test_gradients_and_optimizers_survive():
    """The parameters stay the same objects."""
    model = tiny()
    before = dict(model.named_parameters())
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    Weights(model)
    restore(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert [parameter.requires_grad for parameter in after.values()].count(False) == 1


def test_parts_are_put_together_as_they_come():
    """And each is let go of before the one after the next is made: an LM head's copy may be a tenth of the memory."""
    whole = torch.randn(40, 64).bfloat16()
    alive = []

    def parts():
        for begin in range(0, 40, 16):
            assert sum(part() is not None for part in alive) <= 1
            part = Matrix(whole[begin : begin + 16]).in_four_bits()
            alive.append(weakref.ref(part))
            yield part
            del part

    found, expected = Matrix.of_parts(parts(), 40), Matrix(whole).in_four_bits()
    assert found.format == expected.format and found.shape == expected.shape and torch.equal(found.data, expected.data)
    assert Matrix.of_parts(iter([expected]), 40) is expected
    with pytest.raises(ValueError, match="^parts: expected 41 rows together, got 40"):
        Matrix.of_parts(parts(), 41)
