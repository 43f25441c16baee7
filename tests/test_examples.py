"""The examples run as they stand, and say what they promise."""

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
SAYS = {
    "attach.py": ["Sirius:", "transformers:"],
    "engine.py": ["def fibonacci(n):", "tokens a verification"],
    "evaluation.py": ["three questions", "sirius-c"],
    "sampling.py": ["0: My favourite food is", "2: My favourite food is"],
    "streaming.py": ["|", "ended by length"],
}


def test_each_example_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name):
    done = subprocess.run([sys.executable, FOLDER / name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(said in done.stdout for said in SAYS[name]), done.stdout
    if name == "attach.py":
        texts = [line.split(":", 1)[1] for line in done.stdout.splitlines() if line.startswith(("Sirius:", "transformers:"))]
        assert len(texts) == 2 and all(text.strip().startswith("The three primary colours are") for text in texts)
