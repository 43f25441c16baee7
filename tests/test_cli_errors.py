"""What the command line refuses: one line on stderr that names the option, status 2, and no model is loaded for it.

A row is a command, in a folder with the files of `here`, and a part of the line.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from test_evaluation import write

from sirius_ext.cli import demo
from sirius_ext.cli import main as cli
from sirius_ext.cli.arguments import Parser, as_option, check_text, output_file, reason
from sirius_ext.decoding.thresholds import Thresholds
from sirius_ext.errors import naming, write_text
from sirius_ext.evaluation.results import Results

LONG = "n" * 300

GENERATE = [
    ("generate", "one of the arguments --prompt --prompt-file is required"),
    ("generate --prompt", "--prompt: expected one argument"),
    ("generate --prompt ''", "--prompt: expected some text, got none"),
    ("generate --prompt x --prompt-file text", "--prompt-file: not allowed with argument --prompt"),
    ("generate --prompt x more", "unrecognized arguments: more"),
    ("generate --prompt x --frobnicate", "unrecognized arguments: --frobnicate\n"),
    ("generate --promt x", "unrecognized arguments: --promt; did you mean --prompt?"),
    ("generate --promt=x", "unrecognized arguments: --promt; did you mean --prompt?"),
    ("generate --prompt x --sparsty fsparse", "unrecognized arguments: --sparsty fsparse; did you mean --sparsity?"),
    (
        "generate --prompt x --perod 2 --acept match",
        "unrecognized arguments: --perod 2 --acept match; did you mean --period, --acc",
    ),
    ("generate --mode ful --promt x", "unrecognized arguments: --promt; did you mean --prompt?"),
    ("generate -- --promt", "one of the arguments --prompt --prompt-file is required"),
    ("--verson generate --what x", "unrecognized arguments: --verson; did you mean --version?"),
    ("generate --prompt x --thresh 1", "ambiguous option: --thresh could match --thresholds, --threshold"),
    ("generate --prompt-file nowhere", "--prompt-file: no file nowhere"),
    ("generate --prompt-file folder", "--prompt-file: expected a file, got the folder folder"),
    ("generate --prompt-file ''", "--prompt-file: expected a path, got an empty one"),
    ("generate --prompt-file empty", "--prompt-file: empty is empty"),
    ("generate --prompt-file mark", "--prompt-file: mark is empty"),
    ("generate --prompt-file binary", "--prompt-file: binary is not UTF-8 text (byte 0: invalid start byte)"),
    ("generate --prompt-file text --json text", "--prompt-file: expected another file than that of --json, got text for both"),
    ("generate --prompt x --json folder", "--json: expected a file, got the folder folder"),
    ("generate --prompt x --json nowhere/out", "--json: no folder"),
    ("generate --prompt x --json text/out", "--json: no folder"),
    ("generate --prompt x --json ''", "--json: expected a path, got an empty one"),
    (f"generate --prompt x --json {LONG}", "File name too long"),
    ("generate --prompt x --json /proc/out", "--json: no file can be written in /proc: "),
    ("generate --prompt x --period x", "--period: expected an integer or auto, got 'x'"),
    ("generate --prompt x --period 0", "--period: expected 1 to 256 or auto, got 0"),
    ("generate --prompt x --period 257", "--period: expected 1 to 256 or auto, got 257"),
    (f"generate --prompt x --period {'9' * 5000}", "--period: expected an integer or auto, got '999"),
    ("generate --prompt x --density x", "--density: expected a number or auto, got 'x'"),
    ("generate --prompt x --density 0", "--density: expected more than 0 and at most 1, got 0"),
    ("generate --prompt x --density nan", "--density: expected a finite number, got nan"),
    ("generate --prompt x --threshold 2", "--threshold: expected 0 to 1, got 2"),
    ("generate --prompt x --threshold inf", "--threshold: expected a finite number, got inf"),
    ("generate --prompt x --tree-width 17", "--tree-width: expected 1 to 16, got 17"),
    ("generate --prompt x --tree-width 1.5", "--tree-width: expected an integer, got '1.5'"),
    ("generate --prompt x --prune", "--prune: a chain has nothing to prune; it needs --tree-width > 1"),
    ("generate --prompt x --accept maybe", "--accept: invalid choice: 'maybe'"),
    ("generate --prompt x --mode sparse", "--mode: invalid choice: 'sparse'"),
    ("generate --prompt x --max-new-tokens 0", "--max-new-tokens: expected 1 to 2147483647, got 0"),
    ("generate --prompt x --max-new-tokens 99999999999", "--max-new-tokens: expected 1 to 2147483647, got 99999999999"),
    ("generate --prompt x --max-new-tokens many", "--max-new-tokens: expected an integer, got 'many'"),
    ("generate --prompt x --stop a --stop ''", "--stop: expected some text, got none"),
    ("generate --prompt x --threads 0", "--threads: expected 1 to "),
    ("generate --prompt x --threads 100000", "for each CPU), got 100000"),
    ("generate --prompt x --threads all", "--threads: expected an integer, got 'all'"),
    ("generate --prompt x --dtype int8", "--dtype: expected one of"),
    # Contradictions.
    ("generate --prompt x --temperature 1", "--temperature: it needs --sample"),
    ("generate --prompt x --top-k 50", "--top-k: it needs --sample"),
    ("generate --prompt x --top-p 1", "--top-p: it needs --sample"),
    ("generate --prompt x --seed 1", "--seed: it needs --sample"),
    ("generate --prompt x --sample --accept match", "--accept: --sample needs sample, got match"),
    ("generate --prompt x --accept sample", "--accept: sample needs --sample"),
    ("generate --prompt x --sample --threshold 0.1", "--threshold: --mode sirius --sparsity csparse --accept sample does not"),
    ("generate --prompt x --accept match --threshold 0.1", "--threshold: --mode sirius --sparsity csparse --accept match does"),
    ("generate --prompt x --thresholds thresholds", "--thresholds: --mode sirius --sparsity csparse --accept threshold does not"),
    ("generate --prompt x --mode csparse --sparsity fsparse", "--sparsity: --mode csparse decodes with csparse alone, got fsp"),
    ("generate --prompt x --mode csparse --thresholds thresholds", "--thresholds: --mode csparse does not use it"),
    ("generate --prompt x --mode csparse --period 16", "--period: --mode csparse does not use it"),
    ("generate --prompt x --mode fsparse --accept match", "--accept: --mode fsparse does not use it"),
    ("generate --prompt x --mode fsparse --threshold 0.1", "--threshold: --mode fsparse does not use it"),
    ("generate --prompt x --mode full --period 16", "--period: --mode full does not use it"),
    ("generate --prompt x --mode full --tree-width 1", "--tree-width: --mode full does not use it"),
    ("generate --prompt x --mode full --density 0.5", "--density: --mode full does not use it"),
    ("generate --prompt x --mode full --sparsity csparse", "--sparsity: --mode full does not use it"),
    ("generate --prompt x --mode full --thresholds thresholds", "--thresholds: --mode full does not use it"),
    ("generate --prompt x --mode full --threshold 0.1", "--threshold: --mode full does not use it"),
    ("generate --prompt x --mode full --accept match", "--accept: --mode full does not use it"),
    ("generate --prompt x --mode full --prune", "--prune: --mode full does not use it"),
    ("generate --prompt x --lookup --sample", "--lookup: not with --sample, whose tokens are drawn"),
    ("generate --prompt x --lookup --sparsity fsparse", "--lookup: not with --sparsity fsparse, whose"),
    ("generate --prompt x --lookup --mode fsparse", "--lookup: not with --sparsity fsparse, whose"),
    ("generate --prompt x --lookup --tree-width 2", "--lookup: it needs a chain, --tree-width 1, got 2"),
    # Sampling.
    ("generate --prompt x --sample --temperature 0", "--temperature: expected a finite number of at least 0.000001, got 0"),
    ("generate --prompt x --sample --temperature inf", "--temperature: expected a finite number of at least 0.000001, got inf"),
    ("generate --prompt x --sample --temperature nan", "--temperature: expected a finite number of at least 0.000001, got nan"),
    ("generate --prompt x --sample --temperature hot", "--temperature: expected a number, got 'hot'"),
    ("generate --prompt x --sample --top-k -1", "--top-k: expected 0 to 2147483647, got -1"),
    ("generate --prompt x --sample --top-p 0", "--top-p: expected more than 0 and at most 1, got 0"),
    ("generate --prompt x --sample --top-p 1.1", "--top-p: expected more than 0 and at most 1, got 1.1"),
    ("generate --prompt x --sample --top-p nan", "--top-p: expected more than 0 and at most 1, got nan"),
    ("generate --prompt x --sample --seed -1", "--seed: expected 0 to 18446744073709551615, got -1"),
    ("generate --prompt x --sample --seed 18446744073709551616", "--seed: expected 0 to 18446744073709551615, got 18446744073"),
    # Files of calibrate.
    ("generate --prompt x --sparsity fsparse --thresholds nowhere", "--thresholds: no file nowhere"),
    ("generate --prompt x --sparsity fsparse --thresholds folder", "--thresholds: expected a file, got the folder folder"),
    ("generate --prompt x --sparsity fsparse --thresholds text", "--thresholds: text is not a file of"),
    ("generate --prompt x --sparsity fsparse --thresholds binary", "--thresholds: binary is not a file of"),
    ("generate --prompt x --mode fsparse --density 0.4 --thresholds thresholds", "thresholds was made for density 0.5, but dens"),
]

CALIBRATE = [
    ("calibrate", "the following arguments are required: --text, --out"),
    ("calibrate --text nowhere --out t", "--text: no file nowhere"),
    ("calibrate --text folder --out t", "--text: expected a file, got the folder folder"),
    ("calibrate --text binary --out t", "--text: binary is not UTF-8 text"),
    ("calibrate --text empty --out t", "--text: empty is empty"),
    ("calibrate --text text --out t", "--text: expected at least 64 tokens, got 8 bytes"),
    ("calibrate --text text --out folder", "--out: expected a file, got the folder folder"),
    ("calibrate --text text --out nowhere/t", "--out: no folder"),
    ("calibrate --text text --out text", "--out: expected another file than that of --text, got text for both"),
    ("calibrate --text text --out -", "--out: expected a file, got -; ./- is one of that name"),
    ("calibrate --text text --out t --density 1", "--density: expected more than 0 and less than 1, got 1"),
    ("calibrate --text text --out t --density half", "--density: expected a number, got 'half'"),
]

EVAL = [
    (f"eval --task csqa --data data --out out {options}", message)
    for options, message in (
        ("--task chess", "--task: invalid choice: 'chess'"),
        ("--data nowhere", "--data: no folder nowhere"),
        ("--data text", "--data: expected a folder, got the file text"),
        ("--data folder", "--data: no commonsenseqa/dev_rand_split.jsonl in folder, which csqa needs"),
        ("--out folder", "--out: expected a file, got the folder folder"),
        ("--out nowhere/out", "--out: no folder"),
        ("--out results", "--out: results exists; --resume goes on with it, or choose another name"),
        ("--out results --resume", "--out: results was made with another accept, density"),
        ("--out seven --resume", "seven: not a file of results: line 2: expected true or false as correct, got 7"),
        ("--modes full,dense", "--modes: expected some of full, csparse"),
        ("--modes full,", "--modes: expected one or several with commas between them, got 'full,'"),
        ("--modes full,full", "--modes: expected each once, got full 2 times"),
        ("--modes sirius-c:width=2", "--modes: expected settings among density, follow, period"),
        ("--modes sirius-c:period=x", "--modes: expected a number for period, got 'sirius-c:period=x'"),
        ("--modes sirius-c:period=0", "--modes: sirius-c:period=0: period: expected 1 to 256"),
        ("--modes sirius-c:threshold=nan", "--modes: sirius-c:threshold=nan: threshold: expected a finite number, got nan"),
        ("--shots 9", "--shots: expected 0 to 5 for csqa, got 9"),
        ("--shots few", "--shots: expected an integer, got 'few'"),
        ("--limit 0", "--limit: expected at least 1, got 0"),
        ("--skip -1", "--skip: expected at least 0, got -1"),
        ("--skip 1", "--skip: expected less than the 1 items of csqa, got 1"),
        ("--shard half", "--shard: expected i/k with 1 <= i <= k, got 'half'"),
        ("--shard 3/2", "--shard: expected i/k with 1 <= i <= k, got '3/2'"),
        ("--shard 2/2", "--shard: part 2 of 2 has no items"),
        ("--accept sample", "--accept: expected threshold or match, got sample"),
        ("--accept match --threshold 0.1", "--threshold: --accept match does not use it"),
        ("--density 0", "--density: expected more than 0 and at most 1, got 0"),
        ("--thresholds text", "--thresholds: text is not a file of"),
        ("--thresholds thresholds --out thresholds --resume", "--thresholds: expected another file than that of --out"),
        ("--batch 0", "--batch: expected at least 1, got 0"),
        ("--batch 2 --period auto", "--batch: more than 1 needs a fixed period"),
        ("--batch 2 --modes full,sirius-c:period=auto", "--batch: more than 1 needs a fixed period"),
        ("--batch 2 --device cuda", "--batch: more than 1 is decoded by the CPU, but the device is cuda"),
        ("--batch 2 --device 1", "--batch: more than 1 is decoded by the CPU, but the device is cuda:1"),
        ("--jobs 0", "--jobs: expected at least 1, got 0"),
        ("--jobs 1000", "for each CPU), got 1000"),
    )
]

STUDY = [
    (f"study --task csqa --data data --out out {options}", message)
    for options, message in (
        ("", "the following arguments are required: --what"),
        ("--what colour", "--what: invalid choice: 'colour'"),
        ("--what period --out text", "--out: expected a folder, got the file text"),
        ("--what period --out nowhere/out", "--out: no folder"),
        ("--what period --values 4,x", "--values: expected numbers for period, got 4,x"),
        ("--what period --values 4,4", "--values: expected each once, got 4 2 times"),
        ("--what density --values 0.5,0.50", "--values: expected one or several different ones, got 0.5, 0.5"),
        ("--what period --values ''", "--values: expected one or several with commas between them, got ''"),
        ("--what period --values 4,999", "--values: 999: period: expected 1 to 256"),
        ("--what threshold --values nan", "--values: nan: threshold: expected a finite number, got nan"),
        ("--what period --period 5", "--period: --what period varies it; expected one of 4, 8, 16, 24, 32, got 5"),
        ("--what width --tree-width 3", "--tree-width: --what width varies it; expected one of 1, 2, 4, 8, got 3"),
        ("--what period --accept match --threshold 0.1", "--threshold: --accept match does not use it"),
        ("--what threshold --accept match", "--what: the threshold decides nothing with --accept match"),
        ("--what period --mode full", "--mode: invalid choice: 'full'"),
    )
]

ANALYZE = [
    (f"analyze --task csqa --data data --out out {options}", message)
    for options, message in (
        ("--out folder", "--out: expected a file, got the folder folder"),
        ("--json folder", "--json: expected a file, got the folder folder"),
        ("--json out", "--json: expected another file than that of --out, got out for both"),
        ("--json nowhere/out", "--json: no folder"),
        ("--items ''", "--items: expected one or several with commas between them, got ''"),
        ("--items one,one", "--items: expected each once, got one 2 times"),
        ("--items two", "--items: csqa has no two; its first ids are one"),
        ("--items one --limit 1", "--limit: --items says which, in its place"),
        ("--items one --skip 0", "--skip: --items says which, in its place"),
        ("--thresholds thresholds", "--thresholds: --mode csparse does not use it"),
        ("--mode fsparse --thresholds text", "--thresholds: text is not a file of"),
        ("--threshold 2", "--threshold: expected 0 to 1, got 2"),
        ("--period 4", "unrecognized arguments: --period 4"),
    )
]

REPORT = [
    ("report", "the following arguments are required: FILE"),
    ("report nowhere", "no file nowhere"),
    ("report folder", "expected a file, got the folder folder"),
    ("report empty", "empty: not a file of results: it is empty"),
    ("report binary", "binary: not a file of results: it is not UTF-8 text"),
    ("report text", "text: not a file of results: line 1: expected JSON, got 'A text.'"),
    ("report seven", "seven: not a file of results: line 2: expected true or false as correct, got 7"),
    ("report results seven", "seven: not a file of results: line 2"),
    ("report results other", "other was made with another task, so it does not go with the others"),
    ("report run", "run: no results, only what was run"),
    ("report results --out folder", "--out: expected a file, got the folder folder"),
    ("report results --out nowhere/out", "--out: no folder"),
]

PREPARE = [
    ("prepare", "the following arguments are required: MODEL, --out"),
    ("prepare '' --out tiers", "MODEL: expected some text, got none"),
    ("prepare folder", "the following arguments are required: --out"),
    ("prepare folder --out text", "--out: expected a folder, got the file text"),
    ("prepare folder --out nowhere/tiers", "--out: no folder"),
    ("prepare folder --out ''", "--out: expected a path, got an empty one"),
    ("prepare folder --out tiers --weights q5", "--weights: expected one of plain, q8, q4, got 'q5'"),
    ("prepare folder --out tiers --dtype int8", "--dtype: expected one of"),
    ("prepare folder --out tiers --device cpu", "unrecognized arguments: --device cpu"),
]

OTHERS = [
    ("", "expected a command: generate, chat, serve, calibrate, prepare, eval, report, study, analyze, lm_eval, demo, info; "),
    ("frobnicate", "COMMAND: invalid choice: 'frobnicate'"),
    ("demo --max-new-tokens 0", "--max-new-tokens: expected 1 to 2147483647, got 0"),
    ("demo --density 2", "--density: expected more than 0 and at most 1, got 2"),
    ("demo --period x", "--period: expected an integer or auto, got 'x'"),
    ("demo --period 999", "--period: expected 1 to 256 or auto, got 999"),
    ("info more", "unrecognized arguments: more"),
    ("info --model ''", "--model: expected some text, got none"),
    ("info --model folder --memory lots", "--memory: expected a size as 500M, 6GB or 1.5GiB, got 'lots'"),
    ("info --model folder --weights q5", "--weights: expected one of plain, q8, q4, got 'q5'"),
    ("info --memory 6GB", "--memory: it needs --model, of which it says something"),
    ("info --weights q8", "--weights: it needs --model"),
    ("info --device cuda", "--device: it needs --model"),
    ("info --dtype fp32", "--dtype: it needs --model"),
    ("generate --prompt x --memory 6apples", "--memory: expected a size as 500M, 6GB or 1.5GiB, got '6apples'"),
]

# Refused by who loads models, or for the model that was loaded.
MODELS = [
    ("generate --prompt x --model no/such/model/anywhere", "--model: 'no/such/model/anywhere' does not exist"),
    ("generate --prompt x --model ''", "--model: '' does not exist"),
    ("generate --prompt x --model folder", "--model: the folder 'folder' has no config.json"),
    ("generate --prompt x --model binary", "--model: 'binary' is not a GGUF file"),
    ("generate --prompt x --device tpu", "--device: expected auto, cpu, cuda, cuda:1, ..., got 'tpu'"),
    ("generate --prompt x --device meta", "--device: 'meta' is not supported; use cpu, cuda, cuda:1, ..."),
    ("calibrate --text long --out t --model no/such/model/anywhere", "--model: 'no/such/model/anywhere' does not exist"),
    ("eval --task csqa --data data --out out --thresholds thresholds", "--thresholds: thresholds was made for another model"),
    ("generate --prompt x --mode fsparse --thresholds thresholds", "--thresholds: thresholds was made for another model"),
    ("eval --task csqa --data data --out out --model no/such/model/anywhere", "--model: 'no/such/model/anywhere' does not exist"),
    ("info --model no/such/model/anywhere", "--model: 'no/such/model/anywhere' does not exist"),
    ("info --model folder --memory 1GB", "--model: the folder 'folder' has no config.json"),
    ("info --model part", "--model: the folder 'part' was prepared only in part"),
    ("prepare no/such/model/anywhere --out tiers", "model: 'no/such/model/anywhere' does not exist"),
    ("prepare folder --out tiers", "model: the folder 'folder' has no config.json"),
    ("prepare binary --out tiers", "model: 'binary' is not a GGUF file"),
    ("generate --prompt x --model part", "--model: the folder 'part' was prepared only in part; the same command again goes on"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of the commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "preparing.json").write_text("{}")
    for name, content in (
        ("text", b"A text.\n"),
        ("long", b"A text. " * 20),
        ("empty", b""),
        ("mark", b"\xef\xbb\xbf"),
        ("binary", b"\xff\xfe\x00"),
    ):
        (tmp_path / name).write_bytes(content)
    Thresholds(0.5, [0.1], [0.5], (64, 12), "a model").save("thresholds")
    right = {"mode": "full", "id": "a", "correct": True}
    for name, lines in (("run", []), ("results", [right]), ("seven", [{**right, "correct": 7}])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in ({"run": {"task": "csqa"}}, *lines)))
    (tmp_path / "other").write_text(json.dumps({"run": {"task": "gsm8k"}}) + "\n")
    write("csqa", tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize(
    "command, message", [*GENERATE, *CALIBRATE, *EVAL, *STUDY, *ANALYZE, *REPORT, *PREPARE, *OTHERS], ids=lambda text: text[:100]
)
def test_refused(here, capsys, monkeypatch, command, message):
    monkeypatch.setattr("sirius_ext.engine.load_model", lambda *_: pytest.fail("the model was loaded"))
    refused(here, capsys, command, message)


@pytest.mark.parametrize("command, message", MODELS)
def test_models_refused(here, capsys, command, message):
    refused(here, capsys, command, message)


def refused(here, capsys, command, message):
    """Nothing is written but what says that a model loads."""
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    assert cli.main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    err = re.sub(r"(loading|packing) .* ... .* s\n", "", err)
    assert out == "" and err.startswith("sirius_ext: error: ") and message in err and err.count("\n") == 1, err
    assert {file: file.read_bytes() for file in here.rglob("*") if file.is_file()} == before


def test_a_folder_that_cannot_be_written(here, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(Exception, match="^no file can be written in .*: No space left on device"):
        output_file("out")


def test_a_file_that_cannot_be_written(here):
    """Not even by root: the file of a program that runs."""
    shutil.copy(shutil.which("sleep"), "text")
    with subprocess.Popen(["./text", "60"]) as program:
        try:
            with pytest.raises(Exception, match="text: Text file busy"):
                output_file("text")
        finally:
            program.kill()


def test_paths_that_are_no_plain_files(here):
    """They are not tried: a pipe that is opened twice is another one."""
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    read, written = os.pipe()  # as the shell's >(command)
    for name in ("pipe", "link", "/dev/null", f"/dev/fd/{written}"):
        assert str(output_file(name)) == name
    os.close(read)
    os.close(written)
    assert not (here / "nowhere").exists()


def test_arguments_that_are_not_utf8():
    bad = os.fsdecode(b"a\xff")
    for arguments, name, shown in (
        (["generate", "--prompt", bad], "--prompt", r"b'a\xff'"),
        (["generate", f"--stop={bad}"], "--stop", r"b'a\xff'"),
        (["report", bad], "argument 2", r"b'a\xff'"),
        ([bad], "argument 1", r"b'a\xff'"),
    ):
        with pytest.raises(ValueError) as error:
            check_text(arguments)
        assert str(error.value) == f"{name}: expected UTF-8, got the bytes {shown}"


def test_arguments_that_the_locale_cannot_read():
    """UTF-8 it is, but Python was told not to take it as such."""
    command = [sys.executable, "-m", "sirius_ext", "generate", "--prompt", "Größe"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    said = r"expected ASCII, got the bytes b'Gr\xc3\xb6\xc3\x9fe'; with PYTHONUTF8=1 in the environment it is UTF-8"
    assert (done.returncode, done.stderr) == (2, f"sirius_ext: error: --prompt: {said}\n")


@pytest.mark.parametrize(
    "stdin, message",
    [
        (b"\xff", "--prompt-file: standard input is not UTF-8 text"),
        (b"", "--prompt-file: standard input is empty"),
        (None, "--prompt-file: standard input is closed"),
    ],
)
def test_standard_input(here, capsys, monkeypatch, stdin, message):
    monkeypatch.setattr("sys.stdin", stdin if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
    refused(here, capsys, "generate --prompt-file -", message)


def test_settings_are_named_as_options():
    parser = Parser()
    parser.add_argument("--tree-width")
    assert as_option("tree_width: expected 1", parser) == "--tree-width: expected 1"
    assert as_option("period: expected 1", parser) == "period: expected 1"
    assert as_option("no colon", parser) == "no colon"
    assert as_option('period: with tree_width="2" or "auto"', parser) == "period: with --tree-width 2 or auto"
    assert as_option("it needs tree_width > 1", parser) == "it needs --tree-width > 1"
    kept = "a/tree_width=1: sirius-c:tree_width=2, a tree_width, period=3"
    assert as_option(kept, parser) == kept


def test_a_full_disk_has_a_files_name(tmp_path):
    """Also while results are written, and where they are made."""
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        write_text(tmp_path / "full", "x")
    assert reason(error.value) == f"{tmp_path}/full: No space left on device"
    results = Results(tmp_path / "full", {}, resume=True)
    results._file = open("/dev/full", "w")  # noqa: SIM115 - it is closed by what is tested
    with pytest.raises(OSError) as error:
        results.add({"mode": "full"})
    assert reason(error.value) == f"{tmp_path}/full: No space left on device"
    with pytest.raises(BrokenPipeError), naming("x"):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reason_is_whole():
    assert reason(ValueError("model: one\n\n  two\nthree")) == "model: one two three"
    assert reason(ValueError("\n".join("abcdefgh"))) == "\n".join("abcdefgh")
    assert reason(FileNotFoundError(2, "No such file", "x")) == "x: No such file" and reason(OSError("why")) == "why"
    assert reason(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (RuntimeError("device: no\nroom"), 1, "--device: no room"),
        (MemoryError(), 1, "MemoryError"),
        (OSError("no"), 2, "no"),
    ],
)
def test_what_fails_later(capsys, monkeypatch, error, status, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(demo, "engine_of", fail)
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err == f"sirius_ext: error: {line}\n"


def test_a_prompt_longer_than_the_context(here, capsys):
    (here / "text").write_text("word " * 9000)
    assert cli.main(["generate", "--prompt-file", "text"]) == 2
    assert "--prompt: it has 9001 tokens; the model's context holds 8192, one for the answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "generate", "calibrate", "prepare", "eval", "report", "study", "analyze", "demo", "info"]
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "None" not in out and "SUPPRESS" not in out and "python -m sirius_ext" in out


def test_help_is_in_groups_with_an_example(capsys, monkeypatch, tmp_path):
    """Every command's example can be given as it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a text")
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("generate", "chat", "serve", "calibrate", "eval", "study", "analyze"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        out = capsys.readouterr().out
        groups = re.findall(r"^([\w ]+):$", out, re.MULTILINE)
        assert groups[:2] == ["options", "model"] and len(groups) == len(set(groups)), groups
        assert set(groups) > {"decoding", "sampling", "output"} or command != "generate"
        (example,) = re.findall(r"^example: python -m sirius_ext (.*)$", out, re.MULTILINE)
        assert cli._parser().parse_args(shlex.split(example)).parser.prog.endswith(command)


def test_version_and_name(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/sirius"])
    for option, text in (("--version", "sirius_ext "), ("--help", "usage: sirius ")):
        with pytest.raises(SystemExit):
            cli.main([option])
        assert capsys.readouterr().out.startswith(text)
