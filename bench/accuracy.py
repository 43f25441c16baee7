"""A summary of result files of `python -m sirius_ext eval`, to be kept: JSON without the texts, and tables in Markdown.

Of a run that was stopped the items count that come before the first unfinished one, so that none is left out for being long.
The tasks of a model are also taken together, in the modes that all of them have.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from common import machine

from sirius_ext.evaluation import load_task, modes_in, read_results, summarize

COLUMNS = "| mode | accuracy | 95 % | +/- | p | AAL | effective density | corrected |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=_named, metavar="MODEL=FILE", help="what to call the model, and eval's --out")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the tasks' files, for their order")
    parser.add_argument("--skip", type=int, default=0, help="as eval's")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    options = parser.parse_args()
    runs = []
    for name, file in options.files:
        run, records = finished(file, options.data, options.skip)
        runs.append({**run, "model": name, "skipped": options.skip, **of_modes(records)})
        runs[-1]["records"] = [{**record, "id": f"{run['task']}/{record['id']}"} for record in records]
    for name in dict.fromkeys(run["model"] for run in runs):
        parts = [run for run in runs if run["model"] == name]
        if len(parts) > 1:
            task = " + ".join(run["task"] for run in parts)
            common = set.intersection(*({record["mode"] for record in run["records"]} for run in parts))
            pooled = [record for run in parts for record in run["records"] if record["mode"] in common]
            runs.append({"model": name, "task": task, **of_modes(pooled)})
    for run in runs:
        run.pop("records", None)
        print(f"**{run['model']}, {run['task']}, {run['items']} items**\n\n{COLUMNS}\n|{'---|' * (COLUMNS.count('|') - 1)}")
        print(*(line(row) for row in run["results"]), "", sep="\n")
    options.out.write_text(json.dumps({"benchmark": "accuracy", "machine": machine(), "runs": runs}, indent=1) + "\n")


def _named(text: str) -> tuple[str, Path]:
    name, file = text.split("=", 1)
    return name, Path(file)


def finished(file: Path, data: Path, skip: int) -> tuple[dict, list[dict]]:
    """What was run, and the records of the items that all modes have."""
    run, records = read_results(file)
    _, items = load_task(run["task"], data)
    done = [{record["id"] for record in records if record["mode"] == mode} for mode in modes_in(records)]
    whole = itertools.takewhile(lambda key: all(key in each for each in done), (item.id for item in items[skip:]))
    kept = set(whole)
    return run, [record for record in records if record["id"] in kept]


def of_modes(records: list[dict]) -> dict:
    modes = modes_in(records)
    return {"items": len({record["id"] for record in records}), "results": summarize(records, modes)}


def line(row: dict) -> str:
    def shown(name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    low, high = row["interval"]
    against = f"+{row['gained']} -{row['lost']}" if "p" in row else ""
    corrects = row["mode"].startswith("sirius")
    cells = [row["mode"], shown("accuracy", ".3f"), f"{low:.2f} to {high:.2f}"]
    cells += [against, shown("p", ".3f"), shown("average_advance_length", ".2f"), shown("effective_density", ".3f")]
    cells.append(shown("corrected_fraction", ".1%") if corrects else "")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
