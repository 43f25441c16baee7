"""`transformers`' processors and criteria for one row of a call (generation/rows.py), by themselves."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor
from transformers.generation.stopping_criteria import MaxTimeCriteria

from sirius_ext.generation.rows import Clock, Processor

VOCAB = 23


def watermark(**settings):
    settings = {"ngram_len": 3, "context_history_size": 16, **settings}
    return SynthIDTextWatermarkLogitsProcessor(
        keys=[5, 7, 11], sampling_table_size=256, sampling_table_seed=0, device="cpu", **settings
    )


@pytest.mark.parametrize("settings", [{}, {"ngram_len": 5, "skip_first_ngram_calls": True}, {"context_history_size": 2}], ids=str)
def test_a_watermark_forgets_what_is_taken_back(settings):
    """A text is drafted ahead, in part taken back, asked about from anywhere on: each time as if it alone had ever been there."""
    random.seed(0)
    torch.manual_seed(0)
    prompt = torch.arange(4)
    batch, scores = torch.stack((prompt, prompt.flip(0))), torch.randn(VOCAB)
    process = Processor([watermark(**settings)], 0, batch, 3)  # the first token of the prompt is padding
    text, marked = [], 0
    for _ in range(60):
        if random.random() < 0.3:
            del text[random.randrange(len(text) + 1) :]
        text += random.choices(range(3), k=random.randrange(4))  # few tokens, so that contexts come again
        for end in range(random.randrange(len(text) + 1), len(text) + 1):
            told = process(torch.tensor([1, 2, 3, *text[:end]]), scores)
            alone = watermark(**settings)
            for length in range(end + 1):
                expected = alone(torch.tensor([[0, 1, 2, 3, *text[:length]]]), scores[None])[0]
            assert torch.equal(told, expected)
            marked += not torch.equal(told, scores)
    assert marked > 20


def test_rows_share_the_time_that_is_left(monkeypatch):
    """The first takes less than its third, the second more than half of the rest: the last has what is left."""
    asked = [(0, 101.0), (0, 102.0), (1, 105.0), (1, 105.5), (1, 106.0), (2, 107.0), (2, 109.0), (2, 109.1)]
    times = iter([time for _, time in asked])
    monkeypatch.setattr("sirius_ext.generation.rows.time", SimpleNamespace(time=lambda: next(times)))
    clock = Clock(MaxTimeCriteria(max_time=9.0, initial_timestamp=100.0), 3)
    told = [clock.is_over(row) for row, _ in asked]
    assert told == [False, False, False, False, True, False, False, True]


def test_a_clock_whose_time_is_over():
    clock = Clock(MaxTimeCriteria(max_time=0.0, initial_timestamp=time.time() - 1), 2)
    assert clock.is_over(0) and clock.is_over(1)
