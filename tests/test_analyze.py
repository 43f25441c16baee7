"""Which tokens F rejects, the oracle, and how they are shown."""

import dataclasses
import json

import pytest
from rich.console import Console
from test_default_model import in_bfloat16, loaded
from test_evaluation import CSQA, write

from sirius_ext import Engine, SiriusConfig
from sirius_ext.cli import evaluation as commands
from sirius_ext.cli import main as cli
from sirius_ext.evaluation import transcript
from sirius_ext.evaluation.analyze import Analysis, Token, Transcript, analyze, summary
from sirius_ext.evaluation.tasks import TASKS, Item, Verdict

ITEM = Item("one", "Where is money kept?\nAnswer Choices: (a) sea (b) bank (c) tree (d) roof (e) shoe", "b")
CONFIG = SiriusConfig(mode="sparse", density=0.3)


def engine():
    return Engine(in_bfloat16(), tokenizer=loaded(in_bfloat16().dtype)[1])


def csqa(right):
    """The task with short answers, and a judge of one's own: (text) -> whether it is right."""
    return dataclasses.replace(TASKS["csqa"], max_new_tokens=10, judge=lambda item, text: Verdict(text, right(text), {}))


def text_of(found):
    return "".join(token.piece for token in found.tokens)


@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
def test_an_oracle_that_replaces_all_writes_the_full_models_text(sparsity):
    """With a threshold of 1, every token that F would not have chosen is rejected."""
    config = dataclasses.replace(CONFIG, sparsity=sparsity, density=0.1, threshold=1.0)
    judged: list[str] = []  # F's text first

    def is_the_full_models(text):
        judged.append(text)
        return text == judged[0]

    found = analyze(engine(), csqa(is_the_full_models), ITEM, config, 1)
    assert found.full.correct and not found.sparse.correct and found.oracle.correct
    assert found.sparse.count("rejected") and text_of(found.oracle) == text_of(found.full)
    assert judged[0] == found.full.answer and 0 < found.oracle.count("corrected") <= len(found.full.tokens)


@pytest.mark.parametrize("sparsity", ["csparse", "fsparse"])
def test_tokens_of_the_oracle(sparsity):
    config = dataclasses.replace(CONFIG, sparsity=sparsity)
    found = analyze(engine(), csqa(lambda text: False), ITEM, config, 1)
    decoded = Engine(in_bfloat16(), config, loaded(in_bfloat16().dtype)[1])
    task = csqa(lambda text: False)
    inputs = decoded.tokenizer(task.prompt(ITEM, 1), return_tensors="pt")
    out = decoded.generate(**inputs, max_new_tokens=10, do_sample=False, stop_strings=list(task.stop))
    assert text_of(found.sparse) == decoded.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :])
    assert all(token.piece == token.full and not token.rejected and 0 < token.likelihood < 1 for token in found.full.tokens)
    assert found.sparse.count("rejected") > 0 and found.sparse.count("corrected") == 0
    for token in found.sparse.tokens:
        assert token.rejected == (token.likelihood < 0.1 and token.piece != token.full)
    first = next(i for i, token in enumerate(found.sparse.tokens) if token.rejected)
    assert found.oracle.tokens[:first] == found.sparse.tokens[:first]
    assert found.oracle.tokens[first].piece == found.sparse.tokens[first].full and found.oracle.tokens[first].corrected
    assert found.oracle.count("rejected") == 0 and not any(t.piece != t.full for t in found.oracle.tokens if t.corrected)


def test_nothing_to_correct():
    right = analyze(engine(), csqa(lambda text: True), ITEM, CONFIG, 1)
    assert right.oracle == right.sparse
    lenient = analyze(engine(), csqa(lambda text: False), ITEM, dataclasses.replace(CONFIG, threshold=0.0), 1)
    assert lenient.oracle == lenient.sparse and lenient.sparse.count("rejected") == 0


def test_an_item_that_fails():
    long = dataclasses.replace(ITEM, question="Where is it? " * 4000)
    found = analyze(engine(), TASKS["csqa"], long, CONFIG, 0)
    assert "prompt: it has" in found.error and found.sparse is None


def made_up():
    def text(correct, *tokens):
        return Transcript(tokens, "b", correct)

    plain, odd = Token("a <b>", 0.9, "a <b>", False), Token(" sea", 0.01, " bank", True)
    fixed = Token(" bank", 0.8, " bank", False, corrected=True)
    return [
        Analysis("x", "?", "b", text(True, plain), text(False, plain, odd, odd), text(True, plain, fixed)),
        Analysis("y", "?", "c", text(False, plain), text(False, plain), text(False, plain)),
        Analysis("z", "?", "c", error="ValueError: no room"),
    ]


def test_summary():
    found = summary(made_up())
    assert (found["items"], found["failed"], found["recovered"]) == (3, 1, 1)
    assert (found["full"], found["sparse"], found["oracle"]) == (1, 0, 1)
    assert found["rejected_fraction"] == 2 / 4 and found["corrected_fraction"] == 1 / 3
    assert found["corrected_fraction_of_recovered"] == 1 / 2
    assert summary([made_up()[2]])["corrected_fraction"] is None


def test_shown():
    console = Console(width=80, record=True, force_terminal=True, color_system="standard")
    for analysis in made_up():
        transcript.show(analysis, console)
    transcript.show_summary(made_up(), console)
    text = console.export_text(styles=True)
    assert "\x1b[37;41m sea\x1b[0m" in text and "\x1b[30;42m bank\x1b[0m" in text
    assert "recovered by corrections: 1 of 2" in text and "failed: ValueError: no room" in text
    page = transcript.page(made_up(), "a & b")
    assert '<span class="rejected" title="p = 0.010; F: &#x27; bank&#x27;"> sea</span>' in page
    assert '<span class="corrected"' in page and "a &lt;b&gt;" in page
    assert "<title>a &amp; b</title>" in page and "http" not in page


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "csqa", dataclasses.replace(TASKS["csqa"], max_new_tokens=5))
    write("csqa", tmp_path, [{**CSQA, "id": str(i)} for i in range(3)])
    out, record = tmp_path / "out.html", tmp_path / "out.json"
    arguments = ["analyze", "--task", "csqa", "--data", str(tmp_path), "--shots", "1", "--out", str(out), "--json", str(record)]
    assert cli.main([*arguments, "--items", "2"]) == 0
    shown = capsys.readouterr()
    assert "tokens of S that F rejects" in shown.out and out.read_text().endswith("</html>\n")
    assert "1/1" in shown.err and "1/1" not in shown.out  # the bar
    (item,) = json.loads(record.read_text())["items"]
    assert item["item"] == "2" and item["sparse"]["tokens"][0]["likelihood"] > 0
    assert cli.main([*arguments, "--items", "7"]) == 2
    assert "--items: csqa has no 7; its first ids are 0, 1, 2" in capsys.readouterr().err


def test_what_a_stopped_run_leaves(tmp_path, monkeypatch):
    write("csqa", tmp_path, [{**CSQA, "id": str(i)} for i in range(3)])
    out, record, known = tmp_path / "out.html", tmp_path / "out.json", iter(made_up())

    def stopped_after_the_first(*_):
        if record.exists():
            raise KeyboardInterrupt
        return next(known)

    monkeypatch.setattr(commands, "analyze", stopped_after_the_first)
    arguments = ["analyze", "--task", "csqa", "--data", str(tmp_path), "--shots", "0", "--out", str(out), "--json", str(record)]
    assert cli.main(arguments) == 130
    assert out.read_text().endswith("</html>\n") and len(json.loads(record.read_text())["items"]) == 1
