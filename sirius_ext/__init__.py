"""Sirius: contextual sparsity with correction, a decode backend for Hugging Face `transformers`."""

import torch  # noqa: F401 - first, so that the extension shares torch's OpenMP threads

from .config import SiriusConfig
from .engine import Engine, SiriusOutput
from .hf import attach, detach, generate
from .stats import Period, PromptStats, Stats

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
