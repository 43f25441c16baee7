"""A reader's scores are those of `transformers`; S reads as it decodes."""

import pytest
import torch
from tiny import NAMES, prompt, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.decoding.reading import ROWS, Reader
from sirius_ext.decoding.sparsity import sparsity_of
from sirius_ext.engine import prepare

LONG = ROWS + 20


@pytest.mark.parametrize("name", NAMES)
def test_full(name):
    model = tiny(name)
    text = prompt(LONG + 7)
    with torch.no_grad():
        logits = model(text).logits[0]
    reader = Reader(prepare(model), LONG + 7)
    reader.prefill(text[0, :7])
    scores, likeliest = reader.score(text[0, 7:].int(), temperature=0.6)
    expected = torch.log_softmax(logits / 0.6, -1)[6:-1].gather(-1, text[0, 7:, None])[:, 0]
    torch.testing.assert_close(scores, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(likeliest, logits[6:-1].argmax(-1))
    torch.testing.assert_close(reader.next, logits[-1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("sparsity", ["csparse", "fsparse", "cascade"])
def test_what_a_model_decodes_is_what_it_finds_likeliest(mode, sparsity):
    model = tiny()
    config = SiriusConfig(mode=mode, sparsity=sparsity, density=0.4)
    asked = prompt(9)
    text = Engine(model, config).generate(asked, max_new_tokens=LONG, do_sample=False).sequences[0, 9:].int()
    weights = prepare(model).weights
    reader = Reader(prepare(model), 9 + LONG)
    for _ in range(2):
        reader.prefill(asked[0], sparsity_of(config, weights) if mode == "sparse" else None)
        assert torch.equal(reader.score(text)[1], text.long())


def test_back_to():
    model = tiny()
    reader = Reader(prepare(model), 40)
    reader.prefill(prompt(8)[0])
    tokens = prompt(12)[0].int()
    behind, (scores, _) = [reader.next], reader.score(tokens)
    for length in (20, 13, 8):
        reader.back_to(length)
        assert len(reader.tokens) == length
        again, _ = reader.score(tokens[length - 8 :])
        assert torch.equal(again, scores[length - 8 :])
        behind.append(reader.next)
    assert torch.equal(behind[1], behind[2]) and torch.equal(behind[2], behind[3]) and not torch.equal(behind[0], behind[1])
    assert [len(part) for part in reader.score(tokens[:0])] == [0, 0]
    for length in (7, 21):
        with pytest.raises(ValueError, match="^length: expected 8 to 20"):
            reader.back_to(length)
    with pytest.raises(ValueError, match="^tokens: there is room for 40, got 41"):
        reader.score(torch.zeros(21, dtype=torch.int32))
    with pytest.raises(ValueError, match="^tokens: there is room for 40, got 41"):
        reader.prefill(torch.zeros(41, dtype=torch.int64))
