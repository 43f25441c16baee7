"""The metrics of SPEC section 7 on periods made by hand."""

import json
import warnings

import pytest
import torch
from tiny import own_bits, prompt, tiny

from sirius_ext import Engine, Period, PromptStats, SiriusConfig, Stats, generate
from sirius_ext.decoding import reference
from sirius_ext.decoding.stats import CostlyDrafts


def period(drafted, accepted, committed=None, cut=False, width=1, branch=0):
    """Without `committed`, that of a period which the end of the text does not cut."""
    committed = accepted + 1 if committed is None else committed
    likelihoods = [0.5] * drafted * width
    return Period(drafted, len(likelihoods), accepted, branch if accepted else None, committed, cut, likelihoods, 0.01)


def prompt_stats(periods, tokens=None, **values):
    tokens = 1 + sum(record.committed for record in periods) if tokens is None else tokens
    return PromptStats(
        **{"mode": "sirius", "period": 4, "density": 0.65, "prompt_tokens": 7, "tokens": tokens, "periods": periods, **values}
    )


PERIODS = [
    period(3, 3),
    period(3, 1),
    period(3, 0),
    period(3, 2, 2, cut=True),  # EOS was the last accepted draft
    period(2, 2, cut=True),  # the token limit left room for three
]


def test_metrics():
    stats = prompt_stats(PERIODS, decode_seconds=0.6)
    assert stats.tokens == 1 + 4 + 2 + 1 + 2 + 3
    assert stats.average_advance_length == pytest.approx((4 + 2 + 1) / 3)
    assert stats.effective_density == pytest.approx((3 * 0.65 + 1) / (7 / 3))
    assert stats.corrected_fraction == pytest.approx(2 / 12)
    assert stats.rollback_length == pytest.approx((0 + 2 + 3 + 1 + 0) / 5)
    assert stats.drafted_nodes == pytest.approx((3 * 4 + 2) / 5)
    assert stats.branches == {0: 4}
    assert stats.ms_per_token == pytest.approx(600 / 13)
    assert stats.metrics() == {
        "average_advance_length": stats.average_advance_length,
        "effective_density": stats.effective_density,
        "corrected_fraction": stats.corrected_fraction,
        "rollback_length": stats.rollback_length,
        "drafted_nodes": stats.drafted_nodes,
        "ms_per_token": stats.ms_per_token,
    }


def test_the_papers_check():
    """n = 16, density 0.65, AAL 15.22 gives 0.706."""
    stats = prompt_stats([period(15, 15)] * 90 + [period(15, 7)] * 8 + [period(15, 8)] * 2 + [period(3, 3, cut=True)], period=16)
    assert stats.average_advance_length == 15.22
    assert round(stats.effective_density, 3) == 0.706


def test_an_eos_before_the_correction_replaces_nothing():
    """Two drafts accepted, the first of them EOS: the rejected third was after the end."""
    stats = prompt_stats([period(3, 2, 1, cut=True)])
    assert stats.corrected_fraction == 0 and stats.rollback_length == 2
    assert stats.average_advance_length is None and stats.effective_density is None


def test_an_eos_as_the_correction():
    """It ends the text, and cuts nothing off."""
    stats = prompt_stats([period(3, 1)])
    assert stats.corrected_fraction == 1 / 2 and stats.rollback_length == 2 and stats.average_advance_length == 2


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_without_periods(mode):
    stats = prompt_stats([], tokens=9, mode=mode, period=1, decode_seconds=0.09)
    assert stats.metrics() == {
        "average_advance_length": None,
        "effective_density": None,
        "corrected_fraction": None,
        "rollback_length": None,
        "drafted_nodes": None,
        "ms_per_token": pytest.approx(10),
    }
    assert stats.branches == {}


def test_without_tokens():
    assert prompt_stats([], tokens=0).ms_per_token is None


def test_a_period_of_one():
    """Verifications that draft nothing: the full model, at its own cost."""
    stats = prompt_stats([period(0, 0)] * 5, period=1)
    assert stats.average_advance_length == 1 and stats.effective_density == 1
    assert stats.corrected_fraction == 0 and stats.rollback_length == 0
    assert stats.drafted_nodes == 0 and stats.branches == {}


def test_trees():
    """All branches count as drafted and thrown away; a pass of S costs the same with one leaf or many."""
    chains = [period(3, 3), period(3, 1), period(3, 0), period(2, 2, cut=True)]
    trees = [
        period(3, 3, width=4, branch=2),
        period(3, 1, width=4),
        period(3, 0, width=4),
        period(2, 2, cut=True, width=4, branch=2),
    ]
    chain, tree = prompt_stats(chains), prompt_stats(trees, tree_width=4)
    for name in ("average_advance_length", "effective_density", "corrected_fraction"):
        assert getattr(tree, name) == getattr(chain, name)
    assert (chain.drafted_nodes, tree.drafted_nodes) == (11 / 4, 11)
    assert chain.rollback_length == pytest.approx((0 + 2 + 3 + 0) / 4)
    assert tree.rollback_length == pytest.approx((9 + 11 + 12 + 6) / 4)
    assert (chain.branches, tree.branches) == ({0: 3}, {0: 1, 2: 2})


def test_a_pruned_tree():
    """Fewer nodes than the width allows."""
    record = Period(drafted=3, nodes=7, accepted=2, branch=1, committed=3, cut=False, likelihoods=[0.5] * 7)
    stats = prompt_stats([record], tree_width=4)
    assert stats.drafted_nodes == 7 and stats.rollback_length == 5 and stats.corrected_fraction == 1 / 3


def test_branches_are_in_order_and_pooled():
    first = prompt_stats([period(3, 1, width=9, branch=branch) for branch in (8, 2, 0, 2)])
    second = prompt_stats([period(3, 2, width=9, branch=2), period(3, 0, width=9, branch=5), period(3, 3, width=9, branch=1)])
    assert list(first.branches.items()) == [(0, 1), (2, 2), (8, 1)]
    assert list(Stats([first, second]).branches.items()) == [(0, 1), (1, 1), (2, 3), (8, 1)]


def test_effective_density_of_periods_of_all_lengths():
    """Pooled: what all passes read over all tokens that they gave. Cut periods are left out."""
    stats = prompt_stats([period(1, 1), period(7, 3), period(0, 0), period(31, 31, cut=True)], period="auto")
    assert stats.average_advance_length == pytest.approx(7 / 3)
    assert stats.effective_density == pytest.approx((8 * 0.65 + 3) / 7)


def test_prompts_are_pooled():
    """By periods and tokens, not by averaging the prompts' metrics."""
    first = prompt_stats([period(3, 3)] * 9, decode_seconds=1.0, prefill_seconds=0.5)
    second = prompt_stats([period(3, 0)], decode_seconds=3.0, prefill_seconds=0.25)
    third = prompt_stats([], tokens=1, decode_seconds=0.0)
    stats = Stats([first, second, third])
    assert stats.prompts == [first, second, third]
    assert stats.tokens == 37 + 2 + 1 and stats.periods == first.periods + second.periods
    assert stats.average_advance_length == pytest.approx(37 / 10)
    assert stats.effective_density == pytest.approx((3 * 0.65 + 1) / 3.7)
    assert stats.corrected_fraction == pytest.approx(1 / 37)
    assert stats.rollback_length == pytest.approx(3 / 10)
    assert stats.drafted_nodes == 3 and stats.branches == {0: 9}
    assert (stats.period, stats.tree_width, stats.density) == (4, 1, 0.65)
    assert stats.ms_per_token == pytest.approx(4000 / 40)
    assert (stats.decode_seconds, stats.prefill_seconds) == (4.0, 0.75)


def test_one_prompt_pooled_is_itself():
    stats = prompt_stats(PERIODS, decode_seconds=0.6)
    assert Stats([stats]).metrics() == stats.metrics()


def test_stats_take_any_iterable():
    assert Stats(prompt_stats(PERIODS) for _ in range(2)).tokens == 26


def test_as_a_dictionary():
    """Everything is in it, and it survives JSON."""
    stats = Stats([prompt_stats(PERIODS, finish="eos", decode_seconds=0.6), prompt_stats([], tokens=1, finish="length")])
    read = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert read == stats.to_dict()
    assert {name: read[name] for name in stats.metrics()} == stats.metrics()
    first, second = read["prompts"]
    assert first["periods"][1] == {
        "drafted": 3,
        "nodes": 3,
        "accepted": 1,
        "branch": 0,
        "committed": 2,
        "cut": False,
        "likelihoods": [0.5] * 3,
        "seconds": 0.01,
        "copied": 0,
    }
    names = ("mode", "period", "tree_width", "density", "prompt_tokens", "tokens", "finish", "prefill_seconds", "decode_seconds")
    assert [first[name] for name in names] == ["sirius", 4, 1, 0.65, 7, 13, "eos", 0.0, 0.6]
    assert first["average_advance_length"] == pytest.approx(7 / 3) and second["average_advance_length"] is None


def test_repr():
    assert repr(Stats([prompt_stats(PERIODS)])).startswith("Stats(prompts=1, tokens=13, average_advance_length=2.333, ")
    assert "average_advance_length" not in repr(Stats([prompt_stats([], tokens=4)]))


@pytest.mark.parametrize(
    "config",
    [
        own_bits(period=5, density=0.4, threshold=0.05),
        own_bits(period=7, density=0.4, threshold=0),
        own_bits(period=3, accept="match"),
        own_bits(period=1),
        own_bits(period=5, density=0.4, tree_width=3),
        own_bits(period=6, density=0.3, tree_width=4, prune=True, accept="match"),
        own_bits(period=5, density=0.3, sparsity="fsparse"),
        own_bits(period=4, density=0.3, sparsity="fsparse", tree_width=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("eos", [False, True])
def test_agrees_with_the_reference(config, eos):
    """On a real text, its own functions on its own periods; with an EOS in the last one."""
    torch.set_num_threads(1)
    model, ids = tiny("llama3"), prompt(6)
    engine, decoder = Engine(model, config), reference.Decoder(model)
    tokens, _ = reference.generate(decoder, ids[0].tolist(), config, 33)
    stop = [next(token for token in tokens[20:] if tokens.index(token) >= 20)] if eos else []
    tokens, periods = reference.generate(decoder, ids[0].tolist(), config, 33, stop)
    stats = engine.generate(ids, max_new_tokens=33, eos_token_id=stop or None).stats.prompts[0]
    assert stats.tokens == len(tokens) and stats.finish == ("eos" if eos else "length")
    advance = reference.average_advance_length(periods)
    assert stats.average_advance_length == advance
    assert stats.effective_density == pytest.approx(reference.effective_density(advance, config.period, stats.density))
    assert stats.corrected_fraction == reference.corrected_fraction(periods)
    assert stats.rollback_length == reference.rollback_length(periods)
    assert stats.drafted_nodes == sum(record.nodes for record in periods) / len(periods)
    branches = [record.branch for record in periods if record.branch is not None]
    assert stats.branches == {branch: branches.count(branch) for branch in sorted(set(branches))}
    weights = sum(parameter.numel() for parameter in model.parameters())
    mlp = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name)
    assert stats.density == pytest.approx(reference.density_of(config.sparsity, config.density_with(), mlp, weights))


def test_times_are_of_this_text():
    out = Engine(tiny(), SiriusConfig(period=4)).generate(prompt(6), max_new_tokens=40)
    (stats,) = out.stats.prompts
    assert 0 < sum(record.seconds for record in stats.periods) <= stats.decode_seconds
    assert stats.ms_per_token == pytest.approx(1e3 * stats.decode_seconds / 40)
    assert 0 < stats.prefill_seconds < 60


# ------------------------------------------------------------------------------------------------------------------- advice


def test_advice_where_drafts_cost_more_than_they_save():
    """Half of the drafts are right: a pair of tokens costs 1.65 and brings 1.5."""
    advice = prompt_stats([period(15, run) for run in (1, 1, 0, 2, 1, 1)]).advice
    assert "effective density 5.38, 2.0 tokens a verification" in advice and 'mode="full"' in advice
    # Four of five are right.
    advice = prompt_stats([period(15, run) for run in (4, 6, 2, 5, 3)]).advice
    assert "effective density 2.15, 5.0 tokens a verification; period=2 suits it" in advice
    for pays in ([period(15, 15), period(15, 15)], [period(3, 3), period(3, 3), period(3, 2)], []):
        assert prompt_stats(pays).advice is None
    # Five drafts say nothing yet, six do; of several texts together.
    few = [prompt_stats([period(15, run)]) for run in (1, 1, 0)]
    assert few[0].advice is None and Stats(few[:2]).advice is None and Stats(few).advice is None
    assert "effective density" in Stats([*few, few[2]]).advice


def test_advice_is_given_once_a_model():
    model = tiny("llama3")
    config = SiriusConfig(period=16, density=0.1, accept="match")
    with pytest.warns(CostlyDrafts, match="^this text read more than the full model alone would have: effective density") as seen:
        out = model.generate(prompt(8), custom_generate=generate, sirius_config=config, max_new_tokens=60, do_sample=False)
    assert out.shape[1] == 68 and [warning.filename for warning in seen] == [__file__]  # the line that asked for the text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(model, config).generate(prompt(8), max_new_tokens=60)
        Engine(tiny("llama3"), SiriusConfig(density=1.0, accept="match", period=4)).generate(prompt(8), max_new_tokens=60)


@pytest.mark.parametrize(
    ("weights", "draft_weights", "hint"),
    [
        ("bfloat16", "same", "; four bits make it cheaper: weights='q8', or draft_weights='q4', for which there must be memory"),
        ("q8", "same", "; four bits make it cheaper: draft_weights='q4'"),
        ("bfloat16", "q4", ""),
        ("q8", "q4", ""),
        ("q4", "q4", ""),
        ("q4", "same", ""),
        ("", "", ""),
    ],
)
def test_only_what_can_be_followed_is_advised(weights, draft_weights, hint):
    """Nobody can have fewer bits than four."""
    values = {"sparse_cost": 0.95, "density": 0.99, "weights": weights, "draft_weights": draft_weights}
    expected = (
        "the full model decoded 100% of the steps alone: a pass of the sparse model costs 0.95 of a pass of the full model here, "
        f"and a draft was not expected to bring more than it costs{hint}"
    )
    text = prompt_stats([period(0, 0)] * 5, period="auto", **values)
    assert text.abstained == Stats([text]).abstained == expected


@pytest.mark.parametrize(
    ("packed", "config", "weights", "draft_weights"),
    [
        (None, SiriusConfig(period=4), "bfloat16", "q4"),
        (None, own_bits(period=4), "bfloat16", "same"),
        (None, SiriusConfig(mode="full"), "bfloat16", ""),
        ("q8", SiriusConfig(period=4), "q8", "q4"),
        ("q8", own_bits(period=4), "q8", "same"),
        ("q4", SiriusConfig(period=4), "q4", "q4"),
    ],
    ids=str,
)
def test_what_weights_are_read(packed, config, weights, draft_weights, tmp_path, monkeypatch):
    model = tiny("llama3", torch.bfloat16)
    if packed:
        monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
        model.save_pretrained(tmp_path / "model")
        model = Engine.from_pretrained(str(tmp_path / "model"), config, "cpu", progress=False, weights=packed).model
    stats = Engine(model, config).generate(prompt(6), max_new_tokens=3).stats
    assert (stats.weights, stats.draft_weights) == (weights, draft_weights)
