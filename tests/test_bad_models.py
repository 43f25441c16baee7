"""Models that transformers would read in part, or wrongly, in silence: each is refused, with its name and the reason."""

import json

import pytest
import torch
from model_files import tiny_llama, write_gguf
from safetensors.torch import load_file, save_file

from sirius_ext import Engine
from sirius_ext.models import hub


def config(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def weights(**values):
    """Some weights' values; None takes one away. A dot in a name is written as two underscores."""

    def change(folder):
        file = folder / "model.safetensors"
        found = load_file(file) | {name.replace("__", "."): value for name, value in values.items()}
        save_file({name: value for name, value in found.items() if value is not None}, file, metadata={"format": "pt"})

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


UP = "model__layers__0__mlp__up_proj__weight"

BAD = {
    "fewer layers": (config(num_hidden_layers=1), "9 weights are unexpected, the first is model.layers.1.*fewer layers"),
    "more layers": (config(num_hidden_layers=3), "9 weights are missing, the first is model.layers.2."),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers: expected an integer of at least 1, got 0"),
    "another width": (config(hidden_size=64), "weights are mismatched, the first is .*shape in the file, shape by config.json"),
    "a width that is text": (config(hidden_size="x"), "Validation error for field 'hidden_size': .*expected int, got str"),
    "heads that do not fit": (config(num_attention_heads=5), "hidden size .32. is not a multiple"),
    "no heads": (config(num_attention_heads=0), "modulo by zero|num_attention_heads: expected"),
    "kv heads that do not fit": (config(num_key_value_heads=3), "num_key_value_heads: expected a divisor of the 4 heads, got 3"),
    "a negative vocabulary": (config(vocab_size=-1), "vocab_size: expected an integer of at least 1, got -1"),
    "a negative eps": (config(rms_norm_eps=-1e-5), "rms_norm_eps: expected a number of at least 0, got -1e-05"),
    "a negative theta": (
        config(rope_parameters={"rope_type": "default", "rope_theta": -3.0}),
        "rope_theta: expected a number of more than 0, got -3.0",
    ),
    "half a config": (text("config.json", '{"model_type": "llama"'), "config.json' is not a valid JSON file"),
    "half a generation config": (text("generation_config.json", "{"), "generation_config.json is not a JSON object"),
    "a generation config that is a list": (text("generation_config.json", "[1]"), "generation_config.json is not a JSON object"),
    "an unknown weight": (weights(model__layers__0__extra__weight=torch.ones(3)), "1 weights are unexpected, the first is model"),
    "a missing weight": (weights(model__norm__weight=None), "1 weights are missing, the first is model.norm.weight"),
    "int8 weights": (
        weights(**{UP: torch.ones(48, 32, dtype=torch.int8)}),
        "model.safetensors: model.layers.0.mlp.up_proj.weight is I8, a quantized weight",
    ),
    "float8 weights": (weights(**{UP: torch.ones(48, 32).to(torch.float8_e4m3fn)}), "up_proj.weight is F8_E4M3"),
    "half a file of weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000]),
        "model.safetensors: Error while deserializing header",
    ),
    "half a tokenizer": (text("tokenizer.json", "{"), "its tokenizer cannot be read: "),
}


@pytest.mark.parametrize("damage", BAD)
def test_bad_models(folder, damage):
    change, message = BAD[damage]
    change(folder)
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot (use|load) '.*tiny': .*({message})") as error:
        hub.load_model(folder, progress=False)
    assert "\n" not in str(error.value)


def test_a_name_that_no_file_can_have():
    with pytest.raises(hub.ModelLoadError, match="^model: 'x.*' cannot be looked for: File name too long"):
        hub.load_model("x" * 300, progress=False)


def test_settings_of_a_newer_transformers_in_a_models_own_file(folder):
    """What this transformers does not know it ignores, and so do we: it was not asked for in this call."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"a_setting_of_tomorrow": 3}))
    engine = Engine.from_pretrained(folder, progress=False)
    assert engine.generate(torch.tensor([[5, 6]]), max_new_tokens=2).sequences.shape == (1, 4)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_a_dtype_of_the_checkpoints_own(folder, stored):
    tiny_llama().to(stored).save_pretrained(folder)
    assert Engine.from_pretrained(folder, dtype="auto", progress=False).model.dtype == stored


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_float64(folder, cache, weights):
    """It becomes what is asked for, packed or not; there are no kernels for it."""
    tiny_llama().double().save_pretrained(folder)
    engine = Engine.from_pretrained(folder, dtype="float32", weights=weights, progress=False)
    again = Engine.from_pretrained(folder, dtype="float32", weights=weights, progress=False, memory="1GB")
    ids = torch.tensor([[5, 6]])
    assert torch.equal(engine.generate(ids, max_new_tokens=3).sequences, again.generate(ids, max_new_tokens=3).sequences)
    message = "dtype: expected bfloat16, float16 or float32, got 'auto', which is torch.float64 by config.json"
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use .*: {message}"):
        Engine.from_pretrained(folder, dtype="auto", weights=weights, progress=False)


def test_a_gguf_file_has_no_dtype_of_its_own(cache, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    assert hub.load_model(tmp_path / "tiny.gguf", "auto", progress=False)[0].dtype == torch.bfloat16
