"""Tokens per second of models that are larger than the memory: ours, llama.cpp through mmap, and `transformers` with accelerate's
disk offload.

Every contestant decodes in a process of its own, inside a memory cgroup of the budget and a margin, after its model's files have
been dropped from the page cache. Rounds alternate; quoted are medians of the decoding speed, prefill excluded. To be killed for
want of memory is a result. Linux only, as root; `--limit watch` needs neither root nor cgroups, and limits less (confined.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from common import console, header, in_turn, save
from confined import LIMITS, NoCgroup, Outcome, files_in, make_cold, run
from flags import about
from llama_cpp import KINDS, check_named, converted
from prompts import PROMPTS
from rich.table import Table
from shapes import SHAPES, random_checkpoint, shape_of
from tables import link_busy
from variants import advances, check_known, check_sparsities, full_of, own_arguments, own_variants, words

from sirius_ext.loading import parse_weights
from sirius_ext.models.hub import cache_dir, parse_dtype, tiers_of
from sirius_ext.runtime.speeds import direct_read_speed

CHILD = Path(__file__).with_name("contestants.py")
COLD = 0.01  # of a model's files, what may stay in the page cache without a word
DEFAULTS = {"sparsities": ["csparse"], "periods": ["auto"], "widths": [1]}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """job: what contestants.py is told beside what all are told. files: what it reads its model from. full: the variant that it
    is compared with, if any."""

    name: str
    job: dict
    files: tuple[Path, ...]
    full: str | None = None


# ---------------------------------------------------------------------------------------------------------------- what came out


def measured(events: Iterable[dict], advance: float | None = None) -> dict:
    """What the events of one process say, as far as it came.

    advance: tokens of a period, given; speed is then this over the median time of a whole period, in place of the text's own.
    Of each text the first tokens end its prefill; the speed is that of those after it.
    """
    found: dict = {"load_seconds": None, "prefill_seconds": 0.0, "tokens": 0, "decode_seconds": 0.0}
    read = {"load": 0, "prefill": 0, "decode": 0}
    before = first = None
    for event in events:
        passed = 0.0 if before is None else event["time"] - before["time"]
        took = event["read"] - (0 if before is None else before["read"])
        match event["event"]:
            case "loaded":
                found |= {"load_seconds": passed} | ({"plan": event["plan"]} if "plan" in event else {})
                read["load"] += took
            case "prompt":
                first = None
            case "tokens" if first is None:
                first = event
                found["prefill_seconds"] += passed
                read["prefill"] += took
            case "tokens":
                found["tokens"] += event["count"]
                found["decode_seconds"] += passed
                read["decode"] += took
            case "finished" if "stats" in event:
                found |= {name: event[name] for name in ("stats", "full_passes")}
                if advance is not None and event["periods"]:
                    found["ms_per_period"] = 1e3 * statistics.median(event["periods"])
        before = event
    speed = found["tokens"] / found["decode_seconds"] if found["decode_seconds"] else None
    if advance is not None:
        speed = 1e3 * advance / found["ms_per_period"] if "ms_per_period" in found else None
    return {**found, "tokens_per_second": speed, "read_bytes": read}


def record_of(outcome: Outcome, advance: float | None = None) -> dict:
    """One run, for the file of results."""
    events = [json.loads(line) for line in outcome.lines if line.startswith('{"event"')]
    return {
        "end": outcome.end,
        **({"error": outcome.error.strip().splitlines()[-1]} if outcome.error else {}),
        **measured(events, advance),
        "peak_bytes": outcome.peak,
        "peak_anonymous_bytes": outcome.anonymous,
        "peak_file_bytes": outcome.file,
    }


def pooled(runs: Sequence[dict]) -> dict:
    """What several runs of a contestant come to: medians of what they have, the highest peak, and the end of the first run that
    did not finish, if one did not."""
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    ends = [run["end"] for run in runs]
    return {
        "end": next((end for end in ends if end != "finished"), "finished"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
        "runs": list(runs),
    }


# ---------------------------------------------------------------------------------------------------------------- a benchmark


class Offload:
    """options: those of `parse`. contestants, prompts: lists of tokens."""

    def __init__(self, options: argparse.Namespace, contestants: Sequence[Contestant], prompts: list[list[int]]) -> None:
        self.options, self.contestants = options, contestants
        self._told = {
            "prompts": prompts,
            "max_new_tokens": options.max_new_tokens,
            "seconds": options.seconds,
            "threads": options.threads or torch.get_num_threads(),
            "dtype": options.dtype,
        }
        self._warm: set[str] = set()  # those of which it was said that their files do not leave the page cache
        self.record: dict = {
            "benchmark": "offload",
            "model": options.name,
            "weights": "random" if options.shape else "real",
            "dtype": options.dtype,
            "prompts": "random" if options.shape else options.prompts,
            "max_new_tokens": options.max_new_tokens,
            "seconds": options.seconds,
            "margin_bytes": options.margin,
            "limit": None,
            "disk_bytes_per_second": None,
            "results": [],
        }

    def measure(self) -> dict:
        """Everything, saved after each run. Returns what is saved. NoCgroup where one is wanted and cannot be made."""
        options = self.options
        largest = max((file for each in self.contestants for file in files_in(each.files)), key=lambda file: file.stat().st_size)
        make_cold([largest])
        self.record["disk_bytes_per_second"] = direct_read_speed(largest)
        for memory in options.memory:
            runs: dict[str, list[dict]] = {each.name: [] for each in self.contestants}
            records: dict[str, dict] = {}
            variants: dict[str, Callable[[], dict]] = {
                each.name: lambda each=each, memory=memory: self._run(each, memory) for each in self.contestants
            }
            for name, found in in_turn(variants, options.rounds, f"{shown_memory(memory)}, decoding"):
                runs[name].append(found)
                if name not in records:
                    full = next(each.full for each in self.contestants if each.name == name)
                    records[name] = {"variant": name, "full": full, "memory_bytes": memory}
                    self.record["results"].append(records[name])
                records[name] |= pooled(runs[name])
                save(options.out, self.record, last=False)
        return self.record

    def _run(self, contestant: Contestant, memory: int | None) -> dict:
        """One process, from its start to its end."""
        options = self.options
        files = files_in(contestant.files)
        cached, size = make_cold(files), sum(file.stat().st_size for file in files)
        if cached > COLD * size and contestant.name not in self._warm:
            self._warm.add(contestant.name)
            console.print(
                f"{contestant.name}: {cached / size:.0%} of its files stay in the page cache (another process has mapped "
                "them, or the file system keeps them): its reads are not those of a cold start"
            )
        limit = LIMITS[options.limit](None if memory is None else memory + options.margin)
        self.record["limit"] = limit.kind
        with tempfile.TemporaryDirectory() as scratch:
            job = {**self._told, **contestant.job, "memory": memory, "scratch": scratch}
            outcome = run([sys.executable, str(CHILD)], json.dumps(job), limit, options.timeout)
        found = record_of(outcome, contestant.job.get("advance"))
        if "error" in found:
            console.print(f"{contestant.name}, {shown_memory(memory)}: failed: {found['error']}")
        return {**found, "cached_bytes_before": cached}


def contestants(options: argparse.Namespace, model: Path) -> list[Contestant]:
    """Those that are asked for. model: the folder of the model's safetensors."""
    found = []
    asked = lambda name: not options.only or any(part in name for part in options.only)  # noqa: E731
    for name, config, weights in own_variants(options, divided=True):
        if not asked(name):
            continue
        job = {
            "contestant": "ours",
            "model": str(model),
            "weights": weights,
            "config": dataclasses.asdict(config),
        }
        if options.shape and config.mode == "sirius":
            job["advance"] = options.advance[config.period]
            job["config"]["threshold"] = 0.0  # every draft is accepted, so that a period does all of its work
        files = (model, cache_dir() / "tiers", cache_dir() / "packed")
        found.append(Contestant(name, job, files, full_of(weights)))
    if options.gguf is not None and "llama.cpp" not in options.skip:
        for kind in (kind for kind in options.llama_types if asked(f"llama.cpp {kind}")):
            file = converted(options.gguf, kind)
            found.append(Contestant(f"llama.cpp {kind}", {"contestant": "llama.cpp", "model": str(file)}, (file,)))
    if "transformers" not in options.skip and asked(name := "transformers, disk offload"):
        found.append(Contestant(name, {"contestant": "transformers", "model": str(model)}, (model,)))
    return found


def prepare_files(options: argparse.Namespace, model: Path, given: Sequence[Contestant]) -> None:
    """Write what ours reads from when not all is in memory into the cache folder, if it is not there: once, and not within the
    limit."""
    if set(options.memory) != {None}:
        for weights in dict.fromkeys(each.job["weights"] for each in given if each.job["contestant"] == "ours"):
            tiers_of(model, parse_dtype(options.dtype), weights)


def folder_of(options: argparse.Namespace) -> Path:
    """That of the model's files; of random weights one is made in the cache folder, once."""
    if options.shape:
        return random_checkpoint(options.shape, cache_dir() / "random", parse_dtype(options.dtype))
    if Path(options.model).is_dir():
        return Path(options.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(options.model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))


def tokens_of(options: argparse.Namespace, model: Path) -> list[list[int]]:
    """The prompts; random ones for random weights."""
    if options.shape:
        torch.manual_seed(0)
        return [torch.randint(SHAPES[options.shape].vocab, (options.context,)).tolist()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(PROMPTS[name]).input_ids for name in options.prompts]


# ---------------------------------------------------------------------------------------------------------------- flags, report


def memory_of(text: str) -> int | None:
    """Bytes; None for "all"."""
    return None if text == "all" else round(float(text) * 1e9)


def shown_memory(memory: int | None) -> str:
    return "no limit" if memory is None else f"{memory / 1e9:g} GB"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """SystemExit with the reason for what cannot be run."""
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="Hugging Face id or folder with safetensors")
    parser.add_argument("--name", help="what the results call the model, if not by its id or the folder's name")
    parser.add_argument("--shape", help="random weights instead of a model, of the size of " + ", ".join(SHAPES))
    parser.add_argument(
        "--advance", type=advances, default="", help="with --shape: PERIOD=TOKENS that a period was measured to commit"
    )
    parser.add_argument("--context", type=int, default=256, help="with --shape: tokens of the prompt")
    parser.add_argument("--gguf", type=Path, help="the same model as GGUF, for llama.cpp")
    parser.add_argument(
        "--llama-types", type=words, default="own,q8_0,bf16", help=f"of {', '.join(KINDS)}; own is the file as it is"
    )
    parser.add_argument("--dtype", default="bfloat16")
    own_arguments(parser, lambda name: f"({DEFAULTS[name]})")
    parser.add_argument(
        "--memory",
        type=lambda text: [memory_of(part) for part in text.split(",")],
        default="1.2,1.6,2.0,2.4",
        help="budgets in GB; all is no limit, and no argument for the engine",
    )
    parser.add_argument("--margin", type=memory_of, default="0.3", help="GB that a process has beside its budget")
    parser.add_argument("--limit", default="cgroup", choices=sorted(LIMITS), help="watch limits a process' own pages alone")
    parser.add_argument("--prompts", type=words, default=",".join(PROMPTS), help="of " + ", ".join(PROMPTS))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of decoding, after which a text ends as it is")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of a process, after which it is ended")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", type=words, default="", help="of transformers, llama.cpp")
    parser.add_argument("--only", type=words, default=None, help="parts of names; contestants without any of them are left out")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    if options.name is None:
        options.name = options.shape or (Path(options.model).resolve().name if Path(options.model).is_dir() else options.model)
    return options


def check(options: argparse.Namespace) -> None:
    """ValueError for what cannot be run."""
    if (options.model is None) == (options.shape is None):
        raise ValueError("model: expected either a model or a shape, got " + ("both" if options.model else "neither"))
    for weights in options.weights:
        parse_weights(weights)
    parse_dtype(options.dtype)
    check_sparsities(options.sparsities)
    check_named(options)
    check_known("prompts", options.prompts, PROMPTS)
    if options.shape is None:
        if options.advance:
            raise ValueError("advance: only with a shape, whose weights are random; a model has its own")
        return
    shape_of(options.shape)
    options.accepts = ["threshold"]  # random weights match nothing; every draft is then accepted
    if options.lookup:
        raise ValueError("lookup: not with a shape, whose texts are random")
    if "auto" in options.periods or set(options.periods) - set(options.advance):
        raise ValueError(
            "advance: with a shape expected PERIOD=TOKENS for each of --periods, as measured on a real model, "
            f"got periods {', '.join(map(str, options.periods))} and {options.advance or 'nothing'}"
        )


def report(record: dict) -> None:
    """Print it, one table a budget."""
    for memory in dict.fromkeys(r["memory_bytes"] for r in record["results"]):
        rows = [r for r in record["results"] if r["memory_bytes"] == memory]
        speeds = {r["variant"]: r["tokens_per_second"] for r in rows}
        table = Table(title=f"{record['model']}, {record['weights']} weights, {shown_memory(memory)} ({record['limit']})")
        columns = ("", "tokens/s", "vs Full", "prefill s", "load s", "own GB", "cache GB", "read GB/token", "link busy", "end")
        for column in columns:
            table.add_column(column, justify="left" if column == "" else "right")
        for r in rows:
            run = r["runs"][-1]
            full = speeds.get(r["full"])
            per_token = run["read_bytes"]["decode"] / run["tokens"] / 1e9 if run["tokens"] else None
            table.add_row(
                r["variant"],
                _shown(r["tokens_per_second"], "{:.3f}"),
                _shown(r["tokens_per_second"] and full and r["tokens_per_second"] / full, "{:.2f}"),
                _shown(run["prefill_seconds"] or None, "{:.1f}"),
                _shown(run["load_seconds"], "{:.1f}"),
                f"{r['peak_anonymous_bytes'] / 1e9:.2f}",
                f"{max(each['peak_file_bytes'] for each in r['runs']) / 1e9:.2f}",
                _shown(per_token, "{:.3f}"),
                _shown(link_busy(run), "{:.0%}"),
                r["end"],
            )
        console.print(table)
    speed = record["disk_bytes_per_second"]
    console.print(
        "own: pages of the process alone; cache: of files that it has read, both at their most. Disk: "
        + (f"{speed / 1e9:.2f} GB/s of direct reads." if speed else "takes no direct reads.")
    )
    if record["limit"] == "watched":
        console.print(
            "Without a cgroup the page cache was not limited: what reads its model through it had all of the machine's."
        )
    if record["weights"] == "random":
        console.print("Weights are random: of Sirius it is the measured time of a whole period over the advance that was given.")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process and no cgroup is left
    header()
    model = folder_of(options)
    bench = Offload(options, contestants(options, model), tokens_of(options, model))
    if not bench.contestants:
        raise SystemExit(f"only: no contestant has any of {', '.join(options.only)} in its name")
    prepare_files(options, model, bench.contestants)
    try:
        record = bench.measure()
    except NoCgroup as error:
        raise SystemExit(f"{error}. `--limit watch` does without, and limits less: page cache is left out") from error
    report(record)
    save(options.out, record)


if __name__ == "__main__":
    main()
