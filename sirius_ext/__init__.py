"""Sirius: contextual sparsity with correction, a decode backend for Hugging Face `transformers`."""

from .cli import interrupts  # noqa: F401 - before whatever takes seconds to import # isort: skip
from typing import TYPE_CHECKING

from .config import SiriusConfig
from .decoding.stats import Period, PromptStats, Stats
from .integrations.transformers import attach, detach, generate

if TYPE_CHECKING:
    from .engine import Engine, SiriusOutput
else:

    def __getattr__(name: str) -> object:
        """The engine when it is first asked for: it needs torch and transformers, which take seconds to import, and not everyone
        needs it."""
        if name not in ("Engine", "SiriusOutput"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import engine

        return getattr(engine, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
