"""Recorded texts (bench/traces.py) decoded again on paper: how many passes of S and F they would take, at given costs."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import pytest

from sirius_ext.decoding.lookup import MOST, Lookup
from sirius_ext.decoding.period import AdaptivePeriod, Copying, Costs

FOLDER = pathlib.Path(__file__).parent.parent / "bench" / "results"


@dataclasses.dataclass
class Text:
    """confidences, accepted: of what S proposes at each place of F's text, and whether F takes it there.
    proposed: these tokens.
    tokens: F's own, and the one before the first of these places.
    prompt: tokens; none where they are not known, as in older records.
    """

    confidences: list[float]
    accepted: list[bool]
    proposed: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    prompt: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.confidences)


@functools.cache
def texts(model: str, density: float, rule: str) -> list[Text]:
    record = json.loads((FOLDER / f"traces-{model}.json").read_text())
    index = record["densities"].index(density)
    found = []
    for text in record["texts"]:
        draft = text["drafts"][index]
        said = [draft["proposed"], text["text"], text["prompt"]] if "text" in text else []
        found.append(Text([c / 1000 for c in draft["confidence"]], [kept == "1" for kept in draft[rule]], *said))
    return found


def run_of(flags: list[bool]) -> int:
    """How many are true, up to the first that is not."""
    return flags.index(False) if False in flags else len(flags)


def full_with_copies(text: Text, costs: Costs) -> float:
    """What F alone spends, in passes over one token."""
    copying = Copying(Lookup(text.prompt), costs.full_with())
    place, spent = -1, 0.0
    committed = text.tokens[:1]
    while True:
        copying.commit(committed)
        place += len(committed)
        if place == len(text):
            return spent
        copies = copying.copies[: len(text) - place - 1]
        right = run_of([copy == token for copy, token in zip(copies, text.tokens[place + 1 :])])
        committed = text.tokens[place + 1 : place + 2 + right]
        spent += costs.full_with()[len(copies)]


def replay(
    policy: Callable[[Copying | None], AdaptivePeriod] | int,
    text: Text,
    costs: Costs,
    copies: bool = False,
) -> float:
    """What the text costs, in passes of F over one token.

    policy: makes what decides; a number is a fixed period.
    copies: from the text, as `Sequence` copies.
    """
    lookup = Lookup(text.prompt) if copies else None
    copying = Copying(lookup, costs.full_with()) if lookup else None
    fixed = policy if isinstance(policy, int) else None
    adaptive = None if isinstance(policy, int) else policy(copying)
    with_copies = costs.sparse_with()

    if copying:
        copying.commit(text.tokens[:1])
    place, spent = 0, 0.0
    while place < len(text):
        room, depth, copied = len(text) - place, 0, list[int]()
        while adaptive.goes_on(room) if adaptive else depth < min(fixed, room) - 1:
            copied = []
            if lookup and adaptive:
                copied = lookup.find(MOST, with_copies)
                copied = copied[: run_of([adaptive.goes_on(room, ahead) for ahead in range(1, 1 + len(copied))])]
                adaptive.reads(len(copied))
            elif lookup:
                copied = lookup.find(min(fixed, room) - depth - 2, with_copies)
            spent += costs.sparse * with_copies[len(copied)]
            tokens = []
            for row, copy in enumerate((*copied, None)):
                if adaptive:
                    adaptive.drafted(text.confidences[place + depth], paid=row > 0)
                if lookup:
                    tokens.append(text.proposed[place + depth])
                depth += 1
                if (adaptive and not adaptive.goes_on(room, paid=row < len(copied))) or not copied or tokens[-1] != copy:
                    break
            if lookup:
                lookup.learn(tokens)
                lookup.draft(tokens)
        if depth or not lookup or not adaptive:
            run = run_of(text.accepted[place : place + depth])
            spent += costs.period(depth) - depth * costs.sparse
            if adaptive:
                adaptive.judged(run, run + 1)
        else:
            copied = lookup.find(min(room - 1, MOST), adaptive.full_worth)
            run = run_of([copy == token for copy, token in zip(copied, text.tokens[place + 1 :])])
            spent += costs.full_with()[len(copied)]
            lookup.learn(text.tokens[place + 1 : place + 2 + run])
            adaptive.judged(0, run + 1, len(copied))
        if copying:
            copying.commit(text.tokens[place + 1 : place + 2 + run])
        place += run + 1
    assert adaptive is None or adaptive.ledger.spent == pytest.approx(spent)
    return spent
