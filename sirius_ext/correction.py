"""The generation loop: prefill, then draft, verify, accept, interleave until the text ends (SPEC section 3)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from . import ops
from .config import SiriusConfig
from .model import Model
from .sparsity import csparse_density
from .stats import Period, PromptStats

# (token ids so far int64 [t], logits behind them float32 [V]) -> logits to decide by, float32 [V]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Text(Protocol):
    """Where committed tokens go, and who knows when the text ends."""

    limit: int  # tokens at most

    def commit(self, tokens: list[int]) -> int:
        """Take newly committed tokens; return how many belong to the text. Fewer, or `ended`, means that it has ended."""

    ended: bool


def generate(
    model: Model, prompt: torch.Tensor, config: SiriusConfig, text: Text, process: Processor | None = None
) -> PromptStats:
    """Decode one prompt, int64 [t], into `text`. The caller has checked that prompt and limit fit the context."""
    if not model.lock.acquire(blocking=False):
        # A text inside a text (a streamer that decodes, another thread) gets a cache of its own.
        return generate(Model(model.weights), prompt, config, text, process)
    try:
        return _Decoding(model, prompt, config, text, process).run()
    finally:
        model.lock.release()


class _Decoding:
    def __init__(self, model: Model, prompt: torch.Tensor, config: SiriusConfig, text: Text, process: Processor | None) -> None:
        self.model, self.prompt, self.config, self.text, self.process = model, prompt, config, text, process
        weights = model.weights
        sparse = csparse_density(config.density, weights.num_mlp_parameters, weights.num_parameters)
        self.stats = PromptStats(
            mode=config.mode,
            period=config.period if config.mode == "sirius" else 1,
            density=1.0 if config.mode == "full" else sparse,
            prompt_tokens=len(prompt),
        )
        rows = self.stats.period
        # Slots for the whole text, and for drafts beyond its end that are never committed.
        model.reserve(len(prompt) + text.limit + rows, rows)
        # ids holds the prompt and the committed tokens, the last of which, x0, is not in the cache yet; then the drafts.
        self.ids = torch.empty(len(prompt) + text.limit + rows, dtype=torch.int32)
        self.ids[: len(prompt)] = prompt
        self.length = len(prompt)  # tokens in the cache
        self.positions = torch.arange(len(self.ids), dtype=torch.int32)
        self.chain_mask = ops.tree_mask(torch.arange(-1, rows - 1, dtype=torch.int32))

    def run(self) -> PromptStats:
        stats, text = self.stats, self.text
        started = time.perf_counter()
        logits = self.model.prefill(self.prompt, None if self.config.mode == "full" else self.config.density)
        if self.process:
            logits = self.process(self.prompt, logits)
        stats.prefill_seconds = time.perf_counter() - started

        started = time.perf_counter()
        self.ids[self.length] = logits.argmax()
        stats.tokens = text.commit([int(self.ids[self.length])])
        while not text.ended:
            if self.config.mode == "sirius":
                self._period()
            else:
                self._plain_step()
        stats.decode_seconds = time.perf_counter() - started
        return stats

    def _plain_step(self) -> None:
        """One token by F alone, or by S alone."""
        self._step(self.length, 1, sparse=self.config.mode == "sparse")
        self.length += 1
        self.stats.tokens += self.text.commit([int(self.ids[self.length])])

    def _period(self) -> None:
        """SPEC section 3, steps 2 to 5. x0 stands at ids[length]; drafts x1, x2, ... behind it."""
        config, length = self.config, self.length
        started = time.perf_counter()
        # The last period may be shorter: it need not commit more than the text may still take.
        drafted = min(config.period, self.text.limit - self.stats.tokens) - 1
        for j in range(drafted):
            self._step(length + j, 1, sparse=True)
        logits = self._step(length, 1 + drafted)
        drafts = self.ids[length + 1 : length + 1 + drafted]
        likelihoods, argmax, accepted = ops.accept(
            logits, drafts, config.threshold, config.score_temperature, match=config.accept == "match"
        )
        # F overwrote the cache entries of S, and a chain's accepted ones already stand in their places: dropping the others is
        # a matter of the length.
        self.ids[length + 1 + accepted] = argmax[accepted]
        self.length += accepted + 1
        seconds = time.perf_counter() - started

        committed = self.text.commit(self.ids[length + 1 : self.length + 1].tolist())
        self.stats.tokens += committed
        cut = drafted < config.period - 1 or committed <= accepted
        self.stats.periods.append(Period(drafted, accepted, committed, cut, likelihoods.tolist(), seconds))

    def _step(self, start: int, rows: int, sparse: bool = False) -> torch.Tensor:
        """Run ids[start : start + rows] through F or S, each seeing all before it; returns logits [rows, V].

        A single row's choice is written to ids[start + 1].
        """
        end = start + rows
        logits, _ = self.model.step(
            self.ids[start:end],
            self.positions[start:end],
            self.chain_mask[:rows],
            prefix=start,
            first_slot=start,
            sparse=sparse,
            argmax=self.ids[start + 1 : start + 2] if rows == 1 else None,
        )
        if self.process:
            ids = self.ids.long()
            logits = torch.stack([self.process(ids[: start + 1 + i], logits[i]) for i in range(rows)])
            if rows == 1:
                self.ids[start + 1] = logits[0].argmax()
        return logits
