"""The commands `eval`, `study` and `analyze`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ..errors import write_text
from ..evaluation.analyze import Analysis, analyze, summary
from ..evaluation.jobs import by_processes, by_ray, launched, processes
from ..evaluation.modes import config_of
from ..evaluation.plan import Plan
from ..evaluation.results import Results, report, summarize
from ..evaluation.runner import progress_bar
from ..evaluation.study import SETTINGS, Runner, plot, study
from ..evaluation.tasks import TASKS, Item
from ..evaluation.transcript import page, show, show_summary
from ..extras import need
from ..loading import THREADS_PER_CPU, most_threads
from .arguments import check_distinct
from .options import check_used, evaluation_config
from .report import title_of
from .terminal import Console


def _plan(options: argparse.Namespace, modes: Sequence[str], **more: Any) -> Plan:
    base = evaluation_config(options)
    names = ("model", "dtype", "device", "threads", "weights", "memory", "task", "data", "shots", "skip", "limit", "batch")
    return Plan(
        **{name: getattr(options, name) for name in names if hasattr(options, name)}, modes=tuple(modes), base=base, **more
    )


def run_eval(options: argparse.Namespace) -> int:
    plan = _plan(options, options.modes, shard=options.shard)
    check_distinct(out=options.out, thresholds=plan.base.thresholds)
    run = _runner(options)
    items = plan.items()
    with launched(plan, items, options.out, options.resume) as (plan, items, results, first):
        run(plan, items, results)
    if first:
        report(title_of(plan.record()), summarize(results.records, plan.modes), Console())
    return 0


def run_study(options: argparse.Namespace, values: Sequence[float]) -> int:
    if processes() > 1:
        raise ValueError("study: expected one process, got several; --jobs starts others")
    plan = _plan(options, (options.mode,))
    rows = study(plan, options.what, values, options.out, _runner(options))
    run = {**plan.record(), SETTINGS[options.what].field: "varied"}
    title = f"{options.mode} by {options.what}: {title_of(run)}"
    shown = [{**row, "mode": row["mode"] if row["value"] is None else str(row["value"])} for row in rows]
    report(title, shown, Console())
    picture = options.out / f"{options.mode}-{options.what}.png"
    plot(rows, options.what, title, picture)
    write_text(picture.with_suffix(".json"), json.dumps({"run": run, "rows": rows}, indent=1) + "\n")
    print(f"written: {picture}")
    return 0


def run_analyze(options: argparse.Namespace) -> int:
    plan = _plan(options, (options.mode,))
    config = config_of(options.mode, plan.base)
    check_used(options, config.used | {"threshold"}, f"--mode {options.mode}")
    check_distinct(out=options.out, json=options.json, thresholds=plan.base.thresholds)
    for name in ("skip", "limit"):
        if options.items and hasattr(options, name):
            raise ValueError(f"{name}: --items says which, in its place")
    items = plan.items()
    if options.items:
        by_id = {item.id: item for item in items}
        unknown = [name for name in options.items if name not in by_id]
        if unknown:
            raise ValueError(f"items: {plan.task} has no {', '.join(unknown)}; its first ids are {', '.join(list(by_id)[:3])}")
        items = [by_id[name] for name in options.items]
    engine = plan.engine()
    title = f"{plan.task}, {plan.model}, {options.mode}, density {config.density}, threshold {config.threshold}"
    to_stdout = str(options.json) == "-"
    console = Console(stderr=to_stdout)
    analyses: list[Analysis] = []

    def record() -> str:
        found = {"summary": summary(analyses), "items": [dataclasses.asdict(analysis) for analysis in analyses]}
        return json.dumps(found, indent=1) + "\n"

    try:
        # On a terminal the items go above the bar, so both are printed by one console.
        with progress_bar(console if console.is_terminal else Console(stderr=True)) as bar:
            progress = bar.add_task(plan.task, total=len(items))
            for item in items:
                analyses.append(analyze(engine, TASKS[plan.task], item, config, plan.examples))
                show(analyses[-1], console)
                # After every item, so that a run that is stopped has not been for nothing.
                write_text(options.out, page(analyses, title))
                if options.json is not None and not to_stdout:
                    write_text(options.json, record())
                bar.update(progress, advance=1)
    finally:
        if to_stdout:
            print(record(), end="")
    show_summary(analyses, console)
    console.print(f"written: {options.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _runner(options: argparse.Namespace) -> Runner:
    """What decodes: this process, with a model that is loaded once, or several."""
    if options.jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {options.jobs}")
    if options.jobs > most_threads() and not options.ray:
        raise ValueError(f"jobs: expected 1 to {most_threads()} ({THREADS_PER_CPU} for each CPU), got {options.jobs}")
    if options.ray:
        need("ray", "ray", "--ray")
    console = Console(stderr=True)
    if options.ray or options.jobs > 1:
        if processes() > 1:
            raise ValueError("--jobs: there are several processes already, which share the items; --jobs and --ray start others")
        over = by_ray if options.ray else by_processes

        def run(plan: Plan, items: list[Item], results: Results) -> None:
            over(plan, items, results, options.jobs, console)
    else:

        def run(plan: Plan, items: list[Item], results: Results) -> None:
            plan.carry_out(plan.engine(), items, results, console)

    def what_is_left(plan: Plan, items: list[Item], results: Results) -> None:
        if plan.left(items, results.done()):
            run(plan, items, results)

    return what_is_left
