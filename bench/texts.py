"""What recordings are made of: prompts of evaluation tasks and of chat, each as the model wants it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from prompts import CHAT

from sirius_ext.engine import Engine, encode
from sirius_ext.evaluation.tasks import load_task

SHOTS = {"gsm8k": 2, "humaneval": 0}
KINDS = (*SHOTS, "chat")


def counts(text: str) -> list[int]:
    """Of a flag: how many prompts of each of KINDS, with commas between them. ValueError for anything else."""
    try:
        found = [int(count) for count in text.split(",")]
    except ValueError:
        found = []
    if len(found) != len(KINDS) or min(found) < 0 or not sum(found) or found[-1] > len(CHAT):
        kinds = f"{', '.join(SHOTS)} and chat"
        raise ValueError(
            f"items: expected three counts, of {kinds} (at most {len(CHAT)}), with commas between them, got {text!r}"
        )
    return found


def prompts(engine: Engine, data: Path | None, items: Sequence[int]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Kind, id, and tokens, int64 [t], of so many prompts of each kind. data: folder of the tasks; not needed for chat."""
    for (name, shots), count in zip(SHOTS.items(), items):
        if count:
            assert data is not None
            task, found = load_task(name, data)
            for item in found[:count]:
                yield name, item.id, encode(engine.tokenizer, task.prompt(item, shots), chat=False)["input_ids"][0]
    for number, text in enumerate(CHAT[: items[-1]]):
        yield "chat", str(number), encode(engine.tokenizer, text, chat=True)["input_ids"][0]
