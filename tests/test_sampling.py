"""`accept="sample"`: texts are distributed as the full model's own samples, and drawn by one generator."""

import dataclasses
import functools
import itertools

import pytest
import torch
import transformers
from tiny import NAMES, PLAIN, Collector, by_engine, engine, every_way, prompt, seeded, tiny
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sirius_ext import SiriusConfig
from sirius_ext.decoding import sampling
from sirius_ext.decoding.sequence import Request, start
from sirius_ext.engine import prepare
from sirius_ext.generation.rows import Processor

SAMPLE = SiriusConfig(accept="sample", period=5, density=0.4)
TREE = SiriusConfig(accept="sample", period=5, density=0.4, tree_width=3)
CONFIGS = [SAMPLE, TREE, SiriusConfig(mode="full"), SiriusConfig(mode="sparse", sparsity="fsparse", density=0.3)]
IDS = prompt(8)
COUNT = 20

pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------------------------- the distribution

VOCAB, DEPTH, RUNS = 8, 3, 1200
# Of a case whose samples are right: the p-value below which it fails. Seeds are fixed, so it fails always or never.
FALSE_ALARM = 1e-4
START = torch.tensor([3, 1, 4])

WARPERS = {
    "plain": [],
    "temperature": [TemperatureLogitsWarper(0.5)],
    "top-k": [TemperatureLogitsWarper(1.5), TopKLogitsWarper(4)],
    "top-p": [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8)],
}


def small():
    """One layer whose MLP matters, so that a sparse model of few neurons is a bad guesser."""
    model = tiny("llama3", vocab_size=VOCAB, num_hidden_layers=1)
    model.model.layers[0].mlp.down_proj.weight.data *= 5
    model.lm_head.weight.data *= 0.5
    return model


@functools.cache
def small_model():
    return prepare(small())


@functools.cache
@torch.no_grad()
def exact(warpers):
    """The probability of every text of DEPTH tokens, float64 [VOCAB] * DEPTH: by `transformers`' forward pass over all of
    them."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=DEPTH)))
    logits = small()(torch.cat((START.repeat(len(texts), 1), texts), 1)).logits[:, len(START) - 1 : -1]
    likelihood = torch.ones(len(texts), dtype=torch.float64)
    for place in range(DEPTH):
        row = LogitsProcessorList(WARPERS[warpers])(None, logits[:, place].clone())
        likelihood *= row.double().softmax(-1).gather(1, texts[:, place : place + 1])[:, 0]
    assert float(likelihood.sum()) == pytest.approx(1)
    return likelihood


@torch.no_grad()
def drawn(config, warpers, runs=RUNS, seed=0):
    """How often each text came, int64 [VOCAB ** DEPTH], and the periods. One more token is asked for, so that a draft may be as
    deep as the texts that are counted."""
    generator, counts, periods = seeded(seed), torch.zeros(VOCAB**DEPTH, dtype=torch.int64), []
    warp = LogitsProcessorList(WARPERS[warpers])
    process = (lambda ids, logits: warp(ids[None], logits[None].clone())[0]) if warp else None
    request = Request(START, config, DEPTH + 1, process=process, sample=True, generator=generator)
    for _ in range(runs):
        text = start(small_model(), request)
        periods += text.run().periods
        counts[functools.reduce(lambda index, token: VOCAB * index + token, text.tokens[:DEPTH], 0)] += 1
    return counts, periods


def p_value(counts, likelihood):
    """Of Pearson's chi-squared test. Neighbouring texts, which begin alike, are counted together until 8 of them are expected."""
    assert not bool(counts[likelihood == 0].any()), "an impossible text"
    groups, open_group = [], torch.zeros(2, dtype=torch.float64)
    for pair in torch.stack((counts.double(), likelihood * counts.sum()), 1):
        open_group = open_group + pair
        if open_group[1] >= 8:
            groups.append(open_group)
            open_group = torch.zeros_like(pair)
    groups[-1] = groups[-1] + open_group
    came, expected = torch.stack(groups).T
    statistic = ((came - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(groups) - 1) / 2, dtype=torch.float64), statistic / 2))


def guesser(sparsity, width):
    return SiriusConfig(accept="sample", sparsity=sparsity, tree_width=width, period=4, density=0.02)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
def test_texts_are_distributed_as_the_full_models(sparsity, width):
    counts, periods = drawn(guesser(sparsity, width), "plain")
    assert p_value(counts, exact("plain")) > FALSE_ALARM
    drafted = [period for period in periods if period.drafted == 2]
    rejected = sum(period.accepted < 2 for period in drafted) / len(drafted)
    assert rejected > (0.4 if width == 1 else 0.1), "S is too good a guesser for a test"
    if width > 1:
        assert sum((period.branch or 0) > 0 for period in periods) > RUNS / 10


@pytest.mark.parametrize(("warpers", "width"), [("temperature", 2), ("top-k", 4), ("top-p", 1)])
def test_warped_texts_are_distributed_as_the_full_models(warpers, width):
    counts, _ = drawn(guesser("csparse", width), warpers, 500)
    assert p_value(counts, exact(warpers)) > FALSE_ALARM
    assert p_value(counts, exact("plain")) < FALSE_ALARM


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_without_correction(mode):
    """F's samples are F's, and those of S are not."""
    counts, _ = drawn(SiriusConfig(mode=mode, density=0.02), "plain", 700)
    assert (p_value(counts, exact("plain")) > FALSE_ALARM) == (mode == "full")


def no_residual(monkeypatch):
    """What is rejected is drawn again as if nothing had been."""
    monkeypatch.setattr(sampling, "residual", lambda target, proposal: target)


def everything_accepted(monkeypatch):
    accept = sampling.Sampling.accept

    def first_children(self, tree, logits):
        _, _, likelihoods = accept(self, tree, logits)
        path, nodes = [], tree.parents[: tree.size].tolist()
        while (path[-1] if path else 0) in nodes:
            path.append(nodes.index(path[-1] if path else 0))
        return path, self.choose(logits[path[-1] if path else 0]), likelihoods

    monkeypatch.setattr(sampling.Sampling, "accept", first_children)


def siblings_as_if_replaced(monkeypatch):
    """Every child judged by what the first one was drawn from."""

    class Kept(torch.Tensor):
        def __setitem__(self, index, value):
            pass

    expand = sampling.Sampling.expand

    def kept(self, tree, logits):
        expand(self, tree, logits)
        self._proposals = {node: proposal.as_subclass(Kept) for node, proposal in self._proposals.items()}

    monkeypatch.setattr(sampling.Sampling, "expand", kept)


@pytest.mark.parametrize(
    ("rule", "width"),
    [(no_residual, 1), (no_residual, 2), (everything_accepted, 1), (everything_accepted, 4), (siblings_as_if_replaced, 4)],
)
def test_a_wrong_rule_is_noticed(monkeypatch, rule, width):
    """The test above has the power to see it. A wrong rule shows where S errs: its set stays as the prompt chose it."""
    rule(monkeypatch)
    config = dataclasses.replace(guesser("csparse", width), follow=False)
    counts, _ = drawn(config, "plain", RUNS if rule is siblings_as_if_replaced else 600)
    assert p_value(counts, exact("plain")) < FALSE_ALARM


def test_the_residual():
    target, proposal = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), torch.tensor([0.1, 0.6, 0.1, 0.2]).double()
    torch.testing.assert_close(sampling.residual(target, proposal), torch.tensor([0.8, 0.0, 0.2, 0.0]).double())
    torch.testing.assert_close(sampling.residual(target, target), target)


def test_children_go_where_acceptance_arrives():
    """The first child of the first leaf is the chain; every place is taken."""
    assert sampling.apportion([0], 4) == [4]
    for places in range(1, 17):
        scores = [sampling.child_score(index) for index in range(4)]
        counts = sampling.apportion(scores, places)
        assert sum(counts) == places and counts[0] >= 1 and counts == sorted(counts, reverse=True)
    assert sampling.child_score(0) > sampling.child_score(1) > sampling.child_score(2)


# ---------------------------------------------------------------------------------------------------------------- repeatable


def sample(way, config, seed=None, **settings):
    settings = {"max_new_tokens": COUNT, "do_sample": True, **PLAIN, **settings}
    if seed is not None:
        settings["generator"] = seeded(seed)
    return way(engine().model, config, IDS, **settings)


@every_way
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.mode}-{config.tree_width}")
def test_a_seed_makes_a_text(config, way):
    first = sample(way, config, 1)
    assert first.shape == (1, 8 + COUNT)
    assert torch.equal(sample(way, config, 1), first) and torch.equal(sample(by_engine, config, 1), first)
    assert not torch.equal(sample(way, config, 2), first)
    # Without a generator it is torch's own, which the generator's seed would not have touched.
    torch.manual_seed(1)
    assert torch.equal(sample(way, config), first)
    assert not torch.equal(sample(way, config), first), "the same numbers twice"


def test_a_generator_goes_on():
    """A second text by the same generator is another one; torch's own is left alone."""
    generator, state = seeded(3), torch.get_rng_state()
    texts = [
        engine().generate(IDS, config=TREE, do_sample=True, generator=generator, max_new_tokens=COUNT).sequences for _ in range(2)
    ]
    assert not torch.equal(*texts)
    assert torch.equal(torch.get_rng_state(), state)


@every_way
@pytest.mark.parametrize("config", [SAMPLE, TREE], ids=["chain", "tree"])
def test_several_texts_of_one_prompt(config, way):
    """Each as the next draw of the generator has it."""
    several = sample(way, config, 5, num_return_sequences=3)
    generator = seeded(5)
    alone = [
        by_engine(engine().model, config, IDS, do_sample=True, generator=generator, max_new_tokens=COUNT, **PLAIN)
        for _ in range(3)
    ]
    assert torch.equal(several, torch.cat(alone))
    assert len({tuple(text.tolist()) for text in several}) == 3


@every_way
def test_asking_for_the_rule_and_for_samples_go_together(way):
    with pytest.raises(ValueError, match='accept="sample" without do_sample=True'):
        way(engine().model, SAMPLE, IDS, max_new_tokens=4)
    with pytest.raises(ValueError, match="do_sample=True with accept='match'"):
        way(engine().model, SiriusConfig(accept="match"), IDS, max_new_tokens=4, do_sample=True)
    with pytest.raises(ValueError, match="num_return_sequences"):
        way(engine().model, SiriusConfig(mode="full"), IDS, max_new_tokens=4, num_return_sequences=2)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: f"{config.mode}-{config.tree_width}")
def test_a_cold_sample_is_the_greedy_text(config):
    for name in NAMES:
        greedy = tiny(name).generate(IDS, max_new_tokens=COUNT)
        out = engine(name).generate(IDS, config=config, do_sample=True, max_new_tokens=COUNT, temperature=1e-3)
        assert torch.equal(out.sequences, greedy)


@pytest.mark.parametrize("config", [SAMPLE, TREE], ids=["chain", "tree"])
def test_streaming_samples(config):
    streamer = Collector()
    out = engine().generate(IDS, config=config, do_sample=True, max_new_tokens=40, generator=seeded(0), streamer=streamer)
    streamer.check(IDS, out.sequences)
    assert [len(put) for put in streamer.puts[1:]] == [1, *(period.committed for period in out.stats.prompts[0].periods)]


# -------------------------------------------------------------------------------------------------------------------- warpers


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: f"{config.mode}-{config.tree_width}")
@pytest.mark.parametrize(
    "settings", [{"top_k": 3, "top_p": 1.0}, {"top_k": 0, "top_p": 0.6}, {"top_k": 5, "top_p": 0.9}], ids=str
)
@torch.no_grad()
def test_only_what_the_warpers_leave_is_drawn(settings, config):
    """By `transformers`' own warpers, over its own forward pass."""
    model = tiny("llama3")
    warp = LogitsProcessorList([TemperatureLogitsWarper(2.0)])
    if settings["top_k"]:
        warp.append(TopKLogitsWarper(settings["top_k"]))
    warp.append(TopPLogitsWarper(settings["top_p"]))
    never, unlikeliest = 0, 0
    for seed in range(4):
        asked = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 40, "generator": seeded(seed), **settings}
        text = engine().generate(IDS, config=config, **asked).sequences
        logits = model(text).logits[0, 7:-1]
        left = warp(None, logits.clone())
        taken = text[0, 8:, None]
        never += int((left.gather(1, taken) == -torch.inf).sum())
        unlikeliest += int((taken[:, 0] != logits.argmax(-1)).sum())
    assert never == 0 and unlikeliest > 20


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "warpers",
    [
        [TopKLogitsWarper(20), TopPLogitsWarper(0.7)],
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        [TopKLogitsWarper(30), TopPLogitsWarper(0.9, min_tokens_to_keep=4), MinPLogitsWarper(0.02)],
        [TopKLogitsWarper(30), MinPLogitsWarper(0.1)],
        [TopPLogitsWarper(0.7)],
        [TopPLogitsWarper(0.9), TopKLogitsWarper(5)],
        [TopKLogitsWarper(1), TopPLogitsWarper(0.1)],
        [TopKLogitsWarper(20), TopPLogitsWarper(0.7), TemperatureLogitsWarper(3.0)],
        [TopKLogitsWarper(20), transformers.TypicalLogitsWarper(0.9), TopPLogitsWarper(0.7)],
        [TopKLogitsWarper(500), TopPLogitsWarper(0.999)],
    ],
    ids=lambda warpers: "-".join(type(each).__name__.removesuffix("LogitsWarper") for each in warpers),
)
def test_warping_few_is_warping_all(warpers, rows):
    """Behind a top-k, the rest looks at k logits; what is left is what `transformers` leaves."""
    ids, cut = prompt(9).repeat(rows, 1), 0
    process = Processor(LogitsProcessorList(warpers), rows - 1, ids, 6)
    for seed in range(20):
        logits = 3 * torch.randn(500, generator=seeded(seed))
        before = logits.clone()
        expected = LogitsProcessorList(warpers)(ids[-1:], logits[None].clone())[0]
        torch.testing.assert_close(process(ids[0, 3:], logits), expected, rtol=0, atol=0)
        assert torch.equal(logits, before), "the model's own logits were changed"
        cut += int((expected == -torch.inf).sum())
        # Of equals it may be another one that goes: sorting leaves it open which.
        ties = (2 * logits).round()
        expected = LogitsProcessorList(warpers)(ids[-1:], ties[None].clone())[0]
        torch.testing.assert_close(process(ids[0, 3:], ties).sort().values, expected.sort().values, rtol=0, atol=0)
    assert cut > 100


def test_greedy_text_with_warpers_through_the_processors():
    """Processors in front of a top-k see the text; `repetition_penalty` counts for samples too."""
    settings = {"do_sample": True, "max_new_tokens": 30, "top_k": 5, "no_repeat_ngram_size": 1, "generator": seeded(0)}
    for config in CONFIGS[:3]:
        text = engine().generate(IDS, config=config, **settings).sequences[0].tolist()
        assert len(set(text)) == len(text) - (8 - len(set(IDS[0].tolist())))
