import pytest
import torch
from backends import (
    MLP_SHAPES,
    U,
    activation_error,
    apart,
    as_float,
    assert_close,
    assert_same_bits,
    exact_activation,
    exponential_error,
    neuron_lists,
    poison_unselected,
    poisoned,
    randn,
    small_integers,
    walled,
)

from sirius_ext.kernels import ops, reference
from sirius_ext.kernels.matrix import Matrix

LISTS = list(neuron_lists(8))
ACTIVATIONS = list(ops.ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
@pytest.mark.parametrize("kind", LISTS)
def test_against_reference(backend, dtype, shape, kind, activation):
    m, hidden, intermediate = shape
    neurons = neuron_lists(intermediate)[kind]
    x = walled(randn(m, hidden, dtype=dtype))
    gate, up = randn(intermediate, hidden, dtype=dtype), randn(intermediate, hidden, dtype=dtype)
    exact = reference.gate_up(*as_float(x, gate, up, neurons), activation=activation)
    rows = slice(None) if neurons is None else neurons.long()
    error = activation_error(x, gate[rows], activation, up[rows])

    gate, up = walled(poison_unselected(gate, neurons)), walled(poison_unselected(up, neurons))
    out = poisoned(*exact.shape, dtype=dtype)
    neurons = None if neurons is None else walled(neurons)
    assert backend.gate_up(x, gate, up, neurons, activation=activation, out=out.tensor) is out.tensor
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("kind", ["dense", "odd"])
def test_rows_that_stand_apart(kernels, dtype, kind):
    x, gate, up = (randn(n, 151, dtype=dtype) for n in (3, 33, 33))
    neurons = neuron_lists(33)[kind]
    assert_same_bits(kernels.gate_up(x, apart(gate), apart(up), neurons), kernels.gate_up(x, gate, up, neurons))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_integers_leave_only_the_activation(backend, dtype, activation):
    x, gate = small_integers(7, 151, dtype=dtype), small_integers(33, 151, dtype=dtype)
    up = small_integers(33, 151, dtype=dtype)
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    out = backend.gate_up(x, gate, up, activation=activation)
    assert out.dtype == dtype
    twin = 4 * U * (g * u).abs() if backend is reference and activation == "gelu_tanh" else 0.0
    assert_close(out, exact_activation(g, activation) * u, exponential_error(g, u, activation) + twin)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", [-60000.0, -200.0, 0.0, 200.0, 60000.0])
def test_far_from_zero(backend, dtype, gate, activation):
    """The activation of a large number is the number, of a large negative one zero; neither is NaN."""
    x, up = torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    out = backend.gate_up(x, torch.tensor([[gate]], dtype=dtype), up, activation=activation)
    assert_close(out, torch.tensor([[max(gate, 0.0)]], dtype=dtype), 1e-30)


@pytest.mark.parametrize("kind", ["dense", "odd"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(151, 33), (576, 129)])
def test_batch_invariance(kernels, dtype, kind, hidden, intermediate):
    x, neurons = randn(17, hidden, dtype=dtype), neuron_lists(intermediate)[kind]
    gate, up = randn(intermediate, hidden, dtype=dtype), randn(intermediate, hidden, dtype=dtype)
    alone = torch.cat([kernels.gate_up(row, gate, up, neurons) for row in x.split(1)])
    for m in (2, 3, 7, 16, 17):
        assert_same_bits(kernels.gate_up(x[:m], gate, up, neurons), alone[:m])
    assert_same_bits(kernels.gate_up(x.flip(0), gate, up, neurons), alone.flip(0))


@pytest.mark.parametrize("m", [1, 16])
def test_thread_invariance(cpu_kernels, dtype, m):
    x, neurons = randn(m, 576, dtype=dtype), neuron_lists(1134)["odd"]
    gate, up = randn(1134, 576, dtype=dtype), randn(1134, 576, dtype=dtype)
    torch.set_num_threads(1)
    one = cpu_kernels.gate_up(x, gate, up, neurons)
    torch.set_num_threads(2)
    assert_same_bits(cpu_kernels.gate_up(x, gate, up, neurons), one)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "^x: expected a tensor"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "^x: "),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "^x: .*on meta"),
        ({"x": torch.zeros(2, 8, 1)}, ValueError, "^x: expected shape"),
        ({"x": torch.zeros(0, 8)}, ValueError, "^x: "),
        ({"gate": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "^gate: "),
        ({"gate": torch.zeros(4, 7)}, ValueError, "^gate: expected shape"),
        ({"up": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "^up: "),
        ({"up": torch.zeros(5, 8)}, ValueError, "^up: expected shape"),
        ({"up": torch.zeros(8, 4).T}, ValueError, "^up: expected a contiguous"),
        ({"neurons": torch.tensor([0, 1])}, TypeError, "^neurons: expected torch.int32"),
        ({"neurons": torch.tensor([[0, 1]], dtype=torch.int32)}, ValueError, "^neurons: expected shape"),
        ({"neurons": torch.tensor([], dtype=torch.int32)}, ValueError, "^neurons: expected at least 1"),
        ({"neurons": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "^neurons: expected values in"),
        ({"neurons": torch.tensor([-1, 2], dtype=torch.int32)}, ValueError, "^neurons: expected values in"),
        ({"neurons": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "^neurons: .*on meta"),
        ({"activation": "relu"}, ValueError, "^activation: expected one of silu, gelu_tanh, got 'relu'"),
        ({"up": Matrix(torch.zeros(5, 8))}, ValueError, "^up: expected shape"),
        ({"up": Matrix(torch.zeros(4, 8).half())}, TypeError, "^up: "),
        ({"up": Matrix(torch.zeros(4, 8, device="meta"))}, ValueError, "^up: .*on meta"),
        ({"up": Matrix(torch.zeros(8, 4).T)}, ValueError, "^up: expected a contiguous"),
        ({"out": torch.zeros(2, 3)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 4, dtype=torch.bfloat16)}, TypeError, "^out: "),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "gate": torch.zeros(4, 8), "up": torch.zeros(4, 8)}
    with pytest.raises(error, match=message):
        ops.gate_up(**arguments | change)
