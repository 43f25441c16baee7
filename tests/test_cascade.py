"""The cascade: what gate, select and up do for it, its sizes, and the loop token for token against the reference."""

import math

import pytest
import torch
from backends import (
    MLP_SHAPES,
    SENTINEL,
    Guarded,
    assert_same_bits,
    call,
    neuron_lists,
    poison_unselected,
    poisoned,
    randn,
    small_integers,
    walled,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, PLAIN, decoder, engine, full_text, own_bits, prompt, seeded, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.decoding import reference as oracle
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.sparsity import Cascade, CSparse, cascade_neurons, sparsity_of
from sirius_ext.engine import prepare
from sirius_ext.kernels import ops, reference
from sirius_ext.runtime.passes import Pass

# ------------------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("density", "intermediate", "sizes"),
    [
        (0.4, 1000, (550, 400, 250)),
        (0.5, 8960, (6160, 4480, 2800)),
        (0.8, 1000, (1000, 862, 538)),  # gate can be no more than all: up and down make up for it
        (0.95, 1000, (1000, 1000, 850)),
        (1.0, 1000, (1000, 1000, 1000)),
        (1e-9, 1000, (1, 1, 1)),
        (0.5, 1, (1, 1, 1)),
    ],
)
def test_sizes(density, intermediate, sizes):
    assert cascade_neurons(density, intermediate) == oracle.cascade_shares(density, intermediate) == sizes


@given(st.floats(0.001, 1), st.integers(1, 20_000))
def test_the_mean_is_the_density(density, intermediate):
    gate, up, down = sizes = cascade_neurons(density, intermediate)
    assert 1 <= down <= up <= gate <= intermediate
    assert sizes == oracle.cascade_shares(density, intermediate)
    assert sum(sizes) == max(3, round(3 * density * intermediate))


# -------------------------------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize("shape", MLP_SHAPES[1::3], ids=str)
@pytest.mark.parametrize("kind", ["one", "odd"])
def test_gate_and_up_of_a_list(backend, dtype, shape, kind):
    """The values are those of gate and up of all, at the same places. Nothing else is read or written."""
    m, hidden, intermediate = shape
    neurons = neuron_lists(intermediate)[kind]
    x, gate, up = (small_integers(rows, hidden, dtype=dtype) for rows in (m, intermediate, intermediate))
    listed = torch.zeros(intermediate, dtype=torch.bool).index_fill(0, neurons.long(), 1)
    gates = backend.gate(x, gate)
    z = gates.double() * (x.double() @ up.double().T)

    out = Guarded(torch.full((m, intermediate), float(SENTINEL)))
    weight = walled(poison_unselected(gate, neurons))
    assert backend.gate(walled(x), weight, walled(neurons), out=out.tensor) is out.tensor
    assert_same_bits(out.check()[:, listed].contiguous(), gates[:, listed].contiguous())
    assert (out.tensor[:, ~listed] == SENTINEL).all()

    known = walled(poison_unselected(gates.T, neurons).T.contiguous())
    weight, out = walled(poison_unselected(up, neurons)), Guarded(torch.full((m, intermediate), float(SENTINEL)))
    assert backend.up(walled(x), weight, known, walled(neurons), spread=True, out=out.tensor) is out.tensor
    # The product with up is exact: one rounding of float32 is left.
    assert_same_bits(out.check()[:, listed].contiguous(), z.float()[:, listed].contiguous())
    assert (out.tensor[:, ~listed] == SENTINEL).all()


def test_without_a_place_the_others_are_zero(backend):
    x, weight, neurons = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([1, 3], dtype=torch.int32)
    gates = backend.gate(x, weight, neurons)
    z = backend.up(x, weight, gates, neurons, spread=True)
    for values in (gates, z):
        assert values.shape == (2, 5) and ((values != 0).sum(0) == torch.tensor([0, 2, 0, 2, 0])).all()


@st.composite
def choices(draw):
    """Values, candidates, weights, and how many are to be chosen; often with equals."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    m, intermediate = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    coarse = draw(st.booleans())
    values = torch.randint(-2, 3, (m, intermediate), generator=generator) * 0.5
    weights = torch.randint(0, 3, (intermediate,), generator=generator).float()
    if not coarse:
        values = torch.randn(m, intermediate, generator=generator)
        weights = torch.rand(intermediate, generator=generator)
    among = torch.randperm(intermediate, generator=generator)[: draw(st.integers(1, intermediate))].sort().values.int()
    return values, among, weights, draw(st.integers(1, len(among)))


@given(choices(), st.booleans(), st.booleans())
def test_select_from_a_list(backend, dtype, choice, listed, weighted):
    values, among, weights, kept = choice
    m, intermediate = values.shape
    candidates = among.tolist() if listed else list(range(intermediate))
    places = torch.zeros(intermediate, dtype=torch.bool).index_fill(0, torch.tensor(candidates), 1)
    known = values.masked_fill(~places, math.nan)  # what cannot be chosen is not read
    named = {
        "among": walled(among) if listed else None,
        "weights": walled(weights.masked_fill(~places, math.nan)) if weighted else None,
    }
    taken = poisoned(m, kept, dtype=dtype)
    neurons = backend.select(walled(known), kept, **named, taken=taken.tensor)

    scores = sum(row.abs() for row in values) * (weights if weighted else 1)
    expected = sorted(sorted(candidates, key=lambda i: (-float(scores[i]), i))[:kept])
    assert neurons.dtype == torch.int32 and neurons.tolist() == expected
    assert_same_bits(taken.check(), values[:, expected].to(dtype))
    least = 0.5
    reached = [i for i in candidates if scores[i] >= torch.tensor(m * least)]
    assert backend.select(walled(known), threshold=least, **named).tolist() == reached


@pytest.mark.parametrize(("m", "intermediate", "count"), [(1, 14336, 9000), (5, 2050, 2049), (16, 9000, 8193), (2, 53248, 28673)])
def test_select_from_a_long_list(backend, m, intermediate, count):
    values, weights = torch.randn(m, intermediate), torch.rand(intermediate)
    among = torch.randperm(intermediate)[:count].sort().values.int()
    for kept in (1, count // 3, count):
        taken, twin = (torch.full((m, kept), math.nan, dtype=torch.bfloat16) for _ in "ab")
        neurons = backend.select(values, kept, among=among, weights=weights, taken=taken)
        assert_same_bits(neurons, reference.select(values, kept, among=among, weights=weights, taken=twin))
        assert_same_bits(taken, twin)


@pytest.mark.parametrize("m", [1, 5])
def test_what_is_no_number_is_chosen_first(backend, m):
    """Of either sign: S's pass must fail by it, not go on without it."""
    values, weights = torch.ones(m, 100), torch.ones(100)
    values[0, 40], weights[70] = math.inf, -math.nan
    weights[40] = 0
    taken = torch.empty(m, 2)
    assert backend.select(values, 2, weights=weights, taken=taken).tolist() == [40, 70]
    assert torch.equal(taken, values[:, [40, 70]])


@pytest.mark.parametrize("m", [1, 5])
def test_rows_that_are_not_alive_are_taken_too(cuda_functions, m):
    """They have no say in the choice, but the pass goes on with them."""
    values, weights = torch.randn(m, 300), torch.rand(300)
    among = torch.arange(0, 300, 2, dtype=torch.int32)
    for alive in {1, m}:
        expected = reference.select(values[:alive], 41, among=among, weights=weights)
        neurons, count = poisoned(41, dtype=torch.int32), poisoned(1, dtype=torch.int32)
        taken = poisoned(m, 41, dtype=torch.bfloat16)
        call(
            cuda_functions,
            "select",
            workspace=cuda_functions.select_workspace(len(among)),
            dtype=ops.DTYPES[torch.bfloat16],
            values=values,
            among=among,
            weights=weights,
            neurons=neurons.tensor,
            count=count.tensor,
            taken=taken.tensor,
            alive=torch.tensor([alive], dtype=torch.int32),
            num_rows=m,
            intermediate=300,
            candidates=len(among),
            kept=41,
        )
        assert_same_bits(neurons.check(), expected)
        assert_same_bits(taken.check(), values[:, expected.long()].bfloat16())


def test_batch_invariance(kernels, dtype):
    x, weight, neurons = randn(17, 151, dtype=dtype), randn(129, 151, dtype=dtype), neuron_lists(129)["odd"]
    gates = kernels.gate(x, weight, neurons)
    z = kernels.up(x, weight, gates, neurons, spread=True)
    for m in (1, 3, 16):
        assert_same_bits(kernels.gate(x[:m], weight, neurons), gates[:m])
        assert_same_bits(kernels.up(x[:m], weight, gates[:m], neurons, spread=True), z[:m])


def test_threads_do_not_matter(cpu_kernels):
    x, weight, neurons = randn(3, 64, dtype=torch.bfloat16), randn(700, 64, dtype=torch.bfloat16), neuron_lists(700)["odd"]
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gates = cpu_kernels.gate(x, weight, neurons)
        outcomes.append((gates, cpu_kernels.up(x, weight, gates, neurons, spread=True)))
    for each in outcomes[1:]:
        for out, expected in zip(each, outcomes[0]):
            assert_same_bits(out, expected)


def indices(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("gate", {"neurons": indices(0, 4)}, ValueError, r"^neurons: expected values in \[0, 4\)"),
        ("gate", {"neurons": indices()}, ValueError, "^neurons: expected at least 1"),
        ("gate", {"neurons": torch.tensor([1])}, TypeError, "^neurons: expected torch.int32"),
        ("gate", {"neurons": indices(1), "out": torch.zeros(2, 1)}, ValueError, "^out: expected shape"),
        ("up", {"spread": True, "out": torch.zeros(2, 2)}, ValueError, "^out: expected shape"),
        ("up", {"spread": True, "out": torch.zeros(2, 4, dtype=torch.float16)}, TypeError, "^out: expected torch.float32"),
        ("select", {"among": indices(0, 4)}, ValueError, r"^among: expected values in \[0, 4\)"),
        ("select", {"among": indices(2, 1)}, ValueError, "^among: expected rising values"),
        ("select", {"among": indices(1, 1)}, ValueError, "^among: expected rising values"),
        ("select", {"among": indices()}, ValueError, "^among: size: expected at least 1"),
        ("select", {"among": indices(3)}, ValueError, "^kept: expected 1 to 1, got 2"),
        ("select", {"among": torch.tensor([1, 2])}, TypeError, "^among: expected torch.int32"),
        ("select", {"weights": torch.ones(3)}, ValueError, "^weights: expected shape"),
        ("select", {"weights": torch.ones(4).half()}, TypeError, "^weights: expected torch.float32"),
        ("select", {"taken": torch.zeros(2, 3)}, ValueError, "^taken: expected shape"),
        ("select", {"taken": torch.zeros(2, 2).double()}, TypeError, "^taken: expected float32, float16 or bfloat16"),
        ("select", {"taken": torch.zeros(2, 2), "kept": None, "threshold": 0.1}, ValueError, "^taken: it needs kept"),
    ],
)  # fmt: skip
def test_errors(op, change, error, message):
    product = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8)}
    arguments = {
        "gate": product,
        "up": {**product, "gates": torch.zeros(2, 4), "neurons": indices(0, 3)},
        "select": {"values": torch.zeros(2, 4), "kept": 2},
    }
    with pytest.raises(error, match=message):
        getattr(ops, op)(**arguments[op] | change)


# --------------------------------------------------------------------------------------------------------------------- the loop


def decode(name, config, ids, count, dtype=torch.float32, **settings):
    if config.accept == "sample":
        settings = {"do_sample": True, "generator": seeded(1), **PLAIN}
    out = engine(name, dtype).generate(ids, config=config, max_new_tokens=count, **settings)
    return out.sequences[0, ids.shape[1] :].tolist(), out.stats.prompts[0]


CASES = [
    {"period": 5},
    {"period": 5, "follow": False},
    {"period": 4, "tree_width": 3},
    {"period": 6, "tree_width": 2, "prune": True},
    {"period": 5, "accept": "match"},
    {"period": 4, "tree_width": 4, "accept": "match"},
    {"period": 4, "accept": "sample"},
    {"period": 3, "tree_width": 3, "accept": "sample"},
    {"mode": "sparse"},
    {"period": 4, "density": 0.8},  # gate of all neurons: nothing is followed
    {"period": 5, "density": 1e-6},  # one neuron each
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("values", CASES, ids=str)
def test_equals_the_reference(values):
    config = own_bits(**{"sparsity": "cascade", "density": 0.3, "threshold": 0.02, **values})
    first = CASES.index(values)
    for name, length in ((NAMES[first % 4], 20), (NAMES[(first + 1) % 4], 3)):
        tokens, stats = decode(name, config, prompt(length), 30)
        sampling = oracle.Sampling(seeded(1)) if config.accept == "sample" else None
        expected, periods = oracle.generate(decoder(name), prompt(length)[0].tolist(), config, 30, sampling=sampling)
        assert tokens == expected
        assert [(each.drafted, each.accepted) for each in stats.periods] == [(each.drafted, each.accepted) for each in periods]
        if config.accept == "match":
            assert tokens == full_text(engine(name), prompt(length), 30)
        mlp, everything = (
            sum(weight.numel() for key, weight in tiny(name).named_parameters() if part in key) for part in (".mlp.", "")
        )
        assert stats.density == pytest.approx(oracle.density_of("cascade", config.density, mlp, everything))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_all_neurons_are_the_full_model_bit_for_bit(isa, dtype):
    model = prepare(engine("llama3", dtype).model)
    cache, all_of_them = model.new_cache(), sparsity_of(own_bits(sparsity="cascade", density=1), model.weights)
    model.reserve(cache, 20, 3)
    drive(model, cache, read(cache, prompt(11)[0], all_of_them))
    mask = ops.tree_mask(torch.arange(-1, 2, dtype=torch.int32))
    asked = indices(5, 6, 7), indices(11, 12, 13), mask, 11, 11
    full = model.step(cache, Pass(*asked))[0].clone()
    assert_same_bits(model.step(cache, Pass(*asked, all_of_them))[0], full)


@pytest.mark.usefixtures("one_thread")
def test_gate_s_set_follows_the_text_as_csparse_s_does():
    """The same statistic, the same score, another size."""
    sets = {}
    for kind, config in (
        (Cascade, SiriusConfig(sparsity="cascade", density=0.4, period=4, threshold=0)),
        (CSparse, SiriusConfig(density=0.55, period=4, threshold=0)),
    ):
        seen, follow = [], CSparse.follow

        def watched(self, z, rows, seen=seen, follow=follow, kind=kind):
            assert type(self) is kind
            follow(self, z, rows)
            seen.append((z.clone(), rows, self.neurons.clone(), self.statistic.clone()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CSparse, "follow", watched)
            Engine(tiny("qwen2"), config).generate(prompt(9), max_new_tokens=9)
        sets[kind] = seen[0]
    assert sets[Cascade][2].shape == sets[CSparse][2].shape == (2, 79)
    assert sets[Cascade][1] == sets[CSparse][1] == [1, 2, 3]
    norms = prepare(tiny("qwen2")).weights.down_squares
    for _, _, neurons, statistic in sets.values():
        assert_same_bits(neurons, torch.stack([reference.largest(each, 79) for each in statistic * norms]))


@pytest.mark.usefixtures("one_thread")
def test_tokens_of_a_pass_share_their_sets():
    """By the sum over the tokens, in which signs do not cancel, times ||down||; of equals the lower index."""
    sparsity = Cascade(1, 6, 0.5, torch.tensor([[4.0, 4, 1, 2, 9, 9]]))
    sparsity.usage.observe(0, torch.ones(1, 6), torch.tensor([[5.0, 4, 3, 2, 1, 0]]))
    assert (sparsity.kept_neurons, *sparsity.narrowed) == (4, 3, 2) and sparsity.neurons.tolist() == [[0, 1, 2, 3]]
    gates = torch.tensor([[3.0, 0, 2, -2, 9, 9], [0, 1, -2, 2, 9, 9]])
    z = torch.tensor([[0.0, 1.25, 9, 1, 9, 9], [2, -1.25, 9, -2, 9, 9]])
    # Of gate's four the scores are 3 * 4, 1 * 4, 4 * 1 and 4 * 2; of 0, 1 and 3 they are then 2 * 4, 2.5 * 4 and 3 * 2.
    assert sparsity.choose(0, gates, z).tolist() == [0, 1]
