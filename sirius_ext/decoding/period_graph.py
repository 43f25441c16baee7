"""A whole period of a greedy rule as one CUDA graph."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator

import torch

from ..config import SiriusConfig
from ..errors import warn
from ..kernels import dispatch
from ..runtime.cache import Cache
from ..runtime.cuda import Chosen, CudaCache, CudaModel
from ..runtime.graphs import ConditionsError, Nodes, Replay, profiled
from ..runtime.model import Model
from .period import EDGES, AdaptivePeriod, Ledger, Stops
from .sampling import PRUNE
from .sparsity import DECAY, CSparse, FSparse
from .stats import Period

# A period that was replayed, and the tokens that it commits; None where nothing is known of it, since logits were not finite or
# it could not be captured: then the host goes on.
Replayed = tuple[Period, list[int]] | None

ROWS = 8  # of F's pass in the smallest graph that drafts until it stops; each further one has twice as many


class Record:
    """What the host learns of a period: views of one int32 array, so that one copy brings all of it.

    accepted, limit: [1], the accepted run and the longest that there could be. fault: [1], not 0 once logits of S or F were not
    finite; the rest then says nothing. counts: [depth], nodes of each depth that were drafted. path: [depth + 1], the accepted
    nodes, root first. tokens: [nodes]; the first is F's own token. likelihoods: float32 [nodes - 1]. confidences: float32
    [depth], where drafts stop by them: S's, in the best node of each depth.
    """

    def __init__(self, depth: int, nodes: int, device: torch.device) -> None:
        sizes = (1, 1, 1, depth, depth + 1, nodes, nodes - 1, depth)
        self.memory = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        *integers, likelihoods, confidences = self.memory.split(sizes)
        self.accepted, self.limit, self.fault, self.counts, self.path, self.tokens = integers
        self.likelihoods, self.confidences = likelihoods.view(torch.float32), confidences.view(torch.float32)


class PeriodGraph:
    """SPEC section 3, steps 2 to 5, and section 4, without the host: the tree, the length of the text and what is left of it
    stand in device memory. It is for the one cache.

    Node 0 is x0; the nodes of depth d are 1 + (d - 1) * width ... Every depth has all its places; one that stays empty has a
    score of -inf, and counts for nothing.

    stops: drafts may stop early, by what `start` is given; each pass of S is then a part of the graph that runs only if the ones
        before it say so. F reads all places in any case.
    """

    def __init__(
        self,
        model: CudaModel,
        cache: CudaCache,
        config: SiriusConfig,
        depth: int,
        draft: Chosen,
        judge: Chosen,
        follows: bool,
        stops: bool = False,
    ) -> None:
        self._model, self._cache, self._config, self.depth, self._stops = model, cache, config, depth, stops
        self._prune = PRUNE if config.prune else 1.0
        self._draft_by, self._judge_by, self._follows = draft, judge, follows
        self.width = config.tree_width if depth else 1
        nodes, device = 1 + depth * self.width, model.device
        self.record = Record(depth, nodes, device)
        # Positions, counted from the root's. A chain's shape never changes; a tree's grows with every depth.
        places = torch.arange(nodes, dtype=torch.int32, device=device)
        self._offsets = (places + self.width - 1) // self.width
        self._parents = places - 1
        words = -(-nodes // 64)
        self._mask = torch.zeros(nodes, words, dtype=torch.int64, device="cpu")
        for node in range(nodes):
            for ancestor in range(node + 1 if self.width == 1 else 1):
                self._mask[node, ancestor // 64] |= _bit(ancestor % 64)
        self._mask = self._mask.to(device)
        self._scores = torch.zeros(nodes, dtype=torch.float32, device=device)
        self._rows = torch.zeros_like(places[: self.width])
        self._argmax = torch.zeros_like(places)
        self._remaining, self._limit, self._root, self._kept = (torch.zeros_like(places[:1]) for _ in range(4))
        self._state: tuple[torch.Tensor, ...] = (self.record.tokens, self.record.fault, cache.base, self._remaining, self._limit)
        if follows:
            self._state += cache.followed(draft[0].kept)
        pinned = device.type == "cuda"
        if stops:
            self._reach = torch.zeros(1, dtype=torch.float64, device=device)
            self._goes_on = torch.zeros_like(places[:1])
            self._rule = torch.zeros(Stops.size(depth), dtype=torch.float64, device=device)
            self._rule_given = torch.zeros_like(self._rule, device="cpu", pin_memory=pinned)
        self._replay = Replay(
            self._launch,
            device,
            model.graph_mode == "period",
            f"a period of {depth + 1} and width {self.width}",
            self._state,
            model.capture_stream,
            model.inner_stream,
        )
        # Two, since the next period runs while the host reads the last one's record.
        copies = [torch.zeros_like(self.record.memory, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._copies = itertools.cycle(copies)

    def begin(self, token: int, length: int, remaining: int) -> None:
        """A text whose last committed token, x0, will stand at slot `length`, and that may take so many more tokens."""
        with self._model.lock:
            self.record.tokens[:1].fill_(token)
            self.record.fault.zero_()
            self._cache.base.fill_(length)
            self._remaining.fill_(remaining)
            self._limit.fill_(max(0, min(self.depth, remaining - 1)))

    def periods(self) -> Iterator[Record]:
        """The record of each period, one after the other; never ends. The device is always one period ahead."""
        record_of = self.start()
        while True:
            following = self.start()
            yield record_of()
            record_of = following

    def start(self, stops: Stops | None = None) -> Callable[[], Record]:
        """Have one period run; the one before the last has been read. Returns what waits for its record.

        stops: by which its draft ends, if drafts may stop early; the last one has been read, too, then.
        """
        if self._stops:
            assert stops is not None
            self._rule_given.copy_(torch.tensor(stops.numbers(self.depth), dtype=torch.float64, device="cpu"))
            self._rule.copy_(self._rule_given, non_blocking=True)
        copy = next(self._copies)
        return functools.partial(self._read, copy, self._start(copy))

    def _read(self, copy: torch.Tensor, ready: torch.cuda.Event | None) -> Record:
        """What the device has copied once it is ready."""
        if ready is not None:
            ready.synchronize()
        record = Record(self.depth, len(self.record.tokens), torch.device("cpu"))
        record.memory.copy_(copy)
        return record

    def read(self, record: Record) -> tuple[Period, list[int]]:
        """What happened in a period, and the tokens that it commits."""
        accepted, depth, width = int(record.accepted), int(record.limit), self.width
        counts = [1] * depth if width == 1 and not self._stops else record.counts[:depth].tolist()
        drafted = counts.index(0) if 0 in counts else depth
        likelihoods = [value for d in range(drafted) for value in record.likelihoods[d * width :][: counts[d]].tolist()]
        path = record.path[1 : 1 + accepted].tolist()
        branch = (path[-1] - 1) % width if path else None
        tokens = record.tokens[[*path, 0]].tolist()  # F's own stands in the root's place
        return Period(drafted, sum(counts[:drafted]), accepted, branch, len(tokens), depth < self.depth, likelihoods), tokens

    def _start(self, copy: torch.Tensor) -> torch.cuda.Event | None:
        with self._model.lock:
            self._replay()
            copy.copy_(self.record.memory, non_blocking=True)
        if self._model.device.type != "cuda":
            return None
        with dispatch.guard(self._model.device):  # an event belongs to the current device
            event = torch.cuda.Event()
            event.record()
        return event

    def _launch(self) -> None:
        with self._model.ahead(self._judge_by, self._draft_by):
            with profiled(self._model.device, "draft"):
                for depth in range(self.depth):
                    draft = functools.partial(self._draft, depth)
                    if not self._stops:
                        draft()
                    elif not self._replay.only_if(functools.partial(self._decide, depth), self._goes_on, draft):
                        break
            with profiled(self._model.device, "verify"):
                nodes = self._nodes(0, len(self.record.tokens))
                logits = self._model.run(self._cache, nodes, self._judge_by, keep_z=self._follows)
        with profiled(self._model.device, "accept"):
            self._accept(logits)
        with profiled(self._model.device, "interleave"):
            self._interleave()

    def _nodes(self, start: int, stop: int) -> Nodes:
        return Nodes(self.record.tokens[start:stop], self._offsets[start:stop], self._mask[start:stop], start)

    def _decide(self, depth: int, condition: int) -> None:
        """Whether the leaves at `depth` go through S."""
        self._model.launch(
            "stop",
            rule=self._rule,
            confidences=self.record.confidences,
            reach=self._reach,
            goes_on=self._goes_on,
            counts=self.record.counts,
            scores=self._scores,
            condition=condition,
            edges=len(EDGES),
            depth=depth,
            depths=self.depth,
            width=self.width,
        )

    def _draft(self, depth: int) -> None:
        """The leaves at `depth` through S, and their children."""
        model, cache, width, record = self._model, self._cache, self.width, self.record
        start = 1 + (depth - 1) * width if depth else 0
        stop = new = 1 + depth * width
        nodes, confidence = self._nodes(start, stop), record.confidences[depth:] if self._stops else None
        if width == 1:
            token = record.tokens[new : new + 1]
            logits = model.run(cache, nodes, self._draft_by, argmax=None if self._stops else token)
            if self._stops:
                model.launch(
                    "argmax",
                    logits=logits,
                    argmax=token,
                    likelihoods=confidence,
                    score_temperature=self._config.score_temperature,
                    num_rows=1,
                    vocab=model.weights.vocab,
                )
            return
        logits = model.run(cache, nodes, self._draft_by, alive=record.counts[depth - 1 : depth] if depth else None)
        grown = slice(new, new + width)
        model.launch(
            "tree_expand",
            logits=logits,
            scores=self._scores[start:],
            score_temperature=self._config.score_temperature,
            prune=self._prune,
            tokens=record.tokens[grown],
            parents=self._rows,
            new_scores=self._scores[grown],
            count=record.counts[depth:],
            fault=record.fault,
            num_leaves=stop - start,
            vocab=model.weights.vocab,
            width=width,
        )
        model.launch(
            "grow",
            rows=self._rows,
            parents=self._parents,
            mask=self._mask,
            scores=self._scores,
            confidence=confidence,
            first=new,
            leaves=start,
            width=width,
            mask_words=self._mask.shape[1],
        )

    def _accept(self, logits: torch.Tensor) -> None:
        """SPEC section 3, step 4."""
        model, record, config, tree = self._model, self.record, self._config, self.width > 1
        empty = tree or self._stops  # there may be places that stay so
        model.launch(
            "accept",
            logits=logits,
            drafts=record.tokens[1:],
            parents=self._parents if tree else None,
            scores=self._scores if empty else None,
            threshold=config.threshold,
            score_temperature=config.score_temperature,
            match=config.accept == "match",
            likelihoods=record.likelihoods,
            argmax=self._argmax,
            path=record.path[1:],
            accepted=record.accepted,
            limit=self._limit,
            fault=record.fault,
            num_rows=len(record.tokens),
            vocab=model.weights.vocab,
        )

    def _interleave(self) -> None:
        """Step 5: F's own token is the next root; a tree's accepted entries of the cache move next to the old one's; a set of S
        that follows the text is chosen anew."""
        model, cache, record, w = self._model, self._cache, self.record, self._model.weights
        model.launch(
            "advance",
            accepted=record.accepted,
            argmax=self._argmax,
            path=record.path,
            tokens=record.tokens,
            length=cache.base,
            remaining=self._remaining,
            limit=self._limit,
            used_limit=record.limit,
            root=self._root,
            kept=self._kept,
            depth=self.depth,
        )
        if self.width > 1:
            model.launch(
                "kv_rewrite",
                dtype=w.dtype_code,
                k_cache=cache.k,
                v_cache=cache.v,
                path=record.path,
                base=self._root,
                length_at=self._kept,
                cache=(w.kv_heads, cache.capacity, w.head_dim),
                layers=len(w.layers),
                start=0,
            )
        if self._follows:
            draft, _ = self._draft_by
            nodes, (_, statistic) = len(record.tokens), cache.followed(draft.kept)
            model.launch(
                "follow",
                dtype=w.dtype_code,
                z=cache.z(nodes),
                rows=record.path,
                down_squares=w.down_squares,
                statistic=statistic,
                neurons=draft.neurons,
                decay=DECAY,
                layers=len(w.layers),
                num_rows=nodes,
                intermediate=w.intermediate,
                kept=draft.kept,
                count_at=self._kept,
                fault=record.fault,
            )


def replayed_periods(
    model: Model,
    cache: Cache,
    config: SiriusConfig,
    sparsity: CSparse | FSparse | None,
    adaptive: AdaptivePeriod | None,
    text: tuple[int, int, int],
) -> Iterator[Replayed] | None:
    """The periods of a sequence, after its prefill, without asking the host within them: a greedy rule's, on a CUDA device; None
    elsewhere, and where drafts stop early but graphs have no conditions, whose kernel an older driver cannot load.

    text: as `PeriodGraph.begin` takes it.
    """
    if not isinstance(model, CudaModel) or not isinstance(cache, CudaCache) or model.graph_mode == "step":
        return None
    if adaptive is not None and not model.conditions:
        return None
    with model.lock:
        draft = cache.take(sparsity)
        judge = draft if config.mode == "sparse" else cache.take(None)
    follows = config.mode == "sirius" and sparsity is not None and sparsity.follows
    rule = config.prune, config.accept, config.threshold, config.score_temperature

    def graph_of(depth: int) -> PeriodGraph:
        drafts = depth > 0
        stops = drafts and adaptive is not None
        following = follows and (drafts or adaptive is None)  # the set stands still where an adaptive period drafts nothing
        key = depth, config.tree_width, rule, draft, judge, following, stops
        if key not in cache.periods:
            cache.periods[key] = PeriodGraph(model, cache, config, depth, draft, judge, following, stops)
        found = cache.periods[key]
        assert isinstance(found, PeriodGraph)
        return found

    if adaptive is not None:
        return _until_they_stop(model, graph_of, adaptive, config.tree_width, *text)
    return _of_one_length(graph_of(int(config.period) - 1 if config.mode == "sirius" else 0), *text)


def _of_one_length(graph: PeriodGraph, token: int, length: int, remaining: int) -> Iterator[Replayed]:
    graph.begin(token, length, remaining)
    for record in graph.periods():
        yield None if record.fault else graph.read(record)


def _until_they_stop(
    model: CudaModel,
    graph_of: Callable[[int], PeriodGraph],
    adaptive: AdaptivePeriod,
    width: int,
    token: int,
    length: int,
    remaining: int,
) -> Iterator[Replayed]:
    """Periods whose drafts stop early, each by what the one before has taught. Of few graphs each period takes the smallest one
    that has places for all that might be drafted. The next one runs while the host looks at what this one has committed. Where F
    decodes alone what a period teaches is known before it runs, and the device is one ahead, as with periods of one length."""
    current: PeriodGraph | None = None
    running: deque[tuple[PeriodGraph, Callable[[], Record], int, Ledger]] = deque()

    def start(stops: Stops) -> None:
        nonlocal current, remaining
        graph = graph_of(depth_with(stops.longest, width, adaptive.longest))
        if graph is not current:
            assert not running
            graph.begin(token, length, remaining)
            current = graph
        try:
            record_of = graph.start(stops)
        except ConditionsError as error:
            model.conditions = isinstance(error.__cause__, torch.OutOfMemoryError)  # which says nothing of the next text
            warn(f"{error}; the host decides instead when drafts stop, which takes longer", RuntimeWarning)
            return
        running.append((graph, record_of, remaining, adaptive.ledger))
        if not graph.depth:
            adaptive.judged(0, 1)
            remaining -= 1

    start(adaptive.stops(remaining))
    while running:
        graph, record_of, room, ledger = running[0]
        if not graph.depth and remaining > 0:
            stops = adaptive.stops(remaining)
            if not stops.longest:
                start(stops)
        running.popleft()
        record = record_of()
        if record.fault:
            adaptive.ledger = ledger
            yield None
            return
        period, tokens = graph.read(record)
        period.cut = period.drafted + 1 == room
        token, length = tokens[-1], length + len(tokens)
        if graph.depth:
            for confidence in record.confidences[: period.drafted].tolist():
                adaptive.drafted(confidence)
            adaptive.judged(period.accepted, len(tokens))
            remaining -= len(tokens)
        if not running and remaining > 0:
            start(adaptive.stops(remaining))
        yield period, tokens
    if remaining > 0:
        yield None


def depth_with(drafts: int, width: int, longest: int) -> int:
    """That of the graph for so many drafts at most. longest: period."""
    if not drafts:
        return 0
    rows = ROWS
    while (depth := max(1, (rows - 1) // width)) < drafts:
        rows *= 2
    return min(depth, longest - 1)


def _bit(index: int) -> int:
    """As a signed 64-bit integer, which is what torch has."""
    return 1 << index if index < 63 else -(1 << 63)
