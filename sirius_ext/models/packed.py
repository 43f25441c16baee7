"""Models whose matrices are packed into eight bits (csrc/q8.h): made once from a checkpoint, tensor by tensor, and kept in the
cache folder.

A packed model is one of `transformers` for its config, its generation and its tokenizer alone: its matrices are bytes, which only
the kernels here can read, so that calling it is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..kernels.matrix import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VERSION = 2  # another number where files come out differently: what older versions left in the cache is not used then


def pack(model: PreTrainedModel) -> None:
    """Pack the matrices of a model of a supported family, one after another, in place. ValueError that names a weight which is
    not finite."""
    done: dict[int, nn.Parameter] = {}
    for name, module in _holders(model):
        weight = module.weight
        if id(weight) not in done:
            done[id(weight)] = _parameter(_packed(name, weight.data))
        module.weight = done[id(weight)]
    model.register_forward_pre_hook(refuse_call)


def load_packed(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, cache: Path, on_progress: Callable[[int, int], None] | None = None
) -> PreTrainedModel | None:
    """The model in a folder of safetensors, packed. From the second time on it is read from the cache folder. At no time are
    there more than the result and one matrix in memory.

    dtype: of activations, norms and biases.
    on_progress: told how many tensors there are, and how many are done.
    None if the checkpoint's tensors do not have the model's own names: then `transformers` must read it.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    wanted = {name for name, _ in model.named_parameters()}  # without tied ones
    if not wanted or set(files) - wanted - {"lm_head.weight"} or wanted - set(files):
        return None
    kept = cache / "packed" / f"{_key(folder, config, dtype)}.safetensors"
    if not kept.is_file():
        _write(kept, model, {name: files[name] for name in wanted}, dtype, on_progress)
    tensors = safetensors.torch.load_file(kept)
    for name, module, attribute in list(_parameters(model)):
        setattr(module, attribute, _parameter(tensors[name]))
    model.tie_weights()
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


def _packed(name: str, weight: torch.Tensor) -> torch.Tensor:
    """down_proj is stored neuron by neuron, as everything else is."""
    try:
        return Matrix(weight.t().contiguous() if name.endswith("down_proj.weight") else weight).in_eight_bits().data
    except ValueError as error:
        raise ValueError(f"model: {name}: {error}") from error


def _parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _names(file: Path) -> list[str]:
    with safetensors.safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _key(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """What a packed file depends on: not the weights themselves, which would take as long to read as to pack, but where they are,
    how large and of when."""
    files = sorted(folder.glob("*.safetensors"))
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((VERSION, str(dtype), config.to_json_string(), stats)).encode()).hexdigest()[:32]


def _write(
    kept: Path, model: Any, files: dict[str, Path], dtype: torch.dtype, on_progress: Callable[[int, int], None] | None
) -> None:
    """Packs a checkpoint into one file, which is written as it is made."""
    matrices = {name for name, _ in _holders(model)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="pack-") as temporary, contextlib.ExitStack() as stack:
        fresh = Path(temporary) / kept.name
        opened: dict[Path, Any] = {}

        def read(name: str) -> torch.Tensor:
            file = files[name]
            if file not in opened:
                opened[file] = stack.enter_context(safetensors.safe_open(file, framework="pt"))
            tensor: torch.Tensor = opened[file].get_tensor(name)
            shape = model.get_parameter(name).shape
            if tensor.shape != shape:
                raise ValueError(f"model: {name}: expected shape {list(shape)} by config.json, got {list(tensor.shape)}")
            return _packed(name, tensor) if name in matrices else tensor.to(dtype).contiguous()

        _save(fresh, sorted(files), read, on_progress)
        os.replace(fresh, kept)


def _save(
    file: Path, names: list[str], read: Callable[[str], torch.Tensor], on_progress: Callable[[int, int], None] | None
) -> None:
    """As safetensors' own save, but a tensor at a time: there is room left for the header, which is written last."""
    with open(file, "wb") as stream:
        entries: dict[str, object] = {}
        room = 256 * len(names) + 1024
        stream.seek(8 + room)
        at = 0
        for count, name in enumerate(names):
            tensor = read(name)
            kind = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
            if on_progress:
                on_progress(len(names), count + 1)
        header = json.dumps(entries).encode()
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
    raise RuntimeError("model: its weights are packed into eight bits (q8), which only sirius_ext's own decoding reads")
