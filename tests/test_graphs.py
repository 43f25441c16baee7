"""What is asked of CUDA around a capture, noted by a stand-in. That graphs compute the same is tested in test_cuda_model.py."""

import contextlib
import gc
import threading

import pytest
import torch
from backends import emulated
from capture_lint import CaptureLint
from fake_cuda import FakeCuda
from tiny import prompt, tiny

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.config import GREEDY
from sirius_ext.runtime.cuda import LaunchLock
from sirius_ext.runtime.graphs import Replay

SECOND = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_graph_is_its_models_device_s(cuda):
    """While another device is the current one: as a model of a second GPU that is called from anywhere."""
    stream, where = torch.cuda.Stream(SECOND), []
    replay = Replay(lambda: where.append((cuda.device, cuda.streams.get(1))), SECOND, True, "a pass", stream=stream)
    for _ in range(3):
        replay()
    # Run once before, then captured: both on the model's own stream, with its device as the current one.
    assert where == [(1, stream), (1, stream)]
    assert [each for each in cuda.log if each[0] == "capture"] == [("capture", 1, stream, "thread_local")]
    assert [each for each in cuda.log if each[0] == "replay"] == [("replay", 1)] * 3
    assert cuda.device == 0


def test_the_run_before_a_capture_comes_after_all_else(cuda):
    """Its stream is not the one on which its input was written."""
    order = []
    replay = Replay(lambda: order.append(len(cuda.log)), SECOND, True, "a pass", stream=torch.cuda.Stream(SECOND))
    replay()
    assert ("synchronize", 1) in cuda.log[: order[0]]
    assert ("synchronize", 1) in cuda.log[order[0] : order[1]]


def test_the_state_is_what_it_was(cuda):
    state = torch.zeros(1)
    replay = Replay(lambda: state.add_(1), SECOND, True, "a pass", (state,), torch.cuda.Stream(SECOND))
    replay()
    assert state.item() == 1  # by the capture alone, which on a device does not run


def test_a_failing_capture_names_what_it_was(cuda):
    def body():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="^cuda: a period of 4 could not be captured as a graph .operation not permitted"):
        Replay(body, SECOND, True, "a period of 4", stream=torch.cuda.Stream(SECOND))()


def test_after_a_capture_that_could_not_end(cuda, monkeypatch):
    """torch leaves the capture's stream behind then, and the run before the capture may not have ended."""
    own = torch.cuda.Stream(SECOND)

    @contextlib.contextmanager
    def refused(graph, stream, **_):
        cuda.streams[1] = stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    where = []
    with pytest.raises(RuntimeError, match="a pass could not be captured"):
        Replay(lambda: where.append((len(cuda.log), gc.isenabled())), SECOND, True, "a pass", stream=own)()
    assert torch.cuda.current_stream(SECOND).name == "default" and gc.isenabled()
    (_, before), (captured, within) = where
    assert before and not within  # collected
    assert ("synchronize", 1) in cuda.log[captured:]


def test_memory_is_no_longer_taken_for_a_capture_that_failed(cuda, monkeypatch):
    """torch goes on with that where CUDA could not end a capture: it would refuse every later one. Newer ones have ended it."""
    pools, ended = [], []

    @contextlib.contextmanager
    def refused(graph, pool, stream, **_):
        pools.append(pool)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    def end(device, pool):
        ended.append((device, pool))
        if len(ended) > 1:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a pass could not be captured .*a previous error"):
            Replay(lambda: None, SECOND, True, "a pass", stream=torch.cuda.Stream(SECOND))()
    assert ended == [(1, pool) for pool in pools] and len(set(pools)) == 2


def test_one_capture_at_a_time(cuda):
    """Of two models in two threads: the second one would wait for the device, and make the first one's capture invalid."""
    inside, may_end = threading.Event(), threading.Event()

    def first():
        inside.set()
        assert may_end.wait(30)

    def replay(body):
        return Replay(body, SECOND, True, "a pass", stream=torch.cuda.Stream(SECOND))

    one, begun = threading.Thread(target=replay(first)), []
    other = threading.Thread(target=replay(lambda: begun.append(one.is_alive())))
    one.start()
    assert inside.wait(30)
    before = len(cuda.log)
    other.start()
    other.join(0.2)
    waits = other.is_alive() and not cuda.log[before:]
    may_end.set()
    for thread in (one, other):
        thread.join(30)
    assert waits and len(begun) == 2 and [each[0] for each in cuda.log].count("replay") == 2


def test_a_model_is_launched_in_order_whatever_the_stream(cuda):
    """Of its own device: kernels of two streams would overlap otherwise, and share what they write."""
    lock, first, second = LaunchLock(SECOND), torch.cuda.Stream(SECOND), torch.cuda.Stream(SECOND)
    for stream in (first, first, second, second, first):
        with torch.cuda.stream(stream), lock:
            cuda.log.append(("launch", stream))
    waits = [each for each in cuda.log if each[0] in ("wait", "launch")]
    after = lambda stream, other: ("wait", stream, other.name)  # noqa: E731
    launch = lambda stream: ("launch", stream)  # noqa: E731
    assert waits == [
        launch(first), launch(first), after(second, first), launch(second), launch(second), after(first, second), launch(first)
    ]  # fmt: skip
    with torch.cuda.stream(second):
        second.wait_stream = lambda other: (_ for _ in ()).throw(RuntimeError("the stream is gone"))
        with pytest.raises(RuntimeError, match="the stream is gone"), lock:
            pass
    with lock:
        assert lock.locked()
    assert cuda.log[-1] == ("wait of the default stream", first.name) and not lock.locked()


# ---------------------------------------------------------------------------------------------------- what is captured


def lint(body):
    with CaptureLint() as mode:
        held = body()
    del held
    return mode.faults


DEVICE = torch.arange(4.0)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (lambda: DEVICE[0].item() and None, "_local_scalar_dense waits"),
        (lambda: bool(DEVICE[1]) and None, "waits"),
        (lambda: DEVICE[DEVICE > 1] is None, "waits"),
        (lambda: torch.tensor([1.0]) is None, "lift_fresh waits"),
        (lambda: DEVICE.to("meta") is None, "_to_copy copies between devices"),
        (lambda: DEVICE * 2, "mul made memory that is still held"),
    ],
    ids=["item", "bool", "mask", "tensor", "copy", "escape"],
)
def test_the_lint_finds(body, fault):
    assert any(fault in each for each in lint(body))


def test_the_lint_lets_pass():
    out = torch.zeros(4)

    def body():
        out.copy_(DEVICE * 2)
        out.index_copy_(0, DEVICE.long()[:1], DEVICE[1:2])
        return DEVICE[1:]

    assert not lint(body)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "full"},
        {"period": 4},
        {"period": 4, "tree_width": 3, "sparsity": "fsparse"},
        {"period": 20, "sparsity": "cascade"},
        {"period": 7, "tree_width": 4},
        {"period": "auto"},
    ],
    ids=str,
)
def test_what_is_captured_neither_waits_nor_keeps_memory(one_thread, monkeypatch, values):
    """Periods and passes, of up to sixteen rows and of more."""
    faults, bodies = [], set()

    def linted(replay):
        before = [tensor.clone() for tensor in replay._state]
        replay._body()  # as before a capture: what is made once is there then
        for tensor, value in zip(replay._state, before):
            tensor.copy_(value)
        with CaptureLint() as mode:
            replay._body()
        bodies.add(replay._what)
        faults.extend(f"{replay._what}: {fault}" for fault in mode.faults)

    monkeypatch.setattr(Replay, "__call__", linted)
    with emulated(_simt):
        engine = Engine(tiny("mistral", torch.bfloat16))
        engine.generate(prompt(9), config=SiriusConfig(**values), max_new_tokens=12, **GREEDY)
    assert bodies and not faults
