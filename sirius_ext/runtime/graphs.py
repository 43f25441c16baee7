"""CUDA graphs: a pass, or a whole period, captured once and replayed for every prompt.

`SIRIUS_GRAPHS` chooses, for debugging: "period" (the default) replays drafts, verification, acceptance and rewrite as one graph;
"step" replays single passes and decides on the host; "off" launches every kernel from the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import os
import threading
from collections.abc import Callable, Iterator

import torch

from ..kernels import dispatch

GRAPH_MODES = ("period", "step", "off")


def graph_mode() -> str:
    """What `SIRIUS_GRAPHS` asks for. ValueError if it is none of GRAPH_MODES."""
    mode = os.environ.get("SIRIUS_GRAPHS", "period")
    if mode not in GRAPH_MODES:
        raise ValueError(f"SIRIUS_GRAPHS: expected one of {', '.join(GRAPH_MODES)}, got {mode!r}")
    return mode


@contextlib.contextmanager
def profiled(device: torch.device, name: str) -> Iterator[None]:
    """An NVTX range named after a step of the algorithm: prefill, draft, verify, accept, interleave. It is around the launches of
    the step's kernels: a graph has them when it is captured; in its replays they show with SIRIUS_GRAPHS=step or off only."""
    if device.type == "cuda":
        with torch.cuda.nvtx.range(name):
            yield
    else:
        yield


def has_conditions(device: torch.device) -> bool:
    """Whether a graph for this device may have parts that run only if a kernel before them says so."""
    found: bool = dispatch.cuda_functions(device).has_conditions()
    return found


# One capture at a time in a process, of whatever model: torch allows no more, and before each one its device is waited for, which
# would make another one on that device invalid.
_capturing = threading.Lock()


class ConditionsError(RuntimeError):
    """A graph with parts that need not run could not be captured."""


class _Run(enum.Enum):
    """What a body is called for."""

    DIRECT = enum.auto()
    BEFORE_CAPTURE = enum.auto()
    CAPTURE = enum.auto()


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Around a capture. Nothing is collected meanwhile: what goes with another model may ask for what a capture does not allow.
    Afterwards the current stream is what it was, even if torch could not end the capture and so left its own one behind."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    finally:
        if collects:
            gc.enable()


class Replay:
    """Something that only launches kernels: at the first call captured as a graph, then replayed.

    captured: whether to; otherwise, and where there is no CUDA device, it is called every time.
    stream: what it is captured on, one of its device; None where there is no CUDA device. torch's own is of the device that
        captured first, for all devices alike.
    inner: another one, for what `only_if` captures.
    state: what it changes and reads again. The run before the capture, which loads the kernels and a library's plans, must leave
        no trace there.
    what: for the error if the capture fails.
    """

    def __init__(
        self,
        body: Callable[[], object],
        device: torch.device,
        captured: bool,
        what: str,
        state: tuple[torch.Tensor, ...] = (),
        stream: torch.cuda.Stream | None = None,
        inner: torch.cuda.Stream | None = None,
    ) -> None:
        self._body, self._device, self._what, self._state, self._stream = body, device, what, state, stream
        self._inner, self._run, self._conditional = inner, _Run.DIRECT, False
        self._captured = captured and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self._captured:
            self._body()
            return
        if self._graph is None:
            self._graph = self._capture()
        with torch.cuda.device(self._device):
            self._graph.replay()

    def only_if(self, decide: Callable[[int], object], flag: torch.Tensor, part: Callable[[], object]) -> bool:
        """Within the body: a part of it that a replay runs only if the device says so. Outside of a graph the host asks for that,
        and so waits.

        decide: launches the kernel that sets the flag, int32 [1]; and, if what it gets is not 0, that condition.
        part: only launches kernels, and has torch make nothing.
        Returns whether it runs, or may.
        """
        functions, self._conditional = dispatch.cuda_functions(self._device), True
        if self._run is _Run.CAPTURE:
            assert self._inner is not None
            stream = dispatch.stream(self._device)
            condition = functions.new_condition(stream)
            decide(condition)
            functions.begin_if(condition, stream, self._inner.cuda_stream)
            try:
                with torch.cuda.stream(self._inner):
                    part()
            finally:  # a capture that stays open would forbid this thread nearly everything
                functions.end_if(self._inner.cuda_stream)
            return True
        decide(0)
        # Before a capture all kernels must have been loaded.
        runs = self._run is _Run.BEFORE_CAPTURE or functions.is_set(flag.data_ptr(), dispatch.stream(self._device))
        if runs:
            part()
        return runs

    def _capture(self) -> torch.cuda.CUDAGraph:
        with _capturing:
            return self._captured_alone()

    def _captured_alone(self) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()  # as torch would make one; but known, even if the capture fails
        try:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize(self._device)
                with torch.cuda.stream(self._stream):  # libraries keep memory by stream
                    self._run = _Run.BEFORE_CAPTURE
                    self._body()
                    for tensor, value in zip(self._state, before):
                        tensor.copy_(value)
                torch.cuda.synchronize(self._device)
                # Other threads may go on meanwhile: what they ask of the device does not concern this graph.
                self._run = _Run.CAPTURE
                captured = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
                with _undisturbed(self._device), captured:
                    self._body()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            # Where CUDA could not end a capture, torch before 2.13 goes on taking memory for it, and refuses every later one.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self._device)  # what the run before the capture began may still write what others use
            raise (ConditionsError if self._conditional else RuntimeError)(
                f"cuda: {self._what} could not be captured as a graph ({error}); lower period, tree_width or max_new_tokens, or "
                "set SIRIUS_GRAPHS=off"
            ) from error
        finally:
            self._run = _Run.DIRECT
        return graph


@dataclasses.dataclass
class Nodes:
    """Some nodes of a tree, in device memory, side by side.

    tokens, offsets: int32 [m]; offsets are positions, counted from the root's.
    mask: int64 [m, words].
    first: the index of the first one; node i's slot is the root's + i.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor
    first: int
