"""Models of which not all is in a CUDA device's memory, over simt: they decode what they would with all of it there, bit for bit,
whenever the copies run."""

import contextlib
import dataclasses
import functools

import backends
import pytest
import test_gguf
import test_simt
import torch
from backends import SIMT_ORDERS, assert_same_bits, emulated
from capture_lint import CaptureLint
from simt_builds import Mutation
from tier_models import files_of, moved, source_of, tiered, whole
from tiny import prompt, tiny

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.cli.main import main as cli
from sirius_ext.config import GREEDY
from sirius_ext.decoding import sequence
from sirius_ext.decoding.period import Costs
from sirius_ext.decoding.period_graph import PeriodGraph
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.sparsity import drafts_of
from sirius_ext.engine import prepare
from sirius_ext.kernels import dispatch
from sirius_ext.kernels.weight_stream import Slots, StreamedImage, WeightStream
from sirius_ext.models import device_tiers, hub, tier_files
from sirius_ext.models.device_tiers import DeviceSizes, DeviceTiers, device_plan
from sirius_ext.models.tiers import Draft, TooLittle, cache_bytes, row_bytes
from sirius_ext.runtime.cuda import CudaModel, is_left_in_host
from sirius_ext.runtime.graphs import Replay
from sirius_ext.runtime.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = torch.device("cpu")  # whose memory is the emulated one's
TOKENS, PAGE = 9, 4096  # page: of the emulated device
BF16 = torch.bfloat16


@pytest.fixture(params=SIMT_ORDERS)
def order(request):
    """When copies run: as early as they may, as late, or in between."""
    with in_order(request.param):
        yield request.param


@contextlib.contextmanager
def in_order(name):
    _simt.set_order(SIMT_ORDERS.index(name))
    try:
        with emulated(_simt):
            yield
    finally:
        _simt.set_order(0)


def decoded(engine, config, count=TOKENS, **settings):
    """A text, and how it came."""
    out = engine.generate(prompt(30), config=config, max_new_tokens=count, **GREEDY | settings)
    return out.sequences.tolist(), [period.accepted for period in out.stats.prompts[0].periods]


def passes(engine):
    """Logits and z: of a prefill, and of passes of one token, of sixteen, and of so many that torch makes them."""
    model, ids = prepare(engine.model), prompt(20)[0]
    cache = model.new_cache()
    model.reserve(cache, 128, 18)
    found = [drive(model, cache, read(cache, ids)).clone()]
    for rows in (1, 16, 18):
        asked = Pass.chain(torch.arange(3, 3 + rows, dtype=torch.int32), 20, keep_z=True)
        found += [model.step(cache, asked)[0].clone(), cache.z(rows).clone()]
    return found


def same_bits(first, second):
    for mine, its in zip(first, second, strict=True):
        assert_same_bits(mine, its)


@pytest.mark.parametrize(("name", "dtype"), [("llama3", torch.float32), ("gemma2", BF16), ("phi3", BF16)], ids=str)
def test_passes_have_the_same_bits(order, name, dtype):
    expected = passes(whole(name, dtype))
    for resident in (0, 70, 1 << 30):
        same_bits(passes(tiered(files_of(name, dtype), (resident, 0))), expected)


def test_chunks_of_a_prompt_that_go_through_layers_together(order, monkeypatch):
    monkeypatch.setattr("sirius_ext.runtime.cache.PREFILL_CHUNK", 8)
    monkeypatch.setattr("sirius_ext.runtime.cache.TOGETHER", 2)
    same_bits(passes(tiered(files_of(dtype=BF16), (70, 0))), passes(whole(dtype=BF16)))


def test_passes_over_two_images_have_the_same_bits(order):
    form = "llama3", BF16, "q8"
    expected = passes(whole(*form))
    for resident in ((0, 0), (70, 0), (1 << 30, 0), (1 << 30, 70), (1 << 30, 1 << 30)):
        same_bits(passes(tiered(files_of(*form), resident)), expected)


@pytest.mark.parametrize("weights", ["plain", "q8"])
def test_rows_of_the_embedding_are_read_in_host_memory(weights):
    """Unless it is the head as well, of which all is read."""
    with emulated(_simt):
        for name, apart in (("llama3", True), ("qwen2", False)):
            files = files_of(name, BF16, weights)
            engine = tiered(files, (0, 0))
            table, own = prepare(engine.model).weights.embedding, engine.model.model.embed_tokens.weight
            assert (own.numel() == 0) == apart == (engine.model.tiers.embedding is table)
            assert torch.equal(table.dense(), prepare(whole(name, BF16, weights).model).weights.embedding.dense())
            with_all = sizes_of(files, PAGE).fast(True)
            assert with_all == sum(each.nbytes for each in files.fast.values()) - (files.embedding_bytes if apart else 0)


REST = [
    ("llama3", BF16, "plain"),
    ("gemma2", BF16, "plain"),
    ("phi3", BF16, "plain"),
    ("mistral", BF16, "q8"),
    ("llama", BF16, "q8"),
]


@pytest.mark.parametrize("form", REST, ids=str)
def test_passes_of_attention_and_head_that_stream(order, form, monkeypatch):
    """Of plain weights all of them, of eight bits the lower nibbles; a head that is not the embedding in parts."""
    monkeypatch.setattr(tier_files, "_PART", 1)
    files = files_of(*form)
    for resident in ((0, 0), (1 << 30, 1 << 30)):
        engine = tiered(files, resident, copy=form[2] == "plain", streams_rest=True)
        tiers = engine.model.tiers
        assert (files.beside[1] is None) == (form[0] in ("llama", "gemma2")) and len(tiers.weights._layers) >= len(files.layers)
        assert form[0] not in ("llama3", "mistral") or len(tiers.weights._layers) > len(files.layers) + 1
        same_bits(passes(engine), passes(whole(*form)))


def test_texts_while_attention_and_head_stream(monkeypatch):
    monkeypatch.setattr(tier_files, "_PART", 1)
    cases = (
        (("llama3", BF16, "plain"), SiriusConfig(**FIXED), {"copy": True}),
        (("llama3", BF16, "plain"), SiriusConfig(**FIXED | {"period": 7}, tree_width=3), {"copy": True}),
        (("mistral", BF16, "q8"), SiriusConfig(**FIXED, accept="match"), {"slots": 45}),
    )
    for name, (form, config, kinds) in zip(SIMT_ORDERS, cases):
        with in_order(name):
            engine = tiered(files_of(*form), (0, 0), streams_rest=True, **kinds)
            assert decoded(engine, config, 6) == decoded(whole(*form), config, 6)


FIXED = {"period": 4, "lookup": False, "density": 0.5, "draft_weights": "q4"}
# Each with how many neurons stay.
CASES = {
    "full": (SiriusConfig(mode="full"), 70),
    "sparse": (SiriusConfig(mode="sparse", density=0.5, draft_weights="q4"), 0),
    "threshold": (SiriusConfig(**FIXED), 0),
    "match": (SiriusConfig(**FIXED, accept="match"), 70),
    "fixed set": (SiriusConfig(**FIXED, follow=False), 0),
    "tree": (SiriusConfig(**FIXED, tree_width=3), 0),
    "large tree": (SiriusConfig(**FIXED | {"period": 7}, tree_width=3, sparsity="fsparse"), 70),
    "cascade": (SiriusConfig(**FIXED | {"density": 0.3}, sparsity="cascade"), 70),
    "copies": (SiriusConfig(period=4, density=0.5, lookup=True, accept="match", draft_weights="q4"), 0),
    "one": (SiriusConfig(**FIXED | {"period": 1}), 0),
}


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_texts_with_a_sparse_model_of_copies(number):
    config, resident = list(CASES.values())[number]
    with in_order(SIMT_ORDERS[number % 3]):
        assert decoded(tiered(files_of(dtype=BF16), (resident, 0), copy=True), config) == decoded(whole(dtype=BF16), config)


@pytest.mark.parametrize("number", range(4), ids=("full", "threshold", "tree", "fsparse"))
def test_texts_of_eight_bits(number):
    config = (
        SiriusConfig(mode="full"),
        SiriusConfig(**FIXED),
        SiriusConfig(**FIXED, tree_width=3),
        SiriusConfig(**FIXED, sparsity="fsparse"),
    )[number]
    form = "llama3", BF16, "q8"
    with in_order(SIMT_ORDERS[number % 3]):
        assert decoded(tiered(files_of(*form), (1 << 30, 70 * (number % 2))), config) == decoded(whole(*form), config)


def test_drawn_texts():
    config, settings = SiriusConfig(**FIXED, accept="sample"), {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with in_order("reverse"):
        texts = [
            decoded(each, config, generator=torch.Generator().manual_seed(1), **settings)
            for each in (tiered(files_of(dtype=BF16), (0, 0), copy=True), whole(dtype=BF16))
        ]
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------------- sets that have slots

OWN = {**FIXED, "draft_weights": "same"}
# Of a sparse model that reads the weights of its set as they are, and for how many neurons it has slots: no more than it needs.
SETS = {
    "sparse": (SiriusConfig(mode="sparse", density=0.5, draft_weights="same"), 66),
    "threshold": (SiriusConfig(**OWN), 66),
    "match": (SiriusConfig(**OWN, accept="match"), 66),
    "fixed set": (SiriusConfig(**OWN, follow=False), 66),
    "tree": (SiriusConfig(**OWN, tree_width=3), 66),
    "cascade": (SiriusConfig(**OWN | {"density": 0.3}, sparsity="cascade"), 54),
    "copies": (SiriusConfig(period=4, density=0.5, lookup=True, accept="match", draft_weights="same"), 66),
    "one": (SiriusConfig(**OWN | {"period": 1}), 66),
}


@pytest.mark.parametrize("number", range(len(SETS)), ids=list(SETS))
def test_texts_with_a_sparse_model_whose_set_has_slots(number):
    config, slots = list(SETS.values())[number]
    dtype, resident = (torch.float32, BF16)[number % 2], 70 * (number // 2 % 2)
    with in_order(SIMT_ORDERS[number % 3]):
        assert decoded(tiered(files_of(dtype=dtype), (resident, 0), slots=min(slots, 131 - resident)), config) == decoded(
            whole(dtype=dtype), config
        )


@pytest.mark.parametrize(("name", "resident"), [("threshold", 30), ("tree", 0), ("cascade", 30)])
def test_texts_of_eight_bits_with_slots(name, resident):
    config, slots = SETS[name]
    config, form = dataclasses.replace(config, draft_weights="q4"), ("llama3", BF16, "q8")
    with in_order("random"):
        assert decoded(tiered(files_of(*form), (resident, 0), slots=slots), config, 6) == decoded(whole(*form), config, 6)


@pytest.mark.parametrize(("name", "resident"), [("threshold", 40), ("match", 0), ("tree", 0), ("cascade", 40)])
def test_texts_of_four_bits_with_slots(name, resident):
    """Rows of down find the scales that they share with their neighbours, wherever they are."""
    config, slots = SETS[name]
    form = "llama3", BF16, "q4"
    with in_order("random"):
        engine = tiered(files_of(*form), (resident, 0), slots=min(slots, 131 - resident))
        assert engine.model.tiers.placed(0)[2].format.across
        assert decoded(engine, config, 6) == decoded(whole(*form), config, 6)


@pytest.mark.parametrize("name", test_gguf.FOUR_BITS)
def test_texts_of_layers_of_several_formats_with_slots(name, tmp_path):
    """As files have them: four bits of both kinds, and eight, of which S reads the upper halves."""
    base, changes, kinds = test_gguf.FOUR_BITS[name]
    test_gguf.write_gguf(tmp_path / "tiny.gguf", tiny(base, **changes), kinds=kinds)
    files = hub.prepare_tiers(tmp_path / "tiny.gguf", tmp_path / "tiers", BF16, "q4", progress=False)
    config = SiriusConfig(**FIXED | {"draft_weights": "auto"})
    with in_order("forward"):
        engine = tiered(files, (0, 0), slots=files.intermediate // 2)
        all_there = Engine(moved(hub.load_model(tmp_path / "tiny.gguf", BF16, progress=False, weights="q4")[0]))
        assert decoded(engine, config, 6) == decoded(all_there, config, 6)


def test_drawn_texts_with_slots():
    config, settings = SiriusConfig(**OWN, accept="sample"), {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with in_order("reverse"):
        texts = [
            decoded(each, config, generator=torch.Generator().manual_seed(1), **settings)
            for each in (tiered(files_of(), (0, 0), slots=66), whole())
        ]
    assert texts[0] == texts[1]


def in_turn(engine):
    """Two texts by turns, of which each has a set of its own, that follows it."""
    texts = [engine.start(prompt(length), config=SETS["threshold"][0], max_new_tokens=5, **GREEDY) for length in (12, 31)]
    while not all(text.ended for text in texts):
        for text in texts:
            if not text.ended:
                text.step()
    return [text.tokens for text in texts]


def test_two_texts_in_turn_share_the_slots():
    with emulated(_simt):
        assert in_turn(tiered(files_of(), (0, 0), slots=66)) == in_turn(whole())


@pytest.mark.parametrize("mode", ["off", "period"])
def test_a_set_in_a_graph_comes_whatever_is_in_the_slots(monkeypatch, mode):
    """What is captured takes nothing for granted that it has not launched itself: whoever used the slots last."""
    monkeypatch.setenv("SIRIUS_GRAPHS", mode)
    call = Replay.__call__

    def after_others(replay):
        slots = engines[0].model.tiers.slots
        other = torch.randperm(131)[:66].sort().values.to(torch.int32).repeat(len(slots._row_of), 1)
        prepare(engines[0].model).launch("hold", **slots.fields(other.data_ptr(), 66, None))
        call(replay)

    with in_order("random"):
        engines = [tiered(files_of(), (0, 0), slots=66), whole()]
        expected = decoded(engines[1], SETS["threshold"][0], 5)
        monkeypatch.setattr(Replay, "__call__", after_others)
        assert decoded(engines[0], SETS["threshold"][0], 5) == expected


def test_the_set_comes_before_anything_is_copied_from_slots(monkeypatch):
    launch, ahead, calls = CudaModel.launch, DeviceTiers.ahead, []

    def noted(model, name, **fields):
        calls.append(name)
        launch(model, name, **fields)

    monkeypatch.setattr(CudaModel, "launch", noted)
    monkeypatch.setattr(DeviceTiers, "ahead", lambda tiers: calls.append("ahead") or ahead(tiers))
    with in_order("forward"):
        decoded(tiered(files_of(), (0, 0), slots=66), SETS["threshold"][0], 5)
    assert calls.count("ahead") > 1
    assert all(calls[at - 1] == "hold" for at, name in enumerate(calls) if name == "ahead")


def slots_of(intermediate, resident, slots, bundles):
    """Of images whose bundles say which they are."""
    layers = [[StreamedImage(intermediate * size, resident, slots * size - resident)] for size in bundles]
    stream, contents = WeightStream(DEVICE, layers, 2), []
    for layer, size in enumerate(bundles):
        content = torch.randint(0, 256, (intermediate, size), dtype=torch.uint8)
        stream.image(layer, 0)[:resident] = content.flatten()[:resident]
        stream.host(layer, 0)[:] = content.flatten()[resident:]
        contents.append(content)
    return Slots(DEVICE, stream, [images[0] for images in layers], bundles, slots, intermediate), contents


SLOTS = [(40, 0, 9, (64, 192)), (200, PAGE, 110, (64, 192)), (2300, 0, 1500, (64,))]


@pytest.mark.parametrize("case", SLOTS, ids=str)
def test_sets_come_into_slots(order, case):
    """Any set after any other: its rows hold its neurons' bytes, those that were there already stay where they are, and the first
    ones are there for good."""
    intermediate, resident, rows, bundles = case
    slots, contents = slots_of(*case)
    weights, generator = torch.rand(len(bundles), intermediate), torch.Generator().manual_seed(1)
    firsts = [-(-resident // size) for size in bundles]
    neurons = torch.empty(len(bundles), 0, dtype=torch.int32)
    for kept in (rows - 1, rows - 1, 5, rows, rows, 1):
        sets = []
        for first, old in zip(firsts, neurons.tolist()):
            others = (first + torch.randperm(intermediate - first, generator=generator)).tolist()
            some = dict.fromkeys([*range(first), *(each for each in old[::2] if each >= first), *others])
            sets.append(sorted(list(some)[:kept]))
        neurons, held = torch.tensor(sets, dtype=torch.int32), slots._row_of.clone()
        backends.call(dispatch.cuda_functions(DEVICE), "hold", **slots.fields(neurons.data_ptr(), kept, weights))
        listed = slots.listed_rows.flatten()[: neurons.numel()].view_as(neurons).long()
        for layer, (content, own, at) in enumerate(zip(contents, neurons.long(), listed)):
            assert len(at.unique()) == kept and torch.equal(slots._row_of[layer, own].long(), at)
            assert torch.equal(slots.row_weights[layer, at], weights[layer, own])
            had = held[layer, own].long()
            assert torch.equal(at[had >= 0], had[had >= 0]) and slots._count[layer] == (had < 0).sum()
            found = (slots._row_of[layer] >= 0).nonzero().flatten()
            assert torch.equal(slots.bundles(layer)[slots._row_of[layer, found].long()], content[found])
            assert found[: firsts[layer]].tolist() == list(range(firsts[layer]))


def streamed_beside(slots, contents, right):
    """Whether all of each layer came while sets changed. right: each set is asked for before the first layers are."""
    stream, intermediate, same = slots._stream, len(contents[0]), True
    for seed in range(20):
        neurons = torch.randperm(intermediate, generator=torch.Generator().manual_seed(seed))[:9].sort().values
        neurons = neurons.to(torch.int32).repeat(len(contents), 1)
        _simt.set_held(True)
        if not right:
            stream.ahead()
        backends.call(_simt, "hold", **slots.fields(neurons.data_ptr(), 9, None))
        for layer in range(len(contents)):
            stream.need(layer)
            stream.done(layer)
        _simt.set_held(False)
        images = [stream.image(layer, 0).view_as(content) for layer, content in enumerate(contents)]
        same = same and all(torch.equal(image, content) for image, content in zip(images, contents))
    return same


def test_what_streams_from_slots_is_what_is_in_them():
    """A layer that is copied while a set changes would be that of neither."""
    case = 40, 0, 9, (64, 192)
    with in_order("random"):
        assert streamed_beside(*slots_of(*case), right=True)
        assert not streamed_beside(*slots_of(*case), right=False)


HOLDS = {
    "a neuron that has left is still found": ("        if (neuron_of[row] >= 0) row_of[neuron_of[row]] = -1;\n", ""),
    "a slot is taken whose neuron is listed": (
        "    if (const int row = row_of[neurons[i]]; row >= 0) listed[row] = 1;\n",
        "    ;\n",
    ),
    "slots are looked for before it is known which are listed": (
        "listed[row] = 1;\n  __syncthreads();\n",
        "listed[row] = 1;\n",
    ),
    "slots are given away before they are found": (
        "  __syncthreads();  // all have read the counts, and what the bodies wrote is there\n",
        "",
    ),
    "the copy begins before it is known of what": (
        "  wait_for_kernel_before();\n  const int layer = int(blockIdx.y), count = p.count[layer];\n",
        "  const int layer = int(blockIdx.y), count = p.count[layer];\n  wait_for_kernel_before();\n",
    ),
}


@pytest.mark.parametrize("name", HOLDS)
def test_an_order_that_is_missing_in_hold_is_found(name):
    mutation = Mutation("hold.cu", *HOLDS[name], "hold.cu")
    assert test_simt.fails(mutation.build(), functools.partial(test_sets_come_into_slots, None, SLOTS[1]))


# ------------------------------------------------------------------------------------------------------ periods and graphs


def test_copies_run_beside_the_drafts(order, monkeypatch):
    """All of a period is in the streams before any of it runs, as in a graph: the first layers arrive while S drafts."""
    launch, pending = PeriodGraph._launch, []

    def at_once(graph):
        _simt.set_held(True)
        try:
            launch(graph)
            pending.append(_simt.waits_elsewhere())
        finally:
            _simt.set_held(False)

    engine, config = tiered(files_of(dtype=BF16), (0, 0), copy=True), SiriusConfig(**FIXED)
    apart = decoded(engine, config)
    monkeypatch.setattr(PeriodGraph, "_launch", at_once)
    assert decoded(tiered(files_of(dtype=BF16), (0, 0), copy=True), config) == apart
    assert pending and all(pending)


@pytest.mark.parametrize("width", [1, 3])
def test_drafts_that_stop_early(order, monkeypatch, width):
    """The first layers are on their way when the host asks whether S drafts on."""
    costs = Costs(0.1, ((4, 1.0), (16, 1.05)))
    monkeypatch.setattr(sequence, "costs_of", lambda *_: costs)
    config = SiriusConfig(**FIXED | {"period": "auto"}, tree_width=width)
    assert decoded(tiered(files_of(dtype=BF16), (0, 0), copy=True), config) == decoded(whole(dtype=BF16), config)


@pytest.mark.parametrize("mode", ["off", "step", "period"])
def test_what_is_captured_begins_and_ends_with_its_copies(monkeypatch, mode):
    """A graph must not wait for what was launched before its capture, and all that it launches on another stream must have
    joined: of passes and periods, of few rows and of many. It neither waits nor keeps memory."""
    faults, bodies = [], []

    def looked_at(replay):
        before = [tensor.clone() for tensor in replay._state]
        replay._body()  # as before a capture: what is made once is there then
        for tensor, value in zip(replay._state, before):
            tensor.copy_(value)
        assert not _simt.waits_elsewhere()
        with CaptureLint() as lint:
            replay._body()
        assert not _simt.waits_elsewhere(), "copies that nothing in the graph waits for"
        faults.extend(lint.faults)
        bodies.append(replay._what)

    monkeypatch.setattr(Replay, "__call__", looked_at)
    monkeypatch.setenv("SIRIUS_GRAPHS", mode)
    with in_order("reverse"):  # what nothing waits for does not run
        engine = tiered(files_of(dtype=BF16), (0, 0), copy=True)
        for values in ({"period": 3}, {"period": 7, "tree_width": 3}):
            decoded(engine, SiriusConfig(**FIXED | values), 4)
    assert bodies and not faults


# ------------------------------------------------------------------------------------------------------------- the stream

LAYERS = 5


def small_stream(buffers=2):
    """Of images of three pages, of which the first one stays; filled."""
    images = [[StreamedImage(3 * PAGE - 64, PAGE)]] * LAYERS
    stream = WeightStream(DEVICE, images, buffers)
    for layer in range(LAYERS):
        stream.image(layer, 0)[:PAGE] = 10 + layer
        stream.host(layer, 0)[:] = 20 + layer
    return stream


def test_every_layer_is_there_when_it_is_needed(order):
    for buffers in (1, 2, 3, 7):
        stream = small_stream(buffers)
        for _ in range(2):
            for layer in range(LAYERS):
                stream.need(layer)
                image = stream.image(layer, 0)
                assert len(image) == 3 * PAGE - 64
                assert (image[:PAGE] == 10 + layer).all() and (image[PAGE:] == 20 + layer).all()
                stream.done(layer)


def test_a_pass_that_goes_no_further_leaves_nothing_on_its_way():
    with in_order("reverse"):
        stream = small_stream()
        stream.need(0)
        stream.done(0)
        assert _simt.waits_elsewhere()
        stream.end()
        assert not _simt.waits_elsewhere()
        assert (stream.image(2, 0)[PAGE:] == 22).all()
        stream.end()  # there is none
        for layer in range(LAYERS):
            stream.need(layer)
            assert (stream.image(layer, 0)[PAGE:] == 20 + layer).all()
            stream.done(layer)


def test_the_stream_refuses():
    with emulated(_simt):
        stream = small_stream()
        with pytest.raises(RuntimeError, match="expected layer 0, got 2"):
            stream.ahead()
            stream.need(2)
        with pytest.raises(ValueError, match="expected resident bytes in multiples of 4096, got 64"):
            WeightStream(DEVICE, [[StreamedImage(PAGE, 64)]], 2)
        with pytest.raises(MemoryError, match="out of the device's memory"):
            WeightStream(DEVICE, [[StreamedImage(1 << 40, 1 << 39)]], 2)


def queued_passes(engine):
    """Two of one model, one behind the other before anything runs, so that the second one's first copies meet the first one's
    last layers."""
    model, found = prepare(engine.model), []
    asked = Pass.chain(torch.arange(3, 7, dtype=torch.int32), 20, keep_z=True)
    caches = [model.new_cache() for _ in range(2)]
    for cache in caches:
        model.reserve(cache, 128, 4)
        drive(model, cache, read(cache, prompt(20)[0]))
    nodes = [cache.staged(asked) for cache in caches]
    backends._simt.set_held(True)
    for cache, own in zip(caches, nodes):
        model.run(cache, own, cache.take(None), cache.argmax[:4], keep_z=True)
    backends._simt.set_held(False)
    for cache in caches:
        found += [cache.logits[:4], cache.z(4)]
    return found


def two_passes():
    same_bits(queued_passes(tiered(files_of(), (0, 0))), queued_passes(whole()))


WAITS = {
    "a layer is read before it has arrived": "  s.buffer(layer).arrived.precede(static_cast<cudaStream_t>(stream));\n",
    "a layer is overwritten while it is read": "    s.buffer(layer).free.precede(s.copies.handle);\n",
    "a pass begins to copy while the one before it reads": "  s.begun.precede(s.copies.handle);\n",
}


@functools.cache
def fails_with_all_waits():
    return test_simt.fails(None, two_passes)


def two_passes_of_all():
    same_bits(queued_passes(tiered(files_of(), (0, 0), copy=True, streams_rest=True)), queued_passes(whole()))


ALL_STREAMS = {
    "attention is read before it has arrived": (
        "      if (pass_.all_streams) arrived(layer);\n      attention_block(layer);\n",
        "      attention_block(layer);\n      if (pass_.all_streams) arrived(layer);\n",
    ),
    "the head is read before it has arrived": ("      if (m_.head_rows) arrived(layer);\n", ""),
}


@pytest.mark.parametrize("name", ALL_STREAMS)
def test_a_pass_that_does_not_wait_for_all_is_found(name):
    assert not test_simt.fails(None, two_passes_of_all)
    assert test_simt.fails(Mutation("decode_step.cpp", *ALL_STREAMS[name], "decode_step.cpp").build(), two_passes_of_all)


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_that_is_missing_is_found(name):
    mutation = Mutation("weight_stream.cu", WAITS[name], "", "weight_stream.cu")
    assert not fails_with_all_waits()
    assert test_simt.fails(mutation.build(), two_passes)


# -------------------------------------------------------------------------------------------------------------- the plan


def sizes_of(files, grain):
    with emulated(_simt):
        sizes = DeviceSizes(files, 1000, DEVICE)
    sizes.grain = grain
    return sizes


@pytest.mark.parametrize("grain", [4096, 1 << 14])
@pytest.mark.parametrize("draft", [Draft(), Draft(copy=True), Draft(neurons=9)], ids=str)
@pytest.mark.parametrize("weights", ["plain", "q8", "q4"])
def test_plans_hold_what_fits(weights, draft, grain):
    grain = grain // 4 if weights == "q4" else grain  # images are that much smaller
    sizes = sizes_of(files_of(weights=weights, dtype=BF16), grain)
    rows = sizes.rows
    most = device_plan(sizes, 1 << 40, [draft], DEVICE)
    assert most.streamed == 0 and most.resident[0] == rows and most.slots == 0
    try:
        device_plan(sizes, 1, [draft], DEVICE)
    except ValueError as error:
        least = float(str(error).partition("at least ")[2].partition(" GB")[0])
    assert 0 < least < 1
    streamed = []
    for memory in (*range(int(most.used * 0.95), most.used, 1999), most.used):
        try:
            found = device_plan(sizes, memory, [draft], DEVICE)
        except ValueError:
            assert not streamed, "less room was enough"
            continue
        assert found.used <= memory
        assert found.slots >= min(draft.neurons, rows - found.resident[0])
        for layer in sizes.files.layers:
            for number, image in enumerate(sizes.images(layer, found.resident, found.slots)):
                assert image.resident == image.nbytes or image.resident % grain == 0
                if found.slots and number == 0:
                    assert image.resident + image.slots == (found.resident[0] + found.slots) * layer.images[0].bundle
        streamed.append(found.streamed)
    assert streamed == sorted(streamed, reverse=True) and streamed[-1] == 0
    assert len(set(streamed)) > 1, "there were no plans in between"


def test_no_longer_pass_is_planned_for_than_the_largest_tree():
    with emulated(_simt):
        sizes = DeviceSizes(files_of(), 1000, DEVICE, row=1000)
    assert sizes.passes(256) - sizes.passes(255) == 1000 and sizes.passes(505) == sizes.passes(256)


def test_what_a_verification_leaves_has_room_where_it_is(monkeypatch):
    """On the device if all of the model is, else in the host's memory."""
    files, model = files_of(dtype=BF16), tiny("llama3", BF16)
    z = len(files.layers) * files.intermediate * 2
    with emulated(_simt):
        sizes = DeviceSizes(files, 1000, DEVICE, row_bytes(model))
        stays, streams = (sizes.passes(256, way) - sizes.passes(255, way) for way in (False, True))
        assert (stays, streams) == (4 * model.config.vocab_size + z, 4 * model.config.vocab_size)
        draft = Draft(rows=20)
        most = device_plan(sizes, 1 << 40, [draft], DEVICE).used
        found = device_plan(sizes, most - 1, [draft], DEVICE)
        host = found.streamed + files.embedding_bytes + 20 * z
        monkeypatch.setattr(device_tiers, "free_memory", lambda: host)
        assert device_plan(sizes, most - 1, [draft], DEVICE) == found
        monkeypatch.setattr(device_tiers, "free_memory", lambda: host - 1)
        with pytest.raises(ValueError, match="must be in host memory"):
            device_plan(sizes, most - 1, [draft], DEVICE)
        for resident, elsewhere in (((0, 0), True), ((70, 0), True), ((1 << 30, 0), False)):
            assert is_left_in_host(prepare(tiered(files, resident).model).weights) == elsewhere


def test_memory_that_does_not_suffice_is_refused(monkeypatch):
    sizes = sizes_of(files_of(), 4096)
    with pytest.raises(ValueError, match="^memory: expected at least 0.0.* GB for this model and these settings"):
        device_plan(sizes, 1, [Draft(neurons=60)], DEVICE)
    monkeypatch.setattr(device_tiers, "free_memory", lambda: 1)
    used = device_plan(sizes, 1 << 40, [Draft()], DEVICE).used
    with pytest.raises(ValueError, match="^memory: .*, mostly of weights, .* must be in host memory that is pinned"):
        device_plan(sizes, used - 1, [Draft()], DEVICE)


def test_a_sparse_model_that_was_not_planned_for_is_refused():
    with emulated(_simt):
        for form in (("llama3", torch.float32, "plain"), ("llama3", BF16, "q8")):
            engine = tiered(files_of(*form), (64, 0))
            config = SiriusConfig(**FIXED | {"draft_weights": "same" if form[2] == "plain" else "q4"})
            with pytest.raises(ValueError, match="^density: expected a sparse model of at most 0 of 131 .*, got one of 66"):
                decoded(engine, config)
        fsparse = SiriusConfig(**OWN, sparsity="fsparse")
        with pytest.raises(ValueError, match="^density: expected a sparse model of at most 66 of 131 .*, got one of 131"):
            decoded(tiered(files_of(), (0, 0), slots=66), fsparse)
        with pytest.raises(ValueError, match='^draft_weights: "q4" needs a copy in memory'):
            decoded(tiered(files_of(), (64, 0)), SiriusConfig(**FIXED))


def test_a_model_that_was_moved_away_from_its_tiers_is_refused(monkeypatch):
    with emulated(_simt):
        monkeypatch.setattr(DeviceTiers, "_bundles", lambda *_: torch.empty(131, 768, dtype=torch.uint8, device="meta"))
        with pytest.raises(ValueError, match="^model: its MLPs' weights are on meta, .* load it for cpu"):
            tiered(files_of(), (0, 0))


def test_engines_within_a_devices_memory(monkeypatch, tmp_path):
    """`from_pretrained(memory=)`, and without it a model that is larger than what is free."""
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    config, folder = SiriusConfig(**FIXED | {"draft_weights": "auto"}), str(source_of("llama3", BF16, "plain").folder)
    load = functools.partial(Engine.from_pretrained, folder, config, device="cpu", progress=False)
    with emulated(_simt):
        files = files_of(dtype=BF16)
        sizes = DeviceSizes(files, cache_bytes(tiny("llama3", BF16)), DEVICE, row_bytes(tiny("llama3", BF16)))
        memory = device_plan(sizes, 1 << 40, drafts_of(config, files), DEVICE).used - 2 * 4096
        # Whatever fits.
        monkeypatch.setattr(hub, "_looked_at", lambda found, weights, *_: (hub._readable(found, weights, False), None))
        engines = [load(memory=memory)]
        monkeypatch.setattr("sirius_ext.models.hub.free_on", lambda _: memory)
        engines.append(load())
        for engine in engines:
            tiers = prepare(engine.model).weights.tiers
            assert isinstance(tiers, DeviceTiers) and tiers.plan.streamed > 0 and tiers.plan.used <= memory
            assert decoded(engine, config) == decoded(whole(dtype=BF16), dataclasses.replace(config, draft_weights="q4"))
        with pytest.raises(ValueError, match="^memory: expected at least 0.0"):
            load(memory="1MB")
        config = SiriusConfig(**OWN | {"density": 0.1})
        with pytest.raises(TooLittle) as least:
            device_plan(sizes, 1, drafts_of(config, files), DEVICE)
        engine = Engine.from_pretrained(folder, config, device="cpu", progress=False, memory=least.value.least)
        plan = prepare(engine.model).weights.tiers.plan
        assert plan.slots == 13 and plan.streamed > 0
        assert decoded(engine, config, 5) == decoded(whole(dtype=BF16), config, 5)
        with pytest.raises(ValueError, match='^memory: with offload="never"'):
            Engine.from_pretrained(folder, dataclasses.replace(config, offload="never"), device="cpu", memory="1GB")


def test_info_says_what_a_device_would_hold(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    files, folder = files_of(dtype=BF16), str(files_of(dtype=BF16).folder)
    with emulated(_simt):
        sizes = DeviceSizes(files, cache_bytes(tiny("llama3", BF16)), DEVICE, row_bytes(tiny("llama3", BF16)))
        memory = device_plan(sizes, 1 << 40, [Draft(copy=True)], DEVICE).used - 2 * 4096
        assert cli(["info", "--model", folder, "--device", "cpu", "--memory", str(memory)]) == 0
    plan, out = device_plan(sizes, memory, [Draft(copy=True)], DEVICE), capsys.readouterr().out
    assert f"{plan.used / 1e9:.2f} would be used:" in out and "beside the sparse model's copy of all in four bits" in out
    assert f"a period moves    {plan.streamed / 1e9:.2f} GB of " in out and "from host memory" in out
    assert "predicted" not in out and "speed" not in out
