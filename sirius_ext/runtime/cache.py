"""Keys and values of sequences: a cache for each, and those that a model keeps for prompts to come."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from ..config import PREFILL_CHUNK, TOGETHER
from ..kernels import ops
from ..models.weights import Weights

CACHE_GRAIN = 256  # slots; the capacity grows in these steps
# What is kept of finished sequences, where nobody says otherwise.
KEPT_CACHES = 4
KEPT_BYTES = 1 << 30


def chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The chunks of a prefill from one position to another: where each begins, and where it ends."""
    while start < stop:
        end = min(stop, (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
        yield start, end
        start = end


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Tokens of a cache that were prefilled together.

    start, stop: their positions.
    observed: what whoever observed them wants to know again when they are not read again; None if nobody did.
    """

    start: int
    stop: int
    observed: object | None = None


class Cache:
    """Keys and values of one sequence. Slot i holds the token at position i, but for the branches of a tree.

    k, v: T [layers, kv_heads, capacity, D].
    cos, sin: float32 [tables, capacity, rotary_dim / 2], of the angles of every position.
    tokens: those that it holds, from position 0 on.
    stretches: which of them were prefilled.
    exact: the first so many of them have entries that F computed; S's, where it decoded alone, would change what F says next.
    in_use: by a sequence that has not ended.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.tokens: list[int] = []
        self.stretches: list[Stretch] = []
        self.exact = 0
        self.in_use = False
        self._release()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Of copies, and of what is pickled: it is on loan from a model that is in this process, so an output goes without it."""
        return type(None), ()

    def __repr__(self) -> str:
        use = ", in use" if self.in_use else ""
        dtype = str(self.weights.dtype).removeprefix("torch.")
        held = f"{len(self.tokens)} tokens, capacity {self.capacity}"
        return f"{type(self).__name__}({held}, {dtype} on {self.weights.device}{use})"

    @property
    def chunks_together(self) -> int:
        """Chunks of a prompt that whoever computes passes over this cache reads together (`Prefill.later`)."""
        return 1 if self.weights.tiers is None else TOGETHER

    def _release(self) -> None:
        w = self.weights
        self.capacity = self.rows = 0
        self.k = self.v = self._keys_or_values(0)
        self.cos = self.sin = self.logits = torch.empty(0, dtype=torch.float32, device=w.device)
        self.argmax = torch.empty(0, dtype=torch.int32, device=w.device)
        self._z = torch.empty(0, dtype=w.dtype, device=w.device)

    def _keys_or_values(self, capacity: int) -> torch.Tensor:
        w = self.weights
        return torch.empty(len(w.layers), w.kv_heads, capacity, w.head_dim, dtype=w.dtype, device=w.device)

    def _grown(self, slots: int) -> int:
        """The capacity for so many slots."""
        return -(-slots // CACHE_GRAIN) * CACHE_GRAIN

    def reserve(self, slots: int, rows: int = 0) -> None:
        """Make room for `slots` tokens and the results of passes of up to `rows`. What the cache holds stays."""
        if slots > self.capacity:
            self._grow(slots)
        if rows > self.rows:
            self._make_room(rows)

    def _grow(self, slots: int) -> None:
        w, held, capacity = self.weights, len(self.tokens), self._grown(slots)
        k, v = self._keys_or_values(capacity), self._keys_or_values(capacity)
        for new, old in ((k, self.k), (v, self.v)):
            new[:, :, :held] = old[:, :, :held]
        self.cos, self.sin = w.angles(torch.arange(capacity, device=w.device))
        self.k, self.v, self.capacity = k, v, capacity

    def _make_room(self, rows: int) -> None:
        device = self.weights.device
        self.logits = torch.empty(rows, self.weights.vocab, dtype=torch.float32, device=device)
        self.argmax = torch.empty(rows, dtype=torch.int32, device=device)
        self.rows = rows

    def z(self, rows: int) -> torch.Tensor:
        """Where a pass of so many rows leaves silu(gate x) * (up x) of every layer: T [layers, rows, I]. The place stays until
        there is room made for more rows."""
        layers, intermediate = len(self.weights.layers), self.weights.intermediate
        if self._z.numel() != layers * self.rows * intermediate:
            self._z = self._new_z(layers * self.rows * intermediate)
        return self._z[: layers * rows * intermediate].view(layers, rows, intermediate)

    def _new_z(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self.weights.dtype, device=self.weights.device)

    def compact(self, root: int, path: list[int]) -> None:
        """Move the entries of an accepted path of a tree, whose node i stands at slot root + i, next to the root's, in every
        layer. A chain's stand there already."""
        if path and path[-1] != len(path):
            ops.kv_rewrite(self.k, self.v, root, torch.tensor([0, *path], dtype=torch.int32, device=self.k.device))

    def hold(self, tokens: Sequence[int], observed: object | None = None, prefilled: bool = False, exact: bool = True) -> None:
        """Say that the next tokens' entries are there; of prefilled ones also what was observed. exact: F computed them."""
        if exact and self.exact == len(self.tokens):
            self.exact += len(tokens)
        if prefilled:
            self.stretches.append(Stretch(len(self.tokens), len(self.tokens) + len(tokens), observed))
        self.tokens += tokens

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`, and every stretch that does not end before them."""
        del self.tokens[length:]
        self.exact = min(self.exact, length)
        self.stretches = [stretch for stretch in self.stretches if stretch.stop <= length]

    @property
    def whole_chunks(self) -> list[Stretch]:
        """The stretches that are chunks as every prefill cuts them, with nothing else before them."""

        def whole(place: tuple[int, Stretch]) -> bool:
            i, each = place
            return (each.start, each.stop) == (i * PREFILL_CHUNK, (i + 1) * PREFILL_CHUNK)

        return [each for _, each in itertools.takewhile(whole, enumerate(self.stretches))]

    def reusable(self, prompt: Sequence[int], observed: bool, decoded: bool = False, exact: bool = True) -> int:
        """How many tokens of a prompt, but for its last one, need not be prefilled again: those of the whole chunks that it
        has in common with this cache. The result is then bit for bit what prefilling them gives.

        observed: a chunk counts only if what was observed in it is known.
        decoded: all tokens in common count, decoded ones too, whose bits differ from a prefill's. Of prefilled ones a stretch
            counts as a whole or not at all, because of what was observed in it.
        exact: but for those whose entries are S's.
        """
        if decoded:
            most = min(self.exact if exact else len(self.tokens), len(prompt) - 1)
            pairs = enumerate(zip(self.tokens, itertools.islice(prompt, most)))
            length = next((i for i, (mine, its) in pairs if mine != its), most)
            known = (each.start for each in self.stretches if each.stop > length or (observed and each.observed is None))
            return min(length, next(known, length))
        length = 0
        for chunk in self.whole_chunks:
            same = self.tokens[chunk.start : chunk.stop] == list(prompt[chunk.start : chunk.stop])
            if not same or chunk.stop == len(prompt) or (observed and chunk.observed is None):
                break
            length = chunk.stop
        return length

    @property
    def nbytes(self) -> int:
        """Of keys, values and what passes leave."""
        return self.k.nbytes + self.v.nbytes + self.logits.nbytes + self._z.nbytes

    def clear(self) -> None:
        """Hold nothing, and give the memory back."""
        self.rewind(0)
        self._release()


class KeptCaches:
    """The caches of the sequences that have ended last, for prompts that begin as theirs did. The one that was used least
    recently goes first.

    make: a new cache.
    most: that are kept, if that is limited; most_bytes: of all of them, unless the newest alone is larger.
    """

    def __init__(self, make: Callable[[], Cache]) -> None:
        self.most: int | None = KEPT_CACHES
        self.most_bytes = KEPT_BYTES
        self._make, self._lock = make, threading.RLock()  # a dropped sequence may return its cache at any moment
        self._kept: list[Cache] = []  # the newest last

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Cache]:
        return iter(tuple(self._kept))

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self)

    def take(self, prompt: Sequence[int], observed: bool, decoded: bool = False, exact: bool = True) -> Cache:
        """A cache for a prompt; it holds what of the prompt need not be prefilled again (`Cache.reusable`)."""
        with self._lock:
            common = [cache.reusable(prompt, observed, decoded, exact) for cache in self._kept]
            # Without anything in common, one that would serve no prompt at all, or the oldest if there is no room for another.
            idle = (cache for cache in self._kept if not (cache.tokens if decoded else cache.whole_chunks))
            oldest = self._kept[:1] if self._full(len(self._kept) + 1) else []
            if any(common):
                cache = self._kept[common.index(max(common))]
            else:
                cache = next(itertools.chain(idle, oldest), None) or self._make()
            self._take(cache)
            cache.rewind(max(common, default=0))
            return cache

    def claim(self, cache: Cache, check: Callable[[], None]) -> None:
        """Take this one, with all that it holds. ValueError if a sequence uses it. check: raises if it will not do; nobody takes
        it in between, and leaves something else in it."""
        with self._lock:
            if cache.in_use:
                raise ValueError("past_key_values: another sequence that has not ended uses this cache")
            check()
            self._take(cache)

    def _take(self, cache: Cache) -> None:
        self._kept = [each for each in self._kept if each is not cache]
        cache.in_use = True

    def give(self, cache: Cache) -> None:
        """Keep a cache that its sequence needs no longer; the oldest go when there are too many, or too large ones."""
        with self._lock:
            cache.in_use = False
            self._kept.append(cache)
            while len(self._kept) > 1 and self._full(len(self._kept)):
                self._kept.pop(0).clear()

    def _full(self, count: int) -> bool:
        """Whether so many are too many, or those that are kept too large."""
        return (self.most is not None and count > self.most) or self.nbytes > self.most_bytes

    def clear(self) -> None:
        """Keep none."""
        with self._lock:
            while self._kept:
                self._kept.pop().clear()
