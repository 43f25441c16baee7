"""The tasks' items from the hub, with a loader of our own in place of it: rows as the data sets' pages show them."""

import sys

import pytest
from test_evaluation import CSQA, FILES, RIGHT, WRONG, write

from sirius_ext.cli import main as cli
from sirius_ext.evaluation.hub_data import SOURCES, load_items
from sirius_ext.evaluation.tasks import TASKS, load_task

ROWS = {
    **{name: FILES[name] for name in ("gsm8k", "svamp", "aqua", "strategyqa", "humaneval", "mbpp")},
    "csqa": [
        {
            "id": "one",
            "question": "Where is money kept?",
            "question_concept": "money",
            "choices": {"label": list("ABCDE"), "text": [choice["text"] for choice in CSQA["question"]["choices"]]},
            "answerKey": "B",
        }
    ],
    "date": [
        {
            "idx": 0,
            "inputs": "Q: Today is 01/02/2003. Tomorrow?\n  choice: 01/03/2003\n  choice: 01/04/2003\nA: ",
            "targets": ["01/03/2003"],
            "multiple_choice_targets": ["01/03/2003", "01/04/2003"],
            "multiple_choice_scores": [1, 0],
        }
    ],
    "sports": [
        {
            "idx": 0,
            "inputs": "Determine whether the following statement or statements are plausible or implausible:\n"
            "Statement: Pele hit a home run\nPlausible/implausible? ",
            "targets": ["implausible"],
            "multiple_choice_targets": ["plausible", "implausible"],
            "multiple_choice_scores": [0, 1],
        }
    ],
    "mmlu_cot": [{"question": "What is H2O?", "subject": "chemistry", "choices": ["gold", "water", "air", "salt"], "answer": 1}],
    "truthfulqa": [
        {
            "question": "Flat?",
            "best_answer": "It is round",
            "correct_answers": ["It is round", "A ball"],
            "incorrect_answers": ["It is flat"],
        }
    ],
}


@pytest.mark.parametrize("name", TASKS)
def test_the_same_items_as_from_files(name, tmp_path):
    asked = []

    def loader(path, config, split):
        asked.append((path, config, split))
        return iter(ROWS[name])

    (item,) = load_items(name, loader)
    write(name, tmp_path)
    assert [item] == load_task(name, tmp_path)[1]
    source = SOURCES[name]
    assert asked == [(source.path, source.name, source.split)]
    assert TASKS[name].judge(item, RIGHT[name]).correct and not TASKS[name].judge(item, WRONG[name]).correct


@pytest.mark.parametrize("name", TASKS)
def test_bad_rows(name):
    with pytest.raises(ValueError, match="^data: .*item 2 is malformed"):
        load_items(name, lambda *_, split: [*ROWS[name], {"nothing": 1}])
    with pytest.raises(ValueError, match="has no items"):
        load_items(name, lambda *_, split: [])


def test_subjects_are_counted_one_by_one():
    row = ROWS["mmlu_cot"][0]
    rows = [row, row, {**row, "subject": "law"}]
    assert [item.id for item in load_items("mmlu_cot", lambda *_, split: rows)] == ["chemistry/0", "chemistry/1", "law/0"]


def test_a_question_alone_is_taken_as_it_is():
    row = {**ROWS["date"][0], "inputs": "Is it A: or\nB? What is the date?"}
    assert load_items("date", lambda *_, split: [row])[0].question == "Is it A: or\nB? What is the date?"


def test_offline():
    def loader(path, config, split):
        raise ConnectionError("no network")

    with pytest.raises(OSError, match="^data: cannot have openai/gsm8k from the Hugging Face hub .*no network.*--data DIR"):
        load_items("gsm8k", loader)


def test_without_datasets(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert cli.main(["eval", "--task", "gsm8k", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "gsm8k without --data needs datasets" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_hubs_own_loader_offline(monkeypatch):
    """With `datasets` installed: its real errors become ours."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="^data: cannot have ChilleD/SVAMP from the Hugging Face hub"):
        load_items("svamp", lambda *arguments, **more: datasets.load_dataset(*arguments, **more, cache_dir="/nonexistent"))


def test_results_know_where_the_items_are_from(tmp_path, capsys, monkeypatch):
    write("csqa", tmp_path)
    monkeypatch.setattr("sirius_ext.evaluation.plan.load_items", lambda task: load_items(task, lambda *_, split: ROWS["csqa"]))
    arguments = ["eval", "--task", "csqa", "--modes", "full", "--shots", "0", "--out", str(tmp_path / "out.jsonl")]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--resume", "--data", str(tmp_path)]) == 2
    assert "was made with another source" in capsys.readouterr().err
