"""The file of FSparse's per-layer thresholds. Of the standard library alone, so that a file can be refused before torch is
imported."""

from __future__ import annotations

import array
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import write_text

FORMAT = "sirius_ext thresholds 1"
LEAST_TOKENS = 64  # of a text that thresholds are made from


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What calibration found.

    density: the fraction of neurons to keep.
    values: c_layer, one a layer.
    kept: the fraction that each layer keeps on the held-back text.
    tokens: how many tokens were read, and how many held back.
    model: `Weights.fingerprint`.
    """

    density: float
    values: list[float]
    kept: list[float]
    tokens: tuple[int, int]
    model: str

    def save(self, file: str | os.PathLike[str]) -> None:
        write_text(file, json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")


def check_density(density: float) -> None:
    """ValueError for one that no threshold can be found for."""
    if not 0 < density < 1:
        raise ValueError(f"density: expected more than 0 and less than 1, got {density}")


def read_thresholds(file: str | os.PathLike[str], density: float) -> tuple[Sequence[float], str]:
    """The thresholds of a file, one a layer, rounded to float32, and the model's fingerprint. ValueError if it is not one, or was
    made for another density."""
    try:
        record = json.loads(Path(file).read_text())
        if record["format"] != FORMAT:
            raise KeyError(record["format"])
        values = array.array("f", map(float, record["values"]))
        made_for, model = float(record["density"]), record["model"]
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError("a threshold is not a number of at least 0")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"thresholds: no file {file}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"thresholds: {file} is not a file of `python -m sirius_ext calibrate` ({why})") from error
    if made_for != density:
        raise ValueError(f"thresholds: {file} was made for density {made_for}, but density is {density}")
    return values, model
