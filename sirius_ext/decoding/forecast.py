"""What tokens of a model would take where a part of it comes from a disk, predicted from bytes and measured speeds."""

from __future__ import annotations

import dataclasses

from ..config import SiriusConfig
from ..models.tier_files import Layout
from ..models.tiers import Plan
from .sparsity import draft_bytes

# What a period is assumed to bring: measured of csparse with a set that follows, density 0.5, `threshold` (docs/benchmarks.md).
PERIOD, ADVANCE = 16, 10.6
ADVANCE_OF = "Qwen2.5-Coder-1.5B-Instruct's"


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds of a token: of the full model alone, of the sparse one alone, and of Sirius. None where that depends on the disk,
    whose speed is not known."""

    full: float | None
    sparse: float
    sirius: float | None


def forecast(config: SiriusConfig, files: Layout, plan: Plan, disk: float | None, memory: float) -> Forecast:
    """Each pass takes as long as its bytes of weights take to read: keys and values, and all that is not reading, are left out.

    disk, memory: bytes a second.
    """
    sparse = draft_bytes(config, files, plan) / memory
    # What comes from the disk is written to memory before it is read there. Layers arrive while others are computed.
    full: float | None = (sum(files.read_bytes()) + plan.streamed) / memory
    if plan.streamed:
        full = None if disk is None or full is None else max(plan.streamed / disk, full)
    return Forecast(full, sparse, None if full is None else ((PERIOD - 1) * sparse + full) / ADVANCE)
