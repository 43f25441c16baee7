"""Drafts that stop early inside a replayed period: the CUDA backend decides what the CPU's engine does, from the same numbers."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from backends import call, emulated, poisoned, walled
from fake_cuda import FakeCuda
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_model import COLUMNS, Place
from test_period import CHEAP, DEAR
from tiny import Collector, own_bits, prompt, tiny

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.decoding import period_graph, sequence
from sirius_ext.decoding.period import EDGES, AdaptivePeriod, Costs, Stops
from sirius_ext.decoding.period_graph import PeriodGraph, depth_with
from sirius_ext.engine import prepare
from sirius_ext.kernels import dispatch
from sirius_ext.runtime import graphs
from sirius_ext.runtime.graphs import Replay

pytestmark = pytest.mark.usefixtures("one_thread")
SOMETIMES = Costs(0.55, ((4, 1.0), (16, 1.1)), 0.02)  # S drafts here and there
FREE = Costs(1e-6, ((16, 1.0),))  # S drafts for as long as it may
COUNT = 16


@functools.cache
def cpu_engine(name: str, dtype: torch.dtype = torch.float32) -> Engine:
    with emulated(None):
        return Engine(tiny(name, dtype))


@functools.cache
def cuda_engine(place: str, name: str, dtype: torch.dtype = torch.float32) -> Engine:
    return Place(place).engine(name, dtype)


@pytest.fixture(params=["simt", *(["cuda"] if torch.cuda.is_available() else [])])
def place(request):
    with emulated(_simt) if request.param == "simt" else contextlib.nullcontext():
        yield request.param


def config_of(**values) -> SiriusConfig:
    """S reads F's own bits, of which both backends make the same (of four bits the CPU rounds a product's input)."""
    return own_bits(**{"period": "auto", "density": 0.4, "threshold": 0.05, "lookup": False, **values})


def decode(engine, config, length=9, count=COUNT, **settings):
    out = engine.generate(
        prompt(length).to(engine.model.device), config=config, max_new_tokens=count, **{"do_sample": False, **settings}
    )
    return out.sequences[0, length:].tolist(), out.stats.prompts[0]


def rows(periods):
    return [tuple(getattr(period, column) for column in (*COLUMNS, "copied")) for period in periods]


def on_both(place, monkeypatch, name, config, costs, **settings):
    """Decoded by the CPU's engine, and by the CUDA backend's replayed periods; the latter's periods."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: costs)
    with emulated(None):
        expected, twin = decode(cpu_engine(name), config, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(sequence.Sequence, "_period", lambda *_: pytest.fail("the host decided"))
        tokens, stats = decode(cuda_engine(place, name), config, **settings)
    assert tokens == expected
    assert rows(stats.periods) == rows(twin.periods)
    in_order = list if config.tree_width == 1 else sorted
    for mine, its in zip(stats.periods, twin.periods):
        assert in_order(mine.likelihoods) == pytest.approx(in_order(its.likelihoods), rel=1e-3, abs=1e-5)
    assert stats.metrics().keys() == twin.metrics().keys()
    for name, value in stats.metrics().items():
        assert name == "ms_per_token" or value == pytest.approx(twin.metrics()[name])
    return stats.periods


# (model, prompt length, tokens, costs, config): every sparse model and rule; chains and trees; all sizes of graphs.
CASES = [
    ("llama", 5, 24, CHEAP, {}),
    ("llama3", 9, 24, SOMETIMES, {"accept": "match"}),
    ("qwen2", 9, 20, CHEAP, {"accept": "match", "follow": False, "score_temperature": 0.3}),
    ("mistral", 9, 20, CHEAP, {"sparsity": "fsparse", "density": 0.8}),
    ("qwen2", 3, 20, SOMETIMES, {"sparsity": "cascade"}),
    ("mistral", 9, 20, CHEAP, {"tree_width": 3}),
    ("llama", 9, 16, SOMETIMES, {"tree_width": 4, "prune": True, "sparsity": "fsparse", "accept": "match"}),
    ("qwen2", 9, 8, DEAR, {}),
    ("llama3", 9, 60, FREE, {"accept": "match", "density": 1.0}),
    ("mistral", 9, 1, CHEAP, {}),
    ("mistral", 9, 2, CHEAP, {}),
    ("mistral", 9, 3, CHEAP, {"density": 0.9}),
]


@pytest.mark.parametrize(("name", "length", "count", "costs", "values"), CASES, ids=str)
def test_equals_the_cpu(place, monkeypatch, name, length, count, costs, values):
    """Token for token, and draft for draft."""
    periods = on_both(place, monkeypatch, name, config_of(**values), costs, length=length, count=count)
    assert sum(period.committed for period in periods) == count - 1


def test_the_cases_stop_here_and_there(monkeypatch):
    """By drafts of many lengths, none among them, that are accepted and rejected; of over sixteen rows; at the ends of texts."""
    periods = []
    for name, length, count, costs, values in CASES:
        monkeypatch.setattr(sequence, "costs_of", lambda *_, costs=costs: costs)
        periods.append(decode(cpu_engine(name), config_of(**values), length, count)[1].periods)
    of_all = [period for each in periods for period in each]
    assert {0, 1, 2, 3, 4} <= {period.drafted for period in of_all}
    assert max(period.drafted for period in of_all) > 15
    assert sum(0 < period.accepted < period.drafted for period in of_all) >= 5
    assert sum(period.accepted == 0 < period.drafted for period in of_all) >= 5
    assert sum(len({period.drafted for period in each}) >= 3 for each in periods) >= 4
    assert any(period.cut and period.drafted for period in of_all)


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_left_out_does_not_run(place, monkeypatch, width):
    """No pass of S but those that were drafted by, outside of graphs; a graph has the others as parts that do not run."""
    passes, draft = [], PeriodGraph._draft
    monkeypatch.setenv("SIRIUS_GRAPHS", "off")
    monkeypatch.setattr(PeriodGraph, "_draft", lambda graph, depth: passes.append(depth) or draft(graph, depth))
    monkeypatch.setattr(sequence, "costs_of", lambda *_: SOMETIMES)
    engine = Engine(tiny("qwen2").to(Place(place).device))
    _, stats = decode(engine, config_of(tree_width=width))
    assert passes and len(passes) == sum(period.drafted for period in stats.periods)
    assert passes == [depth for period in stats.periods for depth in range(period.drafted)]


def test_in_16_bits_match_is_the_full_text(place, monkeypatch):
    monkeypatch.setattr(sequence, "costs_of", lambda *_: CHEAP)
    engine = cuda_engine(place, "mistral", torch.bfloat16)
    full, _ = decode(engine, SiriusConfig(mode="full"), count=24)
    text, stats = decode(engine, config_of(accept="match", density=0.8), count=24)
    assert text == full and any(period.accepted for period in stats.periods)


def test_a_narrow_window(monkeypatch):
    """No period is longer, and no graph has more places."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: FREE)
    found = []
    for functions in (None, _simt):
        with emulated(functions):
            engine = Engine(tiny("mistral_windows", sliding_window=4))
            tokens, stats = decode(engine, config_of(density=0.8))
            found.append((tokens, rows(stats.periods)))
    assert found[0] == found[1] and max(period.drafted for period in stats.periods) == 3
    assert {graph.depth for cache in prepare(engine.model).caches for graph in cache.periods.values()} == {3}


def test_ends(place, monkeypatch):
    """By an end-of-text token within a period; the next one runs already, and the text after it is as it would be."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: CHEAP)
    engine, config = cuda_engine(place, "mistral"), config_of(density=0.9)
    long, _ = decode(engine, config)
    for eos in (long[4], long[9]):
        streamer = Collector()
        tokens, stats = decode(engine, config, eos_token_id=eos, streamer=streamer)
        assert tokens == long[: long.index(eos) + 1] and stats.finish == "eos"
        assert torch.cat(streamer.puts[1:]).tolist() == tokens
    assert decode(engine, config)[0] == long


def test_graphs_serve_every_prompt(place, monkeypatch):
    """No more of them than there are sizes, whatever is learnt of a text."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: CHEAP)
    engine = Engine(tiny("qwen2").to(Place(place).device))
    for length in (9, 3, 30):
        decode(engine, config_of(), length, 8)
    (cache,) = prepare(engine.model).caches
    depths = [graph.depth for graph in cache.periods.values()]
    assert len(depths) == len(set(depths)) and set(depths) <= {0, 7, 15, 31}


def test_where_the_full_model_is_alone_the_device_is_ahead(place, monkeypatch):
    """By one period, and with none after the text's end."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: DEAR)
    started, start = [], PeriodGraph.start
    monkeypatch.setattr(PeriodGraph, "start", lambda graph, stops=None: started.append(graph.depth) or start(graph, stops))
    engine = cuda_engine(place, "qwen2")
    text, counts = engine.start(prompt(9).to(engine.model.device), config=config_of(), max_new_tokens=6, do_sample=False), []
    while not text.ended:
        text.step()
        counts.append(len(started))
    assert counts == [0, 2, 3, 4, 5, 5] and not any(started)


def test_what_the_host_must_decide(place, monkeypatch):
    """Copies, processed logits and graphs of single passes: as before, with the same text."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: CHEAP)
    monkeypatch.setattr(PeriodGraph, "begin", lambda *_: pytest.fail("a graph"))
    for values, settings, mode in (
        ({"lookup": True}, {}, "period"),
        ({}, {"repetition_penalty": 1.3}, "period"),
        ({}, {}, "step"),
    ):
        monkeypatch.setenv("SIRIUS_GRAPHS", mode)
        engine = Engine(tiny("mistral").to(Place(place).device))
        with emulated(None):
            expected, _ = decode(cpu_engine("mistral"), config_of(**values), **settings)
        assert decode(engine, config_of(**values), **settings)[0] == expected


def test_graphs_without_conditions_leave_it_to_the_host(monkeypatch):
    """Of a driver or a build before CUDA 12.4."""
    with emulated(_simt):
        model, config = cuda_engine("simt", "mistral"), config_of()
        model = prepare(model.model)
        cache, policy = model.new_cache(), AdaptivePeriod(CHEAP, "threshold")
        asked = model, cache, config, None, policy, (1, 5, 9)
        assert not graphs.has_conditions(model.device) and model.conditions  # no graph is captured here
        assert period_graph.replayed_periods(*asked) is not None
        monkeypatch.setattr(model, "conditions", False)
        assert period_graph.replayed_periods(*asked) is None


@pytest.mark.parametrize("cause", [None, torch.OutOfMemoryError("no room")])
@pytest.mark.parametrize("count", [1, 3])
def test_what_cannot_be_captured_is_left_to_the_host(monkeypatch, count, cause):
    """With a warning, once, and the same text: at its beginning and on the way, after periods of F alone or not. For good, unless
    it was memory that did not suffice this time."""
    start, left = PeriodGraph.start, [count]

    def refused(graph, stops=None):
        left[0] -= graph.depth > 0
        if graph.depth and left[0] <= 0:
            raise graphs.ConditionsError("cuda: a period of 8 could not be captured as a graph (not supported)") from cause
        return start(graph, stops)

    monkeypatch.setattr(PeriodGraph, "start", refused)
    monkeypatch.setattr(sequence, "costs_of", lambda *_: SOMETIMES)
    expected = decode(cpu_engine("mistral"), config_of(density=0.8))
    with emulated(_simt):
        engine = Engine(tiny("mistral"))
        with pytest.warns(RuntimeWarning, match="^cuda: a period of 8 could not .*; the host decides instead") as warned:
            tokens, stats = decode(engine, config_of(density=0.8))
        assert tokens == expected[0] and rows(stats.periods) == rows(expected[1].periods) and len(warned) == 1
        assert prepare(engine.model).conditions == (cause is not None)
        left[0] = 100
        assert decode(engine, config_of(density=0.8))[0] == tokens and (left[0] == 100) == (cause is None)


def test_a_fault_is_found(monkeypatch):
    """In a draft, and where F decodes alone: the error is the CPU's, and what was committed stays."""
    for costs in (CHEAP, DEAR):
        monkeypatch.setattr(sequence, "costs_of", lambda *_, costs=costs: costs)
        good = decode(cpu_engine("mistral"), config_of(accept="match"))[0]
        token = next(token for index, token in enumerate(good) if index > 5 and token not in [*prompt(9)[0], *good[:index]])
        found = []
        for functions in (None, _simt):
            with emulated(functions):
                broken, streamer = tiny("mistral"), Collector()
                with torch.no_grad():
                    broken.model.embed_tokens.weight[token] = torch.nan
                with pytest.raises(ValueError, match="are not finite") as error:
                    decode(Engine(broken), config_of(accept="match"), streamer=streamer)
                found.append((str(error.value), torch.cat(streamer.puts[1:]).tolist()))
        assert found[0] == found[1] and found[0][1] == good[: len(found[0][1])]


@pytest.mark.parametrize("width", [1, 3])
def test_kernels_overlap(monkeypatch, width):
    """As in a graph, up to where a part begins that may not run."""
    monkeypatch.setattr(sequence, "costs_of", lambda *_: CHEAP)
    launch = PeriodGraph._launch

    def overlapping(graph):
        _simt.set_held(True)
        try:
            launch(graph)
        finally:
            _simt.set_held(False)

    with emulated(_simt):
        apart = decode(cuda_engine("simt", "llama", torch.bfloat16), config_of(tree_width=width), count=16)
        monkeypatch.setattr(PeriodGraph, "_launch", overlapping)
        together = decode(cuda_engine("simt", "llama", torch.bfloat16), config_of(tree_width=width), count=16)
    assert together[0] == apart[0] and rows(together[1].periods) == rows(apart[1].periods)


# -------------------------------------------------------------------------------------------------------------- the decision


CONFIDENCES = st.floats(0, 1, width=32) | st.sampled_from([float(torch.tensor(edge)) for edge in EDGES])


@st.composite
def policies(draw):
    """One that has learnt something, and the room that it is asked for."""
    sparse = draw(st.floats(0.02, 0.9))
    costs = Costs(sparse, ((4, 1.0 + draw(st.floats(0, 0.3))), (16, 1.4)), 0.02)
    policy = AdaptivePeriod(costs, draw(st.sampled_from(["match", "threshold"])), longest=draw(st.integers(1, 20)))
    for _ in range(draw(st.integers(0, 12))):
        confidences = draw(st.lists(CONFIDENCES, max_size=min(4, policy.longest - 1)))
        for confidence in confidences:
            policy.drafted(confidence)
        accepted = draw(st.integers(0, len(confidences)))
        policy.judged(accepted, accepted + 1)
    return policy, draw(st.integers(0, 30))


@given(given=policies(), data=st.data())
def test_a_plan_has_all_that_decides(given, data):
    """And no draft is longer than it says, though one may be as long."""
    policy, room = given
    stops = policy.stops(room)
    reach, drafted = 1.0, 0
    while policy.goes_on(room):
        assert drafted < stops.longest and reach * stops.mean >= stops.worth[drafted]
        confidence = data.draw(CONFIDENCES)
        policy.drafted(confidence)
        reach *= stops.accepted[sum(edge <= confidence for edge in EDGES)]
        drafted += 1
    assert drafted == stops.longest or not reach * stops.mean >= stops.worth[drafted]
    best = dataclasses.replace(stops, accepted=[max(stops.accepted)] * len(stops.accepted))
    assert drafts_of(best, [0.5] * stops.longest)[1] == stops.longest


def drafts_of(stops: Stops, confidences: list[float]) -> tuple[float, int]:
    reach = 1.0
    for drafted, confidence in enumerate([*confidences, 0.0]):
        if drafted == stops.longest or not reach * stops.mean >= stops.worth[drafted]:
            return reach, drafted
        reach *= stops.accepted[sum(edge <= confidence for edge in EDGES)]
    raise AssertionError


def check_stop(functions, stops: Stops, confidences: list[float], width: int, empty: int | None = None) -> None:
    """The kernel's answers along a draft, in which the nodes of depth `empty` have no children."""
    depths, device = stops.longest + 2, "cpu"
    rule = torch.tensor(stops.numbers(depths), dtype=torch.float64)
    assert len(rule) == Stops.size(depths)
    known = torch.full((depths,), torch.nan)
    reach = torch.zeros(1, dtype=torch.float64, device=device)
    goes_on, counts = torch.ones(1, dtype=torch.int32), torch.full((depths,), 7, dtype=torch.int32)
    scores = torch.full((1 + depths * width,), 0.5)
    expected_reach, expected = drafts_of(stops, confidences)
    answers = []
    for depth in range(depths):
        fields = {"rule": walled(rule), "confidences": known, "reach": reach, "goes_on": goes_on, "counts": counts}
        sizes = {"edges": len(EDGES), "depth": depth, "depths": depths, "width": width}
        call(functions, "stop", workspace=0, **fields, scores=scores, **sizes)
        answers.append(int(goes_on))
        if depth < len(confidences):
            known[depth] = confidences[depth]
        if width > 1 and goes_on:
            counts[depth] = 0 if depth == empty else width
    if empty is not None and empty < expected:
        assert answers == [1] * (empty + 1) + [0] * (depths - empty - 1)
        return
    assert answers == [1] * expected + [0] * (depths - expected)
    assert float(reach) == expected_reach or expected < depths - 1  # later answers begin anew
    assert counts.tolist() == [1 if width == 1 else width] * expected + [0] * (depths - expected)
    if width == 1:
        assert scores.tolist() == [0.5] + [0.0] * expected + [-torch.inf] * (depths - expected)
    else:
        assert scores.tolist() == [0.5] + [-torch.inf] * (depths * width)


@given(given=policies(), data=st.data(), width=st.sampled_from([1, 3]))
def test_the_kernel_decides_so(cuda_functions, given, data, width):
    policy, room = given
    stops = policy.stops(room)
    confidences = data.draw(st.lists(CONFIDENCES, min_size=stops.longest, max_size=stops.longest))
    check_stop(cuda_functions, stops, confidences, width)
    if width > 1 and stops.longest:
        check_stop(cuda_functions, stops, confidences, width, data.draw(st.integers(0, stops.longest - 1)))


def check_a_stop(functions) -> None:
    """Of an unsure draft: no number of it is by chance."""
    stops = Stops(0.8, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [0.5, 0.5, 0.5, 0.5])
    check_stop(functions, stops, [0.9995, 0.96, 0.1, 1.0], 1)
    check_stop(functions, stops, [1.0] * 4, 3, empty=2)


def test_an_unsure_draft_stops(cuda_functions):
    check_a_stop(cuda_functions)


@pytest.mark.parametrize(("n", "vocab"), [(1, 33), (3, 1134), (2, 9001), (2, 12288)])
@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_the_likelihood_of_the_likeliest_token(cuda_functions, n, vocab, temperature):
    logits = 3 * torch.randn(n, vocab)
    best, likelihoods = poisoned(n, dtype=torch.int32), poisoned(n, dtype=torch.float32)
    call(
        cuda_functions,
        "argmax",
        workspace=cuda_functions.argmax_workspace(n, vocab),
        logits=walled(logits),
        argmax=best.tensor,
        likelihoods=likelihoods.tensor,
        score_temperature=temperature,
        num_rows=n,
        vocab=vocab,
    )
    assert best.check().tolist() == logits.argmax(1).tolist()
    expected = (logits.double() / temperature).softmax(1).amax(1)
    torch.testing.assert_close(likelihoods.check().double(), expected, rtol=1e-5, atol=0)


def test_sizes_of_graphs():
    assert [depth_with(drafts, 1, 32) for drafts in (0, 1, 7, 8, 15, 16, 31)] == [0, 7, 7, 15, 15, 31, 31]
    assert [depth_with(drafts, 3, 32) for drafts in (0, 1, 2, 3, 5, 6, 10, 11, 31)] == [0, 2, 2, 5, 5, 10, 10, 21, 31]
    assert [depth_with(drafts, 16, 32) for drafts in (1, 2, 3, 31)] == [1, 3, 3, 31]
    assert [depth_with(drafts, 1, 4) for drafts in (0, 3)] == [0, 3]


# ----------------------------------------------------------------------------------------------------------- what is captured


class Conditions:
    """Notes what is asked of the extension around conditional parts."""

    def __init__(self, log):
        self.log, self.made = log, 0

    def new_condition(self, stream):
        self.made += 1
        self.log.append(("condition", self.made, stream))
        return self.made

    def begin_if(self, condition, stream, body):
        self.log.append(("if", condition, stream, body))

    def end_if(self, body):
        self.log.append(("end", body))

    def is_set(self, flag, stream):
        self.log.append(("is set", stream))
        return False


def test_a_part_is_captured_on_a_stream_of_its_own(monkeypatch):
    cuda, device, log = FakeCuda(monkeypatch), torch.device("cuda", 0), []
    functions = Conditions(log)
    monkeypatch.setattr(dispatch, "cuda_functions", lambda _: functions)
    outer, inner = torch.cuda.Stream(device), torch.cuda.Stream(device)
    inner.cuda_stream = 2
    current, flag = lambda: torch.cuda.current_stream(device).cuda_stream, torch.zeros(1, dtype=torch.int32)

    def body():
        for part in "ab":
            decide = lambda condition: log.append(("decide", condition, current()))  # noqa: E731
            log.append(("runs", replay.only_if(decide, flag, lambda part=part: log.append((part, current())))))
        log.append(("after", current()))

    replay = Replay(body, device, True, "a period", stream=outer, inner=inner)
    replay()
    run_before = [("decide", 0, 1), ("a", 1), ("runs", True), ("decide", 0, 1), ("b", 1), ("runs", True), ("after", 1)]
    captured = []
    for number, part in enumerate("ab", start=1):
        captured += [("condition", number, 1), ("decide", number, 1), ("if", number, 1, 2), (part, 2), ("end", 2), ("runs", True)]
    assert log == [*run_before, *captured, ("after", 1)]
    assert ("replay", 0) in cuda.log
    log.clear()
    replay = Replay(body, device, False, "a period")  # SIRIUS_GRAPHS=off
    replay()
    assert log == [("decide", 0, 0), ("is set", 0), ("runs", False)] * 2 + [("after", 0)]

    def refused(body):
        raise RuntimeError("cudaStreamEndCapture: not supported")

    log.clear()

    def failing():
        if replay._run is graphs._Run.CAPTURE:
            raise torch.OutOfMemoryError("no room")

    replay = Replay(lambda: replay.only_if(lambda _: None, flag, failing), device, True, "a period", stream=outer, inner=inner)
    with pytest.raises(graphs.ConditionsError, match="^cuda: a period could not be captured .*no room.*; lower") as caught:
        replay()
    assert log[-1] == ("end", 2) and isinstance(caught.value.__cause__, torch.OutOfMemoryError)  # no capture stays open

    functions.end_if = refused
    replay = Replay(body, device, True, "a period", stream=outer, inner=inner)
    with pytest.raises(graphs.ConditionsError, match="^cuda: a period could not be captured .*not supported.*; lower"):
        replay()
