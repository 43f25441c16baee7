"""A model ready to decode: its weights and the passes that the full and the sparse model make over a sequence's cache."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from .. import _C
from ..kernels.threads import cpu_threads
from ..models.weights import View, Weights
from .cache import Cache, KeptCaches, chunks
from .layers import Attend, Neurons, attention, decoder_layer, embed, logits, norm
from .passes import Fault, Kind, Observer, Pass, Prefill, Result, Sparsity, reads_four_bits

_P = ParamSpec("_P")
_T = TypeVar("_T")


def lasting(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function whose tensors live on and are written to again, whoever calls it: without gradients, but never in
    `torch.inference_mode`, whose tensors nobody may write to outside of it, nor train."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


class Model:
    """F and S over the caches of any number of sequences. Nothing of a pass is left here when it ends, and one is computed at a
    time, whatever the threads that ask.

    caches: of the sequences that have ended last.
    most_nodes: of a tree; None where the memory alone says.
    """

    most_nodes: int | None = None

    def __init__(self, weights: Weights) -> None:
        self.weights, self.device = weights, weights.device
        self.caches = KeptCaches(self.new_cache)
        if weights.tiers is not None:
            self.caches.most_bytes = weights.tiers.plan.caches
        self.lock: contextlib.AbstractContextManager[object] = threading.Lock()  # held for a pass
        self._workspace = torch.empty(0, dtype=torch.uint8, device="cpu")
        # NaN where a query or key of a prefill was not finite.
        self._hidden = torch.zeros((), dtype=torch.float32, device=self.device)
        self._handle = self._extension().Model(**weights.arguments())
        self._drafting: dict[bool, tuple[Any, View]] = {}  # the same with S's views, once there is a use for them

    def _handle_of(self, sparsity: Sparsity | None) -> Any:
        """The compiled model for a pass of S with this sparsity, or of F. All that S will read is in memory then."""
        tiers, four_bits = self.weights.tiers, reads_four_bits(sparsity)
        if sparsity is not None and tiers is not None and tiers.are_placed(four_bits):
            assert sparsity.neurons is not None
            tiers.stream.hold(sparsity.neurons)
        return self._handle_with(four_bits, drafting=sparsity is not None and tiers is not None)

    def _handle_with(self, four_bits: bool, drafting: bool = False) -> Any:
        """The compiled model that reads four bits of every weight, or all. drafting: even if that is the same, not F's own."""
        if not four_bits and not drafting:
            return self._handle
        if four_bits not in self._drafting:
            view = self.weights.drafting(four_bits)  # whose addresses the compiled model has
            self._drafting[four_bits] = self._extension().Model(**self.weights.arguments(view)), view
        return self._drafting[four_bits][0]

    def _extension(self) -> ModuleType:
        """Where the compiled passes are."""
        return _C

    def new_cache(self) -> Cache:
        """An empty one."""
        return Cache(self.weights)

    def reserve(self, cache: Cache, slots: int, rows: int) -> None:
        """Make room for `slots` tokens in a cache, and for passes of up to `rows` over it. What it holds stays."""
        with self.lock:
            cache.reserve(slots, rows)
            self._make_room(cache, rows)

    def _make_room(self, cache: Cache, rows: int) -> None:
        """A workspace for passes of up to so many rows over a cache."""
        size = self._handle.workspace(rows, cache.capacity)
        if size > self._workspace.numel():
            self._workspace = torch.empty(size, dtype=torch.uint8, device="cpu")

    def compute(self, cache: Cache, asked: Prefill | Pass | Fault) -> Result:
        """What a sequence asks for, over its cache."""
        if isinstance(asked, Pass):
            logits, argmax = self.step(cache, asked)
            return Result(logits, argmax, cache.z(len(asked.tokens)) if asked.keep_z else None)
        if isinstance(asked, Prefill):
            return Result(self.prefill(cache, asked))
        return Result(fault=self.fault(cache, asked))

    def prefill(self, cache: Cache, asked: Prefill) -> torch.Tensor:
        """A chunk of a prompt. Many rows are a library's work: torch, whose sums are ordered differently from the decode pass's.

        Returns what `Result` says.
        """
        with self.lock:
            self._hidden = torch.zeros((), dtype=torch.float32, device=self.device)
            chunks = (asked, *asked.later)
            # Of the activations only what the last layer makes is kept.
            (x,) = collections.deque(self._layers(cache, chunks), maxlen=1)
            if chunks[-1].stop < len(asked.prompt):
                return self._hidden
            return self._head(self._last_norm(x[-1])) + self._hidden

    def _layers(self, cache: Cache, chunks: Sequence[Prefill], sparsity: Sparsity | None = None) -> Iterator[list[torch.Tensor]]:
        """Chunks one after another, side by side, through F, or with a sparsity through S, in torch: their embeddings, then what
        each layer makes of them, T [t, H] each."""
        w = self.weights
        x = [embed(w, chunk.prompt[chunk.start : chunk.stop].to(self.device)) for chunk in chunks]
        yield x
        for index, layer in enumerate(w.each_layer(reads_four_bits(sparsity))):
            for i, chunk in enumerate(chunks):
                angles = cache.cos[:, chunk.start : chunk.stop], cache.sin[:, chunk.start : chunk.stop]
                attend, neurons = self._attend(cache, index, chunk.start), _neurons(index, chunk.observer, sparsity)
                x[i] = decoder_layer(w.description, layer, x[i], angles, attend, neurons)
            if w.tiers is not None and chunks[0].keep is not None:
                w.tiers.keep(index, functools.partial(chunks[0].keep, index))
            yield x

    def _attend(self, cache: Cache, index: int, start: int) -> Attend:
        """Attention of a layer for tokens from position `start` on, whose keys and values go to the cache."""
        d, layer = self.weights.description, self.weights.layers[index]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            end = start + len(q)
            # Where scores are NaN or infinite, torch's attention may give numbers all the same. Zero times a number is zero, and
            # zero times what is none is NaN.
            self._hidden += 0 * (q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32))
            keys, values = cache.k[index], cache.v[index]
            keys[:, start:end], values[:, start:end] = k.transpose(0, 1), v.transpose(0, 1)
            return attention(d, layer, q, keys[:, :end], values[:, :end], start)

        return attend

    def _last_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last row, T [1, H]."""
        return norm(self.weights.description, x[-1:], self.weights.final_norm)

    def _head(self, normed: torch.Tensor, four_bits: bool = False) -> torch.Tensor:
        """The logits of one row, float32 [V]."""
        return logits(self.weights, normed, four_bits)[0]

    def fault(self, cache: Cache, asked: Fault) -> str | None:
        """Where the first values arise that are not finite. None if there are none in torch, which rounds differently."""
        with self.lock:
            return self._fault(cache, asked.tokens, asked.start, asked.sparsity)

    def _fault(self, cache: Cache, tokens: torch.Tensor, start: int, sparsity: Sparsity | None) -> str | None:
        layers, end = len(self.weights.layers), start + len(tokens)
        self._hidden = torch.zeros((), dtype=torch.float32, device=self.device)
        # S reads token by token, as it drafts: FSparse chooses for a pass.
        parts = chunks(start, end) if sparsity is None else ((place, place + 1) for place in range(start, end))
        for begin, stop in parts:
            part = tokens[begin - start : stop - start]
            padded = torch.cat((part.new_zeros(begin), part))
            for count, (x,) in enumerate(self._layers(cache, [Prefill(padded, begin, stop)], sparsity)):
                # Later rows attend to what a layer makes of all rows, but after the last layer only the last row goes on.
                goes_on = x if count < layers else x[-1:] if stop == end else x[:0]
                odd = ~goes_on.isfinite().all(-1)
                if count == 0 and bool(odd.any()):
                    return f"the embedding of token {int(part[odd.cpu()][0])}"
                if bool(odd.any()) or not bool(self._hidden.isfinite()):
                    return f"layer {count - 1} of {layers}"
        normed = self._last_norm(x)
        if not bool(normed.isfinite().all()):
            return "the final norm"
        head = self._head(normed, reads_four_bits(sparsity))
        return None if bool(head.isfinite().all()) else "the LM head"

    def step(self, cache: Cache, asked: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass through F or S: one call into C++ over all layers. The caller has reserved room for it: this is the hot path,
        so nothing is checked here.

        Returns logits and argmax as `Result` has them.
        """
        m = len(asked.tokens)
        out, argmax = cache.logits[:m], cache.argmax[:m] if asked.argmax is None else asked.argmax
        with self.lock:
            rows = self.weights.embedding_rows(asked.tokens)
            self._handle_of(asked.sparsity).step(
                tokens=rows.data_ptr(),
                positions=asked.positions.data_ptr(),
                cos=cache.cos.data_ptr(),
                sin=cache.sin.data_ptr(),
                max_position=cache.capacity,
                mask=asked.mask.data_ptr(),
                mask_words=asked.mask.shape[1],
                k_cache=cache.k.data_ptr(),
                v_cache=cache.v.data_ptr(),
                sparsity=arguments_of(asked.sparsity),
                logits=out.data_ptr(),
                argmax=argmax.data_ptr(),
                workspace=self._workspace.data_ptr(),
                z=cache.z(m).data_ptr() if asked.keep_z else 0,
                watch=self._watch(asked),
                num_rows=m,
                first_slot=asked.first_slot,
                prefix=asked.prefix,
                capacity=cache.capacity,
                threads=cpu_threads(),
            )
        return out, argmax

    def _watch(self, asked: Pass) -> tuple[int, int, float]:
        """What the extension must know to keep neurons that S will want, while they stream by: Watch of csrc/params.h."""
        tiers, follower = self.weights.tiers, asked.follower
        if tiers is None or tiers.plan.slots == 0 or follower is None or follower.statistic is None:
            return 0, 0, 0.0
        return follower.statistic.data_ptr(), self.weights.down_squares.data_ptr(), follower.decay


class Arguments(NamedTuple):
    """What a compiled pass takes of a sparse model: `Sparsity` of csrc/params.h, whose arrays go by their addresses."""

    kind: Kind = Kind.DENSE
    neurons: int = 0
    thresholds: int = 0
    kept: int = 0
    down_norms: int = 0
    kept_up: int = 0
    kept_down: int = 0


def arguments_of(sparsity: Sparsity | None) -> Arguments:
    """Those of S, or of F."""
    if sparsity is None:
        return Arguments()
    arrays = sparsity.neurons, sparsity.thresholds, sparsity.down_norms
    neurons, thresholds, norms = (0 if each is None else each.data_ptr() for each in arrays)
    kept = 0 if sparsity.kind == Kind.THRESHOLD else sparsity.kept_neurons
    return Arguments(sparsity.kind, neurons, thresholds, kept, norms, *sparsity.narrowed)


def _neurons(index: int, observer: Observer | None, sparsity: Sparsity | None) -> Neurons | None:
    """What happens to the neurons of a layer: they are observed, or those that S leaves out are zeroed."""

    def observed(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if observer is not None:
            observer.observe(index, gates, z)
        return z

    def kept(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        assert sparsity is not None
        chosen = sparsity.choose(index, gates.float(), z.float()).long()
        return torch.zeros_like(z).index_copy_(1, chosen, z[:, chosen])

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
