"""Logits that are NaN or infinite: the ops mark them, and whoever decodes or reads raises an error that says where they arose."""

import contextlib
import functools
import math
import re

import pytest
import torch
from backends import assert_same_bits, call, emulated, poisoned, walled
from tiny import own_bits, prompt, seeded, tiny

from sirius_ext import Engine, SiriusConfig, _simt, runtime
from sirius_ext.decoding import sequence
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.reading import ROWS, Reader
from sirius_ext.decoding.sequence import Request, start
from sirius_ext.decoding.sparsity import CSparse, FSparse, sparsity_of
from sirius_ext.engine import prepare
from sirius_ext.evaluation import batched
from sirius_ext.evaluation.batched import Batch
from sirius_ext.kernels import reference
from sirius_ext.runtime.cuda import CudaModel
from sirius_ext.runtime.graphs import Nodes
from sirius_ext.runtime.passes import Fault

FAULTS = [math.nan, -math.nan, math.inf, -math.inf]
VOCABS = [1, 2, 31, 64, 1134, 9001]


def places(vocab):
    """Where a fault may stand: the ends, the middle, and both sides of a block's and of a vector's end."""
    return sorted(
        {place for place in (0, vocab // 2, vocab // 32 * 32 - 1, 1023, 1024, vocab - 2, vocab - 1) if 0 <= place < vocab}
    )


# ------------------------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax(backend, vocab, fault):
    good = torch.randn(3, vocab)
    for place in places(vocab):
        logits = good.clone()
        logits[1, place] = fault
        out = poisoned(3, dtype=torch.int32)
        backend.argmax(walled(logits), out=out.tensor)
        first, last = good[[0, 2]].argmax(1).tolist()
        assert out.check().tolist() == [first, -1, last], place


def test_argmax_of_the_largest_numbers(backend):
    """They are numbers still."""
    largest = torch.finfo(torch.float32).max
    for vocab in (2, 40, 1134):
        logits = torch.full((2, vocab), -largest)
        logits[0, vocab - 1] = largest
        assert backend.argmax(logits).tolist() == [vocab - 1, 0]
        assert backend.accept(logits, torch.zeros(1, dtype=torch.int32), 0.1, 0.6)[1].tolist() == [vocab - 1, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "^logits: expected a tensor"),
        ({"logits": torch.zeros(3, 5).half()}, TypeError, "^logits: expected torch.float32"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "^logits: vocabulary"),
        ({"logits": torch.zeros(0, 5)}, ValueError, "^logits: rows"),
        ({"out": torch.zeros(2, dtype=torch.int32)}, ValueError, "^out: expected shape"),
    ],
)
def test_argmax_errors(cpu_kernels, change, error, message):
    with pytest.raises(error, match=message):
        cpu_kernels.argmax(**{"logits": torch.zeros(3, 5)} | change)


@pytest.mark.parametrize("fault", FAULTS[:3], ids=str)
@pytest.mark.parametrize("vocab", [2, 31, 1134, 9001])
@pytest.mark.parametrize("match", [False, True], ids=["threshold", "match"])
def test_accept(backend, vocab, fault, match):
    """Nothing is accepted after a row with a fault, at no threshold; the rows beside it keep their bits."""
    good = torch.randn(5, vocab)
    drafts = good[:-1].argmax(1).int()
    expected = backend.accept(good, drafts, 0.0, 0.6, match)
    assert expected[2].tolist() == [1, 2, 3, 4]
    for place in places(vocab):
        logits = good.clone()
        logits[2, place] = fault
        for draft in {int(drafts[2]), place, 0}:
            drafts_here = drafts.clone()
            drafts_here[2] = draft
            likelihoods, argmax, path = backend.accept(walled(logits), drafts_here, 0.0, 0.6, match)
            assert argmax.tolist() == [*expected[1][:2].tolist(), -1, *expected[1][3:].tolist()]
            assert path.tolist() == [1, 2]
            assert math.isnan(likelihoods[2])
            assert_same_bits(likelihoods[[0, 1, 3]], expected[0][[0, 1, 3]])


@pytest.mark.parametrize("vocab", [1, 31, 1134, 3000, 9001])
def test_minus_infinity_is_allowed_in_accept(backend, vocab):
    """Logits processors leave it; a row of nothing else is a fault."""
    for kept in places(vocab):
        logits = torch.full((3, vocab), -math.inf)
        logits[:2, kept] = 1.5
        likelihoods, argmax, path = backend.accept(walled(logits), torch.tensor([kept, kept], dtype=torch.int32), 0.5, 0.6)
        assert argmax.tolist() == [kept, kept, -1]
        assert likelihoods.tolist() == [1.0, 1.0] and path.tolist() == [1, 2]
        tokens, parents, scores = backend.tree_expand(walled(logits), torch.tensor([-1.0, -0.5, 0.0]), 4, 0.6)
        assert tokens.tolist() == [kept, kept] and parents.tolist() == [1, 0] and scores.tolist() == [-0.5, -1.0]


@pytest.mark.parametrize("begin", [0, 700, 1024, 2100])
def test_many_impossible_tokens(backend, begin):
    """The first ones, that no block of a row has anything to add up."""
    logits = torch.full((2, 3000), -math.inf)
    logits[:, begin : begin + 60] = torch.randn(2, 60)
    drafts = logits[:1].argmax(1).int()
    for out, expected in zip(backend.accept(logits, drafts, 0.01, 0.6), reference.accept(logits, drafts, 0.01, 0.6)):
        torch.testing.assert_close(out, expected)
    grown, expected = backend.tree_expand(logits, torch.zeros(2), 5, 0.6), reference.tree_expand(logits, torch.zeros(2), 5, 0.6)
    for out, wanted in zip(grown, expected):
        torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("fault", FAULTS[:3], ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 1134, 9001])
@pytest.mark.parametrize("width", [1, 16])
def test_tree_expand(backend, vocab, width, fault):
    """A leaf with a fault proposes nothing; what the others propose is as without it."""
    logits, scores = torch.randn(3, vocab), torch.tensor([-1.0, 2.0, -0.5])
    alone = backend.tree_expand(logits[[0, 2]], scores[[0, 2]], width, 0.6)
    for place in places(vocab):
        logits[1] = torch.randn(vocab)
        logits[1, place] = fault
        for prune in (1.0, 0.3) if place == 0 else (1.0,):
            expected = alone if prune == 1.0 else backend.tree_expand(logits[[0, 2]], scores[[0, 2]], width, 0.6, prune)
            tokens, parents, new_scores = backend.tree_expand(walled(logits), scores, width, 0.6, prune)
            assert_same_bits(tokens, expected[0])
            assert parents.tolist() == [2 * row for row in expected[1].tolist()]
            assert_same_bits(new_scores, expected[2])
    assert [len(out) for out in backend.tree_expand(logits[1:2], scores[1:2], width, 0.6)] == [0, 0, 0]


# ------------------------------------------------------------------------------------------ what a replayed period relies on


def judged(functions, logits, drafts, scores=None, parents=None, match=False):
    """The accepted run, and whether a fault was marked."""
    n, vocab = logits.shape
    argmax, path, accepted = (poisoned(size, dtype=torch.int32) for size in (n, n - 1, 1))
    likelihoods, fault = poisoned(n - 1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    call(
        functions,
        "accept",
        workspace=functions.accept_workspace(n, vocab),
        logits=walled(logits),
        drafts=walled(drafts),
        parents=parents,
        scores=scores,
        threshold=0.0,
        score_temperature=0.6,
        match=match,
        likelihoods=likelihoods.tensor,
        argmax=argmax.tensor,
        path=path.tensor,
        accepted=accepted.tensor,
        limit=torch.tensor([n], dtype=torch.int32),
        fault=fault,
        num_rows=n,
        vocab=vocab,
    )
    argmax.check()
    assert (likelihoods.check()[drafts < 0].nan_to_num(0.0) == 0).all()
    return path.check()[: int(accepted.check())].tolist(), bool(fault)


@pytest.mark.parametrize("vocab", [33, 9001])
@pytest.mark.parametrize("match", [False, True], ids=["threshold", "match"])
def test_marks_of_accept(cuda_functions, vocab, match):
    good = torch.randn(5, vocab)
    drafts = good[:-1].argmax(1).int()
    assert judged(cuda_functions, good, drafts, match=match) == ([1, 2, 3, 4], False)
    for row in range(5):
        for fault in FAULTS:  # nothing has processed these logits: minus infinity is one too
            logits = good.clone()
            logits[row, vocab - 1] = fault
            assert judged(cuda_functions, logits, drafts, match=match) == (list(range(1, row + 1)), True), (row, fault)
    # argmax has given -1 for S's logits after node 1, and F's are as bad
    logits, odd = good.clone(), drafts.clone()
    odd[1], logits[1, 0] = -1, math.nan
    assert judged(cuda_functions, logits, odd, match=match) == ([1], True)
    assert judged(cuda_functions, good, odd, match=match) == ([1], True)


def test_nodes_that_were_not_drafted_have_no_fault(cuda_functions):
    logits, parents = torch.randn(5, 33), torch.tensor([-1, 0, 0, 1, 1], dtype=torch.int32)
    scores = torch.tensor([0.0, -1.0, -math.inf, -2.0, -math.inf])
    drafts = logits[parents[1:].long()].argmax(1).int()
    logits[2], logits[4] = math.nan, -math.inf
    assert judged(cuda_functions, logits, drafts, scores, parents) == ([1, 3], False)
    logits[3, 0] = math.nan
    assert judged(cuda_functions, logits, drafts, scores, parents) == ([1, 3], True)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_marks_of_tree_expand(cuda_functions, fault):
    vocab, width = 151, 3
    logits, scores = torch.randn(3, vocab), torch.tensor([-1.0, -math.inf, -0.5])

    def marked():
        tokens, parents, new_scores = (poisoned(width, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32))
        count, mark = poisoned(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        call(
            cuda_functions,
            "tree_expand",
            workspace=cuda_functions.tree_expand_workspace(3, vocab, width),
            logits=walled(logits),
            scores=scores,
            score_temperature=0.6,
            prune=1.0,
            tokens=tokens.tensor,
            parents=parents.tensor,
            new_scores=new_scores.tensor,
            count=count.tensor,
            fault=mark,
            num_leaves=3,
            vocab=vocab,
            width=width,
        )
        new_scores.check()
        assert count.check().tolist() == [width] and (tokens.check() >= 0).all() and (tokens.check() < vocab).all()
        return bool(mark), set(parents.check().tolist())

    assert marked()[0] is False
    logits[1, 7] = fault  # after a leaf that is dead
    assert marked()[0] is False
    logits[2, vocab - 1] = fault
    assert marked() == (True, {0})


@contextlib.contextmanager
def at(place):
    with emulated(_simt) if place == "simt" else contextlib.nullcontext():
        yield torch.device("cuda" if place == "cuda" else "cpu")


CUDA_PLACES = ["simt", *(["cuda"] if torch.cuda.is_available() else [])]
PLACES = ["cpu", *CUDA_PLACES]


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_token_that_is_none_is_embedded_somehow(place, rows):
    """The next period is on its way when the host learns of the fault: it must read nothing that is not there."""
    with at(place) as where, torch.no_grad():
        transformer = tiny("mistral").to(where)
        model = prepare(transformer)
        assert isinstance(model, CudaModel)
        cache = model.new_cache()
        model.reserve(cache, 64, rows)
        drive(model, cache, read(cache, prompt(9)[0]))
        cache.base.fill_(9)
        integers = {"dtype": torch.int32, "device": where}
        mask = torch.tensor([[1 << row] for row in range(rows)], device=where)
        tokens = torch.full((rows,), -1, **integers)
        nodes = Nodes(tokens, torch.zeros(rows, **integers), mask, 0)
        best = torch.empty(rows, **integers)
        logits = model.run(cache, nodes, cache.take(None), argmax=best).clone()
        assert best.tolist() == reference.argmax(logits.cpu()).tolist()
        tokens.zero_()
        assert_same_bits(logits, model.run(cache, nodes, cache.take(None)))
        transformer.lm_head.weight[7] = math.nan
        model.run(cache, nodes, cache.take(None), argmax=best)
        assert best.tolist() == [-1] * rows


# ------------------------------------------------------------------------------------------------------------------ the loop

NAME, LAYERS = "mistral", 2  # whose LM head is not its embedding
IDS = prompt(7)[0]
COUNT = 14
CONFIGS = [
    {"mode": "full"},
    {"mode": "sparse"},
    {"mode": "sparse", "sparsity": "fsparse"},
    {"period": 4},
    {"period": 5, "accept": "match", "sparsity": "fsparse"},
    {"period": 4, "tree_width": 3, "accept": "match", "sparsity": "cascade"},
    {"period": 5, "tree_width": 3, "sparsity": "fsparse"},
    {"period": 9, "density": 0.9},
    {"period": "auto", "accept": "match"},
    {"period": 4, "accept": "sample"},
    {"period": 4, "tree_width": 2, "accept": "sample"},
]
every_config = pytest.mark.parametrize("values", CONFIGS, ids=lambda values: "-".join(map(str, values.values())))
every_place = pytest.mark.parametrize("place", PLACES)
pytestmark = pytest.mark.usefixtures("one_thread")
MESSAGE = re.compile(
    r"model: the logits for position (\d+) \((\d+) of the prompt and (\d+) new tokens before it\) are not finite "
    r"\(NaN or infinite\), in (.*); (?:the first values that are not come from (.*)|in which layer is not known)\. "
    r"Are there NaNs .* float16, "
)


class Tokens:
    """The tokens of a text with a limit, as they are committed: a streamer."""

    def __init__(self, limit):
        self.limit, self.tokens = limit, []

    def put(self, value):
        self.tokens += value.tolist()

    def end(self):
        assert len(self.tokens) == self.limit


class Changing(Tokens):
    """A text that changes the model once so many tokens are committed."""

    def __init__(self, limit, count=0, change=None):
        super().__init__(limit)
        self._count, self._change = count, change

    def put(self, value):
        super().put(value)
        if self._change is not None and len(self.tokens) >= self._count:
            self._change()
            self._change = None


@torch.no_grad()
def decode(transformer, values, text, process=None):
    """Fills the text; returns what the error says, if there is one: position, new tokens, pass, origin."""
    config, model = own_bits(**{"density": 0.4, "threshold": 0.05, **values}), prepare(transformer)
    sample = config.accept == "sample"
    generator = seeded(5) if sample else None
    request = Request(IDS, config, text.limit, process=process, sample=sample, generator=generator, streamer=text)
    try:
        start(model, request).run()
    except ValueError as error:
        assert not model.lock.locked()
        position, before, new, reader, origin = MESSAGE.match(str(error)).groups()
        assert int(before) == len(IDS) and int(position) == int(before) + int(new)
        return int(position), int(new), reader, origin
    return None


def periods_of(model):
    """The graphs of whole periods over its caches."""
    return [period for cache in model.caches for period in getattr(cache, "periods", {}).values()]


@functools.cache
def good_text(place, index):
    with at(place) as where:
        text = Tokens(COUNT)
        assert decode(tiny(NAME).to(where), CONFIGS[index], text) is None
        return text.tokens


def new_token(tokens, least):
    """The index of a token that occurs here first, after the first few."""
    return next(i for i in range(least, len(tokens)) if tokens[i] not in [*IDS.tolist(), *tokens[:i]])


@every_place
@every_config
def test_a_token_whose_embedding_is_nan(place, values):
    """It is met where the text, or a draft, comes to it. What was committed before is the text of the good model; nothing is
    that came from NaN; and the model decodes as before once it is repaired."""
    good = good_text(place, CONFIGS.index(values))
    index = new_token(good, 5)
    token = good[index]
    with at(place) as where, torch.no_grad():
        transformer = tiny(NAME).to(where)
        row = transformer.model.embed_tokens.weight[token]
        before = row.clone()
        row.fill_(math.nan)
        text = Tokens(COUNT)
        position, new, reader, origin = decode(transformer, values, text)
        assert text.tokens == good[: len(text.tokens)] and len(text.tokens) <= index + 1
        assert origin == f"the embedding of token {token}"
        if values.get("mode") in ("full", "sparse"):
            assert len(text.tokens) == index + 1 and position == len(IDS) + index + 1
            assert reader == f"a step of the {values['mode']} model"
        else:
            assert len(text.tokens) <= new <= len(text.tokens) + 17
            assert reader in ("a draft (sparse model)", "a verification (full model)")
        row.copy_(before)
        again = Tokens(COUNT)
        assert decode(transformer, values, again) is None and again.tokens == good
        # The mark in device memory is not that of the text before, which would leave all periods to the host.
        assert not any(period.record.fault for period in periods_of(prepare(transformer)))


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("graphs", ["period", "step", "off"])
@pytest.mark.parametrize("values", [*CONFIGS[:5:2], *CONFIGS[5:7]], ids=str)
def test_a_period_on_the_device_says_what_the_host_says(place, graphs, values, monkeypatch):
    good = good_text(place, CONFIGS.index(values))
    token = good[new_token(good, 5)]
    found = []
    for here, mode in ((place, graphs), ("cpu", "off")):
        monkeypatch.setenv("SIRIUS_GRAPHS", mode)
        with at(here) as where, torch.no_grad():
            transformer, text = tiny(NAME).to(where), Tokens(COUNT)
            transformer.model.embed_tokens.weight[token] = math.nan
            found.append((decode(transformer, values, text), text.tokens))
    assert found[0] == found[1]


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_a_period_ends_with_the_draft_that_has_a_fault(place, monkeypatch):
    """Whatever F says to it."""
    launch = CudaModel.launch

    def unmarked(self, name, *arguments, **named):
        launch(self, name, *(arguments if name != "accept_within" else [*arguments[:-1], 0]), **named)

    monkeypatch.setattr(CudaModel, "launch", unmarked)
    with at(place) as where:
        transformer = tiny(NAME).to(where)
        text = Changing(COUNT, 6, lambda: transformer.lm_head.weight.data[0].fill_(math.nan))
        found = decode(transformer, {"period": 4, "tree_width": 3}, text)
        assert found[2:] == ("a draft (sparse model)", "the LM head") and found[1] == len(text.tokens)


def projection(layer, part):
    return lambda transformer: transformer.model.layers[layer].get_submodule(part).weight


WEIGHTS = {
    **{f"self_attn.{name}_proj": 0 for name in "qkvo"},
    **{f"mlp.{name}_proj": 1 for name in ("gate", "up", "down")},
    "input_layernorm": 0,
    "post_attention_layernorm": 1,
}


@every_place
@pytest.mark.parametrize("fault", [math.nan, math.inf], ids=str)
def test_the_prefill_names_the_layer(place, fault):
    found = {part: projection(layer, part) for part, layer in WEIGHTS.items()}
    found |= {"the final norm": lambda each: each.model.norm.weight, "the LM head": lambda each: each.lm_head.weight}
    with at(place) as where, torch.no_grad():
        transformer = tiny(NAME).to(where)
        for part, weight_of in found.items():
            weight = weight_of(transformer)
            before = weight.clone()
            weight[5] = fault
            text = Tokens(COUNT)
            origin = f"layer {WEIGHTS[part]} of {LAYERS}" if part in WEIGHTS else part
            assert decode(transformer, {"period": 4}, text) == (len(IDS), 0, "the prefill (full model)", origin), part
            assert text.tokens == []
            weight.copy_(before)
        transformer.model.embed_tokens.weight[IDS[3]] = fault
        assert decode(transformer, {}, Tokens(COUNT))[3] == f"the embedding of token {int(IDS[3])}"


@every_place
@pytest.mark.parametrize(
    "values",
    [
        {"mode": "full"},
        {"mode": "sparse"},
        {"period": 4},
        {"period": 5, "tree_width": 3, "sparsity": "fsparse"},
        {"period": 4, "accept": "sample", "sparsity": "cascade"},
        {"period": "auto"},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.down_proj", "lm_head", "norm"])
@pytest.mark.parametrize("fault", [math.nan, -math.inf], ids=str)
def test_a_weight_that_breaks_on_the_way(place, values, part, fault):
    """Every pass notices, and the layer is found with the cache as it stands."""
    if part == "lm_head":
        weight_of, origin = (lambda transformer: transformer.lm_head.weight[:1]), "the LM head"
    elif part == "norm":
        weight_of, origin = (lambda transformer: transformer.model.norm.weight[:1]), "the final norm"
    else:
        weight_of, origin = projection(1, part), f"layer 1 of {LAYERS}"
    with at(place) as where:
        transformer = tiny(NAME).to(where)
        text = Changing(COUNT, 6, lambda: weight_of(transformer).data.fill_(fault))
        position, new, reader, found = decode(transformer, values, text)
        assert found == origin and position - new == len(IDS) and 6 <= len(text.tokens) <= new
        if "mode" in values:
            assert new == len(text.tokens) and reader == f"a step of the {values['mode']} model"
        else:
            # what the period is depends on the clock: it may be 1
            assert new == len(text.tokens) and (reader == "a draft (sparse model)" or values["period"] == "auto")


@every_place
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(("kept", "reader"), [(True, "a draft (sparse model)"), (False, "a verification (full model)")])
def test_which_model_met_it(place, width, kept, reader, monkeypatch):
    """A neuron that S keeps breaks its drafts; one that it leaves out is met by F."""
    made = []
    monkeypatch.setattr(sequence, "sparsity_of", lambda *arguments: made.append(sparsity_of(*arguments)) or made[-1])
    with at(place) as where:
        transformer = tiny(NAME).to(where)

        def change():
            neuron = int((made[-1].kept[1] == kept).nonzero()[0])
            transformer.model.layers[1].mlp.up_proj.weight.data[neuron] = math.nan

        text = Changing(COUNT, 4, change)
        _, new, found, origin = decode(transformer, {"period": 4, "tree_width": width}, text)
        assert found == reader and origin == f"layer 1 of {LAYERS}" and new == len(text.tokens)


@every_place
@pytest.mark.parametrize("values", CONFIGS[::3], ids=str)
def test_float16_overflows(place, values):
    """In float32 and bfloat16 the same values are numbers."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for count in (0, 6):
            with at(place) as where, torch.no_grad():
                transformer = tiny(NAME, dtype).to(where)

                def change(transformer=transformer):
                    for weight in projection(1, "mlp.up_proj"), projection(1, "mlp.down_proj"):
                        weight(transformer).data.mul_(1e3)

                if count == 0:
                    change()
                text = Changing(COUNT, count, change if count else None)
                error = decode(transformer, values, text)
                if dtype == torch.float16:
                    assert error[3] == f"layer 1 of {LAYERS}" and count <= len(text.tokens) <= error[1]
                else:
                    assert error is None and len(text.tokens) == COUNT


@every_place
@pytest.mark.parametrize(
    "values", [{"mode": "full"}, {"period": 4}, {"period": 4, "tree_width": 3}, {"period": 3, "accept": "sample"}]
)
def test_processors(place, values):
    """They may make tokens impossible, but what they do to the model's NaN does not matter: it is seen before."""
    allowed = torch.arange(0, 149, 7)

    def process(ids, logits):
        out = torch.full_like(logits, -math.inf)
        out[allowed] = logits[allowed].nan_to_num(3.0)
        return out

    with at(place) as where, torch.no_grad():
        transformer, text = tiny(NAME).to(where), Tokens(COUNT)
        assert decode(transformer, values, text, process) is None
        assert set(text.tokens) <= set(allowed.tolist()) and len(text.tokens) == COUNT
        token = text.tokens[new_token(text.tokens, 1)]
        transformer.model.embed_tokens.weight[token] = math.nan
        assert decode(transformer, values, Tokens(COUNT), process)[3] == f"the embedding of token {token}"


def test_what_is_read_again_as_the_sparse_model():
    model = prepare(tiny(NAME))
    cache = model.new_cache()
    model.reserve(cache, 20, 1)

    def fault(sparsity=None):
        return model.fault(cache, Fault(part, len(IDS), sparsity))

    with torch.no_grad():
        for sparsity in (CSparse(LAYERS, model.weights.intermediate, 0.3), FSparse(model.weights.intermediate, 0.3)):
            cache.rewind(0)
            drive(model, cache, read(cache, IDS, sparsity))
            part = torch.tensor([3, 4])
            kept = sparsity.neurons[1].tolist() if isinstance(sparsity, CSparse) else []
            neuron = next(i for i in range(model.weights.intermediate) if i not in kept)
            up = model.weights.layers[1].up.data
            before = up.clone()
            if kept:
                up[neuron] = math.nan
                assert fault(sparsity) is None
                up[kept[0]] = math.nan
            else:
                assert fault(sparsity) is None
                up.fill_(math.nan)
            assert fault(sparsity) == fault() == f"layer 1 of {LAYERS}"
            up.copy_(before)
        never = FSparse(model.weights.intermediate, 0.3, torch.full((LAYERS,), 1e9))
        assert fault(never) is None


def test_what_cannot_be_repeated():
    """Read again, all is well: the error says that it does not know."""
    with torch.no_grad():
        transformer = tiny(NAME)
        model = prepare(transformer)
        prefill = model.prefill
        model.prefill = lambda *arguments: torch.full_like(prefill(*arguments), math.nan)
        assert decode(transformer, {}, Tokens(3)) == (len(IDS), 0, "the prefill (full model)", None)


def test_long_prompts():
    """Longer than a pass of the prefill: the chunk with the fault is not the last one."""
    with torch.no_grad():
        transformer = tiny(NAME, max_position_embeddings=2048)
        model, ids = prepare(transformer), torch.cat((prompt(600)[0], IDS))
        ids[ids == 3] = 4
        ids[100] = 3
        cache = model.new_cache()
        model.reserve(cache, 700, 1)
        assert model.fault(cache, Fault(ids, 0)) is None
        transformer.model.embed_tokens.weight[3] = math.nan
        with pytest.raises(ValueError, match="the embedding of token 3"):
            drive(model, cache, read(cache, ids))
        assert model.fault(cache, Fault(ids, 0)) == "the embedding of token 3"


def test_what_nobody_reads(monkeypatch):
    """After the last layer only the last token goes on: what is not finite in the others does no harm."""
    model = prepare(tiny(NAME, max_position_embeddings=2048))
    compute, ids = runtime.model.decoder_layer, torch.cat((prompt(600)[0], IDS))

    def overflow(description, layer, x, *others):
        out = compute(description, layer, x, *others)
        if layer is model.weights.layers[-1] and len(x) > 1:
            out[-2] = math.inf
        return out

    monkeypatch.setattr(runtime.model, "decoder_layer", overflow)
    cache = model.new_cache()
    model.reserve(cache, 700, 1)
    with torch.no_grad():
        assert drive(model, cache, read(cache, ids)).isfinite().all() and model.fault(cache, Fault(ids, 0)) is None


# ------------------------------------------------------------------------------------------------------- reading, many texts


@every_place
@pytest.mark.parametrize("values", [None, {"sparsity": "csparse"}, {"sparsity": "fsparse"}], ids=["full", "csparse", "fsparse"])
def test_reader(place, values):
    with at(place) as where, torch.no_grad():
        transformer = tiny(NAME).to(where)
        weights = prepare(transformer).weights
        reader = Reader(prepare(transformer), 60)
        sparsity = None if values is None else sparsity_of(own_bits(**values), weights)
        text = torch.arange(30, 30 + 2 * ROWS, dtype=torch.int32)
        transformer.model.embed_tokens.weight[50] = math.nan
        reader.prefill(IDS, sparsity)
        model = "full" if values is None else "sparse"
        with pytest.raises(
            ValueError, match=f"position 28 .7 of the prompt and 21 new .* in reading .the {model} model.* token 50"
        ):
            reader.score(text)
        reader.back_to(len(IDS))
        assert reader.score(text[:20])[0].isfinite().all()
        with pytest.raises(
            ValueError, match="position 28 .28 of the prompt and 0 new .* in the prefill .* embedding of token 50"
        ):
            reader.prefill(torch.cat((IDS, text[:21].long())), sparsity)
        reader.prefill(IDS, sparsity)
        assert reader.score(text[:20])[0].isfinite().all()


@pytest.mark.parametrize("prefix", [0, 5])
def test_side_by_side(prefix):
    """The texts that meet the fault raise what they raise alone; the others go on."""
    with torch.no_grad():
        transformer = tiny(NAME)
    engine = Engine(transformer)
    prompts = [torch.cat((prompt(50)[:, :prefix], prompt(length)), 1) for length in (7, 12, 3, 21, 33, 9)]
    configs = [SiriusConfig(mode="full"), own_bits(period=4), own_bits(period=4, tree_width=3, sparsity="fsparse")]

    def request(ids, config):
        return engine.requests(ids, config=config, max_new_tokens=16)[0]

    def result(ids, config):
        try:
            return engine.generate(ids, config=config, max_new_tokens=16).sequences[0].tolist()
        except ValueError as error:
            return str(error)

    def together(asked, live):
        batch = Batch(prepare(transformer), prompts[0][0, :prefix])
        found = {}
        for key, text, error in batch.decode([(each, request(*each[1:])) for each in asked], live):
            found[key[0]] = str(error) if error else [*text.request.prompt.tolist(), *text.tokens]
        return found

    first = result(prompts[0], configs[0])[prompts[0].shape[1] :]
    token = next(token for token in first[3:] if all(token not in ids for ids in prompts))
    with torch.no_grad():
        transformer.model.embed_tokens.weight[token] = math.nan
    alone = [[result(ids, config) for config in configs] for ids in prompts]
    assert any(isinstance(each, str) for row in alone for each in row) and any(
        isinstance(each, list) for row in alone for each in row
    )
    asked = [((i, j), prompts[i], config) for i in range(len(prompts)) for j, config in enumerate(configs)]
    found = together(asked, 3)
    assert [[found[i, j] for j in range(len(configs))] for i in range(len(prompts))] == alone
    # a prompt's fault, also when its prefill is not done again
    bad = torch.cat((prompts[0], torch.tensor([[token, 1]])), 1)
    seen = together([(number, bad, configs[1]) for number in range(2)], 1)
    assert list(seen.values()) == [result(bad, configs[1])] * 2 and "the prefill" in seen[0]


@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_side_by_side_nothing_is_hidden(dtype, part, layer, monkeypatch):
    """Torch's attention may make numbers of scores that are none, depending on their signs and places; here it always does.
    Neither in a prefix nor in a text does it matter."""
    attend = batched._attention
    monkeypatch.setattr(batched, "_attention", lambda *arguments: tuple(each.nan_to_num(0.0) for each in attend(*arguments)))
    with torch.no_grad():
        transformer = tiny(NAME, dtype)
        getattr(transformer.model.layers[layer].self_attn, f"{part}_proj").weight[5] = math.inf
    engine, ids = Engine(transformer), IDS[None]
    message = f"in the prefill .full model.; .* come from layer {layer} of {LAYERS}"
    with pytest.raises(ValueError, match=f"^model: .* position 4 .4 of the prompt .* {message}"):
        Batch(prepare(transformer), IDS[:4])
    ((_, _, error),) = Batch(prepare(transformer), IDS[:0]).decode([(0, engine.requests(ids, max_new_tokens=3)[0])], 1)
    with pytest.raises(ValueError, match=f"^model: .* position 7 .7 of the prompt .* {message}"):
        raise error
