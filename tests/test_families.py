"""Every model family beyond Llama's: the full model's text is that of `transformers`, all rules are the reference's, and sliding
windows are right for texts longer than they are."""

import functools

import pytest
import torch
from backends import emulated
from tiny import FAMILY_NAMES, WINDOW, decoder, engine, full_text, own_bits, prompt, seeded, tiny

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.decoding import reference
from sirius_ext.models.families import FAMILIES, check_supported

LENGTHS = (5, WINDOW - 3, 2 * WINDOW + 9)  # within a window, across its end, beyond it
COUNT = 24

pytestmark = pytest.mark.usefixtures("one_thread")

every_family = pytest.mark.parametrize("name", FAMILY_NAMES)
CORRECTED = {
    "chain": own_bits(period=5, threshold=0.05),
    "fsparse": own_bits(period=4, sparsity="fsparse", density=0.4, threshold=0.05),
    "tree": own_bits(period=4, tree_width=3, threshold=0.05, follow=False),
    "match": own_bits(period=7, accept="match", density=0.4),
    "match-tree": own_bits(period=3, tree_width=4, accept="match"),
    "sparse": own_bits(mode="sparse"),
}


@functools.cache
def expected(name: str, length: int) -> list[int]:
    """What `transformers` says after a prompt."""
    return tiny(name).generate(prompt(length), max_new_tokens=COUNT)[0, length:].tolist()


def decode(model: Engine, length: int, config: SiriusConfig, count: int = COUNT, **settings) -> list[int]:
    return model.generate(prompt(length), config=config, max_new_tokens=count, **settings).sequences[0, length:].tolist()


def test_each_family_has_a_model():
    assert {tiny(name).config.model_type for name in FAMILY_NAMES} | {"llama"} == set(FAMILIES)


def test_the_texts_know_windows():
    """What a window hides matters to the models with one: without it they say something else."""
    for name in FAMILY_NAMES:
        config = tiny(name).config
        if getattr(config, "sliding_window", None) and check_supported(config):
            wide = tiny(name, sliding_window=200).generate(prompt(LENGTHS[2]), max_new_tokens=COUNT)[0, LENGTHS[2] :].tolist()
            assert wide != expected(name, LENGTHS[2]), name


@every_family
def test_the_full_text_is_that_of_transformers(name):
    for length in LENGTHS:
        assert decode(engine(name), length, SiriusConfig(mode="full")) == expected(name, length)
        for rule in ("match", "match-tree"):
            assert decode(engine(name), length, CORRECTED[rule]) == expected(name, length)


@every_family
@pytest.mark.parametrize("rule", CORRECTED)
def test_every_rule_is_the_reference(name, rule):
    for length in LENGTHS:
        tokens, _ = reference.generate(decoder(name), prompt(length)[0].tolist(), CORRECTED[rule], COUNT)
        assert decode(engine(name), length, CORRECTED[rule]) == tokens


@every_family
def test_samples_are_the_reference(name):
    for width, length in ((1, LENGTHS[1]), (3, LENGTHS[2])):
        config = own_bits(accept="sample", period=4, tree_width=width)
        sampling = reference.Sampling(seeded(3))
        tokens, _ = reference.generate(decoder(name), prompt(length)[0].tolist(), config, COUNT, sampling=sampling)
        plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        assert decode(engine(name), length, config, generator=seeded(3), **plain) == tokens


@every_family
def test_match_is_the_full_text_in_half_precision(isa, name):
    """Exactly: a row's bits do not depend on the rows beside it, windows or not."""
    for length in LENGTHS:
        tokens = full_text(engine(name, torch.bfloat16), prompt(length), COUNT)
        for rule in ("match", "match-tree"):
            assert decode(engine(name, torch.bfloat16), length, CORRECTED[rule]) == tokens


@every_family
def test_the_cuda_kernels(name):
    """Over simt, which is slow: what each family has of its own, for texts beyond a window."""
    cases = [(own_bits(period=4, accept="match", density=0.4), LENGTHS[1], 9)]
    cases.append((own_bits(period=3, tree_width=3, threshold=0.05), LENGTHS[2], 6))
    if name in ("gemma3", "phi3"):
        cases.append((CORRECTED["fsparse"], LENGTHS[1], 6))
    with emulated(_simt):
        model = Engine(tiny(name))
        for config, length, count in cases:
            tokens, _ = reference.generate(decoder(name), prompt(length)[0].tolist(), config, count)
            assert decode(model, length, config, count) == tokens
        if name in ("gemma2", "gemma3", "granite"):  # a library multiplies more than sixteen tokens
            many = own_bits(period=20, accept="match", density=0.9)
            assert decode(model, LENGTHS[1], many, 18) == expected(name, LENGTHS[1])[:18]


def test_a_period_wider_than_a_window():
    config = own_bits(period=WINDOW + 1)
    with pytest.raises(ValueError, match=f"^period: expected at most {WINDOW}, this model's sliding window, got {WINDOW + 1}"):
        engine("gemma3").generate(prompt(5), config=config, max_new_tokens=2)
    engine("gemma3").generate(prompt(5), config=own_bits(period=WINDOW), max_new_tokens=2 * WINDOW)


def test_longrope_ends_where_its_angles_change():
    model = engine("phi3_windows")
    out = model.generate(prompt(100), config=SiriusConfig(mode="full"), max_new_tokens=100)
    assert out.sequences.shape[1] == 128 and out.stats.prompts[0].finish == "context"
