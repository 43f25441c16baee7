"""`period="auto"`: what it promises, by texts that were recorded once, over the costs of several machines; and that it changes
nothing but the time."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import random
import re
import threading
import types

import pytest
import torch
from paper import Text, full_with_copies, replay, texts
from tiny import NAMES, decoder, engine, own_bits, prompt, seeded, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.config import MAX_AUTO_PERIOD
from sirius_ext.decoding import costs as measuring
from sirius_ext.decoding import reference, sequence
from sirius_ext.decoding.period import LEAST_TOKENS, Acceptance, AdaptivePeriod, Costs
from sirius_ext.engine import prepare
from sirius_ext.models import scratch

MODELS = ("qwen2.5-coder-1.5b", "smollm2-135m")
RULES = ("match", "threshold")
# By density, since a lower one makes S cheaper: two that were measured, and what other machines would have.
COSTS = {
    "two cores without AMX": (0.5, Costs(0.67, ((4, 1.05), (16, 1.3)), 0.01)),
    "bytes alone, .5": (0.5, Costs(0.626, ((16, 1.1),))),
    "bytes alone, .4": (0.4, Costs(0.551, ((16, 1.1),))),
    "tensor cores": (0.5, Costs(0.7, ((16, 1.15),))),
    "weights in a cache": (0.5, Costs(0.9, ((4, 1.3), (16, 2.0)), 0.05)),
    "four bits of eight": (0.5, Costs(0.3, ((16, 1.2),))),
}
FIXED = (1, 2, 4, 8, 16, 32)


def tokens_per_cost(model, costs, density, rule, period="auto", copies=False, **settings):
    """Over all texts, and of each that is long enough for the promise."""

    def adaptive(copying):
        return AdaptivePeriod(costs, rule, density=density, copying=copying, **settings)

    read = texts(model, density, rule)
    spent = [replay(adaptive if period == "auto" else period, text, costs, copies) for text in read]
    return sum(map(len, read)) / sum(spent), [len(text) / cost for text, cost in zip(read, spent) if len(text) >= LEAST_TOKENS]


@pytest.mark.parametrize("machine", COSTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_never_slower_than_full_and_as_good_as_the_best_fixed_period(model, rule, machine):
    density, costs = COSTS[machine]
    together, each = tokens_per_cost(model, costs, density, rule)
    assert len(each) >= 40 and min(each) >= 0.98
    fixed = {period: tokens_per_cost(model, costs, density, rule, period)[0] for period in FIXED}
    assert together >= 0.97 * max(fixed.values()), (together, fixed)


# S in four bits of eight, by its density, and of sixteen. A list of neurons makes rows short: of memory that is fast 0.7 of them
# take nearly the time of all.
FEWER_BITS = {
    "eight, fast memory": (
        {1: 0.53, 0.7: 0.51, 0.5: 0.43},
        Costs(1.0, ((2, 1.03), (4, 1.11), (8, 1.38), (9, 1.76), (16, 2.0)), 0.05, ((4, 1.25), (8, 1.7), (9, 2.3))),
    ),
    "eight, slow memory": (
        {1: 0.47, 0.7: 0.39, 0.5: 0.325},
        Costs(1.0, ((4, 1.07), (8, 1.1), (16, 1.42)), 0.01, ((8, 1.3), (9, 1.4))),
    ),
    "eight, bytes alone": ({1: 0.53, 0.7: 0.43, 0.5: 0.36}, Costs(1.0, ((16, 1.1),), 0.01, ((9, 1.1),))),
    "sixteen": ({1: 0.32, 0.7: 0.26, 0.5: 0.22}, Costs(1.0, ((4, 1.05), (16, 1.3)), 0.01, ((9, 1.3),))),
}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("bits", FEWER_BITS)
@pytest.mark.parametrize("rule", RULES)
def test_in_fewer_bits_no_density_is_much_better_than_all_neurons(rule, bits, copies):
    """And no text is slower than F alone."""
    shares, others = FEWER_BITS[bits]
    found = {}
    for density, share in shares.items():
        costs = dataclasses.replace(others, sparse=share)
        found[density], each = tokens_per_cost("qwen2.5-coder-1.5b-packed", costs, density, rule, copies=copies)
        assert len(each) >= 30 and min(each) >= 0.98
    default = found[SiriusConfig().density_with(fewer_bits=True)]
    assert default >= 0.95 * max(found.values()) and default > 1.3, found
    if bits == "eight, slow memory":
        assert default >= 0.97 * max(found.values()) and default > 1.5, found
    if bits == "sixteen":
        assert default == max(found.values()) > 2, found


def test_the_texts_are_worth_it():
    """Where S is cheap enough, drafting gains a lot; somewhere every fixed period loses, and somewhere each other one is best."""
    density, costs = COSTS["bytes alone, .5"]
    assert tokens_per_cost(MODELS[0], costs, density, "threshold")[0] > 1.18
    density, costs = COSTS["four bits of eight"]
    assert tokens_per_cost(MODELS[0], costs, density, "threshold")[0] > 1.7
    best = set()
    for density, costs in COSTS.values():
        for model in MODELS:
            found = {period: tokens_per_cost(model, costs, density, "match", period)[0] for period in FIXED}
            best.add(max(found, key=found.get))
    assert len(best) >= 3


def test_a_confident_draft_goes_on_and_an_unsure_one_stops():
    costs = Costs(0.3, ((16, 1.1),))
    sure, unsure = AdaptivePeriod(costs, "match"), AdaptivePeriod(costs, "match")
    for policy in (sure, unsure):
        assert policy.goes_on(100)
    sure.drafted(0.9999)
    unsure.drafted(0.2)
    assert sure.goes_on(100) and not unsure.goes_on(100)


def test_what_drafts_may_lose_is_bounded_whatever_is_said():
    """F takes nothing, S is sure of everything: the text costs at most 2 % more than F alone."""
    for costs in (costs for _, costs in COSTS.values()):
        for length in (LEAST_TOKENS, 200, 1000):
            spent = replay(lambda _: AdaptivePeriod(costs, "threshold"), Text([1.0] * length, [False] * length), costs)  # noqa: B023
            assert spent <= 1.02 * length


# S in four bits beside a full model that comes from a disk, which more rows make no slower.
FROM_DISK = {density: Costs(cost, ((16, 1.0),), 0.01) for density, cost in ((1, 0.05), (0.7, 0.04), (0.5, 0.035))}


@pytest.mark.parametrize("rule", RULES)
def test_where_the_full_model_is_dear_all_neurons_are_the_best(rule):
    """And as good as the best fixed period, for no density does a text lose."""
    found = {}
    for density, costs in FROM_DISK.items():
        found[density], each = tokens_per_cost("qwen2.5-coder-1.5b-packed", costs, density, rule, longest=64)
        fixed = max(tokens_per_cost("qwen2.5-coder-1.5b-packed", costs, density, rule, n)[0] for n in FIXED)
        assert found[density] >= 0.97 * fixed and min(each) >= 1.7, (density, found, fixed, min(each))
        # Two periods are the whole of a text of 96 tokens, and the first one of an adaptive period may not risk so much.
        longest = tokens_per_cost("qwen2.5-coder-1.5b-packed", costs, density, rule, 64)[0]
        assert found[density] >= 0.92 * longest, (density, found, longest)
    assert found[1] > 1.3 * found[0.7] > 1.3 * found[0.5], found


# With copies: weights in eight bits, S in four (where the processor waits for the memory, and where it nearly does not); weights
# in four bits, of which S reads the same; tensor cores, for which rows are free; and models whose weights are in a cache.
QUIET = Costs(0.49, ((2, 1.03), (4, 1.17), (8, 1.5), (9, 1.87), (16, 2.13)), 0.03, ((2, 1.04), (4, 1.24), (8, 1.68), (9, 2.28)))
WITH_COPIES = {
    "eight bits, slow memory": (
        "packed",
        0.7,
        Costs(0.41, ((4, 1.05), (8, 1.1), (9, 1.2), (16, 1.4)), 0.01, ((8, 1.3), (9, 1.4))),
    ),
    "eight bits, fast memory": ("packed", 0.7, QUIET),
    "eight bits, tensor cores": ("packed", 0.7, Costs(0.45, ((16, 1.05),), 0.01, ((9, 1.05),))),
    "eight bits, a cache": ("packed", 0.5, Costs(0.9, ((4, 1.4), (9, 2.5), (16, 3.0)), 0.05, ((4, 1.4), (9, 2.5)))),
    "four bits, fast memory": (
        "q4",
        0.5,
        Costs(0.68, ((2, 1.06), (4, 1.26), (8, 1.71), (9, 2.3), (16, 2.6)), 0.05, ((4, 1.3), (8, 1.8), (9, 2.42))),
    ),
    "four bits, .7": ("q4", 0.7, Costs(0.75, ((2, 1.1), (4, 1.3), (8, 1.7), (16, 2.2)), 0.04, ((4, 1.3), (8, 1.7)))),
    "four bits, slow memory": ("q4", 0.5, Costs(0.6, ((4, 1.1), (8, 1.3), (16, 1.8)), 0.02, ((4, 1.2), (8, 1.5)))),
}


@pytest.mark.parametrize("machine", WITH_COPIES)
@pytest.mark.parametrize("rule", RULES)
def test_with_copies_a_draft_has_to_beat_full_with_copies(rule, machine):
    """No text is slower than F alone; together they are no slower than F alone with copies, which is faster."""
    record, density, costs = WITH_COPIES[machine]
    model = f"qwen2.5-coder-1.5b-{record}"
    read = texts(model, density, rule)
    alone = sum(map(len, read)) / sum(full_with_copies(text, costs) for text in read)
    together, each = tokens_per_cost(model, costs, density, rule, copies=True)
    assert len(each) >= 30 and min(each) >= 0.98 and alone > 1.05
    assert together >= 0.98 * alone, (together, alone)
    if costs.sparse < 0.5:
        assert together >= 1.1 * alone and together >= 1.05 * tokens_per_cost(model, costs, density, rule)[0]


@pytest.mark.parametrize("machine", WITH_COPIES)
def test_what_wrong_copies_may_cost_is_bounded(machine):
    """Texts of few words, which seem to repeat themselves; S is sure of all that it says, and F takes some of it or none."""
    _, density, costs = WITH_COPIES[machine]
    chance = random.Random(machine)
    for length in (64, 100, 300) * 10:
        words, right, taken = chance.choice((2, 3, 5, 20)), chance.choice((0.0, 0.5, 0.9, 1.0)), chance.choice((0.0, 0.1, 0.5))
        prompt, said = ([chance.randrange(words) for _ in range(count)] for count in (30, 1 + length))
        proposed = [token if chance.random() < right else chance.randrange(words) for token in said[1:]]
        text = Text([0.999] * length, [chance.random() < taken for _ in range(length)], proposed, said, prompt)
        policy = lambda copying: AdaptivePeriod(costs, "threshold", density=density, copying=copying)  # noqa: E731
        assert replay(policy, text, costs, copies=True) <= 1.02 * length


def test_a_bad_beginning_does_not_end_drafting():
    """F rejects the first tokens of a text, and then accepts all: drafts go on to be made."""
    costs = Costs(0.05, ((16, 1.0),))
    text = Text([0.999] * 200, [False] * 3 + [True] * 197)
    assert 200 / replay(lambda _: AdaptivePeriod(costs, "match", density=1.0), text, costs) > 5


def test_what_is_known_of_a_density_between_two():
    for rule in ("match", "threshold", "sample"):
        for confidence in (0.1, 0.6, 0.97):
            low, middle, high = (Acceptance(rule, density).of(confidence) for density in (0.5, 0.6, 0.7))
            assert middle == pytest.approx((low + high) / 2) and low < high
            assert Acceptance(rule, 0.2).of(confidence) == low == Acceptance(rule).of(confidence)


def test_the_rate_that_a_text_begins_with():
    costs = Costs(0.25, ((16, 1.0),))
    rates = {n: sum(0.8**place for place in range(n)) / (1 + 0.25 * (n - 1)) for n in range(1, 9)}
    assert costs.best_rate(0.8, longest=8) == pytest.approx(max(rates.values())) and max(rates, key=rates.get) not in (1, 8)
    assert costs.best_rate(0.8, longest=2) == pytest.approx(rates[2])
    assert costs.best_rate(0.1) == 1 and Costs(0.9, ((16, 2.0),)).best_rate(0.9) == 1
    assert costs.best_rate(1.0, longest=5) == pytest.approx(5 / 2)


def test_a_text_that_always_agrees_is_drafted_to_the_end():
    costs = Costs(0.5, ((16, 1.1),))
    spent = replay(lambda _: AdaptivePeriod(costs, "match"), Text([1.0] * 500, [True] * 500), costs)
    assert 500 / spent > 1.75  # 1 / 0.5 with periods that never end


def test_the_room_that_is_left():
    policy = AdaptivePeriod(Costs(0.1, ((16, 1.0),)), "match", longest=4)
    assert not policy.goes_on(1) and policy.goes_on(2)
    for _ in range(3):
        assert policy.goes_on(100)
        policy.drafted(1.0)
    assert not policy.goes_on(100)


def test_acceptance_is_learnt():
    acceptance = Acceptance("match")
    before, mean = acceptance.of(0.97), acceptance.mean
    assert acceptance.of(0.2) < before < acceptance.of(1.0)
    for _ in range(50):
        acceptance.observe(0.97, False)
    assert acceptance.of(0.97) < 0.25 < before and acceptance.mean < mean
    assert acceptance.of(1.0) > 0.9  # another class


def test_costs_between_what_was_measured():
    costs = Costs(0.6, ((4, 1.2), (16, 1.8)), 0.05)
    assert [costs.over(rows) for rows in (1, 4, 10, 16, 28)] == pytest.approx([1, 1.2, 1.5, 1.8, 2.4])
    assert costs.period(0) == 1 and costs.period(3) == pytest.approx(3 * 0.6 + 1.2 + 0.05)
    assert costs.period(3, width=3) == pytest.approx(3 * 0.6 + 1.5 + 0.05)


# ------------------------------------------------------------------------------------------------------------------- the text


CHEAP = Costs(0.1, ((4, 1.0), (16, 1.05)))  # S drafts on for long
FIXED_PERIOD = SiriusConfig(period=4)
DEAR = Costs(0.95, ((4, 1.3), (16, 2.0)), 0.05)  # and here never


@pytest.fixture
def cheap(monkeypatch, one_thread):
    monkeypatch.setattr(sequence, "costs_of", lambda *_: CHEAP)


def decode(name, config, length, count, **settings):
    out = engine(name).generate(prompt(length), config=config, max_new_tokens=count, **settings)
    return out.sequences[0, length:].tolist(), out.stats.prompts[0]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
@pytest.mark.parametrize("name", NAMES)
def test_match_is_the_full_text(cheap, name, sparsity, width):
    config = SiriusConfig(period="auto", accept="match", sparsity=sparsity, tree_width=width, density=0.4)
    for length in (1, 33):
        tokens, stats = decode(name, config, length, 60)
        assert tokens == decode(name, SiriusConfig(mode="full"), length, 60)[0]
        assert stats.period == "auto" and sum(period.committed for period in stats.periods) == 59
        assert all(period.drafted < MAX_AUTO_PERIOD for period in stats.periods)
        assert len({period.drafted for period in stats.periods}) >= 2


@pytest.mark.parametrize("accept", ["threshold", "match", "sample"])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_that_of_its_periods(cheap, name, accept):
    for sparsity, width in (("csparse", 1), ("fsparse", 3), ("cascade", 1)):
        values = {"accept": accept, "sparsity": sparsity, "tree_width": width, "lookup": False}
        config = own_bits(period="auto", density=0.3, threshold=0.05, **values)
        asked, sampling = {}, None
        if accept == "sample":
            asked = {"do_sample": True, "top_k": 0, "generator": seeded(1)}
            sampling = reference.Sampling(seeded(1))
        tokens, stats = decode(name, config, 8, 40, **asked)
        planned = iter([period.drafted + 1 + period.cut for period in stats.periods])
        expected, records = reference.generate(
            decoder(name), prompt(8)[0].tolist(), config, 40, sampling=sampling, periods=planned
        )
        assert tokens == expected
        columns = ("drafted", "nodes", "accepted", "branch", "committed", "cut")
        assert [[getattr(period, column) for column in columns] for period in stats.periods] == [
            [getattr(period, column) for column in columns] for period in records
        ]


def test_the_same_call_gives_the_same_text(one_thread):
    """Nothing made up: whatever the costs are, they are measured once, and texts before this one do not matter."""
    config = SiriusConfig(period="auto", density=0.4, threshold=0.05)
    first = decode("llama3", config, 9, 60)[0]
    decode("llama3", config, 30, 60)
    assert decode("llama3", config, 9, 60)[0] == first


def test_where_drafts_cannot_pay_the_full_model_decodes_alone(monkeypatch, one_thread):
    """No pass of S, and nothing beside the passes of F."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: DEAR)
    passes, run = [], sequence.Sequence._ask

    def watched(self, nodes, sparsity=None, argmax=None, keep_z=False):
        passes.append((sparsity, keep_z))
        return run(self, nodes, sparsity, argmax, keep_z)

    monkeypatch.setattr(sequence.Sequence, "_ask", watched)
    tokens, stats = decode("qwen2", SiriusConfig(period="auto", lookup=False), 8, 20)
    assert passes == [(None, False)] * 19 and all(period.drafted == 0 for period in stats.periods)
    assert tokens == decode("qwen2", SiriusConfig(mode="full"), 8, 20)[0]
    assert stats.sparse_cost == 0.95 and stats.average_advance_length == 1 and stats.alone == 1
    assert stats.abstained.startswith("the full model decoded 100% of the steps alone: a pass of the sparse model costs 0.95 of")
    assert stats.advice is None
    assert decode("qwen2", SiriusConfig(), 8, 20)[1].abstained and decode("qwen2", FIXED_PERIOD, 8, 20)[1].abstained is None


def test_costs_are_measured_once_and_kept(cache, monkeypatch, one_thread, capsys):
    fresh, measured = Engine(tiny("llama3")), []
    measure = measuring._measure
    monkeypatch.setattr(measuring, "_measure", lambda *each: measured.append(each[1]) or measure(*each))
    configs = [SiriusConfig(period="auto", density=0.4), SiriusConfig(period="auto", density=0.2)]
    for config in (*configs, *configs):
        fresh.generate(prompt(8), config=config, max_new_tokens=5)
    assert measured == configs
    said = r"^measuring what passes cost, once on this machine \.\.\. \d\.\d s$"
    assert len(re.findall(said, capsys.readouterr().err, re.MULTILINE)) == 2
    kept = json.loads((cache / "costs.json").read_text())
    assert len(kept) == 2
    for cost in kept.values():
        assert 0 < cost["sparse"] < 10 and [rows for rows, _ in cost["full"]] == list(measuring.ROWS)
        assert all(a <= b for (_, a), (_, b) in zip(cost["full"], cost["full"][1:])) and cost["follow"] >= 0
    Engine(tiny("llama3")).generate(prompt(8), config=configs[0], max_new_tokens=5)  # as another process would
    assert measured == configs
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "_build", lambda: "other kernels")
        Engine(tiny("llama3")).generate(prompt(8), config=configs[0], max_new_tokens=5)
    assert measured == [*configs, configs[0]]
    (cache / "costs.json").write_text("no JSON")
    Engine(tiny("llama3")).generate(prompt(8), config=configs[0], max_new_tokens=5)
    assert len(measured) == 4 and len(json.loads((cache / "costs.json").read_text())) == 1


def test_texts_that_begin_together_have_the_same_costs(cache, monkeypatch, one_thread):
    model, found, begin = prepare(tiny("llama3")), [], threading.Barrier(3)

    def ask():
        begin.wait()
        found.append(measuring.costs_of(model, SiriusConfig(density=0.4), False))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(map(id, found))) == 1


def test_costs_stay_when_weights_change(cache, monkeypatch, one_thread):
    """In training, say: every step would wait for them, and leave its own in the file. Another model's are not these."""
    model, config = tiny("llama3"), SiriusConfig(density=0.4)
    costs = measuring.costs_of(prepare(model), config, False)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    assert prepare(model).weights.fingerprint()[:16] not in (cache / "costs.json").read_text()
    assert measuring.costs_of(prepare(model), config, False) is costs
    del model.model.layers[1:]
    assert measuring.costs_of(prepare(model), config, False) is not costs


def test_where_passes_are_slow_few_are_measured(cache, monkeypatch, one_thread):
    """And S's rows wherever tokens are copied, but not of F alone."""
    monkeypatch.setattr(measuring, "_SLOW", 0.0)
    model, config = prepare(tiny("llama3")), SiriusConfig(density=0.4)
    costs = measuring.costs_of(model, config, True)
    assert [rows for rows, _ in costs.full] == list(measuring.FEW_ROWS)
    assert [rows for rows, _ in costs.copies] == list(measuring.SPARSE_ROWS) and costs.sparse > 0
    assert measuring.costs_of(model, config, False).copies == ()
    alone = measuring.costs_of(model, SiriusConfig(mode="full", lookup=True), True)
    assert (alone.sparse, alone.follow, alone.copies) == (1, 0, ()) and len(alone.full) == len(measuring.FEW_ROWS)
    assert len(json.loads((cache / "costs.json").read_text())) == 3


@pytest.mark.parametrize(("slower", "sparse"), [(73, 0.014), (170, 0.0059), (1_000_000, 1e-6), (10**9, 1e-6)])
def test_where_the_full_model_is_hundreds_of_times_as_dear(cache, monkeypatch, one_thread, slower, sparse):
    """As one is that waits for a slow disk: what S costs is never nothing, and two that differ stay different."""
    model, now, compute = prepare(tiny("llama3")), [0.0], type(prepare(tiny("llama3"))).compute

    def timed(self, cache, asked):
        now[0] += (1.0 if asked.sparsity else slower) * (1 + 0.01 * asked.tokens.numel())
        return compute(self, cache, asked)

    monkeypatch.setattr(type(model), "compute", timed)
    monkeypatch.setattr(measuring, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measuring, "sparse_density", lambda *_: 0.0)  # its bytes are all that a pass of S reads from memory
    costs = measuring.costs_of(model, SiriusConfig(density=0.4), True)
    assert costs.sparse == sparse and 1 <= costs.copies[0][1] < 1.1 and costs.full == ((4, 1.03), (16, 1.15))
    assert list(json.loads((cache / "costs.json").read_text()).values())[0]["sparse"] == sparse
    policy = AdaptivePeriod(costs, "match")
    assert policy.goes_on(room=9) and policy.stops(room=9).longest == 8
    monkeypatch.setattr(measuring, "_measure", lambda *_: pytest.fail("what was written was not taken"))
    assert measuring.costs_of(prepare(tiny("llama3")), SiriusConfig(density=0.4), True) == costs


@pytest.mark.parametrize(
    "changed",
    [
        {"sparse": 0.0},
        {"sparse": -0.5},
        {"sparse": math.nan},
        {"sparse": math.inf},
        {"sparse": 1e308},
        pytest.param({"sparse": 10**400}, id="a number that no float holds"),
        {"sparse": True},
        {"sparse": "0.5"},
        {"sparse": None},
        {"follow": -0.1},
        {"follow": math.nan},
        {"full": []},
        {"full": 1},
        {"full": [4, 16]},
        {"full": [[4, 1.1], [17, 1.5]]},
        {"full": [[4, 1.1], [4, 1.5]]},
        {"full": [[4, 1.5], [16, 1.1]]},
        {"full": [[4, 0.0], [16, 0.0]]},
        {"full": [[4, 1.1], [16, math.nan]]},
        {"full": [[4, 1.1], [16, 1.5, 2.0]]},
        {"copies": []},
        {"copies": [[4, 1.1], [16, 1.5]]},
        {"copies": {"4": 1.1}},
        {"more": 1},
    ],
    ids=str,
)
def test_kept_costs_that_were_changed_are_measured_anew(cache, monkeypatch, one_thread, changed):
    """A period goes by them, divides by them, and takes their rows for granted."""
    costs, measured = Costs(0.5, ((4, 1.1), (16, 1.5)), 0.0, ((4, 1.0), (8, 1.2), (9, 1.2))), []
    monkeypatch.setattr(measuring, "_measure", lambda *_: measured.append(costs) or costs)

    def ask():  # as another process would
        return measuring.costs_of(prepare(tiny("llama3")), SiriusConfig(density=0.4), True)

    assert ask() == ask() == costs and len(measured) == 1
    file = cache / "costs.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({key: entry | changed for key, entry in whole.items()}))
    assert ask() == costs and len(measured) == 2 and json.loads(file.read_text()) == whole


A, B = Costs(0.5, ((4, 1.1), (16, 1.5))), Costs(0.6, ((4, 1.2), (16, 1.6)))


def test_two_processes_keep_what_both_have_measured(cache, monkeypatch):
    """Neither writes the other's entry over: one that has read the file writes it before the other reads."""
    read, inside, other = measuring._read, threading.Event(), threading.Thread(target=measuring._keep, args=("b", B))

    def slowly():
        found = read()
        if not inside.is_set():
            inside.set()
            other.start()
            other.join(0.2)
        return found

    monkeypatch.setattr(measuring, "_read", slowly)
    measuring._keep("a", A)
    other.join()
    assert json.loads((cache / "costs.json").read_text()).keys() == {"a", "b"}


def test_kept_costs_are_for_all_who_share_the_folder(cache, monkeypatch):
    """As a file is that is opened, whatever the mode of one that is made for a moment."""
    before = os.umask(0o022)
    try:
        measuring._keep("a", A)
        measuring._keep("b", B)
    finally:
        os.umask(before)
    assert json.loads((cache / "costs.json").read_text()).keys() == {"a", "b"}
    assert (cache / "costs.json").stat().st_mode & 0o777 == 0o644
    assert os.listdir(cache) == ["costs.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_costs_that_cannot_be_written_leave_nothing(cache, monkeypatch, error):
    """Not a file at every run, where the disk is full. What a killed process has left goes, too."""
    measuring._keep("a", A)
    (cache / "costs-left").mkdir()
    monkeypatch.setattr(scratch, "YOUNG_SECONDS", -1.0)

    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with contextlib.nullcontext() if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
            measuring._keep("b", B)
    assert os.listdir(cache) == ["costs.json"] and json.loads((cache / "costs.json").read_text()).keys() == {"a"}


def test_a_cache_folder_that_cannot_be_written_to(monkeypatch, tmp_path, one_thread):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "file" / "folder"))
    out = Engine(tiny("llama3")).generate(prompt(8), config=SiriusConfig(period="auto"), max_new_tokens=5)
    assert out.sequences.shape[1] == 13
