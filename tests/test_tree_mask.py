import pytest
import torch
from backends import assert_same_bits, poisoned, walled
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext.kernels import ops


def ancestors(parents):
    """Per node, itself and all above it."""
    above = []
    for node, parent in enumerate(parents):
        above.append({node} if parent < 0 else {node} | above[parent])
    return above


def bits(mask):
    """The set bits of every row."""
    return [{64 * w + b for w, word in enumerate(row) for b in range(64) if word >> b & 1} for row in mask.tolist()]


@st.composite
def forests(draw):
    m = draw(st.integers(1, 150))
    return [draw(st.integers(max(-1, i - draw(st.sampled_from([1, 4, 200]))), i - 1)) for i in range(m)]


@given(forests())
def test_against_a_walk(backend, parents):
    out = poisoned(len(parents), (len(parents) + 63) // 64, dtype=torch.int64)
    backend.tree_mask(walled(torch.tensor(parents, dtype=torch.int32)), out=out.tensor)
    assert bits(out.check()) == ancestors(parents)


@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("kind", ["chain", "star", "roots", "comb"])
def test_shapes(backend, m, kind):
    nodes = range(m)
    parents = {
        "chain": [i - 1 for i in nodes],
        "star": [-1] + [0] * (m - 1),
        "roots": [-1] * m,
        "comb": [max(-1, i - 4) for i in nodes],
    }[kind]
    mask = backend.tree_mask(torch.tensor(parents, dtype=torch.int32))
    assert mask.dtype == torch.int64 and mask.shape == (m, (m + 63) // 64)
    assert bits(mask) == ancestors(parents)


def test_out_is_returned(backend):
    parents = torch.tensor([-1, 0, 0], dtype=torch.int32)
    out = torch.full((3, 1), -1)
    assert backend.tree_mask(parents, out=out) is out
    assert_same_bits(out, torch.tensor([[1], [3], [5]]))


@pytest.mark.parametrize(
    ("parents", "error"),
    [
        ([-1, 0], TypeError),
        (torch.tensor([-1, 0]), TypeError),
        (torch.tensor([[-1, 0]], dtype=torch.int32), ValueError),
        (torch.tensor([], dtype=torch.int32), ValueError),
        (torch.tensor([-1, 1], dtype=torch.int32), ValueError),
        (torch.tensor([0, 0], dtype=torch.int32), ValueError),
        (torch.tensor([-1, 2, 0], dtype=torch.int32), ValueError),
        (torch.tensor([-2, 0], dtype=torch.int32), ValueError),
        (torch.zeros(2, dtype=torch.int32, device="meta"), ValueError),
    ],
)
def test_errors(parents, error):
    with pytest.raises(error, match="^parents: "):
        ops.tree_mask(parents)


def test_wrong_output():
    parents = torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="^out: "):
        ops.tree_mask(parents, out=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="^out: "):
        ops.tree_mask(parents, out=torch.zeros(2, 1, dtype=torch.int32))
