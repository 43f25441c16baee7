"""Sirius: contextual sparsity with correction, a decode backend for Hugging Face `transformers`."""

from .cli import interrupts  # noqa: F401 - before the imports that take seconds # isort: skip
import torch  # noqa: F401 - first, so that the extension shares torch's OpenMP threads

from .config import SiriusConfig
from .decoding.stats import Period, PromptStats, Stats
from .engine import Engine, SiriusOutput
from .integrations.transformers import attach, detach, generate

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
