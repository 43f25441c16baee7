"""The tasks' items from the Hugging Face hub, where no folder is given. Their ids and their number may differ from the files'."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..extras import need
from . import tasks
from .tasks import Item, collect


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set, its configuration and split; item: an item of its i-th row."""

    path: str
    name: str | None
    split: str
    item: Callable[[int, dict[str, Any]], Item]


def _csqa(index: int, row: dict[str, Any]) -> Item:
    choices = [{"text": text} for text in row["choices"]["text"]]
    return tasks.csqa(index, {**row, "question": {"stem": row["question"], "choices": choices}})


# What stands around a question in BIG-bench's texts: instructions and "Q: " before it, the choices and "A: " after.
_BIGBENCH = re.compile(
    r"\s*(?:Determine whether [^\n]*\n)?\s*(?:Q: |Statement: )?(.*?)(?:\n\s*(?:choice: |A:|Plausible/).*)?", re.DOTALL
)


def _bigbench(item: Callable[[int, dict[str, Any]], Item]) -> Callable[[int, dict[str, Any]], Item]:
    def read(index: int, row: dict[str, Any]) -> Item:
        scores = dict(zip(row["multiple_choice_targets"], row["multiple_choice_scores"], strict=True))
        found = _BIGBENCH.fullmatch(row["inputs"])
        assert found is not None  # whatever the text is, for the group takes all of it if need be
        return item(index, {"input": found[1].strip(), "target_scores": scores})

    return read


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", "test", tasks.gsm8k),
    "svamp": Source("ChilleD/SVAMP", None, "test", tasks.svamp),
    "aqua": Source("deepmind/aqua_rat", "raw", "test", tasks.aqua),
    "csqa": Source("tau/commonsense_qa", None, "validation", _csqa),
    "strategyqa": Source("ChilleD/StrategyQA", None, "test", tasks.strategyqa),
    "date": Source("tasksource/bigbench", "date_understanding", "train+validation", _bigbench(tasks.date)),
    "sports": Source("tasksource/bigbench", "sports_understanding", "train+validation", _bigbench(tasks.sports)),
    "humaneval": Source("openai/openai_humaneval", None, "test", tasks.humaneval),
    "mbpp": Source("google-research-datasets/mbpp", "full", "test", tasks.mbpp),
    "mmlu_cot": Source("cais/mmlu", "all", "test", lambda i, row: tasks.mmlu(i, {**row, "answer": "ABCD"[row["answer"]]})),
    "truthfulqa": Source("truthfulqa/truthful_qa", "generation", "validation", tasks.truthfulqa),
}

# (path, name, split=...) -> rows, as `datasets.load_dataset`
Loader = Callable[..., Iterable[dict[str, Any]]]


def load_items(task: str, loader: Loader | None = None) -> list[Item]:
    """loader: by default `datasets.load_dataset`. ValueError without that package, or for a malformed row, which it names;
    OSError if the data cannot be had."""
    source = SOURCES[task]
    if loader is None:
        loader = need("datasets", "datasets", f"{task} without --data").load_dataset
    try:
        rows = loader(source.path, source.name, split=source.split)
    except Exception as error:  # the hub's client has errors of several libraries
        reason = f"{type(error).__name__}: {error}"
        raise OSError(f"data: cannot have {source.path} from the Hugging Face hub ({reason}); --data DIR reads files") from error
    return collect(source.path, lambda: itertools.starmap(source.item, _numbered(rows)))


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with subjects are counted subject by subject, as in MMLU's files."""
    seen: collections.Counter[str | None] = collections.Counter()
    for row in rows:
        subject = row.get("subject")
        yield seen[subject], row
        seen[subject] += 1
