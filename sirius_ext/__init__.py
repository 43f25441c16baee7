"""Sirius: contextual sparsity with correction, a decode backend for Hugging Face `transformers`."""

from .cli import interrupts  # noqa: F401 - before whatever takes seconds to import # isort: skip
from typing import TYPE_CHECKING

from .config import SiriusConfig
from .decoding.stats import Period, PromptStats, Stats
from .extras import later
from .integrations.transformers import attach, detach, generate

if TYPE_CHECKING:
    from .engine import Engine, SiriusOutput
else:
    # The engine needs torch and transformers, which take seconds to import, and not everyone needs it.
    __getattr__, __dir__ = later(__name__, {"Engine": "engine", "SiriusOutput": "engine"})


__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Period",
    "PromptStats",
    "SiriusConfig",
    "SiriusOutput",
    "Stats",
    "attach",
    "detach",
    "generate",
]
