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

from sirius_ext.evaluation import columns_of, load_task, modes_in, read_results, summarize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=_named, metavar="MODEL=FILE", help="what to call the model, and eval's --out")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the tasks' files, for their order")
    parser.add_argument("--skip", type=int, default=0, help="as eval's")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    options = parser.parse_args()
    runs, by_model = [], {}
    for name, file in options.files:
        run, records = finished(file, options.data, options.skip)
        runs.append({**run, "model": name, "skipped": options.skip, **of_modes(records)})
        by_model.setdefault(name, {})[run["task"]] = records
    for name, tasks in by_model.items():
        if len(tasks) > 1:
            runs.append({"model": name, "task": " + ".join(tasks), **of_modes(pooled(tasks))})
    for run in runs:
        print(f"**{run['model']}, {run['task']}, {run['items']} items**\n\n{markdown(run['results'])}\n")
    options.out.write_text(json.dumps({"benchmark": "accuracy", "machine": machine(), "runs": runs}, indent=1) + "\n")


def _named(text: str) -> tuple[str, Path]:
    name, is_given, file = text.partition("=")
    if not is_given or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"expected MODEL=FILE with a file of results, got {text!r}")
    return name, Path(file)


def finished(file: Path, data: Path, skip: int) -> tuple[dict, list[dict]]:
    """What was run, and the records of the items that all modes have."""
    run, records = read_results(file)
    _, items = load_task(run["task"], data)
    done = [{record["id"] for record in records if record["mode"] == mode} for mode in modes_in(records)]
    whole = itertools.takewhile(lambda key: all(key in each for each in done), (item.id for item in items[skip:]))
    kept = set(whole)
    return run, [record for record in records if record["id"] in kept]


def pooled(tasks: dict[str, list[dict]]) -> list[dict]:
    """The records of several tasks, in the modes that all of them have."""
    common = set.intersection(*(set(modes_in(records)) for records in tasks.values()))
    return [
        {**record, "id": f"{task}/{record['id']}"}
        for task, records in tasks.items()
        for record in records
        if record["mode"] in common
    ]


def of_modes(records: list[dict]) -> dict:
    modes = modes_in(records)
    return {"items": len({record["id"] for record in records}), "results": summarize(records, modes)}


def markdown(rows: list[dict]) -> str:
    columns = columns_of(rows)
    del columns["items"]  # the heading has them
    lines = [columns, ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
