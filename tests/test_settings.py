"""Every argument of a generate call is used or refused by name, and so is what stands around the call."""

import inspect
import re

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB, Collector, by_attach, by_call, by_engine, every_way, prompt, tiny
from torch import nn

import sirius_ext
from sirius_ext import Engine, SiriusConfig, attach
from sirius_ext.generation.settings import IDLE, KNOWN, ONLY, USED

MATCH = SiriusConfig(accept="match", period=4)
IDS = prompt(8)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny("llama3")


# ------------------------------------------------------------------------------------------------------------- what is known


def test_all_that_transformers_takes_is_known():
    """If this fails, transformers has a new argument or setting. Until it is named in generation/settings.py a call with it
    is refused. Read what it does, then name it there: in USED if its effect comes through logits processors or stopping criteria,
    in IDLE if no text decoded here can depend on it, in ONLY if it is to be refused; and add a case to test_hf.py."""
    arguments = inspect.signature(transformers.GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    settings = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert (arguments | settings) - KNOWN == set(), "new in transformers: see this test's docstring"


def test_a_name_stands_in_one_list():
    assert not USED & IDLE and not (USED | IDLE) & ONLY.keys()


@every_way
@pytest.mark.parametrize("name", sorted(ONLY.keys() - {"custom_generate"}))  # which is how a call comes here
def test_what_is_never_honoured_is_refused_by_name(name, way, model):
    value = {"use_cache": False, "guidance_scale": 2.0, "num_beams": 2, "num_beam_groups": 2}.get(name, True)
    if name == "inputs_embeds" and way is by_engine:
        value = torch.zeros(1, 8, 64)
    if name == "cache_implementation":
        value = "static"
    with pytest.raises(ValueError, match=rf"^generate: not supported by sirius_ext: .*\b{name}\b"):
        way(model, MATCH, IDS, max_new_tokens=3, **{name: value})


# Most of them are arguments of a model's forward, which generate would pass on.
UNKNOWN = ("a_setting_of_tomorrow", "logits_to_keep", "labels", "token_type_ids", "output_router_logits", "seq_idx")


@every_way
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown_is_refused_by_name(name, way, model):
    with pytest.raises(ValueError, match=f"^generate: {name} unknown to sirius_ext"):
        way(model, MATCH, IDS, max_new_tokens=3, **{name: torch.ones(1, 8)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "seed unknown to sirius_ext (generator=torch.Generator().manual_seed(1) draws the same again)"),
        ({"sirius_config": MATCH}, "sirius_config unknown to sirius_ext (an Engine and attach take config=)"),
        ({"max_new_token": 3}, "max_new_token unknown to sirius_ext (did you mean max_new_tokens?)"),
        (
            {"temprature": 1, "seed": 1},
            "(generator=torch.Generator().manual_seed(1) draws the same again; did you mean temperature?)",
        ),
        ({"labels": 1}, "labels unknown to sirius_ext (misspelt, or newer than this version of it)"),
    ],
    ids=str,
)
def test_what_may_have_been_meant(settings, message, model):
    with pytest.raises(ValueError, match=f"^generate: .*{re.escape(message)}$"):
        by_engine(model, MATCH, IDS, **settings)


def test_what_a_call_of_the_model_names_the_config(model):
    with pytest.raises(ValueError, match="config unknown to sirius_ext .with custom_generate it is sirius_config=.$"):
        model.generate(IDS, custom_generate=sirius_ext.generate, config=MATCH)


@every_way
@pytest.mark.parametrize("where", ["argument", "given config", "the model's config"])
def test_a_setting_that_a_later_transformers_adds(where, way, monkeypatch):
    """It is refused as soon as it is set, wherever, and not before."""
    model, init = tiny("llama3"), transformers.GenerationConfig.__init__

    def later(self, **values):
        new = values.pop("new_kind_of_search", False)
        init(self, **values)
        self.new_kind_of_search = new

    monkeypatch.setattr(transformers.GenerationConfig, "__init__", later)
    model.generation_config.new_kind_of_search = False
    settings = {"max_new_tokens": 3}
    assert way(model, MATCH, IDS, **settings).shape == (1, 11)
    if where == "argument":
        settings["new_kind_of_search"] = True
    elif where == "given config":
        settings = {"generation_config": transformers.GenerationConfig(new_kind_of_search=True, max_new_tokens=3)}
    else:
        model.generation_config.new_kind_of_search = True
    with pytest.raises(ValueError, match="^generate: new_kind_of_search unknown to sirius_ext"):
        way(model, MATCH, IDS, **settings)


@every_way
def test_a_cache_is_never_ignored(way, model):
    """By whatever name this transformers has for it."""
    filled = tiny("llama3")(prompt(5), use_cache=True)
    cache = getattr(filled, "cache", None) or filled.past_key_values
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match=f"^generate: not supported by sirius_ext: .*{name}"):
            way(model, MATCH, IDS, max_new_tokens=3, **{name: cache})


# The bad-input table: (what is given, the error's type, its beginning).
BAD = {
    "mask of twos": ({"attention_mask": 2 * torch.ones_like(IDS)}, ValueError, "attention_mask: expected zeros and ones"),
    "mask of floats": ({"attention_mask": torch.full((1, 8), 0.5)}, ValueError, "attention_mask: expected zeros and ones"),
    "mask of NaN": ({"attention_mask": torch.full((1, 8), torch.nan)}, ValueError, "attention_mask: expected zeros and ones"),
    "mask as a list": ({"attention_mask": [[1] * 8]}, TypeError, "attention_mask: expected a tensor, got list"),
    "short mask": ({"attention_mask": torch.ones(1, 5)}, ValueError, r"attention_mask: expected shape \[1, 8\], got \[1, 5\]"),
    "config as a dict": (
        {"generation_config": {"top_k": 1}},
        TypeError,
        "generation_config: expected a GenerationConfig, got dict",
    ),
    "half a token": ({"max_length": 10.5}, TypeError, "max_length: expected an integer, at least 1, got 10.5"),
    "length as a string": ({"min_new_tokens": "2"}, TypeError, "min_new_tokens: expected an integer, at least 0, got '2'"),
    "half a token in a config": (
        {"generation_config": transformers.GenerationConfig(min_new_tokens=2.5)},
        TypeError,
        "min_new_tokens: expected an integer, at least 0, got 2.5",
    ),
    "streamer": ({"streamer": print}, TypeError, "streamer: expected an object with put and end, got builtin"),
    "generator": ({"generator": 3}, TypeError, "generator: expected a torch.Generator, got int"),
    "empty stop string": ({"stop_strings": ["a", ""]}, ValueError, "stop_strings: expected strings of at least one character"),
    "stop string": ({"stop_strings": 3}, TypeError, "stop_strings: expected a string or a list of strings, got 3"),
    "processor of None": ({"logits_processor": [lambda ids, scores: None]}, TypeError, "logits_processor: expected .* NoneType"),
    "processor of a shape": (
        {"logits_processor": [lambda ids, scores: scores[:, :5]]},
        ValueError,
        rf"logits_processor: expected scores of shape \[1, {VOCAB}\], got \[1, 5\]",
    ),
    "processor of NaN": (
        {"logits_processor": [lambda ids, scores: scores * torch.nan]},
        ValueError,
        "logits_processor: expected a likeliest token, got a score of nan at position 8",
    ),
    "processor of one NaN": (
        {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor([7]), torch.nan)]},
        ValueError,
        "logits_processor: expected a likeliest token, got a score of nan at position 8",
    ),
    "processor of inf": (
        {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor([7]), torch.inf)]},
        ValueError,
        "logits_processor: expected a likeliest token, got a score of inf at position 8",
    ),
    "processor of -inf": (
        {"logits_processor": [lambda ids, scores: torch.full_like(scores, -torch.inf)]},
        ValueError,
        "logits_processor: expected a likeliest token, got scores of -inf alone at position 8",
    ),
}


@every_way
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, way, model):
    settings, kind, message = BAD[case]
    if "logits_processor" in settings:
        settings = {"logits_processor": transformers.LogitsProcessorList(settings["logits_processor"])}
    with pytest.raises(kind, match=f"^{message}"):
        way(model, MATCH, IDS, max_new_tokens=3, **settings)
    assert way(model, MATCH, IDS, max_new_tokens=3).shape == (1, 11), "the model decodes as before"


# (name, what is given, the error's type, what it expects); the last ones only where tokens are drawn.
BAD_NUMBERS = [
    ("max_new_tokens", 2.5, TypeError, "an integer, at least 1"),
    ("max_new_tokens", 4.0, TypeError, "an integer, at least 1"),
    ("max_new_tokens", True, TypeError, "an integer, at least 1"),
    ("max_new_tokens", "4", TypeError, "an integer, at least 1"),
    ("max_new_tokens", 0, ValueError, "an integer, at least 1"),
    ("max_new_tokens", np.float32(3), TypeError, "an integer, at least 1"),
    ("max_length", "9", TypeError, "an integer, at least 1"),
    ("min_new_tokens", -3, ValueError, "an integer, at least 0"),
    ("num_return_sequences", 0, ValueError, "an integer, at least 1"),
    ("max_time", "long", TypeError, "a number of seconds"),
    ("repetition_penalty", 0, ValueError, "a number above 0"),
    ("top_k", "a", TypeError, "an integer, at least 0"),
    ("temperature", "a", TypeError, "a number above 0"),
    ("eos_token_id", "x", TypeError, "a token id or a list of them"),
    ("eos_token_id", [3, "x"], TypeError, "a token id or a list of them"),
    ("eos_token_id", 3.0, TypeError, "a token id or a list of them"),
    ("pad_token_id", [1], TypeError, "a token id"),
]
BAD_WHERE_DRAWN = [
    ("temperature", 0.0, ValueError, "a number above 0"),
    ("temperature", float("nan"), ValueError, "a number above 0"),
    ("top_k", -3, ValueError, "an integer, at least 0"),
    ("top_k", 2.5, TypeError, "an integer, at least 0"),
    ("top_p", 2.0, ValueError, "a number above 0, at most 1"),
    ("top_p", 0, ValueError, "a number above 0, at most 1"),
    ("min_p", -1, ValueError, "a number, 0 to 1"),
    ("typical_p", 2.5, ValueError, "a number above 0, at most 1"),
]


@every_way
@pytest.mark.parametrize(("name", "value", "kind", "expected"), BAD_NUMBERS + BAD_WHERE_DRAWN, ids=str)
def test_numbers_that_are_none(name, value, kind, expected, way, model):
    drawn = (name, value, kind, expected) in BAD_WHERE_DRAWN
    config = SiriusConfig(accept="sample", period=4) if drawn else MATCH
    with pytest.raises(kind, match=re.escape(f"{name}: expected {expected}")) as caught:
        way(model, config, IDS, **{"max_new_tokens": 3, "do_sample": drawn, name: value})
    assert str(caught.value).startswith(f"{name}: ") and str(caught.value).endswith(f"got {value!r}")


def test_only_numbers_in_effect_are_looked_at(model):
    """An argument stands before the given config, and that before the model's own; None means that nothing was asked."""
    config = transformers.GenerationConfig(max_new_tokens=3)
    config.max_time = "long"
    engine = Engine(model, MATCH)
    with pytest.raises(TypeError, match="^max_time: expected a number of seconds, got 'long'"):
        engine.generate(IDS, generation_config=config)
    assert engine.generate(IDS, generation_config=config, max_time=60).stats.tokens == 3
    assert engine.generate(IDS, max_new_tokens=3, top_p=2.0, temperature=0, top_k=-3).stats.tokens == 3, "nothing is drawn"
    nothing = dict.fromkeys(("top_k", "top_p", "temperature", "eos_token_id", "max_length"))
    assert engine.generate(IDS, max_new_tokens=3, **nothing).stats.tokens == 3


BAD_IDS = {
    "list": ([[1, 2]], TypeError, "expected an integer tensor, got list"),
    "floats": (torch.ones(1, 3), TypeError, "expected an integer tensor, got torch.float32"),
    "bools": (torch.ones(1, 3, dtype=torch.bool), TypeError, "expected an integer tensor, got torch.bool"),
    "one row": (prompt(3)[0], ValueError, r"expected shape \[batch, t\], got \[3\]"),
    "no rows": (prompt(3)[:0], ValueError, r"expected shape \[batch, t\], got \[0, 3\]"),
    "NumPy": (np.ones((1, 3), dtype=np.int64), TypeError, "expected an integer tensor, got ndarray"),
}


@every_way
@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(case, way, model):
    ids, kind, message = BAD_IDS[case]
    with pytest.raises(kind, match=f"^input_ids: {message}"):
        way(model, MATCH, ids, max_new_tokens=3)


# --------------------------------------------------------------------------------------------------------- what is harmless


@every_way
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_ids_of_any_integer_type(dtype, way, model):
    ids = IDS % 100
    expected = way(model, MATCH, ids, max_new_tokens=9)
    out = way(model, MATCH, ids.to(dtype), max_new_tokens=9)
    assert out.dtype == torch.int64 and torch.equal(out, expected)


@every_way
def test_numpy_numbers(way, model):
    config = SiriusConfig(accept="match", period=np.int64(4), tree_width=np.uint8(2), density=np.float32(0.5))
    assert (config.period, config.tree_width, config.density) == (4, 2, 0.5)
    assert [type(value) for value in (config.period, config.tree_width, config.density)] == [int, int, float]
    expected = way(model, MATCH, IDS, max_new_tokens=9)
    assert torch.equal(way(model, config, IDS, max_new_tokens=np.int64(9)), expected)


@every_way
@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_scalars_of_numpy_and_torch(kind, way, model):
    config = SiriusConfig(accept="sample", period=4)
    real = torch.tensor if kind is torch.tensor else np.float32
    settings = {"do_sample": True, "max_new_tokens": kind(9), "eos_token_id": kind(148), "top_k": kind(1)}
    expected = way(model, MATCH, IDS, max_new_tokens=9, eos_token_id=148)
    assert torch.equal(way(model, config, IDS, temperature=real(0.5), top_p=real(0.9), **settings), expected)


def test_a_mask_of_any_type(model):
    expected = Engine(model, MATCH).generate(IDS, max_new_tokens=5).sequences
    for mask in (torch.ones(1, 8, dtype=torch.bool), torch.ones(1, 8), torch.ones(1, 8, dtype=torch.int32)):
        assert torch.equal(Engine(model, MATCH).generate(IDS, mask, max_new_tokens=5).sequences, expected)


@every_way
def test_a_compiled_model(way, model):
    """The model inside is decoded; compiling its modules would be of no use here."""
    expected = way(model, MATCH, IDS, max_new_tokens=9)
    assert torch.equal(way(torch.compile(model), MATCH, IDS, max_new_tokens=9), expected)


def test_attaching_to_a_compiled_model(model):
    compiled = torch.compile(model)
    with attach(compiled, MATCH) as handle:
        compiled.generate(IDS, max_new_tokens=5)
        assert handle.stats.tokens == 5 and handle.model is model
    sirius_ext.detach(compiled)


def test_the_function_by_itself(model):
    """`sirius_ext.generate` decodes also where it is called, and not handed over."""
    expected = by_call(model, MATCH, IDS, max_new_tokens=9)
    assert torch.equal(sirius_ext.generate(model, IDS, max_new_tokens=9, sirius_config=MATCH), expected)
    streamer = Collector()
    sirius_ext.generate(model, input_ids=IDS, max_new_tokens=9, sirius_config=MATCH, streamer=streamer)
    streamer.check(IDS, expected)


def test_transformers_generate_is_itself_for_all_other_calls(model):
    plain = tiny("llama3")
    expected = plain.generate(IDS, max_new_tokens=5)
    seen = []

    def own(model, input_ids, **kwargs):
        seen.append(kwargs.keys())
        return input_ids

    assert torch.equal(model.generate(IDS, max_new_tokens=5), expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, custom_generate=own), IDS) and len(seen) == 1
    assert inspect.signature(model.generate) == inspect.signature(transformers.GenerationMixin.generate.__get__(model))


# ------------------------------------------------------------------------------------------------------------- surroundings


def hooked(register):
    def change(model):
        module = model.get_submodule("model.layers.1.mlp")
        return register(module, lambda *args: None).remove

    return change


def replaced(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: 0 * x
    return lambda: vars(mlp).pop("forward")


def globally_hooked(model):
    return nn.modules.module.register_module_forward_hook(lambda *args: None).remove


def with_soft_prompts(model):
    """What peft's generate does to the model inside."""

    def own(*args, **settings): ...

    model.prepare_inputs_for_generation = own
    return lambda: setattr(model, "prepare_inputs_for_generation", type(model).prepare_inputs_for_generation.__get__(model))


def with_dropout(model):
    model.config.attention_dropout = 0.1
    model.train()
    return model.eval


def with_dropout_in_a_layer(model):
    layer = model.model.layers[1]
    layer.resid_attn_dropout = nn.Dropout(0.1)
    return lambda: vars(layer)["_modules"].pop("resid_attn_dropout")


def of_its_own(model):
    mlp = model.model.layers[1].mlp
    kind = type(mlp)

    class Own(kind):
        def forward(self, x):
            return 0 * x

    mlp.__class__ = Own
    return lambda: setattr(mlp, "__class__", kind)


SURROUNDINGS = {
    "forward hook": (hooked(nn.Module.register_forward_hook), "model.layers.1.mlp .LlamaMLP. has a forward hook"),
    "pre-hook": (hooked(nn.Module.register_forward_pre_hook), "model.layers.1.mlp .LlamaMLP. has a forward hook"),
    "hook on the model": (
        lambda model: model.register_forward_hook(lambda *args: None).remove,
        "the model .Llama.* has a forward",
    ),
    "global hook": (globally_hooked, "global forward hooks"),
    "forward replaced": (replaced, "the forward method of model.layers.1.mlp .LlamaMLP. was replaced"),
    "forward of its own": (of_its_own, "the forward method of model.layers.1.mlp .Own. is test_settings's"),
    "inputs of its own": (with_soft_prompts, "its prepare_inputs_for_generation is test_settings's .peft has soft prompts"),
    "dropout": (with_dropout, "it is in training mode and has dropout"),
    "dropout in a layer": (with_dropout_in_a_layer, "it is in training mode and has dropout"),
}


@every_way
@pytest.mark.parametrize("case", SURROUNDINGS)
def test_what_the_modules_would_heed_is_not_ignored(case, way):
    model, (change, message) = tiny("llama3"), SURROUNDINGS[case]
    undo = change(model)
    try:
        with pytest.raises(ValueError, match=f"^model: {message}"):
            way(model, MATCH, IDS, max_new_tokens=3)
    finally:
        undo()
    assert way(model, MATCH, IDS, max_new_tokens=3).shape == (1, 11)


@every_way
def test_autocast(way, model):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="^torch.autocast: not supported around generate"):
        way(model, MATCH, IDS, max_new_tokens=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert way(model, MATCH, IDS, max_new_tokens=3).shape == (1, 11)


@every_way
def test_hooks_of_transformers_own(way):
    """A call that asked for hidden states leaves some behind, which do nothing until the next one."""
    model = tiny("llama3")
    model(IDS, output_hidden_states=True)
    assert way(model, MATCH, IDS, max_new_tokens=3).shape == (1, 11)


@every_way
def test_hooks_of_gradient_checkpointing(way):
    """They have embeddings require gradients, and change no number."""
    model = tiny("llama3")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    assert way(model, MATCH, IDS, max_new_tokens=3).shape == (1, 11)


@pytest.mark.parametrize("way", [by_attach, by_call], ids=lambda way: way.__name__)
def test_peft_says_what_to_do(way, model):
    class PeftModel(nn.Module):
        """As far as an error needs it."""

        generate = model.generate

        def merge_and_unload(self): ...

    with pytest.raises(TypeError, match="got PeftModel; decode what its merge_and_unload.. returns"):
        attach(PeftModel())
    with pytest.raises(TypeError, match="got PeftModel; decode what its merge_and_unload.. returns"):
        Engine(PeftModel())


def test_a_device_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^device: 'cuda' was asked for, but there is no CUDA device"):
        Engine.from_pretrained("/no/such/model", device=0)


def test_a_broken_chat_template():
    class Tokenizer:
        chat_template = "{% for %}"

        def apply_chat_template(self, messages, **kwargs):
            import jinja2

            return jinja2.Template(self.chat_template)

    with pytest.raises(ValueError, match="^chat: this model's chat template cannot be used: TemplateSyntaxError: "):
        sirius_ext.engine.encode(Tokenizer(), "Hello", chat=True)
