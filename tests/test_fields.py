"""Compiled functions take the fields of csrc/params.h by their names; what is wrong with them is said by the name."""

import pytest
import torch

from sirius_ext import _C
from sirius_ext.kernels import products
from sirius_ext.kernels.matrix import Matrix

X, WEIGHT = torch.arange(8.0).view(2, 4), Matrix(torch.eye(4)[:3])


def fields(**change):
    """Of a linear; a value of None leaves the field out."""
    all_of_them = {
        "dtype": 0,
        "x": X.data_ptr(),
        "parts": [(WEIGHT.raw, 0)],
        "out": torch.empty(2, 3).data_ptr(),
        "num_rows": 2,
        "out_features": 3,
        "threads": 1,
    }
    return {name: value for name, value in (all_of_them | change).items() if value is not None}


@pytest.mark.parametrize(
    "parts", [[(WEIGHT.raw, 0)], ((WEIGHT.raw,),), [{"weight": WEIGHT.raw}], [{"bias": 0, "weight": WEIGHT.raw}]]
)
def test_structs_are_tuples_or_dicts(parts):
    out = torch.empty(2, 3)
    _C.linear(**fields(parts=parts, out=out.data_ptr()))
    assert torch.equal(out, X[:, :3])


def test_parts_stand_side_by_side():
    """A stretch of a thread may begin and end in any of them."""
    x, bias = torch.randn(3, 40), torch.randn(33)
    weights = [Matrix(torch.randn(rows, 40)) for rows in (33, 100, 7)]
    out = torch.empty(3, 140)
    parts = [(weights[0].raw, bias.data_ptr()), (weights[1].raw,), {"weight": weights[2].raw}]
    for threads in (1, 2, 3):
        given = {"x": x.data_ptr(), "parts": parts, "out": out.fill_(torch.nan).data_ptr(), "num_rows": 3, "out_features": 140}
        _C.linear(dtype=0, **given, threads=threads)
        expected = torch.cat([products.dot(x, weights[0], bias), *(products.dot(x, weight) for weight in weights[1:])], 1)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "linear: missing argument x"),
        ({"threads": None}, "linear: missing argument threads"),
        ({"y": 1}, "linear: there is no argument named y"),
        ({"x": "1"}, "linear: x: expected an address, got str"),
        ({"x": -1}, "linear: x: expected an address, got int"),
        ({"x": X}, "linear: x: expected an address, got Tensor"),
        ({"num_rows": 1.5}, "linear: num_rows: expected an integer, got float"),
        ({"num_rows": 1 << 40}, "linear: num_rows: does not fit, got 1099511627776"),
        ({"num_rows": 1 << 80}, "linear: num_rows: expected an integer, got int"),
        ({"scale": "1"}, "linear: scale: expected a number, got str"),
        ({"out_f32": 1}, "linear: out_f32: expected a bool, got int"),
        ({"parts": 1}, "linear: parts: expected a list, got int"),
        ({"parts": [(WEIGHT.raw,)] * 4}, "linear: parts: expected at most 3, got 4"),
        ({"parts": [(WEIGHT.raw,), 1]}, "linear: parts: 1: expected a tuple or a dict, got int"),
        ({"parts": [(WEIGHT,)]}, "linear: parts: 0: weight: expected a Matrix, got Matrix"),
        ({"parts": [(1, 0)]}, "linear: parts: 0: weight: expected a Matrix, got int"),
        ({"parts": [()]}, "linear: parts: 0: missing argument weight"),
        ({"parts": [{"bias": 0}]}, "linear: parts: 0: missing argument weight"),
        ({"parts": [(WEIGHT.raw, 0, 0)]}, "linear: parts: 0: expected at most 2 values, got 3"),
        ({"parts": [{"weight": WEIGHT.raw, 3: 0}]}, "linear: parts: 0: there is no argument named 3"),
    ],
)
def test_errors(change, message):
    with pytest.raises(TypeError) as error:
        _C.linear(**fields(**change))
    assert str(error.value) == message


def test_nothing_goes_by_its_place():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.linear(0, X.data_ptr())
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        _C.Matrix(0, 0)


def test_a_matrix_of_nothing():
    with pytest.raises(TypeError, match="^Matrix: missing argument format$"):
        _C.Matrix(data=0)


def test_a_model_without_layers():
    with pytest.raises(TypeError, match="^Model: missing argument layers$"):
        _C.Model(dtype=0)
    with pytest.raises(TypeError, match="^Model: missing argument dtype$"):
        _C.Model(layers=[])
