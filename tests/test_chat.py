"""The chat in the terminal: what is said, what is kept, what is read again, and Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
import served

from sirius_ext import Engine, SiriusConfig
from sirius_ext.cli import chat as module
from sirius_ext.cli.chat import Chat, read_messages, status
from sirius_ext.cli.main import main
from sirius_ext.config import GREEDY

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = [sys.executable, "-m", "sirius_ext", "chat"]


def made(messages=(), count=12, config=served.CONFIG):
    return Chat(Engine(served.model(), config, served.tokenizer()), config, list(messages), {"max_new_tokens": count, **GREEDY})


def test_each_turn_reads_only_what_is_new(capsys):
    """Ten of them: what is read is what was said since, whatever the number of the turn."""
    chat = made()
    for turn in range(10):
        chat.say(f"thing {turn}")
    read = [stats.prompt_tokens - stats.reused_tokens for stats in chat.answers]
    # The answer's last token, and "<|end|><|user|>thing N<|end|><|assistant|>".
    assert read[1:] == [1 + 4 + len("thing N") - len("th") - len("in") + 2] * 9, read
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 10
    assert capsys.readouterr().out.splitlines() == [message["content"] for message in chat.messages[1::2]]


def test_an_answer_is_the_engines(capsys):
    chat = made([{"role": "system", "content": "be the thing"}])
    chat.say("hello")
    asked = [{"role": "system", "content": "be the thing"}, {"role": "user", "content": "hello"}]
    tokenizer = served.tokenizer()
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    out = Engine(served.model(), served.CONFIG).generate(ids, max_new_tokens=12, **GREEDY)
    text = tokenizer.decode(out.sequences[0, ids.shape[1] :])
    shown = capsys.readouterr()
    assert shown.out == text + "\n" and chat.messages[-1] == {"role": "assistant", "content": text}
    assert f"AAL {out.stats.average_advance_length:.2f}, effective density {out.stats.effective_density:.3f}" in shown.err
    assert f"0% of {ids.shape[1]} prompt tokens were in the cache" in shown.err


def test_an_interrupt_ends_the_answer(capsys, monkeypatch):
    """What there is of it stays, and the next turn goes on after it. Before the first token nothing was said."""
    chat = made(count=100)
    step, left = module.Sequence.step, 3

    def interrupted(self, *progress):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return step(self, *progress)

    monkeypatch.setattr(module.Sequence, "step", interrupted)
    chat.say("hello")
    first = chat.messages[1]["content"]
    assert 1 <= len(first) < 20 and chat.answers[0].finish == "cancelled"
    chat.say("nobody answers")
    assert len(chat.messages) == 2 and "nothing was said" in capsys.readouterr().err
    left = 1000
    chat.say("go on")
    assert len(chat.messages) == 4 and chat.answers[1].reused_tokens > chat.answers[0].prompt_tokens


def talk(monkeypatch, chat, *lines):
    said = iter(lines)
    monkeypatch.setattr(module, "_next_line", lambda: next(said))
    with pytest.raises(StopIteration):
        chat.talk()


def test_commands(monkeypatch, capsys, tmp_path):
    file = tmp_path / "said.json"
    chat = made([{"role": "system", "content": "be"}])
    talk(
        monkeypatch, chat, "/help", "/stats", "hello", "/mode", "/mode full", "hello", "/stats", "/mode warp", "/what",
        f"/save {file}", "/save", f"/save {tmp_path}/no/where", "/mode csparse", "/mode", "/reset", "", "hello",
    )  # fmt: skip
    err = capsys.readouterr().err
    for shown in (
        "/mode [MODE]", "/stats: there is no answer yet", "mode sirius", "mode full", "cached", "together: AAL",
        "/mode: expected one of full, csparse, fsparse, cascade, sirius, got warp", "/what: expected one of /help, /reset, /save",
        f"5 messages written to {file}", "/save: expected a file's name", "No such file", "mode csparse", "begins anew",
    ):  # fmt: skip
        assert shown in err, shown
    assert [message["role"] for message in json.loads(file.read_text())] == ["system", "user", "assistant", "user", "assistant"]
    assert read_messages(file)[0] == {"role": "system", "content": "be"}
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert [stats.mode for stats in chat.answers] == ["sparse"]


def test_a_conversation_that_is_too_long(monkeypatch, capsys):
    chat = made(count=3)
    talk(monkeypatch, chat, "hello", "x" * 600, "hello")
    assert "the conversation is too long (prompt 0 has" in (err := capsys.readouterr().err) and "/reset begins anew" in err
    assert len(chat.messages) == 4, "nothing was said"


@pytest.mark.parametrize(
    ("content", "error"),
    [("{", "is not JSON"), ("{}", "expected a list"), ('[{"role": "x", "content": "y"}]', "expected an object with a role")],
)
def test_messages_that_are_none(tmp_path, capsys, content, error):
    file = tmp_path / "file"
    file.write_text(content)
    assert main(["chat", "--messages", str(file)]) == 2
    assert capsys.readouterr().err.startswith("sirius_ext: error: --messages: ") and error in content + error


def test_a_status_of_one_token():
    chat = made(count=1, config=SiriusConfig(mode="full"))
    chat.say("hello")
    assert status(chat.answers[0]).startswith("0% of ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save(tmp_path_factory.mktemp("chat") / "tiny")


def test_in_a_terminal(folder):
    """A line is asked for, an answer comes, Ctrl-C ends it, and the conversation goes on until Ctrl-D."""
    ours, theirs = pty.openpty()
    options = ["--model", str(folder), "--period", "4", "--threads", "1", "--max-new-tokens", "450", "--system", "the"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*COMMAND, *options], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def until(text):
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 120)[0], seen
            try:
                seen += os.read(ours, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(seen) from None
        seen = seen.partition(text)[2]

    try:
        until("> ")
        os.write(ours, b"hello\n")
        until("hello\r\n")
        process.send_signal(signal.SIGINT)
        until("> ")
        os.write(ours, b"again\n")
        until("prompt tokens were in the cache")
        until("> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
