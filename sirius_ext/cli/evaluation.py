"""The evaluation's part of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..config import SPARSITIES, SiriusConfig
from ..evaluation.analyze import Analysis, analyze, summary
from ..evaluation.jobs import by_processes, by_ray, launched, processes
from ..evaluation.modes import NAMED_MODES, config_of, modes_in
from ..evaluation.plan import Plan
from ..evaluation.results import Results, merge, report, summarize
from ..evaluation.study import SETTINGS, Runner, plot, study
from ..evaluation.tasks import TASKS, Item
from ..evaluation.transcript import page, show, show_summary
from ..extras import need
from ..loading import THREADS_PER_CPU, most_threads
from .arguments import (
    Commands,
    check_distinct,
    input_file,
    input_folder,
    integer,
    output_file,
    output_folder,
    output_text,
    reads,
    words,
)
from .options import (
    DEFAULTS,
    add_command,
    add_decoding_options,
    add_setting,
    add_sparsity_options,
    check_used,
    decoding_config,
    used_by,
)
from .terminal import Console

# The paper's. Answers under "auto" would depend on what passes cost on a machine: they could not be compared.
PERIOD = 16


def add(commands: Commands) -> None:
    """Add the commands to the subparsers of the command line."""
    _add_eval(commands)
    _add_report(commands)
    _add_study(commands)
    _add_analyze(commands)
    # For the list of commands alone: what stands after it goes to `lm_eval` unread.
    commands.add_parser("lm_eval", help="EleutherAI's harness with the model `sirius`; its own options follow")


def _add_eval(commands: Commands) -> None:
    suite = add_command(commands, "eval", _eval, "accuracy of a task in several modes, on the same items")
    suite.description = "Few-shot, generated answers. Each result goes to a file of JSON lines as soon as it is known."
    _add_task_options(suite)
    suite.add_argument("--out", metavar="FILE", type=output_file, required=True, help="gets the results")
    suite.add_argument(
        "--modes",
        type=words,
        default="full,csparse,fsparse,sirius-c,sirius-f",
        help=f"of {', '.join(NAMED_MODES)}, also with settings of their own, as in sirius-c:period=8 (default: %(default)s)",
    )
    _add_ways(suite)
    suite.add_argument("--shard", type=_shard, default="1/1", help="i/k: the i-th of k parts of the items (default: %(default)s)")
    suite.add_argument("--resume", action="store_true", help="go on with what --out holds")
    add_decoding_options(suite, period_default=PERIOD)


def _add_report(commands: Commands) -> None:
    table = commands.add_parser("report", help="the table of one or several result files of eval: those of shards make one")
    table.set_defaults(command=_report, parser=table)
    table.add_argument("files", metavar="FILE", nargs="+", type=input_file)
    table.add_argument("--out", metavar="FILE", type=output_file, help="write the records of all files into one")


def _add_study(commands: Commands) -> None:
    study = add_command(commands, "study", _study, "accuracy and effective density against one setting, with a plot")
    study.description = (
        "Decodes the same items with each value of a setting, and by the full model. What --out holds already is not done again."
    )
    study.add_argument("--what", choices=SETTINGS, required=True, help="the setting that varies; the options below fix the rest")
    study.add_argument("--values", type=words, help="of the setting, with commas between them")
    modes = [mode for mode in NAMED_MODES if mode.startswith("sirius")]
    study.add_argument("--mode", choices=modes, default="sirius-c", help="what is studied (default: %(default)s)")
    _add_task_options(study)
    _add_ways(study)
    study.add_argument("--out", metavar="FOLDER", type=output_folder, required=True, help="gets results, plot and table")
    add_decoding_options(study, period_default=PERIOD)


def _add_analyze(commands: Commands) -> None:
    purpose = "which tokens of the sparse model the full one rejects, and how many corrections bring the answer back"
    analysis = add_command(commands, "analyze", _analyze, purpose)
    analysis.description = (
        "Decodes items with S alone and marks the tokens that F rejects. Then an oracle replaces the first of them by F's own "
        "token, S goes on, and so forth until the answer is right or nothing is rejected."
    )
    _add_task_options(analysis)
    analysis.add_argument("--items", type=words, help="ids, in place of --skip and --limit")
    analysis.add_argument("--mode", choices=SPARSITIES, default=DEFAULTS.sparsity, help="the sparse model (default: %(default)s)")
    add_sparsity_options(analysis)
    analysis.add_argument("--out", metavar="FILE", type=output_file, required=True, help="the coloured transcripts, as HTML")
    analysis.add_argument(
        "--json",
        metavar="FILE",
        type=output_text,
        help="the same as JSON: a summary, and a record per item; - is standard output, and the text goes to standard error",
    )


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, required=True, help="whose items are decoded")
    parser.add_argument(
        "--data", metavar="DIR", type=input_folder, help="folder of the tasks' files (default: the Hugging Face hub)"
    )
    add_setting(
        parser, "--skip", "items left out at the beginning, such as settings were chosen on", 0, metavar="COUNT", type=integer
    )
    add_setting(parser, "--limit", "items at most", metavar="COUNT", type=integer)
    parser.add_argument("--shots", type=integer, help="examples in the prompt (default: 5, or as many as there are)")


def _add_ways(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--jobs", type=integer, default=1, help="processes, each with a model of its own (default: %(default)s)")
    add("--ray", action="store_true", help="the jobs run on the machines of a Ray cluster")
    add(
        "--batch",
        type=integer,
        default=1,
        help="items side by side: much faster, but nothing is timed then (default: %(default)s)",
    )


@reads
def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise ValueError(f"expected i/k with 1 <= i <= k, got {text!r}")
    return index, count


def _plan(options: argparse.Namespace, modes: Sequence[str], **more: Any) -> Plan:
    # Thresholds are for FSparse; `config_of` drops them for the others.
    base = decoding_config(options, sparsity="fsparse", period=getattr(options, "period", PERIOD))
    names = ("model", "dtype", "device", "threads", "weights", "memory", "task", "data", "shots", "skip", "limit", "batch")
    return Plan(
        **{name: getattr(options, name) for name in names if hasattr(options, name)}, modes=tuple(modes), base=base, **more
    )


def _check_used(options: argparse.Namespace) -> None:
    """Not mode by mode: the settings are those of the results file, where other modes may join."""
    accept = getattr(options, "accept", DEFAULTS.accept)
    check_used(options, used_by(SiriusConfig(sparsity="fsparse", accept=accept)), f"--accept {accept}")


def _eval(options: argparse.Namespace) -> int:
    _check_used(options)
    plan = _plan(options, options.modes, shard=options.shard)
    check_distinct(out=options.out, thresholds=plan.base.thresholds)
    run = _runner(options)
    items = plan.items()
    with launched(plan, items, options.out, options.resume) as (plan, items, results, first):
        run(plan, items, results)
    if first:
        report(_title(plan.record()), summarize(results.records, plan.modes), Console())
    return 0


def _report(options: argparse.Namespace) -> int:
    run, records = merge(options.files)
    if not records:
        raise ValueError(f"{', '.join(map(str, options.files))}: no results, only what was run")
    report(_title(run), summarize(records, modes_in(records)), Console())
    if options.out:
        Results.write(options.out, run, records)
    return 0


def _study(options: argparse.Namespace) -> int:
    setting = SETTINGS[options.what]
    try:
        values = [setting.parse(text) for text in options.values] if options.values else setting.values
    except ValueError as error:
        raise ValueError(f"values: expected numbers for {options.what}, got {','.join(options.values)}") from error
    # That of the other studies in the folder, which share the text that has it.
    base = getattr(options, setting.field, values[0])
    if base not in values:
        known = ", ".join(map(str, values))
        raise ValueError(f"{setting.field}: --what {options.what} varies it; expected one of {known}, got {base}")
    _check_used(options)
    need("matplotlib", "eval", "the plot")
    if processes() > 1:
        raise ValueError("study: expected one process, got several; --jobs starts others")
    plan = _plan(options, (options.mode,))
    rows = study(plan, options.what, values, options.out, _runner(options))
    run = {**plan.record(), SETTINGS[options.what].field: "varied"}
    title = f"{options.mode} by {options.what}: {_title(run)}"
    shown = [{**row, "mode": row["mode"] if row["value"] is None else str(row["value"])} for row in rows]
    report(title, shown, Console())
    picture = options.out / f"{options.mode}-{options.what}.png"
    plot(rows, options.what, title, picture)
    picture.with_suffix(".json").write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {picture}")
    return 0


def _analyze(options: argparse.Namespace) -> int:
    plan = _plan(options, (options.mode,))
    config = config_of(options.mode, plan.base)
    check_used(options, used_by(config) | {"threshold"}, f"--mode {options.mode}")
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
        for item in items:
            analyses.append(analyze(engine, TASKS[plan.task], item, config, plan.examples))
            show(analyses[-1], console)
            # After every item, so that a run that is stopped has not been for nothing.
            options.out.write_text(page(analyses, title), encoding="utf-8")
            if options.json is not None and not to_stdout:
                options.json.write_text(record(), encoding="utf-8")
    finally:
        if to_stdout:
            print(record(), end="")
    show_summary(analyses, console)
    console.print(f"written: {options.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def lm_eval(arguments: list[str]) -> int:
    """lm-eval's own command, with the model `sirius` among its models."""
    need("lm_eval", "lm-eval", "lm_eval")
    need("sirius_ext.integrations.lm_eval", "lm-eval", "lm_eval")
    command = need("lm_eval.__main__", "lm-eval", "lm_eval").cli_evaluate
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        command()
    finally:
        sys.argv = before
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


def _title(run: dict[str, Any]) -> str:
    """Of what the first line of a results file says; one that was made by other means may say less."""
    names = ("task", "model", "dtype", "shots", "density", "period")
    known = {name: run.get(name, "?") for name in names}
    if run.get("weights", "plain") != "plain":
        known["dtype"] = f"{run['weights']} of {known['dtype']}"
    return "{task}, {model}, {dtype}, {shots} shots, density {density}, period {period}".format(**known)
