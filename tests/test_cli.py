"""The command line: in this process on the default model, and in a fresh one where only that can show it."""

import json
import os
import subprocess
import sys

import pytest

from sirius_ext import cli, demo, ops

PROMPT = "The three primary colours are"


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_streams_the_text_and_writes_json(capsys, tmp_path):
    file = tmp_path / "out.json"
    status, out, err = run(
        capsys, "generate", "--prompt", PROMPT, "--period", "3", "--density", "0.7", "--max-new-tokens", "12", "--json", str(file)
    )
    record = json.loads(file.read_text())
    assert status == 0
    assert out.strip() == record["text"].strip()
    assert len(record["token_ids"]) == record["stats"]["prompts"][0]["tokens"] <= 12
    assert record["config"]["period"] == 3 and record["config"]["density"] == 0.7
    assert sum(period["committed"] for period in record["stats"]["prompts"][0]["periods"]) == len(record["token_ids"]) - 1
    assert "ms/token" in err and "AAL" in err


def test_match_and_full_print_the_same_text(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ["--prompt-file", str(tmp_path / "prompt.txt"), "--chat", "--max-new-tokens", "12"]
    texts = [
        run(capsys, "generate", *arguments, *mode)[1]
        for mode in (("--mode", "full"), ("--accept", "match", "--period", "4"), ("--mode", "csparse", "--density", "1"))
    ]
    assert texts[0].strip()
    assert texts[1] == texts[0] == texts[2]


def test_threads(capsys):
    assert run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--threads", "1")[0] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "prompt"),
        (["--prompt", "x", "--period", "0"], "period: expected 1 to"),
        (["--prompt", "x", "--density", "0"], "density: expected"),
        (["--prompt", "x", "--threshold", "2"], "threshold: expected"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: expected"),
        (["--prompt", "x", "--threads", "0"], "--threads: expected"),
        (["--prompt", "x", "--dtype", "int8"], "dtype: expected one of"),
        (["--prompt", "x", "--device", "cuda"], "device: 'cuda'"),
        (["--prompt", "x", "--device", "mps"], "device: 'mps' is not supported"),
        (["--prompt", "x", "--model", "no/such/model/anywhere"], "model: 'no/such/model/anywhere' does not exist"),
        (["--prompt-file", "no-such-file"], "no-such-file"),
        (["--prompt", "x", "--json", "no-such-folder/out.json"], "--json: no folder"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    status, out, err = run(capsys, "generate", *arguments)
    assert status == 2 and out == ""
    assert err.startswith("sirius_ext: error: ") and message in err and err.count("\n") == 1


def test_prompt_and_prompt_file_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--prompt", "x", "--prompt-file", "y"])
    assert "not allowed with" in capsys.readouterr().err


def test_prompt_file_that_is_not_text(capsys, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, "generate", "--prompt-file", str(tmp_path / "binary"))
    assert status == 2 and "is not UTF-8" in err


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for isa in ops.available_isas():
        assert isa in out
    assert f"{ops.isa()} (in use)" in out and "devices" in out


def test_demo_ends_with_a_table_and_match_equals_full(capsys, monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", {"a prompt": PROMPT})
    status, out, _ = run(capsys, "demo", "--max-new-tokens", "8")
    assert status == 0
    assert "Sirius under `match` gave exactly Full's text." in out
    for row in ("transformers", "Full", "CSparse", "Sirius, threshold", "Sirius, match"):
        assert row in out


def fresh(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("isa", ops.available_isas())
def test_the_variable_forces_an_instruction_set(isa):
    result = fresh("import torch; from sirius_ext import ops; print(ops.isa())", SIRIUS_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_an_unknown_instruction_set_is_refused():
    result = fresh("import torch; from sirius_ext import ops; print(ops.isa())", SIRIUS_ISA="sse9")
    assert result.returncode != 0 and "SIRIUS_ISA: expected one of" in result.stderr and "sse9" in result.stderr
    with pytest.raises(ValueError, match="expected one of"):
        ops.set_isa("sse9")
