"""The CUDA backend's model and its replayed periods: token for token against the reference, over simt and on a GPU if there is
one."""

import contextlib

import pytest
import torch
from backends import assert_same_bits, emulated
from test_packed import packed, same_numbers
from tier_models import files_of, tiered, whole
from tiny import decoder, own_bits, prompt, seeded, tiny

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.config import MAX_NODES_ON_CUDA
from sirius_ext.decoding import reference, sequence
from sirius_ext.decoding.period import Costs
from sirius_ext.decoding.period_graph import PeriodGraph
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.sequence import Request, start
from sirius_ext.decoding.sparsity import FSparse
from sirius_ext.engine import prepare
from sirius_ext.kernels import dispatch
from sirius_ext.runtime import cuda
from sirius_ext.runtime.cache import CACHE_GRAIN
from sirius_ext.runtime.cuda import CudaModel
from sirius_ext.runtime.graphs import Nodes
from sirius_ext.runtime.passes import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = ("drafted", "nodes", "accepted", "branch", "committed", "cut")
PLACES = ["simt", *(["cuda"] if torch.cuda.is_available() else [])]


class Place:
    """Where the CUDA backend runs."""

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if name == "cuda" else "cpu")
        self._engines: dict[object, Engine] = {}

    def engine(self, name: str, dtype: torch.dtype = torch.float32, weights: str = "plain") -> Engine:
        key = name, dtype, weights
        if key not in self._engines:
            model = tiny(name, dtype) if weights == "plain" else packed(name, dtype, weights)
            self._engines[key] = Engine(model.to(self.device))
        assert isinstance(prepare(self._engines[key].model), CudaModel)
        return self._engines[key]

    def model(self, name: str, dtype: torch.dtype = torch.float32, weights: str = "plain") -> CudaModel:
        return prepare(self.engine(name, dtype, weights).model)


@pytest.fixture(scope="module", params=PLACES)
def place(request):
    with emulated(_simt) if request.param == "simt" else contextlib.nullcontext():
        yield Place(request.param)


def decode(engine, ids, config, count, **settings):
    """The text without its prompt, and its periods."""
    out = engine.generate(ids.to(engine.model.device), config=config, max_new_tokens=count, **settings)
    assert torch.equal(out.sequences[:, : ids.shape[1]].cpu(), ids)
    return out.sequences[0, ids.shape[1] :].tolist(), out.stats.prompts[0]


def rows(periods):
    return [tuple(getattr(period, column) for column in COLUMNS) for period in periods]


# (model, prompt length, tokens, config): every mode, rule and sparse model; chains and trees; passes of up to 16 rows and of
# more; masks of one word and of two.
CASES = [
    ("llama", 5, 12, {"mode": "full"}),
    ("qwen2", 1, 12, {"mode": "sparse"}),
    ("mistral", 9, 12, {"mode": "sparse", "sparsity": "fsparse"}),
    ("mistral", 33, 1, {"period": 4}),
    ("mistral", 2, 2, {"period": 4}),
    ("llama3", 5, 16, {"period": 1}),
    ("qwen2", 33, 20, {"period": 2, "accept": "match"}),
    ("llama", 9, 24, {"period": 5}),
    ("llama3", 7, 20, {"period": 4, "sparsity": "fsparse", "accept": "match"}),
    ("mistral", 12, 40, {"period": 16, "density": 0.9}),
    ("qwen2", 4, 40, {"period": 17, "density": 1.0, "accept": "match"}),
    ("mistral", 6, 24, {"period": 20, "sparsity": "fsparse", "threshold": 0.02}),
    ("llama", 3, 16, {"period": 4, "tree_width": 2}),
    ("mistral", 8, 24, {"period": 5, "tree_width": 3, "sparsity": "fsparse"}),
    ("mistral", 5, 16, {"period": 4, "tree_width": 5, "prune": True}),
    ("qwen2", 9, 16, {"period": 6, "tree_width": 4, "accept": "match"}),
    ("mistral", 11, 12, {"period": 6, "tree_width": 16, "threshold": 0.3}),
    ("llama3", 9, 24, {"period": 5, "sparsity": "cascade"}),
    ("qwen2", 7, 12, {"mode": "sparse", "sparsity": "cascade"}),
    ("mistral", 5, 20, {"period": 4, "tree_width": 5, "prune": True, "sparsity": "cascade", "score_temperature": 0.2}),
]


@pytest.mark.parametrize(("name", "length", "count", "values"), CASES, ids=str)
def test_equals_the_reference(place, name, length, count, values):
    check_against_reference(place.engine(name), decoder(name), length, count, values)


# The sparse model reads what the full one does: the reference has one decoder for both.
@pytest.mark.parametrize(
    ("weights", "name", "length", "count", "values"),
    [
        ("q4", "llama", 9, 12, {"period": 5}),
        ("q8", "mistral", 6, 20, {"period": 18, "sparsity": "fsparse", "threshold": 0.02}),
        ("q4", "qwen2", 9, 12, {"period": 6, "tree_width": 4, "accept": "match"}),
        ("q4", "llama3", 9, 10, {"period": 5, "sparsity": "cascade"}),
    ],
    ids=str,
)
def test_packed_weights_equal_the_reference(place, weights, name, length, count, values):
    twin = reference.Decoder(same_numbers(name, weights=weights))
    check_against_reference(place.engine(name, weights=weights), twin, length, count, {"draft_weights": "same", **values})


def check_against_reference(engine, twin, length, count, values):
    config = own_bits(**{"density": 0.4, "threshold": 0.1, **values})
    ids = prompt(length)
    tokens, stats = decode(engine, ids, config, count)
    expected, periods = reference.generate(twin, ids[0].tolist(), config, count, [])
    assert tokens == expected
    if config.mode != "sirius":
        periods = []
    assert rows(stats.periods) == rows(periods)
    in_order = list if config.tree_width == 1 else sorted
    for period, twin in zip(stats.periods, periods):
        assert in_order(period.likelihoods) == pytest.approx(in_order(twin.likelihoods), rel=1e-3, abs=1e-5)


def test_the_cases_accept_and_reject():
    periods = []
    for name, length, count, values in CASES[3:]:
        config = own_bits(**{"density": 0.4, "threshold": 0.1, **values})
        periods += reference.generate(decoder(name), prompt(length)[0].tolist(), config, count, [])[1]
    assert sum(0 < period.accepted < period.drafted for period in periods) >= 5
    assert sum(period.accepted == 0 < period.drafted for period in periods) >= 5
    assert {period.branch for period in periods} >= {None, 0, 1}


def test_thresholds(place):
    """FSparse's threshold form, whose number of neurons is known on the device only."""
    name, ids, config = "mistral", prompt(9), own_bits(period=4, sparsity="fsparse")
    values = torch.tensor([0.3, 0.5])
    model, place_of = place.model(name), place.device
    cache, tokens = model.new_cache(), []
    for sparsity in (FSparse(90, 0.5, values.to(place_of)), FSparse(90, 0.5, (values / 2).to(place_of))):
        taken, _ = cache.take(sparsity)
        assert (taken.kind, taken.neurons) == (Kind.THRESHOLD, 0)
        tokens.append(taken.thresholds)
    assert tokens[0] == tokens[1], "a graph would not see the new thresholds"

    text = start(model, Request(ids[0], config, 16, thresholds=values))
    text.run()
    expected, _ = reference.generate(decoder(name), ids[0].tolist(), config, 16, [], thresholds=values.tolist())
    assert text.tokens == expected


@pytest.mark.parametrize(
    "values",
    [
        {"period": 5},
        {"period": 3, "tree_width": 3, "sparsity": "fsparse"},
        {"period": 4, "tree_width": 2, "sparsity": "cascade"},
        {"mode": "sparse"},
    ],
    ids=str,
)
def test_the_host_decides_the_same(place, monkeypatch, values):
    """Period by period on the device or node by node on the host, with and without graphs: the same text in bfloat16."""
    config, ids = SiriusConfig(**values), prompt(7)
    texts = {}
    for mode in ("off", "step", "period"):
        monkeypatch.setenv("SIRIUS_GRAPHS", mode)
        engine = Engine(tiny("mistral", torch.bfloat16).to(place.device))
        tokens, stats = decode(engine, ids, config, 16)
        texts[mode] = tokens, rows(stats.periods)
        (cache,) = prepare(engine.model).caches
        assert bool(cache.periods) == (mode != "step")
    assert texts["off"] == texts["step"] == texts["period"]


@pytest.mark.parametrize(
    ("dtype", "weights", "period"),
    [
        *((dtype, "plain", period) for dtype in (torch.bfloat16, torch.float16) for period in (4, 16)),
        (torch.bfloat16, "q8", 16),
        (torch.bfloat16, "q4", 16),
        (torch.float16, "q4", 6),
    ],
    ids=str,
)
def test_match_is_the_full_text_in_16_bits(place, dtype, weights, period):
    engine, ids = place.engine("mistral", dtype, weights), prompt(10)
    full, _ = decode(engine, ids, SiriusConfig(mode="full"), 24)
    text, stats = decode(engine, ids, SiriusConfig(period=period, accept="match", density=0.8), 24)
    assert text == full
    assert any(each.accepted for each in stats.periods)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, "plain"), (torch.bfloat16, "plain"), (torch.bfloat16, "q8"), (torch.bfloat16, "q4")],
    ids=str,
)
def test_batch_invariance(place, dtype, weights):
    """A node's logits are the same bits in a pass of its own and among sixteen."""
    model, m = place.model("llama3", dtype, weights), 16
    cache = model.new_cache()
    model.reserve(cache, 128, m)
    drive(model, cache, read(cache, prompt(20)[0]))
    cache.base.fill_(20)
    integers = {"dtype": torch.int32, "device": place.device}
    mask = torch.tensor([[(1 << i + 1) - 1] for i in range(m)], device=place.device)
    tokens, offsets = torch.arange(3, 3 + m, **integers), torch.arange(m, **integers)
    dense = cache.take(None)
    together = model.run(cache, Nodes(tokens, offsets, mask, 0), dense).clone()
    for i in range(m):
        one = slice(i, i + 1)
        assert_same_bits(model.run(cache, Nodes(tokens[one], offsets[one], mask[one], i), dense), together[one])


STREAMED = [
    ("llama3", "plain", {"draft_weights": "q4"}, {"copy": True}),
    ("llama3", "plain", {"draft_weights": "q4", "tree_width": 3}, {"copy": True, "streams_rest": True}),
    ("llama3", "plain", {"draft_weights": "same"}, {"slots": 66}),
    ("mistral", "q8", {"accept": "match"}, {"slots": 45}),
    ("qwen2", "q4", {}, {"slots": 72}),
    ("llama3", "q4", {"sparsity": "cascade", "density": 0.3}, {"slots": 54}),
]


@pytest.mark.parametrize(("name", "weights", "values", "kinds"), STREAMED, ids=str)
def test_weights_that_come_from_the_host(place, name, weights, values, kinds):
    """Neurons that arrive while they are read, and a set in slots: the text is that of a model which is on the device."""
    config = SiriusConfig(**{"period": 4, "density": 0.5} | values)
    engine = tiered(files_of(name, torch.bfloat16, weights), (0, 0), device=place.device, **kinds)
    twin = whole(name, torch.bfloat16, weights, place.device)
    for length in (30, 7):
        found, periods = decode(engine, prompt(length), config, 20)
        expected, all_there = decode(twin, prompt(length), config, 20)
        assert found == expected and rows(periods.periods) == rows(all_there.periods)


def test_rules_of_the_host(place):
    """What the device cannot decide goes through the same passes: drawn tokens, processed logits. (Of four bits the CPU rounds a
    product's input, and CUDA does not.)"""
    engine, ids = place.engine("mistral"), prompt(9)
    with emulated(None):  # the CPU backend
        twin = Engine(tiny("mistral"))
    for config, settings in (
        (own_bits(period=4, accept="sample"), {"do_sample": True, "temperature": 0.8, "top_k": 0}),
        (own_bits(period=3, tree_width=2, accept="sample"), {"do_sample": True, "temperature": 1.0, "top_k": 20}),
        (own_bits(period=4, tree_width=2), {"repetition_penalty": 1.3}),
        (own_bits(period="auto", accept="match"), {"repetition_penalty": 1.3}),
    ):
        seeds = [{"generator": seeded(3)} if settings.get("do_sample") else {} for _ in "ab"]
        tokens, _ = decode(engine, ids, config, 12, **settings, **seeds[0])
        with emulated(None):  # the CPU backend
            expected, _ = decode(twin, ids, config, 12, **settings, **seeds[1])
        assert tokens == expected, config


def test_ends(place):
    """An end of text within a period: nothing after it is returned, though the device is a period ahead."""
    engine, ids = place.engine("mistral"), prompt(9)
    config = own_bits(period=6, threshold=0.02)
    long, _ = decode(engine, ids, config, 40)
    for eos in (long[3], long[9]):
        tokens, stats = decode(engine, ids, config, 40, eos_token_id=eos)
        assert tokens == long[: long.index(eos) + 1]
        assert stats.finish == "eos" and sum(period.committed for period in stats.periods) == len(tokens) - 1
    assert decode(engine, ids, config, 40)[0] == long


def test_a_new_prompt_needs_no_new_graph(place):
    engine, config = Engine(tiny("mistral").to(place.device)), own_bits(period=3)
    decode(engine, prompt(40), config, 20)
    (cache,) = prepare(engine.model).caches
    graphs, keys = dict(cache.periods), cache.k.data_ptr()
    for length in (3, 30, 17):
        decode(engine, prompt(length), config, 8)
    assert list(prepare(engine.model).caches) == [cache]
    assert cache.periods == graphs and cache.k.data_ptr() == keys


def test_the_cache_doubles(place):
    engine = Engine(tiny("mistral", max_position_embeddings=2048).to(place.device))
    model = prepare(engine.model)
    config = own_bits(period=3)
    short = decode(engine, prompt(5), config, 6)[0]
    (cache,) = model.caches
    assert cache.capacity == cuda.FIRST_CAPACITY and cache.periods
    held = cache.k[:, :, : len(cache.tokens)].clone()
    model.reserve(cache, cuda.FIRST_CAPACITY + 1, 3)
    assert cache.capacity == 2 * cuda.FIRST_CAPACITY and not cache.periods
    assert torch.equal(cache.k[:, :, : len(cache.tokens)], held)
    assert decode(engine, prompt(5), config, 6)[0] == short


def test_a_cache_is_no_longer_than_any_text(place):
    """Of a long context keys and values are most of what a card holds."""
    model = prepare(Engine(tiny("mistral", max_position_embeddings=1000).to(place.device)).model)
    cache, most = model.new_cache(), 1000 + MAX_NODES_ON_CUDA + cuda.AHEAD
    for slots, capacity in ((300, 512), (600, 1024), (1025, -(-most // CACHE_GRAIN) * CACHE_GRAIN)):
        cache.reserve(slots)
        assert slots <= cache.capacity == capacity


def test_an_adaptive_period_keeps_to_the_largest_tree(place, monkeypatch):
    """Fixed ones are refused (`test_errors`)."""
    engine = place.engine("mistral")
    for width, longest in ((1, 32), (8, 32), (9, 29), (16, 16)):
        config = own_bits(period="auto", tree_width=width)
        (request,) = engine.requests(prompt(3), config=config, max_new_tokens=4, do_sample=False)
        assert request.longest_period(prepare(engine.model)) == longest
        assert request.tree(prepare(engine.model)).capacity <= 256
    monkeypatch.setattr(sequence, "costs_of", lambda *_: Costs(0.01, ((16, 1.0),)))
    assert len(decode(engine, prompt(3), own_bits(period="auto", tree_width=16, accept="match"), 4)[0]) == 4


def test_errors(place, monkeypatch):
    engine = place.engine("mistral")
    with pytest.raises(ValueError, match="^period, tree_width: expected a tree of at most 256 nodes on a CUDA device, got 273"):
        decode(engine, prompt(3), own_bits(period=18, tree_width=16), 30)
    monkeypatch.setenv("SIRIUS_GRAPHS", "both")
    with pytest.raises(ValueError, match="^SIRIUS_GRAPHS: expected one of period, step, off, got 'both'"):
        Engine(tiny("mistral").to(place.device))
    monkeypatch.delenv("SIRIUS_GRAPHS")

    empty = torch.empty

    def full(*shape, **how):
        if 0 in shape:
            return empty(*shape, **how)
        raise torch.OutOfMemoryError("no memory")

    engine = Engine(tiny("mistral").to(place.device))
    decode(engine, prompt(3), own_bits(period=3), 5)
    model = prepare(engine.model)
    cache, (kept,) = model.new_cache(), model.caches
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(RuntimeError, match="^cuda: out of memory for a cache of .* lower max_new_tokens"):
            model.reserve(cache, 100, 3)
    # The caches of other texts were given up before.
    assert not len(model.caches) and not kept.tokens and not kept.nbytes
    model.reserve(cache, 100, 3)
    assert decode(engine, prompt(3), own_bits(period=3), 5)[0]


@pytest.mark.parametrize(
    "values",
    [
        {"period": 5},
        {"period": 4, "tree_width": 3, "sparsity": "fsparse"},
        {"period": 4, "tree_width": 3, "sparsity": "cascade"},
        {"period": 4, "tree_width": 2, "accept": "match"},
    ],
    ids=str,
)
def test_kernels_of_a_period_overlap(monkeypatch, values):
    """As in a graph on sm_90: every kernel begins before the one before it, whichever calls launched them. So it shows where one
    touches what another has yet to write."""
    launch, held = PeriodGraph._launch, []

    def overlapping(graph):
        _simt.set_held(True)
        held.append(graph)
        try:
            launch(graph)
        finally:
            _simt.set_held(False)

    config, ids = own_bits(density=0.4, threshold=0.1, **values), prompt(9)
    with emulated(_simt):
        apart, periods = decode(Engine(tiny("mistral", torch.bfloat16)), ids, config, 16)
        monkeypatch.setattr(PeriodGraph, "_launch", overlapping)
        together, same_periods = decode(Engine(tiny("mistral", torch.bfloat16)), ids, config, 16)
    assert held and together == apart and rows(same_periods.periods) == rows(periods.periods)


def test_attention_s_workspace_is_bounded(place):
    """Of a tree over a long text: by the rows that run at once, not by all of them."""
    functions = dispatch.cuda_functions(place.device)
    floats = lambda rows, capacity: functions.tree_attention_workspace(rows, 32, 128, capacity)  # noqa: E731
    assert 4 * floats(121, 1 << 17) < 128 << 20 and floats(16, 1 << 18) == 16 * floats(1, 1 << 18)
    assert 4 * floats(121, 4096) == 4 * 121 * floats(1, 4096) < 128 << 20


def test_the_counters_are_left_at_zero(place):
    decode(place.engine("mistral"), prompt(9), own_bits(period=4, tree_width=3, sparsity="fsparse"), 12)
    assert not place.model("mistral").counters.any() and not dispatch.counters(place.device).any()
