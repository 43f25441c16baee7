"""The text as it comes, and its tokens, so that they are known if it is stopped."""

from __future__ import annotations

import sys
import time

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..errors import naming


class KeepingStreamer(TextStreamer):
    """Prints the text, without its prompt, and keeps the tokens and the times of the first and the last.

    stderr: prints it there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stderr: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.first: float | None = None
        self.last: float | None = None
        self._stderr = stderr

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        return 0.0 if self.first is None or self.last is None else self.last - self.first

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.tokens += value.flatten().tolist()
        super().put(value)  # type: ignore[no-untyped-call]  # transformers has no types for it

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        with naming("standard error" if self._stderr else "standard output"):
            print(text, flush=True, end="\n" if stream_end else "", file=sys.stderr if self._stderr else sys.stdout)
