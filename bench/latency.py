"""Milliseconds per token of Full, the sparse models and Sirius after prompts of given lengths, against dense decoding by others
and against the time that reading the weights takes.

The baselines run first, on the weights as they were loaded; then our own, in alternating rounds, which share the weights in our
layout. With random weights (--shape) acceptance means nothing: Sirius then accepts every draft (threshold 0), so that a period
does all of its work, and its time is divided by the paper's average advance length, or a given one, instead of its own. A shape
may be larger than the device's memory (--memory).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import alternate, console, save
from dense import Dense
from prompts import PROMPTS
from random_tiers import random_tiered
from rich.table import Table
from shapes import random_model
from timing import idle_share, link_bandwidth, profiled_range, read_bandwidth
from transformers.generation.streamers import BaseStreamer
from variants import draft_of

from sirius_ext import Engine, SiriusConfig
from sirius_ext.config import GREEDY
from sirius_ext.decoding.sparsity import density_of, drafts_of, four_bits
from sirius_ext.engine import prepare
from sirius_ext.models.hub import load_model, parse_dtype
from sirius_ext.models.weights import Weights

PAPER_AAL = 15.2  # of a period of 16, Llama-3-8B-Instruct on GSM8K
PAPER_PERIOD = 16
LINK_BYTES = 1 << 30  # of a copy that the link is measured by
FAIR = 1.5  # of its floor: a baseline that takes longer has gone a slow way, and comparing with it says nothing

Measured = dict[str, float | None]


class Stamps(BaseStreamer):
    """When tokens came; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def seconds_per_token(self) -> float:
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


class Latency:
    """options: those of decode.py."""

    def __init__(self, options: argparse.Namespace, bandwidth: float) -> None:
        self.options, self.bandwidth = options, bandwidth
        self.on_result: Callable[[], None] = lambda: None  # called after each new record
        self.device, dtype = torch.device(options.device), parse_dtype(options.dtype)
        self.random, (self.stored,) = options.shape is not None, options.weights
        self.link: float | None = None  # bytes a second from the host's memory, if weights come from there
        if options.memory is not None:
            drafts = functools.partial(drafts_of, self._planned_for())
            memory = round(options.memory * 1e9)
            self.model, self._tokenizer = random_tiered(options.shape, self.device, dtype, self.stored, memory, drafts), None
            self.link = link_bandwidth(self.device, LINK_BYTES)
        elif self.random:
            self.model, self._tokenizer = random_model(options.shape, self.device, dtype, self.stored), None
        else:
            self.model, self._tokenizer = load_model(options.model, dtype, weights=self.stored)
            self.model.to(self.device)
        self.model.generation_config.eos_token_id = None  # no text ends early
        self.model.generation_config.pad_token_id = 0
        self.records: list[dict] = []

    def prompt(self, context: int) -> torch.Tensor:
        """int64 [1, context]: random tokens, or real text over and over for a real model."""
        if self.random:
            return torch.randint(self.model.config.vocab_size, (1, context), device=self.device)
        ids = self._tokenizer("\n\n".join(PROMPTS.values()), return_tensors="pt").input_ids
        return ids.repeat(1, -(-context // ids.shape[1]))[:, :context].to(self.device)

    def tiers(self) -> dict:
        """How memory was divided, if not all is on the device."""
        if self.link is None:
            return {}
        plan = prepare(self.model).weights.tiers.plan
        return {"memory_bytes": plan.memory, "link_bandwidth": self.link, "plan": dataclasses.asdict(plan)}

    # ------------------------------------------------------------------------------------------------------------ baselines

    def baselines(self) -> None:
        options, count = self.options, self.options.max_new_tokens
        if self.stored != "plain" or self.link is not None:  # which only our kernels read
            return
        for context in options.context:
            ids = self.prompt(context)
            variants: dict[str, Callable[[], float]] = {}
            if "transformers" not in options.skip:
                variants["transformers"] = lambda ids=ids: self._transformers(ids)
                if "static" not in options.skip:
                    # On CUDA transformers compiles this forward by itself, mode reduce-overhead: with CUDA graphs.
                    variants["transformers, static cache"] = lambda ids=ids: self._transformers(
                        ids, cache_implementation="static"
                    )
            if "dense" not in options.skip:
                dense = Dense(self.model, context + count)
                variants["dense, torch.compile"] = lambda ids=ids, dense=dense: dense.decode(ids, count)[1] / (count - 1)
            for warm_up in variants.values():
                warm_up()
            put = lambda name, seconds, context=context: self._put(name, context, {"ms_per_token": 1e3 * seconds})  # noqa: E731
            alternate(variants, options.rounds, f"baselines, context {context}", put)
            variants.clear()
            dense = None  # its cache and fused weights
            self._collect()

    def _put(self, variant: str, context: int, measured: dict) -> None:
        """In place of what is known of that variant so far."""
        record = {"variant": variant, "context": context, **measured}
        for i, known in enumerate(self.records):
            if (known["variant"], known["context"]) == (variant, context):
                self.records[i] = record
                break
        else:
            self.records.append(record)
        self.on_result()

    def _transformers(self, ids: torch.Tensor, **settings) -> float:
        stamps = Stamps()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=stamps,
            max_new_tokens=self.options.max_new_tokens,
            **GREEDY,
            **settings,
        )
        return stamps.seconds_per_token

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------------ our own

    def _planned_for(self) -> SiriusConfig:
        """For what memory is divided: the largest sparse model, and the longest verification."""
        options = self.options
        numbers, (draft,) = [each for each in options.densities if each != "auto"], options.draft_weights
        return SiriusConfig(
            sparsity=options.sparsities[0],
            density=max(numbers, default="auto"),
            period=max(options.periods),
            tree_width=max(options.widths),
            draft_weights=draft,
        )

    def configs(self) -> dict[str, SiriusConfig]:
        options = self.options
        found = {"Full": SiriusConfig(mode="full")}
        threshold = 0.0 if self.random else SiriusConfig.threshold
        (weights,), (draft,) = options.weights, options.draft_weights
        drafts_by = draft_of(weights, draft) if self.link is None else draft  # else memory was divided for a copy, or was not
        for sparsity, density in itertools.product(options.sparsities, options.densities):
            base = SiriusConfig(sparsity=sparsity, density=density, threshold=threshold, draft_weights=drafts_by)
            kind = {"csparse": "CSparse", "fsparse": "FSparse", "cascade": "Cascade"}[sparsity]
            if draft != "auto":
                kind += f" ({draft})"
            found[f"{kind} {density}"] = replace(base, mode="sparse")
            for period, width in itertools.product(options.periods, options.widths):
                found[f"Sirius, {kind} {density}, period {period}, width {width}"] = replace(
                    base, period=period, tree_width=width
                )
        return found

    def ours(self) -> None:
        engine = Engine(self.model)
        for context in self.options.context:
            self._ours_after(engine, context)

    def _ours_after(self, engine: Engine, context: int) -> None:
        options, ids, configs = self.options, self.prompt(context), self.configs()
        last: dict[str, Measured] = {}

        def run(name: str) -> float:
            last[name] = self._measure(engine, ids, configs[name])
            return last[name]["ms_per_token"]

        # The widest first: room made for it makes graphs captured before it void.
        for name in reversed(configs):
            run(name)
        weights = prepare(self.model).weights
        full_floor = self._floor_ms(weights, SiriusConfig(mode="full"), context)
        for record in self.records:
            if record["context"] == context and "floor_ms" not in record:  # a baseline
                record |= {"floor_ms": full_floor, "over_floor": record["ms_per_token"] / full_floor}

        def put(name: str, ms: float, **more: float | None) -> None:
            bounds = self._bounds(weights, configs[name], context, ms, last[name]["advance"])
            self._put(name, context, {**last[name], "ms_per_token": ms, **bounds, **more})

        allocates = self.device.type == "cuda" and self.link is None  # else most of the memory is none of torch's
        if allocates:
            torch.cuda.reset_peak_memory_stats(self.device)
        with profiled_range(options.profile):
            variants = {name: functools.partial(run, name) for name in configs}
            times = alternate(variants, options.rounds, f"ours, context {context}", put)
        peak = torch.cuda.max_memory_allocated(self.device) if allocates else None
        stored = sum(p.nbytes for p in self.model.parameters()) + kv_bytes(weights, context + options.max_new_tokens)
        for name, config in configs.items():
            decode = functools.partial(self._decode, engine, ids, config)
            # Where a token takes a second, another text is too long to wait for.
            idle = idle_share(prepare(self.model), self.device, decode) if self.link is None else None
            put(name, times[name], idle_share=idle, peak_bytes=peak, peak_over_stored=None if peak is None else peak / stored)

    def _floor_ms(self, weights: Weights, config: SiriusConfig, context: int, advance: float | None = None) -> float:
        """What a token takes at least, all of it read from the device's memory."""
        return 1e3 * bytes_per_token(weights, config, context, advance) / self.bandwidth

    def _bounds(self, weights: Weights, config: SiriusConfig, context: int, ms: float, advance: float | None) -> Measured:
        """What a token of `ms` would take at least, and what it has of the link."""
        floor = self._floor_ms(weights, config, context, advance)
        if self.link is None:
            return {"floor_ms": floor, "over_floor": ms / floor}
        moved = moved_per_token(weights, config, advance)
        # What comes may come while it is read; drafts and F's own pass are one after the other.
        full = self._floor_ms(weights, SiriusConfig(mode="full"), context)
        full_pass = 0.0 if config.mode == "sparse" else full / (advance or 1.0)
        floor += max(0.0, 1e3 * moved / self.link - full_pass)
        busy = 1e3 * moved / self.link / ms
        return {"floor_ms": floor, "over_floor": ms / floor, "moved_bytes": moved, "link_busy": busy}

    def _decode(self, engine: Engine, ids: torch.Tensor, config: SiriusConfig):
        mask = torch.ones_like(ids)  # no token of a random prompt is padding
        return engine.generate(ids, mask, config=config, max_new_tokens=self.options.max_new_tokens, **GREEDY).stats

    def _measure(self, engine: Engine, ids: torch.Tensor, config: SiriusConfig) -> Measured:
        """advance: tokens a verification commits, which ms_per_token rests on; measured, or the paper's."""
        stats = self._decode(engine, ids, config)
        own = 1e3 * stats.decode_seconds / (stats.tokens - 1)  # x0 comes out of the prefill
        if config.mode != "sirius":
            return {"ms_per_token": own, "ms_per_period": None, "advance": None}
        # The first one waits for what is captured or launched before it.
        whole = [period.seconds for period in stats.periods if not period.cut][1:]
        if not whole:
            raise ValueError(f"max_new_tokens: expected more than two periods of {config.period}, got {stats.tokens}")
        period = 1e3 * statistics.median(whole)
        if self.random:
            advance = self.options.advance.get(config.period, PAPER_AAL / PAPER_PERIOD * config.period)
            return {"ms_per_token": period / advance, "ms_per_period": period, "advance": advance}
        return {"ms_per_token": own, "ms_per_period": period, "advance": stats.average_advance_length}


def kv_bytes(weights: Weights, tokens: int) -> int:
    """Of the key/value cache of so many tokens."""
    return 2 * len(weights.layers) * weights.kv_heads * weights.head_dim * tokens * weights.dtype.itemsize


def bytes_per_token(weights: Weights, config: SiriusConfig, context: int, advance: float | None = None) -> float:
    """What must be read for a token after `context` tokens: weights once a pass, and the cache. advance: tokens that a period of
    Sirius commits. A tree's window is left out: it is far smaller than the weights."""
    cache = kv_bytes(weights, context)
    full = weights.full.bytes + cache
    if config.mode == "full":
        return full
    read, density = weights.view(four_bits(config, weights)), density_of(config, weights)
    share = (1 + 2 * density) / 3 if config.sparsity == "fsparse" else density
    sparse = read.bytes - (1 - share) * read.mlp_bytes + cache
    if config.mode == "sparse":
        return sparse
    return ((config.period - 1) * sparse + full) / advance


def moved_per_token(weights: Weights, config: SiriusConfig, advance: float | None = None) -> float:
    """Bytes that come from the host's memory for a token, once a pass of F. What is in slots comes from the device's own for
    sure, which S has left there. What enters a set that follows the text is not counted."""
    return 0.0 if config.mode == "sparse" else weights.tiers.plan.streamed / (advance or 1.0)


def run(options: argparse.Namespace, bandwidth: float | None = None) -> dict:
    """Measure, print and save. bandwidth: bytes a second, measured if not given. Returns the record that is saved."""
    device = torch.device(options.device)
    if bandwidth is None:
        bandwidth = max(read_bandwidth(device, 4 << 30 if device.type == "cuda" else 256 << 20).values())
    bench = Latency(options, bandwidth)
    record = {
        "benchmark": "latency" if options.memory is None else "tiers",
        "model": options.shape or options.model,
        "weights": "random" if bench.random else "real",
        "dtype": options.dtype,
        "stored": bench.stored,
        "max_new_tokens": options.max_new_tokens,
        "bandwidth": bandwidth,
        **bench.tiers(),
        "results": bench.records,
    }
    bench.on_result = lambda: save(options.out, record, last=False)
    bench.baselines()
    bench.ours()
    report(record)
    save(options.out, record)
    return record


def report(record: dict) -> None:
    full = {r["context"]: r["ms_per_token"] for r in record["results"] if r["variant"] == "Full"}
    dense = {r["context"]: r for r in record["results"] if r["variant"] == "dense, torch.compile"}
    weights = f"{record['weights']} weights ({record['stored']})"
    table = Table(title=f"{record['model']}, {record['dtype']}, {weights}, {record['bandwidth'] / 1e9:.0f} GB/s")
    columns = ["", "context", "ms/token", "vs Full", "vs dense", "ms/period", "tokens/period", "over floor", "idle", "memory"]
    columns += ["link busy"] if "plan" in record else []
    for column in columns:
        table.add_column(column, justify="left" if column == "" else "right")
    for r in record["results"]:
        context = r["context"]
        table.add_row(
            r["variant"],
            str(context),
            f"{r['ms_per_token']:.3f}",
            f"{full[context] / r['ms_per_token']:.2f}",
            _against(dense.get(context), r["ms_per_token"]),
            _shown(r.get("ms_per_period"), "{:.2f}"),
            _shown(r.get("advance"), "{:.2f}"),
            _shown(r.get("over_floor"), "{:.2f}"),
            _shown(r.get("idle_share"), "{:.1%}"),
            _shown(r.get("peak_over_stored"), "{:.3f}"),
            *([_shown(r["link_busy"], "{:.0%}")] if "plan" in record else []),
        )
    console.print(table)
    console.print(
        "over floor: time over that of reading weights and cache at the bandwidth above. idle: share of its time that the device "
        "is not in a replayed period. memory: peak of all our own over weights and cache. vs dense: void where the baseline "
        f"takes more than {FAIR} times its own floor."
    )
    if record["weights"] == "random":
        console.print(
            "Weights are random, so acceptance means nothing: Sirius' ms/token is the measured time of a whole period over the "
            f"tokens/period that were given, or the paper's, {PAPER_AAL} of {PAPER_PERIOD}."
        )


def _against(baseline: Measured | None, time: float) -> str:
    if baseline is None:
        return ""
    if baseline.get("over_floor", 0.0) > FAIR:
        return "void"
    return f"{baseline['ms_per_token'] / time:.2f}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
