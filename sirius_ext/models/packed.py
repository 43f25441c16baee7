"""Models whose matrices are packed, into eight bits (csrc/q8.h) or four (csrc/q4.h): made once from a checkpoint, tensor by
tensor, and kept in the cache folder.

A packed model is one of `transformers` for its config, its generation and its tokenizer alone: its matrices are bytes, which only
the kernels here can read, so that calling it is refused. Which format they are in their modules say, as `packed_format`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..kernels import q4
from ..kernels.matrix import Format, Matrix
from .gguf_files import Header
from .gguf_tensors import Tensors
from .quantized import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VERSION = 3  # another number where files come out differently: what older versions left in the cache is not used then
_CHUNK = 1 << 22  # weights at a time: temporaries then stay small

# Told how many tensors there are, and how many are done.
Progress: TypeAlias = Callable[[int, int], None] | None


def pack(model: PreTrainedModel, weights: str = "q8") -> None:
    """Pack the matrices of a model of a supported family, one after another, in place. ValueError that names a weight which is
    not finite.

    weights: "q8" or "q4".
    """
    done: dict[int, tuple[nn.Parameter, Format]] = {}
    for name, module in _holders(model):
        weight = module.weight
        if id(weight) not in done:
            matrix = _rounded(name, weight.data, weights)
            done[id(weight)] = _parameter(matrix.bytes), matrix.format
        module.weight, module.packed_format = done[id(weight)]
    model.register_forward_pre_hook(refuse_call)


def load_packed(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    cache: Path,
    weights: str = "q8",
    on_progress: Progress = None,
    quantized: Quantized | None = None,
) -> PreTrainedModel | None:
    """The model in a folder of safetensors, packed. From the second time on it is read from the cache folder. At no time are
    there more than the result and one matrix in memory.

    dtype: of activations, norms and biases.
    weights: as in `pack`.
    quantized: how the checkpoint's matrices are made in four bits, which are then taken over; those that are not are rounded.
    None if the checkpoint's tensors do not have the model's own names: then `transformers` must read it.
    """
    model = _empty(config, dtype)
    sources = sorted(folder.glob("*.safetensors"))
    files = {name: file for file in sources for name in _names(file)}
    wanted = {name for name, _ in model.named_parameters()}  # without tied ones
    parts = {} if quantized is None else {name: quantized.parts(name, files) for name in wanted}
    unknown = set(files) - wanted - {"lm_head.weight"} - {part for each in parts.values() for part in each}
    missing = {name for name in wanted if name not in files and not parts.get(name)}
    if not wanted or (quantized is None and (unknown or missing)):
        return None
    kept = _kept(cache, sources, config, dtype, repr((weights, quantized)))
    if not kept.is_file():
        matrices = {name for name, _ in _holders(model)}
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def get(name: str) -> torch.Tensor:
                file = files[name]
                if file not in opened:
                    opened[file] = stack.enter_context(safetensors.safe_open(file, framework="pt"))
                tensor: torch.Tensor = opened[file].get_tensor(name)
                return tensor

            def read(name: str) -> torch.Tensor | Matrix:
                if quantized is not None and parts[name]:
                    shape = model.get_parameter(name).shape
                    groups = quantized.groups(name, shape, lambda part: get(part) if part in files else None)
                    return Matrix.of_groups(groups, transposed=_is_down(name))
                tensor = get(name)
                _check_shape(model, name, tensor.shape)
                return _rounded(name, tensor, weights) if name in matrices else tensor.to(dtype).contiguous()

            if quantized is not None:
                _check_names(missing, unknown, get)
            _write(kept, wanted, read, on_progress)
    return _filled(model, kept, folder)


def _check_names(missing: set[str], unknown: set[str], get: Callable[[str], torch.Tensor]) -> None:
    """ValueError for tensors of a quantized checkpoint that are not the model's; makers of them add biases of zeros."""
    unknown = {name for name in unknown if not (name.endswith(".bias") and not get(name).any())}
    for problem, names in (("missing", missing), ("unexpected", unknown)):
        if names:
            raise ValueError(f"{len(names)} weights are {problem}, the first is {min(names)}")


def load_gguf(
    header: Header,
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    cache: Path,
    on_progress: Progress = None,
) -> PreTrainedModel:
    """The model in a GGUF file, its four-bit matrices as they are and others in eight bits; all else as `load_packed`.

    folder: has the generation config.
    ValueError for a tensor that is missing, or of a type that is not supported.
    """
    model, tensors = _empty(config, dtype), Tensors(header, config)
    wanted = {name for name, _ in model.named_parameters()}
    if missing := sorted(wanted - set(tensors.names)):
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    kept = _kept(cache, [header.file], config, dtype, "as it is")
    if not kept.is_file():
        matrices = {name for name, _ in _holders(model)}

        def read(name: str) -> torch.Tensor | Matrix:
            _check_shape(model, name, tensors.shape(name))
            return _as_it_is(name, tensors) if name in matrices else tensors.numbers(name).to(dtype)

        _write(kept, wanted, read, on_progress)
    return _filled(model, kept, folder)


def _empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _filled(model: PreTrainedModel, kept: Path, folder: Path) -> PreTrainedModel:
    """With the tensors of a packed file, and the generation config of a checkpoint's folder."""
    from transformers import GenerationConfig

    with safetensors.safe_open(kept, framework="pt") as opened:
        formats = json.loads(opened.metadata()["formats"])
    tensors = safetensors.torch.load_file(kept)
    for name, module, attribute in list(_parameters(model)):
        setattr(module, attribute, _parameter(tensors[name]))
        if name in formats:
            module.packed_format = Format[formats[name]]
    model.tie_weights()
    if model.config.tie_word_embeddings:
        model.lm_head.packed_format = model.model.embed_tokens.packed_format
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _materialise(model)
    model.register_forward_pre_hook(refuse_call)
    return model


def _holders(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules whose weight is a matrix, by the weight's name."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            yield f"{name}.weight", module


def _parameters(model: Any) -> Iterator[tuple[str, Any, str]]:
    for name, _ in model.named_parameters():
        module, _, attribute = name.rpartition(".")
        yield name, model.get_submodule(module), attribute


def _is_down(name: str) -> bool:
    """down_proj is stored neuron by neuron, as everything else is."""
    return name.endswith("down_proj.weight")


def _rounded(name: str, weight: torch.Tensor, weights: str) -> Matrix:
    """Numbers, packed. The embedding and the head, of which every token reads a row or all, keep eight bits."""
    try:
        if weights == "q4" and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return Matrix.of_groups(q4.round_to_groups(weight), transposed=_is_down(name))
        return Matrix(weight.t().contiguous() if _is_down(name) else weight).in_eight_bits()
    except ValueError as error:
        raise ValueError(f"model: {name}: {error}") from error


def _as_it_is(name: str, tensors: Tensors) -> Matrix:
    """A matrix of a GGUF file: in four bits if it is, else in eight."""
    rows, cols = tensors.shape(name)
    if _is_down(name):
        if tensors.is_four_bits(name):
            return Matrix.of_groups(tensors.groups(name), transposed=True)
        return _rounded(name, tensors.numbers(name), "q8")
    step = max(1, _CHUNK // cols)
    whole: Matrix | None = None
    for first in range(0, rows, step):
        last = min(first + step, rows)
        if tensors.is_four_bits(name):
            part = Matrix.of_groups(tensors.groups(name, first, last))
        else:
            part = _rounded(name, tensors.numbers(name, first, last), "q8")
        if whole is None:
            *planes, _, width = part.data.shape
            whole = Matrix(torch.empty(*planes, rows, width, dtype=torch.uint8), part.packed)
        whole.data[..., first:last, :] = part.data
    assert whole is not None
    return whole


def _check_shape(model: PreTrainedModel, name: str, shape: tuple[int, ...]) -> None:
    wanted = model.get_parameter(name).shape
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"model: {name}: expected shape {list(wanted)} by config.json, got {list(shape)}")


def _parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _names(file: Path) -> list[str]:
    with safetensors.safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _kept(cache: Path, sources: list[Path], config: PreTrainedConfig, dtype: torch.dtype, how: str) -> Path:
    """The packed file of a checkpoint. Its name tells what it depends on: not the weights themselves, which would take as long to
    read as to pack, but where they are, how large and of when, and how they were packed."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    key = repr((VERSION, how, str(dtype), config.to_json_string(), stats))
    return cache / "packed" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _write(kept: Path, names: Iterable[str], read: Callable[[str], torch.Tensor | Matrix], on_progress: Progress) -> None:
    """Packs a checkpoint into one file, which is written as it is made."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="pack-") as temporary:
        fresh = Path(temporary) / kept.name
        _save(fresh, sorted(names), read, on_progress)
        os.replace(fresh, kept)


def _save(file: Path, names: list[str], read: Callable[[str], torch.Tensor | Matrix], on_progress: Progress) -> None:
    """As safetensors' own save, but a tensor at a time: there is room left for the header, which is written last."""
    with open(file, "wb") as stream:
        entries: dict[str, object] = {}
        formats: dict[str, str] = {}
        room = 256 * len(names) + 1024
        stream.seek(8 + room)
        at = 0
        for count, name in enumerate(names):
            tensor = read(name)
            if isinstance(tensor, Matrix):
                formats[name] = tensor.format.name
                tensor = tensor.bytes
            kind = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
            if on_progress:
                on_progress(len(names), count + 1)
        header = json.dumps({"__metadata__": {"formats": json.dumps(formats)}, **entries}).encode()
        stream.seek(0)
        stream.write(room.to_bytes(8, "little") + header.ljust(room))


def _materialise(model: Any) -> None:
    """Buffers that a module makes when it is made are not in a checkpoint. Only rope's are of use here."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))


def refuse_call(*_: object, **__: object) -> None:
    """What a packed model does when it is called."""
    raise RuntimeError("model: its weights are packed (q8, q4), which only sirius_ext's own decoding reads")
