"""What torch.cuda is asked for, noted on a machine without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch


class FakeCuda:
    """Takes the place of parts of `torch.cuda` while a test runs. log: what was asked for, with the device or stream that was the
    current one."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        self.device, self.streams = 0, {}
        names = "device stream synchronize graph graph_pool_handle current_stream Stream CUDAGraph Event"
        for name in names.split():
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))

    def _index(self, device) -> int:
        return self.device if device is None else torch.device(device).index or 0

    @contextlib.contextmanager
    def _device(self, device):
        before, self.device = self.device, self._index(device)
        try:
            yield
        finally:
            self.device = before

    def _current_stream(self, device=None):
        index = self._index(device)
        return self.streams.get(index) or SimpleNamespace(
            device=index,
            name="default",
            cuda_stream=0,
            wait_stream=lambda other: self.log.append(("wait of the default stream", other.name)),
        )

    @contextlib.contextmanager
    def _stream(self, stream):
        before = self.streams.get(stream.device)
        self.streams[stream.device] = stream
        try:
            yield
        finally:
            self.streams[stream.device] = before

    def _Stream(self, device=None):  # noqa: N802
        made = SimpleNamespace(device=self._index(device), name=f"own {len(self.log)}", cuda_stream=1)
        made.wait_stream = lambda other: self.log.append(("wait", made, other.name))
        self.log.append(("new stream", made))
        return made

    def _synchronize(self, device=None):
        self.log.append(("synchronize", self._index(device)))

    @contextlib.contextmanager
    def _graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.log.append(("capture", self.device, stream, capture_error_mode))
        with self._stream(stream):
            yield

    def _graph_pool_handle(self):
        return 0, len(self.log) + 1

    def _CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append(("replay", self.device)))

    def _Event(self, **_):  # noqa: N802
        return SimpleNamespace(
            record=lambda: self.log.append(("record", self.device)), synchronize=lambda: None, elapsed_time=lambda end: 1.0
        )
