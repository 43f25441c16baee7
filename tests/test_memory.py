"""`memory=`: how it is divided, what is decoded with it, what is said of it, and that it suffices."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import confined
import hypothesis
import pytest
import test_gguf
import torch
import transformers
from hypothesis import strategies as st
from machines import fake_machine
from model_files import write_gguf
from safetensors.torch import save_file
from test_stream import faulty_disk
from tiny import prompt, tiny

from sirius_ext import Engine, SiriusConfig
from sirius_ext.cli import info
from sirius_ext.cli import main as cli
from sirius_ext.cli.streamer import KeepingStreamer
from sirius_ext.decoding.forecast import forecast
from sirius_ext.decoding.sparsity import drafts_of
from sirius_ext.kernels.stream import Stream
from sirius_ext.loading import parse_memory
from sirius_ext.models import hub, tier_files, tiers
from sirius_ext.models.packed import Checkpoint, Source
from sirius_ext.models.tier_files import Layout
from sirius_ext.models.tiers import Draft, Sizes, TooLittle, best_plan, cache_bytes, everything, free_memory, plan
from sirius_ext.models.weights import Weights
from sirius_ext.runtime.speeds import direct_read_speed, memory_read_speed

pytestmark = pytest.mark.usefixtures("one_thread")
MB = 1_000_000


# ---------------------------------------------------------------------------------------------------------------- plans


class Shapes(Source):
    """A checkpoint of which there is a config alone."""

    _parts: dict = {}
    format = Checkpoint.format

    def __init__(self, weights, hidden, intermediate, layers, vocab=32000, tied=False):
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            tie_word_embeddings=tied,
            max_position_embeddings=8192,
        )
        super().__init__(config, Path(), [], torch.bfloat16, weights, "")

    def read(self, name):
        raise AssertionError("a plan reads no weights")


@functools.cache
def sizes_of(shape, weights):
    arguments = {
        "1.5B": (1536, 8960, 28, 151936, True),
        "8B": (4096, 14336, 32, 128256, False),
        "small": (128, 333, 3, 500, True),
        "one layer": (256, 1000, 1, 1000, False),
    }
    source = Shapes(weights, *arguments[shape])
    return Sizes(Layout.of(source), cache_bytes(source.model), own=230 * MB)


def draft_for(sizes, kind, density):
    files = sizes.files
    if kind == "full":
        return Draft()
    if kind == "copy" and files.weights == "plain":
        return Draft(copy=True)
    return Draft(max(1, round(density * files.intermediate)))


CASES = {
    "shape": st.sampled_from(["1.5B", "8B", "small", "one layer"]),
    "weights": st.sampled_from(["plain", "q8", "q4"]),
    "kind": st.sampled_from(["full", "copy", "set"]),
    "density": st.floats(0.01, 1),
    "share": st.floats(0, 1.3),
    "more": st.floats(0, 0.5),
}


@hypothesis.settings(max_examples=300)
@hypothesis.given(**CASES)
def test_plans(shape, weights, kind, density, share, more):
    """They stay within the memory; more of it never streams more; and the least that an error names is the least."""
    sizes = sizes_of(shape, weights)
    draft, whole = draft_for(sizes, kind, density), sum(sizes.files.read_bytes())
    memory = 1 + int(share * whole)
    try:
        found = plan(sizes, memory, draft)
    except TooLittle as error:
        assert memory < error.least
        assert plan(sizes, error.least, draft).used <= error.least
        with pytest.raises(TooLittle) as again:
            plan(sizes, error.least - 1, draft)
        assert again.value.least == error.least
        named = re.fullmatch(r"memory: expected at least (\d+\.\d\d) GB .*, got (\d+\.\d\d) GB; a lower .*", str(error))
        assert plan(sizes, round(float(named[1]) * 1e9), draft) and float(named[1]) > float(named[2])
        return
    check_plan(found, sizes, memory, draft)
    richer = plan(sizes, memory + int(more * whole), draft)
    assert richer.streamed <= found.streamed and richer.caches >= found.caches


def check_plan(found, sizes, memory, draft):
    files, rows = sizes.files, sizes.rows
    assert found.used == sum(found.parts.values()) <= memory
    first, second = found.resident
    for count in found.resident:
        assert count == rows or count % 64 == 0
    assert second == 0 or first == rows
    assert first + found.slots >= min(draft.neurons, rows) and found.slots <= rows
    assert (found.copy > 0) == draft.copy and (draft.copy or not found.streams_rest)
    # What is not resident is streamed, and nothing else is.
    left = [
        image.nbytes - count * image.bundle
        for layer in files.layers
        for image, count in zip(layer.images, found.resident)
        if count < rows
    ]
    rest = sum(each.image.nbytes for each in files.rest) if found.streams_rest else 0
    assert found.streamed == sum(left) + rest


@pytest.mark.parametrize("kind", ["full", "copy", "set"])
@pytest.mark.parametrize("weights", ["plain", "q8", "q4"])
@pytest.mark.parametrize("shape", ["1.5B", "small"])
def test_all_is_in_memory_where_there_is_room(shape, weights, kind):
    sizes = sizes_of(shape, weights)
    draft = draft_for(sizes, kind, 0.5)
    room = everything(sizes, 0).used + (sizes.copy() if draft.copy else 0) + (1 << 20)
    found = plan(sizes, room, draft)
    assert found.streamed == 0 and found.slots == 0 and found.caches == min(sizes.caches, room // 16)
    assert found.resident[0] == sizes.rows and not found.streams_rest
    with pytest.raises(TooLittle):
        plan(sizes, room // 20, draft)


def test_the_better_sparse_model_first_and_the_least_of_all_if_there_is_none():
    sizes = sizes_of("1.5B", "plain")
    copy, half, tenth = Draft(copy=True), Draft(4480, density=0.5), Draft(896, density=0.1)
    least = {}
    for draft in (copy, half, tenth):
        with pytest.raises(TooLittle) as error:
            plan(sizes, 1, draft)
        least[draft] = error.value.least
    assert least[tenth] < least[half]
    for order in ((half, tenth), (tenth, half)):
        with pytest.raises(TooLittle) as error:
            best_plan(sizes, least[tenth] - 1, order)
        assert error.value.least == least[tenth]
    assert best_plan(sizes, least[half] - 1, (half, tenth)).density == 0.1
    assert best_plan(sizes, least[half], (half, tenth)).density == 0.5
    assert best_plan(sizes, least[copy] + least[half], (copy, half)).copy


@pytest.mark.parametrize("weights", ["plain", "q8", "q4"])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "phi3", "gemma3"])
def test_a_layout_is_what_is_prepared(name, weights, tmp_path):
    """Of shapes alone the same as of files."""
    tiny(name, torch.bfloat16).save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model", tiny(name).config, torch.bfloat16, weights)
    layout, files = Layout.of(source), tier_files.prepare(source, tmp_path / "tiers")
    for field in dataclasses.fields(Layout):
        assert getattr(layout, field.name) == getattr(files, field.name), field.name
    assert layout.size == files.neurons.stat().st_size
    model = files.model()
    model.tiers = tiers.Tiers(files, everything(Sizes(files, 0), 0))
    weights = Weights(model)
    padding = 64 * layout.intermediate * sum(len(layer.images) for layer in layout.layers)
    for four_bits in (False, True):
        mlp, rest = layout.read_bytes(four_bits)
        view = weights.view(four_bits)
        assert 0 <= mlp - view.mlp_bytes <= padding
        norms = (
            0
            if not four_bits or weights.packed
            else sum(each.nbytes for name, each in layout.fast.items() if "norm" in name or "bias" in name)
        )
        left_out = rest + norms - (view.bytes - view.mlp_bytes)
        # The final norm is of no view, and scales stand beside both planes of eight bits, of which one has them.
        assert 0 <= left_out <= (0.2 * rest if weights.packed else layout.fast["model.norm.weight"].nbytes)


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0", "Q8_0"])
def test_a_layout_of_a_gguf_file(kind, cache, tmp_path):
    """Whose formats are the file's own."""
    sizes = test_gguf.K_WIDE | {"intermediate_size": 768, "head_dim": 32}
    write_gguf(tmp_path / "tiny.gguf", tiny("llama", **sizes), kinds=lambda name: kind)
    files = hub.prepare_tiers(tmp_path / "tiny.gguf", tmp_path / "tiers", torch.float32, "q4", progress=False)
    drafts = functools.partial(drafts_of, SiriusConfig())
    layout = hub.division(1 << 50, drafts, tmp_path / "tiny.gguf", torch.float32, False, "q4").layout
    for field in dataclasses.fields(Layout):
        assert getattr(layout, field.name) == getattr(files, field.name), field.name


# ------------------------------------------------------------------------------------------------------------ amounts


@pytest.mark.parametrize(
    "text, size",
    [
        (1, 1),
        (6_000_000_000, 6 * 10**9),
        ("6GB", 6 * 10**9),
        ("6gb", 6 * 10**9),
        ("6G", 6 * 10**9),
        ("1.5GiB", 3 << 29),
        (" 1.5 GiB ", 3 << 29),
        ("800M", 800 * MB),
        ("0.5kB", 500),
        ("2TiB", 2 << 40),
        ("123", 123),
        ("123B", 123),
    ],
)
def test_amounts(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "6 apples", "GB", "-1GB", "0", 0, -5, "0.1", "6GBB", "iB", "6iB", "1e9", "6,5GB", "nan", 6.5, None, True, b"6GB"]
)
def test_no_amounts(text):
    with pytest.raises(ValueError, match="^memory: expected .*(bytes|size as).*, got "):
        parse_memory(text)


MEMINFO = {"proc/meminfo": "MemTotal:       9999999 kB\nMemFree:  1 kB\nMemAvailable:    1000000 kB\nHugePages_Total:  0\n"}
V2 = {**MEMINFO, "proc/self/cgroup": "0::/a/b\n"}
V1 = {**MEMINFO, "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/y\n"}


def group(path, most, now, names=("memory.max", "memory.current")):
    return {f"sys/fs/cgroup/{path}{names[0]}": f"{most}\n", f"sys/fs/cgroup/{path}{names[1]}": f"{now}\n"}


V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 1 << 62),
        ({"proc/meminfo": "nothing of use"}, 1 << 62),
        (MEMINFO, 1024 * MB),
        (V2, 1024 * MB),  # no limits
        ({**V2, **group("a/b/", "max", 5)}, 1024 * MB),
        ({**V2, **group("a/b/", 500 * MB, 100 * MB)}, 400 * MB),
        ({**V2, **group("a/b/", 5000 * MB, 100 * MB)}, 1024 * MB),
        ({**V2, **group("a/b/", "max", 1), **group("a/", 300 * MB, 100 * MB)}, 200 * MB),  # of a group above
        ({**V2, **group("", 300 * MB, 299 * MB)}, MB),
        ({**V1, **group("memory/x/", 700 * MB, 100 * MB, V1_NAMES)}, 600 * MB),
        ({**V1, **group("memory/", 90 * MB, 40 * MB, V1_NAMES)}, 50 * MB),
        ({**V1, **group("cpu/x/", 90 * MB, 40 * MB, V1_NAMES)}, 1024 * MB),  # says nothing about memory
    ],
    ids=str,
)
def test_free_memory(monkeypatch, tmp_path, files, free):
    fake_machine(monkeypatch, tmp_path, files)
    assert free_memory() == free * 9 // 10


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_what_a_group_has_of_files_is_free(kind, monkeypatch, tmp_path):
    names, stat = (V1_NAMES, "cache 5\ntotal_cache 9\ntotal_inactive_file 300\ntotal_active_file 50\ninactive_file 7\n")
    if kind == "v2":
        names, stat = ("memory.max", "memory.current"), "anon 5\ninactive_file 300\nactive_file 50\n"
    folder = "memory/x/" if kind == "v1" else "a/b/"
    files = {**(V1 if kind == "v1" else V2), **group(folder, 1000, 900, names), f"sys/fs/cgroup/{folder}memory.stat": stat}
    fake_machine(monkeypatch, tmp_path, files)
    assert free_memory() == 450 * 9 // 10


def test_free_memory_of_this_machine():
    assert 0 < free_memory() < 1 << 62


# --------------------------------------------------------------------------------------------------------- engines


@pytest.fixture
def small(monkeypatch):
    """Work and what Python takes are left out, which a tiny model would vanish beside."""
    monkeypatch.setattr(tiers, "_WORK", 0)
    monkeypatch.setattr(hub, "row_bytes", lambda model: 0)
    monkeypatch.setattr(tiers, "_OWN", 1 << 50)


MODEL = tempfile.TemporaryDirectory(prefix="sirius-memory-")


SIZES = {"num_hidden_layers": 8, "intermediate_size": 330, "max_position_embeddings": 160}


@functools.cache
def checkpoint():
    """A tiny model's folder, without a tokenizer."""
    with contextlib.redirect_stderr(io.StringIO()):  # a bar, which is no command's
        tiny("llama3", **SIZES).save_pretrained(MODEL.name)
    return Path(MODEL.name)


CONFIG = SiriusConfig(density=0.4, period=5, lookup=False)
SAME = dataclasses.replace(CONFIG, draft_weights="same")


def loaded(config=CONFIG, folder=None, **settings):
    return Engine.from_pretrained(folder or checkpoint(), config, "cpu", torch.float32, progress=False, **settings)


def text(engine, count=24, length=20):
    return engine.generate(prompt(length), max_new_tokens=count).sequences[0].tolist()


def bounds(config, weights, folder=None):
    """The least memory of a model, and what all of it takes."""
    arguments = functools.partial(drafts_of, config), folder or checkpoint(), torch.float32, False, weights
    found = hub.division(1 << 60, *arguments)
    with pytest.raises(TooLittle) as error:
        hub.division(1, *arguments)
    return error.value.least, found.plan.used


@pytest.mark.parametrize(
    "config, weights",
    [
        (SAME, "plain"),
        (dataclasses.replace(CONFIG, draft_weights="q4"), "plain"),
        (dataclasses.replace(CONFIG, accept="match"), "plain"),  # with a copy or without, as there is room
        (CONFIG, "q8"),
        (dataclasses.replace(CONFIG, mode="full"), "q4"),
        (dataclasses.replace(SAME, tree_width=2), "plain"),
    ],
    ids=str,
)
def test_any_memory_gives_the_same_text(small, cache, config, weights):
    """From the least to all of the model."""
    least, whole = bounds(config, weights)
    expected = text(loaded(config, weights=weights))
    plans = []
    for share in (0, 0.3, 0.6, 0.9, 1):
        engine = loaded(config, weights=weights, memory=round(least + share * (whole - least)))
        assert text(engine) == expected
        plans.append(None if engine.model.__dict__.get("tiers") is None else engine.model.tiers.plan)
    assert plans[0].streamed > plans[2].streamed or plans[2] is None
    assert plans[-1] is None, "the whole model is loaded as without memory"


def test_without_memory_it_is_what_is_free(small, cache, monkeypatch):
    least, whole = bounds(SAME, "plain")
    expected = text(loaded(SAME))
    assert not (cache / "tiers").exists()
    monkeypatch.setattr(hub, "free_memory", lambda: (least + whole) // 2)
    engine = loaded(SAME)
    assert engine.model.tiers.plan.streamed > 0 and text(engine) == expected
    never = loaded(dataclasses.replace(SAME, offload="never"))
    assert getattr(never.model, "tiers", None) is None and text(never) == expected
    with pytest.raises(ValueError, match='^memory: with offload="never" all weights are loaded, whatever they need'):
        loaded(dataclasses.replace(SAME, offload="never"), memory="1GB")


def test_too_little_memory_is_said_before_anything_is_prepared(small, cache):
    least, _ = bounds(CONFIG, "plain")
    message = r"^memory: expected at least 0\.\d\d GB for this model and these settings \(.*\), got 0.00 GB; a lower density"
    with pytest.raises(TooLittle, match=message) as error:
        loaded(memory=least - 1)
    assert error.value.least == least and not (cache / "tiers").exists()
    with pytest.raises(ValueError, match="^memory: expected a size as 500M, 6GB or 1.5GiB, got 'lots'"):
        loaded(memory="lots")
    assert loaded(memory=least).model.tiers.plan.used <= least and (cache / "tiers").exists()


def test_a_prepared_folder_by_its_name(small, cache, tmp_path):
    """Wherever it was moved to; and what it was not prepared for is refused."""
    never = dataclasses.replace(SAME, offload="never")
    hub.prepare_tiers(checkpoint(), tmp_path / "first", torch.float32, progress=False)
    (tmp_path / "first").rename(tmp_path / "tiers")
    least, whole = bounds(SAME, "plain")
    for memory in (least, whole, None):
        engine = loaded(SAME, tmp_path / "tiers", memory=memory)
        assert text(engine) == text(loaded(SAME))
        assert engine.model.tiers.files.folder == tmp_path / "tiers"
    assert not (cache / "tiers").exists()
    with pytest.raises(TooLittle):
        loaded(SAME, tmp_path / "tiers", memory=least - 1)
    with pytest.raises(ValueError, match="^weights: expected plain, as .*tiers was prepared, or plain, got 'q8'"):
        loaded(SAME, tmp_path / "tiers", weights="q8")
    for make in (lambda folder: loaded(never, folder), lambda folder: Engine(hub.load_model(folder, progress=False)[0])):
        with pytest.raises(
            ValueError, match='^model: .*tiers holds a model whose MLPs .* with offload="auto", or load the model'
        ):
            make(tmp_path / "tiers")
    with pytest.raises(ValueError, match="^density: expected a sparse model of at most .* for which memory was divided"):
        loaded(SAME, memory=least).generate(prompt(5), config=dataclasses.replace(SAME, density=0.9), max_new_tokens=3)


# ------------------------------------------------------------------------------------------------------------- faults


def altered(file):
    """Every byte, in place."""
    data = file.read_bytes()
    with open(file, "r+b") as stream:
        stream.write(bytes(255 - byte for byte in data))
        os.fsync(stream.fileno())
    return data


def whole_again(file, data):
    with open(file, "r+b") as stream:
        stream.write(data)
        os.fsync(stream.fileno())


FAULTS = {"altered": "is not what was written", "cut off": "it was cut off"}


def ends_the_text(engine, file, fault, expected):
    """With an error that names the file, before a wrong token. Texts fail for as long as the file is as it is."""
    sequence = engine.start(prompt(20), max_new_tokens=24)
    for _ in range(3):
        sequence.step()
    if fault == "altered":
        data = altered(file)
    else:
        data = file.read_bytes()
        os.truncate(file, 0)
    with pytest.raises(OSError, match=f"{file.name}: .*{FAULTS[fault]}"):
        while not sequence.ended:
            sequence.step()
    assert sequence.tokens == expected[20 : 20 + len(sequence.tokens)] and len(sequence.tokens) < 24
    with pytest.raises(OSError, match=FAULTS[fault]):
        text(engine, length=18)
    whole_again(file, data)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("config", [SAME, dataclasses.replace(CONFIG, mode="full"), CONFIG], ids=["set", "full", "copy"])
def test_a_file_that_changes_in_the_middle_of_a_text(small, cache, config, fault):
    """No wrong token comes, and once the file is whole again the same engine decodes rightly."""
    engine = loaded(config, memory=bounds(config, "plain")[0])
    expected, other, file = text(engine), text(engine, length=19), engine.model.tiers.files.neurons
    ends_the_text(engine, file, fault, expected)
    assert text(engine) == expected and text(engine, length=19) == other


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("weights, tied", [("plain", False), ("plain", True), ("q8", False), ("q4", False)])
def test_an_embedding_that_changes_in_the_middle_of_a_text(small, cache, tmp_path, weights, tied, fault):
    """Of which rows are read: of its own file, or, where it is the head as well, if that comes from the disk."""
    tiny("llama3", **SIZES, vocab_size=900, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    config = CONFIG if weights == "plain" else dataclasses.replace(CONFIG, mode="full")
    settings = {"folder": tmp_path / "model", "weights": weights}
    engine = loaded(config, memory=bounds(config, **settings)[0], **settings)
    expected, file = text(engine), engine.model.tiers.files.folder / "fast.safetensors"
    assert expected == text(loaded(config, **settings)) and engine.model.tiers.plan.streams_rest == (weights == "plain")
    ends_the_text(engine, file, fault, expected)
    assert text(engine) == expected


FAULTY = """
import ctypes, sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from tiny import prompt
from sirius_ext import Engine, SiriusConfig
from sirius_ext.kernels.stream import Stream
from sirius_ext.models import hub, tiers
import test_stream

torch.set_num_threads(1)
tiers._WORK, tiers._OWN, hub.row_bytes = 0, 1 << 50, lambda model: 0
disk = ctypes.CDLL(sys.argv[2])
config = SiriusConfig(density=0.4, period=5, lookup=False, draft_weights="same")
engine = Engine.from_pretrained(sys.argv[3], config, "cpu", torch.float32, progress=False, memory=int(sys.argv[4]))

def text(length=20):
    engine.model.__class__  # the engine keeps caches: each text has a prompt of its own
    return engine.generate(prompt(length), max_new_tokens=12).sequences.tolist()

expected = {length: text(length) for length in range(20, 37)}
def fresh():
    from sirius_ext.engine import prepare
    prepare(engine.model).caches.clear()

disk.set_fault(test_stream.SLOW, 0, b"neurons.bin")
fresh()
assert text(20) == expected[20], "slow reads change nothing"
need = Stream.need
Stream.need = lambda self, layer: threading.Thread(target=need, args=(self, layer)).start()  # it begins, and nobody waits
fresh()
try:
    # Of sixteen texts one: on a busy machine what was not waited for may be there all the same.
    print("wrong" if any(text(length) != expected[length] for length in range(21, 37)) else "not noticed", flush=True)
except (OSError, ValueError) as error:
    print("wrong", flush=True)
import os
os._exit(0)
"""


def test_a_wait_that_is_left_out_is_noticed(small, cache, tmp_path):
    """By these tests: a prompt is then read with what is not there yet."""
    library = faulty_disk(tmp_path)
    least, _ = bounds(SAME, "plain")
    arguments = [sys.executable, "-c", FAULTY, str(Path(__file__).parent), str(library), str(checkpoint()), str(least)]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "wrong\n", done.stderr


def test_without_any_waits_the_text_is_another(small, cache, monkeypatch):
    least, _ = bounds(SAME, "plain")
    expected = text(loaded(SAME))
    monkeypatch.setattr(Stream, "need", lambda self, layer: None)
    try:
        assert text(loaded(SAME, memory=least)) != expected
    except ValueError as error:
        assert "not finite" in str(error)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def gguf(cache, tmp_path):
    """A tiny model with a tokenizer."""
    write_gguf(tmp_path / "tiny.gguf", tiny("llama", **SIZES))
    return tmp_path / "tiny.gguf"


def run(capsys, *arguments):
    status = cli.main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


GENERATE = ("generate", "--prompt", "abcabc", "--max-new-tokens", 30, "--mode", "full", "--dtype", "float32", "--device", "cpu")


def least_of(capsys, gguf):
    """As the command line says it."""
    drafts = functools.partial(drafts_of, SiriusConfig(mode="full"))
    with pytest.raises(TooLittle) as error:
        hub.division(1, drafts, gguf, torch.float32, False)
    return error.value.least


def test_generate_with_memory(small, capsys, gguf):
    arguments = (*GENERATE, "--model", gguf)
    status, expected, _ = run(capsys, *arguments)
    assert status == 0 and expected.strip()
    least = least_of(capsys, gguf)
    status, out, err = run(capsys, *arguments, "--memory", least)
    assert status == 0 and out == expected
    assert re.search(r"reading what stays in memory ... .*GB; the full model reads \d\.\d\d GB of .*neurons\.bin besides", err)
    status, out, err = run(capsys, *arguments, "--memory", "1GB")
    assert status == 0 and out == expected and "stays in memory" not in err
    status, out, err = run(capsys, *arguments, "--memory", least // 2)
    assert status == 2 and out == "" and "sirius_ext: error: --memory: expected at least 0." in err


def test_generate_while_the_disk_fails(small, capsys, gguf, monkeypatch):
    """The text ends, with status 2 and what is wrong in one line; what there was of it is right."""
    arguments = (*GENERATE, "--model", gguf)
    _, expected, _ = run(capsys, *arguments)
    memory = least_of(capsys, gguf)
    put, changed = KeepingStreamer.put, []

    def change(self, value):
        put(self, value)
        if len(self.tokens) >= 5 and not changed:
            (file,) = hub.cache_dir().glob("tiers/*/neurons.bin")
            changed.append((file, altered(file)))

    monkeypatch.setattr(KeepingStreamer, "put", change)
    status, out, err = run(capsys, *arguments, "--memory", memory)
    assert status == 2 and expected.startswith(out.rstrip("\n")) and len(out) < len(expected)
    last = err.rstrip("\n").splitlines()[-1]
    assert last.startswith("sirius_ext: error: ") and "is not what was written: the file was changed" in last
    whole_again(*changed[0])
    assert run(capsys, *arguments, "--memory", memory)[1] == expected


def rows_of(out):
    """What `info` says, by names."""
    found, name = {}, ""
    for line in out.splitlines():
        name = line[:17].strip() or name
        found.setdefault(name, []).append(line[18:])
    return found


@pytest.fixture
def speeds(monkeypatch):
    """Of a disk and of memory."""
    read = []
    monkeypatch.setattr(info, "direct_read_speed", lambda file, seconds: read.append(file) or 2e9)
    monkeypatch.setattr(info, "memory_read_speed", lambda: 10e9)
    return read


@pytest.mark.parametrize("weights", ["plain", "q8", "q4"])
def test_info_says_what_loading_makes(small, capsys, cache, speeds, weights):
    """Of a model that is not prepared, without preparing it; of one that is, the same."""
    config = SiriusConfig()
    least, whole = bounds(config, weights)
    memory = (2 * least + whole) // 3
    arguments = ("info", "--model", checkpoint(), "--dtype", "float32", "--weights", weights, "--memory", memory)
    status, out, err = run(capsys, *arguments)
    assert status == 0 and err == "" and not (cache / "tiers").exists()
    first = rows_of(out)
    assert first["a period reads"][0].endswith("; its files are not there yet (sirius prepare)")
    assert speeds == [checkpoint() / "model.safetensors"]
    made = loaded(config, weights=weights, memory=memory).model.tiers.plan
    status, out, err = run(capsys, *arguments)
    second = rows_of(out)
    assert speeds[-1].name == "neurons.bin" and speeds[-1].is_relative_to(cache)
    for name in ("model", "memory", "neurons", "predicted", "assumed"):
        assert first[name] == second[name]
    assert first["a period reads"][0].startswith(f"{made.streamed / 1e9:.2f} GB of ")
    share = f"{made.resident[0] / SIZES['intermediate_size']:.0%} of "
    assert share in first["neurons"][0]
    assert ("copy" in first["neurons"][0]) == (made.copy > 0)
    assert first["model"] == [f"{checkpoint()}, {weights} weights, float32"]


def test_info_of_a_model_that_fits(small, capsys, cache, speeds):
    status, out, _ = run(capsys, "info", "--model", checkpoint())
    rows = rows_of(out)
    assert status == 0 and speeds == []
    assert rows["neurons"] == ["all stay in memory, beside the sparse model's copy of all in four bits"] and rows[
        "a period reads"
    ] == ["nothing from the disk"]
    assert "disk speed" not in rows and "are free" in rows["memory"][0] and "not known" not in out


def test_info_predicts(monkeypatch):
    """By hand: a period is passes of S, and one of F that reads from the disk while it computes. The best period is taken."""
    sizes = sizes_of("1.5B", "plain")
    config = SiriusConfig()
    found = best_plan(sizes, 1_600 * MB, drafts_of(config, sizes.files))
    assert found.copy and found.streamed
    full = sum(sizes.files.read_bytes())
    mlp, rest = sizes.files.read_bytes(four_bits=True)
    for disk in (1e9, 1e12):
        times = forecast(config, sizes.files, found, disk, 20e9)
        assert times.full == pytest.approx(max(found.streamed / disk, (full + found.streamed) / 20e9))
        assert times.sparse == pytest.approx((mlp + rest) / 20e9)  # all neurons, since F is dear
        assert 0.97 < times.accepted < 1
        periods = range(1, 65)
        advance = {period: sum(times.accepted**place for place in range(period)) for period in periods}
        best = min(((period - 1) * times.sparse + times.full) / advance[period] for period in periods)
        assert times.sirius == pytest.approx(best)
    unknown = forecast(config, sizes.files, found, None, 20e9)
    assert unknown.full is unknown.sirius is None and unknown.sparse == times.sparse
    everywhere = forecast(config, sizes.files, everything(sizes, 0), None, 20e9)
    assert everywhere.full == pytest.approx(full / 20e9) and everywhere.sparse < everywhere.full
    copied = forecast(config, sizes.files, everything(sizes, 0, next(drafts_of(config, sizes.files))), None, 20e9)
    assert copied.full == everywhere.full and copied.sparse == pytest.approx((mlp + rest) / 20e9)
    short = best_plan(sizes_of("1.5B", "q8"), 1_150 * MB, drafts_of(config, sizes_of("1.5B", "q8").files))
    assert short.density is not None
    eight = sizes_of("1.5B", "q8").files.read_bytes(four_bits=True)
    sparse = forecast(config, sizes_of("1.5B", "q8").files, short, 1e9, 20e9).sparse
    assert sparse == pytest.approx((short.density * eight[0] + eight[1]) / 20e9, rel=1e-6)


def test_info_where_the_speed_of_the_disk_is_not_known(small, capsys, cache, monkeypatch, speeds):
    monkeypatch.setattr(info, "direct_read_speed", lambda file, seconds: None)
    least, _ = bounds(SiriusConfig(), "plain")
    _, out, _ = run(capsys, "info", "--model", checkpoint(), "--dtype", "float32", "--memory", least)
    rows = rows_of(out)
    assert rows["disk speed"][0].startswith("not known: ") and "Full not known, S alone " in rows["predicted"][0]


def test_info_refuses_what_loading_refuses(small, capsys, cache, tmp_path, speeds):
    least, _ = bounds(SiriusConfig(), "plain")
    with pytest.raises(TooLittle) as error:
        loaded(SiriusConfig(), memory=least - 1)
    status, out, err = run(capsys, "info", "--model", checkpoint(), "--dtype", "float32", "--memory", least - 1)
    assert (status, out, err) == (2, "", f"sirius_ext: error: --{error.value}\n")
    images = tmp_path / "images"
    transformers.Gemma3Config(text_config=tiny("gemma3").config).save_pretrained(images)
    status, _, err = run(capsys, "info", "--model", images)
    assert status == 2 and "it is a model for text and images" in err


def test_speeds_are_measured(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(3 << 20))
    speed = direct_read_speed(file)
    assert speed is None or speed > 0
    file.write_bytes(b"short")
    assert direct_read_speed(file) is None and direct_read_speed(tmp_path / "nowhere") is None
    assert memory_read_speed(0.0) > 0


# ------------------------------------------------------------------------------------------------ a process within it

CHILD = """
import json, sys
import torch
from sirius_ext import Engine, SiriusConfig
job = json.loads(sys.stdin.read())
torch.set_num_threads(2)
engine = Engine.from_pretrained(job["model"], SiriusConfig(period=8), "cpu", progress=False, memory=job["memory"])
out = engine.generate(torch.arange(1, 30)[None], max_new_tokens=6)
print(engine.model.tiers.plan.streamed)
"""


def large_checkpoint(folder):
    """Random weights in 16 bits, of which the same ones stand in every layer. Returns their bytes."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=6144,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn, tensors = torch.randn(1024 * 6144).mul_(0.02).bfloat16(), {}
    for name, tensor in model.state_dict().items():
        tensors[name] = (
            drawn[: tensor.numel()].view(tensor.shape).clone() if tensor.ndim > 1 else torch.ones_like(tensor, device="cpu")
        )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def test_a_process_stays_within_its_memory(tmp_path, cache):
    """And 300 MB for Python and its libraries: in a memory cgroup that has no room for all weights beside these."""
    try:
        confined.Cgroup(None).close()
    except confined.NoCgroup as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    size, memory, own = large_checkpoint(tmp_path / "model"), 620 * MB, 300 * MB
    hub.prepare_tiers(tmp_path / "model", tmp_path / "tiers", progress=False)
    job = json.dumps({"model": str(tmp_path / "tiers"), "memory": memory})
    outcome = confined.run([sys.executable, "-c", CHILD], job, confined.Cgroup(memory + own), 120.0)
    assert (outcome.end, outcome.error) == ("finished", "")
    streamed = int(outcome.lines[-1])
    assert size // 2 < streamed and outcome.anonymous <= memory + own < size + 250 * MB, "torch takes more than that"
