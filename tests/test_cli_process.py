"""What only a process of its own shows: readers that leave, Ctrl-C, bytes that are no text."""

import json
import os
import signal
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "sirius_ext"]
TEXT = ["generate", "--prompt", "Tell me a long story.", "--chat", "--mode", "full", "--max-new-tokens", "2000"]


def start(command, **how):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def imported(command, **how):
    """What a Python process gives and imports: its exit status, its standard output, and the packages."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, timeout=120, **how)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, done.stdout, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def first_letters(process):
    """Once the text has begun."""
    return process.stdout.read(3)


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["report", "results"]], ids=str)
def test_a_reader_that_is_gone(tmp_path, arguments):
    lines = ({"run": {"task": "csqa"}}, {"mode": "full", "id": "a", "correct": True})
    (tmp_path / "results").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    read, written = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stdout=written,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    finally:
        os.close(written)
    assert (done.returncode, done.stderr) in ((0, b""), (141, b""))


def test_a_full_disk_behind_standard_output():
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stderr == "sirius_ext: error: standard output: No space left on device\n"


def test_a_full_disk_behind_a_text():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *TEXT], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.endswith("sirius_ext: error: standard output: No space left on device\n")


def test_a_reader_that_leaves(tmp_path):
    file = tmp_path / "out.json"
    process = start([*COMMAND, *TEXT, "--json", str(file)])
    assert first_letters(process)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=120) == 141 and "Traceback" not in error and "rror" not in error
    assert json.loads(file.read_text())["interrupted"]


def test_an_interrupt_in_the_middle_of_a_text(tmp_path):
    """The terminal's line is ended, and the tokens are kept."""
    file = tmp_path / "out.json"
    process = start([*COMMAND, *TEXT, "--json", str(file)])
    begun = first_letters(process)
    process.send_signal(signal.SIGINT)
    out, error = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=120) == 130
    record = json.loads(file.read_text())
    assert error.endswith("sirius_ext: interrupted\n") and "Traceback" not in error
    assert begun + out == record["text"] + "\n"
    assert record["interrupted"] and 0 < len(record["token_ids"]) < 2000


@pytest.mark.parametrize("way", ["module", "script"])
def test_an_interrupt_while_torch_is_imported(tmp_path, way):
    """Ended by the signal, as shells show by 130. The script is what pip makes of an entry point."""
    command = COMMAND[1:]
    if way == "script":
        (tmp_path / "sirius").write_text("import sys\nfrom sirius_ext.cli.main import main\nsys.exit(main())\n")
        command = [str(tmp_path / "sirius")]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    process = start([sys.executable, "-v", *command, "info"], env={**os.environ, "PYTHONPATH": path})
    for line in process.stderr:
        if line.startswith("import 'torch."):
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130) and out == "" and "Traceback" not in error


COMMANDS = ("generate", "chat", "serve", "calibrate", "prepare", "eval", "report", "study", "analyze", "demo", "info")
WRONG = [
    "",
    "nonsense",
    "--nonsense",
    "generate --nonsense",
    "generate --prompt x --threads 0",
    "generate --prompt x --dtype int8",
    "generate --prompt x --memory 6QB",
    "generate --prompt x --seed 3",
    "generate --prompt x --sparsity fsparse --thresholds nowhere",
    "generate --prompt x --sparsity fsparse --thresholds setup.py",
    "chat --mode full --period 3",
    "serve --temperature 3",
    "calibrate --text setup.py --density 2 --out /dev/null",
    "calibrate --text MANIFEST.in --out /dev/null",
    "generate --prompt-file /dev/null",
    "generate --prompt-file docs/page.png",
    "prepare model",
    "eval --task csqa --out results --modes full,ful",
    "eval --task csqa --out results --modes sirius-c:period=999",
    "eval --task csqa --out results --data docs",
    "analyze --task csqa --out results --data docs",
    "eval --task nonsense --out results",
    "study --task csqa --what period --values x --out .",
    "demo --density 2",
    "info --memory 6GB",
]


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{command} --help" for command in COMMANDS)])
def test_help_does_not_wait_for_imports(arguments):
    status, out, packages = imported(["-m", "sirius_ext", *arguments.split()])
    assert status == 0 and out and "sirius_ext" in packages and not packages & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_does_not_wait_for_imports(arguments):
    status, out, packages = imported(["-m", "sirius_ext", *arguments.split()])
    assert status == 2 and not out and "sirius_ext" in packages and not packages & {"torch", "transformers", "numpy"}


def test_a_report_needs_no_torch(tmp_path):
    lines = ({"run": {"task": "csqa"}}, {"mode": "full", "id": "a", "correct": True})
    (tmp_path / "results").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, packages = imported(["-m", "sirius_ext", "report", str(tmp_path / "results")])
    assert status == 0 and "full" in out and not packages & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("code", ["import sirius_ext", "from sirius_ext import SiriusConfig, Stats, attach, detach, generate"])
def test_the_package_imports_nothing_that_takes_seconds(code):
    status, _, packages = imported(["-c", code])
    assert status == 0 and "sirius_ext" in packages and not packages & {"torch", "transformers", "numpy"}


def test_a_kernel_needs_torch_alone():
    status, _, packages = imported(["-c", "from sirius_ext.kernels import ops; ops.isa()"])
    assert status == 0 and "torch" in packages and "transformers" not in packages


def test_what_runs_is_imported():
    """And seen by these tests."""
    status, out, packages = imported(["-m", "sirius_ext", "info"])
    assert status == 0 and out and packages >= {"torch", "transformers", "numpy"}


def test_bytes_that_are_no_text():
    done = subprocess.run([*COMMAND, "generate", "--prompt", b"a\xff"], capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == b"sirius_ext: error: --prompt: expected UTF-8, got the bytes b'a\\xff'\n" and not done.stdout
