"""The benchmarks' own machinery on tiny sizes: it runs to the end, and its arithmetic is right. Times say nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import types

import accuracy
import advance
import backends
import bench_ops
import breakdown
import decode
import latency
import ops_cuda
import prefill
import pytest
import quality
import random_tiers
import serve
import served
import soak
import tables
import timing
import tiny
import torch
from dense import Dense
from fake_cuda import FakeCuda
from shapes import SHAPES, random_model

from sirius_ext import Engine, SiriusConfig, _simt
from sirius_ext.decoding.sparsity import CSparse
from sirius_ext.engine import encode
from sirius_ext.evaluation.results import Results
from sirius_ext.evaluation.tasks import TASKS
from sirius_ext.kernels.matrix import Format
from sirius_ext.models.tiers import TooLittle

CPU = torch.device("cpu")


@pytest.fixture
def emulated():
    """The CUDA kernels, run on the CPU."""
    with backends.emulated(_simt):
        yield


def test_every_cuda_op_is_measured_against_torch_doing_the_same(emulated):
    cases = lambda shape, where: ops_cuda.Cases(shape, where, cold_bytes=1, contexts=[6, 9], vocab=151)  # noqa: E731
    bandwidth = {"read": 1e9, "copy": 2e9}
    record = ops_cuda.bench(["tiny"], [1, 3], [1.0, 0.5], 1, CPU, cases, bandwidth)
    ops = {result["op"].split()[0].rstrip(",") for result in record["results"]}
    assert ops == {
        "linear", "gate_up", "down", "gate", "select", "up", "rms_norm", "tree_attention", "kv_rewrite", "accept", "tree_expand"
    }  # fmt: skip
    best = max(record["bandwidth"].values())
    for result in record["results"]:
        assert result["us"] > 0 and result["torch_us"] > 0
        assert result["share"] == pytest.approx(result["gb_per_s"] * 1e9 / best)
        assert (result["vs_dense"] is not None) == (result["density"] == 0.5)


def test_both_sides_of_a_case_compute_the_same(emulated, monkeypatch):
    """What is timed as torch's is what the op computes: same inputs, same result."""
    cases = ops_cuda.Cases(SHAPES["tiny"], CPU, cold_bytes=1, contexts=[6], vocab=151)
    filled = []
    empty = cases._empty
    monkeypatch.setattr(cases, "_empty", lambda *size, **kind: filled.append(empty(*size, **kind)) or filled[-1])
    for make in (
        lambda: cases.linear(2), lambda: cases.gate(2), lambda: cases.mlp(2, 0.5), lambda: cases.mlp(2, 1.0),
        lambda: list(cases.fsparse(2, 0.5))[1:], lambda: cases.rms_norm(2), lambda: cases.attention(3, 6),
    ):  # fmt: skip
        for case in make():
            case.ours(0)
            expected = case.torch(0)
            if case.op == "tree_attention":
                expected = expected[0].transpose(0, 1)
            assert any(
                out.shape == expected.shape and torch.allclose(out.float(), expected.float(), rtol=0.03, atol=0.02)
                for out in filled[-2:]
            ), case.op


def test_every_format_is_measured(one_thread, monkeypatch):
    monkeypatch.setattr(bench_ops, "COLD_BYTES", 1 << 18)
    records = bench_ops.bench_mlp("tiny", 1, [1.0, 0.5], 1)
    forms = {"", " q8", " q8_upper", " q4", " q4_k"}
    ops = {f"{op}{form}" for form in forms for op in ("linear", "gate_up 1.0", "down 1.0", "gate_up 0.5", "down 0.5")}
    assert ops | {"linear torch", "gather torch 0.5", "read (torch.sum)"} == {record["op"] for record in records}
    assert all(record["us"] > 0 and 0 < record["share"] <= 1 for record in records)


def test_cuda_is_refused_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_ops.parse(["--backend", "cuda"])
    assert "backend: cuda was asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "llama-9"], "shape: expected one of"),
        (["--densities", "0"], "densities: expected more than 0"),
        (["--rows", "one"], "invalid literal"),
    ],
)
def test_arguments_of_the_ops_benchmark(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_ops.parse(arguments)
    assert message in capsys.readouterr().err


def measured(tmp_path, *arguments: str) -> dict:
    """What a run on random weights of the tiny shape finds, after a look at the file it leaves."""
    out = tmp_path / "latency.json"
    asked = ["--shape", "tiny", "--rounds", "1", "--dtype", "float32", "--skip", "static", "--out", str(out), *arguments]
    record = latency.run(decode.parse(asked), bandwidth=1e9)
    saved = json.loads(out.read_text())
    assert saved["results"] == record["results"] and saved["model"] == "tiny" and saved["weights"] == "random"
    for r in record["results"]:
        assert r["ms_per_token"] > 0
        if r["variant"].startswith("Sirius"):
            # Not the advance of random weights, but the paper's share of the period.
            assert r["ms_per_period"] / r["advance"] == pytest.approx(r["ms_per_token"])
        if "floor_ms" in r:
            assert r["over_floor"] == pytest.approx(r["ms_per_token"] / r["floor_ms"])
    return record


def test_latency_of_a_tiny_model(one_thread, tmp_path):
    """The whole path: baselines, every mode, the table, the file."""
    record = measured(tmp_path, "--context", "9,20", "--periods", "5", "--widths", "1,3", "--max-new-tokens", "24")
    by_context = [[r["variant"] for r in record["results"] if r["context"] == context] for context in (9, 20)]
    assert by_context[0] == by_context[1]
    assert sorted(by_context[0]) == [
        "CSparse 0.5",
        "FSparse 0.5",
        "Full",
        "Sirius, CSparse 0.5, period 5, width 1",
        "Sirius, CSparse 0.5, period 5, width 3",
        "Sirius, FSparse 0.5, period 5, width 1",
        "Sirius, FSparse 0.5, period 5, width 3",
        "dense, torch.compile",
        "transformers",
    ]
    assert {r["advance"] for r in record["results"] if r["variant"].startswith("Sirius")} == {5 * 15.2 / 16}


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_latency_of_packed_weights(weights, one_thread, tmp_path):
    """Others cannot read them, so nobody stands beside; a token's bytes are those of the packed ones."""
    asked = "--context", "9", "--periods", "4", "--widths", "1", "--sparsities", "csparse", "--max-new-tokens", "16"
    plain = measured(tmp_path, *asked, "--skip", "transformers,dense")
    packed = measured(tmp_path, *asked, "--weights", weights)
    assert [r["variant"] for r in packed["results"]] == [r["variant"] for r in plain["results"]]
    assert all(a["floor_ms"] < b["floor_ms"] / 2 for a, b in zip(packed["results"], plain["results"]))
    assert packed["stored"] == weights


def test_latency_of_drafts_by_a_copy(one_thread, tmp_path):
    asked = "--context", "9", "--periods", "4", "--widths", "1", "--sparsities", "csparse", "--max-new-tokens", "16"
    asked += "--skip", "transformers,dense", "--densities", "1.0"
    plain, drafts = (measured(tmp_path, *asked, *more) for more in ((), ("--draft-weights", "q4")))
    assert [r["variant"] for r in drafts["results"]] == [
        "Full",
        "CSparse (q4) 1.0",
        "Sirius, CSparse (q4) 1.0, period 4, width 1",
    ]
    full, sparse = ([r["floor_ms"] for r in record["results"]] for record in (plain, drafts))
    assert full[0] == sparse[0] and sparse[1] < full[1] / 2


def tiny_in_tiers(**more):
    """The flags of a tiny shape of which as little as possible is on the device."""
    asked = [
        "--shape",
        "tiny",
        "--device",
        "cuda",
        "--context",
        "12",
        "--max-new-tokens",
        "14",
        "--periods",
        "4",
        "--widths",
        "1,2",
    ]
    asked += ["--sparsities", "csparse", "--rounds", "1", "--densities", "auto"]
    asked += [part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", value)]
    options = decode.parse([*asked, "--memory", "0.001"])
    options.device = "cpu"  # the emulated one
    with pytest.raises(TooLittle) as least:
        latency.Latency(options, 1e9)
    options.memory = least.value.least / 1e9
    return options


@pytest.mark.parametrize("weights", ["plain", "q8", "q4"])
def test_latency_of_a_shape_larger_than_the_device(weights, emulated, one_thread, monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "device_of", torch.device)
    monkeypatch.setattr(latency, "LINK_BYTES", 1 << 16)
    # Of two layers all would fit into the ring of those that come and go.
    monkeypatch.setitem(SHAPES, "tiny", dataclasses.replace(SHAPES["tiny"], layers=8))
    options = tiny_in_tiers(weights=weights, advance="4=2.5")
    options.out = tmp_path / "tiers.json"
    record = latency.run(options, bandwidth=1e9)
    assert json.loads(options.out.read_text())["results"] == record["results"] and record["benchmark"] == "tiers"
    assert record["plan"]["streamed"] > 0 and record["plan"]["used"] <= record["memory_bytes"] == round(1e9 * options.memory)
    assert record["plan"]["density"] is not None or weights == "plain"
    full, sparse, chain, tree = record["results"]
    assert full["moved_bytes"] == record["plan"]["streamed"] and sparse["moved_bytes"] == 0
    for each in (chain, tree):
        assert each["moved_bytes"] == full["moved_bytes"] / 2.5 and each["advance"] == 2.5
        assert each["ms_per_token"] == pytest.approx(each["ms_per_period"] / 2.5)
    assert all(each["link_busy"] > 0 for each in (full, chain, tree))
    table = tables.larger(tmp_path).splitlines()
    first = f"| tiny, {'bfloat16' if weights == 'plain' else weights} | no GPU, {options.memory:g} GB | "
    assert len(table) == 2 + 4 and all(line.startswith(first) for line in table[2:])
    assert f"| 2.5 | {chain['ms_per_token'] / 1e3:.3f} ({chain['ms_per_token'] / full['ms_per_token']:.2f}) |" in table[4]
    rates = [f"{each['moved_bytes'] / each['ms_per_token'] / 1e6:.1f}" for each in (full, chain, tree)]
    assert [table[i].split(" | ")[-1] for i in (2, 4, 5)] == [f"{rate} |" for rate in rates] and table[3].endswith(" |  |  |")
    (tmp_path / "half.json").write_text(json.dumps(record | {"results": [{"variant": "Full"}]}))
    with pytest.raises(ValueError, match="half.json: expected a file that a benchmark wrote"):
        tables.larger(tmp_path)


def test_random_tiers_are_finite_in_every_format():
    """Whatever their bytes are read as, and of the sizes that a checkpoint would have."""
    found = random_tiers.random_bytes(5001)
    assert len(found) == 5001 and len(found.unique()) == 64
    for weights in ("plain", "q8", "q4"):
        files = random_tiers.RandomTiers.of_shape("tiny", torch.bfloat16, weights)
        model = files.model()
        assert {name: parameter.nbytes for name, parameter in model.named_parameters() if "mlp" not in name} == {
            name: 0 if name == files.embedding else stored.nbytes
            for name, stored in files.fast.items()
            if name in files.source.names
        }
        for layer in range(len(files.layers)):
            for name in ("gate", "up", "down"):
                numbers = files.matrix(layer, name).dense()
                assert numbers.shape == (131, 64) and numbers.isfinite().all() and numbers.abs().max() < 20 and numbers.any()


def test_latency_of_replayed_periods(emulated, one_thread, tmp_path):
    """As on a CUDA device: whole periods are replayed, and the time between them is seen."""
    asked = "--context", "7", "--periods", "3", "--widths", "2", "--sparsities", "csparse", "--max-new-tokens", "12"
    record = measured(tmp_path, *asked, "--skip", "transformers,dense")
    assert len(record["results"]) == 3
    assert all(0 < r["idle_share"] < 1 for r in record["results"])


def test_results_are_written_as_they_come(emulated, one_thread, tmp_path, monkeypatch):
    """A lease may end at any time."""
    out = tmp_path / "latency.json"
    monkeypatch.setattr(latency.Latency, "ours", lambda bench: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "--context", "9", "--max-new-tokens", "12")
    kept = json.loads(out.read_text())
    assert [r["variant"] for r in kept["results"]] == ["transformers", "dense, torch.compile"]
    monkeypatch.undo()

    # Our own, of which each is measured in three rounds after it was warmed up, and is cut short in the second.
    measure, times = latency.Latency._measure, []

    def cut_short(bench, *of_what):
        if len(times) == 3 + 3 + 1:
            raise KeyboardInterrupt
        times.append(measure(bench, *of_what))
        return times[-1]

    monkeypatch.setattr(latency.Latency, "_measure", cut_short)
    asked = "--context", "9", "--periods", "4", "--widths", "1", "--sparsities", "csparse", "--max-new-tokens", "16"
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, *asked, "--skip", "transformers,dense", "--rounds", "3")
    kept = json.loads(out.read_text())["results"]
    assert [r["variant"] for r in kept] == ["Full", "CSparse 0.5", "Sirius, CSparse 0.5, period 4, width 1"]
    full, sparse, chain = ([each["ms_per_token"] for each in times[i::3]] for i in (3, 4, 5))
    assert [len(full), len(sparse), len(chain)] == [2, 1, 1]
    assert [r["ms_per_token"] for r in kept] == [sum(full) / 2, *sparse, *chain] and all("over_floor" in r for r in kept)
    monkeypatch.undo()

    cases = lambda shape, where: ops_cuda.Cases(shape, where, cold_bytes=1, contexts=[6], vocab=151)  # noqa: E731
    seen = []
    record = ops_cuda.bench(
        ["tiny"], [1], [1.0], 1, CPU, cases, {"read": 1e9}, lambda record: seen.append(len(record["results"]))
    )
    assert seen == list(range(1, len(record["results"]) + 1))


def test_a_baseline_stands_beside_its_own_floor(one_thread, tmp_path, capsys):
    asked = "--context", "9", "--max-new-tokens", "12", "--sparsities", "csparse", "--periods", "3", "--widths", "1"
    record = measured(tmp_path, *asked)
    full = next(r for r in record["results"] if r["variant"] == "Full")
    baselines = [r for r in record["results"] if "advance" not in r]
    assert len(baselines) == 2 and all(r["floor_ms"] == full["floor_ms"] for r in baselines)
    slow = {"variant": "dense, torch.compile", "context": 9, "ms_per_token": 3.0, "floor_ms": 1.0, "over_floor": 3.0}
    fair = slow | {"over_floor": latency.FAIR}
    assert latency._against(slow, 1.0) == "void" and latency._against(fair, 1.0) == "3.00" and latency._against(None, 1.0) == ""


def test_a_warm_up_waits_for_what_it_reads(monkeypatch):
    """It runs on a stream of its own."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(timing, "counters", lambda device: None)
    seen = []
    timing.Repeated([lambda: seen.append(list(cuda.log))], torch.device("cuda", 0))
    assert ("wait", cuda.log[0][1], "default") in seen[0]
    assert [each[0] for each in cuda.log][-2:] == ["capture", "replay"]


def test_what_kernels_add_is_the_whole_period():
    """A kernel adds what passes from the end of the one before to its own end, also where they overlap."""
    first, second = (
        "void sirius::(anonymous namespace)::linear_kernel<bf16_t, Plain, true, 1>(P, (anonymous namespace)::N)",
        "f(int)",
    )
    graph = [(first, 0.0, 3.0), (second, 1.0, 5.0), (first, 6.0, 7.0)]
    total, kinds = breakdown.by_kind([graph, graph[:1], graph])
    assert total == 7 == sum(kind["us"] for kind in kinds)
    assert [(kind["kernel"], kind["count"], kind["us"]) for kind in kinds] == [
        ("linear_kernel<Plain, true, 1>", 2, 5.0),
        ("f", 1, 2.0),
    ]
    assert kinds[0]["us_each"] == 2.5 and kinds[0]["runs"] == 2.0


def test_the_dense_baseline_says_what_full_says(one_thread):
    """It is a fair baseline only if it computes the same."""
    for name in tiny.NAMES[:3]:
        ids = tiny.prompt(11)
        expected = tiny.full_text(tiny.engine(name), ids, 20)
        tokens, seconds = Dense(tiny.tiny(name), 31).decode(ids, 20)
        assert tokens == expected and seconds > 0


def test_bytes_of_llama_3_8b_are_the_published_ones():
    """15.0 GB full, 9.4 GB for CSparse at 0.5, and what Sirius reads for a token in between."""

    shape, number = SHAPES["llama-3-8b"], torch.bfloat16.itemsize

    class Read:
        mlp_bytes = 3 * shape.intermediate * shape.hidden * shape.layers * number
        bytes = (shape.parameters - shape.vocab * shape.hidden) * number

    class Sizes:
        kv_heads, head_dim, dtype, packed, tiers, full = shape.kv_heads, shape.head_dim, torch.bfloat16, False, None, Read
        layers = [types.SimpleNamespace(gate=types.SimpleNamespace(format=Format.BF16))] * shape.layers
        view = staticmethod(lambda four_bits: Read)

    floor = lambda **config: latency.bytes_per_token(Sizes, tiny.own_bits(period=16, **config), 0, 15.2) / 1e9  # noqa: E731
    assert floor(mode="full") == pytest.approx(15.0, abs=0.05)
    assert floor(mode="sparse") == pytest.approx(9.4, abs=0.05)
    assert floor(mode="sparse", sparsity="fsparse") == pytest.approx(15.0 - 11.27 / 3, abs=0.05)
    assert floor() == pytest.approx((15 * 9.375 + 15.0) / 15.2, abs=0.05)
    with_cache, without = (latency.bytes_per_token(Sizes, SiriusConfig(mode="full"), context) for context in (1024, 0))
    assert with_cache - without == 2 * 32 * 8 * 128 * 1024 * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "llama-9"], "shape: expected one of"),
        (["--shape", "tiny", "--periods", "auto"], "periods: auto"),
        (["--shape", "tiny", "--lookup"], "lookup: not for latency"),
        (["--shape", "tiny", "--profile"], "profile: expected device cuda"),
        (["--device", "tpu"], "device: "),
        (["--busy", "-1"], "busy: expected a number of processes, got -1"),
    ],
)
def test_arguments_of_the_decoding_benchmark(arguments, message, capsys):
    with pytest.raises(SystemExit):
        decode.parse(arguments)
    assert message in capsys.readouterr().err


def test_others_are_busy_meanwhile_and_not_longer(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *command: started.append(start(*command)) or started[-1])
    with pytest.raises(KeyboardInterrupt), decode.busy(2):
        assert [each.poll() for each in started] == [None, None]
        raise KeyboardInterrupt
    assert all(each.poll() is not None for each in started)


def test_a_benchmark_of_decoding_that_is_ended_leaves_what_it_found(tmp_path, monkeypatch):
    out, found = tmp_path / "decode.json", []

    class Bench(decode.Bench):
        def __init__(self, options):
            self.options, self.stats, self.full = options, {}, {}

        def variants(self):
            return {"transformers": lambda: 2.0, "Full": self.full_model}

        def full_model(self) -> float:
            if self.limit == self.options.max_new_tokens:  # no warm-up
                found.append(json.loads(out.read_text())["results"])
                if len(found) == 2:
                    raise KeyboardInterrupt
            return 8.0

    monkeypatch.setattr(decode, "Bench", Bench)
    with pytest.raises(KeyboardInterrupt):
        decode.compare(decode.parse(["--skip", "llama.cpp", "--rounds", "2", "--out", str(out)]))
    both = [
        {"variant": "transformers", "tokens_per_second": 2.0, "vs_full": 0.25},
        {"variant": "Full", "tokens_per_second": 8.0, "vs_full": 1.0},
    ]
    # What is a share of Full waits for it.
    assert found == [[], both] and json.loads(out.read_text())["results"] == both


def test_what_is_measured_depends_on_what_is_asked_for():
    assert decode.parse([]).periods == [4, 8, 16, "auto"] and not decode.parse([]).latency
    asked = decode.parse(["--context", "512"])
    assert asked.latency and asked.context == [512] and asked.periods == [16] and asked.widths == [1, 4, 8]


# ------------------------------------------------------------------------------------------------------------ the table


def result(gpu: str, model: str = tables.MODEL, context: int = tables.CONTEXT, **times: float) -> str:
    names = {"full": "Full", "csparse": "CSparse 0.5", "w4": "Sirius, CSparse 0.5, period 16, width 4"}
    results = [{"variant": names[name], "context": context, "ms_per_token": time} for name, time in times.items()]
    return json.dumps({"machine": {"gpu": gpu}, "benchmark": "latency", "model": model, "results": results})


@pytest.fixture
def places(tmp_path):
    """A folder of results and a document with the markers; the arguments that name them."""
    (tmp_path / "results").mkdir()
    parts = (tables.LATENCY, tables.FEWER_BITS, tables.FOUR_BITS, tables.OFFLOAD, tables.TIERS, tables.LARGER)
    marked = "\nbetween\n".join("{}\nold\n{}".format(*tables.markers(part)) for part in parts)
    (tmp_path / "page.md").write_text(f"before\n{marked}\nafter\n")
    return tmp_path, ["--results", str(tmp_path / "results"), "--document", str(tmp_path / "page.md")]


def test_a_gpu_without_a_result_is_not_measured(places):
    folder, arguments = places
    assert tables.main(arguments) == 0
    page = (folder / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("| **here** |" + " not measured |" * len(tables.VARIANTS)) == len(tables.GPUS)
    assert "| A100 | paper | 9.6 (0.72) |  | 11.1 (0.83) | 13.3 |  |" in page


def test_the_table_shows_what_was_measured(places):
    folder, arguments = places
    files = {
        "a.json": result("NVIDIA A100-SXM4-80GB", full=8.0, csparse=5.0),
        "b.json": result("NVIDIA A100-SXM4-80GB", w4=6.0),
        "c.json": result("NVIDIA H100 80GB HBM3", model="tiny", full=1.0),
        "d.json": result("NVIDIA L40S", full=2.0),
        "e.json": result("NVIDIA H200", context=512, full=3.0),
        "f.json": json.dumps({"machine": {}, "benchmark": "ops", "results": []}),
    }
    for name, text in files.items():
        (folder / "results" / name).write_text(text)
    tables.main(arguments)
    page = (folder / "page.md").read_text()
    assert "| **here** | 5.00 (0.62) | not measured | 6.00 (0.75) | 8.00 | not measured |" in page
    # Another model, another card, another context: none of them is this table's.
    assert page.count("| **here** |" + " not measured |" * len(tables.VARIANTS)) == len(tables.GPUS) - 1


def test_the_table_of_fewer_bits(places):
    """It goes by how weights are stored: Full's time in eight bits is not the one in 16."""
    folder, arguments = places
    sirius = {"ms_per_token": 2.0, "ms_per_period": 30.4}

    def write(name: str, full: float, draft: str = "", **more) -> None:
        rows = [{"variant": "Full", "ms_per_token": full}, {"variant": f"CSparse {draft}1.0", "ms_per_token": 1.5}]
        rows.append(sirius | {"variant": f"Sirius, CSparse {draft}1.0, period 16, width 1"})
        record = {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "benchmark": "latency", "model": tables.MODEL, **more}
        record["results"] = [row | {"context": tables.CONTEXT} for row in rows]
        (folder / "results" / name).write_text(json.dumps(record))

    write("a.json", 4.0, "(q4) ")
    write("b.json", 3.04, stored="q8")
    tables.main(arguments)
    page = (folder / "page.md").read_text()
    assert "| H100 | bf16 | a copy in four bits, 100% of the neurons | 4.00 | 1.50 | 30.4 | 2.00 | 7.6 |" in page
    assert "| H100 | q8 | four bits of q8, 100% of the neurons | 3.04 | 1.50 | 30.4 | 2.00 | 10.0 |" in page
    assert page.count("| **here** |" + " not measured |" * len(tables.VARIANTS)) == len(tables.GPUS) - 1


def test_check_fails_if_the_table_is_stale(places, capsys):
    folder, arguments = places
    assert tables.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().err and "old" in (folder / "page.md").read_text()
    tables.main(arguments)
    assert tables.main([*arguments, "--check"]) == 0
    (folder / "results" / "new.json").write_text(result("NVIDIA H100 80GB HBM3", full=4.0))
    assert tables.main([*arguments, "--check"]) == 1


def test_what_the_table_cannot_be_made_of(places, capsys):
    folder, arguments = places
    (folder / "results" / "broken.json").write_text("{}")
    with pytest.raises(SystemExit):
        tables.main(arguments)
    assert "broken.json: expected a file that a benchmark wrote" in capsys.readouterr().err
    (folder / "results" / "broken.json").unlink()
    (folder / "page.md").write_text("no markers")
    with pytest.raises(SystemExit):
        tables.main(arguments)
    assert "once each, in this order" in capsys.readouterr().err


def test_a_folder_that_is_not_there_does_not_empty_the_tables(places, capsys):
    folder, _ = places
    before = (folder / "page.md").read_text()
    for arguments in (["--results", "nowhere", "--document", str(folder / "page.md")], ["--document", "nowhere.md"]):
        with pytest.raises(SystemExit):
            tables.main(arguments)
        assert f": no {'folder' if 'nowhere' in arguments else 'file'} nowhere" in capsys.readouterr().err
    assert (folder / "page.md").read_text() == before


@pytest.mark.parametrize(
    "arguments, message", [(["--skip", "foo"], "skip: not known: foo"), (["--rounds", "0"], "at least 1, got '0'")]
)
@pytest.mark.parametrize("script", [decode, prefill])
def test_what_a_benchmark_does_not_know_is_refused(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why():
    assert serve._address_in(["loading\n", "on http://here:1\n", "more\n"]) == "on http://here:1\n"
    with pytest.raises(SystemExit, match="loading\nno such option"):
        serve._address_in(["loading\n", "no such option\n"])


def test_no_server_is_left_running(monkeypatch):
    """If the other one does not start."""
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(serve, "serve_ours", lambda *_: (ours, ""))

    def fails(*_):
        raise SystemExit("no")

    monkeypatch.setattr(serve, "serve_llama_cpp", fails)
    with pytest.raises(SystemExit, match="no"):
        serve.main(["--model", "any.gguf"])
    assert ours.poll() is not None


def test_the_benchmarks_page_says_what_the_results_say():
    assert tables.main(["--check"]) == 0


# ------------------------------------------------------------------------------------------------------------ soak


@pytest.fixture
def tiny_engine(one_thread):
    return Engine(random_model("tiny", CPU, torch.float32))


def test_soak_finds_nothing_where_memory_is_constant(tiny_engine):
    assert soak.soak(tiny_engine, 10, 40, 12, lambda: 1000) == (10, [])


def test_soak_ends_when_its_time_is_over(tiny_engine):
    assert soak.soak(tiny_engine, 10, 40, 4, lambda: 1000, seconds=0) == (0, [])


def test_soak_finds_memory_that_grows(tiny_engine):
    sizes = itertools.chain([1000] * 3, itertools.repeat(1008))
    _, faults = soak.soak(tiny_engine, 10, 40, 12, lambda: next(sizes))
    assert len(faults) == 1 and faults[0].startswith("memory: 1000 bytes before, 1008 after prompt 2 of ")


def test_soak_finds_a_text_that_changes(tiny_engine, monkeypatch):
    generate, calls = Engine.generate, itertools.count()

    def forgetful(engine, ids, **settings):
        out = generate(engine, ids, **settings)
        if next(calls) >= 3 * len(soak.CONFIGS):
            out.sequences = (out.sequences + 1) % 149
        return out

    monkeypatch.setattr(Engine, "generate", forgetful)
    _, faults = soak.soak(tiny_engine, 1, 40, 4, lambda: 0)
    assert len(faults) == len(soak.CONFIGS) and all(fault.startswith("text: ") for fault in faults)


# ------------------------------------------------------------------------------------------------------------ gpu.sh

GPU_PARTS = ["first", "bench", "tiers", "sanitize", "soak"]


def run_gpu(tmp_path, python: str, *parts: str, limit: int = 60) -> subprocess.CompletedProcess:
    """gpu.sh with `python`, a shell script's body, in place of Python; compute-sanitizer and ncu run what they are given."""
    run = 'while [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"'
    for name, body in (("python", python), ("compute-sanitizer", run), ("ncu", run)):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    out, path = tmp_path / "out", f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": str(tmp_path / "python"), "OUT": str(out), "LIMIT": str(limit)}
    script = tables.ROOT / "bench" / "gpu.sh"
    return subprocess.run([script, *parts], env=environment, capture_output=True, text=True, check=False)


def test_gpu_parts_run_and_are_summed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "device_of", torch.device)
    done = run_gpu(tmp_path, 'echo "ran $*"', *GPU_PARTS)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-len(GPU_PARTS) :]
    assert [line.split()[:2] for line in summary] == [[part, "passed"] for part in GPU_PARTS]
    for part in ("first", "bench"):
        assert "--shape llama-3-8b --context 1024" in (tmp_path / "out" / f"{part}.log").read_text()
    asked = [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("ran bench/decode.py")]
    # A period's first run waits for what is captured, so that two must be whole.
    assert len(asked) == 9 and all(found.max_new_tokens > 2 * max(found.periods) for found in map(decode.parse, asked))


def test_a_failed_part_does_not_keep_the_next_one_from_running(tmp_path):
    done = run_gpu(tmp_path, 'case "$*" in *bench_ops*|*racecheck*|*soak.py*) exit 3;; esac', *GPU_PARTS)
    assert done.returncode == 1
    results = [line.split()[:2] for line in done.stdout.splitlines()[-len(GPU_PARTS) :]]
    states = ["passed", "FAILED", "passed", "passed", "FAILED"]
    assert results == [list(each) for each in zip(GPU_PARTS, states)]
    # Nor a failed step of a part its next step.
    done = run_gpu(tmp_path, 'case "$*" in *bench_ops*) exit 3;; esac; echo "ran $*"', "bench")
    assert done.returncode == 1 and "ran bench/decode.py" in done.stdout


def test_a_time_limit_is_no_failure(tmp_path):
    done = run_gpu(tmp_path, 'case "$*" in *decode.py*) sleep 60;; esac', "bench", limit=7)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[:2] == ["bench", "passed"]
    assert "stopped after" in done.stdout and "no time left for" in done.stdout


def test_gpu_says_what_is_missing(tmp_path):
    done = run_gpu(tmp_path, "exit 1", "soak")
    assert done.returncode == 1 and "missing here, and pip cannot install it: transformers" in done.stdout
    listed = run_gpu(tmp_path, 'case "$*" in *rich*|*hypothesis*) exit 1;; esac', "wheels")
    assert listed.returncode == 0 and listed.stdout.split() == ["rich", "hypothesis"]
    done = run_gpu(tmp_path, 'case "$*" in *is_available*) exit 1;; esac', "first")
    assert done.returncode == 1 and "no CUDA device that torch can use" in done.stdout
    assert run_gpu(tmp_path, "", "everything").returncode == 2


def test_accuracy_counts_items_that_all_modes_have(tmp_path, capsys, monkeypatch):
    """Items before --skip and after the first unfinished one do not count; the tasks of a model are also pooled."""
    stats = {"density": 0.6, "decode_seconds": None, "periods": [[3, 2, 3, False]]}
    done = {
        "sports": {"full": "0123", "sirius-c:period=4": "0125"},
        "date": {"full": "012", "csparse": "012", "sirius-c:period=4": "01"},
    }
    for task, modes in done.items():
        write_examples(tmp_path, task, 6)
        records = [
            {"mode": mode, "id": key, "correct": mode == "full" or key == "2", "scores": {}, "tokens": [1], "stats": stats}
            for mode, keys in modes.items()
            for key in keys
        ]
        Results.write(tmp_path / f"{task}.jsonl", {"task": task}, records)
    out = tmp_path / "out.json"
    arguments = [*(f"M={tmp_path / task}.jsonl" for task in done), "--data", str(tmp_path), "--skip", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["accuracy.py", *arguments])
    accuracy.main()
    runs = json.loads(out.read_text())["runs"]
    assert [(run["task"], run["items"]) for run in runs] == [("sports", 2), ("date", 1), ("sports + date", 3)]
    assert [row["mode"] for row in runs[1]["results"]] == ["full", "csparse", "sirius-c:period=4"]
    assert [(row["mode"], row["accuracy"]) for row in runs[2]["results"]] == [("full", 1), ("sirius-c:period=4", 1 / 3)]
    assert runs[2]["results"][1]["lost"] == 2
    assert "| sirius-c:period=4 | 0.333 |" in capsys.readouterr().out


def write_examples(folder, task, count):
    file = folder / TASKS[task].path
    file.parent.mkdir(exist_ok=True)
    row = {"input": "a", "target_scores": {"plausible": 1, "implausible": 0}}
    file.write_text(json.dumps({"examples": [row] * count}))


# ----------------------------------------------------------------------------------------------------------- quality


def test_perplexity_is_that_of_transformers(one_thread):
    source = random_model("tiny", CPU, torch.float32)
    ids = torch.randint(151, (75,), generator=torch.Generator().manual_seed(0))
    model = quality.prepare(source)
    configs = {"full": None, "all": tiny.own_bits(density=1.0), "half": tiny.own_bits(density=0.5)}
    readers = [quality.Reader(name, model, config) for name, config in configs.items()]
    for _ in range(2):  # of two texts
        quality.measure(readers, ids)
    full, everything, half = quality.records(readers)
    with torch.no_grad():
        logits = source(ids[None]).logits[0].log_softmax(-1)
    loss = -logits[37:-1].gather(1, ids[38:, None]).mean()
    assert full["tokens"] == half["tokens"] == 2 * (len(ids) - 38)
    assert full["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert (full["divergence"], full["top_1"]) == (0, 1) == (everything["divergence"], everything["top_1"])
    assert half["divergence"] > 1e-4 and half["top_1"] <= 1


# ----------------------------------------------------------------------------------------------------------- advance


def test_advances_are_those_of_texts_decoded_one_by_one(one_thread):
    engine = Engine(served.model(), tokenizer=served.tokenizer())
    configs = {
        mode: advance.config_of(mode, SiriusConfig(period=4, density=0.5))
        for mode in ("sirius-c", "sirius-c:follow=no:accept=match")
    }
    messages = ["In the inn", "there", "Hello, then"]
    prompts = [encode(engine.tokenizer, text, chat=True) for text in messages]
    kept = []
    found = advance.measure(engine, [prompt["input_ids"][0] for prompt in prompts], configs, 13, kept.append)
    assert len(kept) == 6 and kept[-1] == found
    assert [result["mode"] for result in found] == list(configs) and [result["texts"] for result in found] == [3, 3]
    assert [result["accept"] for result in found] == ["threshold", "match"]
    for result, config in zip(found, configs.values()):
        assert (result["period"], result["tree_width"]) == (4, 1)
        alone = [engine.generate(**prompt, config=config, max_new_tokens=13).stats.prompts[0] for prompt in prompts]
        pooled = advance.Stats(alone)
        assert result["tokens"] == pooled.tokens == 39
        for name in ("average_advance_length", "effective_density", "corrected_fraction"):
            assert result[name] == getattr(pooled, name), name
    assert 0 < found[0]["entering"] < 0.5 and found[1]["entering"] == 0


def test_the_share_of_neurons_that_enter_a_set():
    with advance.entering() as shares:
        sparsity = CSparse(2, 8, 0.5, down_squares=torch.ones(2, 8))
        z = torch.zeros(2, 1, 8)
        z[:, :, :4] = 1.0
        sparsity.usage.observe(0, z[0], z[0])
        sparsity.usage.observe(1, z[1], z[1])
        z[0] = z[0].flip(1)
        for _ in range(200):
            sparsity.follow(z, [])
    # One of two layers has its other half in the end, of its eight neurons.
    assert sum(shares) == pytest.approx(4 / 16)
    assert CSparse.follow.__name__ == "follow"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--modes", "sirius-x"], "modes: "),
        (["--modes", "full"], "modes: expected such as draft and verify"),
        (["--items", "0,0,0"], "items: expected three counts"),
        (["--items", "0,0,25"], "chat (at most 24)"),
        (["--items", "1,0,0"], "data: prompts of tasks need the folder"),
        (["--new", "0"], "new: expected at least 1, got 0"),
    ],
)
def test_arguments_of_advance(arguments, message, capsys):
    with pytest.raises(SystemExit):
        advance.parse(arguments)
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- prefill


def test_every_prompt_is_read_whole(tmp_path, monkeypatch):
    engine = Engine(served.model(), tokenizer=served.tokenizer())
    monkeypatch.setattr(prefill.Engine, "from_pretrained", lambda *arguments, **settings: engine)
    out = tmp_path / "prefill.json"
    flags = ["--model", "tiny", "--weights", "plain", "--skip", "llama.cpp", "--lengths", "9,300", "--rounds", "2"]
    prefill.main([*flags, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["benchmark"] == "prefill" and all(result["tokens_per_second"] > 0 for result in record["results"])
    measured = [(result["variant"], result["length"]) for result in record["results"]]
    assert measured == [(name, length) for length in (9, 300) for name in ("transformers", "ours, plain")]
    ids = torch.arange(300)[None] % 200
    engine.generate(ids, max_new_tokens=2)
    assert prefill.ours(engine, ids) > 0
    monkeypatch.setattr(prefill, "prepare", lambda model: types.SimpleNamespace(caches=[]))  # whose clearing clears nothing
    with pytest.raises(RuntimeError, match="got 256 tokens of an earlier one"):
        prefill.ours(engine, ids)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "q5"], "weights: not known: q5"),
        (["--llama-types", "q2"], "llama_types: not known: q2"),
        (["--lengths", "0"], "lengths: expected numbers of tokens, got [0]"),
        (["--dtype", "int8"], "dtype: "),
    ],
)
def test_arguments_of_prefill(arguments, message, capsys):
    with pytest.raises(SystemExit):
        prefill.parse(arguments)
    assert message in capsys.readouterr().err
