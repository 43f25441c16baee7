"""One setting varied: accuracy and effective density against threshold, density, tree width or period."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..extras import need
from .modes import config_of
from .results import Results, summarize
from .tasks import Item

if TYPE_CHECKING:
    from .plan import Plan

# Decodes what the results lack of a plan's items.
Runner: TypeAlias = "Callable[[Plan, list[Item], Results], None]"


@dataclasses.dataclass(frozen=True)
class Setting:
    """field: of the config. values: where none are given. parse: a value from text."""

    field: str
    values: tuple[float, ...]
    parse: Callable[[str], float]
    logarithmic: bool = True


SETTINGS = {
    "threshold": Setting("threshold", (0.01, 0.05, 0.1, 0.2, 0.3, 0.5), float),
    "density": Setting("density", (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), float, logarithmic=False),
    "width": Setting("tree_width", (1, 2, 4, 8), int),
    "period": Setting("period", (4, 8, 16, 24, 32), int),
}
FULL = "full"


def vary(plan: Plan, what: str, values: Sequence[float]) -> dict[str, float]:
    """The plan's one mode with each value of a setting: modes, and their values. A value that the plan has anyway is not named,
    so that studies share it. ValueError for a value that the config refuses, or a study that cannot differ."""
    if what == "threshold" and plan.base.accept != "threshold":
        raise ValueError(f"--what: the threshold decides nothing with --accept {plan.base.accept}")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"--values: expected one or several different ones, got {', '.join(map(str, values)) or 'none'}")
    (mode,), field = plan.modes, SETTINGS[what].field
    modes = {mode if value == getattr(plan.base, field) else f"{mode}:{field}={value}": value for value in values}
    for each, value in modes.items():
        try:
            config_of(each, plan.base)
        except ValueError as error:
            raise ValueError(f"--values: {value}: {str(error).removeprefix(f'modes: {each}: ')}") from error
    return modes


def study(plan: Plan, what: str, values: Sequence[float], folder: Path, run: Runner) -> list[dict[str, Any]]:
    """Decode the plan's items by the full model, and in the plan's one mode with each value of a setting.

    folder: gets `results.jsonl`, as eval writes it; what is there already, from whatever study, is not done again. Returns the
    rows of `results.summarize`, Full's first; each has its `value`.
    """
    modes = vary(plan, what, values)
    plan = dataclasses.replace(plan, modes=(FULL, *modes))
    items = plan.items()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Results(folder / "results.jsonl", plan.record(), resume=True)) as results:
        run(plan, items, results)
    chosen = {item.id for item in items}
    rows = summarize([record for record in results.records if record["id"] in chosen], plan.modes)
    return [{**row, "value": modes.get(row["mode"])} for row in rows]


def plot(rows: Sequence[dict[str, Any]], what: str, title: str, file: Path) -> None:
    """Accuracy with Wilson's 95 % intervals beside Full's, and effective density, against the setting."""
    figure = need("matplotlib.figure", "eval", "the plot").Figure(figsize=(7, 4.5), layout="constrained")
    full, *rows = sorted(rows, key=lambda row: (row["value"] is not None, row["value"]))
    values = [row["value"] for row in rows]
    left = figure.add_subplot()
    right = left.twinx()
    low, high = full["interval"]
    left.axhspan(low, high, color="tab:gray", alpha=0.12)
    left.axhline(full["accuracy"], color="tab:gray", linestyle="--", label="accuracy, full model")
    # Wilson's interval holds the proportion itself, but for rounding.
    below, above = (
        [max(0.0, sign * (row["interval"][end] - row["accuracy"])) for row in rows] for end, sign in ((0, -1), (1, 1))
    )
    accuracies = [row["accuracy"] for row in rows]
    left.errorbar(values, accuracies, (below, above), color="tab:blue", marker="o", capsize=4, label="accuracy, 95 %")
    densities = [row.get("effective_density", math.nan) for row in rows]
    right.plot(values, densities, color="tab:orange", marker="s", label="effective density")
    if SETTINGS[what].logarithmic:
        left.set_xscale("log")
    left.set_xticks(values, [str(value) for value in values])
    left.set_xticks([], minor=True)
    left.set_xlabel({"width": "tree width"}.get(what, what))
    left.set_ylabel("accuracy")
    right.set_ylabel("effective density")
    top = 1.05 * max((1, *(each for each in densities if not math.isnan(each))))
    for axes in (left, right):  # one scale, so that the curves can be read against either
        axes.set_ylim(0, top)
    left.set_title(title, fontsize="small")
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)
