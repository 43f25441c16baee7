"""The evaluation's part of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console

from ..config import SPARSITIES
from ..options import DEFAULTS, add_command, add_decoding_options, add_sparsity_options, check_folder, decoding_config
from .analyze import analyze, summary
from .extras import need
from .jobs import by_processes, by_ray, launched, processes
from .plan import Plan
from .runner import MODES, Results, config_of, merge, modes_in, report, summarize
from .study import SETTINGS, Runner, plot, study
from .tasks import TASKS, Item
from .transcript import page, show, show_summary


def add(commands) -> None:
    """Add the commands to the subparsers of the command line."""
    _add_eval(commands)
    _add_report(commands)
    _add_study(commands)
    _add_analyze(commands)
    # For the list of commands alone: what stands behind it goes to `lm_eval` unread.
    commands.add_parser("lm_eval", help="EleutherAI's harness with the model `sirius`; its own options follow")


def _add_eval(commands) -> None:
    suite = add_command(commands, "eval", _eval, "accuracy of a task in several modes, on the same items")
    suite.description = "Few-shot, generated answers. Each result goes to a file of JSON lines as soon as it is known."
    _add_task_options(suite)
    suite.add_argument("--out", metavar="FILE", type=Path, required=True)
    suite.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        default=",".join(MODES),
        help="some of these, also with settings of their own, as in sirius-c:period=8:threshold=0.2",
    )
    _add_ways(suite)
    suite.add_argument("--shard", type=_shard, default="1/1", help="i/k: the i-th of k parts of the items")
    suite.add_argument("--resume", action="store_true", help="go on with what --out holds")
    add_decoding_options(suite)


def _add_report(commands) -> None:
    table = commands.add_parser("report", help="the table of one or several result files of eval: those of shards make one")
    table.set_defaults(command=_report)
    table.add_argument("files", metavar="FILE", nargs="+", type=Path)
    table.add_argument("--out", metavar="FILE", type=Path, help="write the records of all files into one")


def _add_study(commands) -> None:
    study = add_command(commands, "study", _study, "accuracy and effective density against one setting, with a plot")
    study.description = (
        "Decodes the same items with each value of a setting, and by the full model. What --out holds already is not done again."
    )
    study.add_argument("--what", choices=SETTINGS, required=True, help="the setting that varies; the options below fix the rest")
    study.add_argument("--values", type=lambda text: text.split(","), help="of the setting, with commas between them")
    study.add_argument("--mode", choices=[mode for mode in MODES if mode.startswith("sirius")], default="sirius-c")
    _add_task_options(study)
    _add_ways(study)
    study.add_argument("--out", metavar="FOLDER", type=Path, required=True)
    add_decoding_options(study)


def _add_analyze(commands) -> None:
    purpose = "which tokens of the sparse model the full one rejects, and how many corrections bring the answer back"
    analysis = add_command(commands, "analyze", _analyze, purpose)
    analysis.description = (
        "Decodes items with S alone and marks the tokens that F rejects. Then an oracle replaces the first of them by F's own "
        "token, S goes on, and so forth until the answer is right or nothing is rejected."
    )
    _add_task_options(analysis)
    analysis.add_argument("--items", type=lambda text: text.split(","), help="ids, in place of --skip and --limit")
    analysis.add_argument("--mode", choices=SPARSITIES, default=DEFAULTS.sparsity, help="the sparse model")
    add_sparsity_options(analysis)
    analysis.add_argument("--out", metavar="FILE", type=Path, required=True, help="the coloured transcripts, as HTML")
    analysis.add_argument("--json", metavar="FILE", type=Path, help="the same as JSON: a summary, and a record per item")


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder of the tasks' files (default: the Hugging Face hub)")
    parser.add_argument("--skip", type=int, default=0, help="items left out at the beginning, such as settings were chosen on")
    parser.add_argument("--limit", type=int, help="items at most")
    parser.add_argument("--shots", type=int, help="examples in the prompt (default: 5, or as many as there are)")


def _add_ways(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--ray", action="store_true", help="the jobs run on the machines of a Ray cluster")
    parser.add_argument("--batch", type=int, default=1, help="items side by side: much faster, but nothing is timed then")


def _shard(text: str) -> tuple[int, int]:
    index, count = (int(part) for part in text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(text)
    return index, count


def _plan(options: argparse.Namespace, modes: tuple[str, ...], **more) -> Plan:
    # Thresholds are for FSparse; `config_of` drops them for CSparse.
    accept = getattr(options, "accept", None) or DEFAULTS.accept
    base = decoding_config(options, sparsity="fsparse", accept=accept)
    names = ("model", "dtype", "device", "threads", "task", "data", "shots", "skip", "limit", "batch")
    return Plan(
        **{name: getattr(options, name) for name in names if hasattr(options, name)}, modes=tuple(modes), base=base, **more
    )


def _eval(options: argparse.Namespace) -> int:
    plan = _plan(options, options.modes, shard=options.shard)
    items = plan.items()
    check_folder("--out", options.out)
    run = _runner(options)
    with launched(plan, items, options.out, options.resume) as (plan, items, results, first):
        run(plan, items, results)
    if first:
        report(_title(plan.record()), summarize(results.records, plan.modes), Console())
    return 0


def _report(options: argparse.Namespace) -> int:
    run, records = merge(options.files)
    report(_title(run), summarize(records, modes_in(records)), Console())
    if options.out:
        check_folder("--out", options.out)
        Results.write(options.out, run, records)
    return 0


def _study(options: argparse.Namespace) -> int:
    setting = SETTINGS[options.what]
    try:
        values = [setting.parse(text) for text in options.values] if options.values else setting.values
    except ValueError as error:
        raise ValueError(f"--values: expected numbers for {options.what}, got {','.join(options.values)}") from error
    need("matplotlib", "eval", "the plot")
    check_folder("--out", options.out)
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
    items = plan.items()
    if options.items:
        by_id = {item.id: item for item in dataclasses.replace(plan, skip=0, limit=None).items()}
        unknown = [name for name in options.items if name not in by_id]
        if unknown:
            raise ValueError(f"--items: {plan.task} has no {', '.join(unknown)}; its first ids are {', '.join(list(by_id)[:3])}")
        items = [by_id[name] for name in options.items]
    check_folder("--out", options.out)
    check_folder("--json", options.json)
    engine, config = plan.engine(), config_of(options.mode, plan.base)
    title = f"{plan.task}, {plan.model}, {options.mode}, density {config.density}, threshold {config.threshold}"
    console, analyses = Console(), []
    for item in items:
        analyses.append(analyze(engine, TASKS[plan.task], item, config, plan.shots))
        show(analyses[-1], console)
        # After every item, so that a run that is stopped has not been for nothing.
        options.out.write_text(page(analyses, title), encoding="utf-8")
        if options.json:
            record = {"summary": summary(analyses), "items": [dataclasses.asdict(analysis) for analysis in analyses]}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show_summary(analyses, console)
    print(f"written: {options.out}")
    return 0


def lm_eval(arguments: list[str]) -> int:
    """lm-eval's own command, with the model `sirius` among its models."""
    need("lm_eval", "lm-eval", "lm_eval")
    need("sirius_ext.evaluation.harness", "lm-eval", "lm_eval")
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
        raise ValueError(f"--jobs: expected at least 1, got {options.jobs}")
    console = Console(stderr=True)
    if options.ray or options.jobs > 1:
        if processes() > 1:
            raise ValueError("--jobs: there are several processes already, which share the items; --jobs and --ray start others")
        over = by_ray if options.ray else by_processes
        return lambda plan, items, results: over(plan, items, results, options.jobs, console)
    engines = []

    def here(plan: Plan, items: list[Item], results: Results) -> None:
        if not engines:
            engines.append(plan.engine())
        plan.carry_out(engines[0], items, results, console)

    return here


def _title(run: dict) -> str:
    return "{task}, {model}, {dtype}, {shots} shots, density {density}, period {period}".format(**run)
