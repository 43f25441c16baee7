"""The generation loop: prefill, then draft, verify, accept, interleave until the text ends (SPEC sections 3 and 4)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

import torch

from ..config import SiriusConfig
from ..runtime.graphs import profiled
from ..runtime.model import Model, model_of, not_finite
from .period import FIRST_ALPHA, AdaptivePeriod
from .period_graph import PeriodGraph
from .sampling import Logits, rule_of
from .sparsity import CSparse, FSparse, sparse_density, sparsity_of
from .stats import Period, PromptStats
from .tree import Tree

# (token ids so far int64 [t], logits behind them float32 [V]) -> logits to decide by, float32 [V]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Text(Protocol):
    """Where committed tokens go, and who knows when the text ends."""

    limit: int  # tokens at most

    def commit(self, tokens: list[int]) -> int:
        """Take newly committed tokens; return how many belong to the text. Fewer, or `ended`, means that it has ended."""

    ended: bool


@dataclasses.dataclass
class Options:
    """What is asked beyond the config.

    process: changes logits before they are used.
    sample: draw tokens from the softmax of the processed logits, instead of taking the likeliest.
    generator: draws them; torch's default one without it.
    thresholds: FSparse's, float32 [layers].
    """

    process: Processor | None = None
    sample: bool = False
    generator: torch.Generator | None = None
    thresholds: torch.Tensor | None = None


def generate(model: Model, prompt: torch.Tensor, config: SiriusConfig, text: Text, options: Options | None = None) -> PromptStats:
    """Decode one prompt, int64 [t], into `text`. The caller has checked that prompt and limit fit the context.

    ValueError if logits of F or S are not finite. What was committed before stays; the model can go on with another prompt.
    """
    if not model.lock.acquire(blocking=False):
        # A text inside a text (a streamer that decodes, another thread) gets a cache of its own.
        return generate(model_of(model.weights), prompt, config, text, options)
    try:
        return _Decoding(model, prompt, config, text, options or Options()).run()
    finally:
        model.lock.release()


class _Decoding:
    def __init__(self, model: Model, prompt: torch.Tensor, config: SiriusConfig, text: Text, options: Options) -> None:
        self.model, self.prompt, self.config, self.text, self.process = model, prompt, config, text, options.process
        self.rule = rule_of(config, options.sample, options.generator)
        self.sparsity, density = None, 1.0
        if config.mode != "full":
            self.sparsity = sparsity_of(config, model.weights, options.thresholds)
            density = sparse_density(config, model.weights)
        corrects = config.mode == "sirius"
        self.stats = PromptStats(
            mode=config.mode,
            period=config.period if corrects else 1,
            tree_width=config.tree_width if corrects else 1,
            density=density,
            prompt_tokens=len(prompt),
        )
        self.tree = Tree(config.longest_period - 1, config.tree_width) if corrects else Tree(0, 1)
        # Slots for the whole text, and for drafts beyond its end that are never committed.
        model.reserve(len(prompt) + text.limit + self.tree.capacity, self.tree.capacity)
        self.length = len(prompt)  # tokens in the cache; the last committed one, x0, is not among them yet
        self.adaptive = None
        if corrects and config.period == "auto":
            kind = (config.sparsity, config.follow, config.density, config.thresholds, config.tree_width)
            assumed = model.alphas.get((kind, config.accept), FIRST_ALPHA)
            self.adaptive = AdaptivePeriod(model.costs, kind, config.tree_width, config.longest_period, assumed)
        # The text so far, for who wants to see it: logits processors.
        self.ids = torch.empty(len(prompt) + text.limit, dtype=torch.int64) if self.process else None

    def run(self) -> PromptStats:
        stats, text = self.stats, self.text
        started = time.perf_counter()
        with profiled(self.model.weights.device, "prefill"):
            logits = self.model.prefill(self.prompt, self.sparsity)
        if not bool(logits.isfinite().all()):
            raise not_finite(self.length, 0, "the prefill (full model)", self.model.fault(self.prompt, 0))
        if self.process:
            self.ids[: self.length] = self.prompt
            logits = self.process(self.prompt, logits)
        stats.prefill_seconds = time.perf_counter() - started

        started = time.perf_counter()
        self._commit([self.rule.choose(logits)])
        if self.process is None and self.adaptive is None and self.rule.takes_argmax and not text.ended:
            period = self.model.replay(self.config, self.tree, self.sparsity)
            if period is not None:
                self._replayed(period)
        while not text.ended:
            if self.config.mode == "sirius":
                self._period(self.adaptive.next() if self.adaptive else self.config.period)
            else:
                self._plain_step()
        stats.decode_seconds = time.perf_counter() - started
        return stats

    def _commit(self, tokens: list[int]) -> int:
        """Hand tokens to the text; the last one is the root of what comes next. Returns how many belong to the text."""
        if self.process:
            self.ids[self.length + 1 - len(tokens) : self.length + 1] = torch.tensor(tokens)
        self.tree.plant(tokens[-1], self.length)
        committed = self.text.commit(tokens)
        self.stats.tokens += committed
        return committed

    def _replayed(self, period: PeriodGraph) -> None:
        """The whole text by a period that needs the host only for its record."""
        stats, text, started = self.stats, self.text, time.perf_counter()
        period.begin(int(self.tree.tokens[0]), self.length, text.limit - stats.tokens)
        for record in period.periods():
            seen = time.perf_counter()
            if record.fault:
                return  # the host goes over this period again, pass by pass, and says where the fault is
            entry, tokens = period.read(record)
            self.length += len(tokens)
            entry.committed = self._commit(tokens)
            entry.cut |= entry.committed < len(tokens)
            entry.seconds, started = seen - started, seen
            if self.config.mode == "sirius":
                stats.periods.append(entry)
            if text.ended:
                return

    def _plain_step(self) -> None:
        """One token by F alone, or by S alone."""
        choice = torch.empty(1, dtype=torch.int32) if self.rule.takes_argmax else None
        logits = self._pass(slice(0, 1), self.sparsity, choice)
        self.length += 1
        self._commit([self.rule.choose(logits[0]) if choice is None else int(choice)])

    def _period(self, period: int) -> None:
        """SPEC section 3, steps 2 to 5, and section 4."""
        tree, device, started = self.tree, self.model.weights.device, time.perf_counter()
        # The last period may be shorter: it need not commit more than the text may still take.
        depth = min(period, self.text.limit - self.stats.tokens) - 1
        with profiled(device, "draft"):
            self._draft(depth)
        drafted = time.perf_counter()
        follows = self.sparsity.follows
        with profiled(device, "verify"):
            logits = self._pass(slice(0, tree.size), keep_z=follows)
        with profiled(device, "accept"):
            path, own, likelihoods = self.rule.accept(tree, logits)
        if self.adaptive:
            self.adaptive.saw_full(tree.size, time.perf_counter() - drafted)
            self.adaptive.observe(tree.depth, len(path))
            self.model.alphas[self.adaptive.kind, self.config.accept] = self.adaptive.alpha
        # F overwrote the cache entries of S. A chain's accepted ones stand in their places; a tree's are moved there. Dropping
        # the others is a matter of the length.
        with profiled(device, "interleave"):
            self.model.keep(self.length, path)
            if follows:
                self.model.follow(self.sparsity, tree.size, path)
        tokens = tree.tokens[path].tolist() + [own]
        record = Period(tree.depth, tree.size - 1, len(path), tree.branch(path), len(tokens), depth < period - 1, likelihoods)
        record.seconds = time.perf_counter() - started
        self.length += len(tokens)
        record.committed = self._commit(tokens)
        record.cut |= record.committed < len(tokens)
        self.stats.periods.append(record)

    def _draft(self, depth: int) -> None:
        """Step 2: S consumes x0, then what it proposes, `depth` times, the leaves of a depth in one pass."""
        tree = self.tree
        while tree.depth < depth:
            before, started = tree.size, time.perf_counter()
            if tree.width == 1 and self.rule.takes_argmax:
                self._pass(tree.leaves, self.sparsity, tree.tokens[before : before + 1])
                tree.grow_chain()
            else:
                self.rule.expand(tree, self._pass(tree.leaves, self.sparsity))
                if tree.size == before:
                    break
            if self.adaptive:
                self.adaptive.saw_sparse(time.perf_counter() - started)

    def _pass(
        self,
        nodes: slice,
        sparsity: CSparse | FSparse | None = None,
        argmax: torch.Tensor | None = None,
        keep_z: bool = False,
    ) -> Logits:
        """Run nodes of the tree through F, or S. A single node's likeliest token goes to `argmax`, if given; after `keep_z` S's
        set can follow what F made of them."""
        tree = self.tree
        logits, best = self.model.step(
            tree.tokens[nodes],
            tree.positions(nodes),
            tree.mask[nodes],
            prefix=self.length,
            first_slot=self.length + nodes.start,
            sparsity=sparsity,
            argmax=argmax,
            keep_z=keep_z,
        )
        best = best.tolist()
        if -1 in best:
            raise self._not_finite([nodes.start + row for row, token in enumerate(best) if token < 0], sparsity)
        if not self.process:
            return Logits(logits)
        logits = Logits(logits, lambda row, each: self.process(self._text_to(nodes.start + row), each))
        if argmax is not None:
            argmax[0] = logits[0].argmax()
        return logits

    def _not_finite(self, nodes: list[int], sparsity: CSparse | FSparse | None) -> ValueError:
        """The error for the logits of some nodes, which F gave, or with a sparsity S: of the first whose fault can be found."""
        branches = [self.tree.tokens[[0, *self.tree.path(node)]].long() for node in nodes]
        found = ((branch, self.model.fault(branch, self.length, sparsity)) for branch in branches)
        branch, where = next((each for each in found if each[1] is not None), (branches[0], None))
        corrects = self.config.mode == "sirius"
        if sparsity is None:
            reader = "a verification (full model)" if corrects else "a step of the full model"
        else:
            reader = "a draft (sparse model)" if corrects else "a step of the sparse model"
        return not_finite(len(self.prompt), self.length + len(branch) - len(self.prompt), reader, where)

    def _text_to(self, node: int) -> torch.Tensor:
        """Prompt, committed tokens and the branch that ends with `node`, int64."""
        return torch.cat((self.ids[: self.length + 1], self.tree.tokens[self.tree.path(node)].long()))
