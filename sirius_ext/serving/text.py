"""Text out of tokens as they come, up to the first stop string."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet
CONTEXT = 6  # tokens of the prompt: what a token looks like may depend on the one before it
MOST_PENDING = 8  # tokens that a character can be spread over, and some; what is longer is more than one


def text_after(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """The text of tokens as it goes on after a prompt's. By themselves sentencepiece's would lose the first space."""
    before = list(prompt[-CONTEXT:])
    known, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))
        for ids in (before, [*before, *tokens])
    )
    return whole[len(known) :]


class TextDecoder:
    """The text of a sequence's new tokens, token by token. A character that several tokens share comes with the last of them.

    prompt: the tokens before, of which only the last few are looked at.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Those of a window, the first `known` of which have been given out; `shown` is as much of its text.
        self._tokens = list(prompt[-CONTEXT:])
        self._known, self._shown = len(self._tokens), self._decode()

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        text = self._decode()
        if not text.endswith(UNFINISHED):
            return self._give(text)
        if len(self._tokens) - self._known < MOST_PENDING:
            return ""
        # Every token may end within a character, and a text may have replacement characters of its own. Whatever comes next, the
        # last one may be the beginning of another, and all before it stay what they are.
        new = text[len(self._shown) : -1]
        del self._tokens[:-MOST_PENDING]
        self._known, self._shown = 0, self._decode()[:-1]
        return new

    def rest(self) -> str:
        """What has been held back, at the end of the text."""
        return self._give(self._decode())

    def _decode(self) -> str:
        # Cleaning up spaces would change what has been given out.
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _give(self, text: str) -> str:
        new = text[len(self._shown) :]
        del self._tokens[: self._known]
        self._known, self._shown = len(self._tokens), self._decode()
        return new


class Answer:
    """A text that ends before the first of its stop strings.

    pieces: what each token added to the text, in order.
    stopped: a stop string has been found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Iterable[str] = ()) -> None:
        self._decoder, self._stops = TextDecoder(tokenizer, prompt), tuple(stops)
        self.pieces: list[str] = []
        self.stopped = False
        self._held = ""  # has not been taken
        self._looked = 0  # of what is held, where no stop string begins

    def add(self, token: int) -> bool:
        """Whether the text ends with this token."""
        self.pieces.append(self._decoder.feed(token))
        self._hold(self.pieces[-1])
        return self.stopped

    def end(self) -> None:
        """There are no more tokens."""
        if not self.stopped:
            self._hold(self._decoder.rest())

    def _hold(self, piece: str) -> None:
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop, self._looked)) >= 0]
        if places:
            self.stopped, self._held = True, self._held[: min(places)]
        self._looked = len(self._held) if self.stopped else self._certain()

    def _certain(self) -> int:
        """Length of what cannot be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        for place in range(max(self._looked, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[place:]) for stop in self._stops):
                return place
        return len(self._held)

    def take(self, ended: bool = False) -> str:
        """What is certain and has not been taken; all of it if the text has ended."""
        end = len(self._held) if ended else self._looked
        text, self._held = self._held[:end], self._held[end:]
        self._looked = 0
        return text


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes, and the bytes: printable ones stand for themselves, the others
    follow from U+0100 on, in order."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in itself]
    found = {chr(byte): byte for byte in itself} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet())
    return found


class TokenNames:
    """What single tokens are called: a text, and the bytes that it stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token: int) -> tuple[str, bytes]:
        """Of a token that is part of a character the bytes are that part, and the text has a replacement character."""
        if token not in self._known:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            self._known[token] = text, self._bytes(token, text)
        return self._known[token]

    def _bytes(self, token: int, text: str) -> bytes:
        if UNFINISHED in text:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            assert isinstance(piece, str)
            if piece.startswith("<0x"):  # as sentencepiece writes a byte
                return bytes([int(piece[3:5], 16)])
            alphabet = _byte_alphabet()
            if all(character in alphabet for character in piece):
                return bytes(alphabet[character] for character in piece)
        return text.encode()
