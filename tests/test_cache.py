"""Caches outlive their prompts: what a new one has in common with a kept one is not read again, bit for bit as if it were."""

import contextlib
import copy
import pickle

import pytest
import torch
from backends import assert_same_bits, emulated
from tiny import every_way, own_bits, prompt, tiny
from transformers import DynamicCache

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.decoding.prefill import drive, read
from sirius_ext.decoding.reading import Reader
from sirius_ext.decoding.sparsity import sparsity_of
from sirius_ext.engine import prepare, release
from sirius_ext.runtime import cache as caches
from sirius_ext.runtime.cache import Cache, KeptCaches, chunks

CHUNK, COUNT = 8, 8
CONFIGS = [
    SiriusConfig(mode="full"),
    own_bits(mode="sparse", density=0.4),
    own_bits(mode="sparse", sparsity="fsparse", density=0.4),
    own_bits(period=4, density=0.4, threshold=0.05),
    SiriusConfig(period=4, density=0.4, threshold=0.05, follow=False),  # by a copy in four bits
    own_bits(period=4, density=0.4, sparsity="fsparse", accept="match"),
    own_bits(period=4, density=0.4, tree_width=3, sparsity="cascade"),
]
CSPARSE = CONFIGS[3]

pytestmark = pytest.mark.usefixtures("one_thread", "short_chunks")
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mode}-{c.sparsity}-{c.follow}-{c.tree_width}")


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(caches, "PREFILL_CHUNK", CHUNK)


@pytest.fixture(params=["cpu", "simt"])
def place(request):
    with emulated(_simt) if request.param == "simt" else contextlib.nullcontext():
        yield


def fresh(dtype=torch.float32, **config):
    return Engine(tiny("mistral", dtype, **config))


def decode(engine, ids, config, count=COUNT, **settings):
    return engine.generate(ids, config=config, max_new_tokens=count, **settings)


def likelihoods(out):
    return [period.likelihoods for period in out.stats.periods]


def assert_the_same(out, expected, length):
    """Texts, what F thought of the drafts, and the cache of the prompt: bit for bit."""
    assert torch.equal(out.sequences, expected.sequences)
    assert likelihoods(out) == likelihoods(expected)
    for one, other in ((out.cache.k, expected.cache.k), (out.cache.v, expected.cache.v)):
        assert_same_bits(one[:, :, :length].contiguous(), other[:, :, :length].contiguous())
    assert out.cache.tokens == expected.cache.tokens == out.sequences[0, :-1].tolist()


def beginning_as(ids, common, length):
    """Another prompt, int64 [1, length], that begins with so many of its tokens and not with more."""
    other = torch.cat((ids[:, :common], prompt(length)[:, common:]), 1)
    if common < min(ids.shape[1], length):
        other[0, common] = (ids[0, common] + 1) % 149
    return other


# ----------------------------------------------------------------------------------------------------------- by themselves


def test_chunks():
    assert list(chunks(0, 20)) == [(0, 8), (8, 16), (16, 20)]
    assert list(chunks(5, 16)) == [(5, 8), (8, 16)] and list(chunks(16, 17)) == [(16, 17)] and list(chunks(3, 3)) == []


@every_config
@pytest.mark.parametrize(
    ("common", "length", "reused"), [(0, 20, 0), (7, 20, 0), (8, 20, 8), (20, 33, 16), (25, 25, 24), (24, 24, 16), (3, 3, 0)]
)
def test_what_prompts_have_in_common_is_read_once(place, config, common, length, reused):
    ids = prompt(25)
    new = beginning_as(ids, common, length)
    engine = fresh(torch.bfloat16)
    assert decode(engine, ids, config).stats.prompts[0].reused_tokens == 0
    out = decode(engine, new, config)
    assert out.stats.prompts[0].reused_tokens == reused
    assert_the_same(out, decode(fresh(torch.bfloat16), new, config), length)


@every_config
def test_a_conversation(place, config):
    """Every prompt is the text so far and something new: what was prefilled is not read again, what was decoded is."""
    engine, ids, before = fresh(max_position_embeddings=512), prompt(19), 0
    for turn in range(3):
        out = decode(engine, ids, config)
        stats = out.stats.prompts[0]
        assert stats.reused_tokens == before and stats.prompt_tokens == ids.shape[1]
        assert_the_same(out, decode(fresh(max_position_embeddings=512), ids, config), ids.shape[1])
        before = ids.shape[1] // CHUNK * CHUNK
        ids = torch.cat((out.sequences, prompt(5 + turn)), 1)
    assert len(prepare(engine.model).caches) == 1


def test_the_logits_after_a_prompt(place):
    """And CSparse's statistic, bit for bit."""
    model = prepare(tiny("mistral", torch.bfloat16))
    found = []
    for before in (None, prompt(30)[0, :21], prompt(30)[0]):
        cache = model.new_cache()
        model.reserve(cache, 40, 1)
        if before is not None:
            drive(model, cache, read(cache, before, sparsity_of(CSPARSE, model.weights)))
            cache.rewind(cache.reusable(prompt(30)[0].tolist(), observed=True))
        assert len(cache.tokens) == (0 if before is None else (len(before) - 1) // CHUNK * CHUNK)
        sparsity = sparsity_of(CSPARSE, model.weights)
        logits = drive(model, cache, read(cache, prompt(30)[0], sparsity))
        found.append((logits, sparsity.statistic, sparsity.neurons))
    for other in found[1:]:
        for one, same in zip(found[0], other):
            assert_same_bits(one, same)


def test_who_did_not_observe_does_not_serve_who_must():
    engine, ids = fresh(), prompt(25)
    decode(engine, ids, CONFIGS[0])
    out = decode(engine, ids, CSPARSE)
    assert out.stats.prompts[0].reused_tokens == 0
    assert_the_same(out, decode(fresh(), ids, CSPARSE), 25)
    for config in (CONFIGS[0], CSPARSE, CONFIGS[2]):
        assert decode(engine, ids, config).stats.prompts[0].reused_tokens == 24


def test_a_cache_that_must_grow(place):
    """What is reused moves along."""
    engine, ids = fresh(max_position_embeddings=2048), prompt(25)
    decode(engine, ids, CSPARSE)
    (cache,) = prepare(engine.model).caches
    assert cache.capacity == 256
    early = {"stopping_criteria": [lambda ids, scores: torch.tensor([ids.shape[1] > 30])]}
    out = decode(engine, ids, CSPARSE, 300, **early)
    assert out.cache is cache and cache.capacity > 256 and out.stats.prompts[0].reused_tokens == 24
    assert_the_same(out, decode(fresh(max_position_embeddings=2048), ids, CSPARSE, 300, **early), 25)


def change(engine, name="up_proj"):
    """Some neurons' weights become other ones, in place."""
    with torch.no_grad():
        weight = engine.model.model.layers[0].mlp.get_submodule(name).weight
        (weight.t() if name == "down_proj" else weight)[::3].mul_(5)


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_weights_that_change(name):
    """Nothing that was computed before is reused, nor what was known of the weights."""
    engine, ids = fresh(), prompt(25)
    decode(engine, ids, CSPARSE)
    change(engine, name)
    out = decode(engine, ids, CSPARSE)
    assert out.stats.prompts[0].reused_tokens == 0
    other = fresh()
    change(other, name)
    assert_the_same(out, decode(other, ids, CSPARSE), 25)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_weights_that_are_trained(how):
    """By an optimizer. A fused one does not say so in the weights' versions."""
    engine, other, ids = fresh(), fresh(), prompt(25)
    decode(engine, ids, CSPARSE)
    for model in (engine.model, other.model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **how)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    out = decode(engine, ids, CSPARSE)
    assert out.stats.prompts[0].reused_tokens == 0
    assert_the_same(out, decode(other, ids, CSPARSE), 25)
    assert decode(engine, ids, CSPARSE).stats.prompts[0].reused_tokens == 24
    optimizer.step()  # the other model's
    assert decode(engine, ids, CSPARSE).stats.prompts[0].reused_tokens == 24


def test_weights_that_change_while_a_text_is_decoded():
    """Its cache, which comes back later than the change is noticed, is not reused either."""
    engine, ids = fresh(), prompt(25)
    text = engine.start(ids, config=CSPARSE, max_new_tokens=COUNT)
    text.step()
    change(engine)
    decode(engine, prompt(9), CSPARSE)
    text.run()
    out = decode(engine, ids, CSPARSE)
    assert out.stats.prompts[0].reused_tokens == 0
    other = fresh()
    change(other)
    assert_the_same(out, decode(other, ids, CSPARSE), 25)


def test_a_prompt_that_fails():
    """Nothing of it is reused."""
    engine, ids = fresh(), prompt(25)
    weight = engine.model.model.embed_tokens.weight
    decode(engine, ids[:, :20], CSPARSE)
    row = weight.data[int(ids[0, 24])]
    good = row.clone()
    row.fill_(torch.nan)  # by way of .data: nobody can know
    with pytest.raises(ValueError, match="not finite"):
        decode(engine, ids, CSPARSE)
    row.copy_(good)
    out = decode(engine, ids, CSPARSE)
    assert_the_same(out, decode(fresh(), ids, CSPARSE), 25)


def test_a_reader():
    model, text = prepare(tiny("mistral")), prompt(40)[0]
    reader = Reader(model, 60)
    for length in (30, 33, 20, 40):
        reader.prefill(text[:length], sparsity_of(CSPARSE, model.weights))
        other = Reader(model, 60)
        other.prefill(text[:length], sparsity_of(CSPARSE, model.weights))
        assert_same_bits(reader.next, other.next)
        assert torch.equal(reader.score(text[:9].int())[0], other.score(text[:9].int())[0])


# ------------------------------------------------------------------------------------------------------- how many are kept


def test_the_last_few_are_kept(monkeypatch):
    engine = fresh()
    kept = prepare(engine.model).caches
    texts = [prompt(length) for length in range(20, 28)]
    for count, ids in enumerate(texts, 1):
        decode(engine, ids, CSPARSE)
        assert len(kept) == min(count, caches.KEPT_CACHES)
    for ids in texts[-caches.KEPT_CACHES :]:
        assert decode(engine, ids, CSPARSE).stats.prompts[0].reused_tokens == (ids.shape[1] - 1) // CHUNK * CHUNK
    assert decode(engine, texts[0], CSPARSE).stats.prompts[0].reused_tokens == 0
    assert len(kept) == caches.KEPT_CACHES


def test_no_more_bytes_than_allowed():
    engine = fresh()
    kept = prepare(engine.model).caches
    first = decode(engine, prompt(20), CSPARSE).cache
    kept.most_bytes = 2 * kept.nbytes
    second = decode(engine, prompt(21), CSPARSE).cache
    assert list(kept) == [first, second]
    third = decode(engine, prompt(22), CSPARSE).cache
    assert list(kept) == [second, third] and first.tokens == [] and first.nbytes == 0
    kept.most_bytes = 1
    last = decode(engine, prompt(23), CSPARSE).cache
    assert list(kept) == [last] and last.nbytes > 1, "the newest stays, as large as it may be"


def test_prompts_of_less_than_a_chunk_share_a_cache():
    """There is nothing to be reused of them."""
    engine = fresh()
    found = {id(decode(engine, prompt(length), CSPARSE).cache) for length in (3, 7, 5, 1)}
    assert len(found) == 1


def test_release():
    engine = fresh()
    cache = decode(engine, prompt(20), CSPARSE).cache
    release(engine.model)
    assert cache.tokens == [] and cache.nbytes == 0


# --------------------------------------------------------------------------------------------------------------- passed on


@every_config
def test_going_on_from_all_tokens(place, config):
    """In float32 the text is that of a fresh prefill, too."""
    engine = fresh()
    out = decode(engine, prompt(19), config)
    ids = torch.cat((out.sequences, prompt(5)), 1)
    held = len(out.cache.tokens)
    assert held == 19 + COUNT - 1
    entries = out.cache.k[:, :, :held].clone()
    more = decode(engine, ids, config, past_key_values=out.past_key_values)
    assert more.stats.prompts[0].reused_tokens == held and more.cache is out.cache
    assert torch.equal(more.cache.k[:, :, :held], entries)
    if config.mode != "sparse" and (config.accept == "match" or config.mode == "full"):
        assert torch.equal(more.sequences, decode(fresh(), ids, config).sequences)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5]], ids=["full", "match"])
def test_what_the_sparse_model_decoded_is_its_own(place, config):
    """Over its entries the full model would say something else than its own text."""
    engine = fresh()
    for again in (True, False):
        out = decode(engine, prompt(19), CONFIGS[2])
        ids = torch.cat((out.sequences, prompt(5)), 1)
        if again:
            assert decode(engine, ids, CONFIGS[2], cache=out.cache).stats.prompts[0].reused_tokens == 19 + COUNT - 1
    with pytest.raises(ValueError, match="^past_key_values: the sparse model alone has decoded"):
        decode(engine, ids, config, cache=out.cache)
    text = engine.start(ids, config=config, max_new_tokens=COUNT, reuse_decoded=True)
    assert text.run().reused_tokens == 19
    assert text.tokens == decode(fresh(), ids, config).sequences[0, ids.shape[1] :].tolist()
    more = torch.cat((ids, torch.tensor([text.tokens]), prompt(5)), 1)
    assert decode(engine, more, config, cache=text.cache).stats.prompts[0].reused_tokens == more.shape[1] - 6


def test_a_prompt_that_is_there_already():
    """The last token is read again, and counted once."""
    engine, ids = fresh(), prompt(19)
    first = decode(engine, ids, CSPARSE, 1)
    assert first.cache.tokens == ids[0].tolist()
    out = decode(engine, ids, CSPARSE, cache=first.cache)
    assert out.stats.prompts[0].reused_tokens == 18
    assert torch.equal(out.sequences, decode(fresh(), ids, CSPARSE).sequences)


def test_what_was_decoded_is_not_reused_by_itself():
    """Only an explicit cache goes on from it; the chunks of its first prompt serve later ones still."""
    engine = fresh()
    out = decode(engine, prompt(19), CSPARSE)
    ids = torch.cat((out.sequences, prompt(20)), 1)
    decode(engine, ids, CSPARSE, cache=out.cache)
    again = decode(engine, ids, CSPARSE)
    assert again.stats.prompts[0].reused_tokens == 16
    assert_the_same(again, decode(fresh(), ids, CSPARSE), ids.shape[1])


@every_way
def test_every_way_takes_one(way):
    model, ids = tiny("mistral"), prompt(19)
    engine = Engine(model, CSPARSE)
    out = decode(engine, ids, CSPARSE)
    longer, held = torch.cat((out.sequences, prompt(5)), 1), len(out.cache.tokens)
    for name in ("past_key_values", "cache"):
        given = decode(engine, ids, CSPARSE).cache
        settings = {"max_new_tokens": 4, "return_dict_in_generate": True, name: given}
        more = way(model, CSPARSE, longer, **settings)
        assert more.stats.prompts[0].reused_tokens == held and more.cache is given


def test_what_cannot_be_gone_on_from():
    engine, ids = fresh(), prompt(19)
    out = decode(engine, ids, CSPARSE)
    longer = torch.cat((out.sequences, prompt(5)), 1)

    def refused(message, new=longer, config=CSPARSE, on=engine, **settings):
        with pytest.raises(ValueError, match=f"^{message}"):
            decode(on, new, config, **{"past_key_values": out.cache, **settings})

    refused("past_key_values: the prompt, of 19 tokens, does not begin with the 26 that this cache holds", new=ids)
    refused("past_key_values: the prompt, of 27 tokens, does not begin", new=beginning_as(out.sequences, 7, 27))
    refused("past_key_values: this cache was made by another model", on=fresh())
    refused("past_key_values: expected one cache, got both", cache=out.cache)
    refused("generate: not supported by sirius_ext: past_key_values with more than one prompt", new=longer.repeat(2, 1))
    refused("generate: not supported by sirius_ext: past_key_values", past_key_values=DynamicCache())
    full = decode(fresh(), ids, CONFIGS[0])
    assert isinstance(full.cache, Cache)
    other = fresh()
    cache = decode(other, ids, CONFIGS[0]).cache
    new = torch.tensor([[*cache.tokens, 3, 4]])
    refused("past_key_values: this cache was filled by a mode that does not observe", new=new, on=other, past_key_values=cache)
    text = engine.start(longer, config=CSPARSE, max_new_tokens=4, past_key_values=out.cache)
    refused("past_key_values: another sequence that has not ended uses this cache")
    text.cancel()
    assert decode(engine, longer, CSPARSE, past_key_values=out.cache).stats.prompts[0].reused_tokens == 26


def test_a_cache_that_another_thread_takes_first(monkeypatch):
    """What it holds is looked at when nobody else can take it any more."""
    engine, took = fresh(), []
    prepare(engine.model).caches.most = 1
    out = decode(engine, prompt(19), CSPARSE)
    more = torch.cat((out.sequences, prompt(5)), 1)
    claim = KeptCaches.claim

    def late(self, cache, *check):
        took.append(decode(engine, prompt(3), CSPARSE).cache)
        claim(self, cache, *check)

    monkeypatch.setattr(KeptCaches, "claim", late)
    with pytest.raises(ValueError, match="^past_key_values: the prompt, of 32 tokens, does not begin with the 10"):
        decode(engine, more, CSPARSE, cache=out.cache)
    assert took == [out.cache]


def test_a_cache_on_loan():
    """A later call may have gone on in it, or the model may have given it up: it is what it holds."""
    engine, ids = fresh(), prompt(19)
    out = decode(engine, ids, CSPARSE)
    decode(engine, beginning_as(ids, 17, 30), CSPARSE)
    with pytest.raises(ValueError, match="does not begin with the .*the model lends the caches"):
        decode(engine, torch.cat((out.sequences, prompt(5)), 1), CSPARSE, past_key_values=out.cache)
    prepare(engine.model).caches.clear()
    out = decode(engine, ids, CSPARSE, past_key_values=out.cache)
    assert out.stats.prompts[0].reused_tokens == 0
    assert_the_same(out, decode(fresh(), ids, CSPARSE), 19)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out))], ids=["copy", "pickle"])
def test_an_output_is_copied_without_its_cache(copied):
    """That is the model's own, with all of the model behind it."""
    out = decode(fresh(), prompt(9), CSPARSE)
    other = copied(out)
    assert torch.equal(other.sequences, out.sequences) and other.stats.prompts == out.stats.prompts
    assert other.cache is None and other.past_key_values is None and out.cache is not None
    assert decode(fresh(), prompt(9), CSPARSE, cache=other.cache).stats.prompts[0].reused_tokens == 0


def test_no_cache_of_several_texts():
    out = decode(fresh(), prompt(9).repeat(2, 1), CSPARSE)
    assert out.cache is None and out.past_key_values is None


# ----------------------------------------------------------------------------------------------------- decoded tokens, too


@every_config
def test_a_conversation_reads_only_what_is_new(place, config):
    """Ten turns: each reads what was said since, never what it has decoded itself."""
    engine, ids, held = fresh(max_position_embeddings=512), prompt(19), 0
    for turn in range(10):
        text = engine.start(ids, config=config, max_new_tokens=COUNT, reuse_decoded=True)
        stats = text.run()
        assert (stats.prompt_tokens, stats.reused_tokens) == (ids.shape[1], held)
        held = ids.shape[1] + COUNT - 1
        assert text.cache.tokens == ids[0].tolist() + text.tokens[:-1]
        ids = torch.cat((ids, torch.tensor([text.tokens]), prompt(5 + turn % 3)), 1)
    assert len(prepare(engine.model).caches) == 1


@pytest.mark.parametrize(
    ("common", "reused"), [(3, 0), (7, 0), (8, 8), (15, 8), (19, 16), (20, 20), (23, 23), (27, 27), (40, 27)]
)
def test_what_a_conversation_has_in_common(common, reused):
    """Of 20 prefilled tokens whole stretches (8, 8 and 4), of the decoded ones each."""
    engine = fresh()
    first = engine.start(prompt(20), config=CSPARSE, max_new_tokens=COUNT)
    first.run()
    text = torch.cat((prompt(20), torch.tensor([first.tokens])), 1)
    other = beginning_as(text, min(common, 28), 41)
    second = engine.start(other, config=CSPARSE, max_new_tokens=COUNT, reuse_decoded=True)
    assert second.run().reused_tokens == reused


def test_what_nobody_observed_is_read_again():
    engine = fresh()
    engine.start(prompt(20), config=CONFIGS[0], max_new_tokens=COUNT).run()
    assert engine.start(prompt(20), config=CSPARSE, max_new_tokens=COUNT, reuse_decoded=True).run().reused_tokens == 0
    assert engine.start(prompt(20), config=CONFIGS[0], max_new_tokens=COUNT, reuse_decoded=True).run().reused_tokens == 16


def test_as_many_as_the_memory_holds():
    """The one that was used least recently goes."""
    engine = fresh()
    kept = prepare(engine.model).caches
    kept.most = None
    texts = [prompt(length) for length in range(20, 30)]
    for ids in texts:
        decode(engine, ids, CSPARSE)
    assert len(kept) == len(texts)
    assert decode(engine, texts[0], CSPARSE).stats.prompts[0].reused_tokens == 16
    kept.most_bytes = kept.nbytes
    decode(engine, prompt(31), CSPARSE)
    assert len(kept) == len(texts)
    assert decode(engine, texts[0], CSPARSE).stats.prompts[0].reused_tokens == 16
    assert decode(engine, texts[1], CSPARSE).stats.prompts[0].reused_tokens == 0
