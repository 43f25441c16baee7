"""How tokens are chosen: greedily, or drawn so that the text is distributed as the full model's own samples (SPEC section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ..config import SiriusConfig
from ..kernels import ops
from .tree import Tree

PRUNE = 0.95  # the authors' figure


class Logits:
    """The logits of a pass: `raw`, float32 [rows, V], as the model gave them; by index as the logits processors make them."""

    def __init__(self, raw: torch.Tensor, process: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> None:
        self.raw, self._process = raw, process

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.raw[row] if self._process is None else self._process(row, self.raw[row])

    def all(self) -> torch.Tensor:
        return self.raw if self._process is None else torch.stack([self[row] for row in range(len(self.raw))])


class Rule(Protocol):
    """How tokens are proposed and accepted."""

    takes_argmax: bool  # the model's own argmax is the choice, and the one proposal of a chain: nothing else need be computed

    def choose(self, logits: torch.Tensor) -> int:
        """One token by the logits, float32 [V], of the model that decides."""

    def expand(self, tree: Tree, logits: Logits) -> None:
        """One more depth of the tree, by its leaves' logits of S. Adds no node if there is none to add."""

    def accept(self, tree: Tree, logits: Logits) -> tuple[list[int], int, list[float]]:
        """Judge a tree by its logits of F: the accepted nodes, F's own token after them, and the likelihood of every draft."""


class Greedy:
    """The likeliest tokens; a draft stays where F finds it likely enough (`threshold`) or would have chosen it (`match`)."""

    takes_argmax = True

    def __init__(self, config: SiriusConfig) -> None:
        self._config, self._prune = config, PRUNE if config.prune else 1.0

    def choose(self, logits: torch.Tensor) -> int:
        return int(logits.argmax())

    def expand(self, tree: Tree, logits: Logits) -> None:
        config, rows = self._config, logits.all()
        scores = tree.scores[tree.leaves].to(rows.device)
        grown = ops.tree_expand(rows, scores, config.tree_width, config.score_temperature, self._prune)
        tree.grow(*(each.cpu() for each in grown))

    def accept(self, tree: Tree, logits: Logits) -> tuple[list[int], int, list[float]]:
        config, rows = self._config, logits.all()
        tokens, parents, scores = tree.on(rows.device)
        likelihoods, argmax, accepted = ops.accept(
            rows, tokens[1:], config.threshold, config.score_temperature, config.accept == "match", parents, scores
        )
        path: list[int] = accepted.tolist()
        return path, int(argmax[path[-1] if path else 0]), likelihoods.tolist()


class Sampling:
    """Speculative sampling; with several children by the multi-branch residual rule (SpecInfer, arXiv 2305.09781), for draws
    without replacement. Exact whatever S proposes: a node's children are drawn from S's distribution, and how many is
    settled before: by the order in which the leaves were drawn alone, not by their tokens (`apportion`), and by how many tokens S
    deems possible at all.

    generator: torch's default one without it. The text depends on its seed, on the config and on nothing else.
    """

    takes_argmax = False

    def __init__(self, config: SiriusConfig, generator: torch.Generator | None) -> None:
        self._config, self._generator = config, generator
        self._proposals: dict[int, torch.Tensor] = {}  # of each node with children, what they were drawn from

    def choose(self, logits: torch.Tensor) -> int:
        return self._draw(_probabilities(logits))

    def expand(self, tree: Tree, logits: Logits) -> None:
        if tree.depth == 0:
            self._proposals.clear()
        leaves, tokens, parents, scores = tree.leaves, [], [], []
        reach = tree.scores[leaves].tolist()
        for row, count in enumerate(apportion(reach, self._config.tree_width)):
            if count == 0:
                continue
            proposal = _probabilities(logits[row])
            self._proposals[leaves.start + row] = proposal
            left = proposal.clone()
            for index in range(min(count, int(torch.count_nonzero(proposal)))):
                tokens.append(self._draw(left))
                left[tokens[-1]] = 0
                parents.append(row)
                scores.append(reach[row] + child_score(index))
        chosen, leaf = (torch.tensor(each, dtype=torch.int32, device="cpu") for each in (tokens, parents))
        tree.grow(chosen, leaf, torch.tensor(scores, dtype=torch.float32, device="cpu"))

    def accept(self, tree: Tree, logits: Logits) -> tuple[list[int], int, list[float]]:
        tokens, parents = tree.tokens[: tree.size].tolist(), tree.parents[: tree.size].tolist()
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents[1:], start=1):
            children.setdefault(parent, []).append(node)
        likelihoods = self._likelihoods(tree, logits.raw)
        path: list[int] = []
        while True:
            node = path[-1] if path else 0
            target = _probabilities(logits[node])
            for child in children.get(node, ()):
                # The distribution that this child was drawn from: its elder siblings could not be drawn again.
                proposal = self._proposals[node] / self._proposals[node].sum()
                token = tokens[child]
                if self._uniform() * proposal[token] < target[token]:
                    path.append(child)
                    break
                target = residual(target, proposal)
                self._proposals[node][token] = 0
            else:
                return path, self._draw(target), likelihoods

    def _likelihoods(self, tree: Tree, logits: torch.Tensor) -> list[float]:
        config, (tokens, parents, _) = self._config, tree.on(logits.device)
        likelihoods, *_ = ops.accept(logits, tokens[1:], config.threshold, config.score_temperature, parents=parents)
        return [float(each) for each in likelihoods.tolist()]

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator, device="cpu"))

    def _draw(self, weights: torch.Tensor) -> int:
        """A token in proportion to weights, float64 [V]: the inverse of the distribution function at one uniform number."""
        cumulative = weights.cumsum(0)
        place = int(torch.searchsorted(cumulative, self._uniform() * cumulative[-1], right=True))
        return min(place, int(weights.nonzero()[-1]))


def residual(target: torch.Tensor, proposal: torch.Tensor) -> torch.Tensor:
    """What is left to draw from when a token of `proposal` was rejected: max(target - proposal, 0), normalised. float64 [V]."""
    rest = (target - proposal).clamp_(min=0)
    total = rest.sum()
    return rest / total if total > 0 else target  # equal but for rounding: nothing is ever rejected then


def apportion(scores: list[float], places: int) -> list[int]:
    """How many children each leaf of a depth gets: one by one they go where acceptance is likeliest to arrive, the first among
    equals.

    scores: the leaves' log-likelihoods of being reached. A node's first child is taken to be accepted with probability 0.9; each
    further one is half as likely as what is left, so the first chain always goes on and the others are its alternatives. What was
    drawn does not matter, only in which order: in a draw of S the unlikely token is as good as the likely one.
    """
    counts = [0] * len(scores)
    for _ in range(places):
        values = [score + child_score(count) for score, count in zip(scores, counts)]
        counts[values.index(max(values))] += 1
    return counts


def child_score(index: int) -> int:
    """The log-likelihood that acceptance goes from a node to its child of that index: log 0.9, or log(0.1 * 0.5^index). In
    thousandths, rounded: sums of integers have no rounding errors, and equals stay equal."""
    return -105 if index == 0 else -2303 - 693 * index


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits.cpu().double(), -1)


def rule_of(config: SiriusConfig, sample: bool, generator: torch.Generator | None) -> Rule:
    return Sampling(config, generator) if sample else Greedy(config)
