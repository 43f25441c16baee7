"""One text as it is decoded: prefill, then draft, verify, accept and interleave until it ends (SPEC sections 3 and 4)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ..config import SiriusConfig
from ..runtime.cache import Cache
from ..runtime.graphs import profiled
from ..runtime.model import Model, lasting, not_finite
from ..runtime.passes import Fault, Pass, Result
from .costs import costs_of
from .lookup import MOST, Lookup
from .period import AdaptivePeriod, Copying
from .period_graph import Replayed, replayed_periods
from .prefill import Passes, drive, read
from .sampling import Logits, rule_of
from .sparsity import CSparse, FSparse, density_of, four_bits, sparse_density, sparsity_of
from .stats import Period, PromptStats
from .tree import Tree

# (token ids so far int64 [t], the logits after them float32 [V]) -> logits to decide by, float32 [V]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Streamer(Protocol):
    """Who wants a text's tokens once they are certain."""

    def put(self, value: torch.Tensor) -> None:
        """Some tokens, int64 [n], in order."""

    def end(self) -> None:
        """There are no more."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to decode. Whoever makes one has checked that prompt and limit fit the context.

    prompt: int64 [t], in the host's memory.
    limit: new tokens at most, at least 1.
    limited_by: why there are no more: "length" or "context".
    eos: tokens that end the text.
    stops: asked after every token, with the new tokens so far, whether the text ends there.
    process: changes logits before they are used.
    sample: draw tokens from the softmax of the processed logits, instead of taking the likeliest.
    generator: draws them; torch's default one without it.
    thresholds: FSparse's, float32 [layers].
    streamer: gets the tokens of every step, and is told of the end.
    scored: what F, or the model that decodes alone, made of each token is a part of every step, with so many of the likeliest
        tokens.
    """

    prompt: torch.Tensor
    config: SiriusConfig
    limit: int
    limited_by: str = "length"
    eos: frozenset[int] = frozenset()
    stops: Callable[[list[int]], bool] | None = None
    process: Processor | None = None
    sample: bool = False
    generator: torch.Generator | None = None
    thresholds: torch.Tensor | None = None
    streamer: Streamer | None = None
    scored: int | None = None

    def longest_period(self, model: Model) -> int:
        """The period, or the longest that "auto" may choose for a tree that is not too large. ValueError if a layer of the
        model does not see so far back."""
        longest, window = self.config.longest_period_with(model.weights.streams), model.weights.description.narrowest
        if self.config.period == "auto" and model.most_nodes is not None:
            longest = min(longest, 1 + (model.most_nodes - 1) // self.config.tree_width)
        if window and longest > window:
            if self.config.period == "auto":
                return window
            raise ValueError(f"period: expected at most {window}, this model's sliding window, got {longest}")
        return longest

    def copies(self, model: Model) -> bool:
        """Whether tokens are copied from the text. On a GPU they are only if that is asked for: every number of copies at every
        place of a draft is a graph of its own, which is captured when it is first needed."""
        return self.config.copies and (self.config.lookup is True or model.device.type == "cpu")

    def tree(self, model: Model) -> Tree:
        """An empty one, for the drafts of this text."""
        if self.config.mode == "sirius":
            return Tree(self.longest_period(model) - 1, self.config.tree_width)
        if not self.copies(model):
            return Tree(0, 1)
        # Copies after x0, none of them so far on that it does not see x0, and what is chosen after them.
        window = model.weights.description.narrowest
        return Tree(min(1 + MOST, window) if window else 1 + MOST, 1)


@dataclasses.dataclass(frozen=True)
class Score:
    """What the model that decides made of a token, by its own logits: no logits processor, no temperature.

    logprob: the natural logarithm of its likelihood.
    top: the likeliest tokens in its place and theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, count: int) -> Score:
        """By logits, float32 [V], with `count` of the likeliest tokens."""
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        return cls(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist())))


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of a sequence did.

    tokens: that joined the text.
    period: the verification, if there was one; it says what was drafted or copied, and how much of it was accepted.
    finish: why the text has ended, as `PromptStats` has it; "" if it has not.
    scores: of each of the tokens, if the request wants them.
    replaced: of what S had proposed in the place of F's own token, which is the last one; if the request wants scores.
    """

    tokens: list[int]
    period: Period | None = None
    finish: str = ""
    scores: list[Score] = dataclasses.field(default_factory=list)
    replaced: Score | None = None

    @property
    def ended(self) -> bool:
        return bool(self.finish)

    @property
    def drafted(self) -> int:
        """Tokens that S proposed, or that F alone copied."""
        return self.period.nodes if self.period else 0

    @property
    def accepted(self) -> int:
        """How many of them joined the text, unless it ended before."""
        return self.period.accepted if self.period else 0

    @property
    def rejected(self) -> int:
        return self.drafted - self.accepted


class Sequence:
    """A text, step by step: `step` until `ended`. Any number of them may be alive over one model, each with a cache of its own,
    in one thread or in several; one sequence is for one thread at a time.

    >>> sequence = engine.start(input_ids, max_new_tokens=256)
    >>> while not sequence.ended:
    ...     print(sequence.step().tokens)

    tokens: new ones so far.
    stats: `PromptStats` of what was done so far.
    finish: why it has ended, as `PromptStats` has it; "" if it has not.
    cache: holds the text's keys and values; the model keeps it for prompts to come once the text has ended, or this object is
        dropped.
    """

    def __init__(self, model: Model, request: Request, cache: Cache, give_back: Callable[[Cache], None]) -> None:
        """cache: with room for the text, which must begin with what it holds. give_back: called with it when the text has ended,
        or nobody has a use for it any more. (`start` has both.)"""
        self.model, self.request, self.cache = model, request, cache
        self.tokens: list[int] = []
        self.finish = ""
        config, prompt = request.config, request.prompt
        self._rule = rule_of(config, request.sample, request.generator)
        self._sparsity: CSparse | FSparse | None = None
        self._lookup = Lookup(prompt.tolist()) if request.copies(model) else None
        self._tree = request.tree(model)
        verifies = config.mode == "full" and self._lookup is not None  # F alone, what is copied
        density, draft_weights = 1.0, ""
        if config.mode != "full":
            self._sparsity = sparsity_of(config, model.weights, request.thresholds)
            density = sparse_density(config, model.weights)
            draft_weights = "q4" if four_bits(config, model.weights) else "same"
        corrects = config.mode == "sirius"
        self.stats = PromptStats(
            mode=config.mode,
            period=config.period if corrects else self._tree.capacity - 1 if verifies else 1,
            tree_width=config.tree_width if corrects else 1,
            density=density,
            weights=model.weights.form,
            draft_weights=draft_weights,
            prompt_tokens=len(prompt),
            reused_tokens=min(len(cache.tokens), len(prompt) - 1),
        )
        self._adaptive: AdaptivePeriod | None = None
        self._copying: Copying | None = None  # F, or S, alone with copies: what it does, or what it would do
        self._sparse_with: list[float] = []  # passes of S with 0, 1, 2, ... copies, in such passes
        if self._lookup is not None or (corrects and config.period == "auto"):
            costs = costs_of(model, config, self._lookup is not None, request.thresholds)
            self._sparse_with = costs.sparse_with()
            if self._lookup is not None:
                with_copies = self._sparse_with if config.mode == "sparse" else costs.full_with()
                self._copying = Copying(self._lookup, with_copies, min(MOST, max(0, self._tree.capacity - 2)))
            if corrects and config.period == "auto":
                longest, neurons = request.longest_period(model), density_of(config, model.weights)
                self._adaptive = AdaptivePeriod(costs, config.accept, config.tree_width, longest, neurons, self._copying)
                self.stats.sparse_cost = costs.sparse
        # The text so far, for who wants to see it: logits processors.
        self._ids = torch.empty(len(prompt) + request.limit, dtype=torch.int64, device="cpu") if request.process else None
        self._replayed: Iterator[Replayed] | None = None  # one for every step, where a device decodes whole periods
        self._give_back = weakref.finalize(self, give_back, cache)
        self._give_back.atexit = False

    def __repr__(self) -> str:
        end = f"ended: {self.finish}" if self.ended else "not ended"
        return f"Sequence({len(self.request.prompt)} tokens of prompt, {len(self.tokens)} new, {end})"

    @property
    def ended(self) -> bool:
        return bool(self.finish)

    @property
    def _length(self) -> int:
        """Of the text in the cache: the last token, x0, is not among it yet."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @lasting
    def step(self, progress: Callable[[int], None] | None = None) -> Step:
        """Go on: at first read the prompt and choose the first token; then decode one period, or one token where nothing is
        corrected. RuntimeError if the text has ended, or the model's weights have moved. ValueError if logits of F or S are not
        finite: what was committed before stays, and the sequence has ended.

        progress: called while the prompt is read, chunk by chunk, with the number of its tokens that are; at its end before the
            first token is chosen.
        """
        return drive(self.model, self.cache, self.passes(), progress)

    def run(self, progress: Callable[[int], None] | None = None) -> PromptStats:
        """Go on to the end. Returns the stats. progress: as `step` has it."""
        while not self.ended:
            self.step(progress)
        return self.stats

    def cancel(self) -> None:
        """End the text where it is, between two steps."""
        if not self.ended:
            self._end("cancelled")

    def passes(self) -> Passes[Step]:
        """`step`, for who computes the passes."""
        if self.ended:
            raise RuntimeError(f"sequence: it has ended ({self.finish})")
        started = time.perf_counter()
        try:
            if self.model.weights.have_moved:
                raise RuntimeError("sequence: the model's weights were moved to other memory (share_memory?); start anew")
            if not self.tokens:
                return (yield from self._begin(started))
            if self._replayed is not None:
                replayed = next(self._replayed)
                if replayed is not None:
                    return self._replay(*replayed, started)
                # The host goes over this period again, pass by pass, and says where the fault is.
                self._replayed = None
            if self.request.config.mode == "sirius":
                return (yield from self._period(started))
            return (yield from self._plain_step(started))
        except BaseException:
            if not self.ended:
                self.finish = self.stats.finish = "error"
                self._give_back()
            raise

    def _begin(self, started: float) -> Passes[Step]:
        request, stats = self.request, self.stats
        with profiled(self.model.device, "prefill"):
            logits = raw = yield from read(self.cache, request.prompt, self._sparsity)
        if request.process and self._ids is not None:
            self._ids[: len(request.prompt)] = request.prompt
            logits = request.process(request.prompt, logits)
        stats.prefill_seconds = time.perf_counter() - started
        started = time.perf_counter()
        token = self._rule.choose(logits)
        step = self._commit([token], started, logits=raw[None])
        # A replayed period leaves no logits.
        needs_host = request.process is not None or self._lookup is not None or request.scored is not None
        if not self.ended and not needs_host and self._rule.takes_argmax:
            text = token, self._length, request.limit - 1
            self._replayed = replayed_periods(self.model, self.cache, request.config, self._sparsity, self._adaptive, text)
        return step

    def _commit(
        self,
        tokens: list[int],
        started: float,
        period: Period | None = None,
        logits: torch.Tensor | None = None,
        replaced: int | None = None,
    ) -> Step:
        """Have tokens join the text, up to its end; the last one is the root of what comes next.

        started: when the step was.
        logits: by which they were chosen, before any processor, float32 [tokens, V].
        replaced: what S had proposed in place of the last one.
        """
        request = self.request
        if self._ids is not None:
            end = len(request.prompt) + len(self.tokens) + len(tokens)
            self._ids[end - len(tokens) : end] = torch.tensor(tokens, device="cpu")
        self._tree.plant(tokens[-1], self._length + len(tokens))
        if self._copying is not None:
            self._copying.commit(tokens)
        before = len(self.tokens)
        finish = ""
        for token in tokens:
            self.tokens.append(token)
            if token in request.eos:
                finish = "eos"
            elif request.stops is not None and request.stops(self.tokens):
                finish = "criteria"
            elif len(self.tokens) >= request.limit:
                finish = request.limited_by
            if finish:
                break
        committed = self.tokens[before:]
        self.cache.hold(self.tokens[max(0, before - 1) : -1], exact=request.config.mode != "sparse")
        if request.streamer is not None:
            request.streamer.put(torch.tensor(committed, device="cpu"))
        self.stats.tokens = len(self.tokens)
        if period is not None:
            period.committed = len(committed)
            period.cut |= len(committed) < len(tokens)
            self.stats.periods.append(period)
        scores, other = [], None
        if request.scored is not None and logits is not None:
            scores = [Score.of(row, token, request.scored) for row, token in zip(logits, committed)]
            if replaced is not None and len(committed) == len(tokens):
                other = Score.of(logits[-1], replaced, 0)
        self.stats.decode_seconds = (self.stats.decode_seconds or 0.0) + time.perf_counter() - started
        if finish:
            self._end(finish)
        return Step(committed, period, finish, scores, other)

    def _end(self, finish: str) -> None:
        self.finish = self.stats.finish = finish
        self._replayed = None
        self._give_back()
        if self.request.streamer is not None:
            self.request.streamer.end()

    def _replay(self, period: Period, tokens: list[int], started: float) -> Step:
        """A period that needed the host only for its record."""
        period.seconds = time.perf_counter() - started
        return self._commit(tokens, started, period if self.request.config.mode == "sirius" else None)

    def _plain_step(self, started: float) -> Passes[Step]:
        """One token by F alone, or by S alone; and those that were copied from the text, if it chooses them too."""
        if self._copying is None:
            token, logits = yield from self._next_token(self._sparsity)
            return self._commit([token], started, logits=logits)
        room = self.request.limit - len(self.tokens)
        copies = self._copying.copies[: room - 1]
        tokens, logits = yield from self._grow(copies, _always, self._sparsity)
        if self.request.config.mode == "sparse":
            return self._commit(tokens, started, logits=logits)
        return self._copied(copies, tokens, len(copies) + 1 == room, started, logits)

    def _copied(self, copies: list[int], tokens: list[int], cut: bool, started: float, logits: torch.Tensor) -> Step:
        """The end of a step of F alone, which has read copies and chosen tokens; without a copy it is one token."""
        accepted, copied = len(tokens) - 1, len(copies)
        record = Period(copied, copied, accepted, 0 if accepted else None, len(tokens), cut, [], copied=copied)
        record.seconds = time.perf_counter() - started
        return self._commit(tokens, started, record, logits)

    def _next_token(self, sparsity: CSparse | FSparse | None) -> Passes[tuple[int, torch.Tensor]]:
        """What F, or S, chooses after x0, and the model's own logits for it, float32 [1, V]."""
        logits, result = yield from self._pass(slice(0, 1), sparsity)
        if self._rule.takes_argmax and self.request.process is None:
            return int(result.argmax), result.logits
        return self._rule.choose(logits[0]), result.logits

    def _period(self, started: float) -> Passes[Step]:
        """SPEC section 3, steps 2 to 5, and section 4."""
        tree, sparsity, device, adaptive = self._tree, self._sparsity, self.model.device, self._adaptive
        assert sparsity is not None
        # The last period may be shorter: it need not commit more than the text may still take.
        room = self.request.limit - len(self.tokens)
        with profiled(device, "draft"):
            copied = yield from self._draft(room, sparsity)
        cut = tree.depth + 1 == room and (adaptive is not None or room < int(self.request.config.period))
        if adaptive and tree.depth == 0:
            return (yield from self._alone(adaptive, room, started))
        with profiled(device, "verify"):
            logits, result = yield from self._pass(slice(0, tree.size), keep_z=sparsity.follows and tree.depth > 0)
        with profiled(device, "accept"):
            path, own, likelihoods = self._rule.accept(tree, logits)
        if adaptive:
            adaptive.judged(len(path), len(path) + 1)
        # F overwrote the cache entries of S. A chain's accepted ones stand in their places; a tree's are moved there. Dropping
        # the others is a matter of the length.
        with profiled(device, "interleave"):
            self.cache.compact(self._length, path)
            if isinstance(sparsity, CSparse) and result.z is not None:
                sparsity.follow(result.z, path)
        tokens = tree.tokens[path].tolist() + [own]
        record = Period(tree.depth, tree.size - 1, len(path), tree.branch(path), len(tokens), cut, likelihoods)
        record.seconds, record.copied = time.perf_counter() - started, copied
        if self.request.scored is None:
            return self._commit(tokens, started, record)
        other = tree.first_child(path[-1] if path else 0)
        replaced = None if other is None else int(tree.tokens[other])
        return self._commit(tokens, started, record, result.logits[[0, *path]], replaced)

    def _alone(self, adaptive: AdaptivePeriod, room: int, started: float) -> Passes[Step]:
        """A period without a draft: F's next token, at the cost of F alone. A set that follows the text stands still.

        What F copies from the text it would have chosen itself, so that with `match` the text is the same with copies or without.
        """
        if self._lookup is None:
            token, logits = yield from self._next_token(None)
            adaptive.judged(0, 1)
            return self._copied([], [token], room == 1, started, logits)
        copies = self._lookup.find(min(room, self._tree.capacity - 1) - 1, adaptive.full_worth)
        tokens, logits = yield from self._grow(copies, _always)
        adaptive.judged(0, len(tokens), len(copies))
        return self._copied(copies, tokens, len(copies) + 1 == room, started, logits)

    def _draft(self, room: int, sparsity: CSparse | FSparse) -> Passes[int]:
        """Step 2: S consumes x0, then what it proposes, the leaves of a depth in one pass, until the period is full, the text has
        no more room or, if the period is adaptive, one more token is not worth its cost. Returns how many tokens were copied."""
        tree, adaptive, copied = self._tree, self._adaptive, 0
        depth = 0 if adaptive else min(int(self.request.config.period), room) - 1
        while adaptive.goes_on(room) if adaptive else tree.depth < depth:
            if tree.width == 1 and self._rule.takes_argmax:
                first, copies = tree.size - 1, self._copies(room, depth)
                if adaptive:
                    adaptive.reads(len(copies))

                def goes_on(logits: Logits, row: int, first: int = first, last: int = len(copies)) -> bool:
                    if adaptive is None:
                        return True
                    adaptive.drafted(self._confidence(logits, first), paid=row > 0)
                    return adaptive.goes_on(room, paid=row < last)

                tokens, _ = yield from self._grow(copies, goes_on, sparsity)
                copied += len(tokens) - 1
                continue
            before, leaves = tree.size, tree.leaves
            logits, _ = yield from self._pass(leaves, sparsity)
            self._rule.expand(tree, logits)
            if tree.size == before:
                break
            if adaptive:
                adaptive.drafted(self._confidence(logits, leaves.start))
        return copied

    def _copies(self, room: int, depth: int) -> list[int]:
        """What may stand after the last node of a chain, no further than the draft may go. depth: of a fixed period's draft."""
        tree, adaptive = self._tree, self._adaptive
        if self._lookup is None:
            return []
        if adaptive is None:
            return self._lookup.find(depth - tree.depth - 1, self._sparse_with)
        copies = self._lookup.find(MOST, self._sparse_with)
        going_on = (adaptive.goes_on(room, ahead) for ahead in range(1, 1 + len(copies)))
        return copies[: sum(1 for _ in itertools.takewhile(bool, going_on))]

    def _grow(
        self, copies: list[int], goes_on: Callable[[Logits, int], bool], sparsity: CSparse | FSparse | None = None
    ) -> Passes[tuple[list[int], torch.Tensor]]:
        """Let a chain grow by one pass of S, or F, over its last node and over tokens that may come after it: by the model's
        choice, and by one more after each copy that it has chosen. `goes_on` is asked after each of them, by the logits of the
        pass and the row that gave it. Returns the new tokens, which the model chooses without copies, too, and its own logits for
        them and for what else was in the pass."""
        tree, lookup, first = self._tree, self._lookup, self._tree.size - 1
        rows = 1 + len(copies)
        # A row's choice takes the place of the token that was copied for the next one. By then that has been read.
        chosen = tree.tokens[first + 1 : first + 1 + rows]
        if copies:
            chosen[:-1] = torch.tensor(copies, dtype=torch.int32, device="cpu")
        result = yield from self._ask(slice(first, first + rows), sparsity, chosen)
        logits, best, tokens = self._logits(result, first), result.argmax.tolist(), []
        for row, copy in enumerate((*copies, None)):
            if best[row] < 0:
                yield from self._not_finite([first + row], sparsity)
            if self.request.process is not None:
                chosen[row] = best[row] = int(logits[row].argmax())
            tokens.append(best[row])
            tree.grow_chain()
            if not goes_on(logits, row) or best[row] != copy:
                break
        if lookup is not None:
            lookup.learn(tokens)
            lookup.draft(tokens)
        return tokens, result.logits

    def _confidence(self, logits: Logits, first: int) -> float:
        """How likely S finds the best node of the last depth, by the logits of its leaves before, the first of which is node
        `first`."""
        tree, nodes = self._tree, self._tree.leaves
        rows = (tree.parents[nodes] - first).tolist()
        temperature, best = self.request.config.score_temperature, 0.0
        for row, token in zip(rows, tree.tokens[nodes].tolist()):
            scores = logits[row] / temperature
            best = max(best, float((scores[token] - scores.logsumexp(0)).exp()))
        return best

    def _pass(
        self, nodes: slice, sparsity: CSparse | FSparse | None = None, keep_z: bool = False
    ) -> Passes[tuple[Logits, Result]]:
        """Run nodes of the tree through F, or S. Returns the logits by which to decide, and the model's own."""
        result = yield from self._ask(nodes, sparsity, keep_z=keep_z)
        best = result.argmax.tolist()
        if -1 in best:
            yield from self._not_finite([nodes.start + row for row, token in enumerate(best) if token < 0], sparsity)
        return self._logits(result, nodes.start), result

    def _ask(
        self,
        nodes: slice,
        sparsity: CSparse | FSparse | None = None,
        argmax: torch.Tensor | None = None,
        keep_z: bool = False,
    ) -> Passes[Result]:
        """Have nodes of the tree computed. Each one's likeliest token goes to `argmax`, if given; after `keep_z` there is what F
        made of the nodes, which S's set can follow."""
        tree, length = self._tree, self._length
        result: Result = yield Pass(
            tree.tokens[nodes],
            tree.positions(nodes),
            tree.mask[nodes],
            prefix=length,
            first_slot=length + nodes.start,
            sparsity=sparsity,
            argmax=argmax,
            keep_z=keep_z,
            follower=self._sparsity if keep_z else None,
        )
        return result

    def _logits(self, result: Result, first: int) -> Logits:
        """Those of a pass whose first row was node `first`, as the logits processors make them."""
        process = self.request.process
        if process is None:
            return Logits(result.logits)
        return Logits(result.logits, lambda row, each: process(self._text_to(first + row), each))

    def _not_finite(self, nodes: list[int], sparsity: CSparse | FSparse | None) -> Passes[None]:
        """Raise the error for the logits of some nodes, which F gave, or with a sparsity S: of the first whose fault can be
        found."""
        branches = [self._tree.tokens[[0, *self._tree.path(node)]].long() for node in nodes]
        found, where = branches[0], None
        for branch in branches:
            where = (yield Fault(branch, self._length, sparsity)).fault
            if where is not None:
                found = branch
                break
        corrects = self.request.config.mode == "sirius"
        if sparsity is None:
            reader = "a verification (full model)" if corrects else "a step of the full model"
        else:
            reader = "a draft (sparse model)" if corrects else "a step of the sparse model"
        prompt = len(self.request.prompt)
        raise not_finite(prompt, self._length + len(found) - prompt, reader, where)

    def _text_to(self, node: int) -> torch.Tensor:
        """Prompt, committed tokens and the branch that ends with `node`, int64."""
        assert self._ids is not None
        return torch.cat((self._ids[: self._length + 1], self._tree.tokens[self._tree.path(node)].long()))


def _always(logits: Logits, row: int) -> bool:
    return True


@lasting
def start(model: Model, request: Request, cache: Cache | None = None, reuse_decoded: bool = False) -> Sequence:
    """A sequence over a cache of the model's own. What of the prompt a kept cache holds already is not read again, where the
    result is bit for bit the same.

    cache: goes on from all tokens that this one holds, decoded ones too.
    reuse_decoded: goes on from all tokens that a kept cache has in common with the prompt, decoded ones too.
    ValueError if the prompt does not begin with them, or it cannot be used here.
    """
    prompt, observed = request.prompt.tolist(), request.config.mode != "full" and request.config.sparsity != "fsparse"
    tree, exact = request.tree(model), request.config.mode != "sparse"
    if cache is None:
        cache = model.caches.take(prompt, observed, reuse_decoded, exact)
    else:
        model.caches.claim(cache, functools.partial(_check_cache, model, cache, prompt, observed, exact))
    try:
        # Slots for the whole text, and for drafts beyond its end that are never committed.
        model.reserve(cache, len(prompt) + request.limit + tree.capacity, tree.capacity)
        return Sequence(model, request, cache, model.caches.give)
    except BaseException:
        model.caches.give(cache)
        raise


def _check_cache(model: Model, cache: Cache, prompt: list[int], observed: bool, exact: bool) -> None:
    if cache.weights is not model.weights:
        raise ValueError("past_key_values: this cache was made by another model, or before this one's weights were changed")
    if prompt[: len(cache.tokens)] != cache.tokens:
        raise ValueError(
            f"past_key_values: the prompt, of {len(prompt)} tokens, does not begin with the {len(cache.tokens)} that this cache "
            "holds (the model lends the caches of ended texts to later ones)"
        )
    if exact and cache.exact < len(cache.tokens):
        raise ValueError(
            'past_key_values: the sparse model alone has decoded into this cache (mode="sparse"), and what the full model says '
            "would depend on that"
        )
    if observed and any(stretch.observed is None for stretch in cache.stretches):
        raise ValueError(
            "past_key_values: this cache was filled by a mode that does not observe its neurons, which csparse and the cascade "
            "choose by"
        )
