"""What S reads of plain weights if nobody says: a copy in four bits wherever there is room for one, settled once for a model."""

import contextlib
import dataclasses
import functools
import threading
import time

import pytest
import torch
from backends import emulated
from test_memory import checkpoint, small  # noqa: F401 - a fixture
from tiny import full_text, prompt, tiny
from transformers.utils import logging

from sirius_ext import Engine, SiriusConfig, _simt, attach
from sirius_ext.decoding.sparsity import density_of, drafts_of, four_bits
from sirius_ext.engine import prepare, release
from sirius_ext.kernels.matrix import Matrix
from sirius_ext.models import hub
from sirius_ext.models import weights as weights_module
from sirius_ext.models.tiers import Tiers
from sirius_ext.models.weights import Weights

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16
AUTO = SiriusConfig(mode="sparse")
COPY, SAME = (dataclasses.replace(AUTO, draft_weights=draft) for draft in ("q4", "same"))
LENGTH, COUNT = 20, 24


@pytest.fixture(params=["cpu", "simt"])
def place(request):
    """The CPU's backend, and CUDA's over the emulator, whose device has the host's memory."""
    with emulated(_simt) if request.param == "simt" else contextlib.nullcontext():
        yield request.param


def engine(name="llama3"):
    return Engine(tiny(name, BF16))


def text(engine, config):
    return engine.generate(prompt(LENGTH), config=config, max_new_tokens=COUNT).sequences[0, LENGTH:].tolist()


def weights_of(engine) -> Weights:
    return prepare(engine.model).weights


def free(monkeypatch, engine, more=0):
    """As much memory as a copy takes beside caches and activations, and some more, or less."""
    weights = weights_of(engine)
    monkeypatch.setattr(weights_module, "free_on", lambda device: weights.copy_bytes + weights._beside + more)


def test_a_copy_where_there_is_room(place, monkeypatch):
    """Of all neurons: S reads less than half of what F reads, and its text is that of the copy that is asked for by name."""
    one = engine()
    free(monkeypatch, one)
    assert text(one, AUTO) == text(engine(), COPY) != text(engine(), SAME)
    weights = weights_of(one)
    assert weights.has_copy and density_of(AUTO, weights) == 1
    assert one.generate(prompt(9), config=AUTO, max_new_tokens=2).stats.density < 0.5
    half = dataclasses.replace(AUTO, density=0.5)
    assert four_bits(half, weights) and density_of(half, weights) == 0.5
    assert density_of(dataclasses.replace(AUTO, sparsity="fsparse"), weights) == 0.5


def test_none_where_there_is_no_room(place, monkeypatch):
    one = engine()
    free(monkeypatch, one, -1)
    assert text(one, AUTO) == text(engine(), SAME)
    assert not weights_of(one).has_copy and density_of(AUTO, weights_of(one)) == 0.5


@pytest.mark.parametrize("name", ["llama", "llama3", "phi3", "gemma2"])
def test_the_bytes_of_a_copy_are_known_before(name, tmp_path):
    """Fused projections, a head that is the embedding, or its own. What a plan counts is the same."""
    model = tiny(name, BF16)
    weights = prepare(model).weights
    view = weights.four_bits
    matrices = [view.lm_head, *(part for layer in view.layers for part in weights_module._matrices(layer))]
    assert weights.copy_bytes == sum(part.nbytes for part in matrices)
    model.save_pretrained(tmp_path)
    found = hub.division(1 << 60, functools.partial(drafts_of, AUTO), tmp_path, BF16, False)
    assert found.plan.copy == found.plan.parts["the sparse model"] == weights.copy_bytes


def test_it_is_settled_once(monkeypatch):
    """Whatever happens to the memory afterwards, and also if a copy is made after all, because it is asked for by name."""
    one, other = engine(), engine()
    expected = {config: text(engine(), config) for config in (COPY, SAME)}
    free(monkeypatch, one, -1)
    assert text(one, AUTO) == expected[SAME]
    free(monkeypatch, one, 1 << 40)
    assert text(one, AUTO) == expected[SAME]
    assert text(one, COPY) == expected[COPY] and text(one, AUTO) == expected[SAME]

    assert text(other, AUTO) == expected[COPY]
    free(monkeypatch, other, -1)
    assert text(other, AUTO) == expected[COPY]


def test_a_copy_that_is_there_counts(monkeypatch):
    one = engine()
    free(monkeypatch, one, -1)
    assert text(one, COPY) == text(one, AUTO) and weights_of(one).has_copy


def test_two_threads_make_one_copy(monkeypatch):
    one, found, packed = engine(), [], []
    weights, begin = weights_of(one), threading.Barrier(4)
    in_four_bits = Weights.in_four_bits
    monkeypatch.setattr(Weights, "in_four_bits", lambda *arguments: packed.append(1) or in_four_bits(*arguments))
    free(monkeypatch, one)

    def ask():
        begin.wait()
        found.append(weights.settle())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [True] * 4 and packed == [1]


def test_the_full_model_alone_makes_none(cache, tmp_path):
    """Neither when it is loaded nor when it decodes; the first sparse text does."""
    tiny("llama3", BF16).save_pretrained(tmp_path)
    full = SiriusConfig(mode="full")
    for lookup in (False, True):
        one = Engine.from_pretrained(str(tmp_path), full, "cpu", progress=False)
        text(one, dataclasses.replace(full, lookup=lookup))
        assert not weights_of(one).has_copy and weights_of(one)._settled is None
    text(one, AUTO)
    assert weights_of(one).has_copy


def test_it_is_made_when_a_model_is_loaded(cache, tmp_path, capsys):
    tiny("llama3", BF16).save_pretrained(tmp_path)
    said = "packing the sparse model's copy into four bits ... "
    one = Engine.from_pretrained(str(tmp_path), device="cpu")
    assert weights_of(one).has_copy and said in capsys.readouterr().err
    text(one, SiriusConfig())
    assert said not in capsys.readouterr().err
    for config in (SAME, SiriusConfig(draft_weights="same")):
        one = Engine.from_pretrained(str(tmp_path), config, "cpu")
        text(one, config)
        assert not weights_of(one).has_copy and said not in capsys.readouterr().err


def test_of_a_loaded_model_it_is_made_for_the_first_sparse_text(capsys):
    """Which is said, unless progress is not to be shown."""
    said = "packing the sparse model's copy into four bits ... "
    one = engine()
    assert not weights_of(one).has_copy
    text(one, AUTO)
    assert capsys.readouterr().err.count(said) == 1
    text(one, AUTO)
    model = tiny("llama3", BF16)
    with attach(model, AUTO):
        model.generate(prompt(LENGTH), max_new_tokens=4)
        assert prepare(model).weights.has_copy and capsys.readouterr().err.count(said) == 1
    logging.disable_progress_bar()
    try:
        text(engine(), AUTO)
    finally:
        logging.enable_progress_bar()
    assert said not in capsys.readouterr().err


@pytest.mark.parametrize("config", [AUTO, COPY], ids=["auto", "q4"])
def test_texts_that_begin_together_make_one_copy(monkeypatch, capsys, config):
    """And one of them says so."""
    one, found, packed = engine(), [], []
    begin, in_four_bits = threading.Barrier(4), Weights.in_four_bits

    def slow(*arguments):
        packed.append(1)
        time.sleep(0.2)
        return in_four_bits(*arguments)

    monkeypatch.setattr(Weights, "in_four_bits", slow)
    weights_of(one)

    def ask():
        begin.wait()
        found.append(text(one, config))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [found[0]] * 4 and packed == [1]
    assert capsys.readouterr().err.count("packing the sparse model's copy into four bits ... ") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_copy_that_does_not_fit_after_all(place, monkeypatch, capsys, error):
    """Then S reads what F reads, and goes on doing so. Who has asked for a copy is told."""
    one, left = engine(), [8]
    expected, in_four_bits = text(engine(), SAME), Matrix.in_four_bits

    def fails(matrix):
        left[0] -= 1
        if left[0] < 0:
            raise error("no memory")
        return in_four_bits(matrix)

    with monkeypatch.context() as patched:
        patched.setattr(Matrix, "in_four_bits", fails)
        capsys.readouterr()
        assert text(one, AUTO) == expected and left[0] < 0
        assert "; it cannot be had: the sparse model reads what the full model reads" in capsys.readouterr().err
        with pytest.raises(error, match="no memory"):
            text(engine(), COPY)
    assert text(one, AUTO) == expected and not weights_of(one).has_copy


def test_weights_that_four_bits_cannot_hold():
    """Their scale is too large for half precision."""
    model = tiny("llama3")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e8
    one = Engine(model)
    text(one, AUTO)
    assert not weights_of(one).has_copy
    with pytest.raises(
        ValueError, match="^draft_weights: four bits cannot hold this model's weights: expected finite weights .* row 3"
    ):
        text(one, COPY)


@pytest.mark.parametrize("settings", [{}, {"period": 5}, {"period": 4, "tree_width": 3}, {"sparsity": "cascade"}], ids=str)
def test_match_is_the_full_text(place, settings):
    one = engine("qwen2")
    ids = prompt(LENGTH)
    out = one.generate(ids, config=SiriusConfig(accept="match", **settings), max_new_tokens=40)
    assert weights_of(one).has_copy
    assert out.sequences[0, LENGTH:].tolist() == full_text(one, ids, 40)


def test_weights_that_were_changed_have_another_copy():
    one = engine()
    text(one, AUTO)
    before = weights_of(one).four_bits
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.mul_(0.5)
    changed = Engine(tiny("llama3", BF16))
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(0.5)
    release(changed.model)
    assert text(one, AUTO) == text(changed, AUTO)
    assert weights_of(one).four_bits is not before


# ---------------------------------------------------------------------------------------------------------- a given memory


@pytest.fixture
def whole(small, cache):  # noqa: F811 - the fixture of that name
    """Bytes that all of a model takes: with a sparse model's copy, and that copy."""

    def found(config):
        plan = hub.division(1 << 60, functools.partial(drafts_of, config), checkpoint(), BF16, False).plan
        assert plan.used == sum(plan.parts.values()) and not plan.streamed
        return plan.used, plan.copy

    return found


def loaded(config, memory):
    return Engine.from_pretrained(str(checkpoint()), config, "cpu", BF16, progress=False, memory=memory)


def test_a_given_memory_is_kept_to(place, whole, monkeypatch):
    """With room for model and copy, and without; however much is free. `info` says what loading does."""
    used, copy = whole(AUTO)
    assert copy > 0 and whole(SAME) == (used - copy, 0)
    for memory, has_copy in ((used, True), (used - 1, False), (used - copy, False)):
        monkeypatch.setattr(weights_module, "free_on", lambda device, all_or_none=has_copy: 0 if all_or_none else 1 << 60)
        one = loaded(AUTO, memory)
        assert weights_of(one).tiers is None and weights_of(one).has_copy == has_copy == four_bits(AUTO, weights_of(one))
        assert text(one, AUTO) == text(loaded(COPY if has_copy else SAME, None), COPY if has_copy else SAME)
        plan = hub.division(memory, functools.partial(drafts_of, AUTO), checkpoint(), BF16, False).plan
        assert (plan.copy > 0) == has_copy and plan.used <= memory


def test_what_is_loaded_is_not_counted_twice(whole, monkeypatch):
    """As a part of the process, too, in which it is by then."""
    used, copy = whole(AUTO)
    load = hub._load

    def loading(*arguments):
        found = load(*arguments)
        monkeypatch.setattr(hub, "memory_in_use", lambda: 1 << 60)
        return found

    monkeypatch.setattr(hub, "_load", loading)
    weights = weights_of(loaded(AUTO, used))
    assert weights.has_copy and weights.copy_memory == copy


def test_a_copy_by_name_belongs_to_a_given_memory(whole):
    """Where it leaves no room for all of the full model, a part of that comes from the disk."""
    used, copy = whole(COPY)
    assert weights_of(loaded(COPY, used)).tiers is None
    one = loaded(COPY, used - copy)  # what the full model takes alone
    tiers = weights_of(one).tiers
    assert isinstance(tiers, Tiers) and tiers.plan.streamed > 0 and tiers.plan.used <= used - copy
    assert text(one, COPY) == text(loaded(COPY, None), COPY)


def test_later_settings_keep_to_it_too(whole):
    """Of a model that was loaded for the full model alone."""
    used, _ = whole(AUTO)
    for memory in (used, used - 1):
        one = loaded(SiriusConfig(mode="full"), memory)
        assert weights_of(one).tiers is None and not weights_of(one).has_copy
        text(one, AUTO)
        assert weights_of(one).has_copy == (memory == used)
