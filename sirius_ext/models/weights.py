"""The weights of a loaded `transformers` model, checked and laid out as the kernels read them; nothing is stored twice."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.activations import ACT2FN

from ..kernels import products, q8
from ..kernels.dispatch import check_device
from ..kernels.matrix import Format, Matrix
from ..kernels.ops import DTYPES
from .device_tiers import free_on
from .families import Family, check_supported, describe
from .tier_files import ROWS_TOLD, fingerprint_of
from .tiers import Tiers, beside_weights


@dataclasses.dataclass(frozen=True)
class Projection:
    """A matrix [rows, cols] with a bias, T [rows], or None."""

    weight: Matrix
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T + bias`, of many rows. x: T [m, cols]. Returns T [m, rows]."""
        return products.dot(x, self.weight, self.bias)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer; H hidden, I intermediate, D head size. A norm is None where the family has none."""

    before_attention: torch.Tensor  # [H]; so are the next three
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor | None
    q_norm: torch.Tensor | None  # [D], of every head
    k_norm: torch.Tensor | None
    qkv: tuple[Projection, ...]  # q [heads * D, H], k and v [kv_heads * D, H]; their outputs stand side by side
    output: Projection  # [H, heads * D]
    gate: Matrix  # [I, H]
    up: Matrix  # [I, H]
    down: Matrix  # [I, H]: down_proj transposed
    window: int  # tokens that attention sees, 0: all
    rope: int  # which table of angles, -1: none

    def in_four_bits(self) -> Layer:
        """As `Matrix.in_four_bits` has its matrices."""
        return Layer(**{field.name: _in_four_bits(getattr(self, field.name)) for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True)
class View:
    """The matrices that a pass reads: F's are the model's own, S's may have fewer bits."""

    layers: list[Layer]
    lm_head: Matrix

    @functools.cached_property
    def mlp_bytes(self) -> int:
        """Of gate, up and down in all layers."""
        return sum(part.nbytes for layer in self.layers for part in (layer.gate, layer.up, layer.down))

    @functools.cached_property
    def bytes(self) -> int:
        """Of everything that a pass may read, but for the embedding."""
        return self.lm_head.nbytes + sum(
            _nbytes(part) for layer in self.layers for part in (getattr(layer, field.name) for field in dataclasses.fields(layer))
        )


# What the extension knows of a layer, and of a `Description`, by the same names.
_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q_norm", "k_norm")
_SIZES = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "rotary_dim")
_FACTORS = ("embedding_scale", "residual_scale", "attention_scale", "attention_softcap", "logit_scale", "logit_softcap")
_DESCRIBED = (*_SIZES, "activation", *_FACTORS)


class Weights:
    """The tensors of a `transformers` causal language model of a supported family, which it goes on sharing with the model.

    Every matrix is stored neuron by neuron. `down_proj` is the one that is not: its storage is transposed in place of the
    original, and the model's own parameter becomes a view of it, so the model works as before; `restore` undoes that.

    description: what the family and the config make of the decoder.
    ropes: inverse frequencies, float32 [rotary_dim / 2], and the factor of cosines and sines, of each table of angles.
    copy_memory: bytes that a copy in four bits may take if nobody asks for one by name; None: what is free, but for caches.
    ValueError if the model is not supported, not all on one device that this build has kernels for, or not of one dtype.
    """

    def __init__(self, model: Any) -> None:
        family = check_supported(getattr(model, "config", None))
        _check_modules(model, family)
        self.description, ropes = describe(model)
        self.vocab = model.lm_head.out_features
        body = model.model
        self.dtype, self.device = body.norm.weight.dtype, body.norm.weight.device
        self._check_placement(model)

        self.tiers: Tiers | None = getattr(model, "tiers", None)  # where the MLPs are, if not all are in memory
        if self.tiers is None and getattr(model, "tier_files", None) is not None:
            raise ValueError(
                f"model: {model.tier_files.folder} holds a model whose MLPs stay on the disk as far as memory is short; load it "
                'by Engine.from_pretrained with offload="auto", or load the model that it was prepared from'
            )
        streamed = self.tiers and self.tiers.embedding
        self.embedding = streamed or _matrix(body.embed_tokens, self.vocab, self.description.hidden)
        self.final_norm = _plain(body.norm.weight)
        self.ropes = [(frequencies.to(self.device), factor) for frequencies, factor in ropes]
        self.full = View(
            [self._layer(layer, index) for index, layer in enumerate(body.layers)],
            (self.tiers and self.tiers.head) or self._head_of(model),
        )
        if (where := self.layers[0].gate.device) != self.device:
            raise ValueError(
                f"model: its MLPs' weights are on {where}, for which memory was divided, and everything else on {self.device}; "
                f"load it for {self.device}"
            )
        self._addresses, self._numbers = _addresses(model), _numbers(model, family)
        self.copy_memory: int | None = getattr(model, "copy_memory", None)
        self._beside = beside_weights(model)
        self._settling = threading.Lock()  # two texts must not decide at a time: the first one's copy is no longer free
        self._settled: bool | None = None

    def _head_of(self, model: Any) -> Matrix:
        if model.lm_head.weight is model.model.embed_tokens.weight:
            return self.embedding
        return _matrix(model.lm_head, self.vocab, self.description.hidden)

    @property
    def layers(self) -> list[Layer]:
        """F's."""
        return self.full.layers

    @property
    def lm_head(self) -> Matrix:
        """F's."""
        return self.full.lm_head

    @property
    def streams(self) -> bool:
        """Whether a pass of F reads a part of them from a disk."""
        return self.tiers is not None and self.tiers.plan.streamed > 0

    @property
    def packed(self) -> bool:
        """Whether the matrices are bytes, of which S reads four bits a weight."""
        return not self.lm_head.plain

    @functools.cached_property
    def form(self) -> str:
        """In which form F reads its matrices: "q8" or "q4" of packed ones, else the name of their dtype. Some of "q4" may have
        eight bits."""
        if not self.packed:
            return str(self.dtype).removeprefix("torch.")
        matrices = itertools.chain.from_iterable(map(_matrices, self.layers))
        return "q4" if any(matrix.format.four_bits for matrix in matrices) else "q8"

    @functools.cached_property
    def four_bits(self) -> View:
        """What S reads of its weights if it is to read four bits of each: of matrices in eight bits their upper halves and of
        four themselves, which takes no memory; of plain ones copies."""
        return self.in_four_bits()

    @property
    def leave_no_choice(self) -> bool:
        """Whether what S reads of them by "auto" does not depend on how much memory is free: they are packed, or memory was
        divided for it."""
        return self.packed or self.tiers is not None

    @property
    def has_copy(self) -> bool:
        """Whether there is a copy of plain weights in four bits."""
        return not self.packed and "four_bits" in vars(self)

    @functools.cached_property
    def copy_bytes(self) -> int:
        """Of a copy in four bits: of all matrices but the embedding."""
        parts = itertools.chain([self.lm_head], *map(_matrices, self.layers))
        return sum(part.rows * q8.row_bytes(part.cols) for part in parts)

    def copy_is_due(self, draft_weights: str) -> bool:
        """Whether S, by this setting (`SiriusConfig.draft_weights`), is to read a copy in four bits that is not there yet."""
        if draft_weights == "same" or self.packed or self.has_copy:
            return False
        if self.tiers is not None:
            return self.tiers.plan.copy > 0
        return draft_weights == "q4" or (self._settled is None and self._has_room)

    def make_copy(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Make `four_bits` if it is not there. on_progress: as `in_four_bits`, whose errors are these."""
        if "four_bits" not in vars(self):
            try:
                self.four_bits = self.in_four_bits(on_progress)
            except ValueError as error:
                raise ValueError(f"draft_weights: four bits cannot hold this model's weights: {error}") from error

    def settle(self, on_progress: Callable[[int, int], None] | None = None) -> bool:
        """Whether S reads four bits of every weight if nobody says what it reads (`draft_weights="auto"`): of packed weights, and
        of plain ones if there is room for a copy. The first call decides it for as long as these weights last, since a text must
        not depend on what else has taken memory or freed it meanwhile, and makes the copy. on_progress: as `in_four_bits`.

        Memory that was divided (`tiers`) has room for a copy or has not; that it cannot be made is an error there. Elsewhere S
        then reads what F reads."""
        with self._settling:
            if self._settled is None:
                self._settled = self._decided(on_progress)
            return self._settled

    def _decided(self, on_progress: Callable[[int, int], None] | None) -> bool:
        if self.packed or self.has_copy:
            return True
        if self.tiers is not None:
            if self.tiers.plan.copy:
                self.make_copy(on_progress)
            return self.tiers.plan.copy > 0
        if not self._has_room:
            return False
        try:
            self.make_copy(on_progress)
        except (torch.OutOfMemoryError, MemoryError, ValueError):  # the last one of numbers that four bits cannot hold
            return False
        return True

    @property
    def _has_room(self) -> bool:
        if self.copy_memory is not None:
            return self.copy_bytes <= self.copy_memory
        return self.copy_bytes + self._beside <= free_on(self.device)

    def in_four_bits(self, on_progress: Callable[[int, int], None] | None = None) -> View:
        """What `four_bits` is, made anew. on_progress: told how many layers there are, and how many are done.

        torch.OutOfMemoryError, or MemoryError, if there is no memory for it; ValueError for plain weights that are not finite, or
        too large."""
        layers: list[Layer] = []
        for layer in self.layers if self.packed else self.each_layer():
            layers.append(layer.in_four_bits())
            if on_progress:
                on_progress(len(self.layers), len(layers))
        if self.packed:
            return View(layers, self.lm_head.in_four_bits())
        parts = (part.in_four_bits() for part in self.each_part_of_head())
        return View(layers, Matrix.of_parts(parts, self.full.lm_head.rows))

    def view(self, four_bits: bool) -> View:
        return self.four_bits if four_bits else self.full

    def each_layer(self, four_bits: bool = False) -> Iterator[Layer]:
        """The layers of a view, in order; all of each is in memory until the next one is asked for."""
        layers = self.view(four_bits).layers
        if self.tiers is None:
            yield from layers
        else:
            yield from (layers[index] for index in self.tiers.each(0, len(layers)))

    def each_part_of_head(self, four_bits: bool = False) -> Iterator[Matrix]:
        """The LM head of a view, all at once or some rows after the other; each part is in memory until the next is asked for."""
        head, layers = self.view(four_bits).lm_head, len(self.layers)
        step = 0 if four_bits or self.tiers is None else self.tiers.head_rows
        if not step or self.tiers is None:
            yield head
            return
        for index in self.tiers.each(layers, layers + -(-head.rows // step)):
            first = (index - layers) * step
            yield head.take(slice(first, first + step))

    def drafting(self, four_bits: bool) -> View:
        """What compiled passes of S read, of which all that they need is in memory once `Tiers.hold` was asked for it."""
        view = self.view(four_bits)
        if self.tiers is None or not self.tiers.are_placed(four_bits):
            return view
        places = (self.tiers.placed(index) for index in range(len(view.layers)))
        layers = [dataclasses.replace(layer, gate=gate, up=up, down=down) for layer, (gate, up, down) in zip(view.layers, places)]
        return View(layers, view.lm_head)

    def _layer(self, layer: Any, index: int) -> Layer:
        d = self.description
        family = d.family

        def norm(name: str | None) -> torch.Tensor | None:
            return None if name is None else _plain(layer.get_submodule(name).weight)

        def projection(name: str) -> Projection:
            linear = layer.get_submodule(name)
            streamed = self.tiers and self.tiers.projection(index, f"model.layers.{index}.{name}.weight", linear.in_features)
            matrix = streamed or _matrix(linear, linear.out_features, linear.in_features)
            return Projection(matrix, None if linear.bias is None else _plain(linear.bias))

        if family.fused:
            qkv = _split(projection("self_attn.qkv_proj"), d.heads * d.head_dim, d.kv_heads * d.head_dim)
        else:
            qkv = tuple(projection(f"self_attn.{name}_proj") for name in "qkv")
        if self.tiers is not None:
            gate, up, down = self.tiers.matrices(index)
        else:
            if family.fused:
                both = projection("mlp.gate_up_proj").weight
                gate, up = both.take(slice(0, d.intermediate)), both.take(slice(d.intermediate, None))
            else:
                gate, up = projection("mlp.gate_proj").weight, projection("mlp.up_proj").weight
            down = _transposed(layer.mlp.down_proj, d.intermediate, d.hidden)
        before_attention, before_mlp = norm(family.before_attention), norm(family.before_mlp)
        assert before_attention is not None and before_mlp is not None
        return Layer(
            before_attention=before_attention,
            after_attention=norm(family.after_attention),
            before_mlp=before_mlp,
            after_mlp=norm(family.after_mlp),
            q_norm=norm("self_attn.q_norm" if family.head_norms else None),
            k_norm=norm("self_attn.k_norm" if family.head_norms else None),
            qkv=qkv,
            output=projection("self_attn.o_proj"),
            gate=gate,
            up=up,
            down=down,
            window=d.windows[index],
            rope=d.ropes[index],
        )

    def _check_placement(self, model: nn.Module) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model: expected float32, float16 or bfloat16 weights, got {self.dtype}")
        check_device("model", self.device)
        for name, parameter in model.named_parameters():
            if parameter.device != self.device:
                raise ValueError(
                    f"model: expected every weight on {self.device}, as the last norm is, but {name} is on {parameter.device}"
                )
            if parameter.dtype not in (self.dtype, torch.uint8):
                raise ValueError(f"model: expected one dtype, but {name} is {parameter.dtype} and the last norm {self.dtype}")

    @property
    def context(self) -> int:
        """Tokens that a text may have."""
        return self.description.context

    @property
    def hidden(self) -> int:
        return self.description.hidden

    @property
    def intermediate(self) -> int:
        return self.description.intermediate

    @property
    def heads(self) -> int:
        return self.description.heads

    @property
    def kv_heads(self) -> int:
        return self.description.kv_heads

    @property
    def head_dim(self) -> int:
        return self.description.head_dim

    @property
    def num_parameters(self) -> int:
        """All parameters, the embedding included, tied ones counted once."""
        total = self.final_norm.numel() + self.embedding.shape.numel()
        if self.embedding.data.data_ptr() != self.lm_head.data.data_ptr():
            total += self.lm_head.shape.numel()
        for layer in self.layers:
            for field in dataclasses.fields(layer):
                value = getattr(layer, field.name)
                for each in value if isinstance(value, tuple) else (value,):
                    total += _numel(each)
        return total

    @property
    def num_mlp_parameters(self) -> int:
        return 3 * self.intermediate * self.hidden * len(self.layers)

    @functools.cached_property
    def down_squares(self) -> torch.Tensor:
        """||down_i||_2^2 of every neuron, float32 [layers, I]: what a sparse model that follows the text weighs it by."""
        if self.tiers is not None:
            return self.tiers.files.down_squares.to(self.device)
        return torch.stack([layer.down.dense().square().sum(-1) for layer in self.layers])

    @functools.cached_property
    def down_norms(self) -> torch.Tensor:
        """||down_i||_2 of every neuron, float32 [layers, I]: what the cascade weighs it by."""
        return self.down_squares.sqrt()

    def fingerprint(self) -> str:
        """Tells models apart, and is the same for one model in float32 and in bfloat16."""
        if self.tiers is not None:
            return self.tiers.files.fingerprint
        gates = (layer.gate.take(slice(0, ROWS_TOLD)) for layer in self.layers)
        return fingerprint_of(gates, len(self.layers), self.hidden, self.intermediate, self.vocab)

    @property
    def dtype_code(self) -> int:
        """The extension's name for the dtype."""
        return DTYPES[self.dtype]

    def embedding_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which rows of `embedding` are those of tokens, an integer tensor [t], until others are asked for: the tokens themselves
        unless rows are read from a disk. OSError if they cannot be had."""
        return tokens if self.tiers is None else self.tiers.rows_of(tokens)

    def arguments(self, view: View | None = None) -> dict[str, object]:
        """What the extension's `Model` is made of, that reads a view, or without one all that F reads: ModelWeights of
        csrc/params.h and, as `layers`, its LayerWeights."""
        d, is_full = self.description, view is None
        stream = self.tiers.address if is_full and self.tiers is not None else 0
        view = self.full if view is None else view

        def norm(weight: torch.Tensor | None) -> dict[str, object]:
            return {"weight": 0 if weight is None else weight.data_ptr(), "eps": d.eps, "offset": d.norm_offset}

        def projection(part: Projection) -> dict[str, object]:
            return {"weight": part.weight.raw, "bias": 0 if part.bias is None else part.bias.data_ptr()}

        layers = [
            {
                **{name: norm(getattr(layer, name)) for name in _NORMS},
                **{name: getattr(layer, name).raw for name in ("gate", "up", "down")},
                "qkv": [projection(part) for part in layer.qkv],
                "output": projection(layer.output),
                "window": layer.window,
                "rope": layer.rope,
            }
            for layer in view.layers
        ]
        return {
            **{name: getattr(d, name) for name in _DESCRIBED},
            "intermediate": view.layers[0].gate.rows,  # fewer where only some neurons have a place
            "dtype": self.dtype_code,
            "embedding": self.embedding.raw,
            "final_norm": norm(self.final_norm),
            "lm_head": view.lm_head.raw,
            "vocab": self.vocab,
            "layers": layers,
            "stream": stream,
            "head_rows": self.tiers.head_rows if is_full and self.tiers is not None else 0,
        }

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions, an integer tensor [t]: float32 [tables, t, rotary_dim / 2] each."""
        places = positions.float()[:, None]
        angles = [places * frequencies for frequencies, _ in self.ropes]
        factors = [factor for _, factor in self.ropes]
        cos = torch.stack([each.cos() * factor for each, factor in zip(angles, factors)])
        return cos, torch.stack([each.sin() * factor for each, factor in zip(angles, factors)])

    @property
    def have_moved(self) -> bool:
        """Whether a tensor that the kernels were told of has memory elsewhere by now, as after `model.share_memory()`. What is
        moved otherwise (`model.to(...)`) has new tensors, and these stay."""
        return self.final_norm.data_ptr() != self._addresses["model.norm.weight"]

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model still uses these very tensors (it does not after `model.to(...)`, say), and computes with them what
        it did: its angles, scales, epsilons and activations are what they were. ValueError if it is not supported any more."""
        if _addresses(model) != self._addresses or any(getattr(module, name) != was for module, name, was in self._numbers):
            return False
        description, ropes = describe(model)
        return description == self.description and all(
            factor == own_factor and torch.equal(frequencies.to(self.device), own)
            for (frequencies, factor), (own, own_factor) in zip(ropes, self.ropes)
        )


def _matrices(layer: Layer) -> Iterator[Matrix]:
    yield from (layer.gate, layer.up, layer.down, layer.output.weight)
    yield from (part.weight for part in layer.qkv)


def _in_four_bits(part: Any) -> Any:
    """Of a field of `Layer`."""
    if isinstance(part, Matrix):
        return part.in_four_bits()
    if isinstance(part, Projection):
        return Projection(part.weight.in_four_bits(), part.bias)
    return tuple(map(_in_four_bits, part)) if isinstance(part, tuple) else part


def _numel(part: Projection | Matrix | torch.Tensor | int | None) -> int:
    """Parameters of a field of `Layer`."""
    if isinstance(part, Projection):
        return _numel(part.weight) + _numel(part.bias)
    if isinstance(part, Matrix):
        return part.shape.numel()
    return part.numel() if isinstance(part, torch.Tensor) else 0


def _nbytes(part: object) -> int:
    """What a pass reads of a field of `Layer`."""
    if isinstance(part, tuple):
        return sum(map(_nbytes, part))
    if isinstance(part, Projection):
        return _nbytes(part.weight) + _nbytes(part.bias)
    return part.nbytes if isinstance(part, (Matrix, torch.Tensor)) else 0


def restore(model: Any) -> None:
    """Give `down_proj` its own layout back; values, shapes and strides are then what they were before `Weights(model)`."""
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        if weight.dtype != torch.uint8:
            weight.data = weight.data.contiguous()


def _matrix(module: Any, rows: int, cols: int) -> Matrix:
    """A module's weight [rows, cols], which may be packed (`models.packed`)."""
    data = _plain(module.weight)
    form: Format | None = getattr(module, "packed_format", None)
    if form is None:
        return Matrix(data)
    return Matrix.of_bytes(data, form, rows, cols)


def _transposed(module: Any, intermediate: int, hidden: int) -> Matrix:
    """down_proj, neuron by neuron: [I, H]."""
    parameter = module.weight
    if parameter.dtype == torch.uint8:  # it is packed that way
        return _matrix(module, intermediate, hidden)
    if not parameter.data.t().is_contiguous():
        parameter.data = parameter.data.t().contiguous().t()
    return Matrix(parameter.data.t())


def _plain(parameter: nn.Parameter) -> torch.Tensor:
    if not parameter.data.is_contiguous():
        parameter.data = parameter.data.contiguous()
    return parameter.data


def _split(qkv: Projection, q_rows: int, kv_rows: int) -> tuple[Projection, ...]:
    """q, k and v out of one matrix; nothing is copied."""
    ends = (0, q_rows, q_rows + kv_rows, q_rows + 2 * kv_rows)
    rows = [slice(start, stop) for start, stop in zip(ends, ends[1:])]
    return tuple(Projection(qkv.weight.take(each), None if qkv.bias is None else qkv.bias[each]) for each in rows)


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def _numbers(model: Any, family: Family) -> list[tuple[Any, str, object]]:
    """What modules compute with besides weights and angles: module, attribute and what it is."""
    norms = [layer.get_submodule(name) for layer in model.model.layers for name in family.norms]
    found = [(norm, _epsilon_name(norm)) for norm in (model.model.norm, *norms)]
    for layer in model.model.layers:
        found += [(layer.self_attn, "scaling"), (layer.mlp, _activation_name(layer.mlp))]
    return [(module, name, getattr(module, name)) for module, name in found]


def _activation_name(mlp: Any) -> str:
    return "activation_fn" if hasattr(mlp, "activation_fn") else "act_fn"


def _epsilon_name(norm: Any) -> str:
    return "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"


def _check_modules(model: Any, family: Family) -> None:
    """ValueError unless this is a causal language model of the family's parts and no others. Changes nothing."""
    if not isinstance(getattr(model, "lm_head", None), nn.Module):
        raise ValueError(f"model: expected a causal language model with an lm_head, got {type(model).__name__}")
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            adapter = f"{type(module).__name__} of peft"
            raise ValueError(f"model: {name} is an adapter ({adapter}); merge it first, with merge_and_unload")
    embedding = model.model.embed_tokens
    if type(embedding).__name__ != family.embedding:
        wanted = "plain nn.Embedding" if family.embedding == "Embedding" else family.embedding
        raise ValueError(f"model: expected embed_tokens to be a {wanted}, got {type(embedding).__name__}")
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    _check_linear("lm_head", model.lm_head)
    for index, layer in enumerate(model.model.layers):
        for name in family.projections:
            _check_linear(name.rpartition(".")[2], layer.get_submodule(name))
            known |= {f"model.layers.{index}.{name}.{part}" for part in ("weight", "bias")}
        known |= {f"model.layers.{index}.{name}.weight" for name in family.norms}
        _check_numbers(model, family, layer, f"model.layers.{index}")
    _check_epsilon("model.norm", model.model.norm, model.config)
    if model.lm_head.bias is not None:
        raise ValueError("model: expected an lm_head without a bias, got one")
    # A weight that nothing here reads changes the model's answers, and would be left out in silence.
    for name, parameter in model.named_parameters():
        if name not in known:
            raise ValueError(f"model: it has a weight {name}, which models of this family do not have")
        # What torchao or DTensor make has the shape and dtype of a tensor, and no memory in which its numbers are.
        if type(parameter.data) is not torch.Tensor or parameter.layout != torch.strided:
            raise ValueError(
                f"model: expected {name} to be a plain tensor, got {type(parameter.data).__name__} ({parameter.layout}); load "
                "the model without quantization, sharding or sparse layouts"
            )


def _check_numbers(model: Any, family: Family, layer: Any, where: str) -> None:
    """ValueError unless a layer's modules compute what config and first layer say."""
    config = model.config
    activation = ACT2FN[getattr(config, family.activation)]
    name = _activation_name(layer.mlp)
    if type(own := getattr(layer.mlp, name)) is not type(activation):
        expected = type(activation).__name__
        raise ValueError(f"model: expected {where}.mlp.{name} to be a {expected}, as its config says, got a {type(own).__name__}")
    if layer.self_attn.scaling != (expected := model.model.layers[0].self_attn.scaling):
        raise ValueError(
            f"model: expected {where}.self_attn.scaling to be {expected}, as in layer 0, got {layer.self_attn.scaling}"
        )
    for name in family.norms:
        _check_epsilon(f"{where}.{name}", layer.get_submodule(name), config)


def _check_epsilon(name: str, norm: Any, config: Any) -> None:
    eps = getattr(norm, _epsilon_name(norm), None)
    if eps != config.rms_norm_eps:
        raise ValueError(f"model: expected {name} to have an epsilon of {config.rms_norm_eps}, as its config says, got {eps}")


def _check_linear(name: str, module: nn.Module) -> None:
    if type(module) is not nn.Linear:
        own = type(module)
        hint = " (torch.nn.utils.parametrize.remove_parametrizations makes it one)" if is_parametrized(module) else ""
        raise ValueError(f"model: expected {name} to be a plain nn.Linear, got {own.__name__} of {own.__module__}{hint}")
