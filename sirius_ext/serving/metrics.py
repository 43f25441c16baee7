"""What the scheduler has counted, in the words of Prometheus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .scheduler import WAITS, Scheduler


class SchedulerCollector(Collector):
    """Reads the scheduler whenever it is asked."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        scheduler, totals = self._scheduler, self._scheduler.totals
        ended = CounterMetricFamily("sirius_texts", "Texts that have ended, by how", labels=["finish"])
        for finish in ("stop", "length", "cancelled", "error"):
            ended.add_metric([finish], totals.ended[finish])
        yield ended
        kept, kept_bytes = scheduler.kept
        counters = {
            "refused": ("Requests refused because the queue was full", totals.refused),
            "prompt_tokens": ("Tokens of prompts", totals.prompt_tokens),
            "prompt_tokens_reused": ("Tokens of prompts that a cache held already", totals.reused_tokens),
            "cache_hits": ("Prompts of which a cache held something", totals.reusing),
            "tokens": ("Tokens decoded", totals.tokens),
            "prefill_seconds": ("Wall time until prompts were read", totals.prefill_seconds),
            "decode_seconds": ("Time spent decoding", totals.decode_seconds),
            "verifications": ("Verifications, but those that the end of a text cut short", totals.advances),
            "advanced_tokens": ("Tokens that these verifications committed", totals.advanced),
            "committed_tokens": ("Tokens that all verifications committed", totals.committed),
            "corrected_tokens": ("Tokens that replaced a draft", totals.corrected),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"sirius_{name}", what, value)
        gauges = {
            "queue": ("Texts that wait", scheduler.waiting),
            "running": ("Texts that are decoded", scheduler.running),
            "caches": ("Caches of ended texts that are kept", kept),
            "cache_bytes": ("Their memory", kept_bytes),
            "tokens_per_second": ("Tokens decoded per second of decoding", _share(totals.tokens, totals.decode_seconds)),
            "average_advance_length": ("Tokens that a verification commits", _share(totals.advanced, totals.advances)),
            "corrected_fraction": ("Share of committed tokens that replaced a draft", _share(totals.corrected, totals.committed)),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"sirius_{name}", what, value)
        ends = [*map(str, WAITS), "+Inf"]
        buckets = list(zip(ends, itertools.accumulate(totals.waits)))
        what = "Seconds from the request to the first token"
        yield HistogramMetricFamily("sirius_first_token_seconds", what, buckets, totals.waited)


def _share(part: float, whole: float) -> float:
    """0 where there is nothing yet."""
    return part / whole if whole else 0.0
