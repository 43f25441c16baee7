"""Many texts over one model: who waits, who is stepped, who has left. One thread computes; anyone may ask."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..decoding.prefill import Passes
from ..decoding.sequence import Request, Score, Sequence, Step, start
from ..decoding.stats import Period, PromptStats
from ..engine import Engine, Tokenizer, make_copy, prepare
from ..errors import reason
from ..runtime.passes import Prefill, Result
from .text import Answer

# Seconds until the first token: the upper ends of the histogram's bins.
WAITS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


class QueueFull(Exception):
    """As many texts wait as may."""


class Stopping(Exception):
    """No more texts are taken."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer.

    text: what it added, which is nothing as long as a character lacks other tokens.
    source: "draft", proposed by S and kept by F; "full", F's own; "copy", copied from the text and kept by F; "sparse", S's own
        where it decodes alone.
    score, replaced: as `Step` has them.
    """

    token: int
    text: str
    source: str
    score: Score | None = None
    replaced: Score | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """What a turn of a job brought, or how it has ended.

    text: new text, all of which is certain.
    tokens: the new tokens; the text of the last ones may still be held back, because a stop string may begin in it.
    period: the verification, if there was one.
    finish: "stop", "length", "cancelled" or "error" at the end, else "".
    error: the message of an error.
    stats: in a word, what was counted so far; at the end, and where the job is traced.
    """

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    period: Period | None = None
    finish: str = ""
    error: str = ""
    stats: dict[str, Any] | None = None


Listener = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A text that someone wants.

    request: without stop strings.
    stops: strings before which the text ends.
    traced: every event has the stats so far.
    """

    request: Request
    stops: tuple[str, ...] = ()
    traced: bool = False


class Job:
    """A text that was asked for. `listener` is called with every event, in the scheduler's thread or, for a job that is cancelled
    while it waits, in the canceller's; the last event has `finish`."""

    def __init__(self, ask: Ask, listener: Listener, tokenizer: Tokenizer) -> None:
        self.ask, self.listener = ask, listener
        self.cancelled = False
        self.asked = time.perf_counter()
        self.sequence: Sequence | None = None
        self.answer = Answer(tokenizer, ask.request.prompt.tolist(), ask.stops)
        # A step that has begun: what is left of it, and what it waits for.
        self.passes: Passes[Step] | None = None
        self.result: Result | None = None
        self._seen = 0  # tokens that the answer has

    def request(self) -> Request:
        """With the stop strings in it."""

        def stops(tokens: list[int]) -> bool:
            return self._see(tokens)

        return dataclasses.replace(self.ask.request, stops=stops)

    def _see(self, tokens: list[int]) -> bool:
        for token in tokens[self._seen :]:
            self._seen += 1
            if self.answer.add(token):
                return True
        return False

    def event(self, step: Step) -> Event:
        """Of a step that has just been made."""
        assert self.sequence is not None
        first = len(self.sequence.tokens) - len(step.tokens)
        if step.ended:
            self.answer.end()
        pieces = self.answer.pieces[first:]
        pieces += [""] * (len(step.tokens) - len(pieces))  # a token that ends the text adds nothing
        scores: list[Score] | list[None] = step.scores or [None] * len(step.tokens)
        own = "sparse" if self.ask.request.config.mode == "sparse" else "full"
        # What S has not proposed, F has copied.
        drafts = "draft" if step.period is not None and step.period.passes else "copy"
        tokens = [
            Token(token, piece, drafts if place < step.accepted else own, score)
            for place, (token, piece, score) in enumerate(zip(step.tokens, pieces, scores))
        ]
        if step.replaced is not None:
            tokens[-1] = dataclasses.replace(tokens[-1], replaced=step.replaced)
        finish = {"": "", "eos": "stop", "criteria": "stop", "context": "length"}.get(step.finish, step.finish)
        stats = summary(self.sequence.stats) if step.ended or self.ask.traced else None
        return Event(self.answer.take(step.ended), tokens, step.period, finish, stats=stats)


def summary(stats: PromptStats) -> dict[str, Any]:
    """What was counted of a text, in a word: for a client, a status line, a page."""
    names = ("average_advance_length", "effective_density", "corrected_fraction")
    seconds = stats.decode_seconds
    return {
        "mode": stats.mode,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "tokens": stats.tokens,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": seconds,
        "tokens_per_second": (stats.tokens - 1) / seconds if seconds and stats.tokens > 1 else None,
        **{name: getattr(stats, name) for name in names},
    }


@dataclasses.dataclass
class Totals:
    """What was counted of all texts, since the beginning.

    ended: texts, by how they have ended.
    advances, advanced: verifications that were not cut short by the end of a text, and the tokens that they committed.
    committed, corrected: tokens that verifications committed, and those of them that replaced a draft.
    waits: how often the first token came within each of WAITS seconds, and later; waited: seconds together.
    """

    ended: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    reusing: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    advances: int = 0
    advanced: int = 0
    committed: int = 0
    corrected: int = 0
    waits: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(WAITS) + 1))
    waited: float = 0.0

    def began(self, stats: PromptStats, waited: float) -> None:
        """A first token came."""
        self.prompt_tokens += stats.prompt_tokens
        self.reused_tokens += stats.reused_tokens
        self.reusing += stats.reused_tokens > 0
        self.prefill_seconds += stats.prefill_seconds or 0.0
        self.waits[sum(waited > end for end in WAITS)] += 1
        self.waited += waited

    def stepped(self, step: Step, seconds: float) -> None:
        self.tokens += len(step.tokens)
        self.decode_seconds += seconds
        if (period := step.period) is None:
            return
        self.committed += period.committed
        self.corrected += period.replaced
        if not period.cut:
            self.advances += 1
            self.advanced += period.committed


class Scheduler:
    """Decodes what it is asked for, in one thread of its own: up to `running` texts at a time, in turn, one period or one chunk
    of a prompt each; the others wait in the order in which they came.

    waiting: texts at most that wait.
    cache_bytes: at most, of the caches of ended texts that are kept for prompts that begin alike.
    reuse_decoded: decoded tokens of kept caches are used too. A conversation then reads only what is new in it, but what an
        answer is can depend on who asked before: a decode pass rounds in other places than a prefill.
    """

    def __init__(
        self, engine: Engine, running: int = 4, waiting: int = 64, cache_bytes: int = 1 << 30, reuse_decoded: bool = False
    ) -> None:
        self.engine, self.totals = engine, Totals()
        self._most_running, self._most_waiting, self._reuse_decoded = running, waiting, reuse_decoded
        self._model = prepare(engine.model)
        # A request may not make the server larger: a copy of the weights is made now or never.
        if engine.config.mode == "full":
            self._model.weights.copy_memory = 0
        make_copy(engine.model, engine.config, progress=False)
        tiers = self._model.weights.tiers  # memory that was divided has its own share for them
        self._model.caches.most = None
        self._model.caches.most_bytes = cache_bytes if tiers is None else min(cache_bytes, tiers.plan.caches)
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = self._closed = False
        self._thread = threading.Thread(target=self._run, name="sirius scheduler", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------------- from any thread

    def submit(self, asks: Iterable[tuple[Ask, Listener]]) -> list[Job]:
        """Have texts decoded, all or none of them. QueueFull if there is no room for them, Stopping if no more are taken."""
        jobs = [Job(ask, listener, self.engine.tokenizer) for ask, listener in asks]
        with self._changed:
            if self._stopping or not self.alive:
                raise Stopping
            room = self._most_running - len(self._running) + self._most_waiting - len(self._waiting)
            if len(jobs) > room:
                self.totals.refused += 1
                raise QueueFull
            self._waiting += jobs
            self._changed.notify_all()
        return jobs

    def cancel(self, job: Job) -> None:
        """A text that nobody wants any more ends: at once if it waits, at its next turn if it runs."""
        with self._changed:
            job.cancelled = True
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self.totals.ended["cancelled"] += 1
        job.listener(Event(finish="cancelled"))

    def stop(self) -> None:
        """Take no more texts. Those that were taken go on to their ends."""
        with self._changed:
            self._stopping = True

    def abort(self) -> None:
        """Take no more texts and end all others after the turn in progress."""
        with self._changed:
            self._stopping = self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """`abort`, and wait for it."""
        self.abort()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether texts are decoded."""
        return self._thread.is_alive() and not self._closed

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Texts at most that may be asked for together."""
        return self._most_running + self._most_waiting

    @property
    def kept(self) -> tuple[int, int]:
        """Caches of ended texts, and their bytes."""
        return len(self._model.caches), self._model.caches.nbytes

    # ----------------------------------------------------------------------------------------------- in the thread that computes

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._admit():
                for job in tuple(self._running):
                    if self._closed:
                        return
                    self._turn(job)
        finally:
            with self._changed:
                self._stopping = self._closed = True
                left = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for job in left:
                self._drop(job)
                job.listener(Event(finish="cancelled"))

    def _admit(self) -> bool:
        """Let those that wait take free places, once there is someone. False when there will be no one."""
        with self._changed:
            while not self._closed and self.idle:
                self._changed.wait()
            while self._waiting and len(self._running) < self._most_running:
                self._running.append(self._waiting.popleft())
            return not self._closed

    def _turn(self, job: Job) -> None:
        """One period of a job, or one chunk of its prompt."""
        try:
            if job.cancelled:
                self._drop(job)
                event: Event | None = Event(finish="cancelled")
            else:
                event = self._advance(job)
        except Exception as error:
            # Of this text alone: a number that is not finite, or memory that is not there. The others go on.
            event = Event(finish="error", error=reason(error))
        if event is None:
            return
        if event.finish:
            with self._changed:
                self._running.remove(job)
                self.totals.ended[event.finish] += 1
        job.listener(event)

    def _drop(self, job: Job) -> None:
        """End a sequence where it is."""
        if job.passes is not None:
            job.passes.close()
        if job.sequence is not None:
            job.sequence.cancel()

    def _advance(self, job: Job) -> Event | None:
        """None after a chunk of a prompt."""
        if job.sequence is None:
            job.sequence = start(self._model, job.request(), reuse_decoded=self._reuse_decoded)
        sequence, before = job.sequence, job.sequence.stats.decode_seconds or 0.0
        step = self._until_chunk(job, sequence)
        if step is None:
            return None
        if len(sequence.tokens) == len(step.tokens):
            self.totals.began(sequence.stats, time.perf_counter() - job.asked)
        self.totals.stepped(step, (sequence.stats.decode_seconds or 0.0) - before)
        return job.event(step)

    def _until_chunk(self, job: Job, sequence: Sequence) -> Step | None:
        """Go on with a step to its end, or until a chunk of the prompt has been read."""
        try:
            if job.passes is None:
                job.passes = sequence.passes()
                asked = next(job.passes)
            else:
                assert job.result is not None
                asked = job.passes.send(job.result)
            while True:
                job.result = self._model.compute(sequence.cache, asked)
                if isinstance(asked, Prefill) and asked.stop < len(asked.prompt):
                    return None
                asked = job.passes.send(job.result)
        except StopIteration as end:
            job.passes = job.result = None
            step: Step = end.value
            return step
