"""Draft trees and FSparse: the loop token for token against the reference, and what must hold whatever is drafted."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NAMES, PLAIN, decoder, engine, full_text, own_bits, prompt, seeded, tiny

from sirius_ext import Engine
from sirius_ext.decoding import calibrate, reference
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.sequence import Request, start
from sirius_ext.decoding.sparsity import CSparse, FSparse
from sirius_ext.engine import prepare
from sirius_ext.runtime.passes import Pass

WIDTHS, PERIODS = (1, 2, 3, 4, 8, 16), (1, 2, 5, 16)
SPARSITIES, ACCEPT = ("csparse", "fsparse"), ("threshold", "match", "sample")
LENGTHS = (5, 33, 1, 2)
COUNT = 18
EXACT = {"rtol": 0, "atol": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def thresholds(name, density):
    """What `calibrate` finds for a model: on random tokens, as its prompts are."""
    text = torch.randint(149, (400,), generator=torch.Generator().manual_seed(1))
    return calibrate.calibrate(prepare(engine(name).model), text, density)


def decode(engine, ids, config, count, seed=None, **asked):
    if config.accept == "sample" and config.mode == "sirius":
        asked = {"do_sample": True, "generator": seeded(seed), **PLAIN, **asked}
    out = engine.generate(ids, config=config, max_new_tokens=count, **asked)
    return out.sequences[0, ids.shape[1] :].tolist(), out.stats.prompts[0]


COLUMNS = ("drafted", "nodes", "accepted", "branch", "committed", "cut")


def rows(periods):
    return [tuple(getattr(period, column) for column in COLUMNS) for period in periods]


def check_against_reference(name, config, length, count=COUNT, seed=1, eos=(), warp=None, values=None, **asked):
    """The same uniform numbers on both sides, so the same tokens; unless one falls within a rounding error of the border between
    two tokens, which in 10000 draws may happen: then another seed must do. Likewise two nodes of nearly equal likelihood may
    change places; the likelihoods of a tree are compared in rising order."""
    ids = prompt(length)
    if eos:
        asked["eos_token_id"] = eos
    tokens, stats = decode(engine(name), ids, config, count, seed, **asked)
    sampling = reference.Sampling(seeded(seed), warp) if config.accept == "sample" else None
    expected, periods = reference.generate(
        decoder(name), ids[0].tolist(), config, count, eos, sampling=sampling, thresholds=values
    )
    assert tokens == expected
    assert rows(stats.periods) == rows(periods)
    for period, twin in zip(stats.periods, periods):
        in_order = list if config.tree_width == 1 else sorted
        assert in_order(period.likelihoods) == pytest.approx(in_order(twin.likelihoods), rel=1e-3, abs=1e-5)
        assert len(period.likelihoods) == period.nodes and period.seconds > 0
    assert (stats.period, stats.tree_width) == (config.period, config.tree_width)
    return tokens, stats


# ------------------------------------------------------------------------------------------------------ against the reference


def cases(sparsity, accept, width):
    """(model, config, prompt length) for every period; the rest takes turns."""
    first = SPARSITIES.index(sparsity) + ACCEPT.index(accept) + WIDTHS.index(width)
    for index, period in enumerate(PERIODS, start=first):
        config = own_bits(
            sparsity=sparsity,
            accept=accept,
            period=period,
            tree_width=width,
            density=(0.3, 0.5, 0.1)[index % 3] / (1 if sparsity == "csparse" else 3),
            threshold=(0.1, 0.02)[first % 2],
        )
        yield NAMES[index % 4], config, LENGTHS[index // 2 % 4]


@functools.cache
def outcome(name, config, length):
    return check_against_reference(name, config, length)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_equals_the_reference(sparsity, accept, width):
    for case in cases(sparsity, accept, width):
        outcome(*case)


def test_the_cases_are_interesting():
    """Every model meets every rule; drafts are accepted, rejected, and chosen among."""
    met = set()
    for sparsity, accept in itertools.product(SPARSITIES, ACCEPT):
        periods = []
        for width in WIDTHS:
            for name, config, length in cases(sparsity, accept, width):
                met.add((name, sparsity, accept))
                if config.period > 1:
                    periods += outcome(name, config, length)[1].periods
        assert sum(0 == period.accepted < period.drafted for period in periods) >= 5
        assert sum(0 < period.accepted < period.drafted for period in periods) >= 5
        assert sum(0 < period.accepted == period.drafted for period in periods) >= 5
        assert sum((period.branch or 0) > 0 for period in periods) >= 5
    assert met == set(itertools.product(NAMES, SPARSITIES, ACCEPT))


@pytest.mark.parametrize("accept", ["threshold", "match"])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_trees_equal_the_reference(name, accept):
    nodes = []
    for sparsity, (width, period) in zip(itertools.cycle(SPARSITIES), ((2, 5), (3, 8), (8, 4))):
        config = own_bits(accept=accept, prune=True, tree_width=width, period=period, sparsity=sparsity, score_temperature=0.3)
        _, stats = check_against_reference(name, config, 8)
        nodes += [(width * record.drafted, record.nodes) for record in stats.periods]
    assert all(pruned <= whole for whole, pruned in nodes)
    assert any(pruned < whole for whole, pruned in nodes), "nothing pruned"
    assert any(pruned == whole > 0 for whole, pruned in nodes)


@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("name", NAMES)
def test_thresholds_equal_the_reference(tmp_path, name, accept):
    file = tmp_path / "thresholds.json"
    thresholds(name, 0.4).save(file)
    for width, period in ((1, 6), (4, 5)):
        config = own_bits(
            sparsity="fsparse", density=0.4, thresholds=file, accept=accept, tree_width=width, period=period, threshold=0.05
        )
        tokens, _ = check_against_reference(name, config, 8, values=thresholds(name, 0.4).values)
        if accept == "match":
            assert tokens == full_text(engine(name), prompt(8), COUNT)


@pytest.mark.parametrize("form", ["count", "threshold"])
@pytest.mark.parametrize("name", NAMES)
def test_the_sparse_model_alone_equals_the_reference(tmp_path, name, form):
    file = tmp_path / "thresholds.json"
    thresholds(name, 0.3).save(file)
    config = own_bits(mode="sparse", sparsity="fsparse", density=0.3, thresholds=file if form == "threshold" else None)
    values = thresholds(name, 0.3).values if form == "threshold" else None
    tokens, _ = decode(engine(name), prompt(7), config, COUNT)
    assert tokens == reference.generate(decoder(name), prompt(7)[0].tolist(), config, COUNT, thresholds=values)[0]
    assert tokens != full_text(engine(name), prompt(7), COUNT)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_body_equals_the_reference(isa, sparsity):
    for index, (name, accept) in enumerate(zip(NAMES, (*ACCEPT, "threshold"))):
        config = own_bits(sparsity=sparsity, accept=accept, tree_width=2 + index, period=4, density=0.4, threshold=0.05)
        check_against_reference(name, config, 9, 10)


def test_warped_samples_equal_the_reference():
    """Both models' distributions are those that temperature, top-k and top-p leave."""

    def warp(row):
        row = row / 1.7
        row = row.masked_fill(row < row.topk(12).values[-1], -torch.inf)
        best, order = row.softmax(-1).sort(descending=True)
        return row.masked_fill(
            torch.zeros(len(row), dtype=torch.bool).index_fill(0, order[best.cumsum(0) - best >= 0.8], 1), -torch.inf
        )

    asked = {"temperature": 1.7, "top_k": 12, "top_p": 0.8}
    for name, width in zip(NAMES, (1, 2, 4, 16)):
        config = own_bits(accept="sample", tree_width=width, period=6, density=0.3)
        check_against_reference(name, config, 6, warp=warp, **asked)


@pytest.mark.parametrize("accept", ACCEPT)
def test_a_tree_ends_at_the_first_eos(accept):
    """Wherever in a period it stands."""
    config = own_bits(accept=accept, tree_width=3, period=6, threshold=0.02, density=0.5)
    tokens, _ = decode(engine("llama3"), prompt(4), config, COUNT, 3)
    last = []
    for eos in list(dict.fromkeys(tokens[:-1]))[::3]:
        ended, stats = check_against_reference("llama3", config, 4, eos=[eos], seed=3)
        assert ended == tokens[: tokens.index(eos) + 1] and stats.finish == "eos"
        last += stats.periods[-1:]
    assert any(period.committed <= period.accepted and period.cut for period in last), "no EOS inside a period"


def test_a_large_tree():
    """1009 nodes: masks of 16 words."""
    config = own_bits(tree_width=16, period=64, threshold=0, density=0.5)
    wide = Engine(tiny("llama3", max_position_embeddings=512))
    tokens, stats = decode(wide, prompt(3), config, 70)
    assert rows(stats.periods) == [
        (63, 63 * 16, 63, stats.periods[0].branch, 64, False),
        (4, 64, 4, stats.periods[1].branch, 5, True),
    ]
    match = own_bits(tree_width=16, period=64, accept="match", density=0.9)
    assert decode(wide, prompt(3), match, 70)[0] == full_text(wide, prompt(3), 70)


# ------------------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_match_is_the_full_text_in_half_precision(isa, name, dtype):
    """A chain's, exactly: a row's bits do not depend on the rows beside it."""
    for length, period, density in ((1, 17, 0.3), (6, 4, 0.5), (20, 7, 0.1)):
        config = own_bits(accept="match", sparsity="fsparse", period=period, density=density)
        tokens, stats = decode(engine(name, dtype), prompt(length), config, 40)
        assert tokens == full_text(engine(name, dtype), prompt(length), 40)
        assert any(period.accepted < period.drafted for period in stats.periods)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    sparsity=st.sampled_from(SPARSITIES),
    width=st.integers(1, 16),
    period=st.integers(1, 20),
    density=st.floats(0.01, 1),
    prune=st.booleans(),
    length=st.integers(1, 40),
    count=st.integers(1, 40),
)
def test_match_is_the_full_text(name, sparsity, width, period, density, prune, length, count):
    config = own_bits(
        accept="match", sparsity=sparsity, tree_width=width, period=period, density=density, prune=prune and width > 1
    )
    tokens, stats = decode(engine(name), prompt(length), config, count)
    assert tokens == full_text(engine(name), prompt(length), count)
    assert sum(record.committed for record in stats.periods) == count - 1
    left = count - 1
    for record in stats.periods:
        assert record.drafted == min(period, left) - 1 and record.cut == (record.drafted < period - 1)
        assert record.committed == record.accepted + 1 and (record.branch is None) == (record.accepted == 0)
        assert record.nodes == width * record.drafted or prune and record.drafted <= record.nodes <= width * record.drafted
        left -= record.committed


@pytest.mark.parametrize("name", NAMES)
def test_wider_trees_get_further(name):
    """Not in every period, but over some texts."""

    def mean(width, period):
        config = own_bits(accept="match", tree_width=width, period=period, density=0.3)
        periods = [record for n in range(1, 9) for record in decode(engine(name), prompt(n), config, 40)[1].periods]
        return sum(record.committed for record in periods) / len(periods)

    assert mean(1, 6) < mean(4, 6) < mean(16, 6)


def test_the_tree_saves_what_the_chain_loses():
    """Under `threshold` a tree holds a path at least as long as any that it branches off: with all tokens of a small vocabulary
    in it, a first draft is never rejected."""
    small = Engine(tiny("llama3", vocab_size=8))
    config = own_bits(accept="match", tree_width=8, period=2, density=0.05)
    ids = torch.tensor([[3, 1, 4]])
    tokens, stats = decode(small, ids, config, 41)
    assert rows(stats.periods) == [(1, 8, 1, record.branch, 2, False) for record in stats.periods]
    assert tokens == full_text(small, ids, 41) and len(stats.branches) > 1


@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_cache_is_that_of_a_fresh_prefill(name, sparsity, accept):
    """Whenever tokens are committed: all of them but the last are in it."""
    plain, ids = tiny(name), prompt(9)[0]
    config = own_bits(accept=accept, sparsity=sparsity, tree_width=4, period=6, density=0.1, threshold=0.05)
    text = start(prepare(engine(name).model), Request(ids, config, 40, sample=accept == "sample", generator=seeded(0)))
    periods = 0
    while not text.ended:
        periods += len(text.step().tokens) > 1
        known = [*ids.tolist(), *text.tokens[:-1]]
        assert text.cache.tokens == known
        layers = plain(torch.tensor([known])).past_key_values.layers
        for cache, part in ((text.cache.k, "keys"), (text.cache.v, "values")):
            fresh = torch.cat([getattr(layer, part) for layer in layers])
            torch.testing.assert_close(cache[:, :, : len(known)], fresh, rtol=1e-4, atol=1e-4)
    assert len(text.tokens) == 40 and periods >= 4
    assert any((period.branch or 0) > 0 for period in text.stats.periods), "nothing was moved"


# ------------------------------------------------------------------------------------------------------- density 1 is the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_all_neurons_are_the_full_model_bit_for_bit(isa, name, dtype):
    model = prepare(engine(name, dtype).model)
    layers, neurons = len(model.weights.layers), model.weights.intermediate
    cache, sparse = model.new_cache(), CSparse(layers, neurons, 1)
    model.reserve(cache, 20, 1)
    drive(model, cache, read(cache, prompt(11)[0], sparse))
    arguments = (torch.tensor([5], dtype=torch.int32), torch.tensor([11], dtype=torch.int32), torch.tensor([[1]]), 11, 11)
    full = model.step(cache, Pass(*arguments))[0].clone()
    for each in (sparse, FSparse(neurons, 1), FSparse(neurons, 1, torch.zeros(layers))):
        torch.testing.assert_close(model.step(cache, Pass(*arguments, each))[0], full, **EXACT)
    config = own_bits(accept="match", sparsity="fsparse", density=1, period=6)
    tokens, stats = decode(engine(name, dtype), prompt(11), config, 40)
    assert tokens == full_text(engine(name, dtype), prompt(11), 40)
    assert [(record.drafted, record.accepted) for record in stats.periods] == [(5, 5)] * 6 + [(2, 2)]
    assert stats.density == 1


def test_the_density_of_the_sparse_model():
    weights = prepare(engine("llama3").model).weights
    for sparsity, share in (("csparse", 1), ("fsparse", 2 / 3)):
        _, stats = decode(engine("llama3"), prompt(5), own_bits(sparsity=sparsity, density=0.3), 5)
        assert stats.density == pytest.approx(1 - 0.7 * share * weights.num_mlp_parameters / weights.num_parameters)
