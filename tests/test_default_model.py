"""The default model: a real one, fetched as a user's is. Its text is that of `transformers`, and of our own full model."""

import copy
import dataclasses
import functools
import threading

import pytest
import torch
import transformers

import sirius_ext
from sirius_ext import Engine, SiriusConfig, attach
from sirius_ext.decoding import reference
from sirius_ext.models import hub

COUNT = 16
MATCH = SiriusConfig(accept="match", period=4, density=0.5)
FULL = SiriusConfig(mode="full")
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a small robot who",
    "Water boils at a temperature of",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,",
    "The three primary colours are red,",
    "import numpy as np\n\nx = np.",
    "Photosynthesis is the process by which",
    "Q: Who wrote Hamlet?\nA:",
]
QUESTION = "What is 7 + 5? Answer with the number only."


@functools.cache
def loaded(dtype):
    """bfloat16 as it comes; float32 with the same values, so that the file is converted only once."""
    if dtype == torch.bfloat16:
        return hub.load_model(progress=False)
    model, tokenizer = loaded(torch.bfloat16)
    return copy.deepcopy(model).float(), tokenizer


def in_float32():
    return loaded(torch.float32)[0]


def in_bfloat16():
    return loaded(torch.bfloat16)[0]


def encode(text):
    return loaded(torch.bfloat16)[1](text, return_tensors="pt")


def ask(question):
    """The question in the model's chat template."""
    messages = [{"role": "user", "content": question}]
    tokenizer = loaded(torch.bfloat16)[1]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def new_tokens(sequences, inputs):
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("text", PROMPTS)
def test_match_is_the_text_of_transformers(text):
    inputs, settings = encode(text), {"max_new_tokens": COUNT, "do_sample": False}
    expected = in_float32().generate(**inputs, **settings)
    out = in_float32().generate(**inputs, **settings, custom_generate=sirius_ext.generate, sirius_config=MATCH)
    assert torch.equal(out, expected)


@functools.cache
def match_in_bfloat16(text):
    return Engine(in_bfloat16(), MATCH).generate(**encode(text), max_new_tokens=COUNT)


@pytest.mark.parametrize("text", PROMPTS)
def test_match_is_our_own_full_text_in_bfloat16(text):
    full = Engine(in_bfloat16(), FULL).generate(**encode(text), max_new_tokens=COUNT)
    assert torch.equal(match_in_bfloat16(text).sequences, full.sequences)


def test_drafts_are_accepted_and_rejected():
    """Else the tests above show little."""
    periods = [period for text in PROMPTS for period in match_in_bfloat16(text).stats.periods]
    assert sum(period.accepted for period in periods) > 20
    assert sum(period.accepted < period.drafted for period in periods) > 20
    own = dataclasses.replace(MATCH, draft_weights="same")
    stats = Engine(in_bfloat16(), own).generate(**encode(PROMPTS[0]), max_new_tokens=COUNT).stats
    assert stats.density == pytest.approx(0.70, abs=0.01)  # half of the MLP, which is 59 %
    assert match_in_bfloat16(PROMPTS[0]).stats.density == pytest.approx(0.70 * 0.29, abs=0.01)  # in four bits, with scales


@pytest.mark.parametrize("text", [PROMPTS[0], PROMPTS[4]])
def test_threshold_equals_the_reference(text):
    inputs, config = encode(text), SiriusConfig(period=4, density=0.6, threshold=0.1, draft_weights="same")
    out = Engine(in_float32(), config).generate(**inputs, max_new_tokens=10)
    decoder = reference.Decoder(in_float32())
    tokens, periods = reference.generate(decoder, inputs["input_ids"][0].tolist(), config, 10)
    assert new_tokens(out.sequences, inputs) == tokens
    (stats,) = out.stats.prompts
    assert [(period.drafted, period.accepted) for period in stats.periods] == [
        (period.drafted, period.accepted) for period in periods
    ]
    for period, twin in zip(stats.periods, periods):
        assert period.likelihoods == pytest.approx(twin.likelihoods, rel=1e-2, abs=1e-4)


def test_an_answer_ends_by_itself():
    """At the model's own EOS, in the middle of what was asked for."""
    inputs = ask(QUESTION)
    settings = {"max_new_tokens": 40, "do_sample": False}
    expected = in_float32().generate(**inputs, **settings)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 40
    out = Engine(in_float32(), MATCH).generate(**inputs, **settings)
    assert torch.equal(out.sequences, expected) and out.stats.prompts[0].finish == "eos"


def test_streaming_the_text():
    model, tokenizer = loaded(torch.bfloat16)
    inputs = encode(PROMPTS[2])
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    results = []

    def run():
        results.append(
            model.generate(
                **inputs,
                max_new_tokens=16,
                do_sample=False,
                streamer=streamer,
                custom_generate=sirius_ext.generate,
                sirius_config=MATCH,
            )
        )

    thread = threading.Thread(target=run)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(new_tokens(results[0], inputs))
    assert len([piece for piece in pieces if piece]) > 3


STOP = {"max_new_tokens": 16, "do_sample": False, "stop_strings": ["9,", "22"]}


@functools.cache
def stopped_by_transformers():
    """1, 1, 2, 3, 5, 8, 13, 16, 19,"""
    model, tokenizer = loaded(torch.float32)
    return model.generate(**encode(PROMPTS[4]), **STOP, tokenizer=tokenizer)


def stopped_by_criterion(model, tokenizer, inputs):
    settings = {name: value for name, value in STOP.items() if name != "stop_strings"}
    criteria = [transformers.StopStringCriteria(tokenizer, STOP["stop_strings"])]
    settings |= {"custom_generate": sirius_ext.generate, "sirius_config": MATCH}
    return model.generate(**inputs, **settings, stopping_criteria=criteria)


def stopped_by_custom_generate(model, tokenizer, inputs):
    settings = {**STOP, "custom_generate": sirius_ext.generate, "sirius_config": MATCH}
    return model.generate(**inputs, **settings, sirius_tokenizer=tokenizer)


def stopped_by_custom_generate_with_the_usual_name(model, tokenizer, inputs):
    settings = {**STOP, "custom_generate": sirius_ext.generate, "sirius_config": MATCH}
    return model.generate(**inputs, **settings, tokenizer=tokenizer)


def stopped_by_engine(model, tokenizer, inputs):
    return Engine(model, MATCH, tokenizer).generate(**inputs, **STOP).sequences


def stopped_by_engine_with_a_tokenizer(model, tokenizer, inputs):
    return Engine(model, MATCH).generate(**inputs, **STOP, tokenizer=tokenizer).sequences


def stopped_by_a_generation_config(model, tokenizer, inputs):
    config = transformers.GenerationConfig(**STOP)
    sequences = Engine(model, MATCH, tokenizer).generate(**inputs, generation_config=config).sequences
    assert config.stop_strings == STOP["stop_strings"], "the caller's config is the caller's"
    return sequences


def stopped_by_attach(model, tokenizer, inputs):
    with attach(model, MATCH):
        return model.generate(**inputs, **STOP, tokenizer=tokenizer)


WAYS = [
    stopped_by_criterion,
    stopped_by_custom_generate,
    stopped_by_custom_generate_with_the_usual_name,
    stopped_by_engine,
    stopped_by_engine_with_a_tokenizer,
    stopped_by_a_generation_config,
    stopped_by_attach,
]


@pytest.mark.parametrize("way", WAYS)
def test_stop_strings(way):
    expected, inputs = stopped_by_transformers(), encode(PROMPTS[4])
    assert len(new_tokens(expected, inputs)) < 16
    assert torch.equal(way(*loaded(torch.float32), inputs), expected)


def test_stop_strings_without_a_tokenizer():
    """An error, not a text that does not stop."""
    model, _ = loaded(torch.bfloat16)
    settings = {**STOP, "custom_generate": sirius_ext.generate, "sirius_config": MATCH}
    with pytest.raises(ValueError, match="stop_strings: .*tokenizer"):
        model.generate(**encode(PROMPTS[4]), **settings)
    with pytest.raises(ValueError, match="stop_strings: .*tokenizer"):
        Engine(model, MATCH).generate(**encode(PROMPTS[4]), **STOP)


def test_a_pipeline_on_an_attached_model():
    model, tokenizer = loaded(torch.float32)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = pipe(PROMPTS[8], **settings)
    with attach(model, MATCH) as handle:
        assert pipe(PROMPTS[8], **settings) == expected
        assert handle.stats.tokens == 8
