import math

import pytest
import torch
from backends import LOGITS_ERRORS, U, assert_same_bits, call, poisoned, walled
from hypothesis import given
from hypothesis import strategies as st

from sirius_ext.kernels import ops, reference

# (rows, vocabulary)
SHAPES = [
    (1, 1),
    (1, 151),
    (2, 1),
    (2, 31),
    (3, 33),
    (5, 63),
    (7, 64),
    (16, 1134),
    (17, 129),
    (40, 576),
    (2, 4097),
    (3, 12292),
]


def longest_run(kept, parents, scores):
    """The accepted nodes, by walking up from every node."""
    paths = [[]]
    for node in range(1, len(parents)):
        path = [node]
        while parents[path[0]] > 0:
            path.insert(0, parents[path[0]])
        if all(kept[step - 1] for step in path):
            paths.append(path)
    return max(paths, key=lambda path: (len(path), scores[path[-1]], -path[-1]) if path else (0,))


def check(backend, logits, drafts, threshold, temperature, match, parents=None, scores=None):
    inside = [None if tensor is None else walled(tensor) for tensor in (logits, drafts, parents, scores)]
    likelihoods, argmax, path = backend.accept(*inside[:2], threshold, temperature, match, *inside[2:])
    expected, expected_argmax, expected_path = reference.accept(logits, drafts, threshold, temperature, match, parents, scores)

    assert likelihoods.dtype == torch.float32 and argmax.dtype == path.dtype == torch.int32
    assert argmax.tolist() == expected_argmax.tolist()
    before = logits[:-1] if parents is None else logits[parents[1:].long()]
    # The exponent is off by a few units of itself, the sum over the vocabulary by its own; below float32's range all is lost.
    gap = (before.amax(1) - before.gather(1, drafts.long()[:, None])[:, 0]) / temperature
    allowed = expected.double() * (8 * gap + 16 * math.sqrt(logits.shape[1]) + 32) * U + torch.finfo(torch.float32).tiny
    assert likelihoods.shape == expected.shape and ((likelihoods.double() - expected.double()).abs() <= allowed).all()

    up = list(range(-1, len(logits) - 1)) if parents is None else parents.tolist()
    keep = drafts == argmax[up[1:]] if match else likelihoods >= threshold
    assert path.tolist() == longest_run(keep.tolist(), up, [0.0] * len(up) if scores is None else scores.tolist())
    if match or ((expected - threshold).abs() > 1e-4).all():
        assert path.tolist() == expected_path.tolist()
    return path.tolist()


@st.composite
def trees(draw):
    """A generator, and a tree's parents: chains, stars, and what lies between."""
    n, reach = draw(st.integers(1, 60)), draw(st.sampled_from([1, 3, 100]))
    parents = [-1] + [draw(st.integers(max(0, i - reach), i - 1)) for i in range(1, n)]
    return torch.Generator().manual_seed(draw(st.integers(0, 10_000))), torch.tensor(parents, dtype=torch.int32)


def drafted(generator, parents, vocab, spread, likely=0.8):
    """Logits, and drafts most of which are the likeliest token."""
    logits = spread * torch.randn(len(parents), vocab, generator=generator)
    drafts = torch.randint(vocab, (len(parents) - 1,), dtype=torch.int32, generator=generator)
    agreeing = torch.rand(len(parents) - 1, generator=generator) < likely
    return logits, torch.where(agreeing, logits.argmax(1).int()[parents[1:].long()], drafts)


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
    logits, drafts = drafted(generator, torch.arange(-1, n - 1), vocab, spread)
    check(backend, logits, drafts, threshold, temperature, match)


@pytest.mark.parametrize("vocab", [2, 31, 64, 100, 1134, 9001])
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
            backend.accept(logits, torch.tensor(drafts, dtype=torch.int32), 0.1, 0.6, match)[2].tolist()
            for drafts in ([3, 1, 4, 1], [3, 1, 4, 0], [3, 1, 0, 1], [3, 0, 4, 1], [0, 1, 4, 1])
        ]
        assert accepted == [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1], []]


def test_bounds_of_the_threshold(backend):
    """At 0 everything passes, even a likelihood of 0; at 1 only certainty does."""
    logits = torch.full((3, 5), -1e4)
    logits[:, 2] = 1e4
    drafts = torch.tensor([2, 0], dtype=torch.int32)
    likelihoods, _, path = backend.accept(logits, drafts, 0.0, 0.6)
    assert likelihoods.tolist() == [1.0, 0.0] and path.tolist() == [1, 2]
    assert backend.accept(logits, drafts, 1.0, 0.6)[2].tolist() == [1]


def test_temperature_sharpens(backend):
    logits = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    for temperature in (0.1, 0.6, 1.0, 4.0):
        likelihood = backend.accept(logits, torch.tensor([1], dtype=torch.int32), 0.1, temperature)[0].item()
        assert likelihood == pytest.approx(1 / (1 + math.exp(-1 / temperature)), rel=1e-6)


def test_minus_infinity_is_a_likelihood_of_zero(backend):
    logits = torch.randn(2, 33)
    logits[0, 5:] = -math.inf
    likelihoods, _, path = backend.accept(logits, torch.tensor([20], dtype=torch.int32), 0.1, 0.6)
    assert likelihoods.tolist() == [0.0] and path.shape == (0,)


@given(
    tree=trees(),
    vocab=st.integers(1, 200),
    spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    threshold=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    temperature=st.floats(0.05, 5),
    match=st.booleans(),
    scored=st.sampled_from(["none", "few", "random"]),
)
def test_trees(backend, tree, vocab, spread, threshold, temperature, match, scored):
    """Scores of any kind: from a few values, ties are common."""
    generator, parents = tree
    logits, drafts = drafted(generator, parents, vocab, spread)
    scores = {
        "none": None,
        "few": -torch.randint(3, parents.shape, generator=generator).float(),
        "random": torch.randn(parents.shape, generator=generator),
    }[scored]
    check(backend, logits, drafts, threshold, temperature, match, parents, scores)


@given(tree=trees(), match=st.booleans(), threshold=st.sampled_from([0.0, 0.05, 0.3]))
def test_a_tree_is_as_good_as_its_best_chain(backend, tree, match, threshold):
    """Root to leaf, each alone under the same drafts: none has a longer run, one has the same."""
    generator, parents = tree
    logits, drafts = drafted(generator, parents, 31, 3.0, likely=0.7)
    likelihoods, argmax, path = backend.accept(logits, drafts, threshold, 0.6, match, parents)
    longest = 0
    for leaf in set(range(len(parents))) - set(parents.tolist()):
        nodes = [leaf]
        while nodes[0] > 0:
            nodes.insert(0, int(parents[nodes[0]]))
        steps = torch.tensor(nodes[1:], dtype=torch.long) - 1
        alone = backend.accept(logits[nodes], drafts[steps], threshold, 0.6, match)
        torch.testing.assert_close(alone[0], likelihoods[steps])
        assert torch.equal(alone[1], argmax[nodes])
        longest = max(longest, len(alone[2]))
    assert len(path) == longest


@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    match=st.booleans(),
    threshold=st.sampled_from([0.0, 0.1, 0.5]),
    scored=st.booleans(),
)
def test_a_chain_is_a_tree(backend, n, seed, match, threshold, scored):
    generator, parents = torch.Generator().manual_seed(seed), torch.arange(-1, n - 1, dtype=torch.int32)
    logits, drafts = drafted(generator, parents, 33, 3.0, likely=0.95)
    scores = torch.randn(n, generator=generator) if scored else None
    chain = backend.accept(logits, drafts, threshold, 0.6, match)
    tree = backend.accept(logits, drafts, threshold, 0.6, match, parents, scores)
    for out, expected in zip(tree, chain):
        assert_same_bits(out, expected)
    assert chain[2].tolist() == list(range(1, len(chain[2]) + 1))


@pytest.mark.parametrize("match", [False, True], ids=["threshold", "match"])
def test_which_of_equally_long_runs(backend, match):
    """The one that ends with the largest score; of equal scores, or without any, the first. A longer one beats every score.

    0 - 1 - 4
      - 2 - 5
      - 3 - 6 (rejected)
    """
    parents = torch.tensor([-1, 0, 0, 0, 1, 2, 3], dtype=torch.int32)
    logits = torch.zeros(7, 5)
    logits[range(7), [2, 1, 3, 4, 0, 0, 0]] = 50.0
    drafts = torch.tensor([2, 2, 2, 1, 3, 0], dtype=torch.int32)

    def path(*scores, drafts=drafts):
        return check(
            backend, logits, drafts, 0.1, 0.6, match, parents, torch.tensor(scores, dtype=torch.float32) if scores else None
        )

    assert path() == [1, 4]
    assert path(0, -1, -1, 9, -3, -2, 9) == [2, 5]
    assert path(0, -1, -1, 9, -2, -3, 9) == [1, 4]
    assert path(0, -2, -1, 9, -2, -2, 9) == [1, 4]
    assert path(0, -1, -1, -1, -math.inf, -math.inf, 0) == [1, 4]
    one = torch.tensor([2, 2, 2, 0, 3, 0], dtype=torch.int32)
    assert path(0, 5, -1, 5, 5, -9, 5, drafts=one) == [2, 5]
    none = torch.tensor([2, 2, 2, 0, 0, 0], dtype=torch.int32)
    assert path(0, -2, -2, -1, 0, 0, 0, drafts=none) == [3]
    assert path(drafts=none) == [1]


def test_a_rejected_node_ends_its_branch(backend):
    """Its children do not count, however likely."""
    logits = torch.full((5, 7), -20.0)
    logits[range(5), [3, 1, 4, 1, 5]] = 20.0
    parents = torch.tensor([-1, 0, 0, 1, 3], dtype=torch.int32)
    for match in (False, True):
        drafts = torch.tensor([0, 3, 1, 1], dtype=torch.int32)
        likelihoods, argmax, path = backend.accept(logits, drafts, 0.1, 0.6, match, parents, torch.zeros(5))
        assert likelihoods.tolist() == pytest.approx([0, 1, 1, 1]) and path.tolist() == [2]
        assert argmax[path[-1]] == 4


def test_a_real_vocabulary(backend):
    """Qwen's; also of rows whose last tokens are likeliest, and with equals far apart."""
    logits = torch.randn(3, 151936)
    logits[1] += torch.linspace(0, 9, 151936)
    logits[2, [9000, 149000]] = 20.0
    check(backend, logits, torch.tensor([151000, 149000], dtype=torch.int32), 1e-6, 0.6, False)
    assert backend.accept(logits[2:], torch.empty(0, dtype=torch.int32), 0.1, 0.6)[1].tolist() == [9000]


@pytest.mark.parametrize("vocab", [1134, 9001])
def test_batch_invariance(kernels, vocab):
    """A row's likelihood and argmax do not depend on the rows beside it."""
    logits, drafts = torch.randn(17, vocab), torch.randint(vocab, (16,), dtype=torch.int32)
    likelihoods, argmax, _ = kernels.accept(logits, drafts, 0.0, 0.6)
    for first, last in ((0, 1), (0, 2), (3, 7), (5, 17)):
        alone = kernels.accept(logits[first:last], drafts[first : last - 1], 0.0, 0.6)
        assert_same_bits(alone[0], likelihoods[first : last - 1])
        assert_same_bits(alone[1], argmax[first:last])


def test_thread_invariance(cpu_kernels):
    logits, drafts = torch.randn(16, 1134), torch.randint(1134, (15,), dtype=torch.int32)
    parents = torch.tensor([-1, 0, 0, 0, *range(1, 13)], dtype=torch.int32)
    for arguments in ((), (parents, torch.randn(16))):
        torch.set_num_threads(1)
        one = cpu_kernels.accept(logits, drafts, 0.0, 0.6, False, *arguments)
        torch.set_num_threads(2)
        for out, expected in zip(cpu_kernels.accept(logits, drafts, 0.0, 0.6, False, *arguments), one):
            assert_same_bits(out, expected)


# ----------------------------------------------------------------------------------- what the CUDA loop finds in device memory


def accept_within(functions, limit, logits, drafts, threshold, match, parents, scores, fault=None):
    n, vocab = logits.shape
    likelihoods, accepted = poisoned(n - 1, dtype=torch.float32), poisoned(1, dtype=torch.int32)
    argmax, path = poisoned(n, dtype=torch.int32), poisoned(n - 1, dtype=torch.int32)
    call(
        functions,
        "accept",
        workspace=functions.accept_workspace(n, vocab),
        logits=walled(logits),
        drafts=walled(drafts),
        parents=parents,
        scores=scores,
        threshold=threshold,
        score_temperature=0.6,
        match=match,
        likelihoods=likelihoods.tensor,
        argmax=argmax.tensor,
        path=path.tensor,
        accepted=accepted.tensor,
        limit=torch.tensor([limit], dtype=torch.int32),
        fault=fault,
        num_rows=n,
        vocab=vocab,
    )
    return likelihoods.check(), argmax.check(), path.check()[: int(accepted.check())].tolist()


@given(
    tree=trees(),
    limit=st.integers(0, 20),
    dead=st.sampled_from([0.0, 0.1, 0.5]),
    threshold=st.sampled_from([0.0, 0.1]),
    match=st.booleans(),
)
def test_limit_and_dead_nodes(cuda_functions, tree, limit, dead, threshold, match):
    """Nodes deeper than the limit, and those of score -inf, are as good as not drafted."""
    generator, parents = tree
    logits, drafts = drafted(generator, parents, 33, 3.0, likely=0.95)
    scores = torch.randn(parents.shape, generator=generator)
    scores[torch.rand(parents.shape, generator=generator) < dead] = -math.inf
    likelihoods, argmax, path = accept_within(cuda_functions, limit, logits, drafts, threshold, match, parents, scores)
    for out, expected in zip((likelihoods, argmax), ops.accept(logits, drafts, threshold, 0.6, match, parents, scores)):
        assert_same_bits(out, expected)

    keep = drafts == argmax[parents[1:].long()] if match else likelihoods >= threshold
    depth = [0]
    for parent in parents[1:].tolist():
        depth.append(depth[parent] + 1)
    keep &= (torch.tensor(depth[1:]) <= limit) & (scores[1:] > -math.inf)
    assert path == longest_run(keep.tolist(), parents.tolist(), scores.tolist())


@pytest.mark.parametrize("limit", [0, 1, 4, 9, 10])
def test_limit_of_a_chain(cuda_functions, limit):
    logits = torch.randn(10, 50)
    drafts = logits[:-1].argmax(1).int()
    assert accept_within(cuda_functions, limit, logits, drafts, 0.0, True, None, None)[2] == list(range(1, min(limit, 9) + 1))


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (1, 33), (3, 64), (5, 1134), (17, 129), (2, 9001), (2, 12288), (3, 140001)])
def test_argmax(backend, n, vocab):
    rows = [
        torch.randn(n, vocab),
        torch.randint(3, (n, vocab)).float(),  # many equals
        torch.zeros(n, vocab).where(torch.rand(n, vocab) < 0.5, -0.0),
        torch.full((n, vocab), -1e38).scatter(1, torch.randint(vocab, (n, 1)), -1e30),
    ]
    for logits in rows:
        out = poisoned(n, dtype=torch.int32)
        assert backend.argmax(walled(logits), out=out.tensor) is out.tensor
        assert_same_bits(out.check(), logits.argmax(1).int())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *LOGITS_ERRORS,
        ({"drafts": torch.tensor([0, 1])}, TypeError, "^drafts: expected torch.int32"),
        ({"drafts": torch.zeros(3, dtype=torch.int32)}, ValueError, "^drafts: expected shape"),
        ({"drafts": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "^drafts: expected values in"),
        ({"drafts": torch.tensor([-1, 0], dtype=torch.int32)}, ValueError, "^drafts: expected values in"),
        ({"parents": [-1, 0, 0]}, TypeError, "^parents: expected a tensor"),
        ({"parents": torch.tensor([-1, 0, 0])}, TypeError, "^parents: expected torch.int32"),
        ({"parents": torch.tensor([-1, 0], dtype=torch.int32)}, ValueError, "^parents: expected shape"),
        ({"parents": torch.tensor([-1, -1, 0], dtype=torch.int32)}, ValueError, "^parents: expected 0 <= "),
        ({"parents": torch.tensor([-1, 1, 0], dtype=torch.int32)}, ValueError, "^parents: expected 0 <= "),
        ({"parents": torch.tensor([-1, 0, 3], dtype=torch.int32)}, ValueError, "^parents: expected 0 <= "),
        ({"parents": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "^parents: .*on meta"),
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
