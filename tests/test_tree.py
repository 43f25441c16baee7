import pytest
import torch
from backends import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext.decoding.tree import Tree
from sirius_ext.kernels import ops


def chain_of(parents, node):
    """A node and its ancestors, the root first."""
    chain = [node]
    while parents[chain[0]] >= 0:
        chain.insert(0, parents[chain[0]])
    return chain


def check_mask(tree, parents):
    bits = [{64 * w + b for w, word in enumerate(row) for b in range(64) if word >> b & 1} for row in tree.mask.tolist()]
    assert bits[: len(parents)] == [set(chain_of(parents, node)) for node in range(len(parents))]


@st.composite
def growths(draw):
    """Depth, width, and what grows at each of a few depths: parents among the leaves."""
    depth, width = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4, 16]))
    grown, leaves = [], 1
    for _ in range(draw(st.integers(0, depth))):
        parents = draw(st.lists(st.integers(0, leaves - 1), min_size=1, max_size=width))
        grown.append(parents)
        leaves = len(parents)
    return depth, width, grown


def grow(tree, grown, token, position):
    """Plant and grow, and check everything at every depth. Returns the tree's parents and tokens."""
    tree.plant(token, position)
    parents, tokens, scores, starts = [-1], [token], [], [0, 1]
    assert (tree.depth, tree.size, tree.leaves) == (0, 1, slice(0, 1))
    assert tree.positions(tree.leaves).tolist() == [position]
    for depth, among_leaves in enumerate(grown, start=1):
        new_tokens = torch.randint(1000, (len(among_leaves),), dtype=torch.int32)
        new_scores = -torch.rand(len(among_leaves))
        first = starts[-2]
        tree.grow(new_tokens, torch.tensor(among_leaves, dtype=torch.int32), new_scores)
        parents += [first + parent for parent in among_leaves]
        tokens += new_tokens.tolist()
        scores += new_scores.tolist()
        starts.append(len(parents))
        assert (tree.depth, tree.size, tree.leaves) == (depth, len(parents), slice(*starts[-2:]))
        assert tree.positions(tree.leaves).tolist() == [position + depth] * len(among_leaves)
        assert tree.parents[: tree.size].tolist() == parents
        assert tree.tokens[: tree.size].tolist() == tokens
        assert tree.scores[1 : tree.size].tolist() == scores
        check_mask(tree, parents)
    positions = tree.positions(slice(0, tree.size))
    assert positions.dtype == torch.int32
    for node in range(tree.size):
        path = chain_of(parents, node)[1:]
        assert positions[node] == position + len(path)
        assert tree.path(node) == path
        assert tree.branch(path) == (node - starts[len(path)] if path else None)
    return parents, tokens


@given(growths(), st.integers(0, 100_000))
def test_grow(growth, position):
    depth, width, grown = growth
    tree = Tree(depth, width)
    assert (tree.width, tree.capacity) == (width, 1 + depth * width)
    assert tree.mask.shape == (tree.capacity, (tree.capacity + 63) // 64)
    grow(tree, grown, 17, position)


@given(growths(), st.data())
def test_replant(growth, data):
    """Nothing of the tree before is left, be it larger or smaller, nor is anything allocated."""
    depth, width, grown = growth
    tree = Tree(depth, width)
    addresses = [tensor.data_ptr() for tensor in (tree.tokens, tree.parents, tree.scores, tree.mask)]
    for token, position in ((5, 40), (6, 3), (7, 90)):
        grow(tree, grown, token, position)
        kept = data.draw(st.integers(0, len(grown)))
        grow(tree, grown[:kept], token, position)
        full = [[0] * width] + [list(range(width))] * (depth - 1)
        grow(tree, full, token, position)
        assert tree.size == tree.capacity
    assert [tensor.data_ptr() for tensor in (tree.tokens, tree.parents, tree.scores, tree.mask)] == addresses


@pytest.mark.parametrize("depth", [0, 1, 15, 63, 64, 255])
def test_chain(depth):
    """Its shape stands from the start; only tokens come."""
    tree = Tree(depth, 1)
    chain = list(range(-1, depth))
    for position in (0, 9):
        tree.plant(3, position)
        for index in range(1, depth + 1):
            tree.tokens[index] = 100 + index
            tree.grow_chain()
            assert (tree.depth, tree.size, tree.leaves) == (index, index + 1, slice(index, index + 1))
            assert tree.positions(tree.leaves).tolist() == [position + index]
        assert tree.parents.tolist() == chain
        assert tree.tokens.tolist() == [3, *range(101, 101 + depth)]
        check_mask(tree, chain)
        assert tree.path(depth) == list(range(1, depth + 1))
        assert tree.branch(tree.path(depth)) == (0 if depth else None)


def test_grow_and_grow_chain_agree():
    one, other = Tree(5, 1), Tree(5, 1)
    for tree in (one, other):
        tree.plant(8, 20)
    for token in range(4):
        one.grow(torch.tensor([token], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), torch.tensor([-1.0]))
        other.tokens[other.size] = token
        other.grow_chain()
    assert (one.size, one.depth, one.leaves, one.path(4)) == (other.size, other.depth, other.leaves, other.path(4))
    assert_same_bits(one.tokens, other.tokens)
    assert_same_bits(one.mask, other.mask)
    assert_same_bits(one.positions(slice(0, 5)), other.positions(slice(0, 5)))


@pytest.mark.parametrize("width", [1, 3, 16])
def test_grows_by_tree_expand(width):
    """A tree that drafts: scores fall along every path, and stand in order within a depth."""
    tree = Tree(6, width)
    tree.plant(1, 0)
    for _ in range(6):
        leaves = tree.leaves
        logits = 3 * torch.randn(leaves.stop - leaves.start, 40)
        tree.grow(*ops.tree_expand(logits, tree.scores[leaves], width, 0.6))
        assert tree.leaves.stop - tree.leaves.start == width
        scores = tree.scores[tree.leaves]
        assert (scores[:-1] >= scores[1:]).all()
    parents = tree.parents[1 : tree.size].long()
    assert (tree.scores[1 : tree.size] < tree.scores[parents]).all()
    assert tree.scores[0] == 0
    check_mask(tree, tree.parents[: tree.size].tolist())
