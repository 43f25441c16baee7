"""What tokens of a model would take where a part of it comes from a disk, predicted from bytes and measured speeds."""

from __future__ import annotations

import dataclasses

from ..config import MAX_AUTO_PERIOD_FROM_DISK, SiriusConfig
from ..models.tier_files import Layout
from ..models.tiers import Plan
from .period import Acceptance, Costs
from .sparsity import draft_bytes, draft_density


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds of a token: of the full model alone, of the sparse one alone, and of Sirius. None where that depends on the disk,
    whose speed is not known.

    accepted: how likely the full model is taken to accept a token of the sparse one.
    """

    full: float | None
    sparse: float
    sirius: float | None
    accepted: float


def forecast(config: SiriusConfig, files: Layout, plan: Plan, disk: float | None, memory: float) -> Forecast:
    """Each pass takes as long as its bytes of weights take to read: keys and values, and all that is not reading, are left out.
    Sirius has the best fixed period, for tokens that are accepted as often as those that `period="auto"` was made from.

    disk, memory: bytes a second.
    """
    sparse = draft_bytes(config, files, plan) / memory
    accepted = Acceptance(config.accept, draft_density(config, files, plan)).mean
    # What comes from the disk is written to memory before it is read there. Layers arrive while others are computed.
    full: float | None = (sum(files.read_bytes()) + plan.streamed) / memory
    if plan.streamed:
        full = None if disk is None or full is None else max(plan.streamed / disk, full)
    if full is None:
        return Forecast(None, sparse, None, accepted)
    rate = Costs(sparse / full, ((2, 1.0),)).best_rate(accepted, longest=MAX_AUTO_PERIOD_FROM_DISK)
    return Forecast(full, sparse, full / rate, accepted)
