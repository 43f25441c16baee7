"""Text out of tokens: characters that lie across tokens, stop strings that lie across anything."""

import pytest
import served
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from sirius_ext.serving.text import Answer, TextDecoder, TokenNames

TOKENIZER = served.tokenizer()
TEXT = "Ahé, 日本語 — 🎉👩‍🔬 the thing;\n\n ﷽ e\u0301 in there"
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=60)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


@given(texts)
def test_pieces_are_the_text(text):
    """Each character comes whole, with its last token."""
    decoder = TextDecoder(TOKENIZER)
    pieces = [decoder.feed(token) for token in ids(text)]
    assert "".join(pieces) == text and decoder.rest() == ""
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_with_its_last_token():
    decoder = TextDecoder(TOKENIZER)
    assert [decoder.feed(token) for token in ids("é日🎉")] == ["", "é", "", "", "日", "", "", "", "🎉"]


OWN = "﷽é👩‍🔬﷽🎉\ufffd\ufffd🎉\ufffd👩‍🔬"


@example(OWN)
@given(st.text("\ufffdé﷽🎉a", max_size=30))
def test_replacement_characters_of_the_texts_own(text):
    """They look as a character does that is not whole yet. What comes after them is whole, too, and nothing waits for long."""
    decoder = TextDecoder(TOKENIZER)
    pieces = [decoder.feed(token) for token in ids(text)]
    assert "".join(pieces) + decoder.rest() == text and decoder.rest() == ""
    for start in range(len(pieces) - 8):
        assert any(pieces[start : start + 8])


def test_tokens_that_all_end_within_a_character(monkeypatch):
    monkeypatch.setattr(served, "MERGED", ["©Ã"])  # the second byte of é, and the first one
    made, text = served.tokenizer(), "é" * 30
    tokens = made(text, add_special_tokens=False).input_ids
    assert len(tokens) == 31
    decoder = TextDecoder(made)
    pieces = [decoder.feed(token) for token in tokens]
    assert "".join(pieces) == text and all(pieces[8:])


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text(tokens):
    """They are given out all the same, soon and once."""
    decoder = TextDecoder(TOKENIZER)
    pieces = [decoder.feed(token) for token in tokens]
    whole = "".join(pieces) + decoder.rest()
    expected = TOKENIZER.decode(tokens)
    assert whole.replace("\ufffd", "") == expected.replace("\ufffd", "") and decoder.rest() == ""
    for start in range(len(pieces) - 8):
        assert any(pieces[start : start + 8])


def test_a_tokenizer_that_strips_the_first_space():
    """As sentencepiece's: what a word looks like depends on whether one stands before it."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_with_metaspace(), eos_token="</s>", clean_up_tokenization_spaces=True
    )
    one, two = made.convert_tokens_to_ids(["▁one", "▁two"])
    assert made.decode([one]) == "one" and made.decode([one, two]) == "one two"
    decoder = TextDecoder(made, [one])
    assert [decoder.feed(two), decoder.feed(one)] == [" two", " one"]


def _with_metaspace():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "</s>": 2}, unk_token="</s>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


# ------------------------------------------------------------------------------------------------------------ stop strings


def run(text, stops, every):
    """What comes of a text of which `every` tokens join at a time, and the number of tokens until it ended."""
    answer, out, tokens = Answer(TOKENIZER, [], stops), [], ids(text)
    for place, token in enumerate(tokens, 1):
        ended = answer.add(token)
        if ended or place % every == 0:
            out.append(answer.take())
            assert not any(stop in "".join(out) for stop in stops)
        if ended:
            break
    answer.end()
    out.append(answer.take(ended=True))
    return "".join(out), place


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "stops", [["日本"], ["🎉"], ["語 — 🎉", "there"], [" the", "thing"], ["zzz"], ["\n\n"], ["ere"], ["Ahé"]]
)
def test_the_text_ends_before_the_first_stop_string(stops, every):
    cut = min((TEXT.find(stop) for stop in stops if stop in TEXT), default=len(TEXT))
    text, tokens = run(TEXT, stops, every)
    assert text == TEXT[:cut]
    if cut < len(TEXT):
        longest = max(map(len, stops))
        assert tokens <= len(ids(TEXT[: cut + longest]))


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_strings_that_begin_again_and_again(text, stops, every):
    if not text:
        return
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    found, _ = run(text, stops, every)
    if not ends:
        assert found == text
    else:
        first = min(ends)  # the one that is complete first
        assert found == text[: min(text.find(stop) for stop in stops if stop in text[:first])]


def test_what_cannot_be_a_stop_string_is_not_held_back():
    answer = Answer(TOKENIZER, [], ["END"])
    shown = []
    for token in ids("an ENormous END"):
        answer.add(token)
        shown.append(answer.take())
    assert shown[3:6] == ["", "", "ENo"] and "".join(shown) == "an ENormous " and answer.stopped


# ------------------------------------------------------------------------------------------------------------------- names


def test_names_of_tokens():
    names = TokenNames(TOKENIZER)
    for token in ids("é th"):
        text, raw = names.of(token)
        assert raw and (text.encode() == raw or "\ufffd" in text)
    assert b"".join(names.of(token)[1] for token in ids(TEXT)) == TEXT.encode()
    assert names.of(served.VOCAB - 4) == ("<|end|>", b"<|end|>")
