"""FSparse's thresholds: found as quantiles, kept in a file, refused where they do not belong."""

import functools
import json

import pytest
import torch
from tiny import NAMES, VOCAB, prompt, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.decoding import calibrate
from sirius_ext.decoding.calibrate import load_thresholds
from sirius_ext.decoding.thresholds import Thresholds
from sirius_ext.engine import prepare

TEXT = torch.randint(VOCAB, (600,), generator=torch.Generator().manual_seed(7))
HELD_BACK = 120

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def model(name="llama3", **config):
    return tiny(name, **config)


@functools.cache
def thresholds(name, density):
    return calibrate.calibrate(prepare(model(name)), TEXT, density)


@torch.no_grad()
def gates(name, tokens, stretch):
    """|silu(gate x)| of every token, float32 [layers, tokens * I]: hooked out of the `transformers` model, whose context is
    `stretch`."""
    plain, found = tiny(name), []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda _, args, out, at=at: found.append((at, out.abs().flatten())))
        for at, layer in enumerate(plain.model.layers)
    ]
    for part in tokens.split(stretch):
        plain(part[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat([values for at, values in found if at == layer]) for layer in range(len(plain.model.layers))]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_thresholds_are_quantiles(name, density):
    """Of the part that is not held back, read in stretches of the context: 256."""
    found = thresholds(name, density)
    read, held_back = gates(name, TEXT[:-HELD_BACK], 256), gates(name, TEXT[-HELD_BACK:], 256)
    assert found.tokens == (600, HELD_BACK) and found.density == density and len(found.values) == len(read)
    for value, kept, values, rest in zip(found.values, found.kept, read, held_back):
        assert value == pytest.approx(float(torch.quantile(values, 1 - density)), rel=1 / 256)
        assert float((values >= value).float().mean()) == pytest.approx(density, abs=1e-3)
        assert kept == pytest.approx(float((rest >= value).float().mean()), abs=1e-3)
        assert kept == pytest.approx(density, abs=0.05)


@torch.no_grad()
def test_texts_keep_near_the_density():
    """Random tokens are what was calibrated on: a step of S over others keeps about as many."""
    for density in (0.2, 0.6):
        found = thresholds("llama3", density)
        others = torch.randint(VOCAB, (200,), generator=torch.Generator().manual_seed(8))
        for value, values in zip(found.values, gates("llama3", others, 256)):
            assert float((values >= value).float().mean()) == pytest.approx(density, abs=0.03)


def test_progress():
    seen = []
    calibrate.calibrate(prepare(model()), TEXT, 0.5, seen.append)
    assert seen == [256, 480, 600]


def test_the_dtype_makes_little_difference():
    """A file made in float32 serves the model in bfloat16."""
    halves = calibrate.calibrate(prepare(tiny("llama3", torch.bfloat16)), TEXT, 0.4)
    exact = thresholds("llama3", 0.4)
    assert halves.model == exact.model
    assert halves.values == pytest.approx(exact.values, rel=0.03)


def test_a_short_context():
    """Stretches are no longer than it."""
    found = calibrate.calibrate(prepare(model("llama3", max_position_embeddings=40)), TEXT, 0.5)
    for value, values in zip(found.values, gates("llama3", TEXT[:-HELD_BACK], 40)):
        assert value == pytest.approx(float(torch.quantile(values, 0.5)), rel=1 / 256)


# --------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_a_file_and_back(tmp_path, name):
    file = tmp_path / "thresholds.json"
    found = thresholds(name, 0.3)
    found.save(file)
    for path in (file, str(file)):
        values = load_thresholds(path, prepare(model(name)).weights, 0.3)
        assert values.dtype == torch.float32 and values.tolist() == torch.tensor(found.values).tolist()
    record = json.loads(file.read_text())
    del record["format"]
    record["tokens"] = tuple(record["tokens"])
    assert Thresholds(**record) == found


def saved(folder, **changes):
    file = folder / "thresholds.json"
    thresholds("llama3", 0.3).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


def test_a_file_for_another_model(tmp_path):
    file = saved(tmp_path)
    others = [tiny("qwen2"), tiny("llama3", seed=1), tiny("llama3", num_hidden_layers=2), tiny("llama3", intermediate_size=100)]
    for other in others:
        with pytest.raises(ValueError, match="^thresholds: .* was made for another model; calibrate this one"):
            load_thresholds(file, prepare(other).weights, 0.3)


def test_a_file_for_another_density(tmp_path):
    with pytest.raises(ValueError, match="^thresholds: .* was made for density 0.3, but density is 0.5"):
        load_thresholds(saved(tmp_path), prepare(model()).weights, 0.5)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="^thresholds: no file .*nowhere.json"):
        load_thresholds(tmp_path / "nowhere.json", prepare(model()).weights, 0.5)


CORRUPT = {
    "empty": b"",
    "binary": b"\xff\xfe\x00",
    "text": b"thresholds",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "object": b"{}",
    "cut": b'{"format": "sirius_ext thresholds 1", "density": 0.3, "val',
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_file_that_is_corrupt(tmp_path, kind):
    file = tmp_path / "thresholds.json"
    file.write_bytes(CORRUPT[kind])
    with pytest.raises(ValueError, match="^thresholds: .* is not a file of `python -m sirius_ext calibrate`"):
        load_thresholds(file, prepare(model()).weights, 0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "sirius_ext thresholds 2"},
        {"values": ["a", "b", "c"]},
        {"values": 3},
        {"values": [None] * 3},
        {"values": [0.1, float("nan"), 0.1]},
        {"values": [0.1, float("inf"), 0.1]},
        {"values": [0.1, 0.1, -1.0]},
        {"density": None},
    ],
    ids=str,
)
def test_a_file_whose_fields_are_wrong(tmp_path, changes):
    with pytest.raises(ValueError, match="^thresholds: .* is not a file of"):
        load_thresholds(saved(tmp_path, **changes), prepare(model()).weights, 0.3)


@pytest.mark.parametrize("mode", ["sirius", "sparse"])
def test_generate_refuses_what_does_not_belong(tmp_path, mode):
    """Before any token."""
    engine, file = Engine(model()), saved(tmp_path)
    for density, path, message in ((0.4, file, "density 0.3"), (0.3, tmp_path / "none", "no file")):
        config = SiriusConfig(mode=mode, sparsity="fsparse", thresholds=path, density=density)
        with pytest.raises((ValueError, FileNotFoundError), match=f"^thresholds: .*{message}"):
            engine.generate(prompt(5), config=config, max_new_tokens=4)
    config = SiriusConfig(mode=mode, sparsity="fsparse", thresholds=str(file), density=0.3)
    assert engine.generate(prompt(5), config=config, max_new_tokens=4).stats.tokens == 4


def test_full_needs_no_thresholds(tmp_path):
    config = SiriusConfig(mode="full", sparsity="fsparse", thresholds=tmp_path / "none")
    assert Engine(model()).generate(prompt(5), config=config, max_new_tokens=4).stats.tokens == 4


def test_thresholds_need_fsparse():
    with pytest.raises(ValueError, match='^thresholds: they need sparsity="fsparse"'):
        SiriusConfig(thresholds="file")
    with pytest.raises(TypeError, match="^thresholds: expected a path, got int"):
        SiriusConfig(sparsity="fsparse", thresholds=3)


# --------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("count", [0, 1, 63])
def test_too_short_a_text(count):
    with pytest.raises(ValueError, match=f"^text: expected at least 64 tokens, got {count}"):
        calibrate.calibrate(prepare(model()), TEXT[:count], 0.5)
    assert calibrate.calibrate(prepare(model()), TEXT[:64], 0.5).tokens == (64, 12)


@pytest.mark.parametrize("density", [0, 1, -0.5, 1.5, float("nan")])
def test_densities_without_a_threshold(density):
    with pytest.raises(ValueError, match="^density: expected more than 0 and less than 1"):
        calibrate.calibrate(prepare(model()), TEXT, density)


def test_a_text_is_none_the_worse_for_a_calibration():
    engine = Engine(model())
    expected = engine.generate(prompt(8), max_new_tokens=20).sequences
    calibrate.calibrate(prepare(model()), TEXT, 0.5)
    assert torch.equal(engine.generate(prompt(8), max_new_tokens=20).sequences, expected)
