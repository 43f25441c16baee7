"""CUDA graphs: a pass, or a whole period, captured once and replayed for every prompt.

`SIRIUS_GRAPHS` chooses, for debugging: "period" (the default) replays drafts, verification, acceptance and rewrite as one graph;
"step" replays single passes and decides on the host; "off" launches every kernel from the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch

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


class Replay:
    """Something that only launches kernels: at the first call captured as a graph, then replayed.

    captured: whether to; otherwise, and where there is no CUDA device, it is called every time.
    stream: what it is captured on, one of its device; None where there is no CUDA device. torch's own is of the device that
        captured first, for all devices alike.
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
    ) -> None:
        self._body, self._device, self._what, self._state, self._stream = body, device, what, state, stream
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

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize(self._device)
                with torch.cuda.stream(self._stream):  # libraries keep memory by stream
                    self._body()
                    for tensor, value in zip(self._state, before):
                        tensor.copy_(value)
                torch.cuda.synchronize(self._device)
                # Other threads may go on meanwhile: what they ask of the device does not concern this graph.
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._body()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise RuntimeError(
                f"cuda: {self._what} could not be captured as a graph ({error}); lower period, tree_width or max_new_tokens, or "
                "set SIRIUS_GRAPHS=off"
            ) from error
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
