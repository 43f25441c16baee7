"""`period="auto"`: the period that is expected to cost the least time per token, from recent acceptance and measured passes."""

from __future__ import annotations

import dataclasses
import statistics
import weakref

from ..config import MAX_AUTO_PERIOD
from ..runtime.model import Model

FIRST_ALPHA = 0.9  # acceptance assumed before anything is known
_PRIOR = 4.0  # drafts that an assumption counts for
_FIRST = 4  # the first period of a text, and of a probe
_FORGET = 0.9  # weight of a period's evidence after the next
_FORGET_COST = 0.97  # weight of a pass's time after the next
# What a pass of F is taken to cost before any was measured: (rows, passes of S), each counting for half a measured pass.
_ASSUMED = ((1, 1.3), (16, 1.6))
_PROBE = 32, 512  # tokens by F alone before drafting is tried again: at first, and at most


class Costs:
    """What a pass of F costs in passes of S, by its rows: a straight line through recent passes, by least squares.

    Ratios and not seconds: both are bound by the memory, whose speed other programs change all the time; only passes that ran one
    after the other can be compared.
    """

    def __init__(self) -> None:
        self._sums: dict[object, tuple[float, ...]] = {}  # by the kind of S: weight, x, y, xx, xy

    def observe(self, kind: object, rows: int, ratio: float) -> None:
        """A pass of F over so many rows took `ratio` times as long as the passes of S beside it."""
        expected = self.full(kind, rows)
        ratio = min(max(ratio, expected / 2), 2 * expected)  # something else had the processor
        new = (1.0, rows, ratio, rows * rows, rows * ratio)
        self._sums[kind] = tuple(_FORGET_COST * old + add for old, add in zip(self._sums.get(kind, (0.0,) * 5), new))

    def full(self, kind: object, rows: int) -> float:
        """Of one pass of F over so many rows, in passes of S of that kind; it never falls with the rows."""
        n, x, y, xx, xy = self._sums.get(kind, (0.0,) * 5)
        for at, value in _ASSUMED:
            n, x, y, xx, xy = n + 0.5, x + at / 2, y + value / 2, xx + at * at / 2, xy + at * value / 2
        slope = max(0.0, (n * xy - x * y) / (n * xx - x * x))
        return max(0.1, y / n + slope * (rows - x / n))


class Learned:
    """What the texts of a model have shown, for those to come.

    alphas: how often S was right in the last text, by what it was and who judged.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self.alphas: dict[object, float] = {}


_learned: weakref.WeakKeyDictionary[Model, Learned] = weakref.WeakKeyDictionary()


def learned(model: Model) -> Learned:
    """It lives as long as the model does."""
    return _learned.setdefault(model, Learned())


@dataclasses.dataclass
class AdaptivePeriod:
    """Chooses each period of one text.

    Where a draft is accepted with probability `alpha`, a period of n commits 1 + alpha + ... + alpha^(n - 1) tokens on average
    and costs n - 1 passes of S and one of F over all nodes. `next` returns the n of least cost per token, at most twice the last
    one, so that it is approached and not jumped to. n = 1 is F alone; it then probes drafting again after 32 tokens, twice as
    many after each probe that did not change the answer, 512 at most.

    kind: of S; what its passes cost is not compared with those of another.
    assumed: alpha at first; that of the text before, say.
    """

    costs: Costs
    kind: object
    width: int = 1
    longest: int = MAX_AUTO_PERIOD
    assumed: float = FIRST_ALPHA

    def __post_init__(self) -> None:
        self._accepted, self._judged = self.assumed * _PRIOR, _PRIOR
        self._last, self._wait, self._since = _FIRST, _PROBE[0], 0
        self._sparse: list[float] = []  # seconds of this period's passes of S
        self._sparse_before = self._full_before = None  # of the period before, if it had such a pass, and only one row in F's

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
        best, least, tokens = 1, self.costs.full(self.kind, 1), 0.0
        for n in range(1, self.longest + 1):
            tokens += self.alpha ** (n - 1)
            cost = (n - 1 + self.costs.full(self.kind, 1 + (n - 1) * self.width)) / tokens
            if cost < least:
                best, least = n, cost
        return best

    def saw_sparse(self, seconds: float) -> None:
        """A pass of S took so long."""
        self._sparse.append(seconds)

    def saw_full(self, rows: int, seconds: float) -> None:
        """The pass of F that ends a period took so long."""
        sparse = statistics.median(self._sparse) if self._sparse else None
        if sparse is not None and self._full_before is not None:
            self.costs.observe(self.kind, 1, self._full_before / sparse)
        unit = sparse if sparse is not None else self._sparse_before
        if unit is not None:
            self.costs.observe(self.kind, rows, seconds / unit)
        self._sparse_before, self._full_before = sparse, seconds if rows == 1 else None
        self._sparse.clear()

    def observe(self, drafted: int, accepted: int) -> None:
        """What became of a period's drafts: `accepted` right ones and, unless all were, one wrong."""
        self._accepted = _FORGET * self._accepted + accepted
        self._judged = _FORGET * self._judged + accepted + (accepted < drafted)
