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


def test_a_seed_makes_a_text(capsys, tmp_path):
    """And different seeds different ones, by a chain, a tree and the full model."""
    file = tmp_path / "out.json"
    for way in (["--period", "4"], ["--tree-width", "3", "--period", "4", "--sparsity", "fsparse"], ["--mode", "full"]):
        arguments = ["generate", "--prompt", PROMPT, "--sample", "--max-new-tokens", "10", "--json", str(file), *way]
        texts = []
        for seed in ("1", "1", "2"):
            status, out, _ = run(capsys, *arguments, "--seed", seed, "--top-k", "40", "--temperature", "1.5")
            record = json.loads(file.read_text())
            assert status == 0 and out.strip() == record["text"].strip()
            texts.append(record["token_ids"])
        assert texts[0] == texts[1] != texts[2]
        assert record["config"]["accept"] == "sample"
        assert record["sampling"] == {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 1.0, "seed": 2}


def test_trees_periods_and_stop_strings(capsys):
    full = run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "16", "--dtype", "float32", "--mode", "full")[1]
    for way in (["--tree-width", "4", "--period", "3"], ["--tree-width", "2", "--prune"], ["--period", "auto"]):
        arguments = ["--prompt", PROMPT, "--max-new-tokens", "16", "--dtype", "float32", "--accept", "match", *way]
        status, out, err = run(capsys, "generate", *arguments)
        assert status == 0 and out == full, err
    stop = full.split()[2]
    _, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "16", "--stop", "#@", "--stop", stop)
    assert stop in out and len(out) < len(full)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{n} times {n + 1} is {n * (n + 1)}, as every school child knows." for n in range(30)))
    return file


def test_calibrate_writes_thresholds_that_generate_takes(capsys, tmp_path, text):
    file = tmp_path / "thresholds.json"
    status, out, err = run(capsys, "calibrate", "--text", str(text), "--density", "0.4", "--out", str(file))
    assert status == 0 and "error" not in err and "density 0.4" in out and str(file) in out
    record = json.loads(file.read_text())
    assert record["density"] == 0.4 and len(record["values"]) == len(record["kept"]) == 30 and min(record["values"]) > 0
    assert sum(record["kept"]) / 30 == pytest.approx(0.4, abs=0.03)
    arguments = [
        "generate",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "8",
        "--thresholds",
        str(file),
        "--json",
        str(tmp_path / "j"),
    ]
    for mode in (["--sparsity", "fsparse"], ["--mode", "fsparse"]):
        status, out, err = run(capsys, *arguments, *mode, "--density", "0.4")
        assert status == 0 and out.strip(), err
        assert json.loads((tmp_path / "j").read_text())["config"]["thresholds"] == str(file)
    status, out, err = run(capsys, *arguments, "--sparsity", "fsparse")
    assert status == 2 and out == "" and "was made for density 0.4, but density is 0.5" in err
    status, _, err = run(capsys, *arguments, "--density", "0.4")
    assert status == 2 and 'thresholds: they need sparsity="fsparse"' in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "no-such-folder/t.json"], "--out: no folder"),
        (["--text", "no-such-file"], "no-such-file"),
        (["--model", "no/such/model/anywhere"], "model: 'no/such/model/anywhere' does not exist"),
    ],
)
def test_calibrate_errors_are_one_line(capsys, tmp_path, text, arguments, message):
    status, out, err = run(capsys, "calibrate", "--text", str(text), "--out", str(tmp_path / "t.json"), *arguments)
    assert status == 2 and out == "" and not (tmp_path / "t.json").exists()
    assert err.startswith("sirius_ext: error: ") and message in err and err.count("\n") == 1


def test_calibrate_needs_a_text_of_some_length_and_a_density(capsys, tmp_path, text):
    (tmp_path / "short").write_text("Too short.")
    status, _, err = run(capsys, "calibrate", "--text", str(tmp_path / "short"), "--out", str(tmp_path / "t.json"))
    assert status == 2 and "text: expected at least 64 tokens, got" in err
    status, _, err = run(capsys, "calibrate", "--text", str(text), "--density", "1", "--out", str(tmp_path / "t.json"))
    assert status == 2 and "density: expected more than 0 and less than 1, got 1.0" in err
    assert not (tmp_path / "t.json").exists()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, "calibrate", "--text", str(tmp_path / "binary"), "--out", str(tmp_path / "t.json"))
    assert status == 2 and "--text: " in err and "is not UTF-8" in err


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
        (["--prompt", "x", "--period", "257"], 'period: expected 1 to 256 or "auto"'),
        (["--prompt", "x", "--tree-width", "17"], "tree_width: expected 1 to 16"),
        (["--prompt", "x", "--prune"], "prune: a chain has nothing to prune"),
        (["--prompt", "x", "--seed", "1"], "--seed: it needs --sample"),
        (["--prompt", "x", "--sample", "--temperature", "0"], "--temperature: expected"),
        (["--prompt", "x", "--sample", "--top-k", "-1"], "--top-k: expected"),
        (["--prompt", "x", "--sample", "--top-p", "0"], "--top-p: expected"),
        (["--prompt", "x", "--sample", "--accept", "match"], "--accept: match and --sample do not go together"),
        (["--prompt", "x", "--accept", "sample"], "--accept: sample and no --sample do not go together"),
        (["--prompt", "x", "--thresholds", "nowhere", "--sparsity", "fsparse"], "--thresholds: no file nowhere"),
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
