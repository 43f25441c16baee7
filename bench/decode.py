"""Tokens per second of Full, CSparse and Sirius, with weights as they come or in eight bits, against `transformers`' own generate
and llama.cpp.

Every variant decodes the same prompts greedily, in alternating rounds; quoted are medians of the pooled decoding speed (prefill
excluded) and their ratios. llama.cpp runs in a process of its own, as its users run it. With `--shape` or `--context` it is
milliseconds per token instead, after prompts of these lengths: see latency.py.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import latency
import torch
from common import alternate, console, header, save
from flags import about, positive
from llama_cpp import KINDS, LlamaCpp, check_named, gguf_of, running
from prompts import PROMPTS
from rich.table import Table
from shapes import SHAPES, shape_of
from variants import advances, check_known, check_sparsities, draft_of, full_of, numbers, own_arguments, own_variants, words

from sirius_ext import Engine, SiriusConfig, Stats
from sirius_ext.cli.streamer import KeepingStreamer
from sirius_ext.config import GREEDY
from sirius_ext.engine import device_of, prepare, release
from sirius_ext.loading import DEFAULT_MODEL, WEIGHTS
from sirius_ext.models.hub import parse_dtype


class Silent(KeepingStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        pass


class TimedHandle:
    """Counts the time inside the extension, so that what is left is Python's."""

    def __init__(self, handle) -> None:
        self._handle, self.seconds = handle, 0.0

    def step(self, **fields) -> None:
        started = time.perf_counter()
        self._handle.step(**fields)
        self.seconds += time.perf_counter() - started

    def __getattr__(self, name: str):
        return getattr(self._handle, name)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.limit = options, options.max_new_tokens
        dtype = parse_dtype(options.dtype)
        self.engines = {
            weights: Engine.from_pretrained(options.model, config, device=options.device, dtype=dtype, weights=weights)
            for weights in options.weights
            for config in [SiriusConfig(draft_weights=draft_of(weights, options.draft_weights[0]))]
        }
        self.engine = self.engines[options.weights[0]]
        encoded = (self.engine.tokenizer(PROMPTS[name], return_tensors="pt") for name in options.prompts)
        self.prompts = [inputs.input_ids.to(options.device) for inputs in encoded]
        self.stats: dict[str, Stats] = {}
        self.overhead: dict[str, float] = {}
        self.texts: dict[str, list[list[int]]] = {}
        self.full: dict[str, str] = {}  # the row that one of ours is compared with

    def transformers(self, **settings) -> float:
        if self.options.device == "cpu":
            release(self.engine.model)  # the weights as transformers loaded them; elsewhere our graphs would go with them
        tokens, seconds = 0, 0.0
        for ids in self.prompts:
            streamer = Silent(self.engine.tokenizer)
            mask = torch.ones_like(ids)
            self.engine.model.generate(
                ids, attention_mask=mask, streamer=streamer, max_new_tokens=self.limit, **GREEDY, **settings
            )
            tokens += len(streamer.tokens) - 1
            seconds += streamer.last - streamer.first
        return tokens / seconds

    def sirius(self, name: str, config: SiriusConfig, weights: str) -> float:
        engine = self.engines[weights]
        ready = prepare(engine.model)
        handle_of, timed = ready._handle_of, []
        ready._handle_of = lambda sparsity: timed.append(TimedHandle(handle_of(sparsity))) or timed[-1]
        try:
            outputs = [engine.generate(ids, config=config, max_new_tokens=self.limit, **GREEDY) for ids in self.prompts]
        finally:
            del ready._handle_of
        inside = sum(handle.seconds for handle in timed)
        stats = Stats(prompt for output in outputs for prompt in output.stats.prompts)
        self.stats[name] = stats
        if self.options.device == "cpu":  # elsewhere a call returns before its work is done
            self.overhead[name] = 1 - inside / stats.decode_seconds
        self.texts[name] = [output.sequences[0, ids.shape[1] :].tolist() for output, ids in zip(outputs, self.prompts)]
        # x0 comes out of the prefill
        return (stats.tokens - len(stats.prompts)) / stats.decode_seconds

    def llama_cpp(self, process: LlamaCpp) -> float:
        runs = [process.generate(ids[0].tolist(), self.limit) for ids in self.prompts]
        return sum(run["tokens"] - 1 for run in runs) / sum(run["seconds"] for run in runs)

    def variants(self) -> dict[str, Callable[[], float]]:
        options = self.options
        variants: dict[str, Callable[[], float]] = {}

        if "transformers" not in options.skip and "plain" in self.engines:
            variants["transformers"] = self.transformers
            if "static" not in options.skip:
                variants["transformers, static cache"] = lambda: self.transformers(cache_implementation="static")
        for name, config, weights in own_variants(options):
            variants[name] = lambda name=name, config=config, weights=weights: self.sirius(name, config, weights)
            self.full[name] = full_of(weights)
        return variants


# What is measured if nothing else is asked for: of a model's texts, and of its latency.
DEFAULTS = {
    "texts": {
        "widths": [1],
        "periods": [4, 8, 16, "auto"],
        "sparsities": ["csparse"],
        "max_new_tokens": 64,
        "context": [],
    },
    "latency": {
        "widths": [1, 4, 8],
        "periods": [16],
        "sparsities": ["csparse", "fsparse"],
        "max_new_tokens": 256,
        "context": [512, 1024, 4096],
    },
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """SystemExit with the reason for what cannot be run."""
    parser = argparse.ArgumentParser(description=about(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = lambda name: f"({DEFAULTS['texts'][name]}, for latency {DEFAULTS['latency'][name]})"  # noqa: E731
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id, local folder or GGUF file")
    parser.add_argument("--shape", help="random weights instead of a model, of the size of " + ", ".join(SHAPES))
    parser.add_argument("--context", type=numbers(int), help="lengths of prompts; asks for latency, as --shape does")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--gguf", type=Path, help="the same model as GGUF, for llama.cpp (known for the default model)")
    parser.add_argument("--llama-types", type=words, default="bf16", help=f"of {', '.join(KINDS)}; own is the file as it is")
    parser.add_argument("--dtype", default="bfloat16")
    own_arguments(parser, default, "; not all for latency")
    parser.add_argument("--prompts", type=words, default=",".join(PROMPTS), help="of " + ", ".join(PROMPTS))
    parser.add_argument("--max-new-tokens", type=int, help=default("max_new_tokens"))
    parser.add_argument(
        "--memory", type=float, help="with --shape: GB of the device that may be used; the rest comes from host memory"
    )
    parser.add_argument(
        "--advance", type=advances, default="", help="with --shape: PERIOD=TOKENS that a period commits, if not the paper's"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--skip", type=words, default="", help="of transformers, static, llama.cpp, dense")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--busy", type=int, default=0, help="processes that use a core each meanwhile, as others do on a machine in use"
    )
    parser.add_argument("--profile", action="store_true", help="cudaProfilerStart and Stop around our own rounds of latency")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    options.latency = options.shape is not None or options.context is not None
    for name, value in DEFAULTS["latency" if options.latency else "texts"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        if options.shape is not None:
            shape_of(options.shape)
        device_of(options.device)
        if options.latency and "auto" in options.periods:
            raise ValueError("periods: auto depends on acceptance and measured costs; latency wants a number")
        check_named(options)
        check_known("skip", options.skip, ("", "transformers", "static", "llama.cpp", "dense"))
        check_known("prompts", options.prompts, PROMPTS)
        check_known("weights", options.weights, WEIGHTS)
        if options.latency and (len(options.weights) != 1 or len(options.draft_weights) != 1):
            raise ValueError("weights, draft_weights: for latency expected one kind of each")
        check_sparsities(options.sparsities, *([("csparse", "fsparse", "cascade")] if options.latency else []))
        if options.latency and options.lookup:
            raise ValueError("lookup: not for latency, whose texts are random")
        if options.shape is None and (options.memory is not None or options.advance):
            raise ValueError("memory, advance: only with a shape, whose weights are random")
        if options.memory is not None and not options.device.startswith("cuda"):
            raise ValueError(f"memory: expected a CUDA device, got {options.device}; of CPUs see offload.py")
        if options.busy < 0:
            raise ValueError(f"busy: expected a number of processes, got {options.busy}")
        if options.profile and not options.device.startswith("cuda"):
            raise ValueError(f"profile: expected device cuda, got {options.device}")
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    header()
    with busy(options.busy):
        if options.latency:
            latency.run(options)
        else:
            compare(options)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other processes compute meanwhile, and nothing else."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def compare(options: argparse.Namespace) -> None:
    bench = Bench(options)
    variants = bench.variants()
    gguf = gguf_of(options) if options.device == "cpu" else None
    with running(gguf, options.llama_types, torch.get_num_threads()) as processes:
        for kind, process in processes.items():
            variants[f"llama.cpp {kind}"] = lambda process=process: bench.llama_cpp(process)
        # A few tokens warm a CPU up; a graph is captured anew when a longer text needs more room.
        bench.limit = 4 if options.device == "cpu" else options.max_new_tokens
        for warm_up in variants.values():
            warm_up()
        bench.limit = options.max_new_tokens
        rates: dict[str, float] = {}

        def put(name: str, rate: float) -> None:
            rates[name] = rate
            save(options.out, record_of(bench, rates), last=False)

        alternate(variants, options.rounds, "decoding", put)
    record = record_of(bench, rates)
    show(record)
    save(options.out, record)


def record_of(bench: Bench, rates: dict[str, float]) -> dict:
    """What is kept, of those variants whose full model was measured. rates: tokens a second."""
    options = bench.options
    results = []
    for name, rate in rates.items():
        full = bench.full.get(name, full_of("plain" if "plain" in options.weights else options.weights[0]))
        if full not in rates:
            continue
        result = {"variant": name, "tokens_per_second": rate, "vs_full": rate / rates[full]}
        if stats := bench.stats.get(name):
            result |= {
                "density": stats.density,
                "python_share": bench.overhead.get(name),
                "text_equals_full": bench.texts[name] == bench.texts[full],
                **stats.metrics(),
            }
        results.append(result)
    return {
        "benchmark": "decode",
        "model": options.model,
        "dtype": options.dtype,
        "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "busy": options.busy,
        "results": results,
    }


def show(record: dict) -> None:
    limit = record["max_new_tokens"]
    table = Table(title=f"{record['model']}, {record['dtype']}: {', '.join(record['prompts'])}, up to {limit} tokens")
    others = {result["variant"]: result["tokens_per_second"] for result in record["results"] if "density" not in result}
    columns = [
        "",
        "tokens/s",
        "vs Full",
        *(f"vs {name}" for name in others),
        "AAL",
        "eff. density",
        "corrected",
        "Python",
        "= Full",
    ]
    for column in columns:
        table.add_column(column, justify="left" if column == "" else "right")

    def cell(result: dict, name: str, form: str) -> str:
        return "" if result.get(name) is None else format(result[name], form)

    for result in record["results"]:
        rate = result["tokens_per_second"]
        table.add_row(
            result["variant"],
            f"{rate:.2f}",
            f"{result['vs_full']:.2f}",
            *(f"{rate / other:.2f}" for other in others.values()),
            cell(result, "average_advance_length", ".2f"),
            cell(result, "effective_density", ".3f"),
            cell(result, "corrected_fraction", ".1%"),
            cell(result, "python_share", ".1%"),
            {None: "", True: "yes", False: "no"}[result.get("text_equals_full")],
        )
    console.print(table)


if __name__ == "__main__":
    main()
