"""Drop-in use with `transformers`: the same call, the same settings, the same text; and the model given back as it was."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import NAMES, VOCAB, Collector, by_attach, by_call, by_engine, every_way, prompt, tiny
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from sirius_ext import Engine, SiriusConfig, SiriusOutput, attach, detach

MATCH = SiriusConfig(accept="match", period=4, density=0.5)
FULL = SiriusConfig(mode="full")
IDS = prompt(8)
COUNT = 20

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def plain(name="llama3"):
    """A model that nothing of ours ever touches."""
    return tiny(name)


@functools.cache
def ours(name="llama3"):
    return tiny(name)


@functools.cache
def greedy(name="llama3", length=8, count=COUNT):
    return plain(name).generate(prompt(length), max_new_tokens=count)[0, length:].tolist()


# ------------------------------------------------------------------------------------------------------------------- the text


@every_way
@pytest.mark.parametrize("config", [MATCH, FULL], ids=["match", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_that_of_transformers(name, config, way):
    for length in (1, 8, 33):
        out = way(ours(name), config, prompt(length), max_new_tokens=COUNT)
        assert out.dtype == torch.int64 and out[0].tolist() == prompt(length)[0].tolist() + greedy(name, length)


@every_way
def test_inputs_by_name(way):
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert way(ours(), MATCH, max_new_tokens=COUNT, **inputs)[0, 8:].tolist() == greedy()


@every_way
def test_stats_come_with_the_output(way):
    out = way(ours(), MATCH, IDS, max_new_tokens=COUNT, return_dict_in_generate=True)
    assert isinstance(out, SiriusOutput) and out.sequences[0, 8:].tolist() == greedy()
    assert out["sequences"] is out.sequences and out["stats"] is out.stats
    (stats,) = out.stats.prompts
    assert (stats.prompt_tokens, stats.tokens, stats.mode, stats.period, stats.finish) == (8, COUNT, "sirius", 4, "length")
    assert sum(period.committed for period in stats.periods) == COUNT - 1


@every_way
def test_the_models_own_defaults_are_used(way):
    """And are left as they were."""
    model, reference = tiny("llama3"), tiny("llama3")
    for each in (model, reference):
        each.generation_config.update(max_new_tokens=11, repetition_penalty=1.6, eos_token_id=[greedy()[15], 3])
    before = model.generation_config.to_dict()
    expected = reference.generate(IDS)
    assert expected[0, 8:].tolist() != greedy(count=11)
    assert torch.equal(way(model, MATCH, IDS), expected)
    assert model.generation_config.to_dict() == before


def test_configs_of_the_wrong_type():
    for way, name in ((by_call, "sirius_config"), (by_attach, "config"), (by_engine, "config")):
        with pytest.raises(TypeError, match=f"^{name}: expected a SiriusConfig, got dict"):
            way(ours(), {"period": 4}, IDS, max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------------- settings


class Parity(LogitsProcessor):
    """Even tokens at even places, odd ones at odd places; changes the scores in place, as a processor may."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids.shape[1] % 2 :: 2] = -torch.inf
        return scores


def never_twice(input_ids, scores):
    return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def ends_with(*tokens):
    return lambda input_ids, scores: torch.isin(input_ids[:, -1], torch.tensor(tokens))


def synthid():
    """A watermark whose processor remembers what it was called for."""
    return transformers.SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)


# Settings that change the text, made from the tokens of the text without them.
SETTINGS = {
    "max_length": lambda text: {"max_length": 13, "max_new_tokens": None},
    "max_new_tokens": lambda text: {"max_length": 16, "max_new_tokens": 5},
    "eos_token_id": lambda text: {"eos_token_id": text[6]},
    "eos_token_id-list": lambda text: {"eos_token_id": [text[9], text[5]]},
    "eos_token_id-tensor": lambda text: {"eos_token_id": torch.tensor([text[5], text[9]])},
    "min_new_tokens": lambda text: {"eos_token_id": text[3], "min_new_tokens": 12},
    "min_length": lambda text: {"eos_token_id": text[3], "min_length": 17},
    "repetition_penalty": lambda text: {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": lambda text: {"encoder_repetition_penalty": 2.5},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda text: {"bad_words_ids": [[text[4]], [text[1], text[2]]]},
    "suppress_tokens": lambda text: {"suppress_tokens": [text[7]]},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": [text[0]]},
    "sequence_bias": lambda text: {"sequence_bias": {(text[4],): -50.0}},
    "forced_eos_token_id": lambda text: {"forced_eos_token_id": 3},
    "exponential_decay_length_penalty": lambda text: {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
    "watermarking_config": lambda text: {"watermarking_config": transformers.WatermarkingConfig(bias=3.0)},
    "watermarking_config-synthid": lambda text: {"watermarking_config": synthid()},
    "prefix_allowed_tokens_fn": lambda text: {"prefix_allowed_tokens_fn": lambda row, ids: range(len(ids) % 7, VOCAB, 7)},
    "logits_processor": lambda text: {"logits_processor": LogitsProcessorList([never_twice, Parity()])},
    "logits_processor-float64": lambda text: {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores.double()])},
    "stopping_criteria": lambda text: {"stopping_criteria": StoppingCriteriaList([ends_with(text[6])])},
    "stopping_criteria-list": lambda text: {"stopping_criteria": [ends_with(text[9]), ends_with(text[6])]},
    "stopping_criteria-bool": lambda text: {"stopping_criteria": [lambda ids, scores: int(ids[0, -1]) == text[6]]},
    "stopping_criteria-length": lambda text: {"stopping_criteria": [MaxLengthCriteria(11)]},
    "stopping_criteria-reached": lambda text: {"stopping_criteria": [MaxLengthCriteria(3)]},
    "max_time": lambda text: {"max_time": 1e-9},
    "generation_config": lambda text: {
        "generation_config": GenerationConfig(max_new_tokens=9, no_repeat_ngram_size=1, eos_token_id=text[5])
    },
}


@every_way
@pytest.mark.parametrize("config", [MATCH, FULL], ids=["match", "full"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_honoured(setting, config, way):
    settings = SETTINGS[setting](greedy())
    if "generation_config" not in settings:
        settings = {"max_new_tokens": COUNT, **settings}
    expected = plain().generate(IDS, **settings)
    assert expected[0, 8:].tolist() != greedy(), "a setting without effect tests nothing"
    assert torch.equal(way(ours(), config, IDS, **settings), expected)


HARMLESS = {
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "max_time": 1e6,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "do_sample": False,
    "use_cache": True,
    "low_memory": True,
    "prefill_chunk_size": 3,
    "disable_compile": True,
    "output_scores": False,
}


@every_way
@pytest.mark.parametrize("setting", HARMLESS)
def test_settings_that_change_nothing(setting, way):
    out = way(ours(), MATCH, IDS, max_new_tokens=COUNT, **{setting: HARMLESS[setting]})
    assert out[0, 8:].tolist() == greedy()


@pytest.mark.parametrize("config", [MATCH, FULL, SiriusConfig(mode="sparse"), SiriusConfig(threshold=0)], ids=str)
def test_criteria_see_every_token_once(config):
    """In their order, each time with the text up to there, and nothing is committed after the one that ends the text."""
    seen = []

    def criterion(input_ids, scores):
        seen.append(input_ids[0].tolist())
        return torch.tensor([len(seen) == 7])

    out = by_call(ours(), config, IDS, max_new_tokens=COUNT, stopping_criteria=[criterion], return_dict_in_generate=True)
    text = out.sequences[0].tolist()
    assert len(text) == 8 + 7 and seen == [text[: 9 + i] for i in range(7)]
    assert out.stats.prompts[0].finish == "criteria"


def test_processors_see_what_transformers_shows_them():
    calls = {}

    def recorder(key):
        def process(input_ids, scores):
            calls.setdefault(key, []).append((input_ids.tolist(), scores.shape, scores.dtype))
            return scores

        return LogitsProcessorList([process])

    plain().generate(IDS, max_new_tokens=6, logits_processor=recorder("theirs"))
    by_call(ours(), FULL, IDS, max_new_tokens=6, logits_processor=recorder("ours"))
    assert calls["ours"] == calls["theirs"] and len(calls["ours"]) == 6


@pytest.mark.parametrize("threshold", [0, 0.3])
def test_processors_count_for_drafts_too(threshold):
    """Whatever is drafted, accepted or corrected obeys them."""
    config = SiriusConfig(threshold=threshold, period=5)
    text = by_call(ours(), config, IDS, max_new_tokens=COUNT, logits_processor=LogitsProcessorList([Parity()]))[0]
    assert all(token % 2 != place % 2 for place, token in enumerate(text.tolist()) if place >= 8)


@every_way
def test_sampling_by_the_models_own_default(way):
    model = tiny("llama3")
    model.generation_config.do_sample = True
    with pytest.raises(ValueError, match="do_sample=True.*own generation config.*pass do_sample=False"):
        way(model, MATCH, IDS, max_new_tokens=4)
    assert way(model, MATCH, IDS, max_new_tokens=COUNT, do_sample=False)[0, 8:].tolist() == greedy()
    # Where nothing is corrected, or by a rule that draws, it is honoured.
    for config in (FULL, SiriusConfig(mode="sparse"), SiriusConfig(accept="sample", period=4)):
        torch.manual_seed(0)
        assert way(model, config, IDS, max_new_tokens=COUNT)[0, 8:].tolist() != greedy()


@every_way
def test_what_full_draws_is_what_transformers_may_draw(way):
    """With one token left by the warpers, that one."""
    settings = {"do_sample": True, "top_k": 1, "max_new_tokens": COUNT}
    expected = plain().generate(IDS, **settings)
    for config in (FULL, SiriusConfig(accept="sample", period=4), SiriusConfig(accept="sample", period=4, tree_width=3)):
        assert torch.equal(way(ours(), config, IDS, **settings), expected)


def filled_cache():
    return plain()(IDS[:, :-1], use_cache=True).past_key_values


# What decides how a text is decoded, or what is returned, and cannot be honoured.
REFUSED = {
    "do_sample": lambda: {"do_sample": True},
    "do_sample-several": lambda: {"do_sample": True, "num_return_sequences": 2},
    "num_beams": lambda: {"num_beams": 2},
    "num_return_sequences": lambda: {"num_return_sequences": 2},
    "output_scores": lambda: {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": lambda: {"output_logits": True, "return_dict_in_generate": True},
    "output_attentions": lambda: {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": lambda: {"output_hidden_states": True, "return_dict_in_generate": True},
    "use_cache": lambda: {"use_cache": False},
    "cache_implementation": lambda: {"cache_implementation": "static"},
    "guidance_scale": lambda: {"guidance_scale": 1.5},
    "prompt_lookup_num_tokens": lambda: {"prompt_lookup_num_tokens": 3},
    "assistant_model": lambda: {"assistant_model": plain()},
    "assistant_early_exit": lambda: {"assistant_early_exit": 1},
    "use_mtp": lambda: {"use_mtp": True},
    "penalty_alpha": lambda: {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": lambda: {"dola_layers": "low"},
    "constraints": lambda: {"constraints": [object()]},
    "force_words_ids": lambda: {"force_words_ids": [[5]]},
    "inputs_embeds": lambda: {"inputs_embeds": plain().model.embed_tokens(IDS)},
    "past_key_values": lambda: {"past_key_values": filled_cache()},
    # An empty one would come back filled.
    "past_key_values-empty": lambda: {"past_key_values": transformers.DynamicCache()},
    "position_ids": lambda: {"position_ids": torch.arange(0, 16, 2)[None]},
    "attention_mask-hole": lambda: {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])},
    "attention_mask-right": lambda: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])},
    "attention_mask-short": lambda: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1]])},
    "attention_mask-rows": lambda: {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 2)},
    "token_healing": lambda: {"token_healing": True},
    "a_misspelt_setting": lambda: {"a_misspelt_setting": 3},
}


@every_way
@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_honoured_is_refused(setting, way):
    name = setting.split("-")[0].replace("token_healing", "token healing")
    with pytest.raises(ValueError, match=name):
        way(ours(), MATCH, IDS, max_new_tokens=4, **REFUSED[setting]())


@every_way
def test_a_model_that_was_trained_without_a_cache(way):
    """Its config still says so, and its own text is the same with a cache."""
    model = tiny("llama3", use_cache=False)
    assert model.generation_config.use_cache is False
    expected = model.generate(IDS, max_new_tokens=8)
    for settings in ({}, {"generation_config": transformers.GenerationConfig(max_new_tokens=8)}):
        assert torch.equal(way(model, MATCH, IDS, **{"max_new_tokens": 8, **settings}), expected)
    with pytest.raises(ValueError, match="^generate: not supported by sirius_ext: use_cache=False"):
        way(model, MATCH, IDS, max_new_tokens=8, use_cache=False)


def test_what_is_there_instead_is_named():
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens .SiriusConfig.lookup=True"):
        by_call(ours(), MATCH, IDS, max_new_tokens=4, prompt_lookup_num_tokens=3)


@every_way
def test_copies_are_the_same_text(way):
    for config in (FULL, MATCH):
        copying = dataclasses.replace(config, lookup=True)
        assert torch.equal(way(ours(), copying, IDS, max_new_tokens=COUNT), way(ours(), config, IDS, max_new_tokens=COUNT))


@every_way
def test_a_streamer_takes_one_prompt(way):
    with pytest.raises(ValueError, match="a streamer with more than one prompt"):
        way(ours(), MATCH, IDS.repeat(2, 1), max_new_tokens=4, streamer=Collector())


BAD_PROMPTS = {"beyond": torch.tensor([[VOCAB]]), "negative": torch.tensor([[3, -1]]), "empty": IDS[:, :0]}


@every_way
@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_bad_prompts(kind, way):
    with pytest.raises(ValueError, match="^input_ids: "):
        way(ours(), MATCH, BAD_PROMPTS[kind], max_new_tokens=4)


# ------------------------------------------------------------------------------------------------------------------- batches


LENGTHS = (3, 9, 6)
PAD = next(token for token in range(VOCAB) if all(token not in prompt(length) for length in LENGTHS))


def batch():
    """Three prompts, padded on the left."""
    ids, mask = torch.full((3, 9), PAD), torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, 9 - length :], mask[row, 9 - length :] = prompt(length)[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def row_texts():
    return [greedy(length=length) for length in LENGTHS]


RARE = next(token for token in range(VOCAB) if all(token not in text for text in row_texts()))

# What depends on one text only: alone or in a batch, the text is the same.
BATCH_SETTINGS = {
    "plain": lambda texts: {},
    "eos": lambda texts: {"eos_token_id": [texts[0][4], texts[1][7]]},
    "eos-at-once": lambda texts: {"eos_token_id": texts[2][0]},
    "min_new_tokens": lambda texts: {"eos_token_id": [texts[0][1], texts[1][3], texts[2][2]], "min_new_tokens": 9},
    "repetition_penalty": lambda texts: {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": lambda texts: {"no_repeat_ngram_size": 2},
    "exponential_decay": lambda texts: {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": RARE},
    "begin_suppress_tokens": lambda texts: {"begin_suppress_tokens": [text[0] for text in texts]},
    "forced_eos_token_id": lambda texts: {"forced_eos_token_id": RARE},
    "stopping_criteria": lambda texts: {"stopping_criteria": [ends_with(texts[1][5])], "eos_token_id": RARE},
    "logits_processor": lambda texts: {"logits_processor": LogitsProcessorList([never_twice])},
    "synthid": lambda texts: {"watermarking_config": synthid()},
}


@every_way
@pytest.mark.parametrize("setting", BATCH_SETTINGS)
def test_a_batch_is_its_prompts_alone(setting, way):
    """And looks like a batch of `transformers`: prompts padded on the left, texts padded after their end."""
    settings = {"max_new_tokens": 12, "pad_token_id": PAD, **BATCH_SETTINGS[setting](row_texts())}
    out = way(ours(), MATCH, **batch(), **settings)
    # Before 5.23 transformers' repetition_penalty counts padding as text, so there a batch is not its prompts alone.
    padding_counts = setting == "repetition_penalty" and Version(transformers.__version__) < Version("5.23")
    for row, length in enumerate(() if padding_counts else LENGTHS):
        alone = by_call(ours(), MATCH, prompt(length), **settings)[0, length:].tolist()
        assert out[row, 9:].tolist() == alone + [PAD] * (out.shape[1] - 9 - len(alone))
    assert torch.equal(out, plain().generate(**batch(), **settings))


def ends_each_with(tokens):
    """A criterion with something of its own for every row."""
    return lambda input_ids, scores: input_ids[:, -1] == torch.tensor(tokens)


def says_only(texts):
    """Each row may say one thing, and a text that is not its own can have no next token."""

    def allowed(row, ids):
        said = ids[9:].tolist()
        return texts[row][len(said) : len(said) + 1] if said == texts[row][: len(said)] else []

    return allowed


@every_way
@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 15},
        {
            "stopping_criteria": [ends_each_with([text[place] for text, place in zip(row_texts(), (4, 7, 2))])],
            "eos_token_id": RARE,
            "max_new_tokens": 12,
        },
        {"encoder_repetition_penalty": 2.5, "max_new_tokens": 12},
        {"max_length": 15, "min_length": 14, "eos_token_id": greedy(length=9)[2]},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(20 * row, 20 * row + 20), "max_new_tokens": 6},
        {"prefix_allowed_tokens_fn": says_only([list(range(20 * row, 20 * row + 6)) for row in range(3)]), "max_new_tokens": 6},
        {"stopping_criteria": [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 14)], "max_new_tokens": 12},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_about_the_batch(settings, way):
    """What counts the padding, and functions that know the rows: as `transformers` does it."""
    settings = {"pad_token_id": PAD, **settings}
    assert torch.equal(way(ours(), MATCH, **batch(), **settings), plain().generate(**batch(), **settings))


@pytest.mark.parametrize("config", [FULL, SiriusConfig(accept="sample", period=4)], ids=["full", "sample"])
def test_texts_of_one_prompt_have_its_number(config):
    """In a prefix_allowed_tokens_fn, as in `transformers`; in 5.17 every text has one of its own."""
    settings = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5, "pad_token_id": PAD}
    settings["prefix_allowed_tokens_fn"] = lambda number, ids: [10 * number + 10, 10 * number + 11]
    seen, expected = (
        [sorted({token // 10 for token in row[9:].tolist()}) for row in out]
        for out in (by_call(ours(), config, **batch(), **settings), plain().generate(**batch(), **settings))
    )
    assert seen == expected and seen in ([[1], [1], [2], [2], [3], [3]], [[1], [2], [3], [4], [5], [6]])


@pytest.mark.parametrize("pad", [{}, {"pad_token_id": 7}], ids=["default", "given"])
@pytest.mark.parametrize("kind", [list, torch.tensor, min], ids=["list", "tensor", "int"])
def test_the_padding_token(kind, pad):
    """Without one it is the first EOS, as in `transformers`."""
    eos = kind([greedy(length=3)[4], greedy(length=9)[7]])
    settings = {"eos_token_id": eos, "max_new_tokens": 12, **pad}
    out = by_call(ours(), MATCH, **batch(), **settings)
    assert torch.equal(out, plain().generate(**batch(), **settings))
    assert out[0, -1] == pad.get("pad_token_id", eos if kind is min else eos[0])


@pytest.mark.parametrize("setting", [{}, {"repetition_penalty": 1.8}, {"max_length": 12, "max_new_tokens": None}], ids=str)
def test_one_padded_prompt(setting):
    inputs = {name: value[:1] for name, value in batch().items()}
    settings = {"max_new_tokens": 12, **setting}
    assert torch.equal(by_call(ours(), MATCH, **inputs, **settings), plain().generate(**inputs, **settings))


@every_way
def test_a_mask_that_is_left_out_is_inferred(way):
    """As transformers does it: pad_token_id is padding, unless a text may end with it."""
    inputs = batch()
    settings = {"max_new_tokens": 12, "pad_token_id": PAD}
    given = way(ours(), MATCH, **inputs, **settings)
    del inputs["attention_mask"]
    assert torch.equal(way(ours(), MATCH, **inputs, **settings), given)
    assert torch.equal(plain().generate(**inputs, **settings), given)
    settings["eos_token_id"] = PAD
    assert torch.equal(way(ours(), MATCH, **inputs, **settings), plain().generate(**inputs, **settings))


@every_way
def test_padding_in_other_places_says_what_to_do(way):
    message = r"^attention_mask: expected left padding only .*, got right padding .*padding_side=\"left\".* in row 0"
    inputs = {name: value.flip(1) for name, value in batch().items()}
    with pytest.raises(ValueError, match=f"{message}$"):
        way(ours(), MATCH, **inputs, max_new_tokens=4)
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match=f"{message}; none was given, and pad_token_id in input_ids was taken for padding$"):
        way(ours(), MATCH, **inputs, max_new_tokens=4, pad_token_id=PAD)
    with pytest.raises(ValueError, match="^attention_mask: .*, got zeros elsewhere in row 0; none was given, and pad_token_id"):
        way(ours(), MATCH, IDS, max_new_tokens=4, pad_token_id=int(IDS[0, 3]))
    mask = torch.ones_like(IDS)
    assert way(ours(), MATCH, input_ids=IDS, attention_mask=mask, max_new_tokens=4, pad_token_id=int(IDS[0, 3])).shape == (1, 12)


def test_stats_of_a_batch():
    first = row_texts()[0]
    end = first.index(first[4]) + 1
    stats = Engine(ours(), MATCH).generate(**batch(), max_new_tokens=12, eos_token_id=first[4]).stats
    assert [each.prompt_tokens for each in stats.prompts] == list(LENGTHS)
    assert [each.tokens for each in stats.prompts] == [end, 12, 12] and end < 12
    assert [each.finish for each in stats.prompts] == ["eos", "length", "length"]
    assert stats.tokens == end + 24 and len(stats.periods) == sum(len(each.periods) for each in stats.prompts)


def test_an_empty_prompt_in_a_batch():
    inputs = batch()
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="input_ids: prompt 1 is empty"):
        by_call(ours(), MATCH, **inputs, max_new_tokens=4)


def test_too_long_a_prompt_in_a_batch():
    """Padding does not count."""
    model = tiny("llama3", max_position_embeddings=9)
    with pytest.raises(ValueError, match="input_ids: prompt 1 has 9 tokens"):
        by_call(model, MATCH, **batch(), max_new_tokens=4)
    inputs = {name: torch.cat((value[:1], value[2:])) for name, value in batch().items()}
    out = Engine(model, MATCH).generate(**inputs, max_new_tokens=4, pad_token_id=PAD)
    assert [(each.tokens, each.finish) for each in out.stats.prompts] == [(4, "length"), (3, "context")]
    assert out.sequences[1, -1] == PAD


# ------------------------------------------------------------------------------------------------------------------ streaming


def by_own_argument(model, config, ids, *, streamer, **settings):
    return by_call(model, config, ids, sirius_streamer=streamer, **settings)


def by_both(model, config, ids, **settings):
    with attach(model, SiriusConfig(mode="sparse")):
        return by_call(model, config, ids, **settings)


every_stream = pytest.mark.parametrize(
    "way", [by_call, by_own_argument, by_attach, by_engine, by_both], ids=lambda way: way.__name__
)


@every_stream
@pytest.mark.parametrize("config", [MATCH, FULL, SiriusConfig(mode="sparse"), SiriusConfig(threshold=0.01)], ids=str)
def test_streaming(config, way):
    streamer = Collector()
    out = way(
        ours(), config, IDS, max_new_tokens=COUNT, eos_token_id=greedy()[-1], streamer=streamer, return_dict_in_generate=True
    )
    streamer.check(IDS, out.sequences)
    # Tokens leave as soon as they are certain: x0, then what each verification commits.
    (stats,) = out.stats.prompts
    committed = [period.committed for period in stats.periods] if config.mode == "sirius" else [1] * (stats.tokens - 1)
    assert [len(put) for put in streamer.puts[1:]] == [1, *committed]


@pytest.mark.parametrize("first", ["sirius_ext", "transformers.generation.utils"])
def test_a_streamer_whichever_is_imported_first(first):
    """`model.generate` is looked up before `sirius_ext.generate` is."""
    code = f"""
import {first}
import sirius_ext
from tiny import Collector, prompt, tiny

streamer = Collector()
settings = dict(max_new_tokens=3, do_sample=False, sirius_config=sirius_ext.SiriusConfig())
tiny().generate(prompt(5), custom_generate=sirius_ext.generate, streamer=streamer, **settings)
assert len(streamer.puts) > 1 and streamer.ends == 1
"""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})


def test_without_a_streamer_none_is_found():
    """A call takes its own streamer, not that of one before."""
    streamer = Collector()
    by_call(ours(), MATCH, IDS, max_new_tokens=3, streamer=streamer)
    by_call(ours(), MATCH, IDS, max_new_tokens=3)
    assert streamer.ends == 1 and len(streamer.puts) <= 4


class Spelling:
    """A tokenizer as far as a streamer needs one."""

    def decode(self, ids, **kwargs):
        return "".join(f"<{token}>" for token in ids)


@every_stream
def test_a_text_streamer_in_a_thread(way):
    streamer = transformers.TextIteratorStreamer(Spelling(), skip_prompt=True, timeout=60)
    settings = {"max_new_tokens": COUNT, "streamer": streamer}
    thread = threading.Thread(target=way, args=(ours(), MATCH, IDS), kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == Spelling().decode(greedy())


def test_two_streamers():
    with pytest.raises(ValueError, match="streamer"):
        by_call(ours(), MATCH, IDS, max_new_tokens=3, streamer=Collector(), sirius_streamer=Collector())


# -------------------------------------------------------------------------------------------------------- attach and detach


@torch.no_grad()
def state(model):
    """Everything that must come back bit for bit."""
    parameters = {
        name: (value.detach().clone(), value.stride(), value.storage_offset(), value.is_contiguous(), value.requires_grad)
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    attributes = {name: vars(module).keys() for name, module in model.named_modules()}
    return parameters, attributes, model(IDS).logits, model.generate(IDS, max_new_tokens=COUNT)


def assert_restored(model, before):
    after = state(model)
    assert after[0].keys() == before[0].keys()
    for name, (value, *layout) in before[0].items():
        assert torch.equal(after[0][name][0], value), name
        assert list(after[0][name][1:]) == layout, name
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2]) and torch.equal(after[3], before[3])
    assert type(model).generate == type(plain(NAMES[0])).generate or model.generate.__func__ is type(model).generate


everything = pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("llama3", torch.bfloat16), ("qwen2", torch.float16)], ids=str
)


@everything
@every_way
def test_detach_restores_the_model(name, dtype, way):
    model = tiny(name, dtype)
    before = state(model)
    way(model, MATCH, IDS, max_new_tokens=5)
    if way is not by_attach:
        assert not model.model.layers[0].mlp.down_proj.weight.is_contiguous(), "nothing to restore"
        detach(model)
    assert_restored(model, before)
    # Twice is once.
    detach(model)
    assert_restored(model, before)


@everything
def test_exceptions_do_not_keep_the_model(name, dtype):
    model = tiny(name, dtype)
    before = state(model)

    class Broken(Collector):
        def put(self, value):
            super().put(value)
            if len(self.puts) == 3:
                raise OSError("the pipe is closed")

    with pytest.raises(OSError, match="the pipe"), attach(model, MATCH):
        model.generate(IDS, max_new_tokens=COUNT, streamer=Broken())
    assert_restored(model, before)
    with pytest.raises(ValueError, match="num_beams"), attach(model, MATCH):
        model.generate(IDS, max_new_tokens=COUNT, num_beams=2)
    assert_restored(model, before)
    with pytest.raises(KeyboardInterrupt), attach(model, MATCH):
        raise KeyboardInterrupt
    assert_restored(model, before)


def test_an_attach_that_fails_changes_nothing():
    """The layer that is not supported is the last one."""

    class Adapter(nn.Linear):
        pass

    model = tiny("llama3")
    old = model.model.layers[-1].self_attn.q_proj
    model.model.layers[-1].self_attn.q_proj = Adapter(old.in_features, old.out_features, bias=False)
    before = state(model)
    for way in (by_call, by_attach, by_engine):
        with pytest.raises(ValueError, match="model: expected q_proj to be a plain nn.Linear, got Adapter of test_hf"):
            way(model, MATCH, IDS, max_new_tokens=2)
        assert_restored(model, before)


@pytest.mark.parametrize(
    "undo", [lambda model, handle: handle.detach(), lambda model, handle: detach(model)], ids=["handle", "model"]
)
def test_attach_for_a_whole_script(undo):
    model = tiny("llama3")
    before = state(model)
    handle = attach(model, SiriusConfig(mode="sparse", density=0.2))
    assert handle.stats is None and handle.model is model
    sparse = model.generate(IDS, max_new_tokens=COUNT)
    assert sparse[0, 8:].tolist() != greedy() and handle.stats.prompts[0].mode == "sparse"
    assert handle.stats.tokens == COUNT
    # As scripts do: a GenerationConfig as the second argument, and by name.
    for out in (model.generate(IDS, GenerationConfig(max_new_tokens=7)), model.generate(inputs=IDS, max_new_tokens=7)):
        assert torch.equal(out, sparse[:, :15]) and handle.stats.tokens == 7
    undo(model, handle)
    undo(model, handle)
    assert_restored(model, before)
    handle.detach()
    assert handle.stats.tokens == 7


def test_a_handle_keeps_stats_and_its_model_the_kind_of_output():
    with attach(ours(), MATCH) as handle:
        assert isinstance(ours().generate(IDS, max_new_tokens=4), torch.Tensor)
        first = handle.stats
        out = ours().generate(IDS, max_new_tokens=9, return_dict_in_generate=True)
        assert isinstance(out, SiriusOutput) and out.stats is handle.stats is not first
        assert (first.tokens, out.stats.tokens) == (4, 9)


def test_attach_twice():
    model = tiny("llama3")
    before = state(model)
    with attach(model, MATCH) as handle:
        with pytest.raises(ValueError, match="^model: .*detach it first"):
            attach(model, FULL)
        assert model.generate(IDS, max_new_tokens=COUNT)[0, 8:].tolist() == greedy()
        assert handle.stats.prompts[0].mode == "sirius"
    assert_restored(model, before)
    with attach(model, FULL) as handle:
        model.generate(IDS, max_new_tokens=3)
        assert handle.stats.prompts[0].mode == "full"


def test_attach_to_two_models():
    one, two = tiny("llama"), tiny("qwen2")
    with attach(one, MATCH) as first, attach(two, FULL) as second:
        assert one.generate(IDS, max_new_tokens=COUNT)[0, 8:].tolist() == greedy("llama")
        assert second.stats is None
        assert two.generate(IDS, max_new_tokens=COUNT)[0, 8:].tolist() == greedy("qwen2")
        assert first.stats.prompts[0].mode == "sirius" and second.stats.prompts[0].mode == "full"


def test_attach_beside_an_engine():
    """Detaching leaves the model to the engine that had it before; `sirius_ext.detach` takes it from both."""
    model = tiny("llama3")
    before = state(model)
    engine = Engine(model, MATCH)
    with attach(model, FULL) as handle:
        assert model.generate(IDS, max_new_tokens=COUNT)[0, 8:].tolist() == greedy()
        assert engine.generate(IDS, max_new_tokens=COUNT).stats.prompts[0].mode == "sirius"
        assert handle.stats.prompts[0].mode == "full"
    assert model.generate.__func__ is type(model).generate
    assert not model.model.layers[0].mlp.down_proj.weight.is_contiguous()
    assert engine.generate(IDS, max_new_tokens=COUNT).sequences[0, 8:].tolist() == greedy()
    detach(model)
    assert_restored(model, before)
    # An engine outlives that: it prepares the model again.
    assert engine.generate(IDS, max_new_tokens=COUNT).sequences[0, 8:].tolist() == greedy()


def test_transformers_goes_on_working_with_a_prepared_model(tmp_path):
    model = tiny("llama3")
    Engine(model, MATCH)
    assert model.generate(IDS, max_new_tokens=COUNT)[0, 8:].tolist() == greedy()
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, value), (_, wanted) in zip(saved.named_parameters(), plain().named_parameters()):
        assert torch.equal(value, wanted) and value.stride() == wanted.stride(), name


@pytest.mark.parametrize("nonsense", [None, object(), "llama", nn.Linear(3, 3)], ids=["None", "object", "str", "module"])
def test_attach_to_nonsense(nonsense):
    with pytest.raises(TypeError, match="^model: expected a transformers causal language model, got"):
        attach(nonsense)
