"""The command line: in this process on the default model, and in a fresh one where only that can show it."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import served

from sirius_ext import Engine
from sirius_ext.cli import demo, reading
from sirius_ext.cli import main as cli
from sirius_ext.cli.streamer import KeepingStreamer
from sirius_ext.kernels import ops
from sirius_ext.models.packed import Checkpoint
from sirius_ext.models.tier_files import TierFiles

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


def test_generate_says_how_much_of_a_long_prompt_is_read(capsys, monkeypatch):
    arguments = ["generate", "--prompt", PROMPT * 60, "--max-new-tokens", "2", "--mode", "full"]
    monkeypatch.setattr(reading, "SECONDS", 1e-6)
    err = run(capsys, *arguments)[2]
    assert re.search(r"^reading the prompt of 3\d\d tokens \.\.\. \d+\.\d s$", err, re.MULTILINE), err
    monkeypatch.setattr(reading, "SECONDS", 60.0)
    assert "reading the prompt" not in run(capsys, *arguments)[2]


def test_match_and_full_print_the_same_text(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ["--prompt-file", str(tmp_path / "prompt.txt"), "--chat", "--max-new-tokens", "12"]
    texts = [
        run(capsys, "generate", *arguments, *mode)[1]
        for mode in (
            ("--mode", "full"),
            ("--accept", "match", "--period", "4"),
            ("--mode", "csparse", "--density", "1", "--draft-weights", "same"),
        )
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
    for way in (["--tree-width", "4", "--period", "3"], ["--tree-width", "2", "--prune"], ["--period", "auto"], ["--lookup"]):
        arguments = ["--prompt", PROMPT, "--max-new-tokens", "16", "--dtype", "float32", "--accept", "match", *way]
        status, out, err = run(capsys, "generate", *arguments)
        assert status == 0 and out == full, err
    stop = full.split()[2]
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "16", "--draft-weights", "same", "--stop", "#@", "--stop", stop]
    _, out, _ = run(capsys, "generate", *arguments)
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
    assert re.search(r"^calibrating with \d+ tokens$", err, re.MULTILINE), err
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
    assert status == 2 and "--thresholds: --mode sirius --sparsity csparse --accept threshold does not use it" in err


def test_threads(capsys):
    assert run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--threads", "1")[0] == 0


def test_json_on_standard_output(capsys, monkeypatch):
    """Nothing else goes there. A byte order mark and a Windows line's end do not get into a prompt."""
    prompt = b"\xef\xbb\xbfOne line.\r\nThe three primary colours are"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt), encoding="ascii"))
    status, out, err = run(capsys, "generate", "--prompt-file", "-", "--json", "-", "--max-new-tokens", "6")
    record = json.loads(out)
    assert status == 0 and record["prompt"] == "One line.\nThe three primary colours are"
    assert record["text"].strip() in err and record["interrupted"] is False


@pytest.mark.parametrize("stop, status", [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_a_text_that_is_stopped_is_kept(capsys, monkeypatch, tmp_path, stop, status):
    file, put = tmp_path / "out.json", KeepingStreamer.put

    def stop_behind_five(self, value):
        put(self, value)
        if len(self.tokens) >= 5:
            raise stop

    monkeypatch.setattr(KeepingStreamer, "put", stop_behind_five)
    arguments = ["generate", "--prompt", PROMPT, "--mode", "full", "--max-new-tokens", "20", "--json", str(file)]
    found, out, err = run(capsys, *arguments)
    record = json.loads(file.read_text())
    assert found == status and len(record["token_ids"]) == 5 and record["interrupted"] is True and record["stats"] is None
    if status == 130:
        assert out == record["text"] + "\n" and err.endswith("sirius_ext: interrupted\n")


def test_prepare(capsys, folder, tmp_path, monkeypatch):
    """Stopped in the middle, gone on with, and looked through. Another folder is left alone."""
    out = tmp_path / "my tiers"
    arguments = ["prepare", str(folder), "--out", str(out), "--weights", "q8", "--dtype", "fp32"]
    read = Checkpoint.read

    def stop_in_the_second_layer(self, name):
        if name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read", stop_in_the_second_layer)
        status, _, err = run(capsys, *arguments)
    interrupted = f"sirius_ext: interrupted; what is done stays in {out}, and the same command goes on from there\n"
    assert status == 130 and err.endswith(interrupted)
    for _ in range(2):
        status, text, err = run(capsys, *arguments)
        assert status == 0 and err.startswith(f"preparing {folder} in {out} ... ") and err.count("\n") == 1
        files = TierFiles.open(out)
        fast, size = f"{files.fast_bytes() / 1e6:.1f} MB", f"{files.neurons.stat().st_size / 1e6:.1f} MB"
        expected = f"{out}: {fast} for the memory, {size} of neurons that stay on the disk; use it as --model '{out}'\n"
        assert text == expected and files.weights == "q8"
        monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("prepared again"))
    status, text, err = run(capsys, *arguments[:3], str(folder))
    assert status == 2 and text == ""
    assert f"sirius_ext: error: --out: {folder}: expected a new folder or an empty one, but it has config.json\n" in err


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for isa in ops.available_isas():
        assert isa in out
    assert f"{ops.isa()} (in use)" in out and "devices" in out


def test_info_keeps_to_the_width_of_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    whole = run(capsys, "info", "--model", "smollm2-135m-instruct", "--memory", "6GB")[1]  # a pipe has none
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out = run(capsys, "info", "--model", "smollm2-135m-instruct", "--memory", "6GB")[1]
    assert max(map(len, whole.splitlines())) > 100 and max(map(len, out.splitlines())) <= 60
    words = lambda text: re.sub(r"\d[\d.]*", "0", text).split()  # noqa: E731 - speeds are measured anew
    assert words(out) == words(whole)
    monkeypatch.setenv("COLUMNS", "1")
    assert run(capsys, "info")[0] == 0


def test_demo_ends_with_a_table_and_match_equals_full(capsys, monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", {"a prompt": PROMPT})
    status, out, _ = run(capsys, "demo", "--max-new-tokens", "8")
    assert status == 0
    assert "Sirius under `match` gave exactly Full's text." in out
    for row in ("transformers", "Full", "CSparse", "Sirius, threshold", "Sirius, match"):
        assert row in out


def test_a_demo_decodes_a_prompt_every_way_before_the_next_one(capsys, monkeypatch):
    """transformers each time with the weights as it loaded them, and Full with the same text whatever came between."""
    monkeypatch.setattr(demo, "PROMPTS", {"one": PROMPT, "two": PROMPT})
    status, out, _ = run(capsys, "demo", "--max-new-tokens", "6")
    assert status == 0
    headings = [line for line in out.splitlines() if line.endswith((": one", ": two"))]
    rows = [line.removesuffix(": one") for line in headings[: len(headings) // 2]]
    assert rows[0] == "transformers" and rows[-1] == "Sirius, match"
    assert headings == [f"{row}: {title}" for title in ("one", "two") for row in rows]
    places = [out.splitlines().index(heading) for heading in headings]
    texts = [out.splitlines()[place + 1] for place in places]
    assert texts[: len(rows)] == texts[len(rows) :]


@pytest.mark.parametrize("model, slower", [("smollm2-135m-instruct", True), ("smollm2-135m-instruct", False), ("other", True)])
def test_a_demo_that_was_slow_names_a_larger_model(capsys, monkeypatch, model, slower):
    """Of the default model, which is small; of another it does not know that."""
    decode, seconds = demo._decode, {"Sirius, threshold": 1.1 if slower else 0.9, "Sirius, match": 1.2}

    def timed(row, inputs, count, streamer):
        stats = decode(row, inputs, count, streamer)
        if streamer is not None:
            streamer.first, streamer.last = 1.0, 1.0 + seconds.get(row.name, 1.0)
        return stats

    monkeypatch.setattr(demo, "_decode", timed)
    engine = Engine(served.model(), served.CONFIG, served.tokenizer())
    assert demo.compare(engine, None, model, 4) == 0
    advised = f"make demo MODEL={demo.LARGER}" in capsys.readouterr().out
    assert advised == (slower and model != "other")


def test_a_demo_of_one_token_has_no_speed(capsys, monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", {"a prompt": PROMPT})
    status, out, _ = run(capsys, "demo", "--max-new-tokens", "1")
    assert status == 0 and "Sirius, match" in out and "100%" in out


def fresh(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("isa", ops.available_isas())
def test_the_variable_forces_an_instruction_set(isa):
    result = fresh("import torch; from sirius_ext.kernels import ops; print(ops.isa())", SIRIUS_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_an_unknown_instruction_set_is_refused():
    result = fresh("import torch; from sirius_ext.kernels import ops; print(ops.isa())", SIRIUS_ISA="sse9")
    assert result.returncode != 0 and "SIRIUS_ISA: expected one of" in result.stderr and "sse9" in result.stderr
    with pytest.raises(ValueError, match="expected one of"):
        ops.set_isa("sse9")


@pytest.mark.parametrize("variable", ["SIRIUS_ISA", "SIRIUS_GRAPHS"])
def test_variables_are_looked_at_before_a_model_is_loaded(variable):
    """Not by a thread of a kernel, where nothing can be said any more."""
    command = [sys.executable, "-m", "sirius_ext", "generate", "--prompt", "Hi", "--model", "/nowhere"]
    result = subprocess.run(
        command, env={**os.environ, variable: "foo"}, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2 and result.stderr.startswith(f"sirius_ext: error: {variable}: expected one of"), result.stderr


def test_a_kernel_refuses_an_unknown_instruction_set():
    """It is the thread that called which looks for it, and not one of the team."""
    code = "import torch; from sirius_ext.kernels import ops; ops.linear(torch.ones(1, 64), torch.ones(64, 64))"
    result = fresh(code, SIRIUS_ISA="sse9")
    assert result.returncode == 1 and "ValueError: SIRIUS_ISA: expected one of" in result.stderr, result.stderr


def test_a_costly_text_says_so_in_one_line(capsys):
    """And one that is not says nothing."""
    arguments = ["generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--accept", "match", "--period", "16"]
    _, _, err = run(capsys, *arguments, "--density", "0.05")
    (line,) = [line for line in err.splitlines() if line.startswith("sirius_ext: this text read more than the full model alone")]
    assert "suits it" in line and "CostlyDrafts" not in err
    assert "this text read more" not in run(capsys, *arguments, "--density", "1", "--draft-weights", "same")[2]
