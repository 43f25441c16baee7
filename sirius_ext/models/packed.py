"""Models whose matrices are packed, into eight bits (csrc/q8.h) or four (csrc/q4.h): made once from a checkpoint, tensor by
tensor, and kept in the cache folder.

A packed model is one of `transformers` for its config, its generation and its tokenizer alone: its matrices are bytes, which only
the kernels here can read, so that calling it is refused. Which format they are in their modules say, as `packed_format`.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..kernels import q4, q8
from ..kernels.matrix import Format, Matrix
from .gguf_files import Header
from .gguf_tensors import Tensors
from .quantized import Quantized
from .scratch import scratch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VERSION = 3  # another number where files come out differently: what older versions left in the cache is not used then

_SOME_ROWS = 4096  # of a matrix that are compared at once
_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by safetensors' names

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
    _only_decode(model)


class OtherNames(ValueError):
    """The tensors of a checkpoint are not called as the model's own are: only `transformers` can read it."""


class Source(abc.ABC):
    """A checkpoint whose tensors can be had one by one, by the model's own names, as they are to be kept.

    model: of its config, without weights. config: a `transformers` one.
    folder: has its settings and tokenizer. files: have its weights.
    dtype: of what is not packed. weights: "plain", "q8" or "q4".
    key: tells what is made of it from what is made of others. It depends not on the weights themselves, which would take as long
        to read as to pack, but on where they are, how large and of when, and how they are packed.
    """

    def __init__(
        self, config: PreTrainedConfig, folder: Path, files: list[Path], dtype: torch.dtype, weights: str, how: str
    ) -> None:
        self.model = empty(config, dtype)
        self.config, self.folder, self.files, self.dtype, self.weights = config, folder, files, dtype, weights
        self.names = {name for name, _ in self.model.named_parameters()}  # without tied ones
        self.matrices = {name for name, _ in _holders(self.model)}
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = repr((VERSION, how, str(dtype), config.to_json_string(), stats))
        self.key = hashlib.sha256(key.encode()).hexdigest()[:32]

    @abc.abstractmethod
    def format(self, name: str) -> Format:
        """Of one of the matrices."""

    @abc.abstractmethod
    def read(self, name: str) -> torch.Tensor | Matrix:
        """Matrices that are packed come as such, all else in `dtype`. ValueError that names a weight which is not finite or has
        another shape than the config says."""

    def shape(self, name: str) -> torch.Size:
        return self.model.get_parameter(name).shape

    def nbytes(self, name: str) -> int:
        """Of what `read` returns."""
        shape = self.shape(name)
        if name not in self.matrices:
            return shape.numel() * self.dtype.itemsize
        form, (rows, cols) = self.format(name), reversed(shape) if is_down(name) else shape
        shared = q4.shared_bytes(rows, cols, form.supers) if form.across else 0
        return rows * form.row_bytes(cols) * (2 if form == Format.Q8 else 1) + shared

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        wanted = self.shape(name)
        if tuple(shape) != tuple(wanted):
            raise ValueError(f"model: {name}: expected shape {list(wanted)} by config.json, got {list(shape)}")


class Checkpoint(Source):
    """A folder of safetensors.

    quantized: how the checkpoint's matrices are made in four bits, which are then taken over; those that are not are rounded.
    OtherNames where tensors are missing, or there are others.
    """

    def __init__(
        self,
        folder: Path,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        weights: str = "q8",
        quantized: Quantized | None = None,
    ) -> None:
        files = _weight_files(folder)
        self._files = {name: file for file in files for name in _names(file)}
        if config.tie_word_embeddings and self._has_own_head(dtype):
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False  # as transformers takes it then
        super().__init__(config, folder, files, dtype, weights, repr((weights, quantized)))
        self._quantized = quantized
        self._parts = {name: quantized.parts(name, self._files) for name in self.names} if quantized else {}
        known = self.names | {part for parts in self._parts.values() for part in parts} | {"lm_head.weight"}
        self._check_names(set(self._files) - known)

    def _has_own_head(self, dtype: torch.dtype) -> bool:
        """Whether there is an LM head which is another matrix than the embedding, whatever the config says of the two."""
        names = ("model.embed_tokens.weight", "lm_head.weight")
        if not all(name in self._files for name in names):
            return False
        with contextlib.ExitStack() as stack:
            opened = (stack.enter_context(safetensors.safe_open(self._files[name], framework="pt")) for name in names)
            embedding, head = (file.get_slice(name) for file, name in zip(opened, names))
            shape = embedding.get_shape()
            if head.get_shape() != shape:
                return True
            parts = (slice(first, first + _SOME_ROWS) for first in range(0, shape[0], _SOME_ROWS))
            return not all(torch.equal(embedding[part].to(dtype), head[part].to(dtype)) for part in parts)

    def _check_names(self, unknown: set[str]) -> None:
        unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}  # old ones: the config says the angles
        if self._quantized is not None:  # its makers add biases of zeros
            unknown = {name for name in unknown if not (name.endswith(".bias") and not self._get(name).any())}
        missing = {name for name in self.names if name not in self._files and not self._parts.get(name)}
        for problem, names in (("missing", missing), ("unexpected", unknown)):
            if names:
                raise OtherNames(f"{len(names)} weights are {problem}, the first is {min(names)}")

    def format(self, name: str) -> Format:
        if self.weights == "plain":
            return Format.of(self.dtype)
        if self.weights == "q4" and (self._parts.get(name) or not _is_outside(name)):
            return Format.Q4_ACROSS if is_down(name) else Format.Q4
        return Format.Q8

    def read(self, name: str) -> torch.Tensor | Matrix:
        if self._quantized is not None and self._parts[name]:
            groups = self._quantized.groups(name, self.shape(name), lambda part: self._get(part) if part in self._files else None)
            return Matrix.of_groups(groups, transposed=is_down(name))
        tensor = self._get(name)
        self._check_shape(name, tensor.shape)
        if self.weights != "plain" and name in self.matrices:
            return _rounded(name, tensor, self.weights)
        return tensor.to(self.dtype).contiguous()

    def _get(self, name: str) -> torch.Tensor:
        # Opened anew for each: what was read of a file that stays mapped would stay in memory, too.
        with safetensors.safe_open(self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor.float() if tensor.dtype == torch.float64 else tensor  # which kernels and formats do not have


class GgufFile(Source):
    """A GGUF file, its four-bit matrices as they are and others in eight bits.

    folder: has the settings and the tokenizer.
    ValueError for a tensor that is missing, or of a type that is not supported.
    """

    def __init__(self, header: Header, folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        super().__init__(config, folder, [header.file], dtype, "q4", "as it is")
        self._tensors = Tensors(header, config)
        if missing := sorted(self.names - set(self._tensors.names)):
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")

    def format(self, name: str) -> Format:
        if not self._tensors.is_four_bits(name):
            return Format.Q8
        if self._tensors.has_supers(name):
            return Format.Q4_K_ACROSS if is_down(name) else Format.Q4_K
        return Format.Q4_ACROSS if is_down(name) else Format.Q4

    def read(self, name: str) -> torch.Tensor | Matrix:
        self._check_shape(name, self._tensors.shape(name))
        return _as_it_is(name, self._tensors) if name in self.matrices else self._tensors.numbers(name).to(self.dtype)


def load_packed(source: Source, cache: Path, on_progress: Progress = None) -> PreTrainedModel:
    """The model, packed. From the second time on it is read from the cache folder. At no time are there more than the result and
    one matrix in memory."""
    kept = cache / "packed" / f"{source.key}.safetensors"
    try:
        found = load(kept)
    except (FileNotFoundError, safetensors.SafetensorError):  # it is not there, or was cut off
        with scratch(kept.parent, "pack-") as temporary:
            fresh = temporary / kept.name
            save(fresh, sorted(source.names), source.read, on_progress)
            os.replace(fresh, kept)
        found = load(kept)
    return fill(source.model, *found, source.folder)


def empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def fill(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], formats: Mapping[str, Format], folder: Path
) -> PreTrainedModel:
    """Gives an empty model its weights, by their names, and the generation config of a checkpoint's folder. formats: of the
    weights that are packed. A call of it is refused from now on, and to save it."""
    from transformers import GenerationConfig

    for name, module, attribute in list(_parameters(model)):
        setattr(module, attribute, _parameter(tensors[name]))
        if name in formats:
            module.packed_format = formats[name]
    model.tie_weights()
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in formats:
        model.lm_head.packed_format = formats["model.embed_tokens.weight"]
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _materialise(model)
    _only_decode(model)
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


def is_down(name: str) -> bool:
    """down_proj is stored neuron by neuron, as everything else is."""
    return name.endswith("down_proj.weight")


def _is_outside(name: str) -> bool:
    """Whether it is the embedding or the head."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _rounded(name: str, weight: torch.Tensor, weights: str) -> Matrix:
    """Numbers, packed. The embedding and the head, of which every token reads a row or all, keep eight bits."""
    try:
        if weights == "q4" and not _is_outside(name):
            return Matrix.of_groups(q4.round_to_groups(weight), transposed=is_down(name))
        return Matrix(weight.t().contiguous() if is_down(name) else weight).in_eight_bits()
    except ValueError as error:
        raise ValueError(f"model: {name}: {error}") from error


def _as_it_is(name: str, tensors: Tensors) -> Matrix:
    """A matrix of a GGUF file: in four bits if it is, else in eight."""
    rows, cols = tensors.shape(name)
    if is_down(name):
        if tensors.is_four_bits(name):
            return Matrix.of_groups(tensors.groups(name), transposed=True)
        return _rounded(name, tensors.numbers(name), "q8")
    step = max(1, q8.CHUNK // cols)
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


def _parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: those that transformers reads, whatever else lies beside them; all that there are if it
    would find none. ValueError if one that the index names is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model: {index.name} has no weight_map that says where the weights are") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"model: {index.name} names {missing[0]}, which is not there")
    return [folder / name for name in names]


def _names(file: Path) -> list[str]:
    with safetensors.safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def save(file: Path, names: list[str], read: Callable[[str], torch.Tensor | Matrix], on_progress: Progress) -> None:
    """As safetensors' own save, but a tensor at a time: there is room left for the header, which is written last. `load` reads
    it."""
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
            kind = next(kind for kind, dtype in _DTYPES.items() if dtype == tensor.dtype)
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
            if on_progress:
                on_progress(len(names), count + 1)
        header = json.dumps({"__metadata__": {"formats": json.dumps(formats)}, **entries}).encode()
        stream.seek(0)
        stream.write(room.to_bytes(8, "little") + header.ljust(room))
        stream.flush()
        os.fsync(stream.fileno())


def load(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Format]]:
    """The tensors of such a file, mapped, and the formats of those that are packed."""
    with safetensors.safe_open(file, framework="pt") as opened:
        formats = json.loads(opened.metadata()["formats"])
    return safetensors.torch.load_file(file), {name: Format[form] for name, form in formats.items()}


class Place(NamedTuple):
    """Where a tensor of such a file is: its first byte, how many bytes, and as what they are read."""

    at: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def places(read: Callable[[int, int], bytes]) -> tuple[dict[str, Place], dict[str, Format]]:
    """Of the tensors of such a file, and the formats of those that are packed. read: gives its bytes, from where and how many."""
    size = int.from_bytes(read(0, 8), "little")
    header = json.loads(read(8, size))
    formats = json.loads(header.pop("__metadata__")["formats"])
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Place(8 + size + begin, end - begin, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found, {name: Format[form] for name, form in formats.items()}


def _materialise(model: Any) -> None:
    """Buffers that a module makes when it is made are not in a checkpoint. Only rope's are of use here."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))


def _only_decode(model: PreTrainedModel) -> None:
    """Have a model whose weights nobody else can read refuse to be called, and what would take these weights for others."""
    model.register_forward_pre_hook(refuse_call)
    for name in ("save_pretrained", "push_to_hub", "resize_token_embeddings"):
        setattr(model, name, _refuse_copy)  # in place of its class's own; bound to the model it would keep that alive


def _refuse_copy(*_: object, **__: object) -> None:
    raise RuntimeError(
        "model: its weights are packed or in part on the disk, which only sirius_ext's own decoding reads; save or change the "
        "model that it was loaded from"
    )


def refuse_call(model: object, *_: object, **__: object) -> None:
    """What a packed model, or one without its MLPs' weights, does when it is called."""
    where = "packed (q8, q4)" if getattr(model, "tier_files", None) is None else "in part on the disk"
    raise RuntimeError(f"model: its weights are {where}, which only sirius_ext's own decoding reads")
