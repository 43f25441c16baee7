"""The evaluation suite: tasks, judging, the sandbox, results that survive being stopped, and a run on the default model."""

import contextlib
import dataclasses
import errno
import fcntl
import gzip
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import served
import tokenizers
import torch
import transformers
from rich.console import Console

from sirius_ext import Engine, SiriusConfig, evaluation
from sirius_ext.cli import main as cli
from sirius_ext.decoding.stats import PromptStats
from sirius_ext.engine import prepare
from sirius_ext.evaluation import runner
from sirius_ext.evaluation.modes import config_of
from sirius_ext.evaluation.plan import Plan
from sirius_ext.evaluation.results import Results, claimed, merge, read_results, show_table, summarize
from sirius_ext.evaluation.sandbox import run_code
from sirius_ext.evaluation.statistics import mcnemar, wilson
from sirius_ext.evaluation.tasks import TASKS, Item, load_task, rouge1

CSQA = {
    "answerKey": "B",
    "id": "one",
    "question": {
        "choices": [{"label": label, "text": text} for label, text in zip("ABCDE", ["sea", "bank", "tree", "roof", "shoe"])],
        "stem": "Where is money kept?",
    },
}
FILES = {
    "gsm8k": [{"question": "What is 20 + 1,020?", "answer": "20 + 1,020 = 1,040\n#### 1,040"}],
    "aqua": [{"question": "1 + 1?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "correct": "B"}],
    "csqa": [CSQA],
    "mbpp": [
        {
            "text": "Write a function to double.",
            "code": "",
            "task_id": 7,
            "test_setup_code": "",
            "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
        }
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": "def double(x):\n",
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        }
    ],
    "svamp": [{"ID": "chal-1", "Body": "A pen costs 2 dollars", "Question": "What do 3 cost?", "Answer": 6.0}],
    "strategyqa": [{"qid": "a", "question": "Is water wet?", "answer": True}],
    "date": {"examples": [{"input": "Today is 01/02/2003. Tomorrow?", "target_scores": {"01/03/2003": 1, "01/04/2003": 0}}]},
    "sports": {"examples": [{"input": "Pele hit a home run", "target_scores": {"plausible": 0, "implausible": 1}}]},
    "mmlu_cot": "What is H2O?,gold,water,air,salt,B\n",
    "truthfulqa": "Question,Best Answer,Correct Answers,Incorrect Answers\nFlat?,It is round,It is round; A ball,It is flat\n",
}


def write(name, data, content=None):
    """The task's file with these lines, or the ones above."""
    content = FILES[name] if content is None else content
    path = data / TASKS[name].path
    if name == "mmlu_cot":
        path = path / "test" / "chemistry_test.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = name in ("gsm8k", "aqua", "csqa", "mbpp", "humaneval")
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


RIGHT = {
    "gsm8k": " They are 1040. The answer is 1,040.",
    "svamp": " 3 * 2 = 6. The answer is $6.00.",
    "aqua": " It is 2. The answer is (b).",
    "csqa": " In a bank. The answer is (b).",
    "strategyqa": " Yes. The answer is yes.",
    "date": " The answer is 01/03/2003.",
    "sports": " The answer is no.",
    "humaneval": "    return x + x\n",
    "mbpp": "def double(x):\n    return x + x\n",
    "mmlu_cot": " The answer is (b).",
    "truthfulqa": " It is a round ball.",
}
WRONG = {
    "gsm8k": " The answer is 104.",
    "svamp": " The answer is 66.",
    "aqua": " The answer is (a).",
    "csqa": " I think (b) may be it.",
    "strategyqa": " The answer is no.",
    "date": " The answer is 03/01/2003.",
    "sports": " The answer is yes.",
    "humaneval": "    return x\n",
    "mbpp": "def double(x):\n    return x\n",
    "mmlu_cot": "",
    "truthfulqa": " It is flat.",
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name, tmp_path):
    write(name, tmp_path)
    task, (item,) = load_task(name, tmp_path)
    assert task.judge(item, RIGHT[name]).correct
    assert not task.judge(item, WRONG[name]).correct
    prompts = [task.prompt(item, count) for count in range(task.max_shots + 1)]
    assert all(len(prompts[i]) < len(prompts[i + 1]) and prompts[i + 1].endswith(prompts[0]) for i in range(task.max_shots))
    assert item.question in prompts[0] and task.max_shots == 0 or not any(stop in RIGHT[name] for stop in task.stop)


@pytest.mark.parametrize("name", TASKS)
def test_bad_data(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^data: no {TASKS[name].path}"):
        load_task(name, tmp_path)
    path = write(name, tmp_path, '{"half": ' if name not in ("mmlu_cot", "truthfulqa") else "a,b\n1,2\n")
    with pytest.raises(ValueError, match="^data: .*item 1 is malformed"):
        load_task(name, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="^task: expected one of gsm8k"):
        load_task("chess", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("csqa", b"\xff\n"), ("csqa", b"[]\n"), ("humaneval", b"no gzip"), ("truthfulqa", b"Question\n\x00\n")],
)
def test_bytes_that_are_no_data(name, content, tmp_path):
    write(name, tmp_path).write_bytes(content)
    with pytest.raises(ValueError, match="^data: .*item 1 is malformed"):
        load_task(name, tmp_path)


def test_a_compressed_file_that_is_cut_off(tmp_path):
    path = write("humaneval", tmp_path, FILES["humaneval"] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="^data: .*is malformed .EOFError"):
        load_task("humaneval", tmp_path)


def test_the_examples_are_judged_right():
    """Each answer in the prompts is one that the task's own rule reads."""
    for name in ("gsm8k", "aqua", "csqa", "strategyqa", "date", "sports", "mmlu_cot"):
        task = TASKS[name]
        item = evaluation.tasks.Item("", "?", "")
        prompt = task.prompt(item, task.max_shots)
        for example in prompt.split("\n\nQ: "):
            if example.strip() not in ("?\nA:", "Q: ?\nA:"):
                assert task.judge(item, example).answer is not None, example


def test_strict_and_flexible(tmp_path):
    write("gsm8k", tmp_path)
    task, (item,) = load_task("gsm8k", tmp_path)
    verdict = task.judge(item, " It is 1040")
    assert verdict.scores == {"strict": False, "flexible": True} and not verdict.correct
    verdict = task.judge(item, " The answer is 1040. Then 3 more")
    assert verdict.scores == {"strict": True, "flexible": False} and verdict.correct
    verdict = task.judge(item, " The answer is 1040.Human: What is 1 + 1?\nA: The answer is 2.")
    assert verdict.correct and verdict.answer == "1040"


LETTERS = {"(b).": "b", "b": "b", "B because": "B", ": (c)": "c", "b, a bank": "b", "b\nQ: ": "b", "(a) bank": "a", "b)": "b"}
LETTERS |= dict.fromkeys(("a bank", "bank", "Bank", "a river bank."))


@pytest.mark.parametrize(("said", "letter"), LETTERS.items())
def test_a_letter_and_not_an_article(tmp_path, said, letter):
    write("csqa", tmp_path)
    task, (item,) = load_task("csqa", tmp_path)
    verdict = task.judge(item, f" In a bank. The answer is{said if said.startswith(':') else f' {said}'}")
    assert verdict.answer == letter and verdict.correct == (letter in ("b", "B"))


def test_a_number_that_no_float_holds(tmp_path):
    """What a model says that repeats a digit to its last token is wrong, and no reason to stop."""
    write("gsm8k", tmp_path)
    task, (item,) = load_task("gsm8k", tmp_path)
    for number in ("9" * 400, "-" + "9" * 400, "9" * 400 + ".5"):
        verdict = task.judge(item, f" The answer is {number}.")
        assert verdict.answer in ("inf", "-inf") and verdict.scores == {"strict": False, "flexible": False}


def test_code_keeps_its_first_space(tmp_path):
    """Of a tokenizer that strips the first one of a text, as sentencepiece's do: an answer is not the beginning of one."""
    words = ["▁def", "▁double(x):\n", "▁▁▁▁x", "▁*=", "▁2\n▁▁▁▁return", "▁x\n"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}))
    made.decoder = tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    write("humaneval", tmp_path)
    task, (item,) = load_task("humaneval", tmp_path)
    stats = PromptStats("full", 1, 1.0, 2)
    text = SimpleNamespace(tokens=[2, 3, 4, 5], request=SimpleNamespace(prompt=torch.tensor([0, 1])), run=lambda: stats)
    found = runner._judged(tokenizer, task, item, lambda: text)
    assert found["text"] == "    x *= 2\n    return x\n" and found["correct"], found


def test_rouge1():
    assert rouge1("the cat sat", "The cat, sat!") == 1
    assert rouge1("a b", "b c") == 0.5
    assert rouge1("", "x") == 0


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("x = 1", "passed"),
        ("assert False, 'no'", "AssertionError: no"),
        ("raise SystemExit(3)", "exit status 3"),
        ("exit()\nassert False", "RuntimeError: it exits before the end"),
        ("import sys\nsys.exit(0)", "RuntimeError: it exits before the end"),
        ("while True: pass", "timeout"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("import socket; socket.socket()", "PermissionError: socket.__new__ is not allowed here"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen is not allowed here"),
        ("import os; os.fork()", "PermissionError: os.fork is not allowed here"),
        ("open('big', 'wb').write(bytes(2 << 20))", "OSError: [Errno 27] File too large"),
        ("import os; assert not os.listdir('.') and __name__ == 'answer'", "passed"),
        ("def", "SyntaxError: invalid syntax"),
    ],
)
def test_sandbox(code, outcome):
    assert run_code(code, seconds=2) == outcome


def test_the_sandbox_takes_no_memory_of_ours():
    """Whatever is written to standard error meanwhile, of which a pipe takes gigabytes in a second."""
    code = "import re; from pathlib import Path; from sirius_ext.evaluation.sandbox import run_code\n"
    code += "print(run_code('import sys\\nwhile True: sys.stderr.write(\"x\" * 65536)', seconds=1))\n"
    # Of this program alone: getrusage has in it what the process had that started it.
    code += "print(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outcome, peak = done.stdout.rsplit(maxsplit=1)
    assert outcome != "passed" and int(peak) < 1 << 20, done.stdout  # KB, most of them of what is imported


def test_wilson():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 0) == (0, 1)


def test_mcnemar():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(0, 6) == mcnemar(6, 0) == 2 / 64
    assert mcnemar(1, 7) == pytest.approx(2 * 9 / 256)


def test_modes():
    base = SiriusConfig(sparsity="fsparse", thresholds="x.json", density=0.4, period=8)
    assert [
        (config.mode, config.sparsity, config.thresholds) for config in (config_of(m, base) for m in evaluation.NAMED_MODES)
    ] == [
        ("full", "fsparse", "x.json"),
        ("sparse", "csparse", None),
        ("sparse", "fsparse", "x.json"),
        ("sparse", "cascade", None),
        ("sirius", "csparse", None),
        ("sirius", "fsparse", "x.json"),
        ("sirius", "cascade", None),
    ]
    with pytest.raises(ValueError, match="^modes: expected some of full"):
        config_of("dense", base)


def test_modes_with_settings():
    base = SiriusConfig(sparsity="fsparse", threshold=0.3)
    assert config_of("sirius-c:period=8:threshold=0.2", base) == SiriusConfig(period=8, threshold=0.2)
    assert config_of("sirius-f:tree_width=2", base) == dataclasses.replace(base, tree_width=2)
    assert config_of("csparse:density=0.7", base) == SiriusConfig(mode="sparse", density=0.7, threshold=0.3)
    assert config_of("sirius-c:period=auto", base).period == "auto"
    assert config_of("sirius-c:accept=match", base).accept == "match"
    bad = {
        "sirius-c:perod=8": "settings among density, follow, period, tree_width",
        "csparse:period=8": "settings among density for csparse",
        "full:density=0.5": "settings among none for full",
        "sirius-c:period": "expected a number for period",
        "sirius-c:accept=sample": "expected threshold or match for accept",
        "sirius-c:period=half": "expected a number for period",
        "sirius-c:period=0": "^modes: sirius-c:period=0: period: expected 1 to",
        "sirius-c:period=4:period=8": "^modes: expected period once",
    }
    for mode, message in bad.items():
        with pytest.raises(ValueError, match=message):
            config_of(mode, base)
    with pytest.raises(ValueError, match="^--thresholds: made for one density"):
        config_of("fsparse:density=0.7", dataclasses.replace(base, thresholds="x.json"))
    records = [{"mode": mode} for mode in ("sirius-c:period=8", "csparse", "sirius-c", "full", "csparse")]
    assert evaluation.modes_in(records) == ["full", "csparse", "sirius-c", "sirius-c:period=8"]


def test_results_survive(tmp_path):
    file, run = tmp_path / "out.jsonl", {"task": "csqa", "density": 0.5}
    results = Results(file, run, resume=False)
    results.add({"mode": "full", "id": "a", "correct": True})
    results.close()
    with file.open("a") as cut:
        cut.write('{"mode": "full", "id": "b", "corr')
    with pytest.raises(ValueError, match="^out: .*exists; --resume goes on with it"):
        Results(file, run, resume=False)
    with pytest.raises(ValueError, match="^out: .*another density; choose"):
        Results(file, {**run, "density": 0.4}, resume=True)
    results = Results(file, run, resume=True)
    assert results.done() == {("full", "a")}
    results.add({"mode": "full", "id": "b", "correct": False})
    results.close()
    assert [record["id"] for record in read_results(file)[1]] == ["a", "b"]


def plan_of(weights="plain", modes=("full", "sirius-c"), **settings):
    return Plan("none", "float32", "cpu", None, "csqa", None, modes, SiriusConfig(**settings), weights=weights)


def test_what_the_sparse_model_reads_is_no_matter_of_free_memory():
    """Of plain weights a copy, whether it has room or not, and the record says so; of packed ones there is a view."""
    plan = plan_of()
    assert plan.base == SiriusConfig(draft_weights="q4") and plan_of(draft_weights="same").base.draft_weights == "same"
    assert plan.record()["draft_weights"] == "q4" and plan.record()["density"] == "auto, 1 of csparse"
    same = plan_of(draft_weights="same").record()
    assert same["draft_weights"] == "same" and same["density"] == 0.5
    for weights in ("q8", "q4"):
        assert plan_of(weights).base.draft_weights == "auto" and "draft_weights" not in plan_of(weights).record()


def test_results_from_before_plain_weights_had_a_copy(tmp_path):
    """What S read was not written down if nobody had chosen it: it was what F reads."""
    file, same = tmp_path / "out.jsonl", plan_of(draft_weights="same").record()
    before = {name: value for name, value in same.items() if name != "draft_weights"}
    Results.write(file, before, [RIGHT_ONE])
    expected = "^out: .*another density, draft_weights; --draft-weights same goes on with it, or choose another name$"
    with pytest.raises(ValueError, match=expected):
        Results(file, plan_of().record(), resume=True)
    with pytest.raises(ValueError, match="made with another density, draft_weights, so it does not go with the others$"):
        merge([file], plan_of().record())
    results = Results(file, same, resume=True)
    assert results.done() == {("full", "a")}
    results.add({"mode": "full", "id": "b", "correct": False})
    results.close()
    Results.write(tmp_path / "new.jsonl", same, [{"mode": "full", "id": "c", "correct": True}])
    assert [record["id"] for record in merge([file, tmp_path / "new.jsonl"])[1]] == ["a", "b", "c"]

    packed = plan_of("q8").record()  # which say nothing of it, then and now
    Results.write(file, packed, [RIGHT_ONE])
    assert Results(file, packed, resume=True).done() == {("full", "a")}
    with pytest.raises(ValueError, match="^out: .*another draft_weights; choose another name$"):
        Results(file, {**packed, "draft_weights": "same"}, resume=True)


def test_nothing_is_copied_for_the_full_model_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "sirius_ext.evaluation.plan.engine_of", lambda plan, config: asked.append(config) or SimpleNamespace(tokenizer=1)
    )
    for modes in (("full",), ("full", "csparse"), ("sirius-c",)):
        plan_of(modes=modes).engine()
    assert [config.mode for config in asked] == ["full", "sirius", "sirius"]
    assert {config.draft_weights for config in asked} == {"q4"}


def test_texts_that_are_compared_have_a_copy_whatever_is_free(monkeypatch):
    """Also where nobody has made a plan."""
    monkeypatch.setattr("sirius_ext.models.weights.free_on", lambda device: 0)
    engine, kept = Engine(served.model(), tokenizer=served.tokenizer()), SimpleNamespace(records=[], done=set)
    kept.add = kept.records.append
    task = dataclasses.replace(TASKS["csqa"], max_new_tokens=8)
    items = [Item("one", "Where is money kept?\nAnswer Choices: (a) sea (b) bank", "b")]
    evaluation.evaluate(engine, task, items, ["csparse"], SiriusConfig(), kept, 0, Console(quiet=True))
    assert prepare(engine.model).weights.has_copy and kept.records[0]["stats"]["density"] < 0.5


def test_a_run_without_results_leaves_no_file(tmp_path):
    results = Results(tmp_path / "out.jsonl", {}, resume=False)
    results.close()
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_write_one_file(tmp_path):
    """Whether it is there already or not, from before the model is loaded until the end."""
    file, run = tmp_path / "out.jsonl", {"task": "csqa"}
    for resume in (False, True):
        results = Results(file, run, resume=resume)
        assert [each.name for each in tmp_path.iterdir() if each != file] == ["out.jsonl.lock"]
        for other in (False, True):
            with pytest.raises(ValueError, match="^out: .*out.jsonl: another run is writing it; wait for its end, or choose"):
                Results(file, run, resume=other)
        results.add({"mode": "full", "id": str(resume), "correct": True})
        with pytest.raises(ValueError, match="another run is writing it"), claimed(file):
            pass
        results.close()
        assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="exists; --resume"):
        Results(file, run, resume=False)
    with pytest.raises(ValueError, match="another task"):
        Results(file, {"task": "gsm8k"}, resume=True)
    (tmp_path / "out.jsonl.lock").touch()  # a killed process' one
    Results(file, run, resume=True).close()
    assert [record["id"] for record in read_results(file)[1]] == ["False", "True"] and list(tmp_path.iterdir()) == [file]


def test_a_lock_that_was_removed_is_none(tmp_path):
    """Between its opening and its locking the run that had made it may have ended, and a third one may have begun."""
    inside, most, writers = 0, 0, threading.Barrier(4)

    def write():
        nonlocal inside, most
        writers.wait()
        for _ in range(200):
            with contextlib.suppress(ValueError), claimed(tmp_path / "out"):
                inside += 1
                most = max(most, inside)
                time.sleep(1e-4)
                inside -= 1

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())


def test_two_runs_where_there_are_no_locks(tmp_path, monkeypatch):
    """The second one to find something out sees that there is a file by now."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    file, run = tmp_path / "out.jsonl", {"task": "csqa"}
    with contextlib.closing(Results(file, run, resume=False)) as one, contextlib.closing(Results(file, run, resume=True)) as two:
        one.add({"mode": "full", "id": "a", "correct": True})
        with pytest.raises(ValueError, match="another run is writing it"):
            two.add({"mode": "full", "id": "b", "correct": True})
        one.add({"mode": "full", "id": "c", "correct": True})
    assert [record["id"] for record in read_results(file)[1]] == ["a", "c"]


def test_a_file_that_another_run_writes_is_named_first(tmp_path, capsys):
    """Before anything is loaded, such as a model that is not there."""
    write("csqa", tmp_path, [CSQA])
    asked = ["--task", "csqa", "--data", str(tmp_path), "--model", "no/such-folder/"]
    files = {"eval": tmp_path / "out.jsonl", "study": tmp_path / "study" / "results.jsonl"}
    files["study"].parent.mkdir()
    for command, file in files.items():
        out = ["--out", str(file)] if command == "eval" else ["--out", str(file.parent), "--what", "period"]
        with claimed(file):
            assert cli.main([command, *asked, *out]) == 2
        assert f"--out: {file}: another run is writing it" in capsys.readouterr().err
    Results.write(files["eval"], {"task": "csqa"}, [RIGHT_ONE])
    with claimed(tmp_path / "both"):
        assert cli.main(["report", str(files["eval"]), "--out", str(tmp_path / "both")]) == 2
    assert "another run is writing it" in capsys.readouterr().err and not (tmp_path / "both").exists()


def test_items_of_one_id(tmp_path):
    """Results are kept by it: one of them would count for both."""
    write("csqa", tmp_path, [CSQA, {**CSQA, "id": "other"}, CSQA])
    with pytest.raises(ValueError, match=f"^data: .*: item 3 has the id of item 1, {CSQA['id']}$"):
        load_task("csqa", tmp_path)


RIGHT_ONE = {"mode": "full", "id": "a", "correct": True}
STATS = {"density": 0.5, "decode_seconds": None, "periods": [[1, 1, 2, False]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        (b"\xff\xfe\x00\n", "it is not UTF-8 text"),
        ('{"run": {}', "its only line is cut off"),
        ("nonsense\n", "line 1: expected JSON, got 'nonsense'"),
        ("[]\n", "line 1: expected an object, got []"),
        ("{}\n", "line 1 has no run"),
        ('{"run": 3}\n', "line 1: expected an object as run, got 3"),
        ([{"id": "a", "correct": True}], "line 2 has no mode"),
        ([{"mode": "full", "correct": True}], "line 2 has no id"),
        ([{"mode": "full", "id": "a"}], "line 2 has no correct"),
        ([RIGHT_ONE, 3], "line 3: expected an object, got 3"),
        ([RIGHT_ONE, {**RIGHT_ONE, "mode": "csparse"}, RIGHT_ONE], "line 4: full has item a in line 2 already"),
        ([{**RIGHT_ONE, "mode": "dense"}], "line 2: expected one of full, .* as mode, got 'dense'"),
        ([{**RIGHT_ONE, "mode": None}], "line 2: expected one of full, .* as mode, got None"),
        ([{**RIGHT_ONE, "id": None}], "line 2: expected a text as id, got None"),
        ([{**RIGHT_ONE, "correct": 7}], "line 2: expected true or false as correct, got 7"),
        ([{**RIGHT_ONE, "scores": [1]}], "line 2: expected scores"),
        ([{**RIGHT_ONE, "stats": STATS}], "line 2 has no tokens"),
        ([{**RIGHT_ONE, "tokens": [], "stats": 3}], "line 2: expected an object as stats, got 3"),
        ([{**RIGHT_ONE, "tokens": 3, "stats": STATS}], "line 2: expected a list as tokens, got 3"),
        ([{**RIGHT_ONE, "tokens": [], "stats": {**STATS, "density": "x"}}], "line 2: expected a number as density, got 'x'"),
        ([{**RIGHT_ONE, "tokens": [], "stats": {**STATS, "decode_seconds": "x"}}], "line 2: expected a number as decode_seconds"),
        (
            [{**RIGHT_ONE, "tokens": [], "stats": {**STATS, "periods": [[1]]}}],
            "line 2: expected a list of .* as periods",
        ),
    ],
    ids=str,
)
def test_what_is_no_file_of_results(content, message, tmp_path):
    """Of a list, each is a line after the first, which says what was run."""
    file = tmp_path / "out.jsonl"
    if isinstance(content, list):
        content = "".join(json.dumps(line) + "\n" for line in ({"run": {}}, *content))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"out.jsonl: not a file of results: {message.replace('[]', '.*')}"):
        read_results(file)


def test_summary():
    def record(mode, key, correct, periods=(), **more):
        stats = {"density": 0.7, "decode_seconds": 2.0, "periods": list(periods)}
        return {
            "mode": mode,
            "id": key,
            "correct": correct,
            "scores": {"exact": correct},
            "tokens": [1, 2],
            "stats": stats,
            **more,
        }

    records = [record("full", key, right) for key, right in zip("abcd", (True, True, False, True))]
    periods = [(3, 3, 4, False), (3, 1, 2, False), (1, 1, 2, True)]
    records += [record("sirius-c", key, right, periods) for key, right in zip("abc", (True, False, True))]
    records.append({"mode": "sirius-c", "id": "d", "correct": False, "error": "RuntimeError: x"})
    full, sirius = summarize(records, ["full", "sirius-c"])
    assert (full["items"], full["accuracy"], full["effective_density"]) == (4, 0.75, 0.7) and "p" not in full
    assert (sirius["items"], sirius["failed"], sirius["accuracy"]) == (4, 1, 0.5)
    assert (sirius["gained"], sirius["lost"], sirius["p"]) == (1, 2, mcnemar(1, 2))
    assert sirius["average_advance_length"] == 3 and sirius["corrected_fraction"] == pytest.approx(3 / 24)
    assert sirius["effective_density"] == pytest.approx((2 * 3 * 0.7 + 2) / 6)
    assert sirius["ms_per_token"] == 1000 and sirius["scores"] == {"exact": 0.5}
    console = Console(width=100, record=True)
    evaluation.report("a title", [full, sirius], console)
    assert "counted as wrong (see the file for the reasons): sirius-c 1" in console.export_text()


def test_the_layout_of_a_data_folder_is_described():
    """Every task has a row in docs/usage.md, with its file and the fields that its reader asks for."""
    rows = re.findall(r"\| (\w+) \| `([^`]+)` \| ([^|]+) \|", (Path(__file__).parents[1] / "docs/usage.md").read_text())
    described = {name: (file, fields) for name, file, fields in rows}
    for name, task in TASKS.items():
        file, fields = described[name]
        assert file == ("mmlu/test/SUBJECT_test.csv" if name == "mmlu_cot" else task.path)
        if name not in ("mmlu_cot", "truthfulqa", "sports", "date"):
            unread = {"code", "canonical_solution", "label"}
            assert set(FILES[name][0]) - unread <= set(re.findall(r"`(\w+)`", fields)), name


@pytest.mark.parametrize("width, terminal", [(20, False), (200, True), (70, True), (40, True), (10, True)])
def test_a_table_is_never_cut(width, terminal):
    """Whatever the width, each cell is there once; of what is not a terminal, in one table."""
    names = ["full", "sirius-c\nthreshold=0.3"]
    columns = {f"name {letter}": [f"{letter}.1234567", f"{letter}.7654321"] for letter in "abcdefgh"}
    file = io.StringIO()
    show_table("A title", "A caption", names, columns, Console(file=file, width=width, force_terminal=terminal))
    text = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    for cell in itertools.chain(columns, *columns.values()):
        assert text.count(cell) == 1, text
    assert "…" not in text and text.count("A title") == text.count("A caption") == 1
    assert (
        text.count("full") == text.count("threshold=0.3") == (1 if width == 200 or not terminal else {70: 2, 40: 4, 10: 8}[width])
    )
    if terminal and width > 30:
        assert max(map(len, text.splitlines())) <= width


def test_on_the_default_model(tmp_path, capsys):
    """Stopped after two items, gone on with, and in two parts: the same records."""
    lines = [{**CSQA, "id": str(i)} for i in range(3)]
    lines[2]["question"] = {**CSQA["question"], "stem": "Where is money kept? " * 4000}
    write("csqa", tmp_path, lines)
    arguments = ["eval", "--task", "csqa", "--data", str(tmp_path), "--modes", "full,sirius-c", "--shots", "1", "--period", "4"]

    def run(out, *more):
        assert cli.main([*arguments, "--out", str(tmp_path / out), *more]) == 0
        records = read_results(tmp_path / out)[1]
        return {(r["mode"], r["id"]): (r["correct"], r.get("text"), r.get("error")) for r in records}

    assert len(run("some.jsonl", "--limit", "2", "--accept", "match")) == 4
    found = run("some.jsonl", "--resume", "--accept", "match")
    assert found == run("first.jsonl", "--shard", "1/2", "--accept", "match") | run(
        "second.jsonl", "--shard", "2/2", "--accept", "match"
    )
    assert len(found) == 6
    assert run("rest.jsonl", "--skip", "2", "--accept", "match") == {key: found[key] for key in found if key[1] == "2"}
    for item in ("0", "1"):
        assert found["full", item] == found["sirius-c", item] and found["full", item][2] is None
    assert not found["full", "2"][0] and "context" in found["full", "2"][2]
    assert "full 1, sirius-c 1" in capsys.readouterr().out.replace("\n", " ")


def test_side_by_side_on_the_default_model(tmp_path):
    """The same records as one by one, but for the times, in spite of a stop and of a prompt that fails."""
    lines = [{**CSQA, "id": str(i), "question": {**CSQA["question"], "stem": f"Where is {i} kept?"}} for i in range(4)]
    lines[2]["question"]["stem"] = "Where is money kept? " * 4000
    write("csqa", tmp_path, lines)
    arguments = ["eval", "--task", "csqa", "--data", str(tmp_path), "--shots", "2"]
    arguments += ["--modes", "full,csparse,sirius-f,sirius-c:tree_width=2:period=3"]

    def run(out, *more):
        arguments_of_run = [*arguments, "--period", "4", "--dtype", "float32", "--out", str(tmp_path / out), *more]
        arguments_of_run += ["--draft-weights", "same"]  # products of fewer bits round otherwise side by side
        assert cli.main(arguments_of_run) == 0
        return {(record["mode"], record["id"]): record for record in read_results(tmp_path / out)[1]}

    one_by_one = run("single.jsonl")
    run("batched.jsonl", "--batch", "3", "--limit", "2")
    side_by_side = run("batched.jsonl", "--batch", "3", "--resume")
    assert side_by_side.keys() == one_by_one.keys() and len(side_by_side) == 16
    assert summarize(list(side_by_side.values()), ["full"])[0]["ms_per_token"] is None
    times = ("prefill_seconds", "decode_seconds", "ms_per_token")
    for key, record in side_by_side.items():
        twin = one_by_one[key]
        assert [record.get(name) for name in ("correct", "text", "tokens", "error")] == [
            twin.get(name) for name in ("correct", "text", "tokens", "error")
        ]
        if "stats" in record:
            assert all(record["stats"].pop(name) is None and twin["stats"].pop(name) > 0 for name in times)
            assert record["stats"] == twin["stats"]
