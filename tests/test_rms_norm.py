import math

import pytest
import torch
from backends import Guarded, U, as_float, assert_close, assert_same_bits, poisoned, randn, walled

from sirius_ext.kernels import ops, reference

# (rows, hidden)
SHAPES = [(1, 1), (1, 576), (2, 31), (3, 33), (5, 63), (7, 64), (16, 100), (17, 129), (40, 151), (2, 1134)]


def error_of(exact, hidden):
    """All squares are positive: the sum's relative error is about 8 sqrt(H) U on either side, the root halves it."""
    return (8 * math.sqrt(hidden) + 16) * U * exact.double().abs()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_against_reference(backend, dtype, shape, scale):
    x, weight = walled((randn(*shape, dtype=dtype) * scale).to(dtype)), walled(randn(shape[1], dtype=dtype))
    out = poisoned(*shape, dtype=dtype)
    assert backend.rms_norm(x, weight, 1e-5, out=out.tensor) is out.tensor
    exact = reference.rms_norm(*as_float(x, weight, 1e-5))
    assert_close(out.check(), exact, error_of(exact, shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_offset_and_residual(backend, dtype, shape, offset):
    x, weight = walled(randn(*shape, dtype=dtype)), walled(randn(shape[1], dtype=dtype))
    residual, out = walled(randn(*shape, dtype=dtype)), poisoned(*shape, dtype=dtype)
    assert backend.rms_norm(x, weight, 1e-6, residual, offset=offset, out=out.tensor) is out.tensor
    exact = reference.rms_norm(*as_float(x, weight, 1e-6, residual), offset=offset)
    normed = reference.rms_norm(*as_float(x, weight.float().abs() + offset, 1e-6))
    assert_close(out.check(), exact, error_of(normed, shape[1]) + 2 * U * exact.abs())


def test_where_the_output_may_be(backend, dtype):
    x, residual, weight = randn(7, 129, dtype=dtype), randn(7, 129, dtype=dtype), randn(129, dtype=dtype)
    expected = backend.rms_norm(x, weight, 1e-6, residual, offset=1.0)
    out = Guarded(residual)
    backend.rms_norm(x, weight, 1e-6, out.tensor, offset=1.0, out=out.tensor)
    assert_same_bits(out.check(), expected)
    out = Guarded(x)
    backend.rms_norm(out.tensor, weight, 1e-6, residual, offset=1.0, out=out.tensor)
    assert_same_bits(out.check(), expected)


def test_zeros_stay_zeros(backend, dtype):
    out = backend.rms_norm(torch.zeros(2, 33, dtype=dtype), torch.ones(33, dtype=dtype), 1e-6)
    assert_same_bits(out, torch.zeros(2, 33, dtype=dtype))


@pytest.mark.parametrize("hidden", [33, 151, 1134])
def test_batch_and_thread_invariance(kernels, dtype, hidden):
    x, weight = randn(17, hidden, dtype=dtype), randn(hidden, dtype=dtype)
    alone = torch.cat([kernels.rms_norm(row, weight, 1e-5) for row in x.split(1)])
    for m in (2, 3, 7, 16, 17):
        assert_same_bits(kernels.rms_norm(x[:m], weight, 1e-5), alone[:m])
    torch.set_num_threads(1)
    assert_same_bits(kernels.rms_norm(x, weight, 1e-5), alone)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "x"}, TypeError, "^x: expected a tensor"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "^x: "),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "^x: .*on meta"),
        ({"x": torch.zeros(8)}, ValueError, "^x: expected shape"),
        ({"x": torch.zeros(0, 8)}, ValueError, "^x: "),
        ({"weight": torch.zeros(7)}, ValueError, "^weight: expected shape"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, TypeError, "^weight: "),
        ({"residual": torch.zeros(1, 8)}, ValueError, "^residual: expected shape"),
        ({"residual": torch.zeros(2, 8, dtype=torch.float16)}, TypeError, "^residual: "),
        ({"out": torch.zeros(2, 9)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 8, dtype=torch.float16)}, TypeError, "^out: "),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(**{"x": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": 1e-5} | change)
