"""Sets that follow the text: the op against the reference, and the loop where the set changes under it."""

import pytest
import torch
from backends import U, assert_same_bits, poisoned, walled
from hypothesis import given
from hypothesis import strategies as st
from tiny import decoder, own_bits, prompt, tiny

from sirius_ext import Engine
from sirius_ext.decoding import reference
from sirius_ext.decoding.sparsity import DECAY, CSparse, kept_neurons
from sirius_ext.kernels.reference import largest

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 16, 129), (1, 17, 1134), (5, 2, 64), (2, 1, 2050)]  # layers, rows of the pass, neurons


def case(layers, m, intermediate, dtype=torch.float32, seed=0):
    """z, squares of down and a statistic. Scores lie far apart, so that rounding changes no choice."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(layers, m, intermediate, generator=generator).to(dtype)
    order = torch.stack([torch.randperm(intermediate, generator=generator) for _ in range(layers)])
    return z, 1.01 ** (order.float() % 997), torch.rand(layers, intermediate, generator=generator) / intermediate


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, shape):
    layers, m, intermediate = shape
    z, squares, statistic = case(*shape, dtype)
    rows = torch.arange(0, m, 2, dtype=torch.int32)
    for kept in {1, (intermediate + 1) // 2, intermediate}:
        expected = statistic.double()
        for layer in range(layers):
            for row in z[layer, rows.long()].double():
                expected[layer] = DECAY * expected[layer] + (1 - DECAY) * row.square() / row.square().sum()
        found = poisoned(layers, intermediate, dtype=torch.float32)
        found.tensor.copy_(statistic)
        out = poisoned(layers, kept, dtype=torch.int32)
        assert backend.follow(walled(z), rows, walled(squares), found.tensor, kept, DECAY, out=out.tensor) is out.tensor
        after = found.check()
        # A row's squares are summed up in any order, and each of m steps rounds a few times.
        torch.testing.assert_close(after.double(), expected, rtol=(intermediate / 2 + 4 * m) * U, atol=0)
        # By the statistic as it was computed, the choice is exact.
        assert_same_bits(out.check(), torch.stack([largest(each, kept) for each in after * squares]))


def test_rows_in_their_order(backend):
    """The last one counts most; rows that did not join count nothing, whatever stands there."""
    z = torch.full((1, 4, 8), torch.nan)
    z[0, 0], z[0, 2] = torch.eye(8)[3], torch.eye(8)[5]
    for rows, kept in (([0, 2], 5), ([2, 0], 3)):
        statistic = torch.zeros(1, 8)
        neurons = backend.follow(z, torch.tensor(rows, dtype=torch.int32), torch.ones(1, 8), statistic, 1, 0.5)
        assert neurons.tolist() == [[kept]]
        assert statistic[0, kept] == 0.5 and statistic[0, 8 - kept] == 0.25 and statistic.sum() == 0.75


def test_no_rows_choose_by_what_is_known(backend):
    _, squares, statistic = case(2, 1, 33)
    z, before = torch.full((2, 1, 33), torch.nan), statistic.clone()
    neurons = backend.follow(z, torch.empty(0, dtype=torch.int32), squares, statistic, 7, DECAY)
    assert torch.equal(statistic, before)
    assert_same_bits(neurons, torch.stack([largest(each, 7) for each in statistic * squares]))


def test_a_row_that_is_all_zero_adds_nothing(backend, dtype):
    statistic = torch.full((1, 5), 0.25)
    neurons = backend.follow(
        torch.zeros(1, 1, 5, dtype=dtype), torch.zeros(1, dtype=torch.int32), torch.ones(1, 5), statistic, 2, 0.5
    )
    assert torch.equal(statistic, torch.full((1, 5), 0.125)) and neurons.tolist() == [[0, 1]]


@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0, 1))
def test_of_equals_the_lower_index(backend, seed, intermediate, density):
    generator = torch.Generator().manual_seed(seed)
    statistic = torch.randint(0, 3, (2, intermediate), generator=generator).float()
    kept = kept_neurons(density, intermediate)
    rows = torch.empty(0, dtype=torch.int32)
    neurons = backend.follow(torch.zeros(2, 1, intermediate), rows, torch.ones(2, intermediate), statistic, kept, DECAY)
    for chosen, scores in zip(neurons.tolist(), statistic.tolist()):
        assert chosen == sorted(sorted(range(intermediate), key=lambda i: (-scores[i], i))[:kept])


def test_threads_do_not_matter(cpu_kernels):
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        z, squares, statistic = case(5, 4, 200, torch.bfloat16)
        neurons = cpu_kernels.follow(z, torch.arange(4, dtype=torch.int32), squares, statistic, 80, DECAY)
        outcomes.append((neurons, statistic))
    for neurons, statistic in outcomes[1:]:
        assert_same_bits(neurons, outcomes[0][0])
        assert_same_bits(statistic, outcomes[0][1])


BAD = {
    "rows beyond": ({"rows": torch.tensor([4], dtype=torch.int32)}, ValueError, r"rows: expected values in \[0, 4\)"),
    "rows before": ({"rows": torch.tensor([-1], dtype=torch.int32)}, ValueError, r"rows: expected values in \[0, 4\)"),
    "rows of int64": ({"rows": torch.tensor([1])}, TypeError, "rows: expected torch.int32"),
    "none kept": ({"kept": 0}, ValueError, "kept: expected 1 to 9, got 0"),
    "too many kept": ({"kept": 10}, ValueError, "kept: expected 1 to 9, got 10"),
    "decay": ({"decay": 1.5}, ValueError, "decay: expected 0 to 1, got 1.5"),
    "z of float64": ({"z": torch.zeros(2, 4, 9, dtype=torch.float64)}, TypeError, "z: expected float32, float16 or bfloat16"),
    "squares of another shape": ({"down_squares": torch.ones(2, 8)}, ValueError, r"down_squares: expected shape \[2, 9\]"),
    "statistic of another shape": ({"statistic": torch.ones(1, 9)}, ValueError, r"statistic: expected shape \[2, 9\]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(kernels, bad):
    z, squares, statistic = case(2, 4, 9)
    arguments = {"z": z, "rows": torch.zeros(1, dtype=torch.int32), "down_squares": squares, "statistic": statistic}
    values, kind, message = BAD[bad]
    with pytest.raises(kind, match=f"^{message}"):
        kernels.follow(**{**arguments, "kept": 3, "decay": DECAY, **values})


# ------------------------------------------------------------------------------------------------------------------- the loop


def sets_of(config, length=20, count=60):
    """The text of an engine, and the set after each verification."""
    engine, seen = Engine(tiny("llama3"), config), []
    follow = CSparse.follow

    def watched(self, z, rows):
        before = self.neurons.clone()
        follow(self, z, rows)
        seen.append((before, self.neurons.clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CSparse, "follow", watched)
        out = engine.generate(prompt(length), max_new_tokens=count)
    return out.sequences[0, length:].tolist(), seen


@pytest.mark.usefixtures("one_thread")
def test_the_set_changes_with_the_text():
    config = own_bits(period=5, density=0.4, threshold=0.02)
    text, seen = sets_of(config)
    assert text == reference.generate(decoder("llama3"), prompt(20)[0].tolist(), config, 60)[0]
    assert len(seen) > 5 and sum(not torch.equal(before, after) for before, after in seen) > len(seen) / 2
    assert all(torch.equal(after, following) for (_, after), (following, _) in zip(seen, seen[1:]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("values", [{"follow": False}, {"density": 1.0}, {"sparsity": "fsparse"}, {"mode": "sparse"}], ids=str)
def test_what_does_not_follow(values):
    config = own_bits(**{"period": 5, "density": 0.4, "threshold": 0.02, **values})
    text, seen = sets_of(config)
    assert not seen
    assert text == reference.generate(decoder("llama3"), prompt(20)[0].tolist(), config, 60)[0]


@pytest.mark.usefixtures("one_thread")
def test_a_set_begins_anew_with_every_prompt():
    engine = Engine(tiny("llama3"), own_bits(period=5, density=0.4, threshold=0.02))
    alone = [engine.generate(prompt(length), max_new_tokens=40).sequences for length in (9, 20)]
    again = [engine.generate(prompt(length), max_new_tokens=40).sequences for length in (20, 9)]
    assert torch.equal(alone[0], again[1]) and torch.equal(alone[1], again[0])


def test_density_is_what_it_was():
    """Following reads nothing more."""
    for follow in (True, False):
        out = Engine(tiny("qwen2"), own_bits(density=0.5, follow=follow)).generate(prompt(4), max_new_tokens=3)
        mlp, everything = (
            sum(parameter.numel() for key, parameter in tiny("qwen2").named_parameters() if part in key) for part in (".mlp.", "")
        )
        assert out.stats.density == pytest.approx(1 - 0.5 * mlp / everything)
