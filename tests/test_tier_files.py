"""The files of models that are larger than the memory: what is in them, how they are made, and what is refused."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import test_gguf
import test_quantized
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from model_files import write_gguf
from tiny import FAMILY_NAMES, NAMES, prompt, tiny

from sirius_ext.kernels import q8
from sirius_ext.kernels.checks import checksums
from sirius_ext.kernels.matrix import Format
from sirius_ext.models import hub, tier_files
from sirius_ext.models.packed import Checkpoint
from sirius_ext.models.tier_files import VERSION, TierFiles
from sirius_ext.models.weights import Weights

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

# (weights, dtype): how a model is prepared.
WAYS = [("plain", "fp32"), ("plain", "bf16"), ("q8", "fp32"), ("q4", "bf16")]


@pytest.fixture
def model(tmp_path):
    """A checkpoint's folder."""
    folder = tmp_path / "model"
    tiny("qwen2", num_hidden_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "tiers"


def prepare(model, out, weights="q8", dtype="fp32"):
    return hub.prepare_tiers(str(model), out, dtype, weights, progress=False)


def contents(folder):
    """The bytes of all files."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- what is in them


def rows_on_disk(files, layer, name):
    """A matrix's rows as bytes, by the places alone: [I, bytes], and those of the lower nibbles."""
    part, images = getattr(files.layers[layer], name), files.layers[layer].images
    data = np.memmap(files.neurons, dtype=np.uint8, mode="r")

    def rows(image, at, size):
        bundles = data[image.at : image.at + image.bundle * files.intermediate].reshape(files.intermediate, image.bundle)
        return torch.from_numpy(bundles[:, at : at + size].copy())

    upper = rows(images[0], part.at, part.format.row_bytes(files.hidden))
    return upper, None if part.lower_at is None else rows(images[1], part.lower_at, 16 * q8.groups(files.hidden))


def crc_32c(data):
    """Bit by bit, from its definition."""
    found = 0xFFFFFFFF
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = found >> 1 ^ (0x82F63B78 if found & 1 else 0)
    return found ^ 0xFFFFFFFF


def check_whole(files, expected, dtype):
    """The files have what `Weights` has of a model that was loaded the usual way."""
    weights = Weights(expected)
    end = 0
    for layer, (place, own) in enumerate(zip(files.layers, weights.layers, strict=True)):
        forms = [getattr(own, name).format for name in ("gate", "up", "down")]
        assert len(place.images) == (2 if Format.Q8 in forms else 1)
        for image in place.images:
            assert image.at == end and image.at % 4096 == image.nbytes % 4096 == image.bundle % 64 == 0
            assert 0 <= image.nbytes - image.bundle * files.intermediate < 4096
            end += image.nbytes
        for name, form in zip(("gate", "up", "down"), forms):
            matrix, part = getattr(own, name), getattr(place, name)
            upper, lower = rows_on_disk(files, layer, name)
            assert part.format == form and part.at % 16 == 0
            assert torch.equal(upper, (matrix.upper if form == Format.Q8 else matrix.data).contiguous().view(torch.uint8))
            if form == Format.Q8:
                assert part.lower_at % 16 == 0 and torch.equal(lower, matrix.lower)
            else:
                assert part.lower_at is None
            assert torch.equal(files.matrix(layer, name).dense(), matrix.dense())
        shared = files.shared(layer)
        assert (shared is None) == (own.down.shared is None) and (shared is None or torch.equal(shared, own.down.shared))
    assert bool(files.rest) == (files.weights == "plain")
    data, named = np.memmap(files.neurons, dtype=np.uint8, mode="r"), dict(expected.named_parameters())
    parts = {}
    for each in files.rest:
        assert each.image.at == end and each.image.nbytes == each.blocks * each.image.bundle
        end += each.image.nbytes
        for name, (at, (rows, cols)) in each.tensors.items():
            start, size = each.image.at + at, rows * cols * files.dtype.itemsize
            parts.setdefault(name, []).append(
                torch.from_numpy(data[start : start + size].copy()).view(files.dtype).view(rows, cols)
            )
    for name, found in parts.items():
        assert torch.equal(torch.cat(found), named[name])
    attention = {name for name, own in named.items() if ".self_attn." in name and own.dim() == 2}
    head = "lm_head.weight" if "lm_head.weight" in named else "model.embed_tokens.weight"
    assert set(parts) == (attention | {head} if files.rest else set())
    files.verify()
    assert files.size == end == files.neurons.stat().st_size
    assert files.down_squares.dtype == torch.float32 and torch.equal(files.down_squares, weights.down_squares)
    assert files.fingerprint == weights.fingerprint()
    assert (files.hidden, files.intermediate, files.dtype) == (weights.hidden, weights.intermediate, hub.parse_dtype(dtype))
    assert files.checks.shape == (sum(len(layer.images) for layer in files.layers), files.intermediate)
    files.verify()
    check_skeleton(files.model(), expected, files)
    table, tokens = weights.embedding, [0, 7, 8, weights.vocab - 1]
    planes = table.data if table.format == Format.Q8 else table.data[None]
    assert torch.equal(files.embedding_rows(tokens), planes[:, tokens].view(torch.uint8))


def check_skeleton(model, expected, files):
    """Everything but the MLPs and an embedding of which rows are read is there, and these are empty."""
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in expected.named_parameters()]  # tied ones are not named again
    formats = {name: getattr(module, "packed_format", None) for name, module in expected.named_modules()}
    for name, module in model.named_modules():
        if ".mlp." not in name:
            assert getattr(module, "packed_format", None) == formats[name]
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        if ".mlp." in name or name == files.embedding:
            assert parameter.shape == (0,) and parameter.dtype == files.dtype
        else:
            assert torch.equal(parameter, expected.get_parameter(name)), name
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())) and not model.training
    assert model.tier_files is files and model.dtype == expected.dtype
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    with pytest.raises(
        RuntimeError, match="^model: its weights are in part on the disk, which only sirius_ext's own decoding reads"
    ):
        model(prompt(3))


@pytest.mark.parametrize(("weights", "dtype"), WAYS)
@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_every_family(name, weights, dtype, tmp_path, out):
    tiny(name).save_pretrained(tmp_path / name)
    files = prepare(tmp_path / name, out, weights, dtype)
    check_whole(files, hub.load_model(tmp_path / name, dtype, progress=False, weights=weights)[0], dtype)


@pytest.mark.parametrize(("weights", "dtype"), WAYS)
def test_rows_that_no_place_suits(weights, dtype, tmp_path, out):
    """Of 60 elements, in bf16 120 bytes: each row begins at a multiple of 16 all the same."""
    tiny("llama", hidden_size=60).save_pretrained(tmp_path / "model")
    files = prepare(tmp_path / "model", out, weights, dtype)
    check_whole(files, hub.load_model(tmp_path / "model", dtype, progress=False, weights=weights)[0], dtype)


@pytest.mark.parametrize("name", test_gguf.FOUR_BITS)
def test_gguf_files_as_they_are(name, tmp_path, out):
    """Layers of several formats among them."""
    base, changes, kinds = test_gguf.FOUR_BITS[name]
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny(base, **changes), kinds=kinds)
    files = prepare(file, out, "q4")
    expected, tokenizer = hub.load_model(file, "fp32", progress=False, weights="q4")
    check_whole(files, expected, "fp32")
    forms = {part.format for layer in files.layers for part in (layer.gate, layer.up, layer.down)}
    assert forms >= {Format.Q4, Format.Q4_ACROSS} or forms >= {Format.Q4_K, Format.Q8}
    again, tokenizer_again = hub.load_model(out, progress=False)
    said, wanted = (model.config.to_dict() for model in (again, expected))
    assert {key: value for key, value in said.items() if wanted[key] != value}.keys() <= {"_name_or_path", "dtype"}
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab() and tokenizer_again.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("weights", ["plain", "q8"])
def test_gguf_files_by_way_of_their_numbers(weights, tmp_path, out):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny("phi3"))
    files = prepare(file, out, weights, "bf16")
    check_whole(files, hub.load_model(file, "bf16", progress=False, weights=weights)[0], "bf16")


checkpoint = test_quantized.write


@pytest.mark.parametrize("name", ["awq", "compressed"])
def test_checkpoints_in_four_bits(name, checkpoint, out):
    folder, _ = checkpoint(name)
    files = prepare(folder, out, "q4")
    check_whole(files, hub.load_model(folder, "fp32", progress=False, weights="q4")[0], "fp32")
    assert not hasattr(files.model().config, "quantization_config")


def test_checkpoints_of_several_files(model, out):
    """And in another dtype, with what old ones have beside the weights."""
    file = model / "model.safetensors"
    tensors = {name: tensor.double() for name, tensor in safetensors.torch.load_file(file).items()}
    half = len(tensors) // 2
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    for number, names in enumerate((sorted(tensors)[:half], sorted(tensors)[half:])):
        safetensors.torch.save_file(
            {name: tensors[name] for name in names}, model / f"model-{number}.safetensors", {"format": "pt"}
        )
    file.unlink()
    check_whole(prepare(model, out, "plain"), tiny("qwen2", num_hidden_layers=3), "fp32")


@pytest.mark.parametrize("kind", ["plain", "q8", "q4", "Q4_K"])
def test_a_piece_at_a_time(kind, tmp_path, out, monkeypatch):
    """Of matrices and of files that are larger than what is looked at at once."""
    monkeypatch.setattr(tier_files, "_SOME_ROWS", 256)
    monkeypatch.setattr(tier_files, "_BLOCK", 1024)
    if kind == "Q4_K":
        file, weights = tmp_path / "tiny.gguf", "q4"
        write_gguf(file, tiny("llama", **test_gguf.K_WIDE | {"intermediate_size": 768, "head_dim": 32}), kinds=lambda name: kind)
    else:
        file, weights = tmp_path / "model", kind
        tiny("llama3", intermediate_size=600).save_pretrained(file)
    files = prepare(file, out, weights)
    check_whole(files, hub.load_model(file, "fp32", progress=False, weights=weights)[0], "fp32")
    size = (out / "fast.safetensors").stat().st_size
    for at in (5, 1023, 1024, size // 2, size - 1):
        damage("fast.safetensors", flipped(at))(out)
        with pytest.raises(ValueError, match="fast.safetensors has been changed"):
            TierFiles.open(out)
        damage("fast.safetensors", flipped(at))(out)
    TierFiles.open(out)


def test_models_of_the_hub(model, out, tmp_path, monkeypatch):
    """As they lie in Hugging Face's own cache."""
    at = tmp_path / "hub" / "models--org--tiny"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("abc")
    shutil.copytree(model, at / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_whole(prepare("org/tiny", out), hub.load_model(model, "fp32", progress=False, weights="q8")[0], "fp32")
    assert hub.tiers_of("org/tiny", "auto", progress=False).dtype == torch.float32
    with pytest.raises(
        hub.ModelLoadError, match="^model: cannot load 'org/other': not a local file or folder, and the Hugging Face"
    ):
        prepare("org/other", tmp_path / "other")


def test_weights_are_not_fetched_twice(model, out, monkeypatch):
    """Mistral's and Llama's makers put theirs beside what transformers reads."""
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    wanted = {*shards, "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    there = {*wanted, "consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "README.md", "x.bin"}
    asked = []

    def fetch(name, **patterns):
        asked.append(set(filter_repo_objects(sorted(there), **patterns)))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr(hub, "_supported_config", lambda *_: (transformers.AutoConfig.from_pretrained(model), None))
    prepare("org/tiny", out)
    assert asked == [wanted]


def test_checksums(model, out):
    for size in (0, 1, 7, 8, 192, 1000):
        blocks = torch.randint(256, (6, size), dtype=torch.uint8)
        assert [found & 0xFFFFFFFF for found in checksums(blocks).tolist()] == [crc_32c(row.tolist()) for row in blocks]
    for blocks in (torch.zeros(3), torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.uint8).t()):
        with pytest.raises(ValueError, match=r"^blocks: expected contiguous uint8 \[n, bytes\] on the CPU, got "):
            checksums(blocks)
    files = prepare(model, out)
    (upper, lower), data = files.layers[1].images, files.neurons.read_bytes()
    for image, row in ((upper, 2), (lower, 3)):
        for neuron in (0, 5, files.intermediate - 1):
            at = image.at + neuron * image.bundle
            assert int(files.checks[row, neuron]) & 0xFFFFFFFF == crc_32c(data[at : at + image.bundle])
        assert not any(data[image.at + image.bundle * files.intermediate : image.at + image.nbytes])
    assert files.checks.numpy().astype("<i4").tobytes() == (out / "checks.bin").read_bytes()


def test_generation_settings_and_tokenizer_files(model, out):
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 9]}))
    (model / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "merges.txt", "additional_chat_templates/short.jinja", "model.safetensors.index.json"):
        (model / name).write_text("{}")
    files = prepare(model, out)
    assert files.model().generation_config.eos_token_id == [7, 9]
    for name in ("chat_template.jinja", "merges.txt", "additional_chat_templates/short.jinja"):
        assert (out / name).read_text() == "{}"
    assert not (out / "model.safetensors.index.json").exists() and not list(out.glob("preparing*"))


# ------------------------------------------------------------------------------------------------------------------ loading


def test_a_folder_is_a_model(model, out):
    prepare(model, out, "q8", "fp16")
    for dtype, weights in ((torch.bfloat16, "plain"), ("auto", "q8"), ("fp16", "plain")):
        loaded, tokenizer = hub.load_model(str(out), dtype, progress=False, weights=weights)
        assert loaded.tier_files.folder == out and tokenizer is None
        assert (loaded.tier_files.weights, loaded.model.norm.weight.dtype) == ("q8", torch.float16)
    with pytest.raises(ValueError, match="^weights: expected q8, as .*tiers was prepared, or plain, got 'q4'"):
        hub.load_model(out, progress=False, weights="q4")
    with pytest.raises(ValueError, match="^dtype: expected float16, as .*tiers was prepared, or auto, got float32"):
        hub.tiers_of(out, "fp32", progress=False)
    assert hub.tiers_of(out, progress=False).folder == out
    with pytest.raises(hub.ModelLoadError, match="tiers' is a folder that was prepared already"):
        prepare(out, out.parent / "again")


def test_the_cache(model, cache, monkeypatch):
    first = hub.tiers_of(model, "fp32", "q8", progress=False)
    assert first.folder.parent == cache / "tiers"
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("prepared again"))
    assert hub.tiers_of(model, "fp32", "q8", progress=False).folder == first.folder
    monkeypatch.undo()
    monkeypatch.setenv("SIRIUS_CACHE", str(cache))
    assert hub.tiers_of(model, "bf16", "q8", progress=False).folder != first.folder
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert hub.tiers_of(model, "fp32", "q8", progress=False).folder != first.folder
    assert len(list((cache / "tiers").iterdir())) == 3


def test_a_damaged_cache_is_made_anew(model):
    first = hub.tiers_of(model, "fp32", "q8", progress=False)
    before = contents(first.folder)
    (first.folder / "checks.bin").write_bytes(b"")
    again = hub.tiers_of(model, "fp32", "q8", progress=False)
    assert again.folder == first.folder and contents(first.folder) == before


def test_progress(model, out, capfd):
    seen = []
    tier_files.prepare(Checkpoint(model, config_of(model), torch.float32, "q4"), out, lambda *now: seen.append(now))
    total = seen[-1][0]
    assert seen[-1] == (total, total) and [done for _, done in seen] == sorted({done for _, done in seen})
    assert {of for of, _ in seen} == {total}
    hub.prepare_tiers(str(model), out, "fp32", "q4")
    err = capfd.readouterr().err
    assert err.startswith(f"preparing {model} in {out} ... ") and err.endswith(" s\n") and err.count("\n") == 1


def config_of(folder):
    return transformers.AutoConfig.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------------- damage


def damage(name, change):
    def apply(folder):
        file = folder / name
        data = bytearray(file.read_bytes())
        file.write_bytes(change(data))

    return apply


def flipped(at):
    def change(data):
        data[at] ^= 1
        return data

    return change


DAMAGES = {
    "neurons, truncated": (damage("neurons.bin", lambda data: data[:-1]), r"neurons.bin has \d+ bytes, expected \d+"),
    "fast, truncated": (damage("fast.safetensors", lambda data: data[:-8]), r"fast.safetensors has \d+ bytes, expected \d+"),
    "fast, changed": (damage("fast.safetensors", flipped(-1)), "fast.safetensors has been changed"),
    "checks, longer": (damage("checks.bin", lambda data: data + b"0000"), r"checks.bin has \d+ bytes, expected \d+"),
    "checks, changed": (damage("checks.bin", flipped(9)), "checks.bin has been changed"),
    "config, changed": (damage("config.json", flipped(30)), "config.json has been changed"),
    "no fast": (lambda folder: (folder / "fast.safetensors").unlink(), "fast.safetensors is missing"),
    "no neurons": (lambda folder: (folder / "neurons.bin").unlink(), "neurons.bin is missing"),
    "manifest, half": (damage("tiers.json", lambda data: data[:100]), "tiers.json has been changed"),
    "manifest, another number": (
        damage("tiers.json", lambda data: data.replace(b'"hidden": 96', b'"hidden": 64')),
        "tiers.json has been changed",
    ),
    "manifest, of an older version": (
        damage("tiers.json", lambda data: data.replace(f'"version": {VERSION}'.encode(), b'"version": 0')),
        f"tiers.json is of version 0, expected {VERSION}",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files(what, model, out):
    """They are refused, and what is asked for mends them."""
    prepare(model, out)
    before = contents(out)
    apply, message = DAMAGES[what]
    apply(out)
    assert contents(out) != before
    with pytest.raises(ValueError, match=f"^model: .*tiers: {message}; prepare it again: sirius prepare MODEL --out .*tiers$"):
        TierFiles.open(out)
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use '.*tiers': .*{message}"):
        hub.load_model(out, progress=False)
    prepare(model, out)
    assert contents(out) == before


def test_damaged_neurons(model, out):
    """Only whoever reads them finds out, and whoever prepares the folder again."""
    files = prepare(model, out)
    before, image = contents(out), files.layers[2].images[1]
    damage("neurons.bin", flipped(image.at + 7 * image.bundle + 3))(out)
    opened = TierFiles.open(out)
    assert torch.equal(opened.matrix(1, "down").dense(), files.matrix(1, "down").dense())
    assert opened.read(2, 1, 8, 20).shape == (12, image.bundle)
    message = "neurons.bin has been changed .layer 2, neuron 7.; prepare it again"
    with pytest.raises(ValueError, match=message):
        opened.matrix(2, "down")
    with pytest.raises(ValueError, match=message):
        opened.verify()
    prepare(model, out)
    assert contents(out) == before
    with open(out / "neurons.bin", "r+b") as stream:
        stream.truncate(image.at + 100)
    with pytest.raises(ValueError, match="neurons.bin ends before layer 2 does; prepare it again"):
        opened.read(2, 1)


def test_a_folder_without_tiers(model, out):
    with pytest.raises(ValueError, match="^model: .*model has no tiers.json: it was not prepared, or only in part"):
        TierFiles.open(model)


# ------------------------------------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    pass


def interrupt(monkeypatch, before):
    """From now on the call number `before` of those that change a file for good is not made any more. Returns the number of
    tensors that have been read."""
    seen, reads = [], []

    def counted(holder, name):
        original = getattr(holder, name)

        def call(*args, **kwargs):
            seen.append(name)
            if len(seen) > before:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)

    for holder, name in ((tier_files.os, "fsync"), (tier_files.os, "replace"), (tier_files.shutil, "copyfile")):
        counted(holder, name)
    read = Checkpoint.read

    def reading(self, name):
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", reading)
    return reads


@pytest.mark.parametrize("weights", ["plain", "q4"])
def test_stopped_anywhere(weights, model, out, tmp_path, monkeypatch):
    """Whatever the last step was, another call goes on after the last whole layer, and the files are those of one that was never
    stopped."""
    source = Checkpoint(model, config_of(model), torch.float32, weights)
    tier_files.prepare(source, tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    stopped = 0
    while True:
        with monkeypatch.context() as patched:
            interrupt(patched, stopped)
            try:
                tier_files.prepare(source, out)
                break
            except Killed:
                pass
        whole = tier_files.is_prepared(out)
        done = 0 if whole or not (out / "preparing.json").exists() else json.loads((out / "preparing.json").read_text())["done"]
        if not whole:
            with pytest.raises(ValueError, match="has no tiers.json"):
                TierFiles.open(out)
        with monkeypatch.context() as patched:
            reads = interrupt(patched, 1 << 30)
            tier_files.prepare(source, out).verify()
        assert not whole or reads == []
        assert whole or {int(name.split(".")[2]) for name in reads if ".mlp." in name} == set(range(done, 3))
        assert contents(out).items() >= expected.items()
        shutil.rmtree(out)
        stopped += 1
    assert stopped > 20


def in_another_process(code, **environment):
    """What it prints. It is Python, with what this module imports most."""
    start = """
import os, re, signal, torch, transformers
from pathlib import Path
from sirius_ext.models import tier_files
from sirius_ext.models.packed import Checkpoint

torch.set_num_threads(1)
"""
    run = [sys.executable, "-c", start + code]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed(model, out, tmp_path):
    """For good, after so many tensors."""
    layers_of = {1: 0, 6: 1, 14: 3}
    code = f"""
config = transformers.AutoConfig.from_pretrained({str(model)!r})
source = Checkpoint(Path({str(model)!r}), config, torch.float32, "q8")
for tensors in {list(layers_of)}:
    def stop(total, done):
        if done >= tensors:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        tier_files.prepare(source, Path(f"{out}-{{tensors}}"), stop)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert in_another_process(code).split() == [str(-signal.SIGKILL)] * 3
    prepare(model, out)
    for tensors, layers in layers_of.items():
        folder = out.with_name(f"{out.name}-{tensors}")
        with pytest.raises(hub.ModelLoadError, match="was prepared only in part; the same command again goes on with it"):
            hub.load_model(folder, progress=False)
        assert json.loads((folder / "preparing.json").read_text())["done"] == layers
        prepare(model, folder)
        assert contents(folder) == contents(out)


def stop_after(layers):
    def on_progress(total, done):
        if done >= 3 * layers:
            raise Killed

    return on_progress


def part_of(model, out, weights="q8", layers=3):
    """Two of three layers."""
    source = Checkpoint(model, config_of(model), torch.float32, weights)
    with pytest.raises(Killed):
        tier_files.prepare(source, out, stop_after(layers))


def test_mending_may_be_stopped(model, out):
    """The folder does not pass for a whole one meanwhile."""
    before = contents(prepare(model, out).folder)
    damage("neurons.bin", flipped(0))(out)
    part_of(model, out)
    assert not tier_files.is_prepared(out)
    prepare(model, out)
    assert contents(out) == before


@pytest.mark.parametrize("change", ["weights", "file", "truncated"])
def test_what_was_begun_for_something_else(change, model, out, tmp_path):
    """It is begun anew."""
    part_of(model, out)
    assert json.loads((out / "preparing.json").read_text())["done"] == 2
    weights = "q8"
    if change == "weights":
        weights = "plain"
    elif change == "file":
        tensors = safetensors.torch.load_file(model / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] += 1
        safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    else:
        damage("neurons.bin", lambda data: data[:5000])(out)
    prepare(model, out, weights)
    prepare(model, tmp_path / "expected", weights)
    assert contents(out) == contents(tmp_path / "expected")


def test_settings_of_what_was_begun(model, out, monkeypatch):
    """They do not become those of another model."""
    (model / "tokenizer.json").write_text("{}")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TierFiles, "_fingerprint", kill)  # which comes after all files
        with pytest.raises(Killed):
            prepare(model, out)
    assert (out / "tokenizer.json").exists() and not tier_files.is_prepared(out)
    (model / "tokenizer.json").unlink()
    prepare(model, out, "q4")
    assert not (out / "tokenizer.json").exists() and (out / "generation_config.json").exists()
    assert hub.load_model(out, progress=False)[1] is None


def test_a_full_disk(model, out, monkeypatch):
    """Said before, and if it comes to it meanwhile; what there is stays."""
    usage = shutil.disk_usage(model)
    with monkeypatch.context() as patched:
        patched.setattr(tier_files.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(OSError, match=r"no room on the disk: 0\.\d MB more are needed, 0\.1 MB are free") as error:
            prepare(model, out)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(out)
    synced = []

    def full(stream):
        synced.append(stream)
        if len(synced) > 9:  # the journal, and what belongs to two layers
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(tier_files, "_sync", full)
        with pytest.raises(
            OSError, match="No space left on device, after 2 of 3 layers; once there is room, another call"
        ) as error:
            prepare(model, out)
    assert error.value.errno == errno.ENOSPC
    with monkeypatch.context() as patched:
        reads = interrupt(patched, 1 << 30)
        needed = []
        patched.setattr(tier_files.shutil, "disk_usage", lambda _: needed.append(1) or usage)
        prepare(model, out).verify()
    assert needed and {int(name.split(".")[2]) for name in reads if ".mlp." in name} == {2}


def test_room_that_is_needed(model, out, tmp_path, monkeypatch):
    """It is what the files come to, no more and hardly less, from the beginning and from the middle on."""
    whole = sum(map(len, contents(prepare(model, tmp_path / "whole").folder).values()))
    usage = shutil.disk_usage(model)

    def has_room(free):
        with monkeypatch.context() as patched:
            patched.setattr(tier_files.shutil, "disk_usage", lambda _: usage._replace(free=free))
            try:
                part_of(model, out)
            except OSError:
                return False
        return True

    settings = 20_000  # config and manifest, and the header of the safetensors, which are not counted
    assert not has_room(whole - settings)
    assert has_room(whole + settings)
    there = sum(map(len, contents(out).values()))
    assert not has_room(whole - there - settings)
    assert has_room(whole - there + settings)


def test_two_at_once(model, out, monkeypatch):
    """One prepares, the other waits and then finds all there."""
    reads, found = interrupt(monkeypatch, 1 << 30), []
    source = Checkpoint(model, config_of(model), torch.float32, "q8")
    threads = [threading.Thread(target=lambda: found.append(tier_files.prepare(copy.copy(source), out))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(reads) == len(set(reads)) == len(source.names)


# ------------------------------------------------------------------------------------------------------------ what is refused


def test_other_folders(model, out, tmp_path):
    """Nothing is written into one that has something else in it."""
    with pytest.raises(FileExistsError, match="expected a new folder or an empty one, but it has config.json") as error:
        prepare(model, model)
    assert error.value.filename == str(model)
    prepare(model, out)
    before = contents(out)
    with pytest.raises(FileExistsError, match="it has another model, or this one in another form or from other files"):
        prepare(model, out, "q4")
    assert contents(out) == before
    out.joinpath("file").write_text("")
    with pytest.raises(NotADirectoryError):
        prepare(model, out / "file" / "folder")


def test_checkpoints_that_only_transformers_reads(model, out):
    how = "its files are not safetensors by the model's own names; load the model by Engine.from_pretrained"
    file = model / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use .*: 3. weights are missing, the first is model.*: {how}"):
        prepare(model, out)
    torch.save(tensors, model / "pytorch_model.bin")
    file.unlink()
    for weights in ("plain", "q4"):
        with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use .*: {how}"):
            prepare(model, out, weights)
    assert not out.exists()


def test_models_for_text_and_images(tmp_path, out):
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    images = transformers.SiglipVisionConfig(**vision, patch_size=14)
    transformers.Gemma3Config(text_config=tiny("gemma3").config, vision_config=images).save_pretrained(tmp_path / "images")
    with pytest.raises(hub.ModelLoadError, match="it is a model for text and images; load the model by Engine.from_pretrained"):
        prepare(tmp_path / "images", out)


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_weights_that_are_not_finite(weights, model, out):
    file = model / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(hub.ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: expected finite weights .* row 3 "):
        prepare(model, out, weights)
    assert not tier_files.is_prepared(out)


def test_a_shape_that_the_config_does_not_have(model, out):
    file = model / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].t().contiguous()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        hub.ModelLoadError, match=r"down_proj\.weight: expected shape \[96, 144\] by config\.json, got \[144, 96\]"
    ):
        prepare(model, out, "plain")


# ------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="what a process had at most is Linux's to tell")
def test_memory(tmp_path):
    """There are a layer and a few matrices at a time, not more of a model with more layers."""
    hidden, intermediate, layers = 256, 8192, 5
    code = f"""
import safetensors.torch
from sirius_ext.models.packed import empty

def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def source(name, weights, *sizes):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    config = transformers.LlamaConfig(vocab_size=149, num_attention_heads=4, **dict(zip(names, sizes)))
    folder = Path({str(tmp_path)!r}, name)
    if not folder.exists():
        folder.mkdir()
        tensors = {{name: torch.randn(each.shape) for name, each in empty(config, torch.float32).named_parameters()}}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, config, torch.float32, weights)

for weights in ("plain", "q8", "q4"):
    tier_files.prepare(source("small", weights, 32, 96, 1), Path({str(tmp_path)!r}, weights + "-small"))
    large = source("large", weights, {hidden}, {intermediate}, {layers})
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    tier_files.prepare(large, Path({str(tmp_path)!r}, weights))
    print(memory("VmHWM") - before)
"""
    matrix = 4 * hidden * intermediate
    # What malloc keeps for itself of what was freed is not what is asked for here.
    plain, q8, q4 = (int(line) / matrix for line in in_another_process(code, MALLOC_MMAP_THRESHOLD_="65536").split())
    assert plain < 5 and q8 < 5 and q4 < 6.5, "of 15 matrices"
