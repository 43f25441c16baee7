"""GGUF files of every architecture, as llama.cpp's converter writes them: the model that comes out is the one that went in; and
files of four bits, read as they are."""

import re

import numpy as np
import pytest
import torch
import transformers
from backends import emulated
from model_files import llama3_divisors, tiny_llama, write_gguf
from tiny import VOCAB, full_text, prompt, tiny

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.engine import prepare
from sirius_ext.kernels import ops
from sirius_ext.kernels.matrix import Format, Matrix
from sirius_ext.models import gguf_files, gguf_tensors, hub

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GLOBAL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
GEMMA3 = {
    "query_pre_attn_scalar": 32,
    "rope_parameters": {"full_attention": GLOBAL, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}},
}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama 3.1": ("llama3", {}),
    "llama 3.1 of usual size": ("llama3", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": GLOBAL}),
    "llama with small heads": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, yarn with all it can have": (
        "qwen2",
        {"rope_parameters": YARN | {"attention_factor": 1.25, "beta_fast": 24.0, "beta_slow": 2.0}},
    ),
    "qwen3": ("qwen3", {"rms_norm_eps": 1e-5}),
    "phi3": ("phi3", {}),
    "phi3, long": ("phi3_windows", {}),
    "phi3, long and partial": (
        "phi3_windows",
        {"sliding_window": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", GEMMA3 | {"sliding_window_pattern": 6}),
    "gemma3 with a soft cap": ("gemma3", GEMMA3 | {"sliding_window_pattern": 6, "final_logit_softcapping": 5.0}),
}
# What a file says of no model, or another way.
UNSAID = ("architectures", "dtype", "initializer_range", "sliding_window_pattern", "transformers_version", "_name_or_path")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_of(name):
    base, changes = MODELS[name]
    if name == "phi3, long and partial":
        rope = tiny(base).config.rope_parameters
        halves = {key: rope[key][:4] for key in ("short_factor", "long_factor")}
        changes = changes | {"rope_parameters": rope | halves | changes["rope_parameters"]}
    model = tiny(base, **changes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.mul_(1024).round_().div_(1024)  # Gemma's are stored with 1 added
    return model


def settings(model):
    return {key: value for key, value in model.config.to_dict().items() if key not in (*UNSAID, *SPECIAL)}


@torch.no_grad()
def logits(model, ids):
    model.set_attn_implementation("eager")  # torch's own leaves out Gemma 2's soft cap
    return model(ids).logits


@pytest.fixture
def load(cache, tmp_path):
    def load(model, **changes):
        write_gguf(tmp_path / "tiny.gguf", model, **changes)
        return hub.load_model(tmp_path / "tiny.gguf", "fp32", progress=False)[0]

    return load


@pytest.mark.parametrize("name", MODELS)
def test_comes_out_as_it_went_in(load, name):
    expected = model_of(name)
    model = load(expected)
    if name == "mistral":  # whose files say Llama
        assert isinstance(model, transformers.LlamaForCausalLM)
        assert settings(model).items() >= {"head_dim": 32, "num_key_value_heads": 1, "hidden_size": 72}.items()
    else:
        assert settings(model) == settings(expected)
    assert [getattr(model.config, key) for key in SPECIAL] == [0, 1, 1]
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[key]) for key, weight in state.items())
    # Behind the windows and the lengths that scaled angles start from.
    ids = torch.randint(VOCAB, (1, 150), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [3, [True, False, False, True, True, False, True]])
def test_patterns_of_windows(load, pattern):
    types = [index % 3 < 2 for index in range(7)] if pattern == 3 else pattern
    expected = tiny("gemma3", layer_types=["sliding_attention" if slides else "full_attention" for slides in types])
    model = load(expected, values={"{arch}.attention.sliding_window_pattern": pattern})
    assert model.config.layer_types == expected.config.layer_types


def test_gemma3_without_windows(load):
    model = load(tiny("gemma3"), values={"{arch}.attention.sliding_window": None})
    assert model.config.sliding_window is None and set(model.config.layer_types) == {"full_attention"}


@pytest.mark.parametrize("name, layers, width", [("gemma2", 46, 48), ("gemma3", 62, 56)])
def test_the_largest_gemmas_have_their_own_scale(tmp_path, name, layers, width):
    """transformers takes minutes to load so many layers."""
    model = tiny(name, num_hidden_layers=layers)
    write_gguf(tmp_path / "tiny.gguf", model)
    settings = gguf_files.config_settings(gguf_files.read_header(tmp_path / "tiny.gguf"))
    assert settings["query_pre_attn_scalar"] == width // model.config.num_attention_heads != settings["head_dim"]


def test_keys_that_say_nothing(load):
    values = {
        "llama.attention.sliding_window": 64,
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": 1.0,
    }
    expected = tiny_llama()
    model = load(expected, values=values, tensors={"rope_freqs.weight": torch.ones(4)})
    assert settings(model) == settings(expected)


def test_no_original_length(load):
    expected = tiny("qwen2", rope_parameters=YARN | {"original_max_position_embeddings": 256})
    assert settings(load(expected, values={"qwen2.rope.scaling.original_context_length": 0})) == settings(expected)


BAD_VALUES = {
    "a window in a family without": ("llama", "attention.sliding_window", 40, "sliding_window' is 40, which is not supported"),
    "experts": ("llama", "expert_count", 8, "'llama.expert_count' is 8, which is not supported"),
    "a key of tomorrow": ("qwen3", "attention.sinks", True, "'qwen3.attention.sinks' is True, which is not supported"),
    "sizes of each layer": ("llama", "feed_forward_length", [101, 101, 101], "feed_forward_length is .101, 101, 101., which"),
    "no count of kv heads": ("llama", "attention.head_count_kv", None, "its header lacks llama.attention.head_count_kv"),
    "values of another size": ("qwen3", "attention.value_length", 8, "heads have 24 elements in keys and another number in"),
    "yes for a number": ("llama", "rope.freq_base", True, "llama.rope.freq_base is True, which is not supported"),
    "angles of a part": ("qwen3", "rope.dimension_count", 12, "turn 12 of a head's 24 elements"),
    "angles of more": ("phi3", "rope.dimension_count", 1 << 31, "phi3.rope.dimension_count is 2147483648, expected 1 to 16, the"),
    "heads that do not fill": ("qwen2", "attention.key_length", 8, "6 heads of 8 elements do not make up the width of 96"),
    "a window of an old converter": ("phi3", "attention.sliding_window", None, "lacks phi3.attention.sliding_window"),
    "an unknown scaling": ("llama", "rope.scaling.type", "dynamic", "rope scaling is of type 'dynamic' and has no factors"),
    "long rope without factors": ("phi3", "rope.scaling.type", "longrope", "is of type 'longrope' and has no factors"),
    "linear in phi3": ("phi3", "rope.scaling.factor", 2.0, "must be one of .'longrope'., got linear"),
    "no factor of attention": ("phi3_windows", "rope.scaling.attn_factor", None, "it lacks one of rope_factors_short.weight, "),
    "a negative length": (
        "qwen2",
        "rope.scaling.original_context_length",
        np.int32(-4),
        "_length is -4, expected at least 1, or 0",
    ),
    "a length of one": (
        "phi3_windows",
        "rope.scaling.original_context_length",
        1,
        "are scaled from a length of 1, expected at least 2",
    ),
    "two scalings": ("llama3", "rope.scaling.factor", 2.0, "scaled twice, by tensors and by linear scaling of factor 2.0"),
    "an endless factor": ("llama", "rope.scaling.factor", float("inf"), "rope scaling has the factor inf"),
    "fewer layers": ("llama", "block_count", 2, "9 of its tensors are unknown in this .* the first is 'blk.2.attn_k.weight"),
    "a wider MLP": ("llama", "feed_forward_length", 202, r"ffn_gate.weight: expected shape .202, 48. by the header, got .101"),
    "more layers": ("llama", "block_count", 4, "9 weights are missing, the first is model.layers.3."),
    "no context": ("llama", "context_length", 0, "llama.context_length is 0, expected at least 1"),
    "no context in a family with windows": ("gemma2", "context_length", 0, "gemma2.context_length is 0, expected at least 1"),
    "windows of each layer": ("llama", "attention.sliding_window", [9, 9], "sliding_window' is .9, 9., which is not supported"),
    "layers without end": ("llama", "block_count", 1 << 31, "2147483648 layers of 29 tensors"),
    "a pattern of other layers": ("gemma3", "attention.sliding_window_pattern", [True, False], "is .True, False. for 7 layers"),
}
BAD_TENSORS = {
    "one kind of factors": (
        "phi3_windows",
        "rope_factors_long",
        None,
        "it lacks one of rope_factors_short.weight, rope_factors_l",
    ),
    "too few factors": ("phi3_windows", "rope_factors_long", torch.ones(7), "long_factor has 7 numbers for 8 angles"),
    "16 bits": ("phi3_windows", "rope_factors_long", torch.ones(8).half(), "has shape .8,. and ggml's type 1; expected one"),
    "other divisors": ("llama", "rope_freqs", torch.tensor([1.0, 2.0, 3.0, 4.0]), "by up to 4.0, and not as Llama 3.1 does"),
    "divisors below 1": ("llama", "rope_freqs", torch.full((4,), 0.5), "rope_freqs.weight has 4 numbers for 4 angles, or some"),
    "a tensor too many": ("llama", "blk.1.attn_sinks", torch.ones(6), "1 of its tensors are unknown .* is 'blk.1.attn_sinks.w"),
    "no embedding": ("llama", "token_embd", None, "it has no token_embd.weight"),
}


@pytest.mark.parametrize("name", [*BAD_VALUES, *BAD_TENSORS])
def test_refuses(load, name):
    base, key, value, message = (BAD_VALUES | BAD_TENSORS)[name]
    changes = {"values": {"{arch}." + key: value}} if name in BAD_VALUES else {"tensors": {f"{key}.weight": value}}
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot (use|load) '.*tiny.gguf': .*{message}") as error:
        load(tiny(base), **changes)
    assert "\n" not in str(error.value)


def test_a_part_of_a_model(load):
    with pytest.raises(hub.ModelLoadError, match="one of 3 parts of a model; llama.cpp's llama-gguf-split --merge makes"):
        load(tiny_llama(), values={"split.count": 3})


@pytest.mark.parametrize("weights", ["plain", "q4"])
def test_every_token_that_ends_a_text(cache, tmp_path, weights):
    """As llama.cpp does, it stops at the end of a turn as well, which Gemma's files have beside that of a text."""
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 7}
    for values, expected in (({}, 1), (ends, [1, 5, 7]), ({"tokenizer.ggml.eot_token_id": 1}, 1)):
        write_gguf(tmp_path / "tiny.gguf", tiny("gemma2"), values=values)
        model, tokenizer = hub.load_model(tmp_path / "tiny.gguf", "fp32", progress=False, weights=weights)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == expected
        assert tokenizer.eos_token_id == 1


NONE = {"with a sign": np.int32(-1), "without": 0xFFFFFFFF}


@pytest.mark.parametrize("none", NONE)
@pytest.mark.parametrize("weights", ["plain", "q4"])
@pytest.mark.parametrize("base", ["llama", "gemma2"])  # whose tokenizers are of two kinds
def test_no_token(cache, tmp_path, base, weights, none):
    """-1 is llama.cpp's word for a token that is not there; to transformers it is the last one, or beyond the vocabulary."""
    names = ("bos", "eos", "eot", "eom", "padding", "unknown")
    write_gguf(tmp_path / "absent.gguf", tiny(base), values={f"tokenizer.ggml.{name}_token_id": None for name in names})
    write_gguf(tmp_path / "none.gguf", tiny(base), values={f"tokenizer.ggml.{name}_token_id": NONE[none] for name in names})
    found = [hub.load_model(tmp_path / name, "fp32", progress=False, weights=weights) for name in ("absent.gguf", "none.gguf")]
    (model, tokenizer), (other, other_tokenizer) = found
    assert [getattr(other.config, key) for key in SPECIAL] == [getattr(model.config, key) for key in SPECIAL]
    assert other.config.eos_token_id is other.generation_config.eos_token_id is None
    assert other_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert other_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert other_tokenizer("abcd!").input_ids == tokenizer("abcd!").input_ids
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert not list(cache.rglob("*.gguf"))


def test_no_end_beside_others(cache, tmp_path):
    values = {"tokenizer.ggml.eos_token_id": 0xFFFFFFFF, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.bos_token_id": 3}
    write_gguf(tmp_path / "tiny.gguf", tiny("gemma2"), values=values)
    model, tokenizer = hub.load_model(tmp_path / "tiny.gguf", "fp32", progress=False)
    assert model.config.eos_token_id == 5 and model.config.bos_token_id == tokenizer.bos_token_id == 3


@pytest.mark.parametrize("base", ["llama", "phi3"])
def test_a_first_space(cache, tmp_path, base):
    """Tokenizers of the kind "llama" begin a text with one unless their file says that they do not."""
    tokens = ["<s>", "</s>", "ab", "cd", "\u2581ab", "\u2581"] + [chr(33 + i) for i in range(VOCAB - 6)]
    said = {"model": "llama", "tokens": tokens, "merges": None, "scores": [-float(index) for index in range(VOCAB)]}
    said |= {"add_bos_token": False, "unknown_token_id": 1}
    for adds, first in ((None, 4), (True, 4), (False, 2)):
        values = {f"tokenizer.ggml.{key}": value for key, value in (said | {"add_space_prefix": adds}).items()}
        write_gguf(tmp_path / "tiny.gguf", tiny(base), values=values)
        _, tokenizer = hub.load_model(tmp_path / "tiny.gguf", "fp32", progress=False, weights="q4")
        ids = tokenizer("abcd").input_ids
        assert ids == [first, 3] and tokenizer.decode(ids) == "abcd"


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "padding", "unknown"])
@pytest.mark.parametrize("token", [VOCAB, np.int32(-2), 1 << 31, "</s>", [1, 2], True], ids=str)
def test_no_such_token(load, name, token):
    said = rf"tokenizer.ggml.{name}_token_id is {re.escape(repr(token if type(token) is not np.int32 else int(token)))}, "
    with pytest.raises(hub.ModelLoadError, match=f"{said}expected one of the vocabulary's {VOCAB} ids, 0 to {VOCAB - 1}, or -1"):
        load(tiny("llama"), values={f"tokenizer.ggml.{name}_token_id": token})


@pytest.mark.parametrize(
    "architecture, hint", [("smollm3", "; load its safetensors instead"), ("granite", "; load"), ("mamba", "")]
)
def test_architectures_that_transformers_cannot_read(load, architecture, hint):
    message = (
        f"model: cannot use .*architecture '{architecture}' are not supported{hint}.*; supported are llama .Llama, Mistral.; "
    )
    with pytest.raises(hub.ModelLoadError, match=message):
        load(tiny_llama(), architecture=architecture)


def test_divisors_that_are_nearly_llamas(load):
    divisors = torch.tensor(llama3_divisors(16, tiny("llama3").config.rope_parameters))
    divisors[3] *= 1 + 1e-4
    with pytest.raises(hub.ModelLoadError, match="and not as Llama 3.1 does; load its safetensors instead"):
        load(tiny("llama3"), tensors={"rope_freqs.weight": divisors})


# ---------------------------------------------------------------------------------------------------- four bits, as they are

# (model, changes of its config): rows of whole blocks, which are 256 weights of the K types.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
K_WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
FOUR_BITS = {
    "llama, Q4_0": ("llama", WIDE | {"head_dim": 16}, lambda name: "Q4_0"),
    "llama with biases, Q4_1": ("llama3", WIDE | {"head_dim": 16, "attention_bias": True}, lambda name: "Q4_1"),
    "llama, Q4_K_M": ("llama", K_WIDE | {"head_dim": 32, "initializer_range": 0.12}, lambda name: q4_k_m(name)),
    "qwen2, Q4_K_M": ("qwen2", K_WIDE | {"initializer_range": 0.12, "tie_word_embeddings": False}, lambda name: q4_k_m(name)),
    "qwen3, of all": ("qwen3", K_WIDE | {"head_dim": 64, "initializer_range": 0.12}, lambda name: any_type(name)),
    "phi3, Q4_0": ("phi3", WIDE | {"num_key_value_heads": 4}, lambda name: "Q8_0" if "attn_output" in name else "Q4_0"),
    "gemma2, Q4_1": ("gemma2", WIDE | {"head_dim": 16}, lambda name: "Q5_0" if "ffn_up" in name else "Q4_1"),
    "gemma3, Q4_0": ("gemma3", WIDE | {"head_dim": 32, "num_hidden_layers": 6}, lambda name: "F16" if "embd" in name else "Q4_0"),
}
FORMATS = {"Q4_0": "Q4", "Q4_1": "Q4", "Q4_K": "Q4_K"}


def q4_k_m(name: str) -> str:
    """As llama.cpp mixes them: some of v and down, and the head, have more bits."""
    return "Q6_K" if name in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight", "output.weight") else "Q4_K"


def any_type(name: str) -> str:
    """Another one for each of the first thirteen matrices."""
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    if not name.startswith("blk."):
        return "Q4_K"
    _, layer, part, _ = name.split(".")
    return gguf_tensors.TYPES[(int(layer) * len(parts) + parts.index(part)) % len(gguf_tensors.TYPES)]


@pytest.fixture
def write(cache, tmp_path):
    def write(name):
        base, changes, kinds = FOUR_BITS[name]
        write_gguf(tmp_path / "tiny.gguf", tiny(base, **changes), kinds=kinds)
        return tmp_path / "tiny.gguf"

    return write


def modules_of(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "packed_format")}


@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_are_the_files_own(write, name):
    """Each matrix of four bits has exactly the numbers that `gguf` makes of it, and each other one the nearest of eight bits."""
    file = write(name)
    model, tokenizer = hub.load_model(file, "fp32", progress=False, weights="q4")
    plain, _ = hub.load_model(file, "fp32", progress=False)
    assert tokenizer.eos_token_id == 1
    assert model.config.to_dict().items() >= {key: getattr(plain.config, key) for key in ("hidden_size", "vocab_size")}.items()
    kinds, header = FOUR_BITS[name][2], gguf_files.read_header(file)
    names = gguf_tensors.Tensors(header, plain.config).names
    modules, seen = modules_of(model), set()
    for key, parameter in plain.named_parameters():
        module, _, attribute = key.rpartition(".")
        if module not in modules or attribute == "bias":
            assert torch.equal(model.get_parameter(key), parameter), key
            continue
        kind, down = kinds(names[key]), key.endswith("down_proj.weight")
        expected = parameter.data.t().contiguous() if down else parameter.data
        form = modules[module].packed_format
        assert form.name.removesuffix("_ACROSS") == FORMATS.get(kind, "Q8") and form.across == (down and form != Format.Q8)
        matrix = Matrix.of_bytes(model.get_parameter(key).data, form, *expected.shape)
        assert torch.equal(matrix.dense(), expected if kind in FORMATS else Matrix(expected).in_eight_bits().dense()), key
        seen.add(kind)
    assert seen == {kinds(own) for own in names.values() if "norm" not in own and own.endswith("weight")}
    assert name != "qwen3, of all" or seen == set(gguf_tensors.TYPES)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_decode(write, name):
    """F's logits are those of the file's numbers, but for the rounding of activations; and `match` is F's text."""
    file, ids = write(name), prompt(40)
    engine = Engine.from_pretrained(str(file), device="cpu", dtype=torch.float32, progress=False, weights="q4")
    seen = []
    settings = {"max_new_tokens": 1, "logits_processor": [lambda _, scores: seen.append(scores[0].clone()) or scores]}
    engine.generate(ids, config=SiriusConfig(mode="full"), **settings)
    plain, _ = hub.load_model(file, "fp32", progress=False)
    expected = logits(plain, ids)[0, -1]
    assert (seen[0] - expected).norm() < 0.2 * expected.norm()
    text = full_text(engine, ids, 24)
    for config in ({"period": 6, "density": 0.5}, {"period": 4, "tree_width": 3}, {"sparsity": "cascade", "period": 5}):
        out = engine.generate(ids, config=SiriusConfig(accept="match", **config), max_new_tokens=24)
        assert out.sequences[0, 40:].tolist() == text, config


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama, Q4_0", torch.float32), ("qwen3, of all", torch.bfloat16)],
    ids=str,
)
def test_four_bits_decode_on_cuda(write, name, dtype):
    """The file's own numbers, and input that is not rounded: in float32 F's text is that of the dequantized model, where all of
    its matrices have four bits. `match` is F's text whatever the file mixes."""
    file, ids = write(name), prompt(20)
    model, _ = hub.load_model(file, str(dtype).removeprefix("torch."), progress=False, weights="q4")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as a GPU has them: no longer where the file's bytes happen to be
    with emulated(_simt):
        engine = Engine(model)
        text = full_text(engine, ids, 10)
        for config in ({"period": 6, "density": 0.5}, {"sparsity": "cascade", "period": 5}):
            out = engine.generate(ids, config=SiriusConfig(accept="match", **config), max_new_tokens=10)
            assert out.sequences[0, 20:].tolist() == text, config
    if dtype == torch.float32:
        plain, _ = hub.load_model(file, "fp32", progress=False)
        assert text == full_text(Engine(plain), ids, 10)


@pytest.mark.parametrize("isa", ops.available_isas())
def test_four_bits_on_every_instruction_set(write, isa):
    before = ops.isa()
    ops.set_isa(isa)
    try:
        test_four_bits_decode(write, "qwen2, Q4_K_M")
    finally:
        ops.set_isa(before)


def test_four_bits_are_packed_once(write, cache, monkeypatch):
    file = write("llama, Q4_0")
    first, _ = hub.load_model(file, "fp32", progress=False, weights="q4")
    assert len(list((cache / "packed").iterdir())) == len(list((cache / "converted").iterdir())) == 1
    monkeypatch.setattr(hub, "_convert", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("sirius_ext.models.packed._as_it_is", lambda *_: pytest.fail("packed again"))
    again, _ = hub.load_model(file, "fp32", progress=False, weights="q4")
    assert all(torch.equal(parameter, again.get_parameter(key)) for key, parameter in first.named_parameters())
    view = prepare(again).weights.full
    assert view.layers[0].down.format == Format.Q4_ACROSS and view.lm_head.format == Format.Q4


@pytest.mark.parametrize("part", ["token_embd", "blk.1.ffn_down"])
def test_a_type_that_is_not_supported(cache, tmp_path, part):
    import gguf

    model, file = tiny("llama", **WIDE, head_dim=16), tmp_path / "tiny.gguf"
    write_gguf(file, model, kinds=lambda name: "Q4_0")
    data, kinds = bytearray(file.read_bytes()), gguf.GGMLQuantizationType
    at = data.index(f"{part}.weight".encode()) + len(f"{part}.weight") + 4 + 16  # after the number of dimensions, and both
    assert int.from_bytes(data[at : at + 4], "little") == kinds.Q4_0
    data[at : at + 4] = int(kinds.IQ4_NL).to_bytes(4, "little")
    file.write_bytes(data)
    supported = "supported are F32, F16, BF16, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q5_K, Q6_K"
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use '.*': {part}.weight is of ggml's type IQ4_NL; {supported}"):
        hub.load_model(file, "fp32", progress=False, weights="q4")
    assert not list((cache / "converted").iterdir()), "the tokenizer was read first"


def test_four_bits_of_a_damaged_file(write, cache):
    file = write("llama, Q4_0")
    header = gguf_files.read_header(file)
    data = bytearray(file.read_bytes())
    at = header.tensors["blk.1.ffn_up.weight"].offset + 5 * 2 * 18  # a scale in row 5
    data[at : at + 2] = b"\xff\xff"
    file.write_bytes(data)
    message = "^model: cannot use '.*': blk.1.ffn_up.weight: row 5 has scales that are not finite"
    with pytest.raises(hub.ModelLoadError, match=message):
        hub.load_model(file, "fp32", progress=False, weights="q4")
    assert not list((cache / "packed").iterdir()), "half a file was left behind"
    file.write_bytes(data[:-100])
    with pytest.raises(hub.ModelLoadError, match="ends at byte .* of a file of"):
        hub.load_model(file, "fp32", progress=False, weights="q4")
