"""Damaged headers of model files: an error of one line, or a model; never a crash, a hang, or memory without end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import tiny_llama, write_gguf

CASES = 120


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_damaged_headers(tmp_path, kind):
    folder, scratch = tmp_path / "whole", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    if kind == "gguf":
        file = folder / "tiny.gguf"
        write_gguf(file, tiny_llama())
    else:
        file = folder / "model.safetensors"
        tiny_llama().save_pretrained(folder)
    command = [sys.executable, Path(__file__).with_name("fuzz_files.py"), file, kind, "0", str(CASES), scratch]
    # The package may be in place alone, and not installed.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [int(seed) for seed, _ in answers] == list(range(CASES))
    wrong = [(seed, said) for seed, said in answers if not said.startswith(("ok", "refused: model: "))]
    assert not wrong, wrong[:3]
    assert answers[0][1] == "ok", "the whole file is refused too"
    assert sum(said.startswith("refused") for _, said in answers) > CASES / 4, "the damage is mostly harmless"
