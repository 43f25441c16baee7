"""A model ready to decode: its weights, one key/value cache that the full and the sparse model share, and the two passes."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Protocol

import torch

from .. import _C
from ..config import SiriusConfig
from ..decoding.period import Costs
from ..decoding.sparsity import CSparse, FSparse, Kind
from ..decoding.tree import Tree
from ..kernels import ops
from ..kernels.dispatch import is_cuda
from ..models.weights import Weights
from .layers import Attend, Neurons, attention, decoder_layer, embed, logits, norm

CACHE_GRAIN = 256  # slots; capacity grows in these steps and never shrinks
PREFILL_CHUNK = 512  # prompt tokens in a pass: bounds the activations, and the progress between two signs of life


class Observer(Protocol):
    """Who wants to know what happens inside a prefill."""

    def observe(self, layer: int, gates: torch.Tensor, z: torch.Tensor) -> None:
        """Some tokens of the text, in order: gates = silu(gate x) and z = gates * (up x), T [tokens, I]."""


class Model:
    """F and S over one cache. Slot i of the cache holds the token at position i, but for the branches of a tree.

    One text is decoded at a time; who decodes holds `lock`.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.device = weights, weights.device
        self.capacity = 0
        self.lock = threading.Lock()
        self.costs = Costs()
        self.alphas: dict[object, float] = {}  # how often S was right in the last text, by what it was and who judged
        self._rows = 0
        self._hidden = torch.zeros((), device=self.device)  # NaN where a query or key of a prefill was not finite
        self._z = torch.empty(0, dtype=weights.dtype, device=self.device)
        self._handle = self._extension().Model(**weights.arguments())

    def _extension(self) -> ModuleType:
        """Where the compiled passes are."""
        return _C

    def _grown(self, slots: int) -> int:
        """The capacity of a cache that must hold so many slots."""
        return -(-slots // CACHE_GRAIN) * CACHE_GRAIN

    def reserve(self, slots: int, rows: int) -> None:
        """Make room for a cache of `slots` and passes of up to `rows` tokens. A cache that must grow is emptied."""
        w = self.weights
        if slots > self.capacity:
            self.capacity = self._grown(slots)
            shape = (len(w.layers), w.kv_heads, self.capacity, w.head_dim)
            self.k_cache, self.v_cache = (torch.empty(shape, dtype=w.dtype, device=self.device) for _ in range(2))
            self.cos, self.sin = w.angles(torch.arange(self.capacity, device=self.device))
            self._rows = 0  # the workspace depends on the capacity
        if rows > self._rows:
            self._rows = rows
            self._make_room(rows)

    def _make_room(self, rows: int) -> None:
        """Memory for passes of up to so many rows, over a cache of the present capacity."""
        self._logits = torch.empty(rows, self.weights.vocab)
        self._argmax = torch.empty(rows, dtype=torch.int32)
        self._workspace = torch.empty(self._handle.workspace(rows, self.capacity), dtype=torch.uint8)

    def prefill(self, tokens: torch.Tensor, observer: Observer | None = None) -> torch.Tensor:
        """Run F over the prompt into the empty cache. Many rows are a library's work: torch, whose sums are ordered differently
        from the decode pass's.

        tokens: int64 [t], 1 <= t <= capacity.
        observer: sees every layer's gates.
        Returns the logits behind the last token, float32 [V]; they are not finite if a query or key of any token is not.
        """
        self._hidden = torch.zeros((), device=self.device)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            # Of the activations only what the last layer makes is kept.
            (x,) = collections.deque(self._layers(tokens[start : start + PREFILL_CHUNK], start, observer), maxlen=1)
        return self._head(self._last_norm(x)) + self._hidden

    def _layers(
        self,
        tokens: torch.Tensor,
        start: int,
        observer: Observer | None = None,
        sparsity: CSparse | FSparse | None = None,
    ) -> Iterator[torch.Tensor]:
        """Tokens, int64 [t], behind `start` others through F, or with a sparsity through S, in torch: their embeddings, then what
        each layer makes of them, T [t, H]."""
        w, end = self.weights, start + len(tokens)
        d, angles = w.description, (self.cos[:, start:end], self.sin[:, start:end])
        x = embed(w, tokens.to(self.device))
        yield x
        for index, layer in enumerate(w.layers):
            attend, neurons = self._attend(index, start), _neurons(index, observer, sparsity)
            x = decoder_layer(d, layer, x, angles, attend, neurons)
            yield x

    def _attend(self, index: int, start: int) -> Attend:
        """Attention of a layer for tokens from position `start` on, whose keys and values it keeps."""
        d, layer = self.weights.description, self.weights.layers[index]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            end = start + len(q)
            # Where scores are NaN or infinite, torch's attention may give numbers all the same. Zero times a number is zero, and
            # zero times what is none is NaN.
            self._hidden += 0 * (q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32))
            keys, values = self.k_cache[index], self.v_cache[index]
            keys[:, start:end], values[:, start:end] = k.transpose(0, 1), v.transpose(0, 1)
            return attention(d, layer, q, keys[:, :end], values[:, :end], start)

        return attend

    def _last_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last row, T [1, H]."""
        return norm(self.weights.description, x[-1:], self.weights.final_norm)

    def _head(self, normed: torch.Tensor) -> torch.Tensor:
        """The logits of one row, float32 [V]."""
        return logits(self.weights, normed)[0]

    def fault(self, tokens: torch.Tensor, start: int, sparsity: CSparse | FSparse | None = None) -> str | None:
        """Where the first values arise that are not finite, when tokens, int64 [t], are read once more behind the `start` ones
        before them, whose cache entries are finite. None if there are none in torch, which rounds differently."""
        layers, self._hidden = len(self.weights.layers), torch.zeros((), device=self.device)
        # S reads token by token, as it drafts: FSparse chooses for a pass.
        chunk = PREFILL_CHUNK if sparsity is None else 1
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            for count, x in enumerate(self._layers(part, start + begin, sparsity=sparsity)):
                # Later rows attend to what a layer makes of all rows, but behind the last layer only the last row goes on.
                goes_on = x if count < layers else x[-1:] if begin + chunk >= len(tokens) else x[:0]
                odd = ~goes_on.isfinite().all(-1)
                if count == 0 and bool(odd.any()):
                    return f"the embedding of token {int(part[odd.cpu()][0])}"
                if bool(odd.any()) or not bool(self._hidden.isfinite()):
                    return f"layer {count - 1} of {layers}"
        normed = self._last_norm(x)
        if not bool(normed.isfinite().all()):
            return "the final norm"
        return None if bool(self._head(normed).isfinite().all()) else "the LM head"

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        prefix: int,
        first_slot: int,
        sparsity: CSparse | FSparse | None = None,
        argmax: torch.Tensor | None = None,
        keep_z: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass of m tokens through F, or with a sparsity through S: one call into C++ over all layers. The caller owns the
        state and has reserved room for it: this is the hot path, so nothing is checked here.

        tokens, positions: int32 [m].
        mask: int64 [m, words] (`ops.tree_mask`); row i sees slots [0, prefix) and the slots prefix + b for the bits b of mask[i].
        first_slot: row i's key and value go to slot first_slot + i.
        argmax: int32 [m], where the argmax goes; without it to the model's own.
        keep_z: of a pass through F, what `follow` looks at.
        Returns logits float32 [m, V] and their argmax int32 [m], -1 where a logit is not finite; what is the model's own, later
        passes overwrite.
        """
        m = len(tokens)
        out, argmax = self._logits[:m], self._argmax[:m] if argmax is None else argmax
        self._handle.step(
            tokens=tokens.data_ptr(),
            positions=positions.data_ptr(),
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            max_position=self.capacity,
            mask=mask.data_ptr(),
            mask_words=mask.shape[1],
            k_cache=self.k_cache.data_ptr(),
            v_cache=self.v_cache.data_ptr(),
            sparsity=(Kind.DENSE, 0, 0, 0) if sparsity is None else sparsity.arguments(),
            logits=out.data_ptr(),
            argmax=argmax.data_ptr(),
            workspace=self._workspace.data_ptr(),
            z=self._kept_z(m).data_ptr() if keep_z else 0,
            num_rows=m,
            first_slot=first_slot,
            prefix=prefix,
            capacity=self.capacity,
            threads=torch.get_num_threads(),
        )
        return out, argmax

    def _kept_z(self, rows: int) -> torch.Tensor:
        """Where a pass of so many rows leaves silu(gate x) * (up x) of every layer: T [layers, rows, I]. Graphs know the place:
        it stays until the model is made ready for more rows."""
        layers, intermediate = len(self.weights.layers), self.weights.intermediate
        if self._z.numel() != layers * self._rows * intermediate:
            self._z = torch.empty(layers * self._rows * intermediate, dtype=self.weights.dtype, device=self.device)
        return self._z[: layers * rows * intermediate].view(layers, rows, intermediate)

    def follow(self, sparsity: CSparse, nodes: int, path: list[int]) -> None:
        """Let a set follow the text: of the last pass with `keep_z`, over so many nodes, the root and those of `path` joined the
        sequence."""
        sparsity.follow(self._kept_z(nodes), torch.tensor([0, *path], dtype=torch.int32))

    def replay(self, config: SiriusConfig, tree: Tree, sparsity: CSparse | FSparse | None) -> PeriodGraph | None:  # noqa: F821
        """What decodes a text without asking the host between its periods, for who can: a greedy rule's."""
        return None

    def keep(self, root: int, path: list[int]) -> None:
        """Move the cache entries of an accepted path of a tree, whose node i stands at slot root + i, next to the root's, in
        every layer. A chain's stand there already."""
        if path and path[-1] != len(path):
            places = torch.tensor([0, *path], dtype=torch.int32, device=self.device)
            ops.kv_rewrite(self.k_cache, self.v_cache, root, places)


def _neurons(index: int, observer: Observer | None, sparsity: CSparse | FSparse | None) -> Neurons | None:
    """What happens to the neurons of a layer: they are observed, or those that S leaves out are zeroed."""

    def observed(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if observer is not None:
            observer.observe(index, gates, z)
        return z

    def kept(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        assert sparsity is not None
        chosen = sparsity.neurons[index] if isinstance(sparsity, CSparse) else sparsity.choose(index, gates.float())
        return torch.zeros_like(z).index_copy_(1, chosen.long(), z[:, chosen.long()])

    return observed if sparsity is None else kept


def not_finite(prompt: int, new: int, reader: str, where: str | None) -> ValueError:
    """The error for logits that are not finite.

    prompt, new: tokens before the one that they were to choose.
    reader: the pass that gave them.
    where: as `Model.fault` has it.
    """
    source = "in which layer is not known" if where is None else f"the first values that are not come from {where}"
    return ValueError(
        f"model: the logits for position {prompt + new} ({prompt} of the prompt and {new} new tokens before it) are not finite "
        f"(NaN or infinite), in {reader}; {source}. Are there NaNs in the weights? If they are float16, a value beyond 65504 "
        "becomes infinite: try bfloat16 or float32"
    )


def model_of(weights: Weights) -> Model:
    """The model of the backend for the device that the weights are on."""
    if is_cuda(weights.device):
        from .cuda import CudaModel

        return CudaModel(weights)
    return Model(weights)
