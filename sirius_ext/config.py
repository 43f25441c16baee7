"""What a user may set, checked once."""

from __future__ import annotations

import dataclasses
import math

MODES = ("sirius", "sparse", "full")
SPARSITIES = ("csparse",)
ACCEPT_RULES = ("threshold", "match")
MAX_PERIOD = 256


@dataclasses.dataclass(frozen=True)
class SiriusConfig:
    """How to decode. Names and defaults are those of the Sirius paper (arXiv 2409.03856).

    mode: "sirius" drafts with the sparse model and corrects with the full one; "sparse" and "full" decode with one of them alone.
    sparsity: "csparse", one set of neurons per prompt, chosen during its prefill (GRIFFIN's rule).
    density: fraction of MLP neurons kept in every layer, in (0, 1].
    period: tokens that one full pass verifies, 1 to 256; the first of them was chosen by the full model.
    threshold: a drafted token is kept when the full model gives it at least this likelihood, in [0, 1].
    score_temperature: temperature of the softmax behind that likelihood, more than 0.
    accept: "threshold" (the paper's rule: text close to the full model's) or "match" (text equal to the full model's).

    Raises TypeError or ValueError that names the field.
    """

    mode: str = "sirius"
    sparsity: str = "csparse"
    density: float = 0.5
    period: int = 16
    threshold: float = 0.1
    score_temperature: float = 0.6
    accept: str = "threshold"

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("sparsity", SPARSITIES), ("accept", ACCEPT_RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("density", "threshold", "score_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        if isinstance(self.period, bool) or not isinstance(self.period, int):
            raise TypeError(f"period: expected an integer, got {self.period!r}")
        if not 1 <= self.period <= MAX_PERIOD:
            raise ValueError(f"period: expected 1 to {MAX_PERIOD}, got {self.period}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: expected more than 0 and at most 1, got {self.density}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected 0 to 1, got {self.threshold}")
        if not self.score_temperature > 0:
            raise ValueError(f"score_temperature: expected more than 0, got {self.score_temperature}")
