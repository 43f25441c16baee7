"""Copies (SPEC section 2): tokens that may come next, taken from where the text said the last ones before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

MOST = 8  # tokens that are copied for one pass
LONGEST = 4  # of the runs of last tokens that are looked for
# How often a copied token is right after 1, 2, 3, and 4 or more tokens that are the same, before anything is known of a text.
# Rounded from this repository's own pages, 0.17, 0.28, 0.43, 0.58, and modules, 0.22, 0.36, 0.47, 0.61, in Qwen2.5's tokens.
PRIOR_RIGHT = (0.2, 0.33, 0.45, 0.6)
_PRIOR_TOKENS = 10.0  # what that counts for
_FORGET = 0.98  # what a token counts for after the next one of its class


@dataclasses.dataclass(frozen=True)
class Match:
    """Where a text's last tokens stood before.

    equal: how many of them; 0 if the last one is new.
    followed: MOST tokens, those that came after them there. Where they reach the end of the draft they go on with their own
        beginning, as a text that repeats itself does.
    """

    equal: int = 0
    followed: Sequence[int] = ()


class Chances:
    """How often copies were right after how many equal tokens; learnt from what a model chose where a match had been found."""

    def __init__(self) -> None:
        self._judged, self._right = [_PRIOR_TOKENS] * LONGEST, [_PRIOR_TOKENS * share for share in PRIOR_RIGHT]

    def copies(self, match: Match, most: int, costs: Sequence[float]) -> list[int]:
        """The first tokens of a match, so many that the ones that will be used are worth most above their cost.

        most: tokens, at most.
        costs: of 0, 1, 2, ... copies in a pass, in what a copy that is used is worth; beyond the last there are none.
        """
        chance, worth, best, count = 1.0, 0.0, -costs[0], 0
        for index in range(min(len(match.followed), most, len(costs) - 1)):
            group = self._class(match, index)
            chance *= self._right[group] / self._judged[group]
            worth += chance
            if worth - costs[index + 1] > best:
                best, count = worth - costs[index + 1], index + 1
        return list(match.followed[:count])

    def learn(self, match: Match, chosen: Sequence[int]) -> None:
        """What the model chose after a match, up to the first token that is not what followed there. The first one teaches
        something even if it was not copied."""
        for index, (token, copy) in enumerate(zip(chosen, match.followed)):
            group = self._class(match, index)
            self._judged[group] = _FORGET * self._judged[group] + 1
            self._right[group] = _FORGET * self._right[group] + (token == copy)
            if token != copy:
                break

    def _class(self, match: Match, index: int) -> int:
        """Of a copied token: by how many tokens before it are the same, if those that were copied before it are right."""
        return min(LONGEST, match.equal + index) - 1


class Lookup:
    """A text and the draft after it, in which the last tokens are looked for: up to four, the latest place of the longest run.

    A match costs nothing, but every copied token is one row more in a pass. So it is counted how often copies were right after
    how many equal tokens, and only tokens that are likely enough are copied: few after one equal token, unless this text repeats
    itself there too, and many after four.

    For every run of tokens it is known where the token stands that followed it last. A draft has an index of its own, which is
    asked first, since its places come after all others, and is forgotten as a whole.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._length = 0  # of the text, without the draft
        self._followed: dict[tuple[int, ...], int] = {}
        self._followed_in_draft: dict[tuple[int, ...], int] = {}
        self._chances, self._found = Chances(), Match()  # by the last `find`
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

    def match(self) -> Match:
        """Where text and draft said their last tokens before."""
        tokens = self._tokens
        for length in range(min(LONGEST, len(tokens)), 0, -1):
            run = tuple(tokens[-length:])
            place = self._followed_in_draft.get(run, self._followed.get(run))
            if place is not None:
                return Match(length, [tokens[place + index % (len(tokens) - place)] for index in range(MOST)])
        return Match()

    def find(self, most: int, costs: Sequence[float]) -> list[int]:
        """What may come next: `most` tokens at most, none if the last token is new or what followed it is not likely enough.

        costs: as `Chances.copies` takes them.
        """
        self._found = self.match()
        return self._chances.copies(self._found, most, costs)

    def learn(self, chosen: Sequence[int]) -> None:
        """What the model chose where the last `find` looked; before anything is added."""
        self._chances.learn(self._found, chosen)
