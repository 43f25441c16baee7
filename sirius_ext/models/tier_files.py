"""The files of models that are larger than the memory.

The MLPs' weights of every layer are on the disk as *images*. An image is an array of bundles, one for each neuron in the neurons'
order: its gate, up and down row one after the other, in the bytes that the kernels read, so that what is read from the disk is
where it must be. Image 0 has what a sparse model reads that takes four bits of packed weights: all of plain matrices and of those
in four bits, the upper planes of those in eight. Their lower nibbles are in image 1, if the layer has such a matrix. Everything
else is for the memory; of plain weights attention and LM head are in images, too, for memory that is short.

A folder of such files is a model. `tiers.json` says how they are made. It comes last, so that a folder that has it is whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch

from ..kernels import q4, q8
from ..kernels.checks import checksums
from ..kernels.matrix import Format, Matrix
from ..kernels.stream import PAGE
from .checked_file import BLOCK, CheckedFile, block_sums
from .families import check_supported
from .gguf_files import CONVERTED
from .packed import Place, Progress, Source, empty, fill, is_down, places, save
from .scratch import opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2  # another number where files come out differently: older ones are then refused
MANIFEST, NEURONS, FAST, CHECKS = "tiers.json", "neurons.bin", "fast.safetensors", "checks.bin"
JOURNAL = "preparing.json"  # how far the files of a folder without a manifest are
_NOTES = "preparing.bin"  # and what of the layers that are done comes into FAST
EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SQUARES = "down_squares"  # among the tensors of FAST, beside those of the model's own names

# Images begin at multiples of PAGE. Bytes of which bundles have a multiple, and at whose multiples rows begin in these.
_BUNDLE, _ROW = 64, 16
_PART = 1 << 26  # bytes of the head that are read together
_BLOCK, _BLOCKS = 1 << 20, 16  # of a file that is summed: bytes of each, and how many at once
ROWS_TOLD = 4  # of every layer's gate, by which models are told apart
_SOME_ROWS = 4096  # of a matrix that become numbers at once: a multiple of all that may have their scales together
# Of a checkpoint: its generation config, and what a tokenizer is made of.
_SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")
_UNFINISHED = ".part"


@dataclasses.dataclass(frozen=True)
class Image:
    """Where an image is: its first byte in the file, bytes of a bundle, bytes in all, of which the last ones are padding."""

    at: int
    bundle: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one matrix's rows are: the row's first byte in a bundle of image 0, and of one in eight bits the first byte of its
    lower nibbles in a bundle of image 1."""

    format: Format
    at: int
    lower_at: int | None = None


@dataclasses.dataclass(frozen=True)
class LayerFiles:
    """A layer's images, and where in them its matrices are. Rows of down are those of its transpose, [I, H] as of the others."""

    images: tuple[Image, ...]
    gate: Part
    up: Part
    down: Part

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.gate, self.up, self.down


@dataclasses.dataclass(frozen=True)
class Rest:
    """Matrices beside the MLPs, one after the other in one image, whose bundles are blocks of BLOCK bytes: those of a layer's
    attention, or a part of the LM head. tensors: by their names, the first byte, and the shape.
    """

    image: Image
    tensors: dict[str, tuple[int, tuple[int, int]]]

    @property
    def blocks(self) -> int:
        return self.image.nbytes // self.image.bundle


class Stored(NamedTuple):
    """A tensor of FAST: its bytes, of a packed matrix the format, and of any matrix its rows."""

    nbytes: int
    format: Format | None = None
    rows: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What a folder of tiers has in it, or would have, and how large that is. With H hidden and I intermediate.

    weights: "plain", "q8" or "q4". dtype: of what is not packed.
    rest: of plain weights what only the full model reads where the sparse one has a copy: an image for each layer's attention,
        and those of the head. It is in FAST as well.
    fast: the tensors of FAST, by their names.
    """

    weights: str
    dtype: torch.dtype
    hidden: int
    intermediate: int
    layers: list[LayerFiles]
    rest: list[Rest]
    fast: dict[str, Stored]

    @classmethod
    def of(cls, source: Source) -> Layout:
        """Of what `prepare` would make of a checkpoint, of which only names and shapes are looked at."""
        config = source.config
        hidden, intermediate = config.hidden_size, config.intermediate_size
        names = [_names(config, layer) for layer in range(config.num_hidden_layers)]
        formats = [[source.format(name) for name in (each[0], each[-2], each[-1])] for each in names]
        layers, size = _layout(formats, hidden, intermediate)
        of_source = sorted(source.names - {name for each in names for name in each})
        fast = {
            name: Stored(source.nbytes(name), _packed_format(source, name), _rows(name, source.shape(name))) for name in of_source
        }
        fast[_SQUARES] = Stored(4 * intermediate * len(layers))
        for layer, (*_, down) in enumerate(formats):
            if down.across:
                fast[_shared_name(layer)] = Stored(q4.shared_bytes(intermediate, hidden, down.supers))
        return cls(source.weights, source.dtype, hidden, intermediate, layers, _rest_of(source, size), fast)

    @property
    def size(self) -> int:
        """Of the file of neurons, in bytes."""
        return sum(image.nbytes for layer in self.layers for image in layer.images) + sum(each.image.nbytes for each in self.rest)

    @functools.cached_property
    def beside(self) -> tuple[list[list[str]], str | None]:
        """What of FAST may stream as the MLPs do: matrices of each layer's attention, and the LM head, unless it is the embedding
        as well. Of packed ones those in eight bits, whose lower nibbles only the full model reads."""

        def streams(name: str) -> bool:
            return any(name in each.tensors for each in self.rest) if self.rest else self.fast[name].format == Format.Q8

        prefixes = [f"model.layers.{layer}.self_attn." for layer in range(len(self.layers))]
        attention = [sorted(name for name in self.fast if name.startswith(each) and streams(name)) for each in prefixes]
        return attention, _HEAD if _HEAD in self.fast and streams(_HEAD) else None

    def _in_memory(self, rest: bool) -> set[str]:
        """What of FAST is for the memory. Of an embedding that is not the head as well, or that is there a second time as the
        head, single rows are read: that stays on the disk. rest: with what is there a second time."""
        streamed = set() if rest else {name for each in self.rest for name in each.tensors} | {EMBEDDING}
        return self.fast.keys() - streamed - {self.embedding}

    def rows_are_read(self, rest: bool) -> bool:
        """Whether single rows of the embedding are read from the disk: it is not in memory, with `rest` there or without."""
        return EMBEDDING not in self._in_memory(rest)

    @property
    def embedding(self) -> str | None:
        """The one of which single rows are read; None if it is the head as well."""
        return EMBEDDING if _HEAD in self.fast else None

    @property
    def embedding_bytes(self) -> int:
        """Of an embedding of which single rows are read; 0 of one that is the head as well."""
        return self.fast[self.embedding].nbytes if self.embedding else 0

    def fast_bytes(self, rest: bool = True) -> int:
        """Of all that is for the memory, with `rest` or without."""
        return sum(self.fast[name].nbytes for name in self._in_memory(rest))

    def read_bytes(self, four_bits: bool = False) -> tuple[int, int]:
        """What a pass reads of the MLPs, and of all else, if it leaves nothing out. four_bits: of each matrix four bits, which of
        plain ones are a copy."""
        if four_bits and self.weights == "plain":
            shapes = [shape for each in self.rest for _, shape in each.tensors.values()]
            mlp = 3 * len(self.layers) * self.intermediate * q8.row_bytes(self.hidden)
            return mlp, sum(rows * q8.row_bytes(cols) for rows, cols in shapes)
        images = (image for layer in self.layers for image in layer.images[: 1 if four_bits else None])
        scales = {_shared_name(layer) for layer in range(len(self.layers))} & self.fast.keys()
        mlp = self.intermediate * sum(image.bundle for image in images) + sum(self.fast[name].nbytes for name in scales)
        rest = (self.fast[name] for name in self._in_memory(True) - scales - {_SQUARES})
        return mlp, sum(each.nbytes // 2 if four_bits and each.format == Format.Q8 else each.nbytes for each in rest)


@dataclasses.dataclass(frozen=True, eq=False)
class TierFiles(Layout):
    """A folder of tiers.

    checks: CRC-32C of every bundle, by layer, image and neuron: int32 [images, I], the bits of unsigned numbers.
    rest_checks: of the blocks of `rest`, int32 [blocks].
    fast_checks: of the blocks of FAST when it was opened (`checked_file`), int32 [blocks].
    fingerprint: as `Weights.fingerprint`.
    """

    folder: Path
    checks: torch.Tensor
    rest_checks: torch.Tensor
    fast_checks: torch.Tensor
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> TierFiles:
        """ValueError that says what to do if the folder has none, or they are damaged. Of the neurons only the size is looked at:
        whoever reads a bundle compares its checksum. Of FAST all bytes are, which have checksums from then on."""
        said, sums = _manifest(folder), list[torch.Tensor]()

        def note(part: torch.Tensor) -> None:
            sums.append(block_sums(part))

        for name, file in said["files"].items():
            path = folder / name
            if not path.is_file():
                raise _damaged(folder, f"{name} is missing")
            if path.stat().st_size != file["size"]:
                raise _damaged(folder, f"{name} has {path.stat().st_size} bytes, expected {file['size']}")
            if file["crc"] is not None and _crc_of(path, note if name == FAST else None) != file["crc"]:
                raise _damaged(folder, f"{name} has been changed")
        hidden, intermediate = said["hidden"], said["intermediate"]
        layers, _ = _layout([[Format[name] for name in names] for names in said["formats"]], hidden, intermediate)
        rest = [
            Rest(Image(*image), {name: (at, tuple(shape)) for name, (at, shape) in tensors.items()})
            for image, tensors in said["rest"]
        ]
        checks, rest_checks = _read_checks(folder, intermediate, sum(len(layer.images) for layer in layers))
        fast_checks = torch.cat(sums)
        found, formats = _places(CheckedFile(folder / FAST, fast_checks))
        return cls(
            weights=said["weights"],
            dtype=getattr(torch, said["dtype"]),
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            rest=rest,
            fast={name: Stored(place.nbytes, formats.get(name), _rows(name, place.shape)) for name, place in found.items()},
            folder=folder,
            checks=checks,
            rest_checks=rest_checks,
            fast_checks=fast_checks,
            fingerprint=said["fingerprint"],
        )

    @property
    def neurons(self) -> Path:
        """The file of all images."""
        return self.folder / NEURONS

    @functools.cached_property
    def _fast_file(self) -> CheckedFile:
        return CheckedFile(self.folder / FAST, self.fast_checks)

    @functools.cached_property
    def _fast_places(self) -> dict[str, Place]:
        return _places(self._fast_file)[0]

    @functools.cached_property
    def down_squares(self) -> torch.Tensor:
        """||down_i||_2^2 of every neuron, float32 [layers, I], as `Weights.down_squares`. OSError as `fast_tensor`."""
        return self.fast_tensor(_SQUARES)

    @functools.cached_property
    def _shared(self) -> list[torch.Tensor | None]:
        names = map(_shared_name, range(len(self.layers)))
        return [self.fast_tensor(name) if name in self.fast else None for name in names]

    def shared(self, layer: int) -> torch.Tensor | None:
        """The scales that the rows of down have together, uint8 [bytes], if they do."""
        return self._shared[layer]

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model, without any weights."""
        from transformers import AutoConfig

        return empty(AutoConfig.from_pretrained(self.folder, trust_remote_code=False), self.dtype)

    def model(self, rest: bool = True, on_device: bool = False) -> PreTrainedModel:
        """The model without its MLPs' weights, which are empty, and so is an embedding of which rows are read and, if it is to be
        without the `rest`, what is `beside`; its `tier_files` leads back here. It cannot be called. OSError as `fast_tensor`.

        on_device: it is for a CUDA device, which holds an embedding that is the head as well in any case.
        """
        config, nothing = self.skeleton.config, torch.empty(0, dtype=self.dtype)
        absent = {name for layer in range(len(self.layers)) for name in _names(config, layer)}
        if not rest:
            attention, head = self.beside
            absent.update(*attention, [head] if head else [])
        if self.embedding is not None if on_device else self.rows_are_read(rest):
            absent.add(EMBEDDING)
        own = [name for name, _ in self.skeleton.named_parameters()]
        tensors = {name: nothing if name in absent else self.fast_tensor(name) for name in own}
        formats = {name: stored.format for name, stored in self.fast.items() if stored.format is not None}
        model: Any = fill(empty(config, self.dtype), tensors, formats, self.folder)
        model.tier_files = self
        filled: PreTrainedModel = model.eval()
        return filled

    def check_row(self, layer: int, image: int) -> int:
        """Which row of `checks` is an image's."""
        return sum(len(each.images) for each in self.layers[:layer]) + image

    def fast_tensor(self, name: str) -> torch.Tensor:
        """Of FAST, in memory of its own. OSError if it cannot be read, or is not what was written."""
        place = self._fast_places[name]
        return self._fast_file.read([place.at], place.nbytes)[0].view(place.dtype).view(place.shape)

    def embedding_rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of the embedding, as they are in FAST: uint8 [planes, tokens, bytes], two planes of eight bits and else one. OSError as
        `fast_tensor`."""
        start, (planes, rows, size) = self._fast_places[EMBEDDING].at, self.embedding_shape
        begins = [start + (plane * rows + token) * size for plane in range(planes) for token in tokens]
        return self._fast_file.read(begins, size).view(planes, len(tokens), size)

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        """Planes of the embedding, rows, and bytes of a row."""
        stored = self.fast[EMBEDDING]
        planes = 2 if stored.format == Format.Q8 else 1
        return planes, stored.rows, stored.nbytes // (planes * stored.rows)

    def read(self, layer: int, image: int, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Bundles of neurons `first` to `last` - 1, or of all: uint8 [n, bundle]. ValueError if they are not what was written."""
        place, last = self.layers[layer].images[image], self.intermediate if last is None else last
        bundles = torch.empty(last - first, place.bundle, dtype=torch.uint8)
        with open(self.neurons, "rb") as stream:
            stream.seek(place.at + first * place.bundle)
            got = stream.readinto(bundles.numpy().data)
        if got != bundles.nbytes:
            raise self.damaged(f"{NEURONS} ends before layer {layer} does")
        wrong = (checksums(bundles) != self.checks[self.check_row(layer, image), first:last]).nonzero()
        if len(wrong):
            raise self.damaged(f"{NEURONS} has been changed (layer {layer}, neuron {first + int(wrong[0])})")
        return bundles

    def matrix(self, layer: int, name: str) -> Matrix:
        """A layer's "gate", "up" or "down", [I, H]. ValueError if the files are not what was written."""
        part: Part = getattr(self.layers[layer], name)
        return matrix_in(part, self._images(layer), self.hidden, self.shared(layer))

    def verify(self) -> None:
        """Reads all neurons. ValueError if they are not what was written."""
        for layer, files in enumerate(self.layers):
            for number, image in enumerate(files.images):
                step = max(1, _BLOCKS * _BLOCK // image.bundle)
                for first in range(0, self.intermediate, step):
                    self.read(layer, number, first, min(first + step, self.intermediate))
        done = 0
        with open(self.neurons, "rb") as stream:
            for rest in self.rest:
                stream.seek(rest.image.at)
                data = torch.frombuffer(bytearray(stream.read(rest.image.nbytes)), dtype=torch.uint8)
                wanted = self.rest_checks[done : done + rest.blocks]
                if data.numel() != rest.image.nbytes or not torch.equal(checksums(data.view(-1, rest.image.bundle)), wanted):
                    raise self.damaged(f"{NEURONS} has been changed (what comes after the neurons)")
                done += rest.blocks

    def damaged(self, what: str) -> ValueError:
        """What to raise where a file is not what it was."""
        return _damaged(self.folder, what)

    def _images(self, layer: int, last: int | None = None) -> list[torch.Tensor]:
        return [self.read(layer, image, 0, last) for image in range(len(self.layers[layer].images))]

    def _fingerprint(self, vocab: int) -> str:
        count = min(ROWS_TOLD, self.intermediate)
        gates = (matrix_in(files.gate, self._images(layer, count), self.hidden) for layer, files in enumerate(self.layers))
        return fingerprint_of(gates, len(self.layers), self.hidden, self.intermediate, vocab)


def fingerprint_of(gates: Iterable[Matrix], layers: int, hidden: int, intermediate: int, vocab: int) -> str:
    """Tells models apart, and is the same for one model in float32 and in bfloat16. gates: at most the first ROWS_TOLD rows of
    each layer's gate."""
    digest = hashlib.sha256(repr((layers, hidden, intermediate, vocab)).encode())
    for gate in gates:
        digest.update(gate.dense().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether a folder is one of tiers, and whole."""
    return (folder / MANIFEST).is_file()


def prepare(source: Source, out: Path, on_progress: Progress = None) -> TierFiles:
    """Makes a folder of tiers of a checkpoint, tensor by tensor: at no time are there more than one layer's MLP and one matrix in
    memory. What a call leaves that is stopped, whatever stops it, the next one goes on from: after the last layer that was whole,
    if it is the same checkpoint. In a folder that is whole all files are looked through, and made anew if they are damaged.

    FileExistsError if the folder holds anything else; OSError if the disk is full, or becomes so.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _check_folder(out, source.key)
        if is_prepared(out):
            try:
                files = TierFiles.open(out)
                files.verify()
                return files
            except ValueError:
                os.replace(out / MANIFEST, out / JOURNAL)  # so that the folder is known as one of ours at any time
        _Preparation(source, out, on_progress).run()
    return TierFiles.open(out)


class _Preparation:
    """Of one folder. A layer is written, and then noted in the journal; what is not noted is written again."""

    def __init__(self, source: Source, folder: Path, on_progress: Progress) -> None:
        config = source.config
        self._source, self._folder, self._on_progress = source, folder, on_progress
        self._layout = Layout.of(source)
        self._layers, self._intermediate = self._layout.layers, self._layout.intermediate
        self._names = [_names(config, layer) for layer in range(config.num_hidden_layers)]
        shared = (self._layout.fast.get(_shared_name(layer)) for layer in range(len(self._layers)))
        self._shared = [0 if each is None else each.nbytes for each in shared]
        self._in_fast = sorted(source.names - {name for names in self._names for name in names})
        self._journal = {"version": VERSION, "key": source.key, "done": 0}
        self._done = 0

    def run(self) -> None:
        self._resume()
        self._check_room()
        try:
            with contextlib.ExitStack() as stack:
                streams = [stack.enter_context(open(self._folder / name, "r+b")) for name in (NEURONS, CHECKS, _NOTES)]
                for layer in range(self._done, len(self._layers)):
                    self._write_layer(layer, *streams)
                    for stream in streams:
                        _sync(stream)
                    self._note(layer + 1)
            self._finish()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            how_far = f"after {self._done} of {len(self._layers)} layers; once there is room, another call goes on from there"
            raise OSError(error.errno, f"{error.strerror}, {how_far}", str(self._folder)) from error

    def _resume(self) -> None:
        """Finds out how many layers are done: none if the journal is of something else, or the files are shorter than it says."""
        (self._folder / FAST).unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads((self._folder / JOURNAL).read_text(encoding="utf-8"))
            done = said["done"]
            is_same = said == self._journal | {"done": done} and 0 < done <= len(self._layers)
            if is_same and all((self._folder / name).stat().st_size >= end for name, end in self._ends(done).items()):
                self._done = done
                return
        self._note(0)
        for name in (NEURONS, CHECKS, _NOTES):
            open(self._folder / name, "wb").close()

    def _ends(self, done: int) -> dict[str, int]:
        """How long the files are after so many layers. Of a layer the notes are the squares of down and its shared scales."""
        return {
            NEURONS: sum(image.nbytes for layer in self._layers[:done] for image in layer.images),
            CHECKS: 4 * self._intermediate * sum(len(layer.images) for layer in self._layers[:done]),
            _NOTES: 4 * self._intermediate * done + sum(self._shared[:done]),
        }

    def _note(self, done: int) -> None:
        self._done = done
        _write_json(self._folder / JOURNAL, self._journal | {"done": done})

    def _check_room(self) -> None:
        """Before it takes an hour."""
        whole = self._ends(len(self._layers))
        needed = sum(max(0, end - (self._folder / name).stat().st_size) for name, end in whole.items())
        copies = 2 if self._source.weights == "plain" else 1
        needed += copies * sum(map(self._source.nbytes, self._in_fast)) + whole[_NOTES]
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            how_much = f"{in_bytes(needed)} more are needed, {in_bytes(free)} are free"
            raise OSError(errno.ENOSPC, f"no room on the disk: {how_much}", str(self._folder))

    def _write_layer(self, layer: int, neurons: BinaryIO, checks: BinaryIO, notes: BinaryIO) -> None:
        files, (*first, last) = self._layers[layer], self._names[layer]
        images = [torch.zeros(self._intermediate, image.bundle, dtype=torch.uint8) for image in files.images]
        for name, parts in zip(first, [files.parts[:2]] if len(first) == 1 else [(files.gate,), (files.up,)]):
            self._put(name, parts, images)
        shared = self._put(last, (files.down,), images)
        squares = _squares(matrix_in(files.down, images, self._layout.hidden, shared))

        ends = self._ends(layer)
        for image, data in zip(files.images, images):
            neurons.seek(image.at)
            neurons.write(data.numpy().data)
            neurons.write(bytes(image.nbytes - data.nbytes))
        checks.seek(ends[CHECKS])
        checks.write(torch.cat([checksums(data) for data in images]).numpy().data)
        notes.seek(ends[_NOTES])
        notes.write(squares.numpy().data)
        if shared is not None:
            notes.write(shared.numpy().data)
        self._progress(sum(map(len, self._names[: layer + 1])))

    def _put(self, name: str, parts: Sequence[Part], images: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """A tensor of the checkpoint into its places in a layer's images. It is one matrix, or several, one after the other.
        Returns the scales that rows have together."""
        tensor = self._source.read(name)
        if isinstance(tensor, torch.Tensor):
            tensor = Matrix(tensor.t() if is_down(name) else tensor)
        for part, begin in zip(parts, range(0, tensor.rows, self._intermediate), strict=True):
            rows = tensor.take(slice(begin, begin + self._intermediate)) if len(parts) > 1 else tensor
            assert rows.format == part.format and rows.rows == self._intermediate
            place = matrix_in(part, images, self._layout.hidden)
            if part.format == Format.Q8:
                place.upper.copy_(rows.upper)
                place.lower.copy_(rows.lower)
            else:
                place.data.copy_(rows.data)
        return tensor.shared

    def _finish(self) -> None:
        """All that is not in the images."""
        layers = len(self._layers)
        of_layers = sum(map(len, self._names))
        shared = {_shared_name(layer): layer for layer in range(layers) if self._shared[layer]}

        def note(layer: int, at: int, count: int, dtype: torch.dtype) -> torch.Tensor:
            with open(self._folder / _NOTES, "rb") as stream:
                stream.seek(self._ends(layer)[_NOTES] + at)
                return torch.frombuffer(bytearray(stream.read(count)), dtype=dtype)

        def read(name: str) -> torch.Tensor | Matrix:
            if name == _SQUARES:
                return torch.stack([note(layer, 0, 4 * self._intermediate, torch.float32) for layer in range(layers)])
            if name in shared:
                return note(shared[name], 4 * self._intermediate, self._shared[shared[name]], torch.uint8)
            return self._source.read(name)

        names = [*self._in_fast, _SQUARES, *shared]
        save(self._folder / FAST, names, read, lambda _, done: self._progress(of_layers + done))
        self._write_rest()
        written = [NEURONS, CHECKS, FAST, *self._copy_settings()]
        checks, rest_checks = _read_checks(self._folder, self._intermediate, sum(len(each.images) for each in self._layers))
        layout = {field.name: getattr(self._layout, field.name) for field in dataclasses.fields(Layout)}
        none = torch.empty(0, dtype=torch.int32)  # FAST is not read from here
        files = TierFiles(**layout, folder=self._folder, checks=checks, rest_checks=rest_checks, fast_checks=none, fingerprint="")
        said = {
            "version": VERSION,
            "key": self._source.key,
            "weights": files.weights,
            "dtype": str(files.dtype).removeprefix("torch."),
            "hidden": files.hidden,
            "intermediate": files.intermediate,
            "formats": [[part.format.name for part in layer.parts] for layer in files.layers],
            "rest": [(dataclasses.astuple(each.image), each.tensors) for each in files.rest],
            "fingerprint": files._fingerprint(self._source.config.vocab_size),
            "files": {
                name: {
                    "size": (self._folder / name).stat().st_size,
                    "crc": None if name == NEURONS else _crc_of(self._folder / name),
                }
                for name in written
            },
        }
        _write_json(self._folder / MANIFEST, said | {"crc": _crc_of(said)})
        for name in (JOURNAL, _NOTES):
            (self._folder / name).unlink()

    def _write_rest(self) -> None:
        """Of plain weights, attention and head once more."""
        if not self._layout.rest:
            return
        ends = self._ends(len(self._layers))
        with open(self._folder / NEURONS, "r+b") as neurons, open(self._folder / CHECKS, "r+b") as checks:
            checks.seek(ends[CHECKS])
            for image, tensors in self._rest_tensors():
                padded = torch.zeros(image.nbytes, dtype=torch.uint8)
                for start, tensor in tensors:
                    padded[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
                neurons.seek(image.at)
                neurons.write(padded.numpy().data)
                checks.write(checksums(padded.view(-1, BLOCK)).numpy().data)
            for stream in (neurons, checks):
                stream.truncate()
                _sync(stream)

    def _rest_tensors(self) -> Iterator[tuple[Image, list[tuple[int, torch.Tensor]]]]:
        """What belongs into each image, and where in it."""
        attention, head = self._layout.rest[: len(self._layers)], self._layout.rest[len(self._layers) :]
        for each in attention:
            yield each.image, [(at, self._plain(name)) for name, (at, _) in each.tensors.items()]
        whole, first = self._plain(_head_name(self._source)), 0
        for each in head:
            ((at, (rows, _)),) = each.tensors.values()
            yield each.image, [(at, whole[first : first + rows])]
            first += rows

    def _plain(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _copy_settings(self) -> list[str]:
        """The config, and what else there is of generation and tokenizer. Returns the files' names."""
        for name in _settings(self._folder) - {JOURNAL}:  # of another model, which was begun here before
            (self._folder / name).unlink()
        config = copy.deepcopy(self._source.config)
        config.dtype = self._source.dtype
        config.save_pretrained(self._folder)
        found = sorted(_settings(self._source.folder) - {"config.json"})
        for name in found:
            (self._folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._source.folder / name, self._folder / name)
        names = ["config.json", *found]
        for name in names:
            with open(self._folder / name, "rb") as stream:
                os.fsync(stream.fileno())
        return names

    def _progress(self, done: int) -> None:
        if self._on_progress:
            shared = sum(size > 0 for size in self._shared)
            self._on_progress(sum(map(len, self._names)) + len(self._in_fast) + 1 + shared, done)


def _names(config: Any, layer: int) -> list[str]:
    """The tensors of a layer's MLP: gate and up, or both in one, and down."""
    parts = check_supported(config).projections
    return [f"model.layers.{layer}.{name}.weight" for name in parts if name.startswith("mlp.")]


def _settings(folder: Path) -> set[str]:
    """The files of a model that are neither weights nor say where these are."""
    files = (file for pattern in _SETTINGS for file in folder.glob(pattern))
    return {str(file.relative_to(folder)) for file in files if not file.name.endswith((".index.json", CONVERTED))}


def _shared_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.shared"


def _layout(formats: Sequence[Sequence[Format]], hidden: int, intermediate: int) -> tuple[list[LayerFiles], int]:
    """Where everything is, and how many bytes that makes. formats: of gate, up and down in every layer."""
    layers, at = [], 0
    for forms in formats:
        parts, upper, lower = [], 0, 0
        for form in forms:
            parts.append(Part(form, upper, lower if form == Format.Q8 else None))
            upper = _next(upper + form.row_bytes(hidden), _ROW)
            lower += q8.GROUP_BYTES * q8.groups(hidden) if form == Format.Q8 else 0
        images = []
        for size in filter(None, (upper, lower)):
            bundle = _next(size, _BUNDLE)
            images.append(Image(at, bundle, _next(bundle * intermediate, PAGE)))
            at += images[-1].nbytes
        layers.append(LayerFiles(tuple(images), *parts))
    return layers, at


def _rest_of(source: Source, at: int) -> list[Rest]:
    """Of plain weights what is in the file once more, attention and head. at: where the neurons end in it."""
    if source.weights != "plain":
        return []
    projections = [name for name in check_supported(source.config).projections if name.startswith("self_attn.")]
    contents = [
        {name: tuple(source.shape(name)) for name in (f"model.layers.{layer}.{each}.weight" for each in projections)}
        for layer in range(source.config.num_hidden_layers)
    ]
    head = _head_name(source)
    rows, cols = source.shape(head)
    step = rows_together(cols * source.dtype.itemsize)
    contents += [{head: (min(step, rows - first), cols)} for first in range(0, rows, step)]
    found = []
    for shapes in contents:
        tensors, end = {}, 0
        for name, (rows, cols) in shapes.items():
            tensors[name] = (end, (rows, cols))
            end += rows * cols * source.dtype.itemsize
        found.append(Rest(Image(at, BLOCK, _next(end, BLOCK)), tensors))
        at += found[-1].image.nbytes
    return found


def _head_name(source: Source) -> str:
    """Of the tensor that is the LM head: its own, or the embedding."""
    return _HEAD if _HEAD in source.names else EMBEDDING


def _rows(name: str, shape: Sequence[int]) -> int:
    """Of a matrix, packed or not."""
    return shape[-2] if name.endswith(".weight") and len(shape) > 1 else 0


def _packed_format(source: Source, name: str) -> Format | None:
    return source.format(name) if source.weights != "plain" and name in source.matrices else None


def _next(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def matrix_in(part: Part, images: Sequence[torch.Tensor], hidden: int, shared: torch.Tensor | None = None) -> Matrix:
    """A matrix in a layer's images, uint8 [n, bundle] each: a view. shared: the layer's scales, of use to what has such."""
    data = images[0][:, part.at : part.at + part.format.row_bytes(hidden)]
    if part.format.dtype is not None:
        return Matrix(data.view(part.format.dtype))
    if part.lower_at is None:
        return Matrix(data, (part.format, hidden), shared if part.format.across else None)
    lower = images[1][:, part.lower_at : part.lower_at + q8.GROUP_BYTES * q8.groups(hidden)]
    return Matrix(data, (part.format, hidden), apart=lower)


def _squares(down: Matrix) -> torch.Tensor:
    """||down_i||_2^2: float32 [I]."""
    found = []
    for first in range(0, down.rows, _SOME_ROWS):
        rows = slice(first, min(first + _SOME_ROWS, down.rows))
        if down.shared is None:
            some = down.take(rows)
        else:
            ends = (q4.shared_bytes(row, down.cols, down.format.supers) for row in (rows.start, rows.stop))
            some = Matrix(down.data[rows], down.packed, down.shared[slice(*ends)])
        found.append(some.dense().square().sum(-1))
    return torch.cat(found)


# ---------------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; others wait."""
    with opened(folder) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _check_folder(folder: Path, key: str) -> None:
    """FileExistsError if there is anything in it but what an earlier call has made: of something else, if that was stopped."""
    names = sorted(set(os.listdir(folder)) - {JOURNAL + _UNFINISHED})
    if not names or JOURNAL in names and MANIFEST not in names:
        return
    if MANIFEST not in names:
        raise _other_folder(folder, names[0])
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["key"]
    except (ValueError, KeyError, TypeError):
        return  # it is damaged
    if found != key:
        raise _other_folder(folder, "another model, or this one in another form or from other files")


def _other_folder(folder: Path, what: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"expected a new folder or an empty one, but it has {what}", str(folder))


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = said["version"]
    except FileNotFoundError as error:
        raise ValueError(f"model: {folder} has no {MANIFEST}: it was not prepared, or only in part") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{MANIFEST} has been changed") from error
    if version != VERSION:
        raise _damaged(folder, f"{MANIFEST} is of version {version}, expected {VERSION}")
    crc = said.pop("crc", None)
    if _crc_of(said) != crc:
        raise _damaged(folder, f"{MANIFEST} has been changed")
    checked: dict[str, Any] = said
    return checked


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"model: {folder}: {what}; prepare it again: sirius prepare MODEL --out {folder}")


def _read_checks(folder: Path, intermediate: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the neurons, and of the rest."""
    checks = torch.frombuffer(bytearray((folder / CHECKS).read_bytes()), dtype=torch.int32)
    return checks[: images * intermediate].view(-1, intermediate), checks[images * intermediate :]


def rows_together(row: int, block: int = BLOCK) -> int:
    """Rows of the LM head that are in one image, by the bytes of a row: whole blocks of about the size of a layer."""
    grain = block // math.gcd(block, row)
    return max(1, _PART // (row * grain)) * grain


def _places(file: CheckedFile) -> tuple[dict[str, Place], dict[str, Format]]:
    """Where the tensors of FAST are, and the formats of those that are packed."""
    return places(lambda at, size: file.read([at], size).numpy().tobytes())


def _crc_of(what: Path | dict[str, Any], also: Callable[[torch.Tensor], None] | None = None) -> str:
    """CRC-32C of the CRC-32C of every block of a file, or of the bytes of something that is to be in one. also: gets all of these
    bytes, uint8, part after part; each has whole blocks (`block_sums`) but the last."""
    buffer = torch.empty(_BLOCKS * _BLOCK, dtype=torch.uint8)
    sums = []
    with io.BytesIO(json.dumps(what, sort_keys=True).encode()) if isinstance(what, dict) else open(what, "rb") as stream:
        while size := stream.readinto(buffer.numpy().data):
            whole = size // _BLOCK * _BLOCK
            sums += [checksums(buffer[:whole].view(-1, _BLOCK)), checksums(buffer[None, whole:size])]
            if also:
                also(buffer[:size])
    return f"{int(checksums(torch.cat(sums).view(torch.uint8)[None])) & 0xFFFFFFFF:08x}"


def _write_json(file: Path, value: object) -> None:
    """In one step."""
    fresh = file.with_name(file.name + _UNFINISHED)
    with open(fresh, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        _sync(stream)
    os.replace(fresh, file)
    handle = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def in_bytes(number: int) -> str:
    """A size, for people."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
