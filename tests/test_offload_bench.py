"""bench/offload.py on tiny models: what limits memory, what is made of what a process says, and what is predicted of cards. Times
say nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import confined
import contestants
import llama_cpp
import model
import offload
import pytest
import tables
import torch
from shapes import SHAPES, Shape, random_checkpoint

from sirius_ext import Engine
from sirius_ext.models import tiers

MB = 1_000_000
ALLOCATES = 'print("begun", flush=True)\nheld = bytearray({0})\nfor page in range(0, {0}, 4096): held[page] = 1\nprint("had")'
ON_DISK = {"ext2/ext3", "xfs", "btrfs", "overlayfs"}  # file systems that drop what they are asked to drop
TINY = ["--shape", "tiny", "--periods", "4", "--advance", "4=3"]


def made(kind: str, limit: int | None) -> confined.Cgroup | confined.Watched:
    """A limit of that kind; the test is skipped where a cgroup cannot be made."""
    try:
        return confined.LIMITS[kind](limit)
    except confined.NoCgroup as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")


def python(script: str, limit: confined.Cgroup | confined.Watched, timeout: float = 60.0, stdin: str = "") -> confined.Outcome:
    return confined.run([sys.executable, "-c", script], stdin, limit, timeout)


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("kind", confined.LIMITS)
def test_a_process_that_takes_too_much_is_killed_and_that_is_a_result(kind):
    # The watch looks now and then: it needs a process that does not end at once.
    script = ALLOCATES.format(300 * MB) + "\nimport time; time.sleep(60)"
    outcome = python(script, made(kind, 100 * MB))
    assert outcome.end == "killed" and outcome.error == "" and outcome.lines == ["begun\n", "had\n"][: len(outcome.lines)]
    assert outcome.lines[:1] == ["begun\n"]
    if kind == "cgroup":
        assert "had\n" not in outcome.lines and outcome.peak <= 100 * MB


@pytest.mark.parametrize("kind", confined.LIMITS)
def test_a_process_within_its_limit_is_counted(kind):
    script = ALLOCATES.format(60 * MB) + "\nimport time; time.sleep(0.3)"
    outcome = python(script, made(kind, 500 * MB))
    assert (outcome.end, outcome.error, outcome.lines) == ("finished", "", ["begun\n", "had\n"])
    assert 60 * MB <= outcome.anonymous < 200 * MB
    if kind == "cgroup":
        assert outcome.peak >= outcome.anonymous


def test_page_cache_counts_in_a_cgroup_and_apart_from_a_process_own_pages(tmp_path):
    if file_system(tmp_path) not in ON_DISK:
        pytest.skip(f"files are in {file_system(tmp_path)}, of which it is not known how it uses the page cache")
    file = tmp_path / "read"
    file.write_bytes(bytes(40 * MB))
    assert confined.make_cold([file]) == 0
    script = f"import time\nopened = open({str(file)!r}, 'rb', buffering=0)\nwhile opened.read(1 << 16): pass\ntime.sleep(0.3)"
    outcome = python(script, made("cgroup", None))
    assert outcome.end == "finished" and outcome.file >= 40 * MB > outcome.anonymous


def test_a_cgroup_goes_when_its_process_has_gone():
    limit = made("cgroup", 100 * MB)
    assert limit._folder.is_dir()
    python("", limit)
    assert not limit._folder.exists()


def test_a_process_that_fails_or_hangs_is_told_of():
    failed = python('print("a")\nraise ValueError("no such thing")', confined.Watched(None))
    assert (failed.end, failed.lines) == ("failed", ["a\n"]) and failed.error.endswith("ValueError: no such thing\n")
    quiet = python("import os; os._exit(3)", confined.Watched(None), stdin="x" * 10_000_000)  # that is never read
    assert (quiet.end, quiet.error) == ("failed", "ended with status 3")
    late = python('import time; print("a", flush=True); time.sleep(60)', confined.Watched(None), timeout=2.0)
    assert (late.end, late.lines) == ("timed out", ["a\n"])


def test_where_no_cgroup_can_be_made_it_is_said_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(confined, "_parents", lambda: iter([]))
    with pytest.raises(confined.NoCgroup, match="names no cgroup with that controller"):
        confined.Cgroup(None)
    (tmp_path / "cgroup.subtree_control").write_text("cpu io\n")
    monkeypatch.setattr(confined, "_parents", lambda: iter([(2, tmp_path), (1, tmp_path / "missing")]))
    with pytest.raises(confined.NoCgroup, match=r"does not pass on memory.*No such file or directory"):
        confined.Cgroup(None)
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="--limit watch"):
        offload.main([*TINY, "--only", "Full", "--memory", "all"])


def test_version_2_is_told_its_limit_and_read(monkeypatch, tmp_path):
    """On a folder that looks like one, since a machine has one version or the other."""
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    monkeypatch.setattr(confined, "_parents", lambda: iter([(2, tmp_path)]))
    group = confined.Cgroup(None)
    (group._folder / "memory.swap.max").touch()
    group._limit(5 * MB)
    assert group.kind == "cgroup v2" and (group._folder / "memory.max").read_text() == f"{5 * MB}\n"
    assert (group._folder / "memory.swap.max").read_text() == "0\n" and group.peak() is None
    (group._folder / "memory.stat").write_text("anon 7\nfile 9\nkernel 1\n")
    (group._folder / "memory.peak").write_text("17\n")
    (group._folder / "memory.events").write_text("oom 3\noom_kill 0\n")
    assert group.look(0) == (7, 9) and group.peak() == 17 and not group.killed()
    (group._folder / "memory.events").write_text("oom 3\noom_kill 1\n")
    assert group.killed() and group.command(["a", "b"])[-3:] == [str(group._folder / "cgroup.procs"), "a", "b"]


def file_system(folder: Path) -> str:
    """Its type, as coreutils calls it."""
    return subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout.strip()


def test_files_are_dropped_from_the_page_cache_or_it_is_said(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a").write_bytes(bytes(3 * MB))
    (tmp_path / "empty").touch()
    files = confined.files_in([tmp_path, inner / "a"])
    assert files == [tmp_path / "empty", inner / "a"]
    (inner / "a").read_bytes()
    assert confined.cached_bytes(inner / "a") == 3 * MB and confined.cached_bytes(tmp_path / "empty") == 0
    if file_system(tmp_path) in ON_DISK:
        assert confined.make_cold(files) == 0 == confined.cached_bytes(inner / "a")
    (inner / "a").read_bytes()
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    assert confined.make_cold(files) == 3 * MB


# ------------------------------------------------------------------------------------------------------------ what came out


def events(*given: tuple) -> list[dict]:
    """Of (event, time, read, further fields)."""
    return [{"event": event, "time": time, "read": read, **(more[0] if more else {})} for event, time, read, *more in given]


TWO_TEXTS = events(
    ("started", 10.0, 5),
    ("loaded", 13.0, 105),
    ("prompt", 13.5, 105),
    ("tokens", 15.5, 205, {"count": 1}),
    ("tokens", 16.5, 215, {"count": 3}),
    ("tokens", 17.5, 235, {"count": 3}),
    ("prompt", 20.0, 235),
    ("tokens", 21.0, 245, {"count": 1}),
    ("tokens", 23.0, 249, {"count": 2}),
    ("finished", 30.0, 300, {"stats": {"ms_per_token": 9.0}, "periods": [0.5, 0.25, 0.75], "full_passes": {"passes": 3}}),
)


def test_speed_is_that_of_decoding_alone():
    found = offload.measured(TWO_TEXTS)
    assert (found["load_seconds"], found["prefill_seconds"], found["decode_seconds"], found["tokens"]) == (3.0, 3.0, 4.0, 8)
    assert found["tokens_per_second"] == 2.0 and found["read_bytes"] == {"load": 100, "prefill": 110, "decode": 34}
    assert found["stats"] == {"ms_per_token": 9.0} and found["full_passes"] == {"passes": 3}


def test_with_given_acceptance_a_period_is_what_is_timed():
    found = offload.measured(TWO_TEXTS, advance=6.0)
    assert found["ms_per_period"] == 500 and found["tokens_per_second"] == 12.0
    assert offload.measured(TWO_TEXTS[:-1], advance=6.0)["tokens_per_second"] is None


def test_what_a_killed_process_managed_counts():
    found = offload.measured(TWO_TEXTS[:6])
    assert found["tokens_per_second"] == 3.0 and "stats" not in found
    assert offload.measured(TWO_TEXTS[:4])["tokens_per_second"] is None
    assert offload.measured([])["load_seconds"] is None
    killed = confined.Outcome("killed", ["a log\n", *map(json.dumps, TWO_TEXTS[:6])], "", 9, 7, 2)
    record = offload.record_of(killed)
    assert (record["end"], record["tokens"], record["peak_bytes"], record["peak_anonymous_bytes"]) == ("killed", 6, 9, 7)
    failed = confined.Outcome("failed", [], "Traceback ...\n  File ...\nValueError: no\n", 9, 7, 2)
    assert offload.record_of(failed)["error"] == "ValueError: no" and "error" not in record
    fine = {**record, "end": "finished", "tokens_per_second": 5.0, "peak_anonymous_bytes": 8}
    together = offload.pooled([fine, record, {**record, "tokens_per_second": None}])
    assert (together["end"], together["tokens_per_second"], together["peak_anonymous_bytes"]) == ("killed", 4.0, 8)


def test_contestants_take_turns_and_every_run_is_written(monkeypatch, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"w")
    out = tmp_path / "out.json"
    options = offload.parse([*TINY, "--memory", "1,all", "--rounds", "2", "--out", str(out)])
    both = [offload.Contestant(name, {}, (file,), "a") for name in ("a", "b")]
    bench = offload.Offload(options, both, [[1, 2]])
    order, written = [], []

    def run(contestant, memory):
        order.append((contestant.name, memory))
        written.append(json.loads(out.read_text())["results"] if out.exists() else [])
        return offload.record_of(confined.Outcome("finished", list(map(json.dumps, TWO_TEXTS)), "", 3, 2, 1))

    monkeypatch.setattr(bench, "_run", run)
    record = bench.measure()
    assert order == [(name, memory) for memory in (10**9, None) for _ in range(2) for name in ("a", "b")]
    assert [sum(len(each["runs"]) for each in state) for state in written] == list(range(8))
    assert json.loads(out.read_text())["results"] == record["results"] and record["benchmark"] == "offload"
    assert {(each["variant"], each["memory_bytes"], len(each["runs"])) for each in record["results"]} == {
        (name, memory, 2) for name in ("a", "b") for memory in (10**9, None)
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected either a model or a shape, got neither"),
        (["--model", "M", *TINY], "got both"),
        (["--model", "M", "--weights", "q9"], "weights: expected"),
        (["--model", "M", "--llama-types", "q9"], "llama_types: not known: q9"),
        (["--model", "M", "--gguf", "no.gguf"], "gguf: there is no file no.gguf"),
        (["--model", "M", "--prompts", "poem"], "prompts: not known: poem"),
        (["--model", "M", "--sparsities", "half"], "sparsities: not known: half"),
        (["--model", "M", "--advance", "4=3"], "advance: only with a shape"),
        (["--shape", "tiny"], "got periods auto and nothing"),
        ([*TINY, "--periods", "4,8"], "got periods 4, 8 and {4: 3.0}"),
        ([*TINY, "--lookup"], "lookup: not with a shape"),
        (["--shape", "llama-9", "--periods", "4", "--advance", "4=3"], "shape: expected one of"),
        ([*TINY, "--memory", "much"], "argument --memory"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        offload.parse(arguments)
    assert message in capsys.readouterr().err


def test_results_name_no_folder_of_the_machine(tmp_path):
    named = lambda *arguments: offload.parse([*arguments]).name  # noqa: E731
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    assert named("--model", str(folder)) == named("--model", f"{folder}/") == "Some-Model"
    assert named("--model", str(folder), "--name", "by/name") == "by/name"
    assert named("--model", "an/id") == "an/id" and named(*TINY) == "tiny"


def test_what_is_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    asked = ["--model", str(tmp_path), "--weights", "plain,q8", "--gguf", str(gguf)]
    found = offload.contestants(offload.parse([*asked, "--llama-types", "own"]), tmp_path)
    assert [each.name for each in found] == [
        "Full",
        "q8 Full",
        "csparse 0.5 alone",
        "csparse 0.5, threshold, period auto",
        "csparse 0.5, match, period auto",
        "q8 csparse 0.5 alone",
        "q8 csparse 0.5, threshold, period auto",
        "q8 csparse 0.5, match, period auto",
        "llama.cpp own",
        "transformers, disk offload",
    ]
    assert [each.full for each in found[-3:]] == ["q8 Full", None, None] and found[-2].files == (gguf,)
    random = offload.contestants(offload.parse([*TINY, "--only", "threshold,alone"]), tmp_path)
    assert [each.name for each in random] == ["csparse 0.5 alone", "csparse 0.5, threshold, period 4"]
    assert random[1].job["advance"] == 3.0 and random[1].job["config"]["threshold"] == 0.0
    assert random[0].job["config"]["threshold"] > 0 and "advance" not in random[0].job


# ------------------------------------------------------------------------------------------------------------ contestants


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return random_checkpoint("tiny", tmp_path_factory.mktemp("random"), torch.bfloat16)


def job_of(folder: Path, **changes) -> dict:
    told = {"prompts": [[3, 4, 5], [7, 8, 9, 10]], "max_new_tokens": 9, "seconds": 60.0, "threads": torch.get_num_threads()}
    return {**told, "dtype": "bfloat16", "model": str(folder), "memory": None, **changes}


def said(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"event"')]


def test_a_random_checkpoint_is_made_once_and_loads(folder):
    files = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert random_checkpoint("tiny", folder.parent, torch.bfloat16) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == files
    loaded = Engine.from_pretrained(str(folder), device="cpu", progress=False).model
    weights = [parameter for parameter in loaded.parameters() if parameter.ndim > 1]
    assert sum(map(torch.numel, weights)) == SHAPES["tiny"].parameters
    assert all(0.015 < weight.float().std() < 0.025 for weight in weights)


@pytest.mark.parametrize("memory, expected", [(None, {}), (1_600_000_000, {"memory": "1.6GB"})])
def test_ours_decodes_and_is_told_of_its_budget(folder, capsys, monkeypatch, memory, expected):
    load, seen = Engine.from_pretrained, {}

    def loaded(*arguments, memory=None, **settings):
        seen.update({} if memory is None else {"memory": memory})
        return load(*arguments, **settings)

    monkeypatch.setattr(Engine, "from_pretrained", loaded)
    config = {"period": 3, "threshold": 0.0}
    contestants.ours(job_of(folder, contestant="ours", weights="plain", config=config, memory=memory))
    found = said(capsys)
    assert seen == expected
    assert [event["event"] for event in found if event["event"] != "tokens"] == ["loaded", "prompt", "prompt", "finished"]
    counts = [event["count"] for event in found if event["event"] == "tokens"]
    assert counts == [1, 3, 3, 2] * 2  # the prefill's own token, two whole periods, one that was cut
    assert len(found[-1]["periods"]) == 4 and found[-1]["stats"]["average_advance_length"] == 3.0
    assert found[-1]["full_passes"]["passes"] == 6
    record = offload.measured(found)
    assert record["tokens"] == 16 and record["plan"] is None and tables.link_busy(record) is None


def test_ours_streams_what_a_budget_does_not_hold(capsys, monkeypatch, tmp_path):
    """The engine's own accounts, on a model whose MLPs are most of it."""
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SHAPES, "wide", Shape(64, 2048, 8, 4, 2, 149))
    monkeypatch.setattr(tiers, "_WORK", 0)  # what passes need is megabytes whatever the model, and so is this process
    monkeypatch.setattr(tiers, "_OWN", 1 << 40)
    wide = random_checkpoint("wide", tmp_path, torch.bfloat16)
    contestants.ours(job_of(wide, weights="plain", config={"mode": "full"}, memory=6_000_000))
    record = offload.measured(said(capsys))
    passes, plan = record["full_passes"], record["plan"]
    assert passes["passes"] == record["tokens"] == 16 and 0 < plan["streamed"] < SHAPES["wide"].parameters * 2
    # Layers are read ahead, so that a pass may find some of its own there, and has some of the next one's read.
    assert 8 * plan["streamed"] < passes["bytes"] <= 17 * plan["streamed"] and tables.link_busy(record) > 0


def test_the_disk_is_watched_while_the_full_model_reads():
    class Tiers:
        statistics = SimpleNamespace(bytes=100, busy=1.0)

    class Model:
        def step(self, cache, asked):
            Tiers.statistics = SimpleNamespace(bytes=Tiers.statistics.bytes + 10, busy=Tiers.statistics.busy + 0.25)
            return cache, asked

    watched = Model()
    passes = contestants.FullPasses(watched, Tiers())
    for sparsity in (None, "S", None):
        asked = SimpleNamespace(sparsity=sparsity)
        assert watched.step("cache", asked) == ("cache", asked)
    counted = passes.counted
    assert (counted["passes"], counted["bytes"], counted["busy_seconds"]) == (2, 20, 0.5) and counted["seconds"] > 0
    assert tables.link_busy({"full_passes": counted | {"seconds": 0.625}}) == 0.8
    assert tables.link_busy({"full_passes": counted | {"bytes": 0}}) is None and tables.link_busy({}) is None


def test_files_for_a_budget_are_written_beforehand(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    options = offload.parse([*TINY, "--weights", "plain,q8", "--memory", "all"])
    given = offload.contestants(options, folder)
    offload.prepare_files(options, folder, given)
    assert not confined.files_in(given[0].files[1:])
    options.memory = [10**9, None]
    offload.prepare_files(options, folder, given)
    written = confined.files_in(given[0].files)
    assert folder / "config.json" in written and len([file for file in written if file.name == "tiers.json"]) == 2


def test_a_text_ends_when_its_time_is_over(folder, capsys):
    contestants.ours(job_of(folder, weights="plain", config={"mode": "full"}, seconds=0.0))
    # One token more: the clock starts with the first.
    assert [event["count"] for event in said(capsys) if event["event"] == "tokens"] == [1, 1] * 2


@pytest.mark.parametrize("memory", [None, 50_000])
def test_transformers_decodes_from_memory_and_from_disk(folder, capsys, tmp_path, memory):
    contestants.transformers(job_of(folder, memory=memory, scratch=str(tmp_path)))
    found = said(capsys)
    assert [event["count"] for event in found if event["event"] == "tokens"] == [1] * 18 and found[-1]["event"] == "finished"


def test_llama_cpp_is_followed_token_by_token(capsys, monkeypatch):
    asked = []

    class Server:
        def handle_completions(self, request, on_chunk):
            asked.append(request)
            for count in (1, 2, 4, 4):  # a character of several tokens comes whole; the last chunk has the end alone
                if on_chunk({"timings": {"predicted_n": count}}):
                    return

    monkeypatch.setattr(llama_cpp, "server_of", lambda *_, **settings: asked.append(settings) or Server())
    contestants.llama_cpp(job_of(Path("m.gguf")))
    assert [event["count"] for event in said(capsys) if event["event"] == "tokens"] == [1, 1, 2] * 2
    assert asked[0] == {"context": 13, "mapped": True} and [each["prompt"] for each in asked[1:]] == [[3, 4, 5], [7, 8, 9, 10]]
    contestants.llama_cpp(job_of(Path("m.gguf"), seconds=0.0))
    assert [event["count"] for event in said(capsys) if event["event"] == "tokens"] == [1] * 2


def test_the_whole_way(monkeypatch, tmp_path, capsys):
    """From the flags to the table; without a cgroup, so that it runs anywhere."""
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    out = tmp_path / "results" / "offload.json"
    common = [*TINY, "--only", "Full", "--limit", "watch", "--rounds", "1", "--max-new-tokens", "5", "--out", str(out)]
    offload.main([*common, "--memory", "all,0.001", "--margin", "0"])
    shown = capsys.readouterr().out
    assert "the page cache was not limited" in shown and "Weights are random" in shown
    record = json.loads(out.read_text())
    free, tight = record["results"]
    assert (free["end"], free["runs"][0]["tokens"], record["limit"]) == ("finished", 4, "watched")
    assert (tight["end"], tight["tokens_per_second"]) == ("killed", None)
    page = tables.offload_table(record)
    assert "| tokens/s | no limit | 0.001 GB |" in page and page.endswith(" | killed |")


# ------------------------------------------------------------------------------------------------------------ tables


def result(variant: str, memory: float, speed: float | None, end: str = "finished", read: float = 0.0, busy: float = 0.0) -> dict:
    """GB; tokens/s; GB read for each token; share of a pass in which they are."""
    run = {"tokens": 10, "read_bytes": {"decode": read * 1e10}}
    run["full_passes"] = {"passes": 1, "seconds": 2.0, "bytes": round(read * 1e10), "busy_seconds": 2.0 * busy}
    full = "Full" if "llama" not in variant else None
    return {"variant": variant, "full": full, "memory_bytes": memory * 1e9, "tokens_per_second": speed, "end": end, "runs": [run]}


def test_the_table_of_larger_models():
    record = {
        "machine": {"cpu": "A CPU", "threads": 2},
        "model": "M",
        "dtype": "bfloat16",
        "weights": "real",
        "margin_bytes": 3e8,
        "limit": "cgroup v1",
        "disk_bytes_per_second": 2e9,
        "results": [
            result("Full", 1.2, 2.0, read=1.5, busy=0.875),
            result("Full", 2, 4.0),
            result("match", 1.2, 5.0, "killed"),
            result("match", 2, None),
            result("llama.cpp own", 1.2, None, "killed"),
        ],
    }
    assert tables.offload_table(record).splitlines() == [
        "M, bfloat16, A CPU, 2 threads; budget and 0.3 GB, cgroup v1; direct reads of the disk 2.0 GB/s:",
        "",
        "| tokens/s | 1.2 GB | 2 GB |",
        "|---|---|---|",
        "| Full | 2.00, 1.5 GB/token, link 88% | 4.00 |",
        "| match | 5.00 (2.50), killed | no token in time |",
        "| llama.cpp own | killed | not measured |",
    ]


def test_files_of_larger_models_are_found_or_refused(tmp_path):
    assert tables.offloads(tmp_path) == [] and tables.tiers(tmp_path) == ""
    (tmp_path / "a.json").write_text(json.dumps({"benchmark": "latency"}))
    assert tables.offloads(tmp_path) == []
    (tmp_path / "b.json").write_text(json.dumps({"benchmark": "offload", "results": [{}]}))
    with pytest.raises(ValueError, match=r"b\.json: expected a file that a benchmark wrote"):
        tables.offloads(tmp_path)


# ------------------------------------------------------------------------------------------------------------ predictions


def test_bytes_of_llama_3_70b_are_where_they_are_said_to_be():
    shape = SHAPES["llama-3-70b"]
    embedding = 2 * shape.vocab * shape.hidden
    for storage in model.STORAGES:
        for memory in model.MEMORIES.values():
            last = None
            for density in (None, 0.4, 0.5, 0.7, 1.0):
                bytes_ = model.placed(shape, storage, memory, density, 1024)
                if bytes_ is None:
                    continue
                on_card = bytes_["resident"] + (bytes_["held"] if storage.copy else 0)
                filled = bytes_["reserved"] + bytes_["cache"] + bytes_["verified"] + on_card + bytes_["ring"]
                # Full to the last byte, unless there is nothing more to keep.
                assert filled == pytest.approx(bytes_["size"]) or (bytes_["moved"] == 0 and filled < bytes_["size"])
                assert bytes_["resident"] + bytes_["moved"] == pytest.approx(bytes_["of_full"])
                # Where S's set has slots, what they hold has room in the ring, too.
                neurons = 80 * 3 * shape.hidden * shape.intermediate * (density or 1)
                slots = (storage.draft - storage.shared) * neurons if storage.slots and density not in (None, 1.0) else 0
                assert bytes_["ring"] == pytest.approx(2 * (bytes_["moved"] + slots) / 80)
                if storage.copy and density is not None:
                    assert last in (None, bytes_["moved"])  # a copy is of all neurons
                    last = bytes_["moved"]
    bf16, small = model.STORAGES[0], model.MEMORIES["24 GB"]
    found = model.placed(shape, bf16, small, None, 1024)
    assert found["of_full"] + embedding == pytest.approx(2 * shape.parameters) == pytest.approx(141.1e9, rel=1e-3)
    # What the paper measured in full, 5.72 s at 25 GB/s, is that.
    assert (found["of_full"] + embedding) / 25e9 == pytest.approx(5.72, rel=0.02)
    assert model.placed(shape, bf16, small, 1.0, 1024) is None


def test_advances_are_those_of_the_recorded_texts(monkeypatch):
    texts = [{"drafts": [{"match": "110111"}, {"match": "000000"}]}]
    monkeypatch.setattr(model, "recorded", lambda name: {"densities": [0.8, 0.4], "texts": texts})
    model.advance_at.cache_clear()
    # Periods of 3 from token 0: two drafts are accepted and a third token is F's; from 3: again.
    assert model.advance("t", "match", 0.8, 3) == 3.0
    # Of 4: two accepted, the next replaced; three accepted.
    assert model.advance("t", "match", 0.8, 4) == 3.5
    assert model.advance("t", "match", 0.4, 4) == 1.0 and model.advance("t", "match", 0.6, 4) == pytest.approx(2.25)
    assert model.advance("t", "match", 0.3, 4) is None and model.advance("t", "match", 0.9, 4) is None
    model.advance_at.cache_clear()


def on_link(bytes_, early):
    """Seconds of a period at 25 GB/s, of which so many of 80 layers come while S drafts."""
    return (bytes_["moved"] * (1 - early / 80) + bytes_["entering"]) / 25e9


def test_layers_come_early_only_while_something_is_drafted():
    shape, memory, eight_bits = SHAPES["llama-3-70b"], model.MEMORIES["24 GB"], model.STORAGES[1]
    bytes_ = model.placed(shape, eight_bits, memory, 0.4, 1024, 32, entering=0.03)
    for period, early in ((1, 0), (2, None), (32, 2)):
        sparse, full = model.tier_seconds(shape, eight_bits, memory, 25e9, bytes_, model.Drafts(0.4, period, 1, 1.0))
        # One draft takes less than two layers do.
        early = 80 * sparse * 25e9 / bytes_["moved"] if early is None else early
        assert early <= 2 and full == pytest.approx(on_link(bytes_, early) + 2 * bytes_["left"] / period / 25e9)


def test_a_plan_is_the_arithmetic_that_it_says():
    eight_bits = model.STORAGES[1]
    plan = model.tiers(eight_bits, "24 GB", 25e9, "match")
    bytes_ = plan["bytes"]
    sparse = (bytes_["sparse"] + bytes_["cache"]) / (0.92 * 1008e9) + 80 * (6 * 4.5e-6 + 0.5e-6)
    assert plan["s_of_sparse"] == pytest.approx(sparse) and bytes_["left"] > 0
    advance = model.advance(eight_bits.texts, "match", plan["density"], plan["period"])
    read_back = 2 * bytes_["left"] / plan["period"] * advance / 25e9
    assert plan["s_of_full"] == pytest.approx(on_link(bytes_, 2) + read_back)
    assert plan["s_per_token"] == pytest.approx(((plan["period"] - 1) * sparse + plan["s_of_full"]) / advance)
    # Of a neuron four bits of gate, up and down and their scales enter; where S has all neurons, none do.
    shape = SHAPES["llama-3-70b"]
    (share,) = {drafts.entering for drafts in model.all_drafts("packed", "match") if drafts.density < 1}
    assert bytes_["entering"] == pytest.approx(share * 80 * 3 * shape.hidden * shape.intermediate * 4.5 / 8) and share > 0
    assert model.tiers(eight_bits, "48 GB", 25e9, "match")["bytes"]["entering"] == 0
    assert plan["s_per_token"] < plan["s_per_token_of_full"]
    # On a link of twice the speed it is faster, and shorter periods suit it.
    faster = model.tiers(eight_bits, "24 GB", 50e9, "match")
    assert faster["s_per_token"] < plan["s_per_token"] and faster["period"] <= plan["period"]
    # What fits needs no link.
    assert model.tiers(eight_bits, "80 GB", 25e9, "match") is None


def test_what_is_verified_takes_memory():
    """A node's logits, float32; the cache has room for it, too. What the neurons of all layers add, in 16 bits, is in the host's
    memory; to get there takes time."""
    shape, eight_bits, memory = SHAPES["llama-3-70b"], model.STORAGES[1], model.MEMORIES["24 GB"]
    chain, tree = (model.placed(shape, eight_bits, memory, 0.4, 1024, nodes) for nodes in (1, 249))
    assert tree["verified"] - chain["verified"] == 248 * 4 * 128256 and tree["left"] == 249 * 2 * 80 * 28672
    assert tree["cache"] - chain["cache"] == 248 * 80 * 2 * 8 * 128 * 2
    more = tree["verified"] + tree["cache"] - chain["verified"] - chain["cache"]
    assert tree["moved"] - chain["moved"] == pytest.approx(more / (1 - 2 / 80))
    alone = model.placed(shape, eight_bits, memory, None, 1024, 249)
    assert alone["verified"] == 249 * 4 * 128256 and alone["left"] == 0  # nothing has to follow
    bound = dataclasses.replace(memory, card=dataclasses.replace(memory.card, bandwidth=1e11))  # by its memory, not the link
    drafts = model.Drafts(0.4, 32, 8, 1.0)
    slow, slower = (
        model.tier_seconds(shape, eight_bits, bound, 25e9, tree | {"left": left}, drafts)[1] for left in (0.0, tree["left"])
    )
    assert slower - slow == pytest.approx((1 + 2 / 249) * tree["left"] / 25e9)


@pytest.mark.parametrize("loop, again", [("Q8<false>", True), ("Nibbles", True), ("Plain", False)])
def test_more_rows_than_a_tile_read_weights_again(loop, again):
    """Of packed weights: more of plain ones are torch's, which reads them once (`kernels.products`)."""
    card = model.MEMORIES["24 GB"].card
    once = model.read_seconds(card, 1e9, loop, 16)
    assert once == pytest.approx(1e9 / card.read) == model.read_seconds(card, 1e9, loop, 1)
    assert model.read_seconds(card, 1e9, loop, 17) == pytest.approx((2 if again else 1) * once)
    assert model.read_seconds(card, 1e9, loop, 249) == pytest.approx((16 if again else 1) * once)


def test_a_card_may_be_slower_at_instructions_than_at_bytes():
    h100 = model.MEMORIES["80 GB"].card  # which reads faster than it multiplies nibbles
    issued = model.INSTRUCTIONS["dot", "Nibbles"][8] * 1e9 / 1024 / h100.instructions
    assert model.read_seconds(h100, 1e9, "Nibbles", 8) == pytest.approx(issued) and issued > 1e9 / h100.read


def test_plans_with_trees_are_of_what_was_decoded(monkeypatch, tmp_path):
    eight_bits, decoded = model.STORAGES[1], []
    monkeypatch.setattr(model, "recorded", lambda name: {"results": decoded})
    assert model.tiers(eight_bits, "24 GB", 25e9, "match, trees") is None
    asked = {"accept": "match", "density": 0.44, "period": 32, "average_advance_length": 12.0, "entering": 0.02}
    decoded += [
        {**asked, "tree_width": 1, "average_advance_length": 30.0},
        {**asked, "tree_width": 8, "average_advance_length": 12.0},
    ]
    decoded += [{**asked, "tree_width": 8, "density": 0.9, "average_advance_length": 31.0}]  # which does not fit
    decoded += [{**asked, "tree_width": 8, "accept": "threshold", "average_advance_length": 31.0}]
    plan = model.tiers(eight_bits, "24 GB", 25e9, "match, trees")
    assert (plan["tree_width"], plan["advance"], plan["density"]) == (8, 12.0, 0.44)
    full = on_link(plan["bytes"], 2) + 2 * plan["bytes"]["left"] * 12 / 249 / 25e9
    assert plan["s_of_full"] == pytest.approx(full) and plan["bytes"]["left"] > 1.1e9
    assert plan["s_per_token"] == pytest.approx((31 * plan["s_of_sparse"] + full) / 12.0)
    (tmp_path / "predicted.json").write_text(json.dumps({"tiers": [plan]}))
    shown = tables.tiers(tmp_path)
    assert "| match, trees of 8 |" in shown and "| 32, 12.0 |" in shown


def test_every_byte_is_printed(capsys):
    model.show_tiers()
    shown = capsys.readouterr().out
    assert shown.count("s/token, F alone") == len(json.loads(model.OUT.read_text())["tiers"])
