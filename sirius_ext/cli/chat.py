"""A conversation in the terminal. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..config import SPARSITIES, SiriusConfig
from ..decoding.sequence import Sequence
from ..decoding.stats import PromptStats, Stats
from ..engine import Engine, encode_messages, engine_of
from ..errors import reason, write_text
from ..serving.text import Answer
from .options import MODE_CHOICES, generator_of
from .reading import reading
from .terminal import Console

ROLES = ("system", "user", "assistant")
HELP = """\
/mode [MODE]   how the next answers are decoded: full, csparse, fsparse, cascade or sirius
/stats         what was counted, answer by answer
/save FILE     write the conversation as JSON, which --messages reads
/reset         begin anew
/help          this
/exit          leave, as Ctrl-D does
Ctrl-C ends an answer; what there is of it stays in the conversation."""

Messages = list[dict[str, str]]


def run(options: argparse.Namespace, config: SiriusConfig, sampling: dict[str, Any]) -> int:
    messages = [] if options.messages is None else read_messages(options.messages)
    if options.system is not None:
        if messages and messages[0]["role"] == "system":
            raise ValueError("system: the conversation of --messages begins with such a message already")
        messages.insert(0, {"role": "system", "content": options.system})
    engine = engine_of(options, config)
    encode_messages(engine.tokenizer, [{"role": "user", "content": "Hello"}])  # raises if the model cannot chat
    settings = {"max_new_tokens": options.max_new_tokens, "generator": generator_of(options), **sampling}
    Chat(engine, config, messages, settings).talk()
    return 0


def read_messages(file: Path) -> Messages:
    """A conversation that `/save` has written. ValueError for what is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"messages: {file} is not JSON text: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"messages: expected a list of messages, got {type(found).__name__} in {file}")
    for place, message in enumerate(found):
        right = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not right or message["role"] not in ROLES or not isinstance(message["content"], str):
            expected = f"an object with a role ({', '.join(ROLES)}) and a content, a string"
            raise ValueError(f"messages: expected {expected}, got {json.dumps(message)[:80]} as number {place + 1} in {file}")
    return found


class Chat:
    """A conversation: what has been said, and how answers are decoded. The cache of what was said is kept, decoded tokens
    included, so that each turn reads only what is new.

    settings: of every call.
    """

    def __init__(self, engine: Engine, config: SiriusConfig, messages: Messages, settings: dict[str, Any]) -> None:
        self.engine, self.config, self.messages = engine, config, messages
        self.answers: list[PromptStats] = []
        self._begin = [message for message in messages[:1] if message["role"] == "system"]
        self._base, self._settings = config, settings
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)

    def talk(self) -> None:
        """Until there is nothing more to read, or /exit."""
        interactive = sys.stdin is not None and sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401 - lets `input` edit its line

            self._note("/help lists commands; Ctrl-D ends")
        while True:
            try:
                line = input("> ") if interactive else _next_line()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self._note("\nCtrl-D or /exit leaves")
                continue
            if line.strip() == "/exit":
                break
            try:
                if line.startswith("/"):
                    self._command(*line[1:].strip().split(maxsplit=1))
                elif line.strip():
                    self.say(line)
            except (ValueError, OSError) as error:
                self._note(f"error: {reason(error)}", "red")
            except KeyboardInterrupt:  # before the answer began, or after its end
                self._note("\ninterrupted")

    def say(self, text: str) -> None:
        """Say something and stream the answer. ValueError if the model cannot answer; then nothing was said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        inputs = encode_messages(self.engine.tokenizer, asked)
        sequence = self._start(inputs["input_ids"])
        answer, content = Answer(self.engine.tokenizer, inputs["input_ids"][0].tolist()), []
        try:
            with reading(inputs["input_ids"].shape[1]) as progress:
                while not sequence.ended:
                    for token in sequence.step(progress).tokens:
                        answer.add(token)
                    content.append(answer.take())
                    print(content[-1], end="", flush=True)
        except KeyboardInterrupt:
            sequence.cancel()
        answer.end()
        content.append(answer.take(ended=True))
        print(content[-1], flush=True)
        if sequence.tokens:
            self.messages = [*asked, {"role": "assistant", "content": "".join(content)}]
            self.answers.append(sequence.stats)
            self._note(status(sequence.stats))
        else:
            self._note("no answer; nothing was said")

    def _start(self, ids: torch.Tensor) -> Sequence:
        try:
            return self.engine.start(ids, torch.ones_like(ids), config=self.config, reuse_decoded=True, **self._settings)
        except ValueError as error:
            if str(error).startswith("input_ids: "):
                raise ValueError(f"the conversation is too long ({str(error)[11:]}); /reset begins anew") from error
            raise

    # ---------------------------------------------------------------------------------------------------------------- commands

    def _command(self, name: str = "", value: str = "") -> None:
        commands = {"help": self._help, "reset": self._reset, "save": self._save, "stats": self._stats, "mode": self._mode}
        if name not in commands:
            raise ValueError(f"/{name}: expected one of {', '.join('/' + each for each in (*commands, 'exit'))}")
        commands[name](value.strip())

    def _help(self, _: str) -> None:
        self._note(HELP)

    def _reset(self, _: str) -> None:
        self.messages = list(self._begin)
        self.answers.clear()
        self._note("the conversation begins anew")

    def _save(self, file: str) -> None:
        if not file:
            raise ValueError("/save: expected a file's name")
        write_text(file, json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n")
        self._note(f"{len(self.messages)} messages written to {file}")

    def _mode(self, mode: str) -> None:
        if mode:
            self.config = mode_of(self._base, mode)
        config = self.config
        self._note(f"mode {config.sparsity if config.mode == 'sparse' else config.mode}")

    def _stats(self, _: str) -> None:
        if not self.answers:
            raise ValueError("/stats: there is no answer yet")
        table = Table(padding=(0, 1))
        for column in ("", "mode", "prompt", "cached", "wait, s", "tokens", "tokens/s", "AAL", "density"):
            table.add_column(column, justify="right")
        for number, stats in enumerate(self.answers, 1):
            table.add_row(
                str(number),
                stats.mode,
                str(stats.prompt_tokens),
                str(stats.reused_tokens),
                f"{stats.prefill_seconds:.2f}",
                str(stats.tokens),
                _shown(_speed(stats), ".1f"),
                _shown(stats.average_advance_length, ".2f"),
                _shown(stats.effective_density, ".3f"),
            )
        self._console.print(table)
        pooled = Stats(self.answers)
        if pooled.average_advance_length is not None:
            corrected = f"{pooled.corrected_fraction:.1%} of {sum(period.committed for period in pooled.periods)} tokens"
            self._note(f"together: AAL {pooled.average_advance_length:.2f}, corrected {corrected}")

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False)


def mode_of(base: SiriusConfig, mode: str) -> SiriusConfig:
    """The settings with another mode, as the command line has it. ValueError if they do not go with it."""
    if mode not in MODE_CHOICES:
        raise ValueError(f"/mode: expected one of {', '.join(MODE_CHOICES)}, got {mode}")
    if mode not in SPARSITIES:
        return dataclasses.replace(base, mode=mode)
    # Thresholds were made for fsparse alone.
    thresholds = base.thresholds if mode == "fsparse" else None
    return dataclasses.replace(base, mode="sparse", sparsity=mode, thresholds=thresholds)


def status(stats: PromptStats) -> str:
    """One line on an answer."""
    parts = []
    if (speed := _speed(stats)) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    if stats.average_advance_length is not None:
        parts.append(f"AAL {stats.average_advance_length:.2f}")
        parts.append(f"effective density {stats.effective_density:.3f}")
    share = stats.reused_tokens / stats.prompt_tokens
    parts.append(f"{share:.0%} of {stats.prompt_tokens} prompt tokens were in the cache")
    return ", ".join(parts)


def _speed(stats: PromptStats) -> float | None:
    """Tokens per second after the first, which belongs to the prompt."""
    return (stats.tokens - 1) / stats.decode_seconds if stats.decode_seconds and stats.tokens > 1 else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _next_line() -> str:
    """Of a text that is not typed. EOFError at its end, ValueError for bytes that are no text."""
    line = "" if sys.stdin is None else sys.stdin.readline()
    if not line:
        raise EOFError
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError("standard input: expected UTF-8 text") from error
    return line.rstrip("\n")
