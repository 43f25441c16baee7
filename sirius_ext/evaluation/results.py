"""Every result kept as soon as it is known, in a file of JSON lines; and what files of results come to, as a table."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.table import Table

from ..decoding.stats import Period, PromptStats, Stats
from ..errors import naming, write_text
from ..models.scratch import is_free, opened
from .modes import NAMED_MODES
from .statistics import mcnemar, wilson

_WIDEST = 10_000  # characters, of a table that is as wide as its cells


class Keeper(Protocol):
    """Who keeps what `evaluate` finds out: `Results`, or who sends it on to them."""

    records: list[dict[str, Any]]

    def add(self, record: dict[str, Any]) -> None: ...

    def done(self) -> set[tuple[str, str]]:
        """(mode, id) of what is known already."""


@contextlib.contextmanager
def claimed(file: Path) -> Iterator[None]:
    """Nobody else writes this file of results meanwhile. ValueError if another run does.

    What is locked is an empty file beside it, which is gone at the end: the results may not be there yet, or be replaced as a
    whole. One that a killed process has left keeps nobody out. On a file system without locks everybody comes in.
    """
    beside = file.with_name(f"{file.name}.lock")
    while True:
        with opened(beside, os.O_RDWR | os.O_CREAT) as handle:
            try:
                free = is_free(handle)
            except OSError:
                free = True
            if not free:
                raise _other_run(file)
            if not _is(handle, beside):
                continue  # it was that of a run that has ended, and has removed it
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink()
            return


def _is(handle: int, path: Path) -> bool:
    """Whether what was opened is still at its path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _other_run(file: Path) -> ValueError:
    return ValueError(f"out: {file}: another run is writing it; wait for its end, or choose another name")


class Results:
    """A file of JSON lines: first what was run, then one line for each item and mode, written as soon as it is known. A run that
    finds nothing out, because there is no such model say, leaves no file. Until `close` no other run can have the file.

    known: records that another file holds; they are not done again. ValueError if the file exists and is not to be resumed, or
    was made by another run, or another run is writing it; a last line that was cut off is dropped.
    """

    def __init__(self, file: Path, run: dict[str, Any], resume: bool, known: Iterable[dict[str, Any]] = ()) -> None:
        self.records: list[dict[str, Any]] = []
        self._known = list(known)
        self._path, self._run = file, run
        self._file: TextIO | None = None
        with contextlib.ExitStack() as claim:
            claim.enter_context(claimed(file))  # what the file says is looked at when nobody else changes it any more
            if file.exists() and not resume:
                raise ValueError(f"out: {file} exists; --resume goes on with it, or choose another name")
            self._goes_on = _has_content(file)
            if self._goes_on:
                first, self.records = read_results(file)
                if different := _difference(first, run):
                    hint = (
                        "--draft-weights same goes on with it, or " if _is_older(first) and "draft_weights" in different else ""
                    )
                    raise ValueError(f"out: {file} was made with another {different}; {hint}choose another name")
            self._claim = claim.pop_all()

    @staticmethod
    def write(file: Path, run: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
        """A whole file at once: the old one is there until the new one is. It is to be `claimed`."""
        new = file.with_name(f"{file.name}.new")
        write_text(new, "".join(json.dumps(line) + "\n" for line in ({"run": run}, *records)))
        new.replace(file)

    def add(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._open()
        self.records.append(record)
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _open(self) -> TextIO:
        if _has_content(self._path) != self._goes_on:
            raise _other_run(self._path)  # where there are no locks
        if self._goes_on:
            _drop_half_a_line(self._path)
        else:
            self.write(self._path, self._run, [])
        return self._path.open("a", encoding="utf-8")

    def done(self) -> set[tuple[str, str]]:
        return {(record["mode"], record["id"]) for record in (*self._known, *self.records)}

    def close(self) -> None:
        with self._claim, naming(self._path):
            if self._file is not None:
                self._file.close()


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _drop_half_a_line(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.truncate(opened.read().rfind(b"\n") + 1)


def read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was run, and the records of a results file, but for a last line that was cut off. ValueError that names the line if it
    is none, or has one item twice in one mode, of which nobody could say which one counts."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a file of results: it is not UTF-8 text ({error.reason})") from error
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    if not lines:
        raise ValueError(f"{file}: not a file of results: {'its only line is cut off' if text else 'it is empty'}")
    found: list[dict[str, Any]] = []
    known: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = _json(line)
            _expect(isinstance(record, dict), "an object", record)
            if number == 1:
                record = record["run"]
                _expect(isinstance(record, dict), "an object as run", record)
            else:
                _check_record(record)
                before = known.setdefault((record["mode"], record["id"]), number)
                if before != number:
                    raise ValueError(f"{record['mode']} has item {record['id']} in line {before} already")
        except KeyError as error:
            raise ValueError(f"{file}: not a file of results: line {number} has no {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(f"{file}: not a file of results: line {number}: {error}") from error
        found.append(record)
    return found[0], found[1:]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected JSON, got {reprlib.repr(line)}") from error


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


def merge(files: Sequence[Path], run: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
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


def summarize(records: Sequence[dict[str, Any]], modes: Sequence[str]) -> list[dict[str, Any]]:
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


def _pooled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
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


def show_table(title: str, caption: str, names: Sequence[str], columns: dict[str, list[str]], console: Console) -> None:
    """A table, or where a terminal is too narrow for it several ones below each other, so that no cell is ever cut. What is not
    a terminal has no width.

    names: of the rows; every table begins with them.
    """

    def table(some: Sequence[str]) -> Table:
        made = Table(padding=(0, 0))
        made.add_column("", no_wrap=True)
        for name in some:
            made.add_column(name, justify="right", no_wrap=True)
        for cells in zip(names, *(columns[name] for name in some)):
            made.add_row(*cells)
        made.width = made.__rich_measure__(console, console.options.update(max_width=_WIDEST)).maximum
        return made

    parts: list[list[str]] = [[]]
    for name in columns:
        if parts[-1] and console.is_terminal and (table([*parts[-1], name]).width or 0) > console.width:
            parts.append([])
        parts[-1].append(name)
    tables = [table(part) for part in parts]
    tables[0].title, tables[-1].caption = title, caption
    for each in tables:
        console.print(each, crop=False)


def report(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The summary as a table."""
    caption = "95 %: Wilson's interval. +/-: items gained and lost against Full; p: McNemar, exact."
    columns = columns_of(rows)
    modes = [mode.replace(":", "\n") for mode in columns.pop("mode")]
    show_table(title, caption, modes, columns, console)
    failures = ", ".join(f"{row['mode']} {row['failed']}" for row in rows if row["failed"])
    if failures:
        console.print(f"failed, and counted as wrong (see the file for the reasons): {failures}")
