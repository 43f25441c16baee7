"""A run's items over several processes: of this machine, of a Ray cluster, or those that `accelerate launch` has started."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import queue as queues
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState  # type: ignore[import-untyped]  # it has no types
from rich.console import Console

from ..errors import reason
from ..extras import need
from ..kernels.threads import cpu_threads
from .plan import Plan
from .results import Results, claimed, merge
from .runner import progress_bar, running
from .tasks import Item

LOOK_SECONDS = 1.0  # how often to look whether a process has died without a word
LONGEST_WAIT = datetime.timedelta(days=30)  # of processes that are done for the others


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process decodes. done: (mode, id) of what is known already."""

    number: int
    plan: Plan
    items: list[Item]
    done: set[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class End:
    """The last thing that a worker sends. error: why it could not go on."""

    number: int
    error: str | None = None


class _Queue(Protocol):
    """Of `multiprocessing` or of Ray: a worker's records, then its `End`."""

    def put(self, item: dict[str, Any] | End, /) -> None: ...

    def get(self, *, timeout: float) -> dict[str, Any] | End: ...


class _Sender:
    """What a worker has in place of `Results`: its records go to who keeps them."""

    def __init__(self, part: Part, queue: _Queue) -> None:
        self._done, self._queue = part.done, queue
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._queue.put(record)

    def done(self) -> set[tuple[str, str]]:
        return self._done


def work(part: Part, queue: _Queue) -> None:
    """A worker's whole life: decode, and send each record as it is known, then an `End`."""
    try:
        part.plan.carry_out(part.plan.engine(), part.items, _Sender(part, queue), Console(quiet=True))
        queue.put(End(part.number))
    except Exception as error:  # whatever it is, it must be told
        queue.put(End(part.number, f"{type(error).__name__}: {reason(error)}"))


def split(plan: Plan, items: list[Item], done: set[tuple[str, str]], count: int, threads: int) -> list[Part]:
    """At most `count` parts of the items that are not done in every mode; item i goes to part i modulo their number."""
    left = plan.left(items, done)
    count = min(count, len(left))
    plan = dataclasses.replace(plan, threads=plan.threads or max(1, threads // max(1, count)))
    return [Part(number, plan, left[number::count], done) for number in range(count)]


def by_processes(plan: Plan, items: list[Item], results: Results, count: int, console: Console) -> None:
    """Decode what `results` lacks in `count` processes of this machine, each with a model of its own; on CUDA they take the
    devices in turn. ChildProcessError if some could not finish; what is known by then is kept."""
    parts = split(plan, items, results.done(), count, cpu_threads())
    if plan.device == "cuda":
        devices = max(1, torch.cuda.device_count())  # without one, the engine says so
        parts = [
            dataclasses.replace(part, plan=dataclasses.replace(part.plan, device=f"cuda:{part.number % devices}"))
            for part in parts
        ]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, which do not survive it
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(part, queue), daemon=True) for part in parts]
    for process in processes:
        process.start()

    def dead() -> Iterator[End]:
        for part, process in zip(parts, processes):
            if process.exitcode is not None:
                yield End(part.number, f"exit status {process.exitcode}")

    try:
        _keep(parts, queue, results, dead, console)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _process(part: Part, queue: _Queue) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us is interrupted too, and ends us
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    work(part, queue)


def _outlive_nobody() -> None:
    """One that was killed cannot end us: nobody would keep what we send."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def by_ray(plan: Plan, items: list[Item], results: Results, count: int, console: Console) -> None:
    """As `by_processes`, over the machines of a Ray cluster: the one that RAY_ADDRESS names or that runs here, else one of this
    machine alone. Every machine needs this package and the model under the same name; only this one needs the data."""
    ray = need("ray", "ray", "--ray")
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        queue = need("ray.util.queue", "ray", "--ray").Queue()
        largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        # A worker that asks for more than any machine has would wait for ever.
        parts = split(plan, items, results.done(), count, min(int(ray.cluster_resources().get("CPU", 1)), largest * count))
        gpus = 1 if plan.device.startswith("cuda") else 0
        tasks = {
            part.number: ray.remote(work).options(num_cpus=part.plan.threads, num_gpus=gpus, max_retries=0).remote(part, queue)
            for part in parts
        }

        def dead() -> Iterator[End]:
            for number, task in tasks.items():
                if ray.wait([task], timeout=0)[0]:
                    try:
                        ray.get(task)
                        yield End(number, "it ended without a word")
                    except ray.exceptions.RayError as error:
                        yield End(number, f"{type(error).__name__}: {reason(error)}")

        _keep(parts, queue, results, dead, console)
    finally:
        if started:
            ray.shutdown()


def _keep(parts: list[Part], queue: _Queue, results: Results, dead: Callable[[], Iterator[End]], console: Console) -> None:
    """Write down what comes until every worker has ended. dead: those that have, whether they said so or not."""
    modes = parts[0].plan.modes if parts else ()
    ends: dict[int, End] = {}
    with progress_bar(console) as bar:
        work_left = sum((mode, item.id) not in part.done for part in parts for item in part.items for mode in part.plan.modes)
        progress = bar.add_task(f"{len(parts)} jobs", total=work_left)
        while len(ends) < len(parts):
            gone = list(dead())  # before the queue is read to its end: what they sent is in it then
            try:
                while True:
                    came = queue.get(timeout=LOOK_SECONDS)
                    if isinstance(came, End):
                        ends[came.number] = came
                        if len(ends) == len(parts):
                            break
                    else:
                        results.add(came)
                        bar.update(progress, advance=1, description=f"{len(parts)} jobs, {running(results.records, modes)}")
            except queues.Empty:  # Ray's Empty is one
                for end in gone:
                    ends.setdefault(end.number, end)
    failed = [f"job {end.number + 1}: {end.error}" for end in sorted(ends.values(), key=lambda end: end.number) if end.error]
    if failed:
        raise ChildProcessError(f"{len(failed)} of {len(parts)} jobs did not finish ({'; '.join(failed)}); --resume goes on")


def processes() -> int:
    """How many of this one a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def launched(plan: Plan, items: list[Item], out: Path, resume: bool) -> Iterator[tuple[Plan, list[Item], Results, bool]]:
    """Under `accelerate launch` (or torchrun): the plan, this process's share of the items, a file of its own beside `out`, and
    whether it is the first process; when all are done, that one puts everything into `out`. Otherwise all items, `out`, True.

    The processes need a common folder, nothing else: each item is decoded by one of them.
    """
    if processes() == 1:
        with contextlib.closing(Results(out, plan.record(), resume)) as results:
            yield plan, items, results, True
        return
    state = PartialState(cpu=not plan.device.startswith("cuda"), timeout=LONGEST_WAIT)
    number, count, first = state.process_index, state.num_processes, state.is_main_process
    if out.exists() and not resume:
        raise ValueError(f"out: {out} exists; --resume goes on with it, or choose another name")
    parts = [out.with_name(f"{out.stem}.{i + 1}-of-{count}{out.suffix}") for i in range(count)]
    with claimed(out) if first else contextlib.nullcontext():
        known = merge([out], plan.record())[1] if out.exists() else []
        if plan.device == "cuda":
            plan = dataclasses.replace(plan, device=f"cuda:{state.local_process_index}")
        with contextlib.closing(Results(parts[number], plan.record(), resume, known)) as results:
            yield plan, items[number::count], results, first
        state.wait_for_everyone()
        if first:
            run, results.records = merge([file for file in (out, *parts) if file.exists()], plan.record())
            Results.write(out, run, results.records)
            for file in parts:
                file.unlink(missing_ok=True)  # a process that had no items has left none
    state.destroy_process_group()
