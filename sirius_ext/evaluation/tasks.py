"""The tasks: where their items are, how they are asked, what counts as an answer, and when it is right."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import shots
from .sandbox import run_code


@dataclasses.dataclass(frozen=True)
class Item:
    """question: as it is put into the prompt. answer: what is right, in the form that the task's `extract` gives. extra: what
    judging needs beyond it."""

    id: str
    question: str
    answer: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """answer: what was found in the text, None if nothing. correct: by the task's main rule. scores: by each of its rules."""

    answer: str | None
    correct: bool
    scores: dict[str, bool]


@dataclasses.dataclass(frozen=True)
class Task:
    """name, and what its items are called in the data folder. read: the items of that file or folder. prompt: the text for an
    item with `shots` examples, `max_shots` at most. stop: strings that end an answer. judge: what an answer's text is worth."""

    name: str
    path: str
    read: Callable[[Path], Iterator[Item]]
    prompt: Callable[[Item, int], str]
    judge: Callable[[Item, str], Verdict]
    stop: tuple[str, ...]
    max_new_tokens: int
    max_shots: int

    def answer_in(self, text: str) -> str:
        """A generated text up to its first stop string."""
        return text[: min([text.find(stop) for stop in self.stop if stop in text], default=len(text))]


def load_task(name: str, data: Path) -> tuple[Task, list[Item]]:
    """A task and its items from a data folder. ValueError for an unknown task or a malformed item, which it names;
    FileNotFoundError if the data is not there."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    path = file_of(task, data)
    return task, collect(str(path), lambda: task.read(path))


def file_of(task: Task, data: Path) -> Path:
    """Where a data folder has a task's items. FileNotFoundError if it is not there."""
    path = data / task.path
    if not path.exists():
        raise FileNotFoundError(f"data: no {task.path} in {data}, which {task.name} needs")
    return path


def collect(source: str, read: Callable[[], Iterator[Item]]) -> list[Item]:
    """All items. ValueError for a malformed one or one with an earlier one's id, which it names, or if there is none."""
    items: list[Item] = []
    try:
        items.extend(read())
    except Exception as error:  # of JSON, CSV and gzip, and of whatever stands where a text or a list should
        raise ValueError(f"data: {source}: item {len(items) + 1} is malformed ({type(error).__name__}: {error})") from error
    if not items:
        raise ValueError(f"data: {source} has no items")
    known: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        if (before := known.setdefault(item.id, number)) != number:
            raise ValueError(f"data: {source}: item {number} has the id of item {before}, {item.id}")
    return items


# ------------------------------------------------------------------------------------------------------------- reading


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _choices(options: list[str]) -> str:
    return "Answer Choices: " + " ".join(f"({letter}) {text}" for letter, text in zip("abcdefghij", options))


def _each_line(item: Callable[[int, dict[str, Any]], Item]) -> Callable[[Path], Iterator[Item]]:
    """Read a file of JSON lines, each of which is an item."""
    return lambda path: itertools.starmap(item, enumerate(_lines(path)))


def _each(item: Callable[[int, dict[str, Any]], Item], key: str | None = None) -> Callable[[Path], Iterator[Item]]:
    """Read a file of JSON that is a list of items, or has one under `key`."""

    def read(path: Path) -> Iterator[Item]:
        content = json.loads(path.read_text(encoding="utf-8"))
        return itertools.starmap(item, enumerate(content if key is None else content[key]))

    return read


def gsm8k(index: int, row: dict[str, Any]) -> Item:
    return Item(str(index), row["question"], number(row["answer"].split("####")[1]))


def svamp(index: int, row: dict[str, Any]) -> Item:
    body = row["Body"].strip()
    question = f"{body}{'' if body.endswith('.') else '.'} {row['Question'].strip()}"
    return Item(row["ID"], question, number(str(row["Answer"])))


def aqua(index: int, row: dict[str, Any]) -> Item:
    options = [option.split(")", 1)[1].strip() for option in row["options"]]
    return Item(str(index), f"{row['question']}\n{_choices(options)}", row["correct"].lower())


def csqa(index: int, row: dict[str, Any]) -> Item:
    question = row["question"]
    options = [choice["text"] for choice in question["choices"]]
    return Item(row["id"], f"{question['stem']}\n{_choices(options)}", row["answerKey"].lower())


def strategyqa(index: int, row: dict[str, Any]) -> Item:
    return Item(row["qid"], row["question"], "yes" if row["answer"] else "no")


def date(index: int, row: dict[str, Any]) -> Item:
    return Item(str(index), row["input"], max(row["target_scores"], key=row["target_scores"].get))


def sports(index: int, row: dict[str, Any]) -> Item:
    question = f'Is the following sentence plausible? "{row["input"]}"'
    return Item(str(index), question, "yes" if date(index, row).answer == "plausible" else "no")


def humaneval(index: int, row: dict[str, Any]) -> Item:
    return Item(row["task_id"], row["prompt"], "passed", {"test": f"{row['test']}\ncheck({row['entry_point']})\n"})


def mbpp(index: int, row: dict[str, Any]) -> Item:
    tests = [row["test_setup_code"], *row["test_list"]]
    return Item(str(row["task_id"]), row["text"], "passed", {"test": "\n".join(tests), "example": row["test_list"][0]})


def mmlu(index: int, row: dict[str, Any]) -> Item:
    """row: subject, question, choices and answer, a letter; index: within the subject."""
    if len(row["choices"]) != 4 or row["answer"] not in tuple("ABCD"):
        raise ValueError(f"{row['subject']}, row {index + 1}")
    question = f"{row['question']}\n{_choices(row['choices'])}"
    return Item(f"{row['subject']}/{index}", question, row["answer"].lower(), {"subject": row["subject"]})


def truthfulqa(index: int, row: dict[str, Any]) -> Item:
    """row: question, best_answer, and lists correct_answers and incorrect_answers."""
    known = {"right": row["correct_answers"], "wrong": row["incorrect_answers"]}
    return Item(str(index), row["question"], row["best_answer"], known)


def _read_mmlu(path: Path) -> Iterator[Item]:
    for file in sorted((path / "test").glob("*_test.csv")):
        with file.open(encoding="utf-8", newline="") as rows:
            for index, (question, *choices, answer) in enumerate(csv.reader(rows)):
                subject = file.stem.removesuffix("_test")
                yield mmlu(index, {"subject": subject, "question": question, "choices": choices, "answer": answer})


def _read_truthfulqa(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8", newline="") as rows:
        for index, row in enumerate(csv.DictReader(rows)):
            right, wrong = ([each.strip() for each in row[f"{kind} Answers"].split(";")] for kind in ("Correct", "Incorrect"))
            answers = {"best_answer": row["Best Answer"], "correct_answers": right, "incorrect_answers": wrong}
            yield truthfulqa(index, {"question": row["Question"], **answers})


# -------------------------------------------------------------------------------------------------------------- asking


def _few_shot(examples: tuple[tuple[str, str], ...]) -> Callable[[Item, int], str]:
    def prompt(item: Item, count: int) -> str:
        asked = [f"Q: {question}\nA: {answer}\n\n" for question, answer in examples[:count]]
        return f"{''.join(asked)}Q: {item.question}\nA:"

    return prompt


def _as_given(item: Item, count: int) -> str:
    return item.question


def _mbpp_prompt(item: Item, count: int) -> str:
    asked = [f'"""\n{text}\n{test}\n"""\n{code}\n\n' for text, test, code in shots.MBPP[:count]]
    return f'{"".join(asked)}"""\n{item.question}\n{item.extra["example"]}\n"""\n'


# ------------------------------------------------------------------------------------------------------------- judging


def number(text: str) -> str:
    """A number without currency, commas and a trailing fraction of zeros, "inf" if it is larger than any of float64; ValueError
    if it is none."""
    value = float(re.sub(r"[,$%\s]", "", text).rstrip("."))
    return str(value) if math.isinf(value) or value != int(value) else str(int(value))


_NUMBER = r"-?[$]?[0-9][0-9,]*(?:\.[0-9]+)?"


def _first(pattern: str, text: str) -> str | None:
    """What stands after it says nothing: a model that goes on writes questions and answers of its own."""
    found = re.search(pattern, text, flags=re.IGNORECASE)
    return found[1] if found else None


def _judge_number(item: Item, text: str) -> Verdict:
    """strict: the number after the first "The answer is"; flexible: the text's last number (the two filters of lm-eval's
    gsm8k)."""
    strict = _first(rf"the answer is:? *({_NUMBER})", text)
    flexible = next(reversed(re.findall(_NUMBER, text)), None)
    scores = {
        name: found is not None and number(found) == item.answer for name, found in (("strict", strict), ("flexible", flexible))
    }
    return Verdict(number(strict) if strict else None, scores["strict"], scores)


def _judge_by(pattern: str) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        found = _first(pattern, text)
        correct = found is not None and found.lower() == item.answer.lower()
        return Verdict(found, correct, {"exact": correct})

    return judge


def _judge_code(prompt_is_code: bool) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        outcome = run_code(f"{item.question if prompt_is_code else ''}{text}\n{item.extra['test']}")
        return Verdict(outcome, outcome == "passed", {"pass@1": outcome == "passed"})

    return judge


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge1(candidate: str, reference: str) -> float:
    """F-measure of the words that both have."""
    a, b = _words(candidate), _words(reference)
    common = sum(min(a.count(word), b.count(word)) for word in set(a))
    return 2 * common / (len(a) + len(b)) if a and b else 0.0


def _judge_truthful(item: Item, text: str) -> Verdict:
    """Right when the text has more in common with a correct answer than with any incorrect one (TruthfulQA's rouge1 accuracy)."""
    answer = text.strip().split("\n")[0]
    best = {kind: max(rouge1(answer, reference) for reference in item.extra[kind]) for kind in ("right", "wrong")}
    correct = best["right"] > best["wrong"]
    return Verdict(answer, correct, {"rouge1": correct})


_QUESTION = ("Q:", "Human:", "\n\n")  # instruct models go on as "Human:"
# A letter in parentheses, a capital one, or one that a sentence ends with: "the answer is a bank" chooses none.
_LETTER = _judge_by(r"the answer is:? *\(?([a-j])(?:\)|(?-i:(?<=[A-J]))(?![a-z])| *(?:[.,;:!?\n]|\Z))")
_YES_NO = _judge_by(r"the answer is:? *(yes|no)\b")
_CODE_STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", '\n"""')

_DATE = _judge_by(r"the answer is:? *([0-9/]+)")


def _asked(
    name: str,
    path: str,
    read: Callable[[Path], Iterator[Item]],
    examples: tuple[tuple[str, str], ...],
    judge: Callable[[Item, str], Verdict],
    max_new_tokens: int,
) -> Task:
    """A task of questions and answers."""
    return Task(name, path, read, _few_shot(examples), judge, _QUESTION, max_new_tokens, len(examples))


TASKS = {
    task.name: task
    for task in (
        _asked("gsm8k", "gsm8k/test.jsonl", _each_line(gsm8k), shots.ARITHMETIC, _judge_number, 256),
        _asked("svamp", "gsm8k/SVAMP.json", _each(svamp), shots.ARITHMETIC, _judge_number, 192),
        _asked("aqua", "aqua/test.json", _each_line(aqua), shots.ALGEBRA, _LETTER, 256),
        _asked("csqa", "commonsenseqa/dev_rand_split.jsonl", _each_line(csqa), shots.COMMON_SENSE, _LETTER, 96),
        _asked("strategyqa", "strategyqa/dev.json", _each(strategyqa), shots.STRATEGY, _YES_NO, 128),
        _asked("date", "bigbench/date_understanding.json", _each(date, "examples"), shots.DATE, _DATE, 128),
        _asked("sports", "bigbench/sports_understanding.json", _each(sports, "examples"), shots.SPORTS, _YES_NO, 96),
        Task(
            "humaneval", "humaneval/HumanEval.jsonl.gz", _each_line(humaneval), _as_given, _judge_code(True), _CODE_STOP, 256, 0
        ),
        Task("mbpp", "mbpp/mbpp.jsonl", _each_line(mbpp), _mbpp_prompt, _judge_code(False), ('\n"""',), 256, len(shots.MBPP)),
        _asked("mmlu_cot", "mmlu", _read_mmlu, shots.KNOWLEDGE, _LETTER, 192),
        _asked("truthfulqa", "truthfulqa/TruthfulQA.csv", _read_truthfulqa, shots.TRUTH, _judge_truthful, 64),
    )
}
