import math

import pytest
import torch
from backends import U, walled
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext import ops, reference

# (rows, vocabulary)
SHAPES = [(1, 1), (1, 151), (2, 1), (2, 31), (3, 33), (5, 63), (7, 64), (16, 1134), (17, 129), (40, 576)]


def check(backend, logits, drafts, threshold, temperature, match):
    likelihoods, argmax, accepted = backend.accept(walled(logits), walled(drafts), threshold, temperature, match)
    expected, expected_argmax, expected_accepted = reference.accept(logits, drafts, threshold, temperature, match)

    assert likelihoods.dtype == torch.float32 and argmax.dtype == torch.int32 and isinstance(accepted, int)
    assert argmax.tolist() == expected_argmax.tolist()
    # The exponent is off by a few units of itself, the sum over the vocabulary by its own; below float32's range all is lost.
    gap = (logits[:-1].amax(1) - logits[:-1].gather(1, drafts.long()[:, None])[:, 0]) / temperature
    allowed = expected.double() * (8 * gap + 16 * math.sqrt(logits.shape[1]) + 32) * U + torch.finfo(torch.float32).tiny
    assert likelihoods.shape == expected.shape and ((likelihoods.double() - expected.double()).abs() <= allowed).all()

    keep = drafts == argmax[:-1] if match else likelihoods >= threshold
    assert accepted == int(keep.int().cumprod(0).sum())
    if match or ((expected - threshold).abs() > 1e-4).all():
        assert accepted == expected_accepted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("match", [False, True], ids=["threshold", "match"])
@pytest.mark.parametrize("agreeing", ["none", "half", "all"])
def test_against_reference(backend, shape, match, agreeing):
    n, vocab = shape
    logits = 4 * torch.randn(n, vocab)
    drafts = torch.randint(vocab, (n - 1,), dtype=torch.int32)
    count = {"none": 0, "half": n // 2, "all": n - 1}[agreeing]
    drafts[:count] = logits[:count].argmax(1).int()
    check(backend, logits, drafts, 0.1, 0.6, match)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 20),
    vocab=st.integers(1, 200),
    spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    threshold=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    temperature=st.floats(0.05, 5),
    match=st.booleans(),
)
def test_properties(backend, seed, n, vocab, spread, threshold, temperature, match):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, vocab, generator=generator)
    drafts = torch.randint(vocab, (n - 1,), dtype=torch.int32, generator=generator)
    likely = torch.rand(n - 1, generator=generator) < 0.8
    drafts = torch.where(likely, logits[:-1].argmax(1).int(), drafts)
    check(backend, logits, drafts, threshold, temperature, match)


@pytest.mark.parametrize("vocab", [2, 31, 64, 100, 1134])
def test_first_of_equals(backend, vocab):
    """The largest value stands at several places, some of them where another lane, vector or thread meets it first."""
    for first in {0, 1, vocab // 2, vocab - 1}:
        logits = torch.zeros(1, vocab)
        logits[0, first:] = 2.0
        assert backend.accept(logits, torch.empty(0, dtype=torch.int32), 0.1, 0.6)[1].tolist() == [first]
    assert backend.accept(torch.full((1, vocab), -1e30), torch.empty(0, dtype=torch.int32), 0.1, 0.6)[1].tolist() == [0]


def test_run_ends_at_the_first_rejection(backend):
    """What comes after it does not count, however likely."""
    logits = torch.full((5, 7), -20.0)
    logits[range(5), [3, 1, 4, 1, 5]] = 20.0
    for match in (False, True):
        accepted = [
            backend.accept(logits, torch.tensor(drafts, dtype=torch.int32), 0.1, 0.6, match)[2]
            for drafts in ([3, 1, 4, 1], [3, 1, 4, 0], [3, 1, 0, 1], [3, 0, 4, 1], [0, 1, 4, 1])
        ]
        assert accepted == [4, 3, 2, 1, 0]


def test_bounds_of_the_threshold(backend):
    """At 0 everything passes, even a likelihood of 0; at 1 only certainty does."""
    logits = torch.full((3, 5), -1e4)
    logits[:, 2] = 1e4
    drafts = torch.tensor([2, 0], dtype=torch.int32)
    likelihoods, _, accepted = backend.accept(logits, drafts, 0.0, 0.6)
    assert likelihoods.tolist() == [1.0, 0.0] and accepted == 2
    assert backend.accept(logits, drafts, 1.0, 0.6)[2] == 1


def test_temperature_sharpens(backend):
    logits = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    for temperature in (0.1, 0.6, 1.0, 4.0):
        likelihood = backend.accept(logits, torch.tensor([1], dtype=torch.int32), 0.1, temperature)[0].item()
        assert likelihood == pytest.approx(1 / (1 + math.exp(-1 / temperature)), rel=1e-6)


def test_minus_infinity_is_a_likelihood_of_zero(backend):
    logits = torch.randn(2, 33)
    logits[0, 5:] = -math.inf
    likelihoods, _, accepted = backend.accept(logits, torch.tensor([20], dtype=torch.int32), 0.1, 0.6)
    assert likelihoods.tolist() == [0.0] and accepted == 0


def test_thread_invariance(kernels):
    logits, drafts = torch.randn(16, 1134), torch.randint(1134, (15,), dtype=torch.int32)
    torch.set_num_threads(1)
    one = kernels.accept(logits, drafts, 0.0, 0.6)
    torch.set_num_threads(2)
    two = kernels.accept(logits, drafts, 0.0, 0.6)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "^logits: expected a tensor"),
        ({"logits": torch.zeros(3, 5, dtype=torch.bfloat16)}, TypeError, "^logits: expected torch.float32"),
        ({"logits": torch.zeros(3, 5, device="meta")}, ValueError, "^logits: .*on meta"),
        ({"logits": torch.zeros(3)}, ValueError, "^logits: expected shape"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "^logits: "),
        ({"logits": torch.zeros(0, 5)}, ValueError, "^logits: "),
        ({"logits": torch.zeros(5, 3).T}, ValueError, "^logits: expected a contiguous"),
        ({"drafts": torch.tensor([0, 1])}, TypeError, "^drafts: expected torch.int32"),
        ({"drafts": torch.zeros(3, dtype=torch.int32)}, ValueError, "^drafts: expected shape"),
        ({"drafts": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "^drafts: expected values in"),
        ({"drafts": torch.tensor([-1, 0], dtype=torch.int32)}, ValueError, "^drafts: expected values in"),
        ({"score_temperature": 0.0}, ValueError, "^score_temperature: "),
        ({"score_temperature": -1.0}, ValueError, "^score_temperature: "),
        ({"score_temperature": math.nan}, ValueError, "^score_temperature: "),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "logits": torch.zeros(3, 5),
        "drafts": torch.zeros(2, dtype=torch.int32),
        "threshold": 0.1,
        "score_temperature": 0.6,
    }
    with pytest.raises(error, match=message):
        ops.accept(**arguments | change)
