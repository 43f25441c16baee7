"""Does the correction bring the answers back? A task of your own, in three modes on the same items.

usage: python examples/evaluation.py [MODEL]
For the eleven tasks that come with the package: python -m sirius_ext eval --help
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import rich.console

from sirius_ext import Engine, SiriusConfig
from sirius_ext.evaluation import Results, evaluate, report, summarize
from sirius_ext.evaluation.tasks import TASKS, Item, Verdict

QUESTIONS = {"What is 7 + 5?": "12", "What is 9 - 4?": "5", "What is the capital of France?": "Paris"}
MODES = ("full", "csparse", "sirius-c:period=4")


def judge(item: Item, text: str) -> Verdict:
    right = item.answer in text
    return Verdict(item.answer if right else None, right, {"contains": right})


task = dataclasses.replace(
    TASKS["gsm8k"],
    name="questions",
    prompt=lambda item, shots: f"Question: {item.question}\nAnswer:",
    judge=judge,
    stop=("\n",),
    max_new_tokens=16,
)
items = [Item(str(number), question, answer) for number, (question, answer) in enumerate(QUESTIONS.items())]
engine = Engine.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
console = rich.console.Console()
with tempfile.TemporaryDirectory() as folder:
    results = Results(Path(folder) / "results.jsonl", {"task": task.name}, resume=False)
    evaluate(engine, task, items, MODES, SiriusConfig(), results, shots=0, console=console)
    report("three questions", summarize(results.records, MODES), console)
