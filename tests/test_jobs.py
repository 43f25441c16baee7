"""The items of a run over several processes: the same results, in one file."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from rich.console import Console
from test_evaluation import CSQA, write

from sirius_ext import SiriusConfig
from sirius_ext.cli import main as cli
from sirius_ext.evaluation import jobs
from sirius_ext.evaluation.plan import Plan
from sirius_ext.evaluation.results import Results, claimed, merge, read_results
from sirius_ext.evaluation.tasks import Item

QUIET = Console(quiet=True)
ITEMS = [Item(str(i), "?", "b") for i in range(5)]
PLAN = Plan("none", "float32", "cpu", None, "csqa", None, ("full", "sirius-c"), SiriusConfig(sparsity="fsparse"))


def record(mode, key, **more):
    return {"mode": mode, "id": key, "correct": True, **more}


def results_in(folder):
    return contextlib.closing(Results(folder / "out.jsonl", PLAN.record(), resume=True))


def test_a_launch_has_the_file_that_it_merges_into(tmp_path, monkeypatch):
    """Not only its processes' own ones: a run of another number of processes has others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = types.SimpleNamespace(process_index=0, num_processes=2, is_main_process=True)
    state.wait_for_everyone = state.destroy_process_group = lambda: None
    monkeypatch.setattr(jobs, "PartialState", lambda **_: state)
    out = tmp_path / "out.jsonl"
    with claimed(out), pytest.raises(ValueError, match="another run"), jobs.launched(PLAN, ITEMS, out, False):
        pass
    with jobs.launched(PLAN, ITEMS, out, False) as (_, _, results, _):
        with pytest.raises(ValueError, match="another run"), claimed(out):
            pass
        results.add(record("full", "0"))
    assert list(tmp_path.iterdir()) == [out] and read_results(out)[1] == [record("full", "0")]


def test_split():
    done = {(mode, "1") for mode in PLAN.modes} | {("full", "0")}
    parts = jobs.split(PLAN, ITEMS, done, 3, threads=8)
    assert [[item.id for item in part.items] for part in parts] == [["0", "4"], ["2"], ["3"]]
    assert all(part.plan.threads == 2 and part.done == done for part in parts)
    assert [len(part.items) for part in jobs.split(PLAN, ITEMS[:2], set(), 9, threads=8)] == [1, 1]
    assert jobs.split(PLAN, ITEMS, {(mode, item.id) for mode in PLAN.modes for item in ITEMS}, 3, 8) == []


def test_what_workers_send_is_kept(tmp_path):
    parts, sent = jobs.split(PLAN, ITEMS, set(), 2, 2), queue.Queue()
    for came in (record("full", "0"), jobs.End(1), record("full", "2"), jobs.End(0)):
        sent.put(came)
    with results_in(tmp_path) as results:
        jobs._keep(parts, sent, results, lambda: iter(()), QUIET)
    assert [each["id"] for each in read_results(tmp_path / "out.jsonl")[1]] == ["0", "2"]


def test_a_worker_that_dies(tmp_path, monkeypatch):
    """What it sent is kept, the others go on, and the end says who died."""
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.01)
    parts, sent = jobs.split(PLAN, ITEMS, set(), 2, 2), queue.Queue()
    sent.put(record("full", "0"))
    sent.put(jobs.End(1, "MemoryError: no room"))
    with (
        results_in(tmp_path) as results,
        pytest.raises(ChildProcessError, match="2 of 2 jobs.*job 1: exit status -9; job 2: Mem"),
    ):
        jobs._keep(parts, sent, results, lambda: iter([jobs.End(0, "exit status -9")]), QUIET)
    assert len(read_results(tmp_path / "out.jsonl")[1]) == 1


def test_merge(tmp_path):
    run = PLAN.record()
    for name, records in (
        ("a", [record("full", "0"), record("full", "1", error="x")]),
        ("b", [record("full", "1"), record("full", "0")]),
    ):
        Results.write(tmp_path / name, run, records)
    assert merge([tmp_path / "a", tmp_path / "b"]) == (run, [record("full", "0"), record("full", "1")])
    Results.write(tmp_path / "c", {**run, "task": "gsm8k"}, [])
    with pytest.raises(ValueError, match="c was made with another task"):
        merge([tmp_path / "a", tmp_path / "c"])


@pytest.fixture
def arguments(tmp_path):
    write("csqa", tmp_path, [{**CSQA, "id": str(i)} for i in range(3)])
    return ["eval", "--task", "csqa", "--data", str(tmp_path), "--modes", "full,sirius-c", "--shots", "0", "--period", "4"]


def texts(file):
    return {(each["mode"], each["id"]): each["text"] for each in read_results(file)[1]}


def test_processes_and_shards(tmp_path, arguments, capsys):
    """Two jobs, or two shards that a report puts together, or one after the other: the same."""
    one, two, both = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "both"))
    assert cli.main([*arguments, "--out", str(one), "--shard", "1/2"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--out", str(two), "--limit", "1"]) == 0
    assert cli.main([*arguments, "--out", str(two), "--resume", "--jobs", "2"]) == 0
    assert len(texts(two)) == 6
    assert cli.main(["report", str(one), str(two), "--out", str(both)]) == 0
    assert texts(both) == texts(two) and texts(one).items() < texts(two).items()
    assert "csqa, smollm2-135m-instruct, bfloat16, 0 shots" in capsys.readouterr().out


def test_a_model_that_no_job_finds(tmp_path, arguments, capsys):
    assert cli.main([*arguments, "--model", "no/such-folder/", "--out", str(tmp_path / "out.jsonl"), "--jobs", "2"]) == 2
    error = capsys.readouterr().err
    assert "2 of 2 jobs did not finish (job 1: ModelLoadError: model:" in error and "--resume goes on" in error


def test_workers_end_with_who_started_them(tmp_path, arguments):
    """Killed, it cannot end them itself. Its output ends with the last process that has it."""
    write("csqa", tmp_path, [{**CSQA, "id": str(i)} for i in range(1000)])
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "sirius_ext", *arguments, "--out", str(out), "--jobs", "2"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not (out.exists() and texts(out)):
            assert started.poll() is None, started.communicate()
            time.sleep(0.1)
        started.kill()
        started.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_under_a_launcher(tmp_path, arguments):
    """As `accelerate launch` and torchrun start them: two processes that know of each other by the environment."""
    out = tmp_path / "out.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "sirius_ext", *arguments, "--out", str(out), "--modes", "full", "--threads", "1"]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    # An older torch says on standard output that Gloo is connected.
    said = ["".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")) for out, _ in outputs]
    assert "accuracy" in said[0] and not said[1]
    assert {key for _, key in texts(out)} == {"0", "1", "2"} and list(tmp_path.glob("out*")) == [out]


def test_processes_of_a_launcher_start_no_others(tmp_path, arguments, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*arguments, "--out", str(tmp_path / "out.jsonl"), "--jobs", "2"]) == 2
    assert "--jobs: there are several processes already" in capsys.readouterr().err
    study = ["study", "--what", "period", *arguments[1:5], "--out", str(tmp_path / "study")]
    assert cli.main(study) == 2
    assert "study: expected one process" in capsys.readouterr().err


class FakeRay(types.ModuleType):
    """Runs a task at once, on a machine with 2 processors and one with 6."""

    exceptions = types.SimpleNamespace(RayError=RuntimeError)

    def __init__(self):
        super().__init__("ray")
        self.asked, self.up = [], False

    def is_initialized(self):
        return self.up

    def init(self, log_to_driver):
        self.up = True

    def shutdown(self):
        self.up = False

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 6.0}}]

    def cluster_resources(self):
        return {"CPU": 8.0}

    def remote(self, function):
        def options(**asked):
            self.asked.append(asked)
            return types.SimpleNamespace(remote=function)

        return types.SimpleNamespace(options=options)

    def wait(self, tasks, timeout):
        return tasks, []

    def get(self, task):
        return task


def test_over_a_fake_ray(tmp_path, monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util.queue", types.SimpleNamespace(Queue=queue.Queue))
    monkeypatch.setattr(Plan, "engine", lambda plan: None)
    monkeypatch.setattr(
        Plan,
        "carry_out",
        lambda plan, engine, items, results, console: [results.add(record(m, i.id)) for i in items for m in plan.modes],
    )
    with results_in(tmp_path) as results:
        jobs.by_ray(PLAN, ITEMS, results, 2, QUIET)
    assert len(read_results(tmp_path / "out.jsonl")[1]) == 10 and not ray.up
    assert ray.asked == [{"num_cpus": 4, "num_gpus": 0, "max_retries": 0}] * 2


def test_over_ray(tmp_path, arguments):
    """On a cluster of this machine alone."""
    pytest.importorskip("ray")
    out = tmp_path / "out.jsonl"
    assert cli.main([*arguments, "--out", str(out), "--modes", "full", "--ray", "--jobs", "2"]) == 0
    assert {key for _, key in texts(out)} == {"0", "1", "2"}


def test_without_ray(tmp_path, arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main([*arguments, "--out", str(tmp_path / "out.jsonl"), "--ray"]) == 2
    assert "--ray needs ray" in capsys.readouterr().err


def test_report_of_what_is_none(tmp_path, capsys):
    (tmp_path / "x").write_text(json.dumps({"x": 1}) + "\n")
    assert cli.main(["report", str(tmp_path / "x")]) == 2
    assert "not a file of results" in capsys.readouterr().err
