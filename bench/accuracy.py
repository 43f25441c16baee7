"""A summary of result files of `python -m sirius_ext eval`, to be kept: JSON without the texts, and a table in Markdown.

Of a run that was stopped the items count that come before the first unfinished one, so that none is left out for being long.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import machine

from sirius_ext.evaluation import load_task, modes_in, read_results, summarize

COLUMNS = "| model | task | items | mode | accuracy | 95 % | +/- | p | AAL | effective density | corrected |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=_named, metavar="MODEL=FILE", help="what to call the model, and eval's --out")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the tasks' files, for their order")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    options = parser.parse_args()
    runs = [run_of(file, name, options.data) for name, file in options.files]
    options.out.write_text(json.dumps({"benchmark": "accuracy", "machine": machine(), "runs": runs}, indent=1) + "\n")
    print(f"{COLUMNS}\n|{'---|' * (COLUMNS.count('|') - 1)}")
    for run in runs:
        for row in run["results"]:
            print(line(run, row))


def _named(text: str) -> tuple[str, Path]:
    name, file = text.split("=", 1)
    return name, Path(file)


def run_of(file: Path, name: str, data: Path) -> dict:
    """What was run, and a row for every mode."""
    run, records = read_results(file)
    _, items = load_task(run["task"], data)
    modes = modes_in(records)
    done = {mode: {record["id"] for record in records if record["mode"] == mode} for mode in modes}
    order = [item.id for item in items]
    whole = next((i for i, key in enumerate(order) if not all(key in done[mode] for mode in modes)), len(order))
    first = set(order[:whole])
    return {**run, "model": name, "items": whole, "results": summarize([r for r in records if r["id"] in first], modes)}


def line(run: dict, row: dict) -> str:
    def shown(name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    low, high = row["interval"]
    against = f"+{row['gained']} -{row['lost']}" if "p" in row else ""
    corrects = row["mode"].startswith("sirius")
    cells = [run["model"], run["task"], str(row["items"]), row["mode"], shown("accuracy", ".3f"), f"{low:.2f} to {high:.2f}"]
    cells += [against, shown("p", ".3f"), shown("average_advance_length", ".2f"), shown("effective_density", ".3f")]
    cells.append(shown("corrected_fraction", ".1%") if corrects else "")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
