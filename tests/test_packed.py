"""Models whose matrices are packed, into eight bits or four, and sparse models that read four."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_batched import decode as told_alone
from test_batched import side_by_side
from tiny import FAMILY_NAMES, NAMES, full_text, prompt, tiny

from sirius_ext import Engine, SiriusConfig, attach, generate
from sirius_ext.decoding.sparsity import sparse_density
from sirius_ext.engine import prepare
from sirius_ext.kernels import ops, q4, q8
from sirius_ext.kernels.matrix import Format, Matrix
from sirius_ext.models import scratch
from sirius_ext.models.packed import Checkpoint, load_packed, pack

pytestmark = pytest.mark.usefixtures("one_thread")


def packed(name="llama3", dtype=torch.float32, weights="q8"):
    model = tiny(name, dtype)
    pack(model, weights)
    return model


def same_numbers(name, dtype=torch.float32, weights="q8", of=None):
    """A plain model with the numbers that a packed one of the dtype `of` has: by default of its own."""
    model = tiny(name, of or dtype).to(dtype)
    for key, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            weight = module.weight.data
            if weights == "q4" and not key.endswith(("embed_tokens", "lm_head")):
                numbers = q4.round_to_groups(weight).numbers()
            elif key.endswith("down_proj"):
                numbers = Matrix(weight.t().contiguous()).in_eight_bits().dense().t()
            else:
                numbers = Matrix(weight).in_eight_bits().dense()
            module.weight.data = numbers.to(dtype).contiguous()
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model


def logits_of(engine, ids):
    """After a prompt by prefill, and after its last token by a pass of one row: float32 [V] each."""
    seen = []
    processor = [lambda _, scores: seen.append(scores[0].clone()) or scores]
    engine.generate(ids, config=SiriusConfig(mode="full"), max_new_tokens=1, logits_processor=processor)
    first = engine.generate(ids[:, :-1], config=SiriusConfig(mode="full"), max_new_tokens=1)
    engine.generate(ids, config=SiriusConfig(mode="full"), max_new_tokens=1, cache=first.cache, logits_processor=processor)
    return seen


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_every_family_computes_with_its_numbers(name, weights):
    """The activations are rounded to eight bits, and a random model's layers make more of that: the logits' difference is a tenth
    of their size as a rule, and with seven layers of four bits a quarter of it. Other numbers would be as far away as any."""
    ids = prompt(50)
    prefilled, decoded = logits_of(Engine(packed(name, weights=weights)), ids)
    with torch.no_grad():
        expected = same_numbers(name, weights=weights)(ids).logits[0, -1]
    for got in (prefilled, decoded):
        assert (got - expected).norm() < (0.3 if (name, weights) == ("gemma3", "q4") else 0.15) * expected.norm()


@pytest.mark.parametrize("isa", ops.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_match_is_the_full_text(isa, dtype, weights):
    before = ops.isa()
    ops.set_isa(isa)
    try:
        engine, ids = Engine(packed("qwen2", dtype, weights)), prompt(30)
        expected = full_text(engine, ids, 40)
        for settings in ({"period": 8}, {"period": 4, "tree_width": 3}, {"period": 16, "density": 1.0}, {"period": "auto"}):
            out = engine.generate(ids, config=SiriusConfig(accept="match", **settings), max_new_tokens=40)
            assert out.sequences[0, 30:].tolist() == expected, settings
    finally:
        ops.set_isa(before)


def test_four_bits_are_their_own_view():
    """Of a model in four bits S reads the same matrices, and of embedding and LM head, which have eight, the upper halves."""
    weights = prepare(packed(weights="q4")).weights
    before, after = weights.layers[0], weights.four_bits.layers[0]
    for name in ("gate", "up", "down"):
        assert getattr(before, name) is getattr(after, name)
    assert weights.lm_head.format == Format.Q8 and weights.four_bits.lm_head.format == Format.Q8_UPPER
    layers = sum(getattr(before, name).nbytes for name in ("gate", "up", "down"))
    assert weights.full.mlp_bytes == layers * len(weights.layers), "the shared scales of down are bytes, too"
    assert before.down.nbytes > before.down.data.numel()


@pytest.mark.parametrize("sparsity", ["csparse", "fsparse", "cascade"])
def test_sparse_models_of_four_bits(sparsity):
    """They read some of the neurons, and say other things than F with fewer of them; with all of them they say the same."""
    engine, ids = Engine(packed("mistral", weights="q4")), prompt(20)
    expected, lengths = full_text(engine, ids, 40), []
    for density in (0.3, 1.0):
        config = SiriusConfig(sparsity=sparsity, density=density, period=6, accept="match", draft_weights="same")
        out = engine.generate(ids, config=config, max_new_tokens=40)
        assert out.sequences[0, 20:].tolist() == expected
        lengths.append(out.stats.average_advance_length)
    assert 1 < lengths[0] < 5.9 and lengths[1] >= 5.9


def test_four_bits_are_a_view_of_eight():
    weights = prepare(packed()).weights
    before, after = weights.layers[0], weights.four_bits.layers[0]
    for name in ("gate", "up", "down"):
        assert getattr(before, name).data.data_ptr() == getattr(after, name).data.data_ptr()
    assert before.before_mlp is after.before_mlp
    assert weights.four_bits.bytes < 0.62 * weights.full.bytes


@pytest.mark.parametrize("draft", ["same", "auto"])
def test_with_every_neuron(draft):
    """S that reads what F reads is F; S that reads less is not, but follows it closely."""
    engine, ids = Engine(packed()), prompt(20)
    config = SiriusConfig(period=8, density=1.0, accept="match", draft_weights=draft)
    stats = engine.generate(ids, config=config, max_new_tokens=60).stats
    if draft == "same":
        assert stats.average_advance_length == 8 and stats.density == 1
    else:
        assert 1 < stats.average_advance_length < 8 and stats.density < 0.62


def test_four_bits_beside_plain_weights():
    """The full model's text is that of the plain model, bit for bit."""
    ids, plain = prompt(20), Engine(tiny("mistral", torch.bfloat16))
    expected = full_text(plain, ids, 50)
    config = SiriusConfig(period=8, density=1.0, accept="match", draft_weights="q4")
    out = plain.generate(ids, config=config, max_new_tokens=50)
    assert out.sequences[0, 20:].tolist() == expected
    weights = prepare(plain.model).weights
    assert weights.four_bits.bytes < 0.46 * weights.full.bytes  # 0.29 where rows are long
    assert sparse_density(config, weights) < 0.46
    assert 1 < out.stats.average_advance_length < 8, "S read other bits, or none"


@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
def test_density_counts_bits(sparsity):
    weights = prepare(packed("llama")).weights
    same, less = (
        sparse_density(SiriusConfig(sparsity=sparsity, density=0.5, draft_weights=draft), weights) for draft in ("same", "q4")
    )
    ratio = q8.row_bytes(48) / (q8.row_bytes(48) + 16 * q8.groups(48))
    assert less == pytest.approx(same * ratio, rel=0.05)  # of rows of 101 elements it is nearly the same


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_side_by_side(weights):
    """Sums in another order round the activations otherwise here and there, and a tiny model's text is soon another one: its
    beginnings are compared."""
    engine = Engine(packed(weights=weights))
    texts = [(prompt(length), 3) for length in range(5, 25)]
    configs = [SiriusConfig(mode="full"), SiriusConfig(mode="sparse"), SiriusConfig(mode="sparse", draft_weights="same")]
    found = side_by_side(engine, texts, configs, 7)
    for number, config in enumerate(configs):
        equal = [found[index, number][0] == told_alone(engine, ids, config, count)[0] for index, (ids, count) in enumerate(texts)]
        assert sum(equal) >= 17, config
    if weights == "q4":  # of which S reads what F does, but for the head
        return
    distinct = sum(found[index, 1][0] != found[index, 2][0] for index in range(len(texts)))
    assert distinct >= 5, "S read the same bits"


# -------------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
    tiny("qwen2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, weights="q8"):
    return Engine.from_pretrained(str(folder), device="cpu", dtype=torch.float32, weights=weights, progress=False)


def kept(folder):
    return sorted((folder.parent / "cache" / "packed").glob("*"))


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_a_loaded_model_is_a_packed_one(folder, weights):
    ids, expected = prompt(20), packed("qwen2", weights=weights)
    engine = load(folder, weights)
    for key, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(key)), key
    assert full_text(engine, ids, 20) == full_text(Engine(expected), ids, 20)


def test_it_is_packed_once(folder):
    load(folder)
    (file,) = kept(folder)
    written = file.stat().st_mtime_ns
    load(folder)
    assert kept(folder) == [file] and file.stat().st_mtime_ns == written
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    load(folder)
    assert len(kept(folder)) == 2, "a file that has changed was not read again"
    load(folder, "q4")
    assert len(kept(folder)) == 3


@pytest.mark.parametrize("share", [0, 0.01, 0.5])
def test_a_kept_file_that_is_cut_off(folder, share):
    """It is packed again, as a damaged conversion is made again: every load would fail otherwise until somebody deletes it."""
    expected = full_text(load(folder), prompt(20), 20)
    (file,) = kept(folder)
    os.truncate(file, int(share * file.stat().st_size))
    assert full_text(load(folder), prompt(20), 20) == expected
    assert kept(folder) == [file]


def test_what_a_killed_process_has_left(folder, monkeypatch):
    """Half a file, which nobody else would ever remove. That of a process at work stays."""
    monkeypatch.setattr(scratch, "YOUNG_SECONDS", -1.0)
    code = "import os, sys, torch\nfrom sirius_ext.models import packed\nfrom test_packed import load\nfrom pathlib import Path\n"
    stopping = "packed._rounded = lambda *_: (print('begun', flush=True), sys.stdin.read())"
    command = [sys.executable, "-c", f"{code}{stopping}\nload(Path({str(folder)!r}))"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parent}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"begun\n"
        (half,) = kept(folder)
        load(folder)
        assert half in kept(folder)
        process.kill()
    load(folder, "q4")
    assert len(kept(folder)) == 2 and half not in kept(folder)


def test_what_was_left_a_moment_ago_goes_at_the_end(tmp_path):
    """Who tries again at once finds what may still be at work, and may never make another such folder."""
    old, future, young = (tmp_path / f"convert-{name}" for name in ("old", "future", "young"))
    with scratch.scratch(tmp_path, "convert-"):
        for left, seconds in ((old, -100), (future, 100), (young, 0)):
            left.mkdir()
            os.utime(left, (time.time() + seconds,) * 2)  # a clock that was set back leaves times that are still to come
    assert list(tmp_path.iterdir()) == [young]


def change(tensors):
    """Other numbers by the same names."""
    return {name: tensor * 0.5 for name, tensor in tensors.items()}


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_other_weights_in_the_folder(folder, weights):
    """Of several files the model's are those that transformers reads, alone or by an index."""
    expected = packed("qwen2", weights=weights)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(change(tensors), folder / "model_before.safetensors", {"format": "pt"})
    for key, parameter in load(folder, weights).model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(key)), key

    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for part, own in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in own}, folder / part, {"format": "pt"})
    file.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, own in parts.items() for name in own}}))
    for key, parameter in load(folder, weights).model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(key)), key
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names model-2-of-2\.safetensors, which is not there"):
        load(folder, weights)


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_a_head_that_the_config_ties(folder, weights):
    """transformers ties nothing that a checkpoint has twice with different numbers, whatever the config says."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    model = load(folder, weights).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors["lm_head.weight"][-1, -1] += 8.0
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    model = load(folder, weights).model
    head = Matrix(tensors["lm_head.weight"]).in_eight_bits()
    assert torch.equal(model.lm_head.weight, head.bytes) and not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, packed("qwen2").model.embed_tokens.weight)


def test_generation_settings_are_kept(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 9]}))
    assert load(folder).model.generation_config.eos_token_id == [7, 9]


def test_names_of_another_kind(folder):
    """A checkpoint whose tensors are called otherwise is for transformers to read."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key.removeprefix("model."): value for key, value in tensors.items()}, file, {"format": "pt"})
    engine = load(folder)
    assert kept(folder) == []
    assert full_text(engine, prompt(20), 20) == full_text(Engine(packed("qwen2")), prompt(20), 20)


def test_a_weight_that_is_not_finite(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: expected finite weights .* row 3 "):
        load(folder)
    assert kept(folder) == [], "half a file was left behind"
    for weights in ("q8", "q4"):
        model = tiny("llama3")
        model.model.layers[0].mlp.down_proj.weight.data[3, 0] = torch.inf
        with pytest.raises(ValueError, match=r"^model: model\.layers\.0\.mlp\.down_proj\.weight: expected finite weights"):
            pack(model, weights)


def test_a_shape_that_the_config_does_not_have(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"] = torch.ones(5)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected shape \[96\] by config\.json, got \[5\]"):
        load(folder)


def test_progress(folder, tmp_path):
    from transformers import AutoConfig

    seen = []
    config = AutoConfig.from_pretrained(folder)
    source = Checkpoint(folder, config, torch.float32)
    load_packed(source, tmp_path, lambda total, done: seen.append((total, done)))
    assert [done for _, done in seen] == list(range(1, len(seen) + 1)) and seen[-1][0] == len(seen)


def test_what_is_refused(folder):
    model = packed()
    with pytest.raises(RuntimeError, match="its weights are packed"):
        model(prompt(3))
    with pytest.raises(ValueError, match="^weights: expected one of plain, q8, q4, got 'q3'"):
        Engine.from_pretrained(str(folder), weights="q3")
    with pytest.raises(ValueError, match="^draft_weights: expected one of auto, same, q4, got 'q2'"):
        SiriusConfig(draft_weights="q2")


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_every_way_to_call(weights):
    """A packed model is for generation, however it is asked for."""
    model, ids = packed(weights=weights), prompt(12)
    expected = Engine(copy.deepcopy(model)).generate(ids, max_new_tokens=12).sequences
    assert torch.equal(model.generate(ids, custom_generate=generate, max_new_tokens=12), expected)
    with attach(model):
        assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    with attach(model):
        assert torch.equal(model.generate(ids, max_new_tokens=12), expected), "leaving the block did away with something"


@pytest.mark.parametrize(
    "name, arguments", [("save_pretrained", ("somewhere",)), ("push_to_hub", ("a/b",)), ("resize_token_embeddings", (9,))]
)
def test_what_would_take_packed_weights_for_others_is_refused(name, arguments, tmp_path, monkeypatch):
    """Nobody could load what it would write."""
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("plain")
    for model in (packed(), Engine.from_pretrained("plain", device="cpu", weights="q8").model):
        with pytest.raises(RuntimeError, match="^model: its weights are packed or in part on the disk"):
            getattr(model, name)(*arguments)
    assert not (tmp_path / "somewhere").exists()
