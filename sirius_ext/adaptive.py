"""`period="auto"`: the period that is expected to cost the least time per token, from recent acceptance and measured passes."""

from __future__ import annotations

import bisect
import dataclasses
import statistics
from collections import deque

from .config import MAX_AUTO_PERIOD

_FIRST = 4  # the first period of a text, and of a probe
_FORGET = 0.9  # weight of a period's evidence after the next
FIRST_ALPHA = 0.9  # acceptance assumed before anything is known
_PRIOR = 4.0  # drafts that an assumption counts for
_RECENT = 7  # passes whose median is the cost
_PROBE = 32, 512  # tokens by F alone before drafting is tried again: at first, and at most


class Costs:
    """Seconds of recent passes, medians: of S, and of F by its number of rows. Kept with the model, so that a second text
    knows."""

    def __init__(self) -> None:
        self._recent: dict[object, deque[float]] = {}
        self._sparse: dict[object, float] = {}
        self._full: list[tuple[int, float]] = []  # by rising row count

    def saw_sparse(self, kind: object, seconds: float) -> None:
        self._sparse[kind] = self._median(("sparse", kind), seconds)

    def saw_full(self, rows: int, seconds: float) -> None:
        median = self._median(("full", rows), seconds)
        self._full = sorted([(m, cost) for m, cost in self._full if m != rows] + [(rows, median)])

    def _median(self, key: object, seconds: float) -> float:
        recent = self._recent.setdefault(key, deque(maxlen=_RECENT))
        recent.append(seconds)
        return statistics.median(recent)

    def sparse(self, kind: object) -> float | None:
        """Of one pass of that kind; None if there was none."""
        return self._sparse.get(kind)

    def full(self, rows: int) -> float | None:
        """Of one pass, on the straight line through the nearest row counts seen, and never falling; None if there was none."""
        above = bisect.bisect_left(self._full, (rows, 0.0))
        if above == len(self._full):
            return self._full[-1][1] if self._full else None
        high, most = self._full[above]
        if above == 0 or high == rows:
            return most
        low, least = self._full[above - 1]
        return least + max(0.0, most - least) * (rows - low) / (high - low)


@dataclasses.dataclass
class AdaptivePeriod:
    """Chooses each period of one text.

    Where a draft is accepted with probability `alpha`, a period of n commits 1 + alpha + ... + alpha^(n - 1) tokens on average
    and costs n - 1 passes of S and one of F over all nodes. `next` returns the n of least cost per token, at most twice the
    last one, so that a cost that was never measured is approached and not guessed. n = 1 is F alone; it then probes drafting
    again after 32 tokens, twice as many after each probe that did not change the answer, 512 at most.

    assumed: alpha at first; that of the text before, say.
    """

    costs: Costs
    kind: object  # of the sparse pass
    width: int = 1
    longest: int = MAX_AUTO_PERIOD
    assumed: float = FIRST_ALPHA

    def __post_init__(self) -> None:
        self._accepted, self._judged = self.assumed * _PRIOR, _PRIOR
        self._last, self._wait, self._since = _FIRST, _PROBE[0], 0

    @property
    def alpha(self) -> float:
        return self._accepted / self._judged

    def next(self) -> int:
        best = self._best()
        if best > 1:
            self._wait, self._since = _PROBE[0], 0
            self._last = min(best, max(2 * self._last, _FIRST))
        elif self._since >= self._wait:
            self._wait, self._since = min(2 * self._wait, _PROBE[1]), 0
            self._last = _FIRST
        else:
            self._since += 1
            self._last = 1
        return min(self._last, self.longest)

    def _best(self) -> int:
        sparse, full = self.costs.sparse(self.kind), self.costs.full(1)
        if sparse is None or full is None:
            return _FIRST
        best, least, tokens = 1, full, 0.0
        for n in range(1, self.longest + 1):
            tokens += self.alpha ** (n - 1)
            cost = ((n - 1) * sparse + self.costs.full(1 + (n - 1) * self.width)) / tokens
            if cost < least:
                best, least = n, cost
        return best

    def observe(self, drafted: int, accepted: int) -> None:
        """What became of a period's drafts: `accepted` right ones and, unless all were, one wrong."""
        self._accepted = _FORGET * self._accepted + accepted
        self._judged = _FORGET * self._judged + accepted + (accepted < drafted)
