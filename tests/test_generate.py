"""The generation loop: token for token against the reference, and every period from first principles."""

import copy
import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, VOCAB, decoder, engine, full_text, own_bits, prompt, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.decoding import reference
from sirius_ext.decoding.sequence import Sequence
from sirius_ext.decoding.sparsity import kept_neurons
from sirius_ext.kernels import ops

HALVES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("one_thread")


def decode(engine, ids, config, count, **settings):
    """The text without its prompt, and its stats."""
    out = engine.generate(ids, config=config, max_new_tokens=count, **settings)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    return out.sequences[0, ids.shape[1] :].tolist(), out.stats.prompts[0]


# ------------------------------------------------------------------------------------------------------ against the reference


PERIODS, DENSITIES, ACCEPT = (1, 2, 3, 4, 7, 16, 17), (0.1, 0.5, 1.0), ("threshold", "match")
LENGTHS = (5, 33, 1, 2)
COUNTS = (16, 40, 16, 2, 40, 1)


def cases(name):
    """(config, prompt length, tokens) for every period and density; the others take turns, differently in each model."""
    first = NAMES.index(name)
    for index, (period, density) in enumerate(itertools.product(PERIODS, DENSITIES), start=first):
        config = own_bits(period=period, density=density, accept=ACCEPT[index % 2], threshold=(0.1, 0.02)[index // 3 % 2])
        yield config, LENGTHS[index % 4], COUNTS[(index + index // 4) % len(COUNTS)]
    for index, (mode, density) in enumerate([("full", 0.5), *itertools.product(["sparse"], DENSITIES)], start=first):
        yield own_bits(mode=mode, density=density), LENGTHS[index % 4], COUNTS[index % 2]


def check_against_reference(name, config, length, count, **settings):
    ids = prompt(length)
    tokens, stats = decode(engine(name), ids, config, count, **settings)
    eos = settings.get("eos_token_id", [])
    expected, periods = reference.generate(decoder(name), ids[0].tolist(), config, count, eos)
    assert tokens == expected
    columns = ("drafted", "nodes", "accepted", "branch", "committed", "cut")
    assert [[getattr(period, column) for column in columns] for period in stats.periods] == [
        [getattr(period, column) for column in columns] for period in periods
    ]
    for period, twin in zip(stats.periods, periods):
        assert period.likelihoods == pytest.approx(twin.likelihoods, rel=1e-3, abs=1e-5)
        assert period.seconds > 0
    assert (stats.mode, stats.prompt_tokens, stats.tokens) == (config.mode, length, len(expected))
    assert (stats.period, stats.tree_width) == (config.period if config.mode == "sirius" else 1, 1)
    assert stats.finish == ("eos" if tokens[-1] in eos else "length")
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    return tokens, stats


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name):
    for config, length, count in cases(name):
        check_against_reference(name, config, length, count)


def test_the_cases_are_interesting():
    """Every pair of values occurs that matters, and both rules accept and reject, in every model."""
    every = [case for name in NAMES for case in cases(name)]
    corrected = [case for case in every if case[0].mode == "sirius"]
    assert {(config.period, config.density, config.accept) for config, *_ in corrected} == set(
        itertools.product(PERIODS, DENSITIES, ACCEPT)
    )
    assert {(length, count) for _, length, count in every} >= set(itertools.product(LENGTHS, (16, 40)))
    assert {count for *_, count in corrected} == set(COUNTS)
    for name, accept in itertools.product(NAMES, ACCEPT):
        periods = [
            period
            for config, length, count in cases(name)
            if config.accept == accept and config.density < 1 and config.mode == "sirius"
            for period in decode(engine(name), prompt(length), config, count)[1].periods
        ]
        assert sum(0 < period.accepted < period.drafted for period in periods) >= 5
        assert sum(0 == period.accepted < period.drafted for period in periods) >= 5
        assert sum(0 < period.accepted == period.drafted for period in periods) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_every_body_equals_the_reference(isa, name):
    for accept, mode in (("threshold", "sirius"), ("match", "sirius"), ("threshold", "sparse")):
        config = own_bits(mode=mode, accept=accept, period=5, density=0.4, threshold=0.05)
        check_against_reference(name, config, 9, 12)


# ------------------------------------------------------------------------------------------------------------ what must hold


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_match_is_the_full_text_in_half_precision(isa, name, dtype):
    """Exactly: a row's bits do not depend on the rows beside it."""
    for length, period, density in ((1, 17, 0.3), (6, 4, 0.5), (33, 2, 0.1), (20, 7, 0.7)):
        ids = prompt(length)
        tokens, stats = decode(engine(name, dtype), ids, own_bits(accept="match", period=period, density=density), 40)
        assert tokens == full_text(engine(name, dtype), ids, 40)
        assert any(period.accepted < period.drafted for period in stats.periods)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_neurons_are_the_full_model_exactly(isa, name, dtype):
    config = own_bits(accept="match", density=1, period=6)
    tokens, stats = decode(engine(name, dtype), prompt(11), config, 40)
    assert tokens == full_text(engine(name, dtype), prompt(11), 40)
    assert all(period.accepted == period.drafted for period in stats.periods)
    assert [period.committed for period in stats.periods] == [6] * 6 + [3]
    assert stats.density == 1


requests = {
    "name": st.sampled_from(NAMES),
    "period": st.integers(1, 40),
    "density": st.floats(0.01, 1),
    "length": st.integers(1, 40),
    "count": st.integers(1, 40),
}


@given(**requests, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_match_is_the_full_text(name, period, density, length, count, dtype):
    ids = prompt(length)
    tokens, _ = decode(engine(name, dtype), ids, own_bits(accept="match", period=period, density=density), count)
    assert tokens == full_text(engine(name, dtype), ids, count)


@given(**requests, threshold=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_periods_add_up(name, period, density, length, count, threshold, dtype):
    config = own_bits(period=period, density=density, threshold=threshold)
    tokens, stats = decode(engine(name, dtype), prompt(length), config, count)
    assert len(tokens) == stats.tokens == count
    assert sum(record.committed for record in stats.periods) == count - 1
    left = count - 1
    for record in stats.periods:
        assert record.drafted == min(period, left) - 1
        assert record.committed == record.accepted + 1
        assert record.cut == (record.drafted < period - 1)
        assert len(record.likelihoods) == record.drafted
        assert all(0 <= likelihood <= 1 for likelihood in record.likelihoods)
        keep = (torch.tensor(record.likelihoods) >= torch.tensor(threshold)).tolist()
        assert record.accepted == [*keep, False].index(False)
        left -= record.committed
    assert left == 0
    assert decode(engine(name, dtype), prompt(length), config, count)[0] == tokens


@given(**requests)
def test_threshold_zero_accepts_everything(name, period, density, length, count):
    config = own_bits(period=period, density=density, threshold=0)
    _, stats = decode(engine(name), prompt(length), config, count)
    assert all(record.accepted == record.drafted == record.committed - 1 for record in stats.periods)
    assert [record.committed for record in stats.periods if not record.cut] == [period] * ((count - 1) // period)


@given(**{**requests, "period": st.just(1)}, threshold=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_period_of_one_is_the_full_model(name, period, density, length, count, threshold, dtype):
    ids = prompt(length)
    tokens, stats = decode(engine(name, dtype), ids, own_bits(period=1, density=density, threshold=threshold), count)
    assert tokens == full_text(engine(name, dtype), ids, count)
    assert [(record.drafted, record.committed, record.cut) for record in stats.periods] == [(0, 1, False)] * (count - 1)


def test_the_longest_period():
    """Masks of several words."""
    ids = prompt(3)
    config = own_bits(period=256, threshold=0, density=0.5)
    wide = Engine(tiny("llama3", max_position_embeddings=512))
    tokens, stats = decode(wide, ids, config, 300)
    assert [record.committed for record in stats.periods] == [256, 43]
    expected, _ = reference.generate(reference.Decoder(wide.model), ids[0].tolist(), config, 60)
    assert tokens[:59] == expected[:59]  # the last one is the full model's
    assert decode(wide, ids, own_bits(period=256, accept="match", density=0.9), 300)[0] == full_text(wide, ids, 300)


# ------------------------------------------------------------------------------------------------- periods, from first principles


@pytest.fixture
def periods(monkeypatch):
    """A list that fills with one record a period: the text before it, what S drafted, and its state after it."""
    records = []
    accept, run = ops.accept, Sequence._period

    def watched_accept(logits, drafts, *args, **kwargs):
        records[-1]["drafts"] = drafts.tolist()
        return accept(logits, drafts, *args, **kwargs)

    def watched_period(self, started):
        prompt = self.request.prompt.tolist()
        records.append({"before": [*prompt, *self.tokens]})
        step = yield from run(self, started)
        after = [*prompt, *self.tokens]
        cache = slice(0, len(after) - 1)  # x0 is not in it
        assert self.cache.tokens == after[cache]
        records[-1] |= {
            "after": after,
            "keys": self.cache.k[:, :, cache].clone(),
            "values": self.cache.v[:, :, cache].clone(),
        }
        return step

    monkeypatch.setattr(ops, "accept", watched_accept)
    monkeypatch.setattr(Sequence, "_period", watched_period)
    return records


@torch.no_grad()
def cache_of(model, tokens):
    """What a fresh full prefill by `transformers` leaves behind: keys and values [layers, kv_heads, tokens, head size]."""
    layers = model(torch.tensor([tokens])).past_key_values.layers
    return torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_that_of_a_fresh_prefill(periods, name, accept):
    model = tiny(name)
    config = own_bits(accept=accept, period=6, density=0.4, threshold=0.05)
    tokens, stats = decode(engine(name), prompt(9), config, 40)
    assert len(periods) == len(stats.periods) > 6
    for record in periods:
        for ours, fresh in zip((record["keys"], record["values"]), cache_of(model, record["after"][:-1])):
            torch.testing.assert_close(ours, fresh, rtol=1e-4, atol=1e-4)
    assert periods[-1]["after"] == [*prompt(9)[0].tolist(), *tokens]


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_that_of_a_fresh_prefill_in_bfloat16(periods, name):
    """As near to what float32 arithmetic gives as a prefill by `transformers` in bfloat16 comes."""
    rounded, exact = tiny(name, torch.bfloat16), tiny(name, torch.bfloat16).float()
    decode(engine(name, torch.bfloat16), prompt(9), own_bits(period=6, density=0.4, threshold=0.05), 40)
    for record in periods:
        tokens = record["after"][:-1]
        for ours, theirs, wanted in zip((record["keys"], record["values"]), cache_of(rounded, tokens), cache_of(exact, tokens)):
            errors = [(cache.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1) for cache in (ours, theirs)]
            assert errors[0].mean() < 1.2 * errors[1].mean() < 0.02
            assert errors[0].max() < 0.3  # in a wrong slot it would be 1 and more
    assert sum(len(record["drafts"]) for record in periods) > 20


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_acceptance_is_that_of_a_plain_softmax(periods, name):
    """p_j = softmax(logits_F[j - 1] / tau)[x_j] by a fresh forward of the `transformers` model over text and drafts."""
    model = tiny(name)
    config = own_bits(period=7, density=0.5, threshold=0.2, score_temperature=0.8)
    _, stats = decode(engine(name), prompt(12), config, 40)
    decisions = []
    for record, period in zip(periods, stats.periods, strict=True):
        before, drafts = record["before"], record["drafts"]
        logits = model(torch.tensor([before + drafts])).logits[0, len(before) - 1 :]
        likelihoods = [float(row.div(0.8).softmax(-1)[draft]) for row, draft in zip(logits, drafts)]
        assert period.likelihoods == pytest.approx(likelihoods, rel=1e-3, abs=1e-5)
        keep = [likelihood >= 0.2 for likelihood in likelihoods]
        accepted = [*keep, False].index(False)
        assert (period.drafted, period.accepted, period.committed) == (len(drafts), accepted, accepted + 1)
        assert record["after"] == [*before, *drafts[:accepted], int(logits[accepted].argmax())]
        decisions += keep[: accepted + 1]
    assert decisions.count(True) > 5 and decisions.count(False) > 5


@torch.no_grad()
def sparse_model(model, ids, density):
    """`model` with every neuron but CSparse's silenced, chosen by the definition in SPEC section 2 from hooked activations."""
    z = []
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: z.append(args[0][0])) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    sparse = copy.deepcopy(model)
    for layer, activation in zip(sparse.model.layers, z, strict=True):
        statistic = (activation / activation.norm(dim=1, keepdim=True)).norm(dim=0)
        silent = statistic.argsort(descending=True)[kept_neurons(density, len(statistic)) :]
        layer.mlp.up_proj.weight[silent] = 0
    return sparse


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_drafts_are_those_of_the_sparse_model_over_the_full_models_cache(periods, name):
    model, ids = tiny(name), prompt(12)
    sparse = sparse_model(model, ids, 0.4)
    decode(engine(name), ids, own_bits(period=6, density=0.4, threshold=0.05, follow=False), 30)
    for record in periods:
        cache, tokens = model(torch.tensor([record["before"][:-1]])).past_key_values, record["before"][-1:]
        for _ in record["drafts"]:
            logits = sparse(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert record["drafts"] == tokens[1:]
    assert sum(len(record["drafts"]) for record in periods) > 20


# ----------------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    "config",
    [
        SiriusConfig(mode="full"),
        own_bits(mode="sparse"),
        own_bits(threshold=0, period=6),
        own_bits(threshold=0.02, period=16),
    ],
    ids=lambda config: f"{config.mode}-{config.threshold}",
)
def test_a_text_ends_at_its_first_eos(config):
    """Whatever token of the text is declared EOS, the text is the same up to its first occurrence, and ends there."""
    tokens, _ = decode(engine("llama3"), prompt(4), config, 25)
    last_periods = []
    for eos in set(tokens[:-1]):
        ended, stats = check_against_reference("llama3", config, 4, 25, eos_token_id=[eos])
        assert ended == tokens[: tokens.index(eos) + 1]
        last_periods += stats.periods[-1:]
    if config.mode == "sirius":
        assert any(period.committed <= period.accepted and period.cut for period in last_periods), "no EOS inside a period"
        assert any(period.committed > period.accepted for period in last_periods), "no EOS at a period's end"


def test_a_list_of_eos():
    tokens, _ = decode(engine("qwen2"), prompt(5), own_bits(threshold=0, period=16), 25)
    first, second = sorted({tokens.index(token) for token in tokens})[3:8:4]
    for eos in ([tokens[first], tokens[second]], [tokens[second], tokens[first]], [tokens[second], VOCAB - 1]):
        end = min(tokens.index(token) for token in eos if token in tokens)
        ended, stats = check_against_reference("qwen2", own_bits(threshold=0, period=16), 5, 25, eos_token_id=eos)
        assert ended == tokens[: end + 1] and stats.finish == "eos"


@pytest.mark.parametrize("mode", ["full", "sparse", "sirius"])
def test_the_first_token_may_be_eos(mode):
    x0 = full_text(engine("mistral"), prompt(4), 1)
    tokens, stats = decode(engine("mistral"), prompt(4), own_bits(mode=mode), 20, eos_token_id=x0)
    assert (tokens, stats.finish, stats.tokens, stats.periods) == (x0, "eos", 1, [])


def test_a_rejected_eos_does_not_count(periods):
    """Under `match` only the full model's text decides, though drafts propose EOS before it."""
    config = own_bits(accept="match", density=0.1, period=6)
    full = full_text(engine("llama3"), prompt(8), 40)
    decode(engine("llama3"), prompt(8), config, 40)
    rejected = {token for record in periods for token in record["drafts"]} - set(full)
    assert len(rejected) > 5
    tokens, stats = decode(engine("llama3"), prompt(8), config, 40, eos_token_id=sorted(rejected))
    assert tokens == full and stats.finish == "length"


CONTEXT = 24
MODES = [SiriusConfig(mode="full"), own_bits(mode="sparse"), own_bits(period=5), own_bits(accept="match", period=16)]


@functools.cache
def short_engine():
    return Engine(tiny("llama3", max_position_embeddings=CONTEXT))


@pytest.mark.parametrize("config", MODES, ids=lambda config: f"{config.mode}-{config.accept}")
@pytest.mark.parametrize("length", [10, CONTEXT - 2, CONTEXT - 1])
def test_a_text_ends_at_the_context_limit(config, length):
    ids = prompt(length)
    tokens, stats = decode(short_engine(), ids, config, 40)
    assert len(tokens) == CONTEXT - length and stats.finish == "context"
    assert tokens == reference.generate(reference.Decoder(short_engine().model), ids[0].tolist(), config, CONTEXT - length)[0]
    # A limit that comes first is the one that is reported.
    if length < CONTEXT - 1:
        tokens, stats = decode(short_engine(), ids, config, CONTEXT - length - 1)
        assert len(tokens) == CONTEXT - length - 1 and stats.finish == "length"


@pytest.mark.parametrize("config", MODES, ids=lambda config: f"{config.mode}-{config.accept}")
@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_a_prompt_beyond_the_context(config, length):
    with pytest.raises(ValueError, match=f"^input_ids: prompt 0 has {length} tokens.* context holds {CONTEXT}"):
        short_engine().generate(prompt(length), config=config, max_new_tokens=4)
    # The engine is none the worse for it.
    assert len(decode(short_engine(), prompt(4), config, 4)[0]) == 4
