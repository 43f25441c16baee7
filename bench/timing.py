"""Time on a CUDA device, without the host's in it. Where the kernels are only emulated, on the CPU, it is wall time: that serves
tests of the benchmarks and says nothing about a GPU."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from sirius_ext.kernels.dispatch import counters
from sirius_ext.runtime.model import Model


class Clock:
    """Marks on the device's current stream, and the time between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        """Waits for `end`."""
        if self._device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Repeated:
    """The same call on different memory, `bodies`, one after the other in one CUDA graph. Called, it runs them once and returns
    the mean seconds of one, the step from kernel to kernel inside a graph included.

    Where there is no CUDA device, the first body is called."""

    def __init__(self, bodies: Sequence[Callable[[], object]], device: torch.device) -> None:
        self._bodies, self._device, self._clock = bodies, device, Clock(device)
        if device.type != "cuda":
            self._bodies = bodies[:1]
            return
        # Libraries and our counters keep memory by stream: the run before the capture is on the stream of the capture.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # which may still write what the bodies read
        with torch.cuda.stream(stream):
            counters(device)
            for body in bodies:
                body()
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for body in bodies:
                body()
        self._graph.replay()

    def __call__(self) -> float:
        start = self._clock.mark()
        if self._device.type == "cuda":
            self._graph.replay()
        else:
            for body in self._bodies:
                body()
        return self._clock.seconds(start, self._clock.mark()) / len(self._bodies)


def read_bandwidth(device: torch.device, size: int = 4 << 30, rounds: int = 9) -> dict[str, float]:
    """Bytes a second that plain torch moves: reading `size` bytes (the best of two reductions), and copying half of them to the
    other half, bytes read and written both counted."""
    memory = torch.ones(size // 4, device=device)
    halves = memory.chunk(2)
    bodies = {
        "sum": lambda: memory.sum(),
        "max": lambda: memory.max(),
        "copy": lambda: halves[0].copy_(halves[1]),
    }
    rates = {}
    for name, body in bodies.items():
        run = Repeated([body], device)
        rates[name] = memory.nbytes / statistics.median(run() for _ in range(rounds))
    return {"read": max(rates["sum"], rates["max"]), "copy": rates["copy"]}


def link_bandwidth(device: torch.device, size: int = 1 << 30, rounds: int = 10) -> float:
    """Bytes a second of a copy from pinned host memory to the device: of the fastest one, since a link that was idle wakes up
    slowly."""
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    clock, rates = Clock(device), []
    for _ in range(rounds):
        start = clock.mark()
        on_device.copy_(host, non_blocking=True)
        rates.append(size / clock.seconds(start, clock.mark()))
    return max(rates)


@contextlib.contextmanager
def profiled_range(wanted: bool) -> Iterator[None]:
    """What a profiler started with --profile-from-start off (ncu), or --capture-range cudaProfilerApi (nsys), looks at."""
    if wanted:
        torch.cuda.cudart().cudaProfilerStart()
    try:
        yield
    finally:
        if wanted:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


class _TimedReplay:
    def __init__(self, replay: Callable[[], None], clock: Clock) -> None:
        self._replay, self._clock = replay, clock
        self.spans: list[tuple] = []

    def __call__(self) -> None:
        start = self._clock.mark()
        self._replay()
        self.spans.append((start, self._clock.mark()))


def idle_share(model: Model, device: torch.device, run: Callable[[], object]) -> float | None:
    """The share of its time that the device does not spend in replayed periods while `run` decodes one text, from the first
    period's start to the last one's end: the record's copy to the host, and waiting for the host. None if nothing is replayed."""
    periods = [period for cache in model.caches for period in getattr(cache, "periods", {}).values()]
    clock = Clock(device)
    timed = []
    for period in periods:
        timed.append((period, period._replay))
        period._replay = _TimedReplay(period._replay, clock)
    try:
        run()
        spans = [span for period, _ in timed for span in period._replay.spans]
    finally:
        for period, replay in timed:
            period._replay = replay
    if len(spans) < 2:
        return None
    busy = sum(clock.seconds(*span) for span in spans)
    return 1 - busy / clock.seconds(spans[0][0], spans[-1][1])
