"""Sequences: step by step, side by side, from several threads, cancelled and dropped; each is the text that it is alone."""

import contextlib
import dataclasses
import functools
import gc
import threading
import time

import pytest
import torch
from backends import emulated
from tiny import Collector, engine, own_bits, prompt, seeded, tiny

import sirius_ext
from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.decoding import sequence
from sirius_ext.decoding.period import Costs
from sirius_ext.decoding.sequence import start
from sirius_ext.engine import prepare
from sirius_ext.models.weights import Weights

COUNT = 12
PLAIN = {"do_sample": False}
DRAWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
CASES = [
    ({"mode": "full"}, PLAIN),
    ({"mode": "full"}, DRAWN),
    ({"mode": "sparse"}, PLAIN),
    ({"mode": "sparse", "sparsity": "fsparse"}, PLAIN),
    ({"period": 4}, PLAIN),
    ({"period": 4, "follow": False}, PLAIN),
    ({"period": 6, "accept": "match", "sparsity": "fsparse"}, PLAIN),
    ({"period": "auto", "accept": "match"}, PLAIN),
    ({"period": 4, "tree_width": 3}, PLAIN),
    ({"period": 4, "tree_width": 2, "accept": "match", "sparsity": "fsparse"}, PLAIN),
    ({"period": 4}, {"do_sample": False, "repetition_penalty": 1.3}),
    ({"period": 4, "accept": "sample"}, DRAWN),
    ({"period": 4, "tree_width": 3, "accept": "sample"}, DRAWN),
]
COLUMNS = ("drafted", "nodes", "accepted", "branch", "committed", "cut")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpu", "simt"])
def place(request):
    """The CPU's kernels, and the CUDA backend with its replayed periods."""
    with emulated(_simt) if request.param == "simt" else contextlib.nullcontext():
        yield request.param


@functools.cache
def engine_at(place):
    return Engine(tiny("mistral"))


@pytest.fixture
def ours(place):
    return engine_at(place)


def request(case, number=0):
    """The config and settings of a case, with a generator of their own where they draw."""
    values, settings = CASES[case % len(CASES)]
    drawn = {"generator": seeded(number)} if settings["do_sample"] else {}
    return {"config": own_bits(**{"density": 0.4, "threshold": 0.05, **values}), "max_new_tokens": COUNT, **settings, **drawn}


def rows(periods):
    return [tuple(getattr(period, column) for column in COLUMNS) for period in periods]


def alone(engine, ids, **asked):
    out = engine.generate(ids, **asked)
    return out.sequences[0, ids.shape[1] :].tolist()


# ------------------------------------------------------------------------------------------------------------- step by step


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case][0].values())))
def test_stepping_is_generating(ours, case):
    ids = prompt(9)
    expected = ours.generate(ids, **request(case))
    text, steps = ours.start(ids, **request(case)), []
    assert not text.ended and text.tokens == [] and text.finish == ""
    while not text.ended:
        before = list(text.tokens)
        steps.append(text.step())
        assert text.tokens == before + steps[-1].tokens and steps[-1].tokens
        assert text.stats.tokens == len(text.tokens)
        assert steps[-1].ended == text.ended and steps[-1].finish == text.finish == text.stats.finish
    assert text.tokens == expected.sequences[0, 9:].tolist()
    stats = expected.stats.prompts[0]
    if request(case)["config"].period != "auto":
        assert rows(text.stats.periods) == rows(stats.periods)
    assert text.finish == stats.finish == "length"
    first, *others = steps
    assert len(first.tokens) == 1 and first.period is None and first.drafted == first.accepted == first.rejected == 0
    if request(case)["config"].mode == "sirius":
        assert [step.period for step in others] == text.stats.periods
        for step, period in zip(others, text.stats.periods):
            assert (step.drafted, step.accepted, step.rejected) == (
                period.nodes,
                period.accepted,
                period.nodes - period.accepted,
            )
    else:
        assert all(len(step.tokens) == 1 and step.period is None for step in others)
    with pytest.raises(RuntimeError, match="^sequence: it has ended .length"):
        text.step()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_torchs_defaults_do_not_matter(place, default):
    """The default dtype (which `from_pretrained` sets for as long as it loads, for other threads too) and the default device are
    for who names none. Where kernels find room for 16 bits and write 32, they end the process."""

    def texts(engine, ids):
        for case in (1, 3, 6, 8, 9, 10, 12):
            asked = request(case)
            asked["config"] = dataclasses.replace(asked["config"], draft_weights=("q4", "same")[case % 2])
            yield alone(engine, ids, **asked)

    ids = prompt(9)
    model, expected = tiny("mistral"), list(texts(engine_at(place), ids))
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        assert list(texts(Engine(model), ids)) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_what_a_step_gives_is_what_a_streamer_gets(ours):
    streamer = Collector()
    text, steps = ours.start(prompt(9), streamer=streamer, **request(4)), []
    assert torch.equal(streamer.puts[0], prompt(9))
    while not text.ended:
        steps.append(text.step().tokens)
    assert [put.tolist() for put in streamer.puts[1:]] == steps and streamer.ends == 1


def test_how_much_of_a_prompt_is_read(place):
    """After each chunk, the last time before the first token comes; the next steps read nothing."""
    told, tokens = [], Collector()
    sequence = Engine(tiny("mistral", max_position_embeddings=1024)).start(
        prompt(600), streamer=tokens, max_new_tokens=6, **PLAIN
    )
    sequence.run(lambda read: told.append((read, len(tokens.puts))))
    assert told == [(256, 1), (512, 1), (600, 1)]  # the prompt is what a streamer gets first


def test_ends(ours):
    """By an end-of-text token and by a criterion, in the middle of a period."""
    whole = alone(ours, prompt(9), **request(4))
    text = ours.start(prompt(9), **request(4), eos_token_id=whole[6])
    stats = text.run()
    assert text.tokens == whole[: whole.index(whole[6]) + 1] and stats.finish == "eos"
    text = ours.start(prompt(9), **request(4), stopping_criteria=[lambda ids, scores: torch.tensor([ids.shape[1] == 16])])
    assert text.run().finish == "criteria" and text.tokens == whole[:7]


def test_a_sequence_is_one_text(ours):
    with pytest.raises(ValueError, match="^input_ids: expected one prompt, got 2"):
        ours.start(prompt(9).repeat(2, 1), **request(0))


# ------------------------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("first", range(0, len(CASES), 4))
def test_sequences_in_turn(ours, first):
    """Three over one model, of different kinds, a step of each at a time: each is as if alone."""
    asked = [(prompt(length), first + offset) for offset, length in enumerate((9, 33, 1))]
    expected = [alone(ours, ids, **request(case)) for ids, case in asked]
    texts = [ours.start(ids, **request(case)) for ids, case in asked]
    assert len({id(text.cache) for text in texts}) == 3
    while not all(text.ended for text in texts):
        for text in texts:
            if not text.ended:
                text.step()
    assert [text.tokens for text in texts] == expected


def test_one_prompt_several_times(ours):
    """The same graphs and sets at other places."""
    expected = alone(ours, prompt(9), **request(4))
    texts = [ours.start(prompt(9), **request(4)) for _ in range(3)]
    for count in range(COUNT):
        for text in texts[count % 3 :]:
            if not text.ended:
                text.step()
    assert [text.tokens for text in texts if text.run()] == [expected] * 3


def test_a_text_within_a_step(ours):
    """Whoever changes logits may decode in between, in the middle of a pass's consequences."""
    expected, other = alone(ours, prompt(9), **request(4)), alone(ours, prompt(33), **request(8))
    found = []

    def process(ids, scores):
        if not found:
            found.append(alone(ours, prompt(33), **request(8)))
        return scores

    assert alone(ours, prompt(9), **request(4), logits_processor=[process]) == expected
    assert found == [other]


@pytest.mark.parametrize("how", ["generate", "step"])
def test_threads(how):
    """Many at once, on one model: each text is its own. (The emulator of CUDA is for one thread.)"""
    ours = engine("mistral")
    asked = [(prompt(length), case) for length, case in ((9, 4), (33, 8), (1, 0), (20, 2), (12, 6), (7, 11))]
    expected = [alone(ours, ids, **request(case)) for ids, case in asked]
    found, begin = [None] * len(asked), threading.Barrier(len(asked))

    def decode(index):
        torch.set_num_threads(1)
        ids, case = asked[index]
        begin.wait()
        if how == "generate":
            found[index] = alone(ours, ids, **request(case))
        else:
            text = ours.start(ids, **request(case))
            while not text.ended:
                text.step()
            found[index] = text.tokens

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == expected
    assert not prepare(ours.model).lock.locked()


def test_threads_prepare_a_model_once(monkeypatch):
    """Each would lay the weights out in memory of its own, and only the last of these is the model's."""
    model, made, found, begin = tiny("mistral"), [], [], threading.Barrier(4)

    def weights(model):
        time.sleep(0.1)  # the other threads are here by then
        made.append(Weights(model))
        return made[-1]

    def ask():
        begin.wait()
        found.append(prepare(model))

    monkeypatch.setattr(sirius_ext.engine, "Weights", weights)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(made) == 1 and len(found) == 4 and len(set(map(id, found))) == 1
    assert found[0].weights.layers[0].down.data.data_ptr() == model.model.layers[0].mlp.down_proj.weight.data_ptr()


# ------------------------------------------------------------------------------------------------------ cancelled and dropped


@pytest.mark.parametrize("case", [0, 4, 8, 11])
def test_cancel(ours, case):
    whole, streamer = alone(ours, prompt(9), **request(case)), Collector()
    text = ours.start(prompt(9), streamer=streamer, **request(case))
    for _ in range(2):
        text.step()
    text.cancel()
    text.cancel()
    assert text.ended and text.finish == text.stats.finish == "cancelled" and streamer.ends == 1
    assert 2 <= len(text.tokens) < COUNT and text.tokens == whole[: len(text.tokens)]
    assert any(cache is text.cache for cache in prepare(ours.model).caches)
    with pytest.raises(RuntimeError, match="^sequence: it has ended .cancelled"):
        text.step()
    assert alone(ours, prompt(9), **request(case)) == whole


def test_cancel_before_the_first_step(ours):
    text = ours.start(prompt(9), **request(4))
    text.cancel()
    assert text.tokens == [] and text.stats.tokens == 0 and text.finish == "cancelled"


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_dropped_sequence_returns_its_cache(place, steps):
    one = Engine(tiny("mistral"))
    caches = prepare(one.model).caches
    text = one.start(prompt(9), **request(4))
    for _ in range(steps):
        text.step()
    cache = text.cache
    assert cache.in_use and not len(caches)
    del text
    if place == "simt":
        gc.collect()
    assert list(caches) == [cache] and not cache.in_use
    again = one.start(prompt(9), **request(4))
    assert again.cache is cache
    again.run()
    assert again.tokens == alone(Engine(tiny("mistral")), prompt(9), **request(4))


def test_an_error_ends_it(ours):
    def broken(ids, scores):
        if ids.shape[1] == 12:
            raise KeyError("broken")
        return torch.zeros(1, dtype=torch.bool)

    text = ours.start(prompt(9), **request(4), stopping_criteria=[broken])
    with pytest.raises(KeyError):
        text.run()
    assert text.ended and text.finish == text.stats.finish == "error" and not text.cache.in_use
    with pytest.raises(RuntimeError, match="^sequence: it has ended .error"):
        text.step()
    assert alone(ours, prompt(9), **request(4)) == alone(Engine(tiny("mistral")), prompt(9), **request(4))


def test_a_refused_start_takes_no_cache():
    """Its tree is too large for the device."""
    with emulated(_simt):
        one = Engine(tiny("mistral"))
        one.generate(prompt(9), **request(4))
        (cache,) = prepare(one.model).caches
        with pytest.raises(ValueError, match="^period, tree_width"):
            one.start(prompt(9), config=SiriusConfig(period=200, tree_width=16), max_new_tokens=4, do_sample=False)
        assert list(prepare(one.model).caches) == [cache] and not cache.in_use


def test_requests_are_what_generate_decodes():
    one = engine("llama3")
    first, second = one.requests(prompt(9).repeat(2, 1), **request(4))
    assert torch.equal(first.prompt, prompt(9)[0]) and first.limit == second.limit == COUNT and first.eos == frozenset()
    assert first.config == request(4)["config"] and first.process is None and not first.sample


# ------------------------------------------------------------------------------------------------------------------ scores

SCORED = [
    SiriusConfig(mode="full"),
    SiriusConfig(mode="full", lookup=True),
    SiriusConfig(period=6, accept="match", density=0.4),
    own_bits(period=6, accept="match", density=0.4, lookup=True),
    # What S reads decides where its drafts end: none of these ends where nothing was drafted to be replaced.
    SiriusConfig(period=5, density=0.4, threshold=0.05, tree_width=3, draft_weights="same"),
    SiriusConfig(density=0.4, draft_weights="same"),
]


@pytest.mark.parametrize("config", SCORED, ids=lambda c: f"{c.mode}-{c.accept}-{c.tree_width}-{c.period}-{c.lookup}")
def test_scores_are_the_full_models(place, config, monkeypatch):
    """Of every token, by the logits of transformers; and asking for them changes nothing."""
    # Where drafting pays; on a busy machine the full model might be measured to be faster alone.
    monkeypatch.setattr(sequence, "costs_of", lambda *_: Costs(0.1, ((4, 1.0), (16, 1.05))))
    model, ids, steps = tiny("llama3"), prompt(23), []
    (request,) = Engine(model).requests(ids, config=config, max_new_tokens=30 if place == "cpu" else 8)
    plain = start(prepare(model), request)
    plain.run()
    text = start(prepare(model), dataclasses.replace(request, scored=3))
    while not text.ended:
        steps.append(text.step())
    assert text.tokens == plain.tokens
    whole = torch.cat((ids, torch.tensor([text.tokens])), 1)
    with torch.no_grad():
        expected = tiny("llama3")(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    scores = [score for step in steps for score in step.scores]
    assert [score.token for score in scores] == text.tokens
    for score, logprobs in zip(scores, expected):
        values, tokens = logprobs.topk(3)
        assert score.logprob == pytest.approx(float(logprobs[score.token]), abs=1e-3)
        assert [token for token, _ in score.top] == tokens.tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(values.tolist(), abs=1e-3)
    end, replaced = 0, 0
    for step in steps:
        end += len(step.tokens)
        if step.replaced is not None:
            replaced += 1
            assert step.replaced.token != step.tokens[-1] and step.accepted < step.period.drafted
            assert step.replaced.logprob == pytest.approx(float(expected[end - 1][step.replaced.token]), abs=1e-3)
        elif step.period is not None and config.mode == "sirius" and not step.ended:
            assert step.accepted == step.period.drafted
    if place == "cpu":
        assert bool(replaced) == (config.mode == "sirius" and text.stats.corrected_fraction > 0)


def test_weights_that_move_end_the_text():
    """What kernels were told of would be read where it no longer is. Texts that begin after it are right."""
    model = tiny("llama3")
    engine = Engine(model, SiriusConfig(accept="match", period=4))
    expected = engine.generate(prompt(8), max_new_tokens=12).sequences
    sequence = engine.start(prompt(8), max_new_tokens=40)
    sequence.step()
    model.share_memory()
    with pytest.raises(RuntimeError, match="^sequence: the model's weights were moved to other memory"):
        sequence.step()
    assert sequence.ended and sequence.finish == "error"
    assert torch.equal(engine.generate(prompt(8), max_new_tokens=12).sequences, expected)
