"""In which form a model may be asked for, checked before anything is read of it. Of the standard library alone: what is asked
for is looked at before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import re

DEFAULT_MODEL = "smollm2-135m-instruct"
WEIGHTS = ("plain", "q8", "q4")
# Names of dtypes, and torch's.
DTYPE_NAMES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
    "auto": "auto",
}
THREADS_PER_CPU = 4  # at most: more of them only wait for each other

_UNITS = ["", "k", "m", "g", "t"]
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


def dtype_name(name: str) -> str:
    """torch's name of a dtype; "auto" stays "auto". ValueError unless it is one of DTYPE_NAMES."""
    if name not in DTYPE_NAMES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return DTYPE_NAMES[name]


def parse_weights(weights: str) -> str:
    """ValueError unless it is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    return weights


def parse_size(text: str) -> int:
    """Bytes: a number, or one with a unit, as 500M, 6GB or 1.5GiB. ValueError for anything else."""
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"expected a size as 500M, 6GB or 1.5GiB, got {text!r}")
    power = _UNITS.index(found[2].lower())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def parse_memory(memory: int | str) -> int:
    """Bytes: a number, or what `parse_size` takes; more than 0. ValueError for anything else."""
    if isinstance(memory, bool) or not isinstance(memory, (int, str)):
        raise ValueError(f"memory: expected bytes, or a size as 6GB, got {memory!r}")
    try:
        size = parse_size(memory) if isinstance(memory, str) else memory
    except ValueError as error:
        raise ValueError(f"memory: {error}") from error
    if size <= 0:
        raise ValueError(f"memory: expected more than 0 bytes, got {memory!r}")
    return size


def most_threads() -> int:
    return THREADS_PER_CPU * (os.cpu_count() or 1)


def check_threads(count: int) -> int:
    """The same count. ValueError for one that this machine cannot serve."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most_threads():
        expected = f"1 to {most_threads()} ({THREADS_PER_CPU} for each CPU)"
        raise ValueError(f"threads: expected {expected}, got {count!r}")
    return count
