"""Neurons that arrive from a file: every byte where it belongs, whatever stays in memory, and nothing wrong in silence."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sirius_ext.kernels.checks import checksums
from sirius_ext.kernels.stream import GRAIN, PAGE, Image, Stream

ROWS, LAYERS = 200, 5


def up(number, multiple):
    return -(-number // multiple) * multiple


class Written:
    """A file of images, and what is in it. bundles: bytes of a neuron in each image."""

    def __init__(self, folder, bundles=(576, 192), rows=ROWS, layers=LAYERS):
        torch.manual_seed(0)
        self.path, self.rows, at = folder / "neurons.bin", rows, PAGE
        self.data = [[torch.randint(0, 256, (rows, size), dtype=torch.uint8) for size in bundles] for _ in range(layers)]
        self.places = []
        with open(self.path, "wb") as file:
            for images in self.data:
                self.places.append([])
                for each in images:
                    file.seek(at)
                    file.write(each.numpy().tobytes())
                    self.places[-1].append((at, each.shape[1], up(each.numel(), PAGE)))
                    at += up(each.numel(), PAGE)
            file.truncate(at)
        self.checks = torch.cat([checksums(each)[None] for images in self.data for each in images])

    def stream(self, resident=(0, 0), slots=0, buffers=2, **options):
        layers = [[Image(*place, self.rows, count) for place, count in zip(images, resident)] for images in self.places]
        stream = Stream(self.path, layers, self.rows, self.checks, buffers, slots, **options)
        for layer in range(len(layers)):
            stream.fill(layer)
        return stream

    def check(self, stream, layer):
        for number, wanted in enumerate(self.data[layer]):
            assert torch.equal(stream.bundles(layer, number), wanted), (layer, number)

    def placed(self, stream, layer, neurons):
        """Whether neurons are where the table says."""
        table = (ctypes.c_uint64 * self.rows).from_address(stream.places(layer))
        size = self.data[layer][0].shape[1]
        for neuron in neurons:
            assert table[neuron], (layer, neuron)
            assert ctypes.string_at(table[neuron], size) == self.data[layer][0][neuron].numpy().tobytes(), (layer, neuron)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("stream"))


def passes(written, stream, times=3):
    for _ in range(times):
        for layer in range(LAYERS):
            stream.need(layer)
            written.check(stream, layer)
            stream.done(layer)


@pytest.mark.parametrize("buffers", [1, 2, 3, LAYERS, LAYERS + 2])
@pytest.mark.parametrize(
    "resident", [(0, 0), (GRAIN, 0), (ROWS, 0), (ROWS, 2 * GRAIN), (ROWS, ROWS), (0, ROWS), (3 * GRAIN, ROWS)], ids=str
)
def test_every_layer_is_there_when_it_is_needed(written, resident, buffers):
    passes(written, written.stream(resident, buffers=buffers))


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_layers_may_be_needed_in_any_order_and_left_at_any_time(written, buffers):
    stream, order = written.stream((GRAIN, 0), buffers=buffers), random.Random(0)
    for _ in range(60):
        layer = order.randrange(LAYERS)
        stream.need(layer)
        written.check(stream, layer)
        if order.random() < 0.5:
            stream.done(layer)


@pytest.mark.parametrize("resident", [0, GRAIN])
@pytest.mark.parametrize("slots", [7, 90])
def test_sets_are_held_and_kept(written, resident, slots):
    stream, order = written.stream((resident, 0), slots), random.Random(1)
    for step in range(20):
        sets = torch.tensor([sorted(order.sample(range(ROWS), slots)) for _ in range(LAYERS)], dtype=torch.int32)
        if step % 2:
            for layer in range(LAYERS):
                stream.need(layer)
                stream.keep(layer, sets[layer])
                written.check(stream, layer)
                stream.done(layer)
        before = stream.statistics.fetched
        stream.hold(sets)
        assert (stream.statistics.fetched == before) == bool(step % 2)  # what was kept need not be read again
        for layer in range(LAYERS):
            written.placed(stream, layer, [*range(resident), *sets[layer].tolist()])
    passes(written, stream)  # rows come from slots, too


def test_a_set_larger_than_the_slots_is_refused(written):
    with pytest.raises(OSError, match="more neurons than there is room for"):
        written.stream((0, 0), 5).hold(torch.arange(6, dtype=torch.int32).expand(LAYERS, 6).contiguous())


def test_what_is_read_is_counted(written):
    stream = written.stream((GRAIN, 0))
    passes(written, stream, 2)
    each = sum((ROWS - count) * size for count, size in zip((GRAIN, 0), (576, 192)))
    # Two passes, and the layers that are read on after the second.
    assert 2 * LAYERS * each <= stream.statistics.bytes <= (2 * LAYERS + 2) * each


# ------------------------------------------------------------------------------------------------------------- a disk that fails

SHORT, FAILS, SLOW, STALLS, CHANGED, ENDS, FAILS_LATE = range(1, 8)
PROGRAM = """
import ctypes, sys, time
sys.path.insert(0, sys.argv[1])
import test_stream as t
from pathlib import Path

disk = ctypes.CDLL(sys.argv[2])
def fault(kind, good=0):
    disk.set_fault(kind, good, b"neurons.bin")

written = t.Written(Path(sys.argv[3]))

def fails(stream, wanted, run=t.passes):
    try:
        run(written, stream)
    except OSError as error:
        assert wanted in str(error), error
    else:
        raise AssertionError(f"no error that says {wanted}")

for kind in (t.SHORT, t.SLOW):
    for resident, slots in (((0, 0), 0), ((t.GRAIN, 0), 0), ((0, 0), 30)):
        fault(kind)
        stream = written.stream(resident, slots, buffers=3)
        t.passes(written, stream)
        if slots:
            t.holding(written, stream, slots)
    fault(0)
for kind, wanted in ((t.FAILS, "Input/output error"), (t.ENDS, "cut off"), (t.CHANGED, "is not what was written")):
    for good in (0, 3, 20):
        stream = written.stream((t.GRAIN, 0))
        fault(kind, good)
        fails(stream, wanted)
        fault(0)
        t.passes(written, stream)  # a disk that has recovered
    stream = written.stream((0, 0), 30)
    fault(kind)
    fails(stream, wanted, lambda written, stream: t.holding(written, stream, 30))
    fault(0)
    t.holding(written, stream, 30)
    t.passes(written, stream)
    fault(kind)
    fails(None, wanted, lambda written, _: written.stream((t.GRAIN, 0)))
    fault(0)

stream = written.stream((t.GRAIN, 0))
stream.need(0)
fault(t.FAILS_LATE)
stream.done(0)  # reads on
while not disk.count_faults():
    time.sleep(0.001)
fault(0)
for layer in (1, 2, 3):  # which fails, but the disk has recovered
    stream.need(layer)
    written.check(stream, layer)
    stream.done(layer)

stream = written.stream((0, 0), 30, readers=t.LAYERS + 1, patience=0.5)  # one for each layer's set, and one that is left
sets = t.torch.arange(30, dtype=t.torch.int32).expand(t.LAYERS, 30).contiguous()
fault(t.STALLS)
fails(stream, "has not given anything", lambda written, stream: stream.hold(sets))
fault(0)
for layer in range(t.LAYERS):  # the readers that are left behind may write to the slots at any time
    stream.need(layer)
    written.check(stream, layer)
    stream.keep(layer, sets[layer] + 30)
    assert not any((ctypes.c_uint64 * t.ROWS).from_address(stream.places(layer))), layer
    stream.done(layer)

stream = written.stream((t.GRAIN, 0), patience=0.5)
t.passes(written, stream)
fault(t.STALLS)
started = time.perf_counter()
fails(stream, "has not given anything")
del stream
assert time.perf_counter() - started < 20
print("all as it should be", flush=True)
"""


def holding(written, stream, slots):
    sets = torch.stack([torch.randperm(ROWS)[:slots].sort().values for _ in range(LAYERS)]).int()
    stream.hold(sets)
    for layer in range(LAYERS):
        written.placed(stream, layer, sets[layer].tolist())


def faulty_disk(folder):
    """A library that is to be loaded before the C library, made in a folder."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, source = folder / "faulty_disk.so", Path(__file__).with_name("faulty_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def test_a_disk_that_fails(tmp_path):
    """Reads that are short, slow or out of order change nothing; those that fail, end, stall or give other bytes are errors."""
    library, here = faulty_disk(tmp_path), Path(__file__).parent
    environment = os.environ | {"LD_PRELOAD": str(library)}
    arguments = [sys.executable, "-c", PROGRAM, str(here), str(library), str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all as it should be\n", done.stderr
