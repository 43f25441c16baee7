"""Does the correction bring the answers back? Eleven tasks, few-shot and generated, decoded in several modes on the same
items."""

from typing import TYPE_CHECKING

from ..extras import later
from .modes import NAMED_MODES, config_of, modes_in
from .results import Results, columns_of, read_results, report, summarize
from .tasks import TASKS, load_task

if TYPE_CHECKING:
    from .runner import evaluate
else:
    __getattr__, __dir__ = later(__name__, {"evaluate": "runner"})  # with torch and transformers, which take seconds to import


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
