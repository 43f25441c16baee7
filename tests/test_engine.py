"""`Engine` around a model: what it accepts, what it shares, and that neither its past nor its surroundings change a text."""

import functools
import gc
import threading
import weakref

import pytest
import torch
import transformers
from tiny import Collector, prompt, tiny
from torch import nn

from sirius_ext import Engine, SiriusConfig, SiriusOutput, attach, detach
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.engine import device_of
from sirius_ext.models.weights import Weights
from sirius_ext.runtime.model import Model

MATCH = SiriusConfig(accept="match", period=4, density=0.5)
FULL = SiriusConfig(mode="full")
SPARSE = SiriusConfig(mode="sparse", density=0.4)
THRESHOLD = SiriusConfig(period=6, density=0.4, threshold=0.05)
CONFIGS = [FULL, SPARSE, MATCH, THRESHOLD]
COUNT = 20

pytestmark = pytest.mark.usefixtures("one_thread")


def text(engine, length=8, config=None, count=COUNT):
    return engine.generate(prompt(length), config=config, max_new_tokens=count).sequences[0, length:].tolist()


@functools.cache
def greedy(name="llama3", length=8, count=COUNT):
    return tiny(name).generate(prompt(length), max_new_tokens=count)[0, length:].tolist()


@functools.cache
def alone(name, config, length, dtype=torch.float32):
    """The text of an engine that has never done anything else."""
    return text(Engine(tiny(name, dtype), config), length)


# ---------------------------------------------------------------------------------------------------------------- construction


def test_defaults():
    engine = Engine(tiny())
    assert engine.config == SiriusConfig() and engine.tokenizer is None
    out = engine.generate(prompt(5), max_new_tokens=7)
    assert isinstance(out, SiriusOutput) and out.sequences.shape == (1, 12)
    assert out.stats.prompts[0].period == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_a_folder(tmp_path, dtype):
    tiny("qwen2").save_pretrained(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), MATCH, device="cpu", dtype=dtype, progress=False)
    assert engine.config is MATCH and engine.tokenizer is None
    assert all(parameter.dtype == dtype for parameter in engine.model.parameters())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert text(engine) == text(Engine(loaded, FULL))
    if dtype == torch.float32:
        assert text(engine) == greedy("qwen2")


def test_from_a_folder_in_bfloat16_unless_told_otherwise(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert Engine.from_pretrained(tmp_path, progress=False).model.dtype == torch.bfloat16


def test_what_is_shown_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
    tiny("llama3", torch.bfloat16).save_pretrained(tmp_path / "small")
    load = functools.partial(Engine.from_pretrained, str(tmp_path / "small"), MATCH, "cpu", progress=False)
    decodes = "mode='sirius', sparsity='csparse', period=4, accept='match'"
    engine = load()
    assert repr(engine) == f"Engine(small, llama, bfloat16 on cpu, {decodes})"
    assert repr(load(weights="q8")) == f"Engine(small, llama, q8 on cpu, {decodes})"
    assert repr(Engine(tiny("qwen2"), FULL)) == "Engine(qwen2, float32 on cpu, mode='full')"
    sequence = engine.start(prompt(8), max_new_tokens=5)
    assert repr(sequence) == "Sequence(8 tokens of prompt, 0 new, not ended)"
    assert repr(sequence.cache) == f"Cache(0 tokens, capacity {sequence.cache.capacity}, bfloat16 on cpu, in use)"
    sequence.run()
    assert repr(sequence) == "Sequence(8 tokens of prompt, 5 new, ended: length)"
    assert repr(sequence.cache) == f"Cache(12 tokens, capacity {sequence.cache.capacity}, bfloat16 on cpu)"
    shown = repr(engine)
    with attach(engine.model, MATCH) as handle:
        assert repr(handle) == f"attach({shown}, attached)"
    assert repr(handle) == f"attach({shown}, detached)"
    detach(engine.model)
    assert repr(engine) == f"Engine(small, llama, cpu, {decodes})"


@pytest.mark.parametrize("way", [Engine, attach])
def test_a_config_of_the_wrong_type(way):
    model = tiny()
    for config in ({"period": 4}, "sirius", 16):
        with pytest.raises(TypeError, match=f"^config: expected a SiriusConfig, got {type(config).__name__}"):
            way(model, config)
    with pytest.raises(TypeError, match="^config: expected a SiriusConfig"):
        Engine.from_pretrained("/no/such/model", {"period": 4})
    with pytest.raises(TypeError, match="^config: expected a SiriusConfig"):
        Engine(model).generate(prompt(3), config={"period": 4}, max_new_tokens=2)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("model", [None, "llama", nn.Linear(3, 3)], ids=["None", "str", "module"])
def test_a_model_of_the_wrong_type(model):
    with pytest.raises(TypeError, match="^model: expected a transformers causal language model, got"):
        Engine(model)


@pytest.mark.parametrize("head", [transformers.AutoModel, transformers.AutoModelForSequenceClassification])
def test_a_model_without_a_language_modelling_head(head):
    with pytest.raises((TypeError, ValueError), match="^model: "):
        Engine(head.from_config(tiny().config))


@pytest.mark.parametrize("way", [Engine, attach])
def test_weights_that_cannot_be_used(way):
    with pytest.raises(ValueError, match="^model: expected float32, float16 or bfloat16 weights, got torch.float64"):
        way(tiny(dtype=torch.float64))
    mixed = tiny()
    mixed.model.layers[2].mlp.up_proj.bfloat16()
    with pytest.raises(ValueError, match="^model: expected one dtype, but model.layers.2.mlp.up_proj.weight is torch.bfloat16"):
        way(mixed)
    partly = tiny()
    partly.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(
        ValueError,
        match="^model: expected every weight on cpu, as the last norm is, but model.layers.1.mlp.up_proj.weight is on meta",
    ):
        way(partly)
    assert "generate" not in vars(mixed) and "generate" not in vars(partly)
    with pytest.raises(ValueError, match="on the CPU|'meta' is not supported"):
        way(tiny().to("meta"))


class Adapter(nn.Linear):
    """What PEFT puts in the place of a linear layer, as far as its type goes."""


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_adapters_are_refused(path):
    model = tiny()
    parent, name = path.split(".")
    parent = getattr(model.model.layers[1], parent)
    old = getattr(parent, name)
    setattr(parent, name, Adapter(old.in_features, old.out_features, bias=False))
    with pytest.raises(ValueError, match=f"^model: expected {name} to be a plain nn.Linear, got Adapter of test_engine$"):
        Engine(model)


def test_adapters_of_peft_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(Adapter, "__module__", "peft.tuners.lora.layer")
    model = tiny()
    model.model.layers[1].mlp.up_proj = Adapter(4, 4)
    message = "^model: model.layers.1.mlp.up_proj is an adapter .Adapter of peft.; merge it first, with merge_and_unload"
    with pytest.raises(ValueError, match=message):
        Engine(model)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_parametrizations_are_refused_with_what_to_do():
    model = tiny()
    nn.utils.parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", Doubled())
    with pytest.raises(ValueError, match="^model: expected up_proj to be a plain nn.Linear, .*remove_parametrizations makes"):
        Engine(model)
    nn.utils.parametrize.remove_parametrizations(model.model.layers[1].mlp.up_proj, "weight")
    assert text(Engine(model, MATCH)) == model.generate(prompt(8), max_new_tokens=COUNT)[0, 8:].tolist()


class Coded(torch.Tensor):
    """As torchao's and DTensor: shape and dtype of a tensor, without numbers in its memory."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj", "model.norm"])
def test_weights_that_are_no_plain_tensors_are_refused(name, after):
    model = tiny()
    if after:
        Engine(model, MATCH)
    module = model.get_submodule(name)
    module.weight = nn.Parameter(Coded(module.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=f"^model: expected {name}.weight to be a plain tensor, got Coded .torch.strided."):
        Engine(model, MATCH).generate(prompt(8), max_new_tokens=4)


def test_sparse_weights_are_refused():
    model = tiny()
    weight = model.model.layers[1].mlp.down_proj.weight
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(weight.detach().to_sparse_csr())
    with pytest.raises(ValueError, match="down_proj.weight to be a plain tensor, got Tensor .torch.sparse_csr."):
        Engine(model)


CHANGES = {
    "epsilon": (
        lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.3),
        "input_layernorm to have an epsilon",
    ),
    "epsilon of the last": (lambda m: setattr(m.model.norm, "variance_epsilon", 0.3), "model.norm to have an epsilon"),
    "scale": (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.3), "model.layers.1.self_attn.scaling to be"),
    "activation": (lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.ReLU()), "model.layers.1.mlp.act_fn to be a SiLU"),
    "activation, fused": (lambda m: setattr(m.model.layers[1].mlp, "activation_fn", nn.ReLU()), "mlp.activation_fn to be a SiLU"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_numbers_that_are_not_the_configs_are_refused(case):
    """What reads the config alone would compute another model."""
    model, (change, message) = tiny("phi3" if case.endswith("fused") else "llama3"), CHANGES[case]
    change(model)
    with pytest.raises(ValueError, match=f"^model: expected .*{message}.*, got "):
        Engine(model)


@pytest.mark.parametrize("case", [each for each in CHANGES if not each.endswith("fused")])
def test_numbers_that_change_later_are_refused(case):
    """What is kept of a model is what it was."""
    model, (change, message) = tiny("llama3"), CHANGES[case]
    engine = Engine(model, MATCH)
    text(engine)
    change(model)
    with pytest.raises(ValueError, match=f"^model: expected .*{message}.*, got "):
        text(engine)


def test_angles_that_change_later():
    model = tiny("llama3")
    engine = Engine(model, MATCH)
    before = text(engine)
    model.model.rotary_emb.inv_freq.mul_(0.3)
    after = text(engine)
    assert after == model.generate(prompt(8), max_new_tokens=COUNT)[0, 8:].tolist() != before


def test_an_adapter_on_the_head_is_refused():
    model = tiny("llama3")
    model.lm_head = Adapter(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    with pytest.raises(ValueError, match="^model: expected lm_head to be a plain nn.Linear"):
        Engine(model)


def test_a_bias_on_the_head_is_refused():
    model = tiny("llama3")
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with pytest.raises(ValueError, match="^model: .*lm_head.*bias"):
        Engine(model)


def test_an_embedding_of_its_own_kind_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    model = tiny("llama3")
    model.model.embed_tokens = Scaled(*model.model.embed_tokens.weight.shape)
    with pytest.raises(ValueError, match="^model: expected embed_tokens to be a plain nn.Embedding, got Scaled"):
        Engine(model)


# --------------------------------------------------------------------------------------------------------------------- device


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")], ids=str)
def test_no_cuda_device(no_cuda, device):
    """Before anything is loaded: the model does not even exist."""
    with pytest.raises(ValueError, match="^device: 'cuda' was asked for, but there is no CUDA device"):
        Engine.from_pretrained("/no/such/model", device=device)


@pytest.mark.parametrize("device", ["mps", "meta", "gpu", "", "cpu:x"])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match="^device: "):
        Engine.from_pretrained("/no/such/model", device=device)


def test_the_cpu():
    device_of("cpu")
    device_of(torch.device("cpu"))
    with pytest.raises(ValueError, match="^model: .*/no/such/model"):
        Engine.from_pretrained("/no/such/model", device="cpu")


# -------------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("ids", [[[1, 2]], "text", torch.ones(1, 3), None, torch.ones(1, 3, dtype=torch.bool)], ids=str)
def test_prompts_of_the_wrong_type(ids):
    with pytest.raises(TypeError, match="^input_ids: expected an integer tensor, got"):
        Engine(tiny()).generate(ids, max_new_tokens=2)


@pytest.mark.parametrize(
    "ids", [prompt(3)[0], prompt(4).view(1, 2, 2), prompt(3)[:0], torch.tensor(3)], ids=["1d", "3d", "no-rows", "0d"]
)
def test_prompts_of_the_wrong_shape(ids):
    with pytest.raises(ValueError, match="^input_ids: "):
        Engine(tiny()).generate(ids, max_new_tokens=2)


def test_int32_prompts():
    engine = Engine(tiny("llama3"), MATCH)
    out = engine.generate(prompt(8).int(), max_new_tokens=COUNT).sequences
    assert out.dtype == torch.int64 and out[0, 8:].tolist() == greedy()


def test_the_prompt_is_not_changed():
    ids = prompt(8)
    Engine(tiny(), MATCH).generate(ids, max_new_tokens=3)
    assert torch.equal(ids, prompt(8))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [7, 8, 9, 16, 33])
def test_a_long_prompt_is_read_in_chunks(monkeypatch, length, config):
    """The text, and for the sparse model the neurons, are those of one pass."""
    expected = alone("llama3", config, length)
    monkeypatch.setattr("sirius_ext.runtime.cache.PREFILL_CHUNK", 8)
    engine = Engine(tiny("llama3"), config)
    assert text(engine, length) == expected


@torch.no_grad()
def test_chunks_give_the_logits_of_transformers(monkeypatch):
    monkeypatch.setattr("sirius_ext.runtime.cache.PREFILL_CHUNK", 8)
    model = Model(Weights(tiny("qwen2")))
    cache = model.new_cache()
    model.reserve(cache, 40, 1)
    logits = drive(model, cache, read(cache, prompt(37)[0]))
    torch.testing.assert_close(logits, tiny("qwen2")(prompt(37)).logits[0, -1], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- nothing of the past remains


def test_a_config_for_one_call():
    engine = Engine(tiny("llama3"), SPARSE)
    assert text(engine, config=FULL) == greedy()
    assert engine.config is SPARSE
    assert text(engine) == alone("llama3", SPARSE, 8) != greedy()


def test_calls_do_not_depend_on_calls_before():
    """Prompts and texts that shrink and grow, over the size of the first cache; modes, periods and densities in turn."""
    engine = Engine(tiny("llama3", max_position_embeddings=1024))
    wanted = {}
    for _ in range(2):
        for config in CONFIGS:
            for length, count in ((33, 20), (2, 3), (9, 20), (1, 1), (200, 20), (8, 290), (20, 20)):
                wanted.setdefault((config, length, count), text(engine, length, config, count))
                assert text(engine, length, config, count) == wanted[config, length, count]
    for config in CONFIGS:
        assert wanted[config, 9, 20] == alone("llama3", config, 9)
        assert wanted[config, 33, 20] == alone("llama3", config, 33)


def test_two_engines_on_one_model():
    """They share its weights, and take turns on one cache."""
    model = tiny("llama3")
    first, second = Engine(model, THRESHOLD), Engine(model, SPARSE)
    for length in (8, 33, 3, 8):
        assert text(first, length) == alone("llama3", THRESHOLD, length)
        assert text(second, length) == alone("llama3", SPARSE, length)


class Meanwhile(Collector):
    """A streamer that does something else when the third put arrives, in the middle of a text."""

    def __init__(self, action):
        super().__init__()
        self.action, self.result, self.error = action, None, None

    def put(self, value):
        super().put(value)
        if len(self.puts) == 3:
            try:
                self.result = self.action()
            except RuntimeError as error:
                self.error = error


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_generating_in_the_middle_of_a_text(config):
    """One model, two texts at a time: each is as if alone, or the second is refused."""
    model = tiny("llama3")
    first, second = Engine(model, config), Engine(model, SPARSE)
    streamer = Meanwhile(lambda: text(second, 33))
    out = first.generate(prompt(8), max_new_tokens=COUNT, streamer=streamer)
    assert out.sequences[0, 8:].tolist() == alone("llama3", config, 8)
    assert streamer.error or streamer.result == alone("llama3", SPARSE, 33)


def test_generating_from_another_thread_in_the_middle_of_a_text():
    """As a server does: the second text may wait for the first, but neither may spoil the other."""
    model = tiny("llama3")
    first, second = Engine(model, THRESHOLD), Engine(model, SPARSE)
    results = []
    thread = threading.Thread(target=lambda: results.append(text(second, 33)))

    def start():
        thread.start()
        thread.join(timeout=0.5)

    out = first.generate(prompt(8), max_new_tokens=COUNT, streamer=Meanwhile(start))
    thread.join(timeout=30)
    assert out.sequences[0, 8:].tolist() == alone("llama3", THRESHOLD, 8)
    assert results == [alone("llama3", SPARSE, 33)]


def test_two_models_at_a_time():
    first, second = Engine(tiny("llama3"), MATCH), Engine(tiny("qwen2"), SPARSE)
    streamer = Meanwhile(lambda: text(second, 33))
    out = first.generate(prompt(8), max_new_tokens=COUNT, streamer=streamer)
    assert out.sequences[0, 8:].tolist() == greedy() and streamer.result == alone("qwen2", SPARSE, 33)


# -------------------------------------------------------------------------------------------------------- the model may change


def test_a_model_moved_to_another_dtype():
    model = tiny("qwen2")
    engine = Engine(model, THRESHOLD)
    assert text(engine) == alone("qwen2", THRESHOLD, 8)
    model.to(torch.bfloat16)
    # Two roundings make no difference, but the arithmetic does.
    assert text(engine) == alone("qwen2", THRESHOLD, 8, torch.bfloat16) != alone("qwen2", THRESHOLD, 8)
    model.float()
    rounded = Engine(tiny("qwen2", torch.bfloat16).float(), THRESHOLD)
    assert text(engine) == text(rounded)
    model.to(torch.float64)
    with pytest.raises(ValueError, match="^model: expected float32, float16 or bfloat16 weights, got torch.float64"):
        text(engine)


WEIGHTS = [
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    "model.layers.1.input_layernorm",
    "model.layers.1.post_attention_layernorm",
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
]
BIASES = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]


@pytest.mark.parametrize("way", ["data", "parameter", "in place"])
@pytest.mark.parametrize("name", [f"{module}.weight" for module in WEIGHTS] + [f"{module}.bias" for module in BIASES])
def test_a_weight_that_is_replaced(name, way):
    """As merging an adapter does, or loading other weights: the text is that of the model as it is now."""
    model, reference = (tiny("qwen2", tie_word_embeddings=False) for _ in range(2))
    engine = Engine(model, FULL)
    before = text(engine)
    for each in (model, reference):
        module, _, kind = name.rpartition(".")
        module = each.get_submodule(module)
        torch.manual_seed(1)
        old = getattr(module, kind)
        new = torch.randn(old.shape) * (3 if kind == "bias" else 0.4)
        if way == "data":
            old.data = new
        elif way == "parameter":
            setattr(module, kind, nn.Parameter(new))
        else:
            old.data.copy_(new)
    expected = reference.generate(prompt(8), max_new_tokens=COUNT)[0, 8:].tolist()
    assert expected != before, "a weight without effect tests nothing"
    assert text(engine) == expected


def test_layers_that_are_dropped():
    model, reference = tiny("llama3"), tiny("llama3")
    engine = Engine(model, FULL)
    for each in (model, reference):
        each.model.layers = each.model.layers[:2]
        each.config.num_hidden_layers = 2
    assert text(engine) == reference.generate(prompt(8), max_new_tokens=COUNT)[0, 8:].tolist() != greedy()


def test_a_resized_vocabulary():
    model, reference = tiny("llama3"), tiny("llama3")
    engine = Engine(model, FULL)
    for each in (model, reference):
        torch.manual_seed(2)
        each.resize_token_embeddings(200, mean_resizing=False)
    expected = reference.generate(torch.tensor([[199, 3]]), max_new_tokens=COUNT)
    assert torch.equal(engine.generate(torch.tensor([[199, 3]]), max_new_tokens=COUNT).sequences, expected)


def test_a_model_that_is_dropped_is_freed():
    """Neither the engine's registry nor a handle keeps it."""
    for use in (lambda model: text(Engine(model)), lambda model: attach(model).detach(), attach):
        model = tiny()
        gone = weakref.ref(model)
        use(model)
        del model
        gc.collect()
        assert gone() is None


# -------------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_threads_do_not_change_the_text(name, config):
    """In bfloat16, where a sum in another order could."""
    texts = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        engine = Engine(tiny(name, torch.bfloat16), config)
        texts.append([text(engine, length, count=40) for length in (1, 9, 33)])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_inference_mode_does_not_matter(config):
    """Tensors that are made in it cannot be written to outside of it: nothing that stays may be one."""
    model, expected = tiny("llama3"), text(Engine(tiny("llama3"), config), 8)
    with torch.inference_mode():
        engine = Engine(model, config)
        begun = engine.start(prompt(8), max_new_tokens=COUNT)
        begun.step()
        assert text(engine, 8) == expected
    assert begun.run() and begun.tokens == expected == text(engine, 8)
    with torch.inference_mode():
        assert text(engine, 8) == expected
    model(prompt(8)).logits.sum().backward()  # the model can still be trained, and so it can when it is given back
    model.zero_grad()
    with torch.inference_mode():
        detach(model)
    model(prompt(8)).logits.sum().backward()


def test_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny("llama3")
    engine = Engine(model, MATCH)
    assert text(engine, 8) == text(engine, 8) == greedy()
    with torch.inference_mode():
        assert text(engine, 8) == greedy()


def test_gradients_and_modes_do_not_matter():
    model = tiny("llama3").train()
    out = Engine(model, MATCH).generate(prompt(8), max_new_tokens=COUNT)
    assert out.sequences[0, 8:].tolist() == greedy() and not out.sequences.requires_grad
    assert model.training and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model(prompt(8)).logits.sum().backward()  # the model can still be trained
