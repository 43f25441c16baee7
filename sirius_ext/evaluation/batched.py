"""Many texts decoded at once, for accuracy alone: no latency is measured here.

Each text is a `decoding.Sequence`, over a cache of this module. The passes that all of them ask for next are computed as one, so
that the weights are read once for many rows: prefills, drafts and verifications together. A sparse text's rows go through the
dense MLP too, whose neurons outside its set are then zeroed.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch

from ..decoding.prefill import Passes
from ..decoding.sequence import Request, Sequence, Step
from ..decoding.sparsity import CSparse, Usage
from ..kernels import ops
from ..models.families import Description
from ..models.weights import Weights
from ..runtime.cache import Cache
from ..runtime.layers import Attend, Neurons, decoder_layer, embed, logits, norm, soft_capped
from ..runtime.model import Model, not_finite
from ..runtime.passes import Fault, Kind, Pass, Prefill, Result, Sparsity, reads_four_bits

KEPT_CHUNKS = 64  # of prompts, whose keys and values are at hand for the next mode

Key = TypeVar("Key")


@dataclasses.dataclass
class _Rows:
    """What one text asks of a pass: m tokens through F, or with a sparsity through S.

    keys, values: T [layers, kv_heads, C, D], the text's cache after the batch's prefix.
    tokens, positions: int64 [m].
    slot: of the first token in the cache; the others stand after it.
    visible: bool [m, slot + m]; None if all is seen.
    wanted: of so many last rows the logits are wanted.
    seen_by: who observes the rows, if anybody.
    z: T [layers, m, I], gets silu(gate x) * (up x) of the rows, where it is wanted.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    slot: int
    visible: torch.Tensor | None
    wanted: int
    sparsity: Sparsity | None = None
    seen_by: Usage | None = None
    z: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # float32 [wanted, V], once computed

    @property
    def four_bits(self) -> bool:
        """Whether S reads four bits of every weight for them."""
        return reads_four_bits(self.sparsity)

    @property
    def end(self) -> int:
        return self.slot + len(self.tokens)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What F made of a chunk of a prompt: its cache entries, what its tokens used, and the logits after it, float32 [V]."""

    keys: torch.Tensor
    values: torch.Tensor
    usage: Usage
    logits: torch.Tensor


class _Tail(Cache):
    """A text's cache after the batch's prefix: slot i holds the token at position `first` + i."""

    chunks_together = 1  # a chunk that several texts ask for is read once

    def __init__(self, weights: Weights, first: int) -> None:
        super().__init__(weights)
        self.first = first

    def reserve(self, slots: int, rows: int = 0) -> None:
        super().reserve(max(0, slots - self.first))

    def compact(self, root: int, path: list[int]) -> None:
        super().compact(root - self.first, path)


@dataclasses.dataclass
class _Live(Generic[Key]):
    """A text that is being decoded: its step, and what that waits for."""

    key: Key
    sequence: Sequence
    cache: _Tail
    step: Passes[Step]
    asked: Prefill | Pass | Fault


class Batch:
    """Texts that share passes.

    prefix: what all texts begin with, int64 [t]; may be empty. It is read once, and all rows of a pass look at it together.
        ValueError if F's logits after it are not finite.
    """

    def __init__(self, model: Model, prefix: torch.Tensor) -> None:
        self._model, self._weights, self._prefix = model, model.weights, prefix
        self._shared = len(prefix)
        self._cache = Cache(self._weights)
        self._cache.reserve(self._shared)
        self._usage = self._new_usage()
        self._free: list[_Tail] = []
        self._chunks: collections.OrderedDict[tuple[int, ...], _Chunk] = collections.OrderedDict()
        if self._shared:
            self._read_prefix()

    @torch.no_grad()
    def _read_prefix(self) -> None:
        cache, shared = self._cache, self._shared
        visible = torch.ones(shared, shared, dtype=torch.bool).tril()
        rows = _Rows(cache.k, cache.v, self._prefix, torch.arange(shared), 0, visible, 1, seen_by=self._usage)
        keys, values = (each[:, :, :0] for each in (cache.k, cache.v))
        _Pass(self._weights, keys, values, [rows]).run()
        if rows.logits is None or not bool(rows.logits.isfinite().all()):
            where = self._model.fault(cache, Fault(self._prefix, 0))
            raise not_finite(shared, 0, "the prefill (full model)", where)
        cache.hold(self._prefix.tolist())

    def _new_usage(self) -> Usage:
        return Usage(len(self._weights.layers), self._weights.intermediate)

    @torch.no_grad()
    def decode(self, requests: Iterable[tuple[Key, Request]], live: int) -> Iterator[tuple[Key, Sequence, Exception | None]]:
        """Decode texts, `live` of them at a time, and give each as it ends: its key, the text, and the error that ended it, if
        one did. Nothing is timed. ValueError for a prompt that does not begin with the prefix, or has no more."""
        waiting = iter(requests)
        texts: list[_Live[Key]] = []
        while True:
            texts += (self._begin(key, request) for key, request in itertools.islice(waiting, live - len(texts)))
            if not texts:
                return
            going_on = []
            for text, result in zip(texts, self._compute(texts)):
                error = self._advance(text, result)
                if text.sequence.ended:
                    text.sequence.stats.prefill_seconds = text.sequence.stats.decode_seconds = None
                    yield text.key, text.sequence, error
                else:
                    going_on.append(text)
            texts = going_on

    def _begin(self, key: Key, request: Request) -> _Live[Key]:
        prompt, shared = request.prompt, self._shared
        if len(prompt) <= shared or not torch.equal(prompt[:shared], self._prefix):
            raise ValueError(f"prompt: expected one that begins with the batch's {shared} tokens and goes on")
        cache = self._free.pop() if self._free else _Tail(self._weights, shared)
        cache.rewind(0)
        cache.reserve(len(prompt) + request.limit + request.tree(self._model).capacity)
        if shared:
            cache.hold(self._prefix.tolist(), self._usage, prefilled=True)
        free = self._free
        sequence = Sequence(self._model, request, cache, lambda _: free.append(cache))
        step = sequence.passes()
        return _Live(key, sequence, cache, step, next(step))

    def _advance(self, text: _Live[Key], result: Result) -> Exception | None:
        """Go on to the next pass that a text asks for, in its next step if need be, or to its end."""
        try:
            text.asked = text.step.send(result)
        except StopIteration:
            if not text.sequence.ended:
                text.step = text.sequence.passes()
                text.asked = next(text.step)
        except Exception as error:
            return error
        return None

    def _compute(self, texts: list[_Live[Key]]) -> list[Result]:
        """What the texts ask for, in one pass. A chunk of a prompt that several ask for, or have asked for of late, is read once:
        a text is decoded in several modes."""
        passes: dict[int, _Rows] = {}  # by the text's index
        read: dict[tuple[int, ...], _Rows] = {}
        known: dict[tuple[int, ...], _Chunk] = {}
        for index, text in enumerate(texts):
            if isinstance(text.asked, Pass):
                passes[index] = self._rows_of_pass(text.cache, text.asked)
            elif isinstance(text.asked, Prefill):
                name = _name(text.asked)
                if name in self._chunks:
                    self._chunks.move_to_end(name)
                    known[name] = self._chunks[name]
                elif name not in read:
                    read[name] = self._rows_of_prefill(text.cache, text.asked)
        keys, values = (each[:, :, : self._shared] for each in (self._cache.k, self._cache.v))
        asked = [*passes.values(), *read.values()]
        for four_bits in (False, True):
            if some := [rows for rows in asked if rows.four_bits == four_bits]:
                _Pass(self._weights, keys, values, some).run()
        for name, rows in read.items():
            known[name] = self._chunks[name] = _chunk_of(rows)
        while len(self._chunks) > KEPT_CHUNKS:
            self._chunks.popitem(last=False)
        results = []
        for index, text in enumerate(texts):
            if isinstance(text.asked, Pass):
                logits = _computed(passes[index])
                results.append(Result(logits, ops.argmax(logits, out=text.asked.argmax), passes[index].z))
            elif isinstance(text.asked, Prefill):
                results.append(Result(self._take(text.cache, text.asked, known[_name(text.asked)])))
            else:
                results.append(Result(fault=self._fault(text.cache, text.asked)))
        return results

    def _rows_of_prefill(self, cache: _Tail, asked: Prefill) -> _Rows:
        positions, first = torch.arange(asked.start, asked.stop), asked.start - self._shared
        visible = torch.ones(len(positions), first + len(positions), dtype=torch.bool).tril(first)
        tokens = asked.prompt[asked.start : asked.stop]
        return _Rows(cache.k, cache.v, tokens, positions, first, visible, 1, seen_by=self._new_usage())

    def _take(self, cache: _Tail, asked: Prefill, chunk: _Chunk) -> torch.Tensor:
        """Have a chunk of a prompt in a text's cache, whoever asked for it first. Returns logits as `Result` has them."""
        place = slice(asked.start - self._shared, asked.stop - self._shared)
        cache.k[:, :, place], cache.v[:, :, place] = chunk.keys, chunk.values
        if isinstance(asked.observer, Usage):
            asked.observer.absorb(chunk.usage)
        return chunk.logits if asked.stop == len(asked.prompt) else 0 * chunk.logits.sum()

    def _rows_of_pass(self, cache: _Tail, asked: Pass) -> _Rows:
        m, slot, before = len(asked.tokens), asked.first_slot - self._shared, asked.prefix - self._shared
        bits = ((asked.mask.unsqueeze(-1) >> torch.arange(64)) & 1).flatten(1).bool()[:, : slot + m - before]
        visible = None if bool(bits.all()) else torch.cat((torch.ones(m, before, dtype=torch.bool), bits), 1)
        rows = _Rows(cache.k, cache.v, asked.tokens.long(), asked.positions.long(), slot, visible, m, asked.sparsity)
        if asked.keep_z:
            rows.z = torch.empty(len(self._weights.layers), m, self._weights.intermediate, dtype=self._weights.dtype)
        return rows

    def _fault(self, tail: _Tail, asked: Fault) -> str | None:
        """As `Model.fault`, over a cache of its own that holds prefix and text."""
        cache, shared = self._model.new_cache(), self._shared
        self._model.reserve(cache, asked.start + len(asked.tokens), 1)
        if asked.start:
            for whole, prefix, own in ((cache.k, self._cache.k, tail.k), (cache.v, self._cache.v, tail.v)):
                whole[:, :, :shared] = prefix[:, :, :shared]
                whole[:, :, shared : asked.start] = own[:, :, : asked.start - shared]
        return self._model.fault(cache, asked)


def shared_prefix(prompts: Iterable[list[int]]) -> torch.Tensor:
    """What a batch of such prompts may have as its prefix, int64 [t]: the tokens that all begin with; each has more."""
    known = list(prompts)
    shared = os.path.commonprefix(known)
    return torch.tensor(shared[: min(map(len, known)) - 1], dtype=torch.int64)


def _name(asked: Prefill) -> tuple[int, ...]:
    """Of a chunk of a prompt: all tokens up to its end."""
    return tuple(asked.prompt[: asked.stop].tolist())


def _computed(rows: _Rows) -> torch.Tensor:
    assert rows.logits is not None
    return rows.logits


def _chunk_of(rows: _Rows) -> _Chunk:
    assert rows.seen_by is not None
    keys, values = (each[:, :, rows.slot : rows.end].clone() for each in (rows.keys, rows.values))
    return _Chunk(keys, values, rows.seen_by, _computed(rows)[0].clone())


class _Pass:
    """Rows that the texts of a batch ask for, all of F or of an S of the same bits, through the model at once. keys, values: the
    prefix's."""

    def __init__(self, weights: Weights, keys: torch.Tensor, values: torch.Tensor, asked: list[_Rows]) -> None:
        self._weights, self._keys, self._values, self._asked = weights, keys, values, asked
        self._shares, start = [], 0  # of each text, its rows among all
        for rows in asked:
            self._shares.append(slice(start, start + len(rows.tokens)))
            start += len(rows.tokens)
        self._positions = torch.cat([rows.positions for rows in asked])
        # CSparse's sets, as what the z of a text's rows is multiplied with: T [layers, I].
        self._kept = [_set_of(rows.sparsity, weights.dtype) for rows in asked]
        # By a layer's window: what each text's rows see of its own cache, and all rows of the prefix.
        windows = {layer.window for layer in weights.layers}
        self._own = {window: [self._bias(self._visible(rows, window)) for rows in asked] for window in windows}
        self._of_prefix = {window: self._seen_of_prefix(window) for window in windows}

    def _visible(self, rows: _Rows, window: int) -> torch.Tensor | None:
        """What rows see of their own text's cache: bool [m, slots]; None if they see all."""
        if not window:
            return rows.visible
        # A slot's position is its number after the prefix, but for a tree's nodes, which are all inside the window.
        places = torch.arange(self._keys.shape[2], self._keys.shape[2] + rows.end)
        near = places > rows.positions[:, None] - window
        return near if rows.visible is None else near & rows.visible

    def _seen_of_prefix(self, window: int) -> torch.Tensor | None:
        """What all rows see of the prefix: bool [rows, slots]; None if they see all."""
        near = torch.arange(self._keys.shape[2]) > self._positions[:, None] - window
        return near if window and not bool(near.all()) else None

    def _bias(self, visible: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the scores: T [m * group, slots]; None for nothing."""
        if visible is None:
            return None
        bias = torch.zeros(visible.shape, dtype=self._weights.dtype).masked_fill_(~visible, -torch.inf)
        return bias.repeat_interleave(self._weights.heads // self._weights.kv_heads, 0)

    @torch.no_grad()
    def run(self) -> None:
        """Every text gets its logits; its keys and values are in its cache."""
        w, angles = self._weights, self._weights.angles(self._positions)
        x = embed(w, torch.cat([rows.tokens for rows in self._asked]))
        for index, layer in enumerate(w.each_layer(self._asked[0].four_bits)):
            x = decoder_layer(w.description, layer, x, angles, self._attend(index), self._neurons(index))
        wanted = [x[share][-rows.wanted :] for rows, share in zip(self._asked, self._shares)]
        out = logits(w, norm(w.description, torch.cat(wanted), w.final_norm), self._asked[0].four_bits)
        for rows, each in zip(self._asked, torch.split(out, [len(each) for each in wanted])):
            rows.logits = each

    def _attend(self, index: int) -> Attend:
        """Attention of a layer: each text's rows to its own cache, and all rows together to the prefix."""
        w, d, window = self._weights, self._weights.description, self._weights.layers[index].window

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q = q.view(len(q), w.kv_heads, -1, w.head_dim)
            out, weight = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32)
            # As in `Model._attend`: 0, or NaN for a row whose query or key is not finite.
            hidden = 0 * (q.sum((1, 2, 3), dtype=torch.float32) + k.sum((1, 2), dtype=torch.float32))
            for rows, share, bias in zip(self._asked, self._shares, self._own[window]):
                keys, values = rows.keys[index], rows.values[index]
                keys[:, rows.slot : rows.end] = k[share].transpose(0, 1)
                values[:, rows.slot : rows.end] = v[share].transpose(0, 1)
                out[share], weight[share] = _attention(d, q[share], keys[:, : rows.end], values[:, : rows.end], bias)
                out[share] += hidden[share].sum()
            if self._keys.shape[2]:
                seen = self._of_prefix[window]
                of_prefix, its_weight = _attention(d, q, self._keys[index], self._values[index], self._bias(seen))
                its_share = torch.sigmoid(its_weight - weight)[..., None]
                if seen is not None:  # rows so far on that they see nothing of it
                    some = seen.any(-1)[:, None, None, None]
                    its_share, of_prefix = its_share.where(some, 0.0), of_prefix.where(some, 0.0)
                out = torch.lerp(out.float(), of_prefix.float(), its_share).to(q.dtype)
            return out.flatten(1)

        return attend

    def _neurons(self, index: int) -> Neurons:
        """What is seen, kept and left out of a layer's neurons."""

        def neurons(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            for rows, share, kept in zip(self._asked, self._shares, self._kept):
                if rows.seen_by is not None:
                    rows.seen_by.observe(index, gates[share], z[share])
                if rows.z is not None:
                    rows.z[index] = z[share]
                if kept is not None:
                    z[share] *= kept[index]
                elif rows.sparsity is not None:
                    chosen = torch.zeros(z.shape[1], dtype=z.dtype)
                    chosen[rows.sparsity.choose(index, gates[share].float(), z[share].float())] = 1
                    z[share] *= chosen
            return z

        return neurons


def _set_of(sparsity: Sparsity | None, dtype: torch.dtype) -> torch.Tensor | None:
    """1 for each neuron of a set that is the same for all passes, T [layers, I]. None for any other S, and for F."""
    return sparsity.kept.to(dtype) if isinstance(sparsity, CSparse) and sparsity.kind == Kind.LISTED else None


def _attention(
    d: Description, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of m rows, and the logarithm of what their weights add up to, by which it can be joined with that of other keys.

    q: T [m, kv_heads, group, D]. keys, values: T [kv_heads, slots, D]. bias: T [m * group, slots]. Returns T [m, kv_heads,
    group, D] and float32 [m, kv_heads, group]. The queries of a group are rows of one product, so that no key is repeated.
    """
    m, kv_heads, group, size = q.shape
    queries = q.transpose(0, 1).reshape(1, kv_heads, m * group, size)
    if d.attention_softcap:  # torch's own attention has none
        scores = queries[0].float() @ keys.float().transpose(1, 2) * d.attention_scale
        scores = soft_capped(scores, d.attention_softcap) + (0.0 if bias is None else bias)
        out, weight = scores.softmax(-1) @ values.float(), scores.logsumexp(-1)
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, weight = attend(queries, keys[None], values[None], attn_mask=bias, scale=d.attention_scale)
    return out.to(q.dtype).view(kv_heads, m, group, size).transpose(0, 1), weight.view(kv_heads, m, group).transpose(0, 1)
