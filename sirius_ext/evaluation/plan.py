"""What an evaluation decodes, said so that another process can be told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import SiriusConfig
from ..decoding.calibrate import load_thresholds
from ..decoding.sparsity import without_chance
from ..engine import Engine, engine_of, prepare
from .hub_data import load_items
from .modes import config_of
from .results import Keeper
from .runner import evaluate
from .tasks import TASKS, Item, Task, load_task

SHOTS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model, a task, and how to decode it.

    model, dtype, device, threads, weights: as `engine.Source` has them.
    data: the folder of the tasks' files; None is the Hugging Face hub.
    shots: examples in the prompt; None is 5, or as many as the task has.
    skip: items left out at the beginning: those that settings were chosen on, say.
    limit: items at most.
    shard: (i, k), the i-th of k parts of the items, counted from 1.
    batch: items side by side: much faster, but nothing is timed then.
    modes: as `modes.config_of` has them.
    base: the settings that the modes share; what S reads of plain weights is settled in it (`without_chance`).

    ValueError for an unknown mode or task, or a number out of its range.
    """

    model: str
    dtype: str
    device: str
    threads: int | None
    task: str
    data: Path | None
    modes: tuple[str, ...]
    base: SiriusConfig
    shots: int | None = None
    skip: int = 0
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    batch: int = 1
    weights: str = "plain"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.base.accept == "sample":
            raise ValueError("--accept: expected threshold or match, got sample; the tasks are decoded greedily")
        if self.base.lookup is True:
            raise ValueError("lookup: expected False or auto; an evaluation is about texts, and copies are about time")
        object.__setattr__(self, "base", without_chance(self.base, self.weights != "plain"))
        configs = [config_of(mode, self.base) for mode in self.modes]
        if len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes: expected each once, got {', '.join(self.modes)}")
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        most = TASKS[self.task].max_shots
        shots = min(SHOTS, most) if self.shots is None else self.shots
        object.__setattr__(self, "shots", shots)
        if not 0 <= shots <= most:
            raise ValueError(f"--shots: expected 0 to {most} for {self.task}, got {shots}")
        if self.skip < 0:
            raise ValueError(f"--skip: expected at least 0, got {self.skip}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: expected at least 1, got {self.limit}")
        if self.batch < 1:
            raise ValueError(f"--batch: expected at least 1, got {self.batch}")
        if self.batch > 1 and any(config.period == "auto" for config in configs):
            raise ValueError("--batch: more than 1 needs a fixed period; with --period auto, which measures, items go one by one")
        if self.batch > 1 and self.device.startswith("cuda"):
            raise ValueError(f"--batch: more than 1 is decoded by the CPU, but the device is {self.device}; use --device cpu")
        if self.batch > 1 and self.device == "auto":
            object.__setattr__(self, "device", "cpu")

    def items(self) -> list[Item]:
        """Of this part. ValueError or OSError if they cannot be had."""
        items = load_items(self.task) if self.data is None else load_task(self.task, self.data)[1]
        if self.skip >= len(items):
            raise ValueError(f"--skip: expected less than the {len(items)} items of {self.task}, got {self.skip}")
        index, count = self.shard
        items = items[self.skip :][: self.limit][index - 1 :: count]
        if not items:
            raise ValueError(f"--shard: part {index} of {count} has no items")
        return items

    def record(self) -> dict[str, Any]:
        """The first line of a results file: two runs whose records are the same may share one."""
        settings = dataclasses.asdict(self.base) | {"thresholds": self.base.thresholds and str(self.base.thresholds)}
        for name in ("mode", "sparsity", "lookup"):
            del settings[name]
        if settings["offload"] == "auto":  # which changes no text
            del settings["offload"]
        if settings["draft_weights"] == "auto":  # of packed weights; results from before there was a choice may be gone on with
            del settings["draft_weights"]
        four_bits = self.base.draft_weights == "q4" or (self.base.draft_weights == "auto" and self.weights == "q8")
        if settings["density"] == "auto":  # in four bits it depends on the mode; and once "auto" was 0.7 of csparse there
            settings["density"] = "auto, 1 of csparse" if four_bits else self.base.density_with()
        weights = {"weights": self.weights} if self.weights != "plain" else {}
        source = {"source": "hub"} if self.data is None else {}
        batch = {"batch": self.batch} if self.batch > 1 else {}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "task": self.task,
            "shots": self.shots,
            **source,
            **batch,
            **weights,
            **settings,
        }

    def engine(self) -> Engine:
        alone = all(config_of(mode, self.base).mode == "full" for mode in self.modes)  # nothing is made for a sparse model then
        engine = engine_of(self, dataclasses.replace(self.base, mode="full") if alone else self.base)
        if engine.tokenizer is None:
            raise ValueError("--model: it has no tokenizer, so questions cannot be read")
        if self.base.thresholds is not None:
            # For this model? Otherwise every item would fail, one by one.
            load_thresholds(self.base.thresholds, prepare(engine.model).weights, self.base.density_with())
        return engine

    def left(self, items: list[Item], done: set[tuple[str, str]]) -> list[Item]:
        """Those that are not done in every mode. done: (mode, id) of what is known."""
        return [item for item in items if any((mode, item.id) not in done for mode in self.modes)]

    def carry_out(self, engine: Engine, items: list[Item], results: Keeper, console: Console) -> None:
        """Decode what `results` lacks, in this process."""
        evaluate(engine, self._task, items, self.modes, self.base, results, self.examples, console, self.batch)

    @property
    def examples(self) -> int:
        """`shots`, when it is known how many the task has."""
        assert self.shots is not None
        return self.shots

    @property
    def _task(self) -> Task:
        return TASKS[self.task]
