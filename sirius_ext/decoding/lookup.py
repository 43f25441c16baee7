"""Copies (SPEC section 2): tokens that may come next, taken from where the text said the last ones before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST = 8  # tokens that are copied for one pass
LONGEST = 4  # of the runs of last tokens that are looked for
# What a row more costs, in passes, where it was not measured: a pass over sixteen tokens costs four times one over a single token
# at most (README, "Limits").
COST = 0.2
# How often a copied token is right after 1, 2, 3, and 4 or more tokens that are the same, before anything is known of a text.
# Rounded from this repository's own pages, 0.17, 0.28, 0.43, 0.58, and modules, 0.22, 0.36, 0.47, 0.61, in Qwen2.5's tokens.
PRIOR_RIGHT = (0.2, 0.33, 0.45, 0.6)
_PRIOR_TOKENS = 10.0  # what that counts for
_FORGET = 0.98  # what a token counts for after the next one of its class


class Lookup:
    """A text and the draft after it, in which the last tokens are looked for: up to four, the latest place of the longest run.

    A match costs nothing, but every copied token is one row more in a pass. So it is counted how often copies were right after
    how many equal tokens, and only tokens that are likely enough are copied: few after one equal token, unless this text repeats
    itself there too, and many after four.

    For every run of tokens it is known where the token stands that followed it last. A draft has an index of its own, which is
    asked first, since its places come after all others, and is forgotten as a whole.

    cost: of a row more in a pass, in passes. A token is copied if it will be used with at least that probability, since it spares
        a pass if it is right.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._length = 0  # of the text, without the draft
        self._followed: dict[tuple[int, ...], int] = {}
        self._followed_in_draft: dict[tuple[int, ...], int] = {}
        self._judged, self._right = [_PRIOR_TOKENS] * LONGEST, [_PRIOR_TOKENS * share for share in PRIOR_RIGHT]
        self._matched = 0  # how many tokens were found again, by the last `find`
        self._place = 0  # of the first token after them
        self.cost = COST
        self.commit(prompt)

    def commit(self, tokens: Iterable[int]) -> None:
        """The text goes on with these; the draft is dropped."""
        del self._tokens[self._length :]
        self._followed_in_draft.clear()
        self._add(tokens, self._followed)
        self._length = len(self._tokens)

    def draft(self, tokens: Iterable[int]) -> None:
        """The draft goes on with these."""
        self._add(tokens, self._followed_in_draft)

    def _add(self, tokens: Iterable[int], followed: dict[tuple[int, ...], int]) -> None:
        known = self._tokens
        for token in tokens:
            place = len(known)
            for start in range(max(0, place - LONGEST), place):
                followed[tuple(known[start:])] = place
            known.append(token)

    def find(self, most: int, cost: float | None = None) -> list[int]:
        """What may come next: `most` tokens at most, none if the last token is new or what followed it is not likely enough.
        Where it reaches the end of the draft it goes on with its own beginning, as a text that repeats itself does.

        cost: in place of the lookup's own.
        """
        tokens, self._matched, cost = self._tokens, 0, self.cost if cost is None else cost
        for length in range(min(LONGEST, len(tokens)), 0, -1):
            run = tuple(tokens[-length:])
            place = self._followed_in_draft.get(run, self._followed.get(run))
            if place is not None:
                self._matched, self._place = length, place
                break
        copies: list[int] = []
        chance = 1.0
        while self._matched and len(copies) < min(MOST, most):
            group = self._class(len(copies))
            chance *= self._right[group] / self._judged[group]
            if chance < cost:
                break
            copies.append(self._token(len(copies)))
        return copies

    def learn(self, chosen: Sequence[int]) -> None:
        """What the model chose where the last `find` looked, up to the first token that is not what stands there; before anything
        is added. The first one teaches something even if it was not copied."""
        for index, token in enumerate(chosen if self._matched else ()):
            group, right = self._class(index), self._token(index) == token
            self._judged[group] = _FORGET * self._judged[group] + 1
            self._right[group] = _FORGET * self._right[group] + right
            if not right:
                break

    def _class(self, index: int) -> int:
        """Of a copied token: by how many tokens before it are the same, if those that were copied before it are right."""
        return min(LONGEST, self._matched + index) - 1

    def _token(self, index: int) -> int:
        return self._tokens[self._place + index % (len(self._tokens) - self._place)]
