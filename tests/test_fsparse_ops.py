"""FSparse's three ops: gate, select, up."""

import math

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
    call,
    dot_error,
    exact_activation,
    exponential_error,
    neuron_lists,
    poison_unselected,
    poisoned,
    randn,
    small_integers,
    walled,
)
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext.kernels import ops, reference

LISTS = [kind for kind in neuron_lists(8) if kind != "dense"]
TINY = torch.finfo(torch.float32).tiny


# ------------------------------------------------------------------------------------------------------------------------ gate


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
def test_gate_against_reference(backend, dtype, shape, activation):
    m, hidden, intermediate = shape
    x, weight = walled(randn(m, hidden, dtype=dtype)), walled(randn(intermediate, hidden, dtype=dtype))
    exact = reference.gate(*as_float(x, weight), activation=activation)
    error = activation_error(x, weight, activation)
    out = poisoned(m, intermediate, dtype=torch.float32)
    assert backend.gate(x, weight, activation=activation, out=out.tensor) is out.tensor
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_gate_of_integers_leaves_only_the_activation(backend, dtype, activation):
    x, weight = small_integers(7, 151, dtype=dtype), small_integers(33, 151, dtype=dtype)
    g = x.double() @ weight.double().T
    out = backend.gate(x, weight, activation=activation)
    assert out.dtype == torch.float32
    twin = 4 * U * g.abs() if backend is reference and activation == "gelu_tanh" else 0.0
    assert_close(out, exact_activation(g, activation), exponential_error(g, activation=activation) + twin)


def test_gate_and_up_with_rows_that_stand_apart(kernels, dtype):
    x, weight, neurons = randn(3, 151, dtype=dtype), randn(33, 151, dtype=dtype), neuron_lists(33)["odd"]
    gates = kernels.gate(x, weight)
    assert_same_bits(kernels.gate(x, apart(weight)), gates)
    assert_same_bits(kernels.up(x, apart(weight), gates, neurons), kernels.up(x, weight, gates, neurons))


@pytest.mark.parametrize("gate", [-60000.0, -200.0, 0.0, 200.0, 60000.0])
def test_gate_far_from_zero(backend, dtype, gate):
    out = backend.gate(torch.ones(1, 1, dtype=dtype), torch.tensor([[gate]], dtype=dtype))
    assert_close(out, torch.tensor([[max(float(torch.tensor(gate, dtype=dtype)), 0.0)]]), 1e-30)


def test_gate_is_not_rounded(backend):
    """Neurons that differ by less than T can tell are still told apart."""
    x, weight = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[100.0, 0.0], [100.0, 2.0**-7]], dtype=torch.bfloat16)
    assert backend.gate(x, weight).tolist() == [[100.0, 100.0 + 2.0**-7]]


# ---------------------------------------------------------------------------------------------------------------------- select

# Zeros of both signs, the smallest and largest denormals, the smallest normal number, neighbours, and the ends of the range.
SPECIAL = [
    0.0, -0.0, 1.4e-45, -1.4e-45, 2.8e-45, 1e-40, 1.1754942e-38, 1.17549435e-38, -1.0, 1.0, 1.0000001, -1.0000001, 0.99999994,
    3e38, -3e38, math.inf, -math.inf,
]  # fmt: skip


@st.composite
def gates(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape = draw(st.integers(1, 5)), draw(st.one_of(st.integers(1, 8), st.integers(1, 300)))
    kind = draw(st.sampled_from(["normal", "special", "few", "mixed"]))
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    normal = torch.randn(shape, generator=generator)
    few = torch.randint(-2, 3, shape, generator=generator) * 2.0**-10
    mixed = torch.where(torch.rand(shape, generator=generator) < 0.1, special, normal)
    return {"normal": normal, "special": special, "few": few, "mixed": mixed}[kind]


@given(gates(), st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))
def test_select_the_largest(backend, gates, density):
    intermediate = gates.shape[1]
    kept = max(1, round(density * intermediate))
    neurons = backend.select(walled(gates), kept)
    assert_same_bits(neurons, reference.select(gates, kept))
    scores = sum(row.abs() for row in gates).tolist()
    assert neurons.tolist() == sorted(sorted(range(intermediate), key=lambda i: (-scores[i], i))[:kept])


@given(gates(), st.one_of(st.sampled_from([0.0, -1.0, math.inf, 1.4e-45, 2.0**-10]), st.floats(0, 3)))
def test_select_by_threshold(backend, gates, threshold):
    neurons = backend.select(walled(gates), threshold=threshold)
    assert_same_bits(neurons, reference.select(gates, threshold=threshold))
    least = len(gates) * torch.tensor(threshold, dtype=torch.float32)
    scores = sum(row.abs() for row in gates)
    assert neurons.tolist() == [i for i, score in enumerate(scores) if score >= least]


@pytest.mark.parametrize("intermediate", [1, 2, 63, 64, 1000, 14336])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.4e-45, 2.5, math.inf])
def test_of_equals_the_lower_index(backend, intermediate, value):
    gates = torch.full((1, intermediate), value)
    for kept in {1, (intermediate + 1) // 2, intermediate}:
        assert backend.select(gates, kept).tolist() == list(range(kept))


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("intermediate", [1134, 14336])
def test_select_at_every_size(backend, m, intermediate):
    gates = torch.randn(m, intermediate)
    for kept in (1, 2, intermediate // 2, intermediate - 1, intermediate):
        assert_same_bits(backend.select(gates, kept), reference.select(gates, kept))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("intermediate", [2049, 8193, 16385, 28672, 28673, 53248])
def test_select_among_many(backend, m, intermediate):
    gates = torch.randn(m, intermediate)
    assert_same_bits(backend.select(gates, intermediate // 3), reference.select(gates, intermediate // 3))
    assert_same_bits(backend.select(gates, threshold=1.0), reference.select(gates, threshold=1.0))


@pytest.mark.parametrize("m", [1, 4, 5, 17])
def test_select_by_the_rows_that_are_alive(cuda_functions, m):
    """Their number stands in device memory; the others are not read."""
    intermediate = 700
    for alive in sorted({1, (m + 1) // 2, m}):
        gates = torch.randn(m, intermediate)
        gates[alive:] = math.nan
        for kept, threshold in ((1, None), (233, None), (0, 0.9), (0, 100.0)):
            neurons, count = poisoned(intermediate, dtype=torch.int32), poisoned(1, dtype=torch.int32)
            call(
                cuda_functions,
                "select",
                workspace=cuda_functions.select_workspace(intermediate),
                values=walled(gates),
                threshold=None if threshold is None else torch.tensor([threshold]),
                neurons=neurons.tensor,
                count=count.tensor,
                alive=torch.tensor([alive], dtype=torch.int32),
                num_rows=m,
                intermediate=intermediate,
                candidates=intermediate,
                kept=kept,
            )
            expected = reference.select(gates[:alive], kept or None, threshold)
            assert count.check().tolist() == [len(expected)]
            assert_same_bits(neurons.check()[: len(expected)], expected)


def test_one_set_serves_all_rows(backend):
    """The sum decides, not the largest single gate; signs do not cancel."""
    gates = torch.tensor([[5.0, 3.0, 0.0, -2.0], [0.0, -3.0, 0.0, 2.0]])
    assert backend.select(gates, 1).tolist() == [1]
    assert backend.select(gates, 2).tolist() == [0, 1]
    assert backend.select(gates, threshold=2.5).tolist() == [0, 1]
    assert backend.select(gates, threshold=2.0).tolist() == [0, 1, 3]


def test_a_threshold_may_keep_none_or_all(backend):
    gates = torch.randn(3, 100)
    none = backend.select(gates, threshold=100.0)
    assert none.dtype == torch.int32 and none.shape == (0,)
    assert backend.select(gates, threshold=0.0).tolist() == list(range(100))


def test_select_leaves_its_input(backend):
    gates = torch.randn(3, 100)
    before = gates.clone()
    backend.select(gates, 50)
    backend.select(gates, threshold=0.5)
    assert_same_bits(gates, before)


# -------------------------------------------------------------------------------------------------------------------------- up


@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
@pytest.mark.parametrize("kind", LISTS)
def test_up_against_reference(backend, dtype, shape, kind):
    """Neither weights nor gates of the other neurons are read."""
    m, hidden, intermediate = shape
    neurons = neuron_lists(intermediate)[kind]
    x, weight, gates = randn(m, hidden, dtype=dtype), randn(intermediate, hidden, dtype=dtype), torch.randn(m, intermediate)
    rows = neurons.long()
    exact = reference.up(*as_float(x, weight, gates, neurons))
    error = gates[:, rows].abs() * dot_error(x, weight[rows]) + 2 * U * exact.abs() + TINY

    weight, gates = poison_unselected(weight, neurons), poison_unselected(gates.T, neurons).T.contiguous()
    out = poisoned(m, len(neurons), dtype=dtype)
    assert backend.up(walled(x), walled(weight), walled(gates), walled(neurons), out=out.tensor) is out.tensor
    assert_close(out.check(), exact, error)


def test_up_of_integers_is_exact(backend, dtype):
    x, weight = small_integers(7, 151, dtype=dtype), small_integers(33, 151, dtype=dtype)
    gates = torch.randint(-3, 4, (7, 33)) * 0.25
    neurons = neuron_lists(33)["unsorted"]
    exact = (gates.double() * (x.double() @ weight.double().T))[:, neurons.long()]
    out = backend.up(x, weight, gates, neurons)
    assert out.dtype == dtype
    assert_same_bits(out, exact.to(dtype))


def test_up_without_neurons(backend, dtype):
    """A threshold may keep none."""
    none = torch.empty(0, dtype=torch.int32)
    out = backend.up(torch.ones(3, 8, dtype=dtype), torch.ones(5, 8, dtype=dtype), torch.ones(3, 5), none)
    assert out.dtype == dtype and out.shape == (3, 0)


@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
def test_up_behind_gate_is_gate_up(backend, dtype, shape):
    m, hidden, intermediate = shape
    x, gate, up = (randn(rows, hidden, dtype=dtype) for rows in (m, intermediate, intermediate))
    gates, everything = backend.gate(x, gate), torch.arange(intermediate, dtype=torch.int32)
    assert_same_bits(backend.up(x, up, gates, everything), backend.gate_up(x, gate, up))


@pytest.mark.parametrize("kind", LISTS)
def test_up_of_a_list_is_gate_up_of_it(kernels, dtype, kind):
    x, gate, up = (randn(rows, 151, dtype=dtype) for rows in (5, 129, 129))
    neurons = neuron_lists(129)[kind]
    assert_same_bits(kernels.up(x, up, kernels.gate(x, gate), neurons), kernels.gate_up(x, gate, up, neurons))


# ------------------------------------------------------------------------------------------------------------------ invariance


@pytest.mark.parametrize(("hidden", "intermediate"), [(151, 33), (576, 129)])
def test_batch_invariance(kernels, dtype, hidden, intermediate):
    x, weight = randn(17, hidden, dtype=dtype), randn(intermediate, hidden, dtype=dtype)
    gates, neurons = torch.randn(17, intermediate), neuron_lists(intermediate)["odd"]
    gated = torch.cat([kernels.gate(row, weight) for row in x.split(1)])
    alone = torch.cat([kernels.up(row, weight, gate, neurons) for row, gate in zip(x.split(1), gates.split(1))])
    for m in (2, 3, 7, 16, 17):
        assert_same_bits(kernels.gate(x[:m], weight), gated[:m])
        assert_same_bits(kernels.up(x[:m], weight, gates[:m], neurons), alone[:m])
    assert_same_bits(kernels.gate(x.flip(0), weight), gated.flip(0))
    assert_same_bits(kernels.up(x.flip(0), weight, gates.flip(0), neurons), alone.flip(0))


@pytest.mark.parametrize("m", [1, 16])
def test_thread_invariance(cpu_kernels, dtype, m):
    x, weight = randn(m, 576, dtype=dtype), randn(1134, 576, dtype=dtype)

    def run(threads):
        torch.set_num_threads(threads)
        gates = cpu_kernels.gate(x, weight)
        neurons = cpu_kernels.select(gates, 567)
        return gates, neurons, cpu_kernels.select(gates, threshold=0.1), cpu_kernels.up(x, weight, gates, neurons)

    one = run(1)
    for threads in (2, 3):
        for out, expected in zip(run(threads), one):
            assert_same_bits(out, expected)


# ---------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "^x: expected a tensor"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "^x: "),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "^x: .*on meta"),
        ({"x": torch.zeros(2, 8, 1)}, ValueError, "^x: expected shape"),
        ({"x": torch.zeros(0, 8)}, ValueError, "^x: "),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(4, 0)}, ValueError, "^x: "),
        ({"x": torch.zeros(8, 2).T}, ValueError, "^x: expected a contiguous"),
        ({"weight": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "^weight: "),
        ({"weight": torch.zeros(4, 7)}, ValueError, "^weight: expected shape"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "^weight: "),
        ({"weight": torch.zeros(8, 4).T}, ValueError, "^weight: expected a contiguous"),
        ({"out": torch.zeros(2, 3)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 4, dtype=torch.bfloat16)}, TypeError, "^out: "),
    ],
)
def test_gate_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.gate(**{"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8)} | change)


def test_gates_of_half_precision_are_float32():
    x, weight = torch.zeros(2, 8, dtype=torch.float16), torch.zeros(4, 8, dtype=torch.float16)
    with pytest.raises(TypeError, match="^out: expected torch.float32"):
        ops.gate(x, weight, out=torch.zeros(2, 4, dtype=torch.float16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [[0.0]]}, TypeError, "^values: expected a tensor"),
        ({"values": torch.zeros(2, 4, dtype=torch.bfloat16)}, TypeError, "^values: expected torch.float32"),
        ({"values": torch.zeros(2, 4, device="meta")}, ValueError, "^values: .*on meta"),
        ({"values": torch.zeros(4)}, ValueError, "^values: expected shape"),
        ({"values": torch.zeros(0, 4)}, ValueError, "^values: "),
        ({"values": torch.zeros(2, 0)}, ValueError, "^values: "),
        ({"values": torch.zeros(4, 2).T}, ValueError, "^values: expected a contiguous"),
        ({"kept": None}, ValueError, "^kept, threshold: expected one of them"),
        ({"threshold": 0.1}, ValueError, "^kept, threshold: expected one of them"),
        ({"kept": 0}, ValueError, "^kept: expected 1 to 4"),
        ({"kept": -1}, ValueError, "^kept: expected 1 to 4"),
        ({"kept": 5}, ValueError, "^kept: expected 1 to 4"),
    ],
)
def test_select_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.select(**{"values": torch.zeros(2, 4), "kept": 2} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "^x: expected a tensor"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "^x: "),
        ({"x": torch.zeros(0, 8)}, ValueError, "^x: "),
        ({"weight": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "^weight: "),
        ({"weight": torch.zeros(4, 7)}, ValueError, "^weight: expected shape"),
        ({"gates": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "^gates: expected torch.float32"),
        ({"gates": torch.zeros(2, 2)}, ValueError, "^gates: expected shape"),
        ({"gates": torch.zeros(1, 4)}, ValueError, "^gates: expected shape"),
        ({"gates": torch.zeros(4, 2).T}, ValueError, "^gates: expected a contiguous"),
        ({"neurons": None}, TypeError, "^neurons: expected a tensor"),
        ({"neurons": torch.tensor([0, 1])}, TypeError, "^neurons: expected torch.int32"),
        ({"neurons": torch.tensor([[0, 1]], dtype=torch.int32)}, ValueError, "^neurons: expected shape"),
        ({"neurons": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "^neurons: expected values in"),
        ({"neurons": torch.tensor([-1, 2], dtype=torch.int32)}, ValueError, "^neurons: expected values in"),
        ({"neurons": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "^neurons: .*on meta"),
        ({"out": torch.zeros(2, 4)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 2, dtype=torch.bfloat16)}, TypeError, "^out: "),
    ],
)
def test_up_errors(change, error, message):
    arguments = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(4, 8),
        "gates": torch.zeros(2, 4),
        "neurons": torch.tensor([0, 3], dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        ops.up(**arguments | change)
