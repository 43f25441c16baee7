"""`period="auto"`: S drafts as long as one more token is expected to bring more than it costs.

How likely F is to accept a token is read from S's confidence in it, by what F has made of earlier tokens of like confidence. What
a pass costs is measured once for a model on a machine and kept (`costs.py`). Nothing that decides depends on the clock while a
text is decoded, so that the same call gives the same text.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from ..config import MAX_AUTO_PERIOD
from .lookup import MOST, Chances, Lookup, Match

# Confidences are told apart by these upper edges. Of each class: the share of tokens that F accepts by each rule, by S's density,
# and the share of all tokens that fall into it, before anything is known of a text. Rounded from what bench/traces.py found for
# two models. (The more neurons S reads, the more an unsure S is unsure for F's own reasons.)
EDGES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
PRIOR_ACCEPTED = {
    "match": {
        0.5: (0.22, 0.36, 0.5, 0.6, 0.7, 0.8, 0.88, 0.92, 0.96, 0.99),
        0.7: (0.25, 0.41, 0.61, 0.71, 0.8, 0.89, 0.93, 0.97, 0.98, 0.995),
        1.0: (0.3, 0.6, 0.73, 0.91, 0.94, 0.98, 0.99, 0.995, 0.998, 0.999),
    },
    "threshold": {
        0.5: (0.38, 0.52, 0.65, 0.72, 0.8, 0.87, 0.92, 0.95, 0.97, 0.99),
        0.7: (0.55, 0.69, 0.84, 0.88, 0.93, 0.95, 0.97, 0.985, 0.99, 0.998),
        1.0: (0.77, 0.96, 0.985, 0.99, 0.99, 0.995, 0.998, 0.998, 0.999, 0.999),
    },
}
PRIOR_ACCEPTED["sample"] = PRIOR_ACCEPTED["match"]  # a draw is accepted about as often as the likeliest tokens are the same
PRIOR_SHARE = (0.05, 0.08, 0.1, 0.06, 0.08, 0.07, 0.09, 0.07, 0.16, 0.24)
_PRIOR_TOKENS = 10.0  # what the prior of a class counts for
_PRIOR_SHARES = 30.0  # and that of the shares
_FORGET = 0.98  # what a token counts for after the next one of its class
_FORGET_RATE = 0.95  # and a period, in the rate of the text
_PRIOR_RATE = 20.0  # tokens that the rate a text begins with counts for

# A text may cost this much more than F alone would, over its length so far or LEAST_TOKENS, whichever is more. The promise is
# 2 %; the rest is for what is not in the costs.
MOST_LOSS = 0.018
LEAST_TOKENS = 64
MOST_RISK = 0.75  # of what is left of that


@dataclasses.dataclass(frozen=True)
class Costs:
    """In passes of F over one token.

    sparse: a pass of S.
    full: of F's passes, (rows, cost), rising.
    follow: having the set follow the text after a verification.
    copies: of S's passes, (rows, cost), rising, in such passes over one token; none where S reads no copies.
    """

    sparse: float
    full: tuple[tuple[int, float], ...]
    follow: float = 0.0
    copies: tuple[tuple[int, float], ...] = ()

    def over(self, rows: int) -> float:
        """A pass of F over so many tokens."""
        return _between(self.full, rows)

    def full_with(self) -> list[float]:
        """Passes of F over one token and 0, 1, 2, ... copies."""
        return [self.over(1 + copies) for copies in range(1 + MOST)]

    def sparse_with(self) -> list[float]:
        """Passes of S over one token and 0, 1, 2, ... copies, in such passes over one token."""
        return [_between(self.copies, 1 + copies) for copies in range(1 + MOST)]

    def period(self, depth: int, width: int = 1) -> float:
        """A period with a draft of this depth; without one, F alone."""
        return depth * self.sparse + self.over(1 + depth * width) + (self.follow if depth else 0.0)

    def best_rate(self, accepted: float, width: int = 1, longest: int = MAX_AUTO_PERIOD) -> float:
        """Tokens per cost with the best fixed period, at least Full's one. accepted: how likely F is to accept a token."""
        best, advance, reach = 1.0, 1.0, 1.0
        for depth in range(1, longest):
            reach *= accepted
            advance += reach
            best = max(best, advance / self.period(depth, width))
        return best


def _between(measured: Sequence[tuple[int, float]], rows: int) -> float:
    """A pass over so many tokens, in passes over one: between two that were measured, and beyond the last, by a straight line;
    one where none was measured."""
    if not measured:
        return 1.0
    points = ((1, 1.0), *measured)
    index = next((i for i, (most, _) in enumerate(points[1:], start=1) if rows <= most), len(points) - 1)
    (low, cost), (high, next_cost) = points[index - 1], points[index]
    return cost + (next_cost - cost) * (rows - low) / (high - low)


def _prior(rule: str, density: float) -> list[float]:
    """Shares of accepted tokens by class: between two densities that were recorded by a straight line, and beyond as at the
    nearest."""
    recorded = PRIOR_ACCEPTED[rule]
    low = max((each for each in recorded if each <= density), default=min(recorded))
    high = min((each for each in recorded if each >= density), default=max(recorded))
    way = (density - low) / (high - low) if high > low else 0.0
    return [a + way * (b - a) for a, b in zip(recorded[low], recorded[high])]


class Acceptance:
    """How likely F is to accept a token of S, by S's confidence in it; learnt from the tokens that F has judged.

    rule: `SiriusConfig.accept`.
    density: the share of the neurons that S reads.
    """

    def __init__(self, rule: str, density: float = 0.5) -> None:
        self._judged = [_PRIOR_TOKENS] * len(PRIOR_SHARE)
        self._accepted = [_PRIOR_TOKENS * share for share in _prior(rule, density)]
        self._seen = [_PRIOR_SHARES * share for share in PRIOR_SHARE]

    def of(self, confidence: float) -> float:
        """For a token of this confidence."""
        index = bisect.bisect_right(EDGES, confidence)
        return self._accepted[index] / self._judged[index]

    @property
    def of_classes(self) -> list[float]:
        """For the classes between EDGES."""
        return [accepted / judged for accepted, judged in zip(self._accepted, self._judged)]

    @property
    def mean(self) -> float:
        """For a token that S has not proposed yet."""
        return sum(seen * rate for seen, rate in zip(self._seen, self.of_classes)) / sum(self._seen)

    def observe(self, confidence: float, accepted: bool) -> None:
        """F has judged a token of this confidence."""
        index = bisect.bisect_right(EDGES, confidence)
        self._judged[index] = _FORGET * self._judged[index] + 1
        self._accepted[index] = _FORGET * self._accepted[index] + accepted
        self._seen = [_FORGET * seen for seen in self._seen]
        self._seen[index] += 1


@dataclasses.dataclass(frozen=True)
class Stops:
    """All by which the draft of one period ends, for a device that asks nobody while it drafts. After k tokens S drafts one more
    if reach * mean >= worth[k], where reach is the product of the acceptances of these tokens, in order, all in float64.

    mean, accepted: `Acceptance.mean` and `Acceptance.of_classes`.
    worth: of every token that may be drafted at all, whatever S's confidence turns out to be.
    """

    mean: float
    accepted: list[float]
    worth: list[float]

    @property
    def longest(self) -> int:
        """Tokens that the draft has at most."""
        return len(self.worth)

    @staticmethod
    def size(depths: int) -> int:
        """Of `numbers`."""
        return 1 + len(EDGES) + len(PRIOR_SHARE) + depths

    def numbers(self, depths: int) -> list[float]:
        """As a device has them (`StopParams` in csrc/cuda/ops.h), with room for a draft of so many tokens."""
        return [self.mean, *EDGES, *self.accepted, *self.worth, *[math.inf] * (depths - len(self.worth))]


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a text has cost.

    tokens, spent: all of them.
    recent_tokens, recent_cost: of late; to begin with, as if that many tokens had come at some rate.
    """

    recent_tokens: float
    recent_cost: float
    tokens: int = 0
    spent: float = 0.0

    def after(self, committed: int, cost: float) -> Ledger:
        """With one more period."""
        recent_tokens, recent_cost = _FORGET_RATE * self.recent_tokens, _FORGET_RATE * self.recent_cost
        return Ledger(recent_tokens + committed, recent_cost + cost, self.tokens + committed, self.spent + cost)

    @property
    def rate(self) -> float:
        """Tokens per cost, of late."""
        return self.recent_tokens / self.recent_cost


class Copying:
    """A model that decodes a text alone, greedily, and copies from it: which tokens for its next pass, and at which rate the text
    comes. Of a text that others decode, too, this is what it would do and have done if it chose the same tokens.

    lookup: holds the text, and goes on with it.
    costs: of passes with 0, 1, 2, ... copies, the first of which is 1.
    most: tokens that are copied for a pass.

    copies: in the pass that gives the next token.
    ledger: of the passes before.
    """

    def __init__(self, lookup: Lookup, costs: Sequence[float], most: int = MOST) -> None:
        self._lookup, self._costs, self._most = lookup, costs, most
        self._chances = Chances()
        self._match, self.copies = Match(), list[int]()
        self._chosen: list[int] | None = None  # in this pass; none before the first
        self.ledger = Ledger(recent_tokens=_PRIOR_RATE, recent_cost=_PRIOR_RATE)

    def commit(self, tokens: Iterable[int]) -> None:
        """The text goes on with these; the draft is dropped."""
        for token in tokens:
            self._lookup.commit([token])
            self._said(token)

    def _said(self, token: int) -> None:
        if self._chosen is not None:
            self._chosen.append(token)
            if self._chosen == self.copies[: len(self._chosen)]:
                return  # the pass has given the next token, too
            self._chances.learn(self._match, self._chosen)
            self.ledger = self.ledger.after(len(self._chosen), self._costs[len(self.copies)])
        self._match, self._chosen = self._lookup.match(), []
        rate = max(1.0, self.ledger.rate)
        self.copies = self._chances.copies(self._match, self._most, [rate * cost for cost in self._costs])


class AdaptivePeriod:
    """Says before each pass of S whether there shall be one more, for one text.

    One more token is worth what it is likely to add to the accepted run: the product of the acceptances of those before it, times
    the mean acceptance of a token. It must be worth at least its passes' cost, at the rate of tokens per cost that the text has
    otherwise, and at least at F's: one, or what F would have with copies. That is the best rule that looks one token ahead. A
    text begins with the rate that the best fixed period would have if every token were as likely to be accepted as the mean one.

    Copies that S confirms cost no pass, only rows; so a draft goes on through them where it would end before a pass of its own.

    Whatever is expected, a period begins no draft that could make the text dearer than F alone by more than MOST_LOSS. A draft of
    more than one token risks no more than three quarters of that: a single bad period at the beginning would otherwise end
    drafting for the whole text.

    costs: of this model's passes, in passes of F over one token.
    rule: `SiriusConfig.accept`.
    width: of the draft's tree.
    longest: period.
    density: the share of the neurons that S reads.
    copying: F alone with copies, where tokens are copied: the rate at which it would decode this text.
    """

    def __init__(
        self,
        costs: Costs,
        rule: str,
        width: int = 1,
        longest: int = MAX_AUTO_PERIOD,
        density: float = 0.5,
        copying: Copying | None = None,
    ) -> None:
        self.acceptance = Acceptance(rule, density)
        self._costs, self.longest, self._copying = costs, longest, copying
        self._full_with, self._sparse_with = costs.full_with(), costs.sparse_with()
        self._cost = [costs.period(depth, width) for depth in range(max(longest, 1))]  # of a period with a draft of each depth
        rate = costs.best_rate(self.acceptance.mean, width, longest)
        self.ledger = Ledger(recent_tokens=_PRIOR_RATE, recent_cost=_PRIOR_RATE / rate)
        self._confidences: list[float] = []
        self._reach = 1.0
        self._spared = 0.0  # by copies, in this period's passes of S

    def goes_on(self, room: int, ahead: int = 0, paid: bool = False) -> bool:
        """Whether S drafts one more token in this period.

        room: tokens that the text may still take.
        ahead: so many more are drafted before in the same pass, of which F accepts all.
        paid: the pass that would draft it has been made.
        """
        spared = self._spared + (ahead + paid) * self._costs.sparse - self._dearer(ahead)
        worth = self._worth(len(self._confidences) + ahead + 1, room, spared, paid or ahead > 0)
        return self._reach * self.acceptance.mean >= worth

    def stops(self, room: int) -> Stops:
        """What `goes_on` says in a period that has not begun, whatever S proposes in it. room: as there."""
        mean, accepted = self.acceptance.mean, self.acceptance.of_classes
        worth, reach = [], 1.0
        for depth in itertools.count(1):
            worth.append(self._worth(depth, room))
            if not reach * mean >= worth[-1]:
                break
            reach *= max(accepted)  # no token is likelier to be accepted
        return Stops(mean, accepted, worth[:-1])

    def _worth(self, depth: int, room: int, spared: float = 0.0, paid: bool = False) -> float:
        """Tokens that the last one of a draft of this depth must be expected to bring; inf where there may be no such draft."""
        if depth + 1 > min(self.longest, room):
            return math.inf
        # Lost if nothing of the draft is accepted.
        if self._cost[depth] - spared - 1 > self._left * (1.0 if depth == 1 else MOST_RISK):
            return math.inf
        rate = max(1.0, self.ledger.rate, self._copying.ledger.rate if self._copying else 1.0)
        return rate * (self._cost[depth] - self._cost[depth - 1] - paid * self._costs.sparse)

    @property
    def _left(self) -> float:
        """How much dearer than one of F's passes the next period may be."""
        return self.ledger.tokens + MOST_LOSS * max(LEAST_TOKENS, self.ledger.tokens + 1) - self.ledger.spent

    @property
    def full_worth(self) -> list[float]:
        """Passes of F with 0, 1, 2, ... copies, as many as the text may pay for, in the tokens that they must bring at the rate
        of the text."""
        rate, left = max(1.0, self.ledger.rate), self._left
        return [rate * cost for cost in self._full_with if cost == 1 or cost - 1 <= left]

    def _dearer(self, copies: int) -> float:
        """What a pass of S with copies costs more than one without."""
        return self._costs.sparse * (self._sparse_with[copies] - 1)

    def reads(self, copies: int) -> None:
        """S makes a pass with so many copies in it."""
        self._spared -= self._dearer(copies)

    def drafted(self, confidence: float, paid: bool = False) -> None:
        """S has proposed a token, with this likelihood. paid: in the same pass as the one before."""
        self._confidences.append(confidence)
        self._reach *= self.acceptance.of(confidence)
        if paid:
            self._spared += self._costs.sparse

    def judged(self, accepted: int, committed: int, copies: int = 0) -> None:
        """The period has ended: F accepted so many of its tokens one after the other, and so many joined the text. copies: in
        F's pass, where S has drafted nothing."""
        cost = self._full_with[copies] if copies else self._cost[len(self._confidences)] - self._spared
        self.ledger = self.ledger.after(committed, cost)
        # What comes after a rejected token was never judged.
        for index, confidence in enumerate(self._confidences[: accepted + 1]):
            self.acceptance.observe(confidence, index < accepted)
        self._confidences, self._reach, self._spared = [], 1.0, 0.0
