"""How likely a text is: F, or S, reads given tokens, beside whatever else is decoded."""

from __future__ import annotations

import torch

from ..kernels import ops
from ..runtime.model import Model, not_finite
from ..runtime.passes import Fault, Kind, Pass
from .prefill import drive, read
from .sparsity import CSparse, FSparse

ROWS = 16  # tokens in a pass: what the kernels of every backend read the weights once for


class Reader:
    """F, or S, after a text of up to `capacity` tokens, in a cache of its own.

    tokens: of the text, int32 [t], in the host's memory.
    next: the logits after them, float32 [V], on the model's device.
    Both are there once `prefill` was called. ValueError wherever the logits of F or S are not finite.
    """

    def __init__(self, model: Model, capacity: int) -> None:
        self._model, self._cache, self._capacity = model, model.new_cache(), capacity
        model.reserve(self._cache, capacity, ROWS)
        self._mask = ops.tree_mask(torch.arange(-1, ROWS - 1, dtype=torch.int32, device="cpu"))

    def prefill(self, prompt: torch.Tensor, sparsity: CSparse | FSparse | None = None) -> None:
        """Begin anew with a prompt, int64 [t], as F, or with a new sparsity as S: F reads the prompt then too, as in decoding.
        What it has in common with the prompt before is not read again. ValueError if it does not fit."""
        self._check(len(prompt))
        self._sparsity = sparsity
        # Where neurons are chosen for a pass, not for a row, a token's are its own only when it is alone.
        self._rows = ROWS if sparsity is None or sparsity.kind == Kind.LISTED else 1
        self._cache.rewind(self._cache.reusable(prompt.tolist(), observed=isinstance(sparsity, CSparse)))
        self.next = self._after_prompt = drive(self._model, self._cache, read(self._cache, prompt, sparsity))
        self.tokens, self._prompt = prompt.int(), len(prompt)

    def score(self, tokens: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on with tokens, int32 [m]. Returns, in the host's memory, the logarithm of each one's likelihood,
        softmax(logits / temperature), float32 [m], and what is likeliest in its place, int64 [m]."""
        self._check(len(self.tokens) + len(tokens))
        scores, likeliest = [torch.empty(0, dtype=torch.float32, device="cpu")], [torch.empty(0, dtype=torch.int64, device="cpu")]
        for part in tokens.split(self._rows):
            before = torch.cat((self.next[None], self._step(part)))
            self.next = before[-1]
            logarithms = torch.log_softmax(before[:-1] / temperature, -1)
            scores.append(logarithms.gather(-1, part.long()[:, None].to(before.device))[:, 0].cpu())
            likeliest.append(before[:-1].argmax(-1).cpu())
        return torch.cat(scores), torch.cat(likeliest)

    def back_to(self, length: int) -> None:
        """Forget the tokens after the first `length`, which hold the prompt at least."""
        if not self._prompt <= length <= len(self.tokens):
            raise ValueError(f"length: expected {self._prompt} to {len(self.tokens)}, got {length}")
        if length == self._prompt:
            self.tokens, self.next = self.tokens[:length], self._after_prompt
        elif length < len(self.tokens):
            last = self.tokens[length - 1 : length]
            self.tokens = self.tokens[: length - 1]
            self.next = self._step(last)[-1].clone()

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        start, m = len(self.tokens), len(tokens)
        positions = torch.arange(start, start + m, dtype=torch.int32, device="cpu")
        asked = Pass(tokens.contiguous(), positions, self._mask[:m], prefix=start, first_slot=start, sparsity=self._sparsity)
        logits, argmax = self._model.step(self._cache, asked)
        best = argmax.tolist()
        if -1 in best:
            count = best.index(-1) + 1
            where = self._model.fault(self._cache, Fault(tokens[:count].long(), start, self._sparsity))
            reader = f"reading (the {'sparse' if self._sparsity else 'full'} model)"
            raise not_finite(self._prompt, start + count - self._prompt, reader, where)
        self.tokens = torch.cat((self.tokens, tokens))
        return logits

    def _check(self, length: int) -> None:
        if length > self._capacity:
            raise ValueError(f"tokens: there is room for {self._capacity}, got {length}")
