"""Does the correction bring the answers back? Eleven tasks, few-shot and generated, decoded in several modes on the same
items."""

from .runner import NAMED_MODES, Results, columns_of, config_of, evaluate, modes_in, read_results, report, summarize
from .tasks import TASKS, load_task

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
