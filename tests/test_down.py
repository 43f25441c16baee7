import pytest
import torch
from backends import (
    Guarded,
    U,
    apart,
    as_float,
    assert_close,
    assert_same_bits,
    neuron_lists,
    poison_unselected,
    poisoned,
    randn,
    small_integers,
    sum_error,
    walled,
)

from sirius_ext.kernels import ops, reference

# (rows, intermediate, hidden)
SHAPES = [
    (1, 1, 1),
    (1, 64, 31),
    (2, 33, 100),
    (3, 151, 129),
    (5, 1134, 33),
    (7, 63, 64),
    (16, 129, 151),
    (17, 576, 63),
    (40, 31, 576),
]
LISTS = list(neuron_lists(8))


def error_of(x, weight, residual=None):
    terms = x.float().abs() @ weight.float().abs()
    return sum_error(terms if residual is None else terms + residual.float().abs(), x.shape[1] + 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", LISTS)
def test_against_reference(backend, dtype, shape, kind):
    m, intermediate, hidden = shape
    neurons = neuron_lists(intermediate)[kind]
    kept = intermediate if neurons is None else len(neurons)
    x, weight = walled(randn(m, kept, dtype=dtype)), randn(intermediate, hidden, dtype=dtype)
    residual = walled(randn(m, hidden, dtype=dtype)) if kind in ("one", "odd") else None
    exact = reference.down(*as_float(x, weight, neurons, residual))
    error = error_of(x, weight if neurons is None else weight[neurons.long()], residual)

    weight = walled(poison_unselected(weight, neurons))
    out = poisoned(m, hidden, dtype=dtype)
    assert backend.down(x, weight, None if neurons is None else walled(neurons), residual, out=out.tensor) is out.tensor
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "odd"])
def test_integers_are_exact(backend, dtype, shape, kind):
    m, intermediate, hidden = shape
    neurons = neuron_lists(intermediate)[kind]
    rows = torch.arange(intermediate) if neurons is None else neurons.long()
    x, weight = small_integers(m, len(rows), dtype=dtype), small_integers(intermediate, hidden, dtype=dtype)
    residual = small_integers(m, hidden, dtype=dtype)
    exact = x.double() @ weight[rows].double() + residual.double()
    assert_same_bits(backend.down(x, weight, neurons, residual), exact.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale(backend, dtype, shape):
    m, intermediate, hidden = shape
    x, weight = walled(randn(m, intermediate, dtype=dtype)), walled(randn(intermediate, hidden, dtype=dtype))
    residual, out = walled(randn(m, hidden, dtype=dtype)), poisoned(m, hidden, dtype=dtype)
    backend.down(x, weight, residual=residual, scale=0.37, out=out.tensor)
    exact = reference.down(*as_float(x, weight, None, residual), scale=0.37)
    assert_close(out.check(), exact, 0.37 * error_of(x, weight) + 4 * U * (exact.abs() + 2 * residual.float().abs()))


def test_scale_is_of_the_sum_alone(backend, dtype):
    x, weight, residual = (small_integers(*shape, dtype=dtype) for shape in ((7, 151), (151, 33), (7, 33)))
    exact = 0.5 * (x.double() @ weight.double()) + residual.double()
    assert_same_bits(backend.down(x, weight, residual=residual, scale=0.5), exact.to(dtype))


@pytest.mark.parametrize("kind", ["dense", "odd"])
def test_rows_that_stand_apart(kernels, dtype, kind):
    neurons = neuron_lists(151)[kind]
    x, weight = randn(3, 151 if neurons is None else len(neurons), dtype=dtype), randn(151, 63, dtype=dtype)
    assert_same_bits(kernels.down(x, apart(weight), neurons), kernels.down(x, weight, neurons))


def test_residual_may_be_the_output(backend, dtype):
    x, weight, residual = randn(7, 100, dtype=dtype), randn(100, 63, dtype=dtype), randn(7, 63, dtype=dtype)
    out = Guarded(residual)
    backend.down(x, weight, residual=out.tensor, out=out.tensor)
    assert_same_bits(out.check(), backend.down(x, weight, residual=residual))


@pytest.mark.parametrize("kind", ["dense", "odd"])
@pytest.mark.parametrize(("intermediate", "hidden"), [(33, 151), (151, 64), (1134, 129)])
def test_batch_invariance(kernels, dtype, kind, intermediate, hidden):
    neurons = neuron_lists(intermediate)[kind]
    kept = intermediate if neurons is None else len(neurons)
    x, weight = randn(17, kept, dtype=dtype), randn(intermediate, hidden, dtype=dtype)
    alone = torch.cat([kernels.down(row, weight, neurons) for row in x.split(1)])
    for m in (2, 3, 7, 16, 17):
        assert_same_bits(kernels.down(x[:m], weight, neurons), alone[:m])
    assert_same_bits(kernels.down(x.flip(0), weight, neurons), alone.flip(0))


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("intermediate", "hidden"), [(1134, 576), (1134, 31)])
def test_thread_invariance(cpu_kernels, dtype, m, intermediate, hidden):
    x, weight = randn(m, intermediate, dtype=dtype), randn(intermediate, hidden, dtype=dtype)
    torch.set_num_threads(1)
    one = cpu_kernels.down(x, weight)
    torch.set_num_threads(2)
    assert_same_bits(cpu_kernels.down(x, weight), one)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "^x: expected a tensor"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "^x: "),
        ({"x": torch.zeros(2, 4, device="meta")}, ValueError, "^x: .*on meta"),
        ({"x": torch.zeros(2, 5)}, ValueError, "^x: expected shape"),
        ({"x": torch.zeros(0, 4)}, ValueError, "^x: "),
        ({"weight": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "^weight: "),
        ({"weight": torch.zeros(4)}, ValueError, "^weight: expected shape"),
        ({"weight": torch.zeros(8, 4).T}, ValueError, "^weight: expected a contiguous"),
        ({"weight": torch.zeros(4, 0)}, ValueError, "^weight: "),
        ({"neurons": torch.tensor([0, 1], dtype=torch.int32)}, ValueError, "^x: expected shape"),
        ({"neurons": torch.tensor([0, 1, 2, 3])}, TypeError, "^neurons: expected torch.int32"),
        ({"neurons": torch.tensor([0, 1, 2, 4], dtype=torch.int32)}, ValueError, "^neurons: expected values in"),
        ({"neurons": torch.tensor([], dtype=torch.int32)}, ValueError, "^neurons: expected at least 1"),
        ({"residual": torch.zeros(2, 7)}, ValueError, "^residual: expected shape"),
        ({"residual": torch.zeros(2, 8, dtype=torch.float16)}, TypeError, "^residual: "),
        ({"out": torch.zeros(1, 8)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 8, dtype=torch.float16)}, TypeError, "^out: "),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.down(**{"x": torch.zeros(2, 4), "weight": torch.zeros(4, 8)} | change)
