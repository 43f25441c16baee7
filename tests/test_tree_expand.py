import math

import pytest
import torch
from backends import LOGITS_ERRORS, U, assert_same_bits, call, poisoned, walled
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext.kernels import ops, reference

# (leaves, vocabulary, width)
SHAPES = [
    (1, 1, 1),
    (1, 31, 4),
    (1, 151, 1),
    (1, 1134, 16),
    (2, 1, 3),
    (2, 64, 2),
    (3, 33, 5),
    (4, 1134, 4),
    (5, 3, 7),
    (8, 576, 8),
    (16, 2, 16),
    (16, 129, 16),
    (40, 63, 4),
    (2, 4097, 4),
    (2, 9001, 16),
    (3, 8200, 5),
]


def proposals(logits, scores, width, temperature, prune):
    """(leaf, token) -> score in float64, of each leaf's likeliest tokens."""
    exact = torch.log_softmax(logits.double() / temperature, -1)
    found = {}
    for leaf, row in enumerate(logits.tolist()):
        tokens = sorted(range(len(row)), key=lambda token: (-row[token], token))[:width]
        tokens = tokens[:1] if exact[leaf, tokens[0]].exp() > prune else tokens
        found |= {(leaf, token): float(exact[leaf, token] + scores[leaf]) for token in tokens if row[token] > -math.inf}
    return found


def check(backend, logits, scores, width, temperature, prune=1.0):
    tokens, parents, new_scores = backend.tree_expand(walled(logits), walled(scores), width, temperature, prune)
    assert tokens.dtype == parents.dtype == torch.int32 and new_scores.dtype == torch.float32
    wanted = proposals(logits, scores, width, temperature, prune)
    assert tokens.shape == parents.shape == new_scores.shape == (min(width, len(wanted)),)

    pairs, values = list(zip(parents.tolist(), tokens.tolist())), new_scores.tolist()
    assert len(set(pairs)) == len(pairs) and wanted.keys() >= set(pairs)
    assert values == sorted(values, reverse=True)
    # Logits and their differences are scaled, the sum over the vocabulary has its own error, and a score is added.
    largest = logits.where(logits.isfinite(), 0.0).abs().max() / temperature + scores.abs().max()
    error = float(8 * largest + 16 * math.sqrt(logits.shape[1]) + 32) * U
    assert all(abs(value - wanted[pair]) <= error for pair, value in zip(pairs, values))
    left_out = [score for pair, score in wanted.items() if pair not in pairs]
    assert not left_out or max(left_out) <= values[-1] + 2 * error

    ordered = sorted(wanted.values())
    if all(b - a > 4 * error for a, b in zip(ordered, ordered[1:])):
        expected = reference.tree_expand(logits, scores, width, temperature, prune)
        assert_same_bits(tokens, expected[0])
        assert_same_bits(parents, expected[1])
        return True
    return False


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, shape):
    leaves, vocab, width = shape
    exactly = [check(backend, 4 * torch.randn(leaves, vocab), -3 * torch.rand(leaves), width, 0.6) for _ in range(5)]
    assert any(exactly)


@given(
    seed=st.integers(0, 10_000),
    leaves=st.integers(1, 20),
    vocab=st.integers(1, 200),
    width=st.integers(1, 16),
    spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    depth=st.sampled_from([0.0, 1.0, 200.0]),
    temperature=st.floats(0.05, 5),
    prune=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    impossible=st.sampled_from([0.0, 0.5, 0.95]),
)
def test_properties(backend, seed, leaves, vocab, width, spread, depth, temperature, prune, impossible):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(leaves, vocab, generator=generator)
    possible = torch.randint(vocab, (leaves, 1), generator=generator)
    barred = (torch.rand(leaves, vocab, generator=generator) < impossible) & (torch.arange(vocab) != possible)
    logits[barred] = -math.inf
    check(backend, logits, -depth * torch.rand(leaves, generator=generator), width, temperature, prune)


@pytest.mark.parametrize(
    ("leaves", "vocab", "width"), [(1, 151, 16), (3, 33, 5), (4, 64, 4), (16, 7, 16), (5, 2, 16), (2, 1134, 16), (2, 9001, 16)]
)
def test_equals_in_order(backend, leaves, vocab, width):
    """Rows that are the same, and tokens that are equally likely: the lower row, then the lower token. Scores that do not add up
    with the logits to further ties."""
    for scores in (torch.zeros(leaves), torch.randint(2, (leaves,)) * -0.3):
        for logits in (torch.zeros(vocab), torch.randint(3, (vocab,)).float()):
            logits = logits.expand(leaves, vocab).contiguous()
            tokens, parents, new_scores = backend.tree_expand(logits, scores, width, 0.6)
            expected = reference.tree_expand(logits, scores, width, 0.6)
            assert_same_bits(tokens, expected[0])
            assert_same_bits(parents, expected[1])
            torch.testing.assert_close(new_scores, expected[2])


@pytest.mark.parametrize("vocab", [2, 31, 64, 100, 1134, 9001])
def test_first_of_equals(backend, vocab):
    """The largest value stands at several places, some of them where another lane, vector or thread meets it first."""
    for first in {0, 1, vocab // 2, vocab - 1}:
        logits = torch.zeros(1, vocab)
        logits[0, first:] = 2.0
        expected = [*range(first, vocab), *range(first)][:5]
        assert backend.tree_expand(logits, torch.zeros(1), 5, 0.6)[0].tolist() == expected


def test_a_likely_leaf_takes_every_place(backend):
    logits = torch.randn(3, 50)
    tokens, parents, _ = backend.tree_expand(logits, torch.tensor([-90.0, -1.0, -90.0]), 4, 0.6)
    assert parents.tolist() == [1] * 4
    assert tokens.tolist() == logits[1].topk(4).indices.tolist()


def test_tokens_of_likelihood_zero_are_not_proposed(backend):
    logits = torch.full((2, 33), -math.inf)
    logits[0, [7, 20]] = torch.tensor([1.0, 2.0])
    logits[1, 32] = -1e30
    tokens, parents, scores = backend.tree_expand(logits, torch.tensor([0.0, -50.0]), 4, 1.0)
    assert tokens.tolist() == [20, 7, 32] and parents.tolist() == [0, 0, 1]
    assert scores.tolist() == pytest.approx([-math.log1p(math.exp(-1)), -math.log1p(math.exp(1)), -50.0])


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_leaf_without_any_token_proposes_none(backend, empty):
    logits, scores = torch.randn(3, 20), torch.zeros(3)
    logits[empty] = -math.inf
    others = [leaf for leaf in range(3) if leaf != empty]
    tokens, parents, new_scores = backend.tree_expand(logits, scores, 4, 0.6)
    expected = backend.tree_expand(logits[others], scores[others], 4, 0.6)
    assert tokens.tolist() == expected[0].tolist()
    assert parents.tolist() == [others[leaf] for leaf in expected[1]]
    assert_same_bits(new_scores, expected[2])


def test_no_token_at_all(backend):
    tokens, parents, scores = backend.tree_expand(torch.full((2, 20), -math.inf), torch.zeros(2), 4, 0.6)
    assert tokens.shape == parents.shape == scores.shape == (0,)
    assert tokens.dtype == parents.dtype == torch.int32 and scores.dtype == torch.float32


def test_a_vocabulary_smaller_than_the_width(backend):
    tokens, parents, scores = backend.tree_expand(torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([-2.0]), 16, 1.0)
    assert tokens.tolist() == [1, 0, 2] and parents.tolist() == [0] * 3
    assert scores.exp().sum().item() == pytest.approx(math.exp(-2))


def test_prune(backend):
    """Only the leaf that is sure proposes one token. Its likelihoods are 0.96, 0.03, 0.01; the other's 0.5, 0.3, 0.2."""
    logits = torch.tensor([[0.96, 0.03, 0.01], [0.5, 0.3, 0.2]]).log()
    for prune, expected in [
        (0.97, [(0, 0), (1, 0), (1, 1), (1, 2), (0, 1), (0, 2)]),
        (0.95, [(0, 0), (1, 0), (1, 1), (1, 2)]),
        (0.4, [(0, 0), (1, 0)]),
        (0.0, [(0, 0), (1, 0)]),
    ]:
        tokens, parents, _ = backend.tree_expand(logits, torch.zeros(2), 6, 1.0, prune)
        assert list(zip(parents.tolist(), tokens.tolist())) == expected


def test_without_prune_the_surest_leaf_proposes_all(backend):
    """Though float32 takes its likelihood for 1."""
    logits = torch.full((1, 40), -20.0)
    logits[0, 3] = 20.0
    for arguments in ((), (1.0,)):
        assert backend.tree_expand(logits, torch.zeros(1), 4, 0.6, *arguments)[0].tolist() == [3, 0, 1, 2]
    assert backend.tree_expand(logits, torch.zeros(1), 4, 0.6, 0.95)[0].tolist() == [3]


def test_temperature_scales_the_likelihoods(backend):
    """The sharper, the more a leaf's own likelihood counts."""
    logits = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    for temperature in (0.1, 0.6, 1.0, 4.0):
        scores = backend.tree_expand(logits[:1], torch.zeros(1), 2, temperature)[2]
        likelihood = 1 / (1 + math.exp(-1 / temperature))
        assert scores.exp().tolist() == pytest.approx([likelihood, 1 - likelihood], rel=1e-5)
    scores = torch.tensor([-1.0, 0.0])
    assert backend.tree_expand(logits, scores, 1, 0.1)[1].tolist() == [1]
    assert backend.tree_expand(logits, torch.tensor([-0.5, 0.0]), 1, 0.1)[1].tolist() == [0]


def test_inputs_stay(backend):
    logits, scores = torch.randn(4, 100), torch.randn(4)
    before = logits.clone(), scores.clone()
    backend.tree_expand(logits, scores, 4, 0.6)
    assert_same_bits(logits, before[0])
    assert_same_bits(scores, before[1])


def test_a_real_vocabulary(kernels):
    """Qwen's, with the likeliest tokens at its start, at its end and anywhere. The reference in float32 is less exact."""
    logits = torch.randn(3, 151936)
    logits[0, :20] += 9.0
    logits[1, -20:] += 9.0
    scores = torch.tensor([-1.0, -2.0, 0.0])
    for width in (4, 16):
        out = kernels.tree_expand(logits, scores, width, 0.6)
        expected = reference.tree_expand(logits.double(), scores.double(), width, 0.6)
        assert_same_bits(out[0], expected[0])
        assert_same_bits(out[1], expected[1])
        torch.testing.assert_close(out[2], expected[2], rtol=1e-5, atol=0.0)


def test_a_leaf_of_score_minus_infinity_proposes_nothing(backend):
    logits, scores = torch.randn(4, 50), torch.tensor([-math.inf, -1.0, -math.inf, -90.0])
    tokens, parents, new_scores = backend.tree_expand(logits, scores, 5, 0.6)
    alone = backend.tree_expand(logits[[1, 3]], scores[[1, 3]], 5, 0.6)
    assert_same_bits(tokens, alone[0])
    assert parents.tolist() == [1] * 5
    assert_same_bits(new_scores, alone[2])
    assert all(len(out) == 0 for out in backend.tree_expand(logits, torch.full((4,), -math.inf), 5, 0.6))


@pytest.mark.parametrize("vocab", [1134, 9001])
def test_batch_invariance(kernels, vocab):
    """A leaf proposes the same, with the same scores, whatever the leaves beside it."""
    logits = torch.randn(17, vocab)
    tokens, _, scores = kernels.tree_expand(logits[7:8], torch.zeros(1), 16, 0.6)
    others = torch.full((17,), -math.inf)
    others[7] = 0.0
    for first, last in ((7, 8), (0, 9), (5, 17), (0, 17)):
        beside = kernels.tree_expand(logits[first:last], others[first:last], 16, 0.6)
        assert_same_bits(beside[0], tokens)
        assert beside[1].tolist() == [7 - first] * 16
        assert_same_bits(beside[2], scores)


@pytest.mark.parametrize(("vocab", "alive"), [(33, 2), (1, 2), (3, 1), (33, 0)])
def test_places_that_stay_empty(cuda_functions, vocab, alive):
    """A replayed graph takes them for leaves: they are dead ones."""
    scores = torch.full((4,), -math.inf)
    scores[:alive] = -1.0
    logits, width = torch.randn(4, vocab), 7
    tokens, parents, new_scores = (poisoned(width, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32))
    count = poisoned(1, dtype=torch.int32)
    call(
        cuda_functions,
        "tree_expand",
        workspace=cuda_functions.tree_expand_workspace(4, vocab, width),
        logits=logits,
        scores=scores,
        score_temperature=0.6,
        prune=1.0,
        tokens=tokens.tensor,
        parents=parents.tensor,
        new_scores=new_scores.tensor,
        count=count.tensor,
        num_leaves=4,
        vocab=vocab,
        width=width,
    )
    found = min(width, alive * vocab)
    assert count.check().tolist() == [found]
    assert tokens.check()[found:].tolist() == parents.check()[found:].tolist() == [0] * (width - found)
    assert new_scores.check()[found:].tolist() == [-math.inf] * (width - found)
    expected = ops.tree_expand(logits, scores, width, 0.6)
    for out, wanted in zip((tokens, parents, new_scores), expected):
        assert_same_bits(out.tensor[:found], wanted)


@pytest.mark.parametrize("leaves", [1, 4, 16])
def test_thread_invariance(cpu_kernels, leaves):
    logits, scores = torch.randn(leaves, 1134), torch.randn(leaves)
    torch.set_num_threads(1)
    one = cpu_kernels.tree_expand(logits, scores, 16, 0.6)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for out, expected in zip(cpu_kernels.tree_expand(logits, scores, 16, 0.6), one):
            assert_same_bits(out, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *LOGITS_ERRORS,
        ({"width": 0}, ValueError, "^width: expected 1 to 16"),
        ({"width": 17}, ValueError, "^width: expected 1 to 16"),
    ],
)
def test_errors(change, error, message):
    arguments = {"logits": torch.zeros(3, 5), "scores": torch.zeros(3), "width": 2, "score_temperature": 0.6}
    with pytest.raises(error, match=message):
        ops.tree_expand(**arguments | change)
