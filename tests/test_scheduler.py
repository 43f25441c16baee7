"""The server's core, without HTTP: who is stepped when, who waits, who has left, what is kept."""

import dataclasses
import queue
import threading

import pytest
import served
import tiny
import torch

from sirius_ext import Engine, SiriusConfig
from sirius_ext.engine import prepare
from sirius_ext.runtime import cache as caches
from sirius_ext.serving.scheduler import Ask, QueueFull, Scheduler, Stopping

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = served.tokenizer()


@pytest.fixture
def engine():
    return Engine(served.model(), served.CONFIG, TOKENIZER)


@pytest.fixture
def made(engine):
    """Makes schedulers of one engine."""
    found = []

    def make(**settings):
        found.append(Scheduler(engine, **settings))
        return found[-1]

    yield make
    for each in found:
        each.close()


def ask(engine, ids, count, stops=(), config=None, **settings):
    (request,) = engine.requests(ids, config=config, max_new_tokens=count, do_sample=False)
    return Ask(dataclasses.replace(request, scored=None), stops, **settings)


class Listening:
    """What comes of some texts, in the order in which it came. The scheduler waits at the first event until `go` is called, so
    that what a test submits meanwhile is there when it goes on."""

    def __init__(self, held=False):
        self.events = queue.Queue()
        self.order = []
        self.begun, self._go = threading.Event(), threading.Event()
        if not held:
            self._go.set()

    def go(self):
        self._go.set()

    def __call__(self, name):
        def listen(event):
            self.order.append(name)
            self.events.put((name, event))
            self.begun.set()
            assert threading.current_thread() is threading.main_thread() or self._go.wait(60)

        return listen

    def until_ended(self, count):
        found = {}
        while count:
            name, event = self.events.get(timeout=60)
            found.setdefault(name, []).append(event)
            count -= bool(event.finish)
        return found


def tokens_of(events):
    return [token.token for event in events for token in event.tokens]


def alone(engine, ids, count, config=None):
    return engine.generate(ids, config=config, max_new_tokens=count, do_sample=False).sequences[0, ids.shape[1] :].tolist()


def test_texts_side_by_side_are_what_they_are_alone(engine, made):
    lengths = {length: 10 + length % 7 for length in (3, 40, 17, 300, 1, 90)}
    expected = {length: alone(engine, tiny.prompt(length), count) for length, count in lengths.items()}
    scheduler, listening = made(running=3), Listening()
    scheduler.submit((ask(engine, tiny.prompt(length), count), listening(length)) for length, count in lengths.items())
    found = listening.until_ended(len(lengths))
    for length, events in found.items():
        assert tokens_of(events) == expected[length] and events[-1].finish == "length"
        assert "".join(event.text for event in events) == TOKENIZER.decode(expected[length])
        assert events[-1].stats["prompt_tokens"] == length
    assert scheduler.totals.tokens == sum(lengths.values()) and scheduler.totals.ended == {"length": len(lengths)}
    assert scheduler.totals.prompt_tokens == sum(lengths) and sum(scheduler.totals.waits) == len(lengths)
    # The last event of a text comes before nobody is left.
    assert scheduler.running == scheduler.waiting == 0


def test_a_request_makes_no_copy_of_the_weights(engine):
    """It is there before the first one, or never: of a server that decodes in full S reads what F reads."""
    sparse = dataclasses.replace(served.CONFIG, mode="sparse")
    expected = alone(Engine(served.model()), tiny.prompt(9), 20, dataclasses.replace(sparse, draft_weights="same"))
    full = Engine(served.model(), dataclasses.replace(served.CONFIG, mode="full"), TOKENIZER)
    for one in (engine, full):
        scheduler, listening = Scheduler(one), Listening()
        assert prepare(one.model).weights.has_copy == (one is engine)
        scheduler.submit([(ask(one, tiny.prompt(9), 20, config=sparse), listening("one"))])
        tokens = tokens_of(listening.until_ended(1)["one"])
        scheduler.close()
        assert prepare(one.model).weights.has_copy == (one is engine) and (tokens == expected) == (one is full)


def test_one_period_each_in_turn(engine, made):
    scheduler, listening = made(running=2), Listening(held=True)
    scheduler.submit([(ask(engine, tiny.prompt(9), 200), listening("long"))])
    scheduler.submit([(ask(engine, tiny.prompt(8), 9), listening("short"))])
    scheduler.submit([(ask(engine, tiny.prompt(7), 3), listening("next"))])
    listening.go()
    listening.until_ended(3)
    order = listening.order
    last = max(place for place, name in enumerate(order) if name == "short")
    together = order[1:last]
    assert all(one != other for one, other in zip(together, together[1:])), order
    assert order.index("next") > last, "it waits for a place"
    assert order.index("next") <= last + 3, "and takes the first"


def test_a_long_prompt_is_read_chunk_by_chunk(engine, made, monkeypatch):
    monkeypatch.setattr(caches, "PREFILL_CHUNK", 8)
    scheduler, listening = made(running=2), Listening(held=True)
    scheduler.submit([(ask(engine, tiny.prompt(9), 60), listening("text"))])
    scheduler.submit([(ask(engine, tiny.prompt(81), 3), listening("prompt"))])
    listening.go()
    found = listening.until_ended(2)
    assert listening.order.index("prompt") >= 10, "ten chunks, and a period of the other between any two of them"
    assert tokens_of(found["prompt"]) == alone(engine, tiny.prompt(81), 3)


def test_who_leaves_is_gone_at_the_next_period(engine, made):
    scheduler, listening = made(running=1), Listening(held=True)
    first, second, third = scheduler.submit((ask(engine, tiny.prompt(9), 200), listening(name)) for name in range(3))
    assert listening.begun.wait(60)
    scheduler.cancel(second)
    assert listening.order == [0, 1], "who waits is gone at once"
    scheduler.cancel(first)
    listening.go()
    found = listening.until_ended(3)
    assert [event.finish for event in found[0]] == ["", "cancelled"]
    assert len(tokens_of(found[2])) == 200
    assert first.sequence.finish == "cancelled" and second.sequence is None and third.sequence.finish == "length"
    assert scheduler.totals.ended == {"cancelled": 2, "length": 1}


def test_who_leaves_while_the_prompt_is_read(engine, made, monkeypatch):
    monkeypatch.setattr(caches, "PREFILL_CHUNK", 8)
    scheduler, listening = made(running=2), Listening(held=True)
    scheduler.submit([(ask(engine, tiny.prompt(9), 12), listening("text"))])
    (job,) = scheduler.submit([(ask(engine, tiny.prompt(300), 3), listening("prompt"))])
    read = prepare(engine.model).compute

    def compute(cache, asked):
        if getattr(asked, "start", 0) == 160:
            scheduler.cancel(job)
        return read(cache, asked)

    monkeypatch.setattr(prepare(engine.model), "compute", compute)
    listening.go()
    found = listening.until_ended(2)
    assert [event.finish for event in found["prompt"]] == ["cancelled"] and len(tokens_of(found["text"])) == 12
    assert not any(cache.in_use for cache in prepare(engine.model).caches)


def test_a_queue_has_an_end(engine, made):
    scheduler, listening = made(running=1, waiting=2), Listening(held=True)
    one = ask(engine, tiny.prompt(5), 3)
    scheduler.submit([(one, listening(0))])
    assert listening.begun.wait(60)
    scheduler.submit([(one, listening(1)), (one, listening(2))])
    with pytest.raises(QueueFull):
        scheduler.submit([(one, listening(3))])
    assert scheduler.totals.refused == 1 and scheduler.waiting == 2
    listening.go()
    assert set(listening.until_ended(3)) == {0, 1, 2}
    with pytest.raises(QueueFull):  # all or none
        scheduler.submit([(one, listening(each)) for each in range(4)])
    assert scheduler.idle


def test_stop_lets_texts_end_and_close_does_not(engine, made):
    scheduler, listening = made(running=1), Listening(held=True)
    one = ask(engine, tiny.prompt(5), 20)
    scheduler.submit([(one, listening(0)), (one, listening(1))])
    assert listening.begun.wait(60)
    scheduler.stop()
    with pytest.raises(Stopping):
        scheduler.submit([(one, listening(2))])
    listening.go()
    assert [events[-1].finish for events in listening.until_ended(2).values()] == ["length", "length"]
    other, listening = made(running=1), Listening()
    other.submit([(ask(engine, tiny.prompt(5), 400), listening(0)), (one, listening(1))])
    assert listening.begun.wait(60)
    other.close()
    assert [events[-1].finish for events in listening.until_ended(2).values()] == ["cancelled", "cancelled"]
    assert not other.alive
    with pytest.raises(Stopping):
        other.submit([(one, listening(2))])


def test_an_error_is_one_texts_own(engine, made):
    scheduler, listening = made(running=2), Listening()
    good = ask(engine, tiny.prompt(5), 30)

    def fails(ids, logits):
        if len(ids) > 12:
            raise ValueError("logits_processor: a test's own")
        return logits

    bad = dataclasses.replace(good, request=dataclasses.replace(good.request, process=fails))
    scheduler.submit([(bad, listening("bad")), (good, listening("good"))])
    found = listening.until_ended(2)
    assert found["bad"][-1].finish == "error" and found["bad"][-1].error == "logits_processor: a test's own"
    assert tokens_of(found["good"]) == alone(engine, tiny.prompt(5), 30) and scheduler.alive
    assert not any(cache.in_use for cache in prepare(engine.model).caches)


def test_stop_strings_across_periods(engine, made):
    """Wherever in a period they begin or end: the text ends before them, and nothing of them was said."""
    scheduler, ids = made(), tiny.prompt(23)
    tokens = alone(engine, ids, 60)
    whole = TOKENIZER.decode(tokens)
    for place in range(0, len(whole) - 6, 5):
        stop = whole[place : place + 6]
        listening = Listening()
        scheduler.submit([(ask(engine, ids, 60, (stop,)), listening(0))])
        (events,) = listening.until_ended(1).values()
        assert "".join(event.text for event in events) == whole[: whole.find(stop)]
        assert events[-1].finish == "stop" and tokens_of(events) == tokens[: len(tokens_of(events))]


def test_the_last_used_caches_are_kept(engine, made, monkeypatch):
    """As many as the memory holds."""
    monkeypatch.setattr(caches, "PREFILL_CHUNK", 8)
    scheduler, reused, kept = made(running=1), [], prepare(engine.model).caches
    assert kept.most_bytes == 1 << 30 and kept.most is None
    for length in (20, 21, 22, 20, 23, 20, 21):
        listening = Listening()
        scheduler.submit([(ask(engine, tiny.prompt(length), 3), listening(0))])
        (events,) = listening.until_ended(1).values()
        if not reused:
            kept.most_bytes = 3 * kept.nbytes
        reused.append(events[-1].stats["reused_tokens"])
    assert reused == [0, 0, 0, 16, 0, 16, 0] and scheduler.kept == (3, kept.most_bytes)
    assert scheduler.totals.reused_tokens == 32 and scheduler.totals.reusing == 2


@pytest.mark.parametrize("reuse", [False, True])
def test_a_conversation(engine, made, reuse):
    scheduler, ids = made(reuse_decoded=reuse), tiny.prompt(20)
    for turn in range(3):
        listening = Listening()
        scheduler.submit([(ask(engine, ids, 8), listening(0))])
        (events,) = listening.until_ended(1).values()
        assert events[-1].stats["reused_tokens"] == (ids.shape[1] - 6 if reuse and turn else 0)
        ids = torch.cat((ids, torch.tensor([tokens_of(events)]), tiny.prompt(5)), 1)


@pytest.mark.parametrize(
    ("config", "sources"),
    [
        (served.CONFIG, {"draft", "full"}),
        (SiriusConfig(mode="full"), {"full"}),
        (SiriusConfig(mode="full", lookup=True), {"full", "copy"}),
        (SiriusConfig(mode="sparse"), {"sparse"}),
    ],
    ids=["sirius", "full", "lookup", "sparse"],
)
def test_where_tokens_come_from(engine, made, config, sources):
    scheduler, listening = made(), Listening()
    ids = torch.cat((tiny.prompt(9),) * 3, 1)
    scheduler.submit([(ask(engine, ids, 60, config=config, traced=True), listening(0))])
    (events,) = listening.until_ended(1).values()
    found = [token.source for event in events for token in event.tokens]
    assert set(found) <= sources and (config.lookup or set(found) == sources)
    assert all(event.stats["tokens"] for event in events)
    if config.mode == "sirius":
        accepted = sum(min(event.period.accepted, event.period.committed) for event in events if event.period)
        assert found.count("draft") == accepted
