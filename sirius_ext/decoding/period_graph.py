"""A whole period of a greedy rule as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import SiriusConfig
from ..runtime.cuda import CudaModel
from ..runtime.graphs import Nodes, Record, Replay, profiled
from .sampling import PRUNE
from .stats import Period


class PeriodGraph:
    """SPEC section 3, steps 2 to 5, and section 4, without the host: the tree, the length of the text and what is left of it
    stand in device memory.

    Node 0 is x0; the nodes of depth d are 1 + (d - 1) * width ... Every depth has all its places; one that stays empty has a
    score of -inf, and counts for nothing.
    """

    def __init__(
        self,
        model: CudaModel,
        config: SiriusConfig,
        depth: int,
        draft: tuple[int, ...],
        judge: tuple[int, ...],
        follows: bool,
    ) -> None:
        self._model, self._config, self.depth = model, config, depth
        self._prune = PRUNE if config.prune else 1.0
        self._draft_by, self._judge_by, self._follows = draft, judge, follows
        self.width = config.tree_width if depth else 1
        nodes, device = 1 + depth * self.width, model.device
        self.record = Record(depth, nodes, device)
        integers = {"dtype": torch.int32, "device": device}
        # Positions behind the root's. A chain's shape never changes; a tree's grows with every depth.
        places = torch.arange(nodes, **integers)
        self._offsets = (places + self.width - 1) // self.width
        self._parents = places - 1
        words = -(-nodes // 64)
        self._mask = torch.zeros(nodes, words, dtype=torch.int64)
        for node in range(nodes):
            for ancestor in range(node + 1 if self.width == 1 else 1):
                self._mask[node, ancestor // 64] |= _bit(ancestor % 64)
        self._mask = self._mask.to(device)
        self._scores = torch.zeros(nodes, device=device)
        self._rows = torch.zeros(self.width, **integers)
        self._argmax = torch.zeros(nodes, **integers)
        self._remaining, self._limit, self._root, self._kept = (torch.zeros(1, **integers) for _ in range(4))
        self._state = (self.record.tokens, self.record.fault, model.base, self._remaining, self._limit)
        if follows:
            self._state += model.following(draft[-1])
        self._replay = Replay(
            self._launch, device, model.graph_mode == "period", f"a period of {depth + 1} and width {self.width}", self._state
        )
        # Two, since the next period runs while the host reads the last one's record.
        pinned = device.type == "cuda"
        self._copies = [torch.zeros_like(self.record.memory, device="cpu", pin_memory=pinned) for _ in range(2)]

    def begin(self, token: int, length: int, remaining: int) -> None:
        """A text whose last committed token, x0, will stand at slot `length`, and that may take so many more tokens."""
        self.record.tokens[:1].fill_(token)
        self.record.fault.zero_()
        self._model.base.fill_(length)
        self._remaining.fill_(remaining)
        self._limit.fill_(max(0, min(self.depth, remaining - 1)))

    def periods(self) -> Iterator[Record]:
        """The record of each period, one after the other; never ends. The device is always one period ahead."""
        copies = self._copies
        ready = self._start(copies[0])
        for count in range(1, 1 << 62):
            following = self._start(copies[count % 2])
            if ready is not None:
                ready.synchronize()
            record = Record(self.depth, len(self.record.tokens), torch.device("cpu"))
            record.memory.copy_(copies[(count - 1) % 2])
            yield record
            ready = following

    def read(self, record: Record) -> tuple[Period, list[int]]:
        """What happened in a period, and the tokens that it commits."""
        accepted, depth, width = int(record.accepted), int(record.limit), self.width
        counts = [1] * depth if width == 1 else record.counts[:depth].tolist()
        drafted = counts.index(0) if 0 in counts else depth
        likelihoods = [value for d in range(drafted) for value in record.likelihoods[d * width :][: counts[d]].tolist()]
        path = record.path[1 : 1 + accepted].tolist()
        branch = (path[-1] - 1) % width if path else None
        tokens = record.tokens[[*path, 0]].tolist()  # F's own stands in the root's place
        return Period(drafted, sum(counts[:drafted]), accepted, branch, len(tokens), depth < self.depth, likelihoods), tokens

    def _start(self, copy: torch.Tensor) -> torch.cuda.Event | None:
        self._replay()
        copy.copy_(self.record.memory, non_blocking=True)
        if self._model.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _launch(self) -> None:
        with profiled(self._model.device, "draft"):
            for depth in range(self.depth):
                self._draft(depth)
        with profiled(self._model.device, "verify"):
            logits = self._model.run(self._nodes(0, len(self.record.tokens)), self._judge_by, keep_z=self._follows)
        with profiled(self._model.device, "accept"):
            self._accept(logits)
        with profiled(self._model.device, "interleave"):
            self._interleave()

    def _nodes(self, start: int, stop: int) -> Nodes:
        return Nodes(self.record.tokens[start:stop], self._offsets[start:stop], self._mask[start:stop], start)

    def _draft(self, depth: int) -> None:
        """The leaves at `depth` through S, and the nodes behind them."""
        model, width, record = self._model, self.width, self.record
        start = 1 + (depth - 1) * width if depth else 0
        stop = new = 1 + depth * width
        nodes = self._nodes(start, stop)
        if width == 1:
            model.run(nodes, self._draft_by, argmax=record.tokens[new : new + 1])
            return
        logits = model.run(nodes, self._draft_by, alive=record.counts[depth - 1 : depth] if depth else None)
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
            first=new,
            leaves=start,
            width=width,
            mask_words=self._mask.shape[1],
        )

    def _accept(self, logits: torch.Tensor) -> None:
        """SPEC section 3, step 4."""
        model, record, config, tree = self._model, self.record, self._config, self.width > 1
        model.launch(
            "accept",
            logits=logits,
            drafts=record.tokens[1:],
            parents=self._parents if tree else None,
            scores=self._scores if tree else None,
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
        model, record, w = self._model, self.record, self._model.weights
        model.launch(
            "advance",
            accepted=record.accepted,
            argmax=self._argmax,
            path=record.path,
            tokens=record.tokens,
            length=model.base,
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
                k_cache=model.k_cache,
                v_cache=model.v_cache,
                path=record.path,
                base=self._root,
                length_at=self._kept,
                cache=(w.kv_heads, model.capacity, w.head_dim),
                layers=len(w.layers),
                start=0,
            )
        if self._follows:
            model.launch_follow(record.path, self._kept, len(record.tokens), self._draft_by, record.fault)


def _bit(index: int) -> int:
    """As a signed 64-bit integer, which is what torch has."""
    return 1 << index if index < 63 else -(1 << 63)
