"""Does the correction bring the answers back? Eleven tasks, few-shot and generated, decoded in several modes on the same
items."""

from typing import TYPE_CHECKING

from .modes import NAMED_MODES, config_of, modes_in
from .results import Results, columns_of, read_results, report, summarize
from .tasks import TASKS, load_task

if TYPE_CHECKING:
    from .runner import evaluate
else:

    def __getattr__(name: str) -> object:
        """`evaluate` when it is first asked for: it needs torch and transformers, which take seconds to import."""
        if name != "evaluate":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .runner import evaluate

        return evaluate

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "NAMED_MODES",
    "TASKS",
    "Results",
    "columns_of",
    "config_of",
    "evaluate",
    "load_task",
    "modes_in",
    "read_results",
    "report",
    "summarize",
]
