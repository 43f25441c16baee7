"""Which tokens F rejects in S's text, and the oracle of the paper's Figure 1c: how many of them must be F's own for a right
answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..config import SiriusConfig
from ..decoding.calibrate import load_thresholds
from ..decoding.reading import Reader
from ..decoding.sparsity import sparsity_of
from ..engine import Engine, encode, prepare
from ..serving.text import text_after
from .tasks import Item, Task


@dataclasses.dataclass(frozen=True)
class Token:
    """piece: its text. likelihood: F's, softmax(logits / score_temperature). full: the text of F's own choice. rejected: F finds
    it less likely than the threshold, and would have chosen another. corrected: it is F's own, in place of a rejected one."""

    piece: str
    likelihood: float
    full: str
    rejected: bool
    corrected: bool = False


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A text, what was found in it, and whether that is right."""

    tokens: tuple[Token, ...]
    answer: str | None
    correct: bool

    def count(self, kind: str) -> int:
        return sum(getattr(token, kind) for token in self.tokens)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """full, sparse: each model alone. oracle: S, whose first rejected token is replaced by F's own, and again in what it writes
    then, until the answer is right or no rejected token is left. error: why there is none of them."""

    item: str
    question: str
    expected: str
    full: Transcript | None = None
    sparse: Transcript | None = None
    oracle: Transcript | None = None
    error: str | None = None


def analyze(engine: Engine, task: Task, item: Item, config: SiriusConfig, shots: int) -> Analysis:
    """One item. config: mode "sparse". An item that fails is an `Analysis` with the error."""
    try:
        full, sparse, oracle = _Oracle(engine, task, item, config, shots).run()
    except (ValueError, RuntimeError, MemoryError) as error:
        return Analysis(item.id, item.question, item.answer, error=f"{type(error).__name__}: {error}")
    return Analysis(item.id, item.question, item.answer, full, sparse, oracle)


class _Oracle:
    def __init__(self, engine: Engine, task: Task, item: Item, config: SiriusConfig, shots: int) -> None:
        self.task, self.item, self.config = task, item, config
        model = prepare(engine.model)
        weights = model.weights
        prompt = encode(engine.tokenizer, task.prompt(item, shots), chat=False)["input_ids"][0]
        assert engine.tokenizer is not None  # or `encode` has raised
        self.tokenizer, self.prompt = engine.tokenizer, prompt.tolist()
        self.start, self.limit = len(prompt), min(task.max_new_tokens, weights.context - len(prompt))
        if self.limit < 1:
            raise ValueError(
                f"prompt: it has {len(prompt)} tokens; the model's context holds {weights.context}, one for the answer"
            )
        thresholds = load_thresholds(config.thresholds, weights, config.density_with()) if config.thresholds else None
        capacity = self.start + self.limit
        self.full, self.sparse = Reader(model, capacity), Reader(model, capacity)
        self.full.prefill(prompt)
        self.sparse.prefill(prompt, sparsity_of(config, weights, thresholds))
        eos = engine.model.generation_config.eos_token_id
        self.eos = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    def run(self) -> tuple[Transcript, Transcript, Transcript]:
        """full, sparse and oracle, as `Analysis` has them."""
        found = []
        for reader in (self.full, self.sparse):
            text = self._write(reader, [])
            logarithms, own = self._judged(text, 0)
            transcript = self._transcript(text, logarithms, own)
            found.append(transcript)
        full, sparse = found

        corrections: list[int] = []
        while not transcript.correct:
            at = next((i for i, token in enumerate(transcript.tokens) if token.rejected), None)
            if at is None:
                break
            corrections.append(at)
            before = text[:at]
            text = [*before, int(own[at])]
            self.sparse.back_to(self.start + at)
            self.sparse.score(torch.tensor(text[-1:], dtype=torch.int32))
            text = self._write(self.sparse, text)
            logarithms, own = (torch.cat((old[:at], new)) for old, new in zip((logarithms, own), self._judged(text, at)))
            transcript = self._transcript(text, logarithms, own, corrections)
        return full, sparse, transcript

    def _judged(self, text: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By F, in one pass, from the token `start` on: as `Reader.score`."""
        self.full.back_to(self.start + start)
        return self.full.score(torch.tensor(text[start:], dtype=torch.int32), self.config.score_temperature)

    def _write(self, reader: Reader, text: list[int]) -> list[int]:
        """Go on greedily to the end of the text."""
        text = list(text)
        while not self._ended(text):
            text.append(int(reader.next.argmax()))
            reader.score(torch.tensor(text[-1:], dtype=torch.int32))
        return text

    def _ended(self, text: list[int]) -> bool:
        if len(text) >= self.limit or text and text[-1] in self.eos:
            return True
        decoded = self._text(text, skip_special_tokens=True)
        return self.task.answer_in(decoded) != decoded

    def _transcript(
        self, text: list[int], logarithms: torch.Tensor, own: torch.Tensor, corrections: Sequence[int] = ()
    ) -> Transcript:
        verdict = self.task.judge(self.item, self.task.answer_in(self._text(text, skip_special_tokens=True)))
        judged = zip(text, self._pieces(text), logarithms.exp().tolist(), own.tolist())
        tokens = tuple(
            Token(
                piece=piece,
                likelihood=likelihood,
                full=str(self.tokenizer.decode([choice])),
                rejected=likelihood < self.config.threshold and token != choice,
                corrected=index in corrections,
            )
            for index, (token, piece, likelihood, choice) in enumerate(judged)
        )
        return Transcript(tokens, verdict.answer, verdict.correct)

    def _text(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return text_after(self.tokenizer, self.prompt, tokens, skip_special_tokens)

    def _pieces(self, text: list[int]) -> list[str]:
        """What each token adds to the decoded text; one that ends inside a character adds it with the next."""
        pieces, done = [], ""
        for count in range(1, len(text) + 1):
            decoded = self._text(text[:count])
            whole = count == len(text) or not decoded.endswith("\ufffd")
            pieces.append(decoded[len(done) :] if whole else "")
            done = decoded if whole else done
        return pieces


def summary(analyses: Sequence[Analysis]) -> dict[str, Any]:
    """items, failed; right answers of full, sparse and oracle; recovered: of those that S alone got wrong, the oracle right; the
    fraction of S's tokens that F rejects, and of the oracle's tokens that are corrected: over all texts, and over recovered
    ones."""
    known = [
        {"full": each.full, "sparse": each.sparse, "oracle": each.oracle}
        for each in analyses
        if each.full and each.sparse and each.oracle
    ]
    recovered = [each for each in known if each["oracle"].correct and not each["sparse"].correct]

    def fraction(texts: list[Transcript], kind: str) -> float | None:
        total = sum(len(text.tokens) for text in texts)
        return sum(text.count(kind) for text in texts) / total if total else None

    return {
        "items": len(analyses),
        "failed": len(analyses) - len(known),
        **{name: sum(each[name].correct for each in known) for name in ("full", "sparse", "oracle")},
        "recovered": len(recovered),
        "rejected_fraction": fraction([each["sparse"] for each in known], "rejected"),
        "corrected_fraction": fraction([each["oracle"] for each in known], "corrected"),
        "corrected_fraction_of_recovered": fraction([each["oracle"] for each in recovered], "corrected"),
    }
