"""Many texts decoded at once, for accuracy alone: no latency is measured here.

Every text runs the engine's own loop (`Engine.generate`) in a thread of its own, on a `Seat` in place of a `Model`. What a seat
is asked to compute waits until all seated texts ask; then one pass computes all of it, so that the weights are read once for
many rows. Prefills, drafts and verifications share passes. A sparse text's rows go through the dense MLP too, whose neurons
outside its set are then zeroed.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from ..config import SiriusConfig
from ..decoding.sparsity import CSparse, FSparse
from ..decoding.tree import Tree
from ..kernels import ops
from ..models.weights import Layer, Weights
from ..runtime.model import CACHE_GRAIN, PREFILL_CHUNK, Model, not_finite

KEPT_PROMPTS = 32  # of which the keys and values are at hand, for the next mode


@dataclasses.dataclass
class _Rows:
    """What one text asks of a pass: m tokens through F, or with a sparsity through S.

    keys, values: T [layers, kv_heads, C, D], the text's cache behind the batch's prefix.
    tokens, positions: int64 [m].
    slot: of the first token in the cache; the others stand behind it.
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
    sparsity: CSparse | FSparse | None = None
    seen_by: CSparse | None = None
    z: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # float32 [wanted, V], once computed

    @property
    def end(self) -> int:
        return self.slot + len(self.tokens)


@dataclasses.dataclass
class _Prompt:
    """What F made of a prompt: the cache entries behind the batch's prefix, what CSparse saw, and the last token's logits."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    seen: CSparse | None = None
    logits: torch.Tensor | None = None


class Seat:
    """A place in the batch: a cache for one text at a time, and what `correction.generate` asks of a `Model`."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self.weights, self.lock = batch, batch.weights, threading.Lock()
        self.keys = self.values = _cache(batch.weights, 0)

    def __enter__(self) -> Seat:
        self._batch.sit()
        return self

    def __exit__(self, *_) -> None:
        self._batch.rise()

    def reserve(self, slots: int, rows: int) -> None:
        """Room for a text of so many tokens, the batch's prefix among them."""
        slots = -(-(slots - self._batch.shared) // CACHE_GRAIN) * CACHE_GRAIN
        if slots > self.keys.shape[2]:
            self.keys, self.values = _cache(self.weights, slots), _cache(self.weights, slots)

    def prefill(self, tokens: torch.Tensor, observer: CSparse | FSparse | None = None) -> torch.Tensor:
        """As `Model.prefill`. The batch's prefix, which the prompt must begin with, and prompts of late are not read again."""
        shared = self._batch.shared
        if len(tokens) <= shared or not torch.equal(tokens[:shared], self._batch.prefix):
            raise ValueError(f"tokens: expected a prompt that begins with the batch's {shared} tokens and goes on")
        prompt = self._batch.prompt(tokens)
        self._batch.rise()  # passes do not wait for who waits for the same prompt
        with prompt.lock:
            self._batch.sit()
            if prompt.logits is None:
                self._read(tokens[shared:], prompt)
        size = len(tokens) - shared
        self.keys[:, :, :size], self.values[:, :, :size] = prompt.keys, prompt.values
        if observer is not None:
            observer.absorb(prompt.seen)
        return prompt.logits

    def _read(self, tokens: torch.Tensor, prompt: _Prompt) -> None:
        prompt.seen = self._batch.new_statistic()
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            end = start + len(chunk)
            visible = torch.ones(len(chunk), end, dtype=torch.bool).tril(start)
            positions = torch.arange(start, end) + self._batch.shared
            rows = _Rows(self.keys, self.values, chunk, positions, start, visible, 1, seen_by=prompt.seen)
            logits = self._batch.compute(rows)[0]
        prompt.keys, prompt.values = self.keys[:, :, :end].clone(), self.values[:, :, :end].clone()
        prompt.logits = logits.clone()

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
        """As `Model.step`."""
        slot, before = first_slot - self._batch.shared, prefix - self._batch.shared
        bits = ((mask.unsqueeze(-1) >> torch.arange(64)) & 1).flatten(1).bool()[:, : slot + len(tokens) - before]
        visible = None if bool(bits.all()) else torch.cat((torch.ones(len(tokens), before, dtype=torch.bool), bits), 1)
        rows = _Rows(self.keys, self.values, tokens.long(), positions.long(), slot, visible, len(tokens), sparsity)
        if keep_z:
            shape = len(self.weights.layers), len(tokens), self.weights.intermediate
            self._z = rows.z = torch.empty(shape, dtype=self.weights.dtype)
        logits = self._batch.compute(rows)
        return logits, ops.argmax(logits, out=argmax)

    def fault(self, tokens: torch.Tensor, start: int, sparsity: CSparse | FSparse | None = None) -> str | None:
        """As `Model.fault`, by a model with a cache of its own."""
        model, shared = Model(self.weights), self._batch.shared
        model.reserve(start + len(tokens), 1)
        for cache, of_prefix, own in (
            (model.k_cache, self._batch._keys, self.keys),
            (model.v_cache, self._batch._values, self.values),
        ):
            if start:
                cache[:, :, :shared] = of_prefix
                cache[:, :, shared:start] = own[:, :, : start - shared]
        return model.fault(tokens, start, sparsity)

    def follow(self, sparsity: CSparse, nodes: int, path: list[int]) -> None:
        """As `Model.follow`."""
        sparsity.follow(self._z, torch.tensor([0, *path], dtype=torch.int32))

    def replay(self, config: SiriusConfig, tree: Tree, sparsity: CSparse | FSparse | None) -> None:
        """As `Model.replay`: the texts wait for each other after every pass."""

    def keep(self, root: int, path: list[int]) -> None:
        """As `Model.keep`."""
        if path and path[-1] != len(path):
            moved = torch.tensor([0, *path], dtype=torch.int32)
            ops.kv_rewrite(self.keys, self.values, root - self._batch.shared, moved)


def _cache(weights: Weights, slots: int) -> torch.Tensor:
    return torch.empty(len(weights.layers), weights.kv_heads, slots, weights.head_dim, dtype=weights.dtype)


class Batch:
    """Texts that share passes.

    prefix: what all texts begin with, int64 [t]; may be empty. It is read once, and all rows of a pass look at it together.
        ValueError if F's logits behind it are not finite.
    """

    def __init__(self, weights: Weights, prefix: torch.Tensor) -> None:
        self.weights, self.prefix, self.shared = weights, prefix, 0
        self._lock = threading.Lock()
        self._all_ask = threading.Condition(self._lock)  # or none is left
        self._computed = threading.Condition(self._lock)
        self._working, self._seated, self._stopped = 0, 0, False
        self._asked: list[_Rows] = []
        self._prompts: collections.OrderedDict[tuple[int, ...], _Prompt] = collections.OrderedDict()
        self._seen = None
        self._keys = self._values = _cache(weights, 0)
        if len(prefix):
            keys, values, seen = _cache(weights, len(prefix)), _cache(weights, len(prefix)), self.new_statistic()
            visible = torch.ones(len(prefix), len(prefix), dtype=torch.bool).tril()
            rows = _Rows(keys, values, prefix, torch.arange(len(prefix)), 0, visible, 1, seen_by=seen)
            self._compute([rows])
            if not bool(rows.logits.isfinite().all()):
                model = Model(weights)
                model.reserve(len(prefix), 1)
                raise not_finite(len(prefix), 0, "the prefill (full model)", model.fault(prefix, 0))
            self._keys, self._values, self._seen, self.shared = keys, values, seen, len(prefix)

    def _compute(self, asked: list[_Rows]) -> None:
        _Pass(self.weights, self._keys, self._values, asked).run()

    def new_statistic(self) -> CSparse:
        """CSparse's, of a prompt of which the prefix has been read."""
        statistic = CSparse(len(self.weights.layers), self.weights.intermediate, 1.0)
        if self._seen is not None:
            statistic.absorb(self._seen)
        return statistic

    def prompt(self, tokens: torch.Tensor) -> _Prompt:
        """What is known of it; nothing if it has no logits."""
        with self._lock:
            prompt = self._prompts.setdefault(tuple(tokens.tolist()), _Prompt())
            self._prompts.move_to_end(tuple(tokens.tolist()))
            if len(self._prompts) > KEPT_PROMPTS:
                self._prompts.popitem(last=False)
            return prompt

    def run(self, jobs: Sequence[Callable[[Seat], None]], seats: int) -> None:
        """Do the jobs, each with a seat of its own, `seats` of them at a time; the passes are computed in the calling thread.
        What a job raises is raised here, when those that run have ended."""
        free: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        for _ in range(seats):
            free.put(Seat(self))
        with ThreadPoolExecutor(seats) as threads:
            self._working = len(jobs)
            futures = [threads.submit(self._work, job, free) for job in jobs]
            try:
                self._serve()
            finally:
                with self._lock:
                    self._stopped = True
                    self._computed.notify_all()
                threads.shutdown(cancel_futures=True)
        for future in futures:
            future.result()

    def _work(self, job: Callable[[Seat], None], free: queue.SimpleQueue[Seat]) -> None:
        seat = free.get()
        try:
            with torch.no_grad():
                job(seat)
        finally:
            free.put(seat)
            with self._lock:
                self._working -= 1
                self._all_ask.notify()

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._all_ask.wait_for(lambda: not self._working or (self._asked and len(self._asked) == self._seated))
                if not self._working:
                    return
                asked, self._asked = self._asked, []
            self._compute(asked)
            with self._lock:
                self._computed.notify_all()

    def sit(self) -> None:
        """From now on passes wait for this text."""
        with self._lock:
            self._seated += 1

    def rise(self) -> None:
        with self._lock:
            self._seated -= 1
            self._all_ask.notify()

    def compute(self, rows: _Rows) -> torch.Tensor:
        """The logits of the wanted rows, once a pass has computed them."""
        with self._lock:
            self._asked.append(rows)
            self._all_ask.notify()
            self._computed.wait_for(lambda: rows.logits is not None or self._stopped)
        if rows.logits is None:
            raise SystemExit("the batch was stopped")  # ends the thread; no handler of errors takes it for a result
        return rows.logits


class _Pass:
    """All rows that the texts of a batch ask for, through the model at once. keys, values: the prefix's."""

    def __init__(self, weights: Weights, keys: torch.Tensor, values: torch.Tensor, asked: list[_Rows]) -> None:
        self._weights, self._keys, self._values, self._asked = weights, keys, values, asked
        self._group = weights.heads // weights.kv_heads
        self._shares, start = [], 0  # of each text, its rows among all
        for rows in asked:
            self._shares.append(slice(start, start + len(rows.tokens)))
            start += len(rows.tokens)
        angles = torch.cat([rows.positions for rows in asked]).float()[:, None] * weights.inv_freq
        self._cos, self._sin = (table[:, None] * weights.rope_scale for table in (angles.cos(), angles.sin()))
        # CSparse's sets, as what the z of a text's rows is multiplied with: T [layers, I].
        self._kept = [rows.sparsity.kept.to(weights.dtype) if isinstance(rows.sparsity, CSparse) else None for rows in asked]
        self._biases = [None if rows.visible is None else self._bias(rows.visible) for rows in asked]

    def _bias(self, visible: torch.Tensor) -> torch.Tensor:
        """What is added to the scores: T [m * group, slots]."""
        bias = torch.zeros(visible.shape, dtype=self._weights.dtype).masked_fill_(~visible, -torch.inf)
        return bias.repeat_interleave(self._group, 0)

    @torch.no_grad()
    def run(self) -> None:
        """Every text gets its logits; its keys and values are in its cache."""
        w = self._weights
        x = F.embedding(torch.cat([rows.tokens for rows in self._asked]), w.embedding)
        for index, layer in enumerate(w.layers):
            normed = ops.rms_norm(x, layer.input_norm, w.eps)
            x = ops.linear(self._attention(normed, layer, index), layer.output, layer.output_bias, x)
            normed = ops.rms_norm(x, layer.post_norm, w.eps)
            x = torch.addmm(x, self._neurons(normed, layer, index), layer.down)
        wanted = [x[share][-rows.wanted :] for rows, share in zip(self._asked, self._shares)]
        normed = ops.rms_norm(torch.cat(wanted), w.final_norm, w.eps)
        logits = ops.linear(normed, w.lm_head, out_dtype=torch.float32)
        for rows, each in zip(self._asked, logits.split([len(each) for each in wanted])):
            rows.logits = each

    def _attention(self, normed: torch.Tensor, layer: Layer, index: int) -> torch.Tensor:
        w = self._weights
        q, k, v = (ops.linear(normed, weight, bias).view(len(normed), -1, w.head_dim) for weight, bias in layer.qkv)
        q, k = self._rotate(q).view(len(q), w.kv_heads, self._group, w.head_dim), self._rotate(k)
        out, weight = torch.empty_like(q), torch.empty(q.shape[:-1])
        # As in `Model._attention`: 0, or NaN for a row whose query or key is not finite.
        hidden = 0 * (q.sum((1, 2, 3), dtype=torch.float32) + k.sum((1, 2), dtype=torch.float32))
        for rows, share, bias in zip(self._asked, self._shares, self._biases):
            keys, values = rows.keys[index], rows.values[index]
            keys[:, rows.slot : rows.end] = k[share].transpose(0, 1)
            values[:, rows.slot : rows.end] = v[share].transpose(0, 1)
            out[share], weight[share] = _attend(q[share], keys[:, : rows.end], values[:, : rows.end], bias)
            out[share] += hidden[share].sum()
        if self._keys.shape[2]:
            of_prefix, its_weight = _attend(q, self._keys[index], self._values[index])
            share = torch.sigmoid(its_weight - weight)[..., None]
            out = torch.lerp(out.float(), of_prefix.float(), share).to(q.dtype)
        return out.flatten(1)

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """heads: T [rows, heads, D]."""
        first, second = heads.float().chunk(2, -1)
        return torch.cat((first * self._cos - second * self._sin, second * self._cos + first * self._sin), -1).to(heads.dtype)

    def _neurons(self, normed: torch.Tensor, layer: Layer, index: int) -> torch.Tensor:
        """z = silu(gate x) * (up x), T [rows, I], with zeros where S leaves a neuron out."""
        gates = ops.gate(normed, layer.gate)
        z = gates.mul(ops.linear(normed, layer.up, out_dtype=torch.float32)).to(normed.dtype)
        for rows, share, kept in zip(self._asked, self._shares, self._kept):
            if rows.seen_by is not None:
                rows.seen_by.observe(index, gates[share], z[share])
            if rows.z is not None:
                rows.z[index] = z[share]
            if kept is not None:
                z[share] *= kept[index]
            elif rows.sparsity is not None:
                chosen = torch.zeros(z.shape[1], dtype=z.dtype)
                chosen[rows.sparsity.choose(index, gates[share])] = 1
                z[share] *= chosen
        return z


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of m rows, and the logarithm of what their weights add up to, by which it can be joined with that of other keys.

    q: T [m, kv_heads, group, D]. keys, values: T [kv_heads, slots, D]. bias: T [m * group, slots]. Returns T [m, kv_heads,
    group, D] and float32 [m, kv_heads, group]. The queries of a group are rows of one product, so that no key is repeated.
    """
    m, kv_heads, group, size = q.shape
    queries = q.transpose(0, 1).reshape(1, kv_heads, m * group, size)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, weight = attend(queries, keys[None], values[None], attn_mask=bias)
    return out.view(kv_heads, m, group, size).transpose(0, 1), weight.view(kv_heads, m, group).transpose(0, 1)
