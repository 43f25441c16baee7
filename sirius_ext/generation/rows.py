"""`transformers`' logits processors and stopping criteria for one row of a call. They are written for a batch whose rows grow
side by side, a token at a time. Here each row is a text by itself, whose tokens are drafted, taken back and looked at again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria


class Processor:
    """`transformers`' logits processors, which want the batch as it was given: its padding, and this prompt in its row."""

    def __init__(self, processors: Sequence[Any], row: int, batch: torch.Tensor, length: int) -> None:
        self._row, self._rows = row, len(batch)
        self._padding = batch[row, : batch.shape[1] - length]
        processors = [_of_row(each, row, batch.shape[1]) for each in processors]
        # After a top-k a top-p looks at k tokens: it need not sort the vocabulary.
        first = next((i for i, each in enumerate(processors) if isinstance(each, TopKLogitsWarper)), len(processors))
        few = all(isinstance(each, (TopPLogitsWarper, MinPLogitsWarper)) for each in processors[first + 1 :])
        cut = first + 1 if few else len(processors)
        # Any: they are declared to take a LongTensor, which no tensor's class is.
        self._processors: Any = LogitsProcessorList(processors[:cut])
        self._of_few: Any = LogitsProcessorList(processors[cut:])

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        device = self._padding.device  # where the processors keep what they need
        ids = torch.cat((self._padding, ids.to(device))).repeat(self._rows, 1)
        batch = logits.to(device).repeat(self._rows, 1)
        processed = self._processors(ids, batch)
        if not isinstance(processed, torch.Tensor):
            raise TypeError(f"logits_processor: expected it to return a tensor, got {type(processed).__name__}")
        if processed.shape != batch.shape:
            raise ValueError(f"logits_processor: expected scores of shape {list(batch.shape)}, got {list(processed.shape)}")
        logits = processed[self._row].float()
        if self._of_few:
            kept = logits.isfinite()
            logits[kept] = self._of_few(None, logits[kept][None])[0]
        # NaN is not less than anything, and is its row's maximum. -inf rules a token out, as processors do; not all of them.
        if not bool((most := logits.max()).isfinite()):
            what = "scores of -inf alone" if most < 0 else f"a score of {float(most)}"
            raise ValueError(f"logits_processor: expected a likeliest token, got {what} at position {ids.shape[1]} of the text")
        return logits


def _of_row(processor: Any, row: int, length: int) -> Any:
    """As it is, but for two. One asks the caller what may come in each row (prefix_allowed_tokens_fn): all rows that it sees are
    of one text here, and what the caller allows the others may rule that out. The other remembers what it was called for.

    length: of the prompts with their padding.
    """
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(prompt, ids), 1)
    if isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
        return _SynthId(processor, length)
    return processor


class _SynthId:
    """SynthID's watermark, which leaves out what it has marked before: its state has the contexts of all tokens that it was asked
    about, and it takes each call for the next token of the text. So a state is kept for each token, and a call for a text begins
    with the one that the text's last token was drawn with."""

    def __init__(self, processor: Any, length: int) -> None:
        self._processor, self._start = copy.copy(processor), length
        self._text: list[int] = []
        self._states: list[Any] = []  # [i]: as it was left when `_text[:i]` was there

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        text = ids[0, self._start :].tolist()
        same = next((i for i, (one, other) in enumerate(zip(text, self._text)) if one != other), min(len(text), len(self._text)))
        del self._states[min(same + 1, len(text)) :]
        self._text = text
        for end in range(len(self._states), len(text)):  # nobody has asked about these tokens
            self._mark(ids[:1, : self._start + end], scores[:1])
        return self._mark(ids[:1], scores[:1]).repeat(len(scores), 1)

    def _mark(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The next token's, of all rows in one: they are of one text."""
        # A call puts new tensors in a state, and changes none.
        self._processor.state = copy.copy(self._states[-1]) if self._states else None
        marked: torch.Tensor = self._processor(ids, scores)
        self._states.append(self._processor.state)
        return marked


class Clock:
    """The time that a call may take (max_time). Its rows are decoded one after another: each has an equal share of what those
    before it have left."""

    def __init__(self, criterion: MaxTimeCriteria, rows: int) -> None:
        self._asked = criterion.initial_timestamp  # when somebody did last
        self._end = criterion.initial_timestamp + criterion.max_time
        self._rows, self._row, self._row_ends = rows, -1, 0.0

    def of(self, row: int) -> Callable[..., bool]:
        """A criterion that ends a row's text when its time is over."""
        return lambda ids, scores: self.is_over(row)

    def is_over(self, row: int) -> bool:
        """Whether a row has had its time. Rows ask in order."""
        if row != self._row:
            self._row, self._row_ends = row, self._asked + (self._end - self._asked) / (self._rows - row)
        self._asked = time.time()  # the criterion's clock
        return self._asked > self._row_ends


class Criteria:
    """`transformers`' stopping criteria, which are asked about the batch as it was given: its padding, and this text in its
    row."""

    def __init__(self, criteria: Sequence[Any], row: int, batch: torch.Tensor) -> None:
        self._criteria, self._row, self._batch = criteria, row, batch

    def __call__(self, tokens: list[int]) -> bool:
        ids = torch.cat((self._batch[self._row], torch.tensor(tokens, device="cpu"))).repeat(len(self._batch), 1)
        done = torch.zeros(len(self._batch), dtype=torch.bool, device="cpu")
        for criterion in self._criteria:
            done = done | criterion(ids, None)  # a tensor, or as transformers has it, a single bool
        return bool(done[self._row])
