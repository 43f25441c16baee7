"""Decode a task's items in several modes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from ..config import GREEDY, SiriusConfig
from ..decoding.sequence import Request, Sequence
from ..decoding.sparsity import without_chance
from ..engine import Engine, make_copy, prepare
from ..serving.text import text_after
from .batched import Batch, shared_prefix
from .modes import config_of
from .results import Keeper
from .tasks import Item, Task

T = TypeVar("T")
FAILURES = (ValueError, RuntimeError, MemoryError)  # of an item, which then counts as wrong


def progress_bar(console: Console) -> Progress:
    """A bar of items. What else is printed to standard output stays there: it may be a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, redirect_stdout=False)


def evaluate(
    engine: Engine,
    task: Task,
    items: SequenceOf[Item],
    modes: SequenceOf[str],
    base: SiriusConfig,
    results: Keeper,
    shots: int,
    console: Console,
    batch: int = 1,
) -> None:
    """Decode what is not in `results` yet, item by item in every mode, so that a run that is stopped has compared the same items.

    An item that fails is recorded as failed, which counts as wrong, and the run goes on.
    base: what S reads of plain weights is no matter of how much memory is free (`without_chance`).
    batch: so many texts side by side. They have no times of their own.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None  # `Plan.engine` has looked
    base = without_chance(base, prepare(engine.model).weights.leave_no_choice)
    configs = {mode: config_of(mode, base) for mode in modes}
    for config in configs.values():
        make_copy(engine.model, config, progress=not console.quiet)  # without memory for it no item could be decoded
    done = results.done()
    # Making one takes seconds with a large vocabulary.
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, list(task.stop))])
    with progress_bar(console) as bar:
        progress = bar.add_task(task.name, total=len(items) * len(modes))
        waiting = [(item, mode) for item in items for mode in modes if (mode, item.id) not in done]
        bar.update(progress, completed=len(items) * len(modes) - len(waiting))

        def keep(item: Item, mode: str, decode: Callable[[], Sequence]) -> None:
            found = _judged(tokenizer, task, item, decode)
            results.add({"mode": mode, "id": item.id, **(found if batch == 1 else found | {"seconds": None})})
            bar.update(progress, advance=1, description=f"{task.name} {running(results.records, modes)}")

        def ask(make: Callable[..., T], item: Item, mode: str) -> T:
            inputs = tokenizer(task.prompt(item, shots), return_tensors="pt")
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            settings = {"max_new_tokens": task.max_new_tokens, "stopping_criteria": stop, **GREEDY}
            return make(**inputs, config=configs[mode], **settings)

        def requests() -> Iterator[tuple[tuple[Item, str], Request]]:
            for item, mode in waiting:
                try:
                    (request,) = ask(engine.requests, item, mode)
                except FAILURES as error:
                    keep(item, mode, functools.partial(_ended, None, error))
                else:
                    yield (item, mode), request

        if batch == 1:
            for item, mode in waiting:
                keep(item, mode, functools.partial(ask, engine.start, item, mode))
        elif waiting:
            prompts = (tokenizer(task.prompt(item, shots))["input_ids"] for item in items)
            texts = Batch(prepare(engine.model), shared_prefix(prompts))
            for (item, mode), sequence, error in texts.decode(requests(), batch):
                keep(item, mode, functools.partial(_ended, sequence, error))


def running(records: Iterable[dict[str, Any]], modes: SequenceOf[str]) -> str:
    """Accuracies so far."""
    shares = []
    for mode in modes:
        scores = [record["correct"] for record in records if record["mode"] == mode]
        shares.append(f"{mode} {sum(scores) / len(scores):.2f}" if scores else mode)
    return ", ".join(shares)


def _ended(sequence: Sequence | None, error: Exception | None) -> Sequence:
    """A text that has ended, unless by an error, which is raised."""
    if sequence is None or error is not None:
        raise error or ValueError("there is no text")
    return sequence


def _judged(tokenizer: PreTrainedTokenizerBase, task: Task, item: Item, decode: Callable[[], Sequence]) -> dict[str, Any]:
    """What is kept of an item: its text, decoded to the end, and how right it is; or why there is none."""
    started = time.perf_counter()
    try:
        sequence = decode()
        stats, tokens = sequence.run(), sequence.tokens
        text = text_after(tokenizer, sequence.request.prompt.tolist(), tokens)
        verdict = task.judge(item, task.answer_in(text))
    except FAILURES as error:
        return {"correct": False, "error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - started}
    return {
        "correct": verdict.correct,
        "answer": verdict.answer,
        "scores": verdict.scores,
        "text": text,
        "tokens": tokens,
        "stats": {
            **stats.metrics(),
            "prompt_tokens": stats.prompt_tokens,
            "finish": stats.finish,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "density": stats.density,
            "periods": [[period.drafted, period.accepted, period.committed, period.cut] for period in stats.periods],
        },
        "seconds": time.perf_counter() - started,
    }
