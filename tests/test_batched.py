"""Texts decoded side by side: token for token and period for period what the engine decodes one by one, where S reads what F
reads. (Products of fewer bits, whose input the engine rounds, are in tests/test_packed.py.)"""

import functools
import itertools

import pytest
import torch
from tiny import NAMES, own_bits, prompt, tiny
from transformers import StoppingCriteriaList

from sirius_ext import Engine
from sirius_ext.engine import prepare
from sirius_ext.evaluation.batched import Batch
from sirius_ext.evaluation.modes import NAMED_MODES, config_of

LENGTHS = (5, 1, 33, 12, 2, 40, 7, 21, 64)  # more texts than seats


@functools.cache
def engine(name, dtype=torch.float32):
    return Engine(tiny(name, dtype))


def prompts(prefix):
    return [torch.cat((prompt(100)[:, :prefix], prompt(length)), 1) for length in LENGTHS]


COLUMNS = ("drafted", "nodes", "accepted", "branch", "committed", "cut")


def told(text):
    """The text, why it ended, and its periods."""
    stats = text.stats
    periods = [[getattr(period, column) for column in COLUMNS] for period in stats.periods]
    return text.tokens, stats.finish, stats.density, stats.prompt_tokens, periods


def ask(make, ids, config, count, **settings):
    return make(ids, config=config, max_new_tokens=count, do_sample=False, **settings)


def decode(engine, ids, config, count, **settings):
    """A text alone."""
    text = ask(engine.start, ids, config, count, **settings)
    text.run()
    return told(text)


def side_by_side(engine, texts, configs, live, prefix=0, **settings):
    """What `decode` gives for every prompt (and how many tokens) and config."""
    requests = (
        ((index, number), *ask(engine.requests, ids, config, count, **settings))
        for index, (ids, count) in enumerate(texts)
        for number, config in enumerate(configs)
    )
    batch, found = Batch(prepare(engine.model), texts[0][0][0, :prefix]), {}
    for key, text, error in batch.decode(requests, live):
        assert error is None and text.stats.decode_seconds is text.stats.prefill_seconds is None
        found[key] = told(text)
    return found


def check(engine, texts, configs, seats, prefix=0, **settings):
    found = side_by_side(engine, texts, configs, seats, prefix, **settings)
    assert len(found) == len(texts) * len(configs)
    for (index, number), text in found.items():
        assert text == decode(engine, texts[index][0], configs[number], texts[index][1], **settings), (index, configs[number])
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", [0, 19])
def test_equals_the_engine(name, prefix):
    accept, period = ("match", 7) if prefix else ("threshold", 4)
    base = own_bits(period=period, accept=accept, threshold=0.02, sparsity="fsparse")
    counts = itertools.cycle((24, 40, 1, 17, 2))
    found = check(engine(name), list(zip(prompts(prefix), counts)), [config_of(mode, base) for mode in NAMED_MODES], 4, prefix)
    periods = [period for *_, periods in found.values() for period in periods]
    assert sum(accepted < drafted for drafted, _, accepted, *_ in periods) >= 10
    assert sum(accepted == drafted > 0 for drafted, _, accepted, *_ in periods) >= 10
    assert len({tuple(found[5, number][0]) for number in range(len(NAMED_MODES))}) > 1  # sparse texts leave the full one's


def test_trees_and_density():
    configs = [own_bits(period=4, tree_width=3), own_bits(sparsity="fsparse", period=3, tree_width=2, density=0.2)]
    check(engine("llama3"), [(ids, 20) for ids in prompts(0)], configs, 3)
    check(engine("llama3"), [(ids, 20) for ids in prompts(0)], [own_bits(density=1.0, accept="match", period=5)], 3)


def test_ends():
    """End-of-text tokens, stopping criteria and the context, in the middle of periods and of batches."""
    one = engine("qwen2")
    full = [decode(one, ids, own_bits(mode="full"), 30)[0] for ids in prompts(0)]
    eos = [text[index] for text, index in zip(full, (3, 9, 14, 20))]
    base = own_bits(period=6, sparsity="fsparse")
    configs = [config_of(mode, base) for mode in NAMED_MODES]
    found = check(one, [(ids, 30) for ids in prompts(0)], configs, 4, eos_token_id=eos)
    assert {finish for _, finish, *_ in found.values()} >= {"eos", "length"}
    stop = StoppingCriteriaList([lambda ids, scores: ids[:, -2:].sum(-1) % 13 == 0])
    found = check(one, [(ids, 30) for ids in prompts(0)], configs, 4, stopping_criteria=stop)
    assert {finish for _, finish, *_ in found.values()} >= {"criteria"}
    found = check(one, [(prompt(length), 300) for length in (250, 255, 241, 9)], configs, 2)
    assert {finish for _, finish, *_ in found.values()} == {"context"}


@pytest.mark.parametrize("seats", [1, 2, 20])
def test_any_number_of_seats(seats):
    check(engine("llama"), [(ids, 12) for ids in prompts(3)], [own_bits(period=4), own_bits(mode="full")], seats, 3)


def test_half_precision():
    """What `match` promises holds within a batch too: the same rows through the same products."""
    found = side_by_side(
        engine("llama3", torch.bfloat16),
        [(ids, 24) for ids in prompts(0)],
        [own_bits(mode="full"), own_bits(period=5, accept="match", density=1.0)],
        1,
    )
    same = [found[index, 0][0] == found[index, 1][0] for index in range(len(LENGTHS))]
    assert sum(same) >= len(same) - 1


def test_a_failed_text_is_told_of():
    """The others go on."""
    one, config = engine("llama"), own_bits(period=4)

    def broken(ids, scores):
        if ids.shape[1] > 12:
            raise TypeError("broken")
        return torch.zeros(1, dtype=torch.bool)

    criteria = [StoppingCriteriaList([each]) for each in (broken, lambda ids, scores: torch.zeros(1, dtype=torch.bool))]
    requests = [(i, *ask(one.requests, prompt(5), config, 20, stopping_criteria=each)) for i, each in enumerate(criteria)]
    found = {key: (text, error) for key, text, error in Batch(prepare(one.model), torch.empty(0).long()).decode(requests, 2)}
    assert isinstance(found[0][1], TypeError) and found[0][0].finish == "error"
    assert found[1][1] is None and told(found[1][0]) == decode(one, prompt(5), config, 20)


def test_a_failed_pass_stops_the_texts(monkeypatch):
    """No text takes the failure for a result of its own."""
    one = engine("llama")
    requests = [(i, *ask(one.requests, prompt(5), own_bits(), 8)) for i in range(5)]
    batch = Batch(prepare(one.model), torch.empty(0).long())
    monkeypatch.setattr("sirius_ext.evaluation.batched.embed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batch.decode(requests, 2))


def test_a_prompt_without_the_prefix():
    one = engine("llama")
    batch = Batch(prepare(one.model), prompt(100)[0, :9])
    for ids in (prompt(20), prompt(100)[:, :9], prompt(100)[:, :4]):
        with pytest.raises(ValueError, match="^prompt: expected one that begins with the batch's 9 tokens and goes on"):
            next(batch.decode([(0, *ask(one.requests, ids, own_bits(), 8))], 2))


def test_a_prompt_of_several_modes_is_read_once(monkeypatch):
    """Whether they ask at the same time or later."""
    one, modes = engine("llama"), [config_of(mode, own_bits(period=4)) for mode in NAMED_MODES]
    read, batch = [], Batch(prepare(one.model), prompt(100)[0, :9])
    rows = Batch._rows_of_prefill
    monkeypatch.setattr(Batch, "_rows_of_prefill", lambda *arguments: read.append(arguments[2]) or rows(*arguments))
    requests = [(i, *ask(one.requests, prompt(100), config, 8)) for i, config in enumerate(modes)]
    found = {key: told(text) for key, text, _ in batch.decode(requests, 2)}
    assert len(read) == 1
    assert found == {i: decode(one, prompt(100), config, 8) for i, config in enumerate(modes)}
