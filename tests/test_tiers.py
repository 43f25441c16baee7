"""Models of which not all is in memory decode what they would with all of it there, bit for bit."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from test_batched import decode as told_alone
from test_batched import side_by_side
from tier_models import FOLDERS, files_of, source_of
from tiny import FAMILY_NAMES, NAMES, prompt, seeded
from transformers import AutoModelForCausalLM

from sirius_ext import Engine, SiriusConfig
from sirius_ext.models import tier_files
from sirius_ext.models.packed import load_packed
from sirius_ext.models.tier_files import TierFiles, prepare
from sirius_ext.models.tiers import Plan, Tiers
from sirius_ext.runtime import cache

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 40


@functools.cache
def whole(name="llama3", dtype=torch.float32, weights="plain"):
    """An engine with all in memory."""
    if weights == "plain":
        return Engine(AutoModelForCausalLM.from_pretrained(source_of(name, dtype, weights).folder, dtype=dtype))
    return Engine(load_packed(source_of(name, dtype, weights), Path(FOLDERS.name)))


def tiered(files, resident=(0, 0), slots=0, copy=False, streams_rest=False):
    model = TierFiles.open(files.folder).model(not streams_rest)
    model.tiers = Tiers(model.tier_files, Plan(0, resident, slots, int(copy), streams_rest, 1 << 30, 0, 0))
    return Engine(model)


def decoded(engine, config, ids, count=TOKENS, **settings):
    out = engine.generate(ids, config=config, max_new_tokens=count, **settings)
    return out.sequences.tolist(), [dataclasses.replace(each, prefill_seconds=0, decode_seconds=0) for each in out.stats.prompts]


def same(first, second, config, ids, count=TOKENS, **settings):
    """Texts, and the periods that they came in."""
    texts, stats = zip(*(decoded(engine, config, ids, count, **settings) for engine in (first, second)))
    assert texts[0] == texts[1]
    advances = [[[period.accepted for period in each.periods] for each in some] for some in stats]
    assert advances[0] == advances[1]


# S reads what F reads; of packed weights, four bits of it (AUTO).
FIXED = {"period": 6, "lookup": False, "density": 0.5, "draft_weights": "same"}
AUTO = {"draft_weights": "auto"}
CONFIGS = {
    "full": SiriusConfig(mode="full"),
    "sparse": SiriusConfig(mode="sparse", density=0.5, draft_weights="same"),
    "threshold": SiriusConfig(**FIXED),
    "match": SiriusConfig(**FIXED, accept="match"),
    "fixed set": SiriusConfig(**FIXED, follow=False),
    "tree": SiriusConfig(**FIXED, tree_width=3),
    "cascade": SiriusConfig(**FIXED | {"density": 0.3}, sparsity="cascade"),
    "copies": SiriusConfig(**FIXED | {"lookup": True}, accept="match"),
    "one": SiriusConfig(**FIXED | {"period": 1}),
}


def slots_of(files):
    return files.intermediate // 2 + 2


@pytest.mark.parametrize("resident", [0, 64, None])
@pytest.mark.parametrize("config", CONFIGS)
def test_with_any_part_in_memory_the_text_is_the_same(config, resident):
    files = files_of()
    rows = files.intermediate if resident is None else resident
    same(whole(), tiered(files, (rows, 0), slots_of(files) if rows < files.intermediate else 0), CONFIGS[config], prompt(30))


@pytest.mark.parametrize("resident", [(0, 0), (64, 0), (None, 0), (None, 64), (None, None)], ids=str)
@pytest.mark.parametrize("config", ["full", "threshold", "tree"])
@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_packed_weights(weights, config, resident):
    files = files_of("qwen2", torch.bfloat16, weights)
    resident = tuple(files.intermediate if count is None else count for count in resident)
    slots = slots_of(files) if resident[0] < files.intermediate else 0
    config = dataclasses.replace(CONFIGS[config], **AUTO)
    same(whole("qwen2", torch.bfloat16, weights), tiered(files, resident, slots), config, prompt(25))


@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_every_family(name):
    files = files_of(name)
    same(whole(name), tiered(files, (64, 0), slots_of(files)), CONFIGS["threshold"], prompt(50))


@pytest.mark.parametrize("streams_rest", [False, True])
@pytest.mark.parametrize("config", ["threshold", "match", "cascade"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sparse_model_of_copies(dtype, config, streams_rest):
    """Four bits of everything in memory, beside a full model that streams, with attention and head or without."""
    config, files = dataclasses.replace(CONFIGS[config], draft_weights="q4"), files_of(dtype=dtype)
    same(whole(dtype=dtype), tiered(files, (64, 0), copy=True, streams_rest=streams_rest), config, prompt(30))


@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_every_family_with_all_of_the_full_model_on_the_disk(name, monkeypatch):
    monkeypatch.setattr(tier_files, "_PART", 1)  # so that the head comes in many parts
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(source_of(name, torch.bfloat16, "plain"), Path(folder) / "tiers")
        config = dataclasses.replace(CONFIGS["threshold"], draft_weights="q4")
        engine = tiered(files, copy=True, streams_rest=True)
        same(whole(name, torch.bfloat16), engine, config, prompt(50), 20)


def test_fsparse_where_all_that_it_chooses_from_is_there():
    config = SiriusConfig(**FIXED, sparsity="fsparse")
    eight = dataclasses.replace(config, **AUTO)
    same(whole(weights="q8"), tiered(files_of(weights="q8"), (files_of().intermediate, 0)), eight, prompt(30))
    with pytest.raises(ValueError, match="^density: expected a sparse model of at most 67 of 131 neurons.*got one of 131"):
        tiered(files_of(), (0, 0), slots_of(files_of())).generate(prompt(5), config=config, max_new_tokens=3)


def test_drawn_texts():
    config = SiriusConfig(**FIXED, accept="sample")
    for seed in range(3):
        texts = [
            engine.generate(
                prompt(20), config=config, max_new_tokens=TOKENS, do_sample=True, generator=seeded(seed), temperature=1.0, top_k=0
            ).sequences.tolist()
            for engine in (whole(), tiered(files_of(), (0, 0), slots_of(files_of())))
        ]
        assert texts[0] == texts[1]


def test_prompts_of_many_chunks_and_texts_that_go_on(monkeypatch):
    """A prompt's chunks go through each layer together, and what is kept of a text serves the next one."""
    monkeypatch.setattr(cache, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(cache, "TOGETHER", 3)
    first, second = whole("llama", torch.bfloat16), tiered(files_of("llama", torch.bfloat16), (64, 0), 60)
    config = CONFIGS["threshold"]
    context = torch.cat([prompt(length) for length in (83, 71)], 1)
    for ids in (context, torch.cat((context, prompt(9)), 1), prompt(3)):
        same(first, second, config, ids, 8)


def test_texts_side_by_side_read_a_prompt_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(cache, "PREFILL_CHUNK", 32)
    engine, ids = tiered(files_of(), (64, 0), slots_of(files_of())), prompt(110)
    alone = told_alone(whole(), ids, CONFIGS["threshold"], 12)
    assert side_by_side(engine, [(ids, 12)], [CONFIGS["threshold"]], 2) == {(0, 0): alone}


def test_rows_of_the_embedding_whatever_the_default_device():
    engine = tiered(files_of(), (64, 0), slots_of(files_of()))
    assert engine.model.tiers.embedding is not None
    expected, ids = decoded(whole(), CONFIGS["match"], prompt(20))[0], prompt(20)
    torch.set_default_device("meta")
    try:
        assert decoded(engine, CONFIGS["match"], ids)[0] == expected
    finally:
        torch.set_default_device(None)


def test_two_texts_in_turn_share_the_slots():
    engine, config = tiered(files_of(), (0, 0), slots_of(files_of())), CONFIGS["threshold"]
    alone = [decoded(whole(), config, prompt(length))[0][0] for length in (12, 31)]
    texts = [engine.start(prompt(length), config=config, max_new_tokens=TOKENS) for length in (12, 31)]
    while not all(text.ended for text in texts):
        for text in texts:
            if not text.ended:
                text.step()
    assert [[*text.request.prompt.tolist(), *text.tokens] for text in texts] == alone
