"""Decode a task's items in several modes, keep every result at once, and sum up."""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from ..config import ACCEPT_RULES, GREEDY, SiriusConfig
from ..decoding.sequence import Request, Sequence
from ..decoding.sparsity import without_chance
from ..decoding.stats import Period, PromptStats, Stats
from ..engine import Engine, make_copy, prepare
from .batched import Batch, shared_prefix
from .statistics import mcnemar, wilson
from .tasks import Item, Task

T = TypeVar("T")
GREEDY_RULES = tuple(rule for rule in ACCEPT_RULES if rule != "sample")  # which draws
FAILURES = (ValueError, RuntimeError, MemoryError)  # of an item, which then counts as wrong

# What a mode's name makes of a config.
NAMED_MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "csparse": {"mode": "sparse", "sparsity": "csparse", "thresholds": None},
    "fsparse": {"mode": "sparse", "sparsity": "fsparse"},
    "cascade": {"mode": "sparse", "sparsity": "cascade", "thresholds": None},
    "sirius-c": {"mode": "sirius", "sparsity": "csparse", "thresholds": None},
    "sirius-f": {"mode": "sirius", "sparsity": "fsparse"},
    "sirius-cascade": {"mode": "sirius", "sparsity": "cascade", "thresholds": None},
}


# What may be set for one mode, after its name, and how it is read.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "density": float,
    "follow": lambda text: {"yes": True, "no": False}[text],
    "period": lambda text: text if text == "auto" else int(text),
    "tree_width": int,
    "threshold": float,
    "score_temperature": float,
    "accept": lambda text: {rule: rule for rule in GREEDY_RULES}[text],
}


def config_of(mode: str, base: SiriusConfig) -> SiriusConfig:
    """A mode's config: one of NAMED_MODES, and after colons what differs from the base, as in `sirius-c:period=8:threshold=0.2`.

    ValueError for an unknown mode, or a setting that is none or not one of this mode's.
    """
    name, *texts = mode.split(":")
    if name not in NAMED_MODES:
        raise ValueError(f"modes: expected some of {', '.join(NAMED_MODES)}, got {mode!r}")
    own = {}
    for text in texts:
        setting, _, value = text.partition("=")
        usable = SETTINGS if name.startswith("sirius") else () if name == "full" else ("density",)
        if setting in own:
            raise ValueError(f"modes: expected {setting} once, got {mode!r}")
        if setting not in usable:
            raise ValueError(f"modes: expected settings among {', '.join(usable) or 'none'} for {name}, got {mode!r}")
        try:
            own[setting] = SETTINGS[setting](value)
        except (ValueError, KeyError) as error:
            expected = {"follow": "yes or no", "accept": " or ".join(GREEDY_RULES)}.get(setting, "a number")
            raise ValueError(f"modes: expected {expected} for {setting}, got {mode!r}") from error
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | NAMED_MODES[name]
    if "density" in own and values["thresholds"] is not None:
        raise ValueError(f"--thresholds: made for one density, so not for {mode}")
    try:
        return SiriusConfig(**values | own)
    except ValueError as error:
        raise ValueError(f"modes: {mode}: {error}" if own else str(error)) from error


def modes_in(records: Iterable[dict[str, Any]]) -> list[str]:
    """The modes of records in the order of NAMED_MODES, those with settings of their own after the others of their name."""
    found = dict.fromkeys(record["mode"] for record in records)
    return sorted(found, key=lambda mode: (list(NAMED_MODES).index(mode.split(":")[0]), ":" in mode))


class Keeper(Protocol):
    """Who keeps what `evaluate` finds out: `Results`, or who sends it on to them."""

    records: list[dict[str, Any]]

    def add(self, record: dict[str, Any]) -> None: ...

    def done(self) -> set[tuple[str, str]]:
        """(mode, id) of what is known already."""


class Results:
    """A file of JSON lines: first what was run, then one line for each item and mode, written as soon as it is known. A run that
    finds nothing out, because there is no such model say, leaves no file.

    known: records that another file holds; they are not done again. ValueError if the file exists and is not to be resumed, or
    was made by another run; a last line that was cut off is dropped.
    """

    def __init__(self, file: Path, run: dict[str, Any], resume: bool, known: Iterable[dict[str, Any]] = ()) -> None:
        self.records: list[dict[str, Any]] = []
        self._known = list(known)
        self._path, self._run = file, run
        self._file: TextIO | None = None
        if file.exists() and not resume:
            raise ValueError(f"out: {file} exists; resume it, or choose another name")
        if _has_content(file):
            first, self.records = read_results(file)
            if different := _difference(first, run):
                hint = "--draft-weights same goes on with it, or " if _is_older(first) and "draft_weights" in different else ""
                raise ValueError(f"out: {file} was made with another {different}; {hint}choose another name")

    @staticmethod
    def write(file: Path, run: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
        """A whole file at once: the old one is there until the new one is."""
        new = file.with_name(f"{file.name}.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in ({"run": run}, *records)), encoding="utf-8")
        new.replace(file)

    def add(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._open()
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _open(self) -> TextIO:
        if _has_content(self._path):
            _drop_half_a_line(self._path)
        else:
            self.write(self._path, self._run, [])
        return self._path.open("a", encoding="utf-8")

    def done(self) -> set[tuple[str, str]]:
        return {(record["mode"], record["id"]) for record in (*self._known, *self.records)}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _drop_half_a_line(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.truncate(opened.read().rfind(b"\n") + 1)


def read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was run, and the records of a results file, but for a last line that was cut off. ValueError that names the line if it
    is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a file of results: it is not UTF-8 text ({error.reason})") from error
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    if not lines:
        raise ValueError(f"{file}: not a file of results: {'its only line is cut off' if text else 'it is empty'}")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _expect(isinstance(record, dict), "an object", record)
            if number == 1:
                record = record["run"]
                _expect(isinstance(record, dict), "an object as run", record)
            else:
                _check_record(record)
        except KeyError as error:
            raise ValueError(f"{file}: not a file of results: line {number} has no {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(f"{file}: not a file of results: line {number}: {error}") from error
        found.append(record)
    return found[0], found[1:]


def _check_record(record: dict[str, Any]) -> None:
    """ValueError or KeyError if it lacks what `summarize` reads, or has something else there."""
    _expect(str(record["mode"]).split(":")[0] in NAMED_MODES, f"one of {', '.join(NAMED_MODES)} as mode", record["mode"])
    _expect(isinstance(record["id"], (str, int)), "a text as id", record["id"])
    _expect(isinstance(record["correct"], bool), "true or false as correct", record["correct"])
    scores = record.get("scores", {})
    _expect(isinstance(scores, dict) and all(isinstance(score, bool) for score in scores.values()), "scores", scores)
    if "stats" in record:
        stats = record["stats"]
        _expect(isinstance(stats, dict), "an object as stats", stats)
        _expect(isinstance(record["tokens"], list), "a list as tokens", record["tokens"])
        _expect(_is_number(stats["density"]), "a number as density", stats["density"])
        _expect(
            stats["decode_seconds"] is None or _is_number(stats["decode_seconds"]),
            "a number as decode_seconds",
            stats["decode_seconds"],
        )
        periods = stats["periods"]
        whole = isinstance(periods, list) and all(
            isinstance(period, list) and len(period) == 4 and all(isinstance(each, int) for each in period) and period[2] > 0
            for period in periods
        )
        _expect(whole, "a list of [drafted, accepted, committed, cut] as periods", periods)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _expect(true: bool, what: str, value: object) -> None:
    if not true:
        raise ValueError(f"expected {what}, got {reprlib.repr(value)}")


def _is_older(run: dict[str, Any]) -> bool:
    """Whether it was recorded when S read of plain weights what F reads unless something else was said."""
    return "weights" not in run and "draft_weights" not in run


def _difference(found: dict[str, Any], run: dict[str, Any]) -> str:
    """What two runs do not have in common."""
    found, run = ({**each, "draft_weights": "same"} if _is_older(each) else each for each in (found, run))
    return ", ".join(sorted(key for key in {*run, *found} if run.get(key) != found.get(key)))


def merge(files: SequenceOf[Path], run: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run and the records of files of one run, each item and mode once: one that failed gives way to one that did not.

    ValueError if a file was made by another run than `run`, or than the first file.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        first, records = read_results(file)
        run = first if run is None else run
        if different := _difference(first, run):
            raise ValueError(f"{file} was made with another {different}, so it does not go with the others")
        for record in records:
            key = (record["mode"], record["id"])
            if key not in found or "error" in found[key]:
                found[key] = record
    assert run is not None  # it is the first file's
    return run, list(found.values())


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def evaluate(
    engine: Engine,
    task: Task,
    items: SequenceOf[Item],
    modes: SequenceOf[str],
    base: SiriusConfig,
    results: Keeper,
    shots: int,
    console: Console,
    batch: int = 1,
) -> None:
    """Decode what is not in `results` yet, item by item in every mode, so that a run that is stopped has compared the same items.

    An item that fails is recorded as failed, which counts as wrong, and the run goes on.
    base: what S reads of plain weights is no matter of how much memory is free (`without_chance`).
    batch: so many texts side by side. They have no times of their own.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None  # `Plan.engine` has looked
    base = without_chance(base, prepare(engine.model).weights.leave_no_choice)
    configs = {mode: config_of(mode, base) for mode in modes}
    for config in configs.values():
        make_copy(engine.model, config, progress=not console.quiet)  # without memory for it no item could be decoded
    done = results.done()
    # Making one takes seconds with a large vocabulary.
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, list(task.stop))])
    with progress_bar(console) as bar:
        progress = bar.add_task(task.name, total=len(items) * len(modes))
        waiting = [(item, mode) for item in items for mode in modes if (mode, item.id) not in done]
        bar.update(progress, completed=len(items) * len(modes) - len(waiting))

        def keep(item: Item, mode: str, decode: Callable[[], Sequence]) -> None:
            found = _judged(tokenizer, task, item, decode)
            results.add({"mode": mode, "id": item.id, **(found if batch == 1 else found | {"seconds": None})})
            bar.update(progress, advance=1, description=f"{task.name} {running(results.records, modes)}")

        def ask(make: Callable[..., T], item: Item, mode: str) -> T:
            inputs = tokenizer(task.prompt(item, shots), return_tensors="pt")
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            settings = {"max_new_tokens": task.max_new_tokens, "stopping_criteria": stop, **GREEDY}
            return make(**inputs, config=configs[mode], **settings)

        def requests() -> Iterator[tuple[tuple[Item, str], Request]]:
            for item, mode in waiting:
                try:
                    (request,) = ask(engine.requests, item, mode)
                except FAILURES as error:
                    keep(item, mode, functools.partial(_ended, None, error))
                else:
                    yield (item, mode), request

        if batch == 1:
            for item, mode in waiting:
                keep(item, mode, functools.partial(ask, engine.start, item, mode))
        elif waiting:
            prompts = (tokenizer(task.prompt(item, shots))["input_ids"] for item in items)
            texts = Batch(prepare(engine.model), shared_prefix(prompts))
            for (item, mode), sequence, error in texts.decode(requests(), batch):
                keep(item, mode, functools.partial(_ended, sequence, error))


def running(records: Iterable[dict[str, Any]], modes: SequenceOf[str]) -> str:
    """Accuracies so far."""
    shares = []
    for mode in modes:
        scores = [record["correct"] for record in records if record["mode"] == mode]
        shares.append(f"{mode} {sum(scores) / len(scores):.2f}" if scores else mode)
    return ", ".join(shares)


def _ended(sequence: Sequence | None, error: Exception | None) -> Sequence:
    """A text that has ended, unless by an error, which is raised."""
    if sequence is None or error is not None:
        raise error or ValueError("there is no text")
    return sequence


def _judged(tokenizer: PreTrainedTokenizerBase, task: Task, item: Item, decode: Callable[[], Sequence]) -> dict[str, Any]:
    """What is kept of an item: its text, decoded to the end, and how right it is; or why there is none."""
    started = time.perf_counter()
    try:
        sequence = decode()
        stats, tokens = sequence.run(), sequence.tokens
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        verdict = task.judge(item, task.answer_in(text))
    except FAILURES as error:
        return {"correct": False, "error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - started}
    return {
        "correct": verdict.correct,
        "answer": verdict.answer,
        "scores": verdict.scores,
        "text": text,
        "tokens": tokens,
        "stats": {
            **stats.metrics(),
            "prompt_tokens": stats.prompt_tokens,
            "finish": stats.finish,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "density": stats.density,
            "periods": [[period.drafted, period.accepted, period.committed, period.cut] for period in stats.periods],
        },
        "seconds": time.perf_counter() - started,
    }


def _stats(record: dict[str, Any]) -> PromptStats:
    """What a record says of its text's decoding: enough for the metrics of a table, not for those of trees."""
    kept = record["stats"]
    periods = [
        Period(drafted, drafted, accepted, None, committed, cut, []) for drafted, accepted, committed, cut in kept["periods"]
    ]
    return PromptStats(
        mode=record["mode"],
        period=max((period.drafted + 1 for period in periods), default=1),
        density=kept["density"],
        prompt_tokens=kept.get("prompt_tokens", 0),
        tokens=len(record["tokens"]),
        decode_seconds=kept["decode_seconds"],
        periods=periods,
    )


def summarize(records: SequenceOf[dict[str, Any]], modes: SequenceOf[str]) -> list[dict[str, Any]]:
    """Per mode: items, failures, accuracy with Wilson's 95 % interval, what it gained and lost against Full on the items that
    both have and McNemar's p, and the pooled metrics of SPEC section 7."""
    by_mode = {mode: {record["id"]: record for record in records if record["mode"] == mode} for mode in modes}
    full = by_mode.get("full", {})
    rows = []
    for mode, found in by_mode.items():
        right, total = sum(record["correct"] for record in found.values()), len(found)
        row = {"mode": mode, "items": total, "failed": sum("error" in record for record in found.values())}
        row |= {"accuracy": right / total if total else None, "interval": wilson(right, total)}
        if mode != "full" and full:
            both = [(full[key]["correct"], record["correct"]) for key, record in found.items() if key in full]
            gained, lost = both.count((False, True)), both.count((True, False))
            row |= {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
        row["scores"] = {
            name: sum(record.get("scores", {}).get(name, False) for record in found.values()) / total
            for name in next((record["scores"] for record in found.values() if "scores" in record), {})
        }
        rows.append(row | _pooled([record for record in found.values() if "stats" in record]))
    return rows


def _pooled(records: SequenceOf[dict[str, Any]]) -> dict[str, Any]:
    if not records:
        return {}
    stats = Stats(_stats(record) for record in records)
    row = {
        name: getattr(stats, name)
        for name in ("average_advance_length", "effective_density", "corrected_fraction", "ms_per_token")
    }
    if not stats.periods:
        row["effective_density"] = stats.density
    return row


def columns_of(rows: SequenceOf[dict[str, Any]]) -> dict[str, list[str]]:
    """The summary's cells as text, column by column; columns that no row has anything for are left out."""

    def shown(name: str, form: str) -> list[str]:
        return ["" if row.get(name) is None else format(row[name], form) for row in rows]

    columns = {
        "mode": [row["mode"] for row in rows],
        "items": shown("items", "d"),
        "accuracy": shown("accuracy", ".3f"),
        "95 %": ["{:.2f}-{:.2f}".format(*row["interval"]) for row in rows],
        "+/-": [f"+{row['gained']} -{row['lost']}" if "p" in row else "" for row in rows],
        "p": shown("p", ".3f"),
        "AAL": shown("average_advance_length", ".2f"),
        "density": shown("effective_density", ".3f"),
        "corrected": shown("corrected_fraction", ".1%"),
        "ms/token": shown("ms_per_token", ".0f"),
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def report(title: str, rows: SequenceOf[dict[str, Any]], console: Console) -> None:
    """The summary as a table."""
    caption = "95 %: Wilson's interval. +/-: items gained and lost against Full; p: McNemar, exact."
    table = Table(title=title, caption=caption, padding=(0, 0))
    columns = columns_of(rows)
    columns["mode"] = [mode.replace(":", "\n") for mode in columns["mode"]]
    for name in columns:
        table.add_column("" if name == "mode" else name, justify="left" if name == "mode" else "right", no_wrap=True)
    for cells in zip(*columns.values()):
        table.add_row(*cells)
    console.print(table)
    failures = ", ".join(f"{row['mode']} {row['failed']}" for row in rows if row["failed"])
    if failures:
        console.print(f"failed, and counted as wrong (see the file for the reasons): {failures}")
