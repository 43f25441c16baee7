"""The command `report`."""

from __future__ import annotations

import argparse
from typing import Any

from ..evaluation.modes import modes_in
from ..evaluation.results import Results, claimed, merge, report, summarize
from .terminal import Console


def run(options: argparse.Namespace) -> int:
    shared, records = merge(options.files)
    if not records:
        raise ValueError(f"{', '.join(map(str, options.files))}: no results, only what was run")
    report(title_of(shared), summarize(records, modes_in(records)), Console())
    if options.out:
        with claimed(options.out):
            Results.write(options.out, shared, records)
    return 0


def title_of(run: dict[str, Any]) -> str:
    """Of what the first line of a results file says; one that was made by other means may say less."""
    names = ("task", "model", "dtype", "shots", "density", "period")
    known = {name: run.get(name, "?") for name in names}
    if run.get("weights", "plain") != "plain":
        known["dtype"] = f"{run['weights']} of {known['dtype']}"
    return "{task}, {model}, {dtype}, {shots} shots, density {density}, period {period}".format(**known)
