import math

import pytest
import torch
from backends import (
    Guarded,
    U,
    apart,
    as_float,
    assert_close,
    assert_same_bits,
    call,
    in_turns,
    poisoned,
    randn,
    small_integers,
    sum_error,
    walled,
)

from sirius_ext.kernels import ops, reference
from sirius_ext.kernels.matrix import Matrix

# (rows, in, out)
SHAPES = [
    (1, 1, 1), (1, 64, 31), (2, 31, 33), (3, 63, 1), (5, 100, 129), (7, 151, 64), (16, 576, 63), (17, 1134, 100), (40, 33, 151),
    (1, 576, 1134), (16, 129, 129),
]  # fmt: skip


def error_of(x, weight, bias=None, residual=None):
    terms = x.float().abs() @ weight.float().abs().T
    for extra in (bias, residual):
        terms = terms if extra is None else terms + extra.float().abs()
    return sum_error(terms, x.shape[1] + 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extras", ["plain", "bias", "residual"])
def test_against_reference(backend, dtype, shape, extras):
    m, width, rows = shape
    x, weight = walled(randn(m, width, dtype=dtype)), walled(randn(rows, width, dtype=dtype))
    bias = walled(randn(rows, dtype=dtype)) if extras == "bias" else None
    residual = walled(randn(m, rows, dtype=dtype)) if extras == "residual" else None
    out = poisoned(m, rows, dtype=dtype)
    assert backend.linear(x, weight, bias, residual, out=out.tensor) is out.tensor
    exact = reference.linear(*as_float(x, weight, bias, residual))
    assert out.check().dtype == dtype
    assert_close(out.tensor, exact, error_of(x, weight, bias, residual))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact(backend, dtype, shape):
    m, width, rows = shape
    x, weight = small_integers(m, width, dtype=dtype), small_integers(rows, width, dtype=dtype)
    bias, residual = small_integers(rows, dtype=dtype), small_integers(m, rows, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    assert_same_bits(backend.linear(x, weight, bias, residual), exact.to(dtype))
    out = poisoned(m, rows, dtype=torch.float32)
    backend.linear(x, weight, bias, residual, out_dtype=torch.float32, out=out.tensor)
    assert_same_bits(out.check(), exact.float())


@pytest.mark.parametrize(
    ("shape", "scaled", "out_dtype"),
    in_turns(5, SHAPES, [(0.37, 0.0), (1.0, 5.0), (0.37, 3.0)], [None, torch.float32]),
    ids=str,
)
def test_scale_and_softcap(backend, dtype, shape, scaled, out_dtype):
    (m, width, rows), (scale, softcap) = shape, scaled
    x, weight = walled(randn(m, width, dtype=dtype)), walled(randn(rows, width, dtype=dtype))
    bias, residual = walled(randn(rows, dtype=dtype)), walled(randn(m, rows, dtype=dtype))
    out = poisoned(m, rows, dtype=out_dtype or dtype)
    settings = {"scale": scale, "softcap": softcap}
    result = backend.linear(x, weight, bias, residual, **settings, out_dtype=out_dtype, out=out.tensor)
    assert result is out.tensor
    exact = reference.linear(*as_float(x, weight, bias, residual), **settings)
    # tanh's slope is at most 1; it, the products and the quotient add a few units of what is added to the residual.
    added = exact.abs() + residual.float().abs()
    assert_close(out.check(), exact, scale * error_of(x, weight, bias) + 24 * U * added)


def test_scale_is_of_the_sum_and_the_bias_alone(backend, dtype):
    x, weight = small_integers(7, 151, dtype=dtype), small_integers(33, 151, dtype=dtype)
    bias, residual = small_integers(33, dtype=dtype), small_integers(7, 33, dtype=dtype)
    exact = 0.5 * (x.double() @ weight.double().T + bias.double()) + residual.double()
    assert_same_bits(backend.linear(x, weight, bias, residual, scale=0.5), exact.to(dtype))


@pytest.mark.parametrize("softcap", [0.7, 1.0, 30.0])
def test_softcap_of_every_size(backend, softcap):
    """Near zero, where a tanh by exponentials cancels; where its two forms meet; and where it is the cap."""
    sizes = torch.cat([torch.logspace(-30, 5, 1001), softcap * torch.linspace(0.5, 0.75, 257), torch.tensor([0.0, 3e38])])
    values = torch.cat([sizes, -sizes])
    out = backend.linear(torch.ones(1, 1), values[:, None], softcap=softcap)[0]
    exact = torch.tensor(softcap).double() * torch.tanh(values.double() / torch.tensor(softcap).double())
    assert_close(out, exact, 16 * U * exact.abs())


def test_softcap_of_what_is_no_number(backend):
    values = torch.tensor([math.nan, math.inf, -math.inf])
    out = backend.linear(torch.ones(1, 1), values[:, None], softcap=2.0)[0].tolist()
    assert math.isnan(out[0]) and out[1:] == [2.0, -2.0]


@pytest.mark.parametrize("m", [1, 3, 17])
def test_rows_that_stand_apart(kernels, dtype, m):
    x, weight = randn(m, 151, dtype=dtype), randn(33, 151, dtype=dtype)
    assert_same_bits(kernels.linear(x, apart(weight)), kernels.linear(x, weight))


def test_float32_output_is_not_rounded(backend, dtype):
    x, weight = randn(3, 151, dtype=dtype), randn(33, 151, dtype=dtype)
    out = backend.linear(x, weight, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_close(out, reference.linear(*as_float(x, weight)), error_of(x, weight))


def test_residual_may_be_the_output(backend, dtype):
    x, weight = randn(7, 100, dtype=dtype), randn(63, 100, dtype=dtype)
    residual = randn(7, 63, dtype=dtype)
    out = Guarded(residual)
    backend.linear(x, weight, residual=out.tensor, out=out.tensor)
    assert_same_bits(out.check(), backend.linear(x, weight, residual=residual))


@pytest.mark.parametrize("rows", [(33, 7, 64), (5, 2, 1), (40, 16)], ids=str)
@pytest.mark.parametrize(("m", "width"), [(1, 64), (5, 151), (17, 72)])
def test_parts_side_by_side_of_normalised_input(cuda_functions, dtype, m, width, rows):
    """What CUDA's passes ask of it beyond `ops.linear`."""
    x, norm = randn(m, width, dtype=dtype), randn(width, dtype=dtype)
    weights = [walled(randn(n, width, dtype=dtype)) for n in rows]
    biases = [None if i == 1 else walled(randn(n, dtype=dtype)) for i, n in enumerate(rows)]
    matrices = [Matrix(weight) for weight in weights]
    out = poisoned(m, sum(rows), dtype=dtype)
    call(
        cuda_functions,
        "linear",
        dtype=ops.DTYPES[dtype],
        x=walled(x),
        parts=[(matrix.raw, 0 if bias is None else bias.data_ptr()) for matrix, bias in zip(matrices, biases)],
        norm=(norm.data_ptr(), 1e-5, 1.0),
        out=out.tensor,
        num_rows=m,
        out_features=sum(rows),
    )
    normed = ops.rms_norm(x, norm, 1e-5, offset=1.0)
    assert_same_bits(out.check(), torch.cat([ops.linear(normed, *each) for each in zip(weights, biases)], 1))


@pytest.mark.parametrize(("width", "rows"), [(1, 33), (151, 64), (576, 129), (1134, 31)])
def test_batch_invariance(kernels, dtype, width, rows):
    x, weight, bias = randn(17, width, dtype=dtype), randn(rows, width, dtype=dtype), randn(rows, dtype=dtype)
    alone = torch.cat([kernels.linear(row, weight, bias) for row in x.split(1)])
    for m in (2, 3, 7, 16, 17):
        assert_same_bits(kernels.linear(x[:m], weight, bias), alone[:m])
    assert_same_bits(kernels.linear(x.flip(0), weight, bias), alone.flip(0))


@pytest.mark.parametrize("m", [1, 16])
def test_thread_invariance(cpu_kernels, dtype, m):
    x, weight = randn(m, 576, dtype=dtype), randn(1134, 576, dtype=dtype)
    torch.set_num_threads(1)
    one = cpu_kernels.linear(x, weight)
    torch.set_num_threads(2)
    assert_same_bits(cpu_kernels.linear(x, weight), one)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "^x: expected a tensor"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "^x: expected float32, float16 or bfloat16"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "^x: .*on meta"),
        ({"x": torch.zeros(8)}, ValueError, "^x: expected shape"),
        ({"x": torch.zeros(0, 8)}, ValueError, "^x: "),
        ({"x": torch.zeros(8, 2).T}, ValueError, "^x: expected a contiguous"),
        ({"weight": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "^weight: expected torch.float32"),
        ({"weight": torch.zeros(4, 9)}, ValueError, "^weight: expected shape"),
        ({"weight": torch.zeros(4, 8, device="meta")}, ValueError, "^weight: .*on meta"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "^weight: "),
        ({"bias": torch.zeros(5)}, ValueError, "^bias: expected shape"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, TypeError, "^bias: "),
        ({"residual": torch.zeros(1, 4)}, ValueError, "^residual: expected shape"),
        ({"residual": torch.zeros(2, 4, dtype=torch.bfloat16)}, TypeError, "^residual: "),
        ({"weight": Matrix(torch.zeros(4, 9))}, ValueError, "^weight: expected shape"),
        ({"weight": Matrix(torch.zeros(4, 8, dtype=torch.bfloat16))}, TypeError, "^weight: expected torch.float32"),
        ({"weight": Matrix(torch.zeros(4, 8, device="meta"))}, ValueError, "^weight: .*on meta"),
        ({"weight": Matrix(torch.zeros(8, 4).T)}, ValueError, "^weight: expected a contiguous"),
        ({"softcap": -1.0}, ValueError, "^softcap: expected a number of at least 0"),
        ({"softcap": math.nan}, ValueError, "^softcap: expected a number of at least 0"),
        ({"out_dtype": torch.float16}, TypeError, "^out_dtype: "),
        ({"out": torch.zeros(2, 5)}, ValueError, "^out: expected shape"),
        ({"out": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "^out: "),
        ({"out": torch.zeros(2, 8)[:, ::2]}, ValueError, "^out: expected a contiguous"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.linear(**{"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8)} | change)
