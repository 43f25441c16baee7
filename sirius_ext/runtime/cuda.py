"""The model on a CUDA device: passes that can be captured in graphs, since all that changes stands in device memory."""

from __future__ import annotations

import contextlib
import threading
from types import ModuleType
from typing import Any

import torch

from ..config import MAX_NODES_ON_CUDA
from ..kernels import dispatch, ops
from ..kernels.weight_stream import pinned, to_host
from ..models.device_tiers import DeviceTiers
from ..models.weights import Weights
from .cache import Cache
from .graphs import Nodes, Replay, graph_mode, has_conditions
from .layers import Attend, Neurons, decoder_layer, embed, norm
from .model import Arguments, Model, arguments_of
from .passes import Kind, Pass, Sparsity

FEW_ROWS = 16  # rows of a pass up to which our own kernels read the weights; a library multiplies more
AHEAD = 2  # slots that a period beyond the end of a text may need
FIRST_CAPACITY = 256  # slots of a new cache; it doubles as needed, and graphs are captured anew when it does


class LaunchLock:
    """Held by whoever launches something of a model: one thread at a time, and after all that was launched of it before, on
    whatever stream that was."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._last: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._put_in_order()
        except BaseException:  # nobody comes to `__exit__` then
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _put_in_order(self) -> None:
        if self._device.type != "cuda":
            return
        now = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != now:
            now.wait_stream(self._last)
        self._last = now

    def locked(self) -> bool:
        return self._lock.locked()


# What the extension takes of a pass, and whether S reads four bits in it.
Chosen = tuple[Arguments, bool]


def is_left_in_host(weights: Weights) -> bool:
    """Whether what a verification leaves of every neuron goes to pinned host memory: where the device has too little for all
    weights, so that there is a link that is used one way only."""
    return isinstance(weights.tiers, DeviceTiers) and weights.tiers.streams


class CudaCache(Cache):
    """As `Cache`, and everything else that the graphs over it read: whatever changes between two passes of one shape stands in
    device memory, at a place of its own.

    base: int32 [1], the slot of the tree's root.
    statistic: float32 [layers, I], of a set that follows the text.
    steps, periods: the graphs of passes and of whole periods over this cache, by what was captured. They go when the cache gets
        other memory.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.base = torch.zeros(1, dtype=torch.int32, device=weights.device)
        self.statistic: torch.Tensor | None = None
        self._neurons: dict[int, torch.Tensor] = {}  # a text's sets, int32 [layers, kept], by kept
        self._thresholds: torch.Tensor | None = None
        self._taken: Sparsity | None = None  # what stands there
        self._chosen: Chosen = Arguments(), False

    def _release(self) -> None:
        super()._release()
        self.steps: dict[object, Replay] = {}
        self.periods: dict[object, Any] = {}

    def _grown(self, slots: int) -> int:
        capacity = max(FIRST_CAPACITY, self.capacity)
        while capacity < slots:
            capacity *= 2
        longest = super()._grown(self.weights.context + MAX_NODES_ON_CUDA + AHEAD)  # more no text needs
        return max(min(capacity, longest), super()._grown(slots))

    def _grow(self, slots: int) -> None:
        super()._grow(slots)
        self._forget_graphs()

    def _new_z(self, size: int) -> torch.Tensor:
        if not is_left_in_host(self.weights):
            return super()._new_z(size)
        return pinned(self.weights.device, size * self.weights.dtype.itemsize)[1].view(self.weights.dtype)

    def _forget_graphs(self) -> None:
        self.steps.clear()
        self.periods.clear()

    def _make_room(self, rows: int) -> None:
        super()._make_room(rows)
        self._forget_graphs()
        device = self.weights.device
        self.staged_tokens, self.staged_offsets = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        self.staged_masks = torch.zeros(rows * -(-rows // 64), dtype=torch.int64, device=device)

    def staged(self, asked: Pass) -> Nodes:
        """What a pass asks for, in the device's memory, where the graph of a pass of its shape reads it."""
        m, words = asked.mask.shape
        nodes = Nodes(
            self.staged_tokens[:m],
            self.staged_offsets[:m],
            self.staged_masks[: m * words].view(m, words),
            asked.first_slot - asked.prefix,
        )
        nodes.tokens.copy_(asked.tokens)
        nodes.offsets.copy_(asked.positions - asked.prefix)
        nodes.mask.copy_(asked.mask)
        self.base.fill_(asked.prefix)
        return nodes

    def take(self, sparsity: Sparsity | None) -> Chosen:
        """Put a prompt's sets, or the thresholds, where passes find them. Returns what `CudaModel.run` takes."""
        if sparsity is None:
            return Arguments(), False
        if sparsity is not self._taken:  # a sequence's passes all come with the same one
            if self._taken is not None and self._taken.neurons is not None:
                statistic = self._taken.statistic
                self._taken.place(self._taken.neurons.clone(), None if statistic is None else statistic.clone())
            self._taken, self._chosen = sparsity, (self._held(sparsity), sparsity.four_bits)
        return self._chosen

    def _held(self, sparsity: Sparsity) -> Arguments:
        arguments = arguments_of(sparsity)
        kept = arguments.kept
        if sparsity.neurons is not None:
            if kept not in self._neurons:
                self._neurons[kept] = torch.empty_like(sparsity.neurons)
            held, statistic = self._neurons[kept].copy_(sparsity.neurons), sparsity.statistic
            if statistic is not None:
                if self.statistic is None:
                    self.statistic = torch.empty_like(statistic)
                statistic = self.statistic.copy_(statistic)
            sparsity.place(held, statistic)  # from now on what stands here is the set, which graphs change
            arguments = arguments._replace(neurons=held.data_ptr())
        if sparsity.thresholds is not None:
            if self._thresholds is None:
                self._thresholds = torch.empty_like(sparsity.thresholds)
            self._thresholds.copy_(sparsity.thresholds)
            arguments = arguments._replace(thresholds=self._thresholds.data_ptr())
        return arguments

    def followed(self, kept: int) -> tuple[torch.Tensor, ...]:
        """What a set of so many neurons that follows the text changes, for who must undo it."""
        assert self.statistic is not None
        return self._neurons[kept], self.statistic


class CudaModel(Model):
    """As `Model`. Passes share the workspace and the counters, so that each waits for the one before, on whatever stream."""

    most_nodes = MAX_NODES_ON_CUDA

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.lock = LaunchLock(self.device)
        tiers = weights.tiers
        self._streamed = tiers if isinstance(tiers, DeviceTiers) else None
        self.graph_mode = graph_mode()
        # What a graph's conditional parts are captured on is another stream than what the graph is.
        self.capture_stream, self.inner_stream = (
            torch.cuda.Stream(self.device) if self.device.type == "cuda" else None for _ in range(2)
        )
        self.conditions = self.device.type != "cuda" or has_conditions(self.device)  # whether parts of graphs need not run
        self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._outgrown: list[torch.Tensor] = []  # graphs that were captured with them go on with them
        # Its own: what is made while a graph is captured belongs to that graph.
        self.counters = torch.zeros(self._extension().counters, dtype=torch.int32, device=self.device)

    def _extension(self) -> ModuleType:
        return dispatch.cuda_functions(self.device)

    def new_cache(self) -> CudaCache:
        return CudaCache(self.weights)

    def reserve(self, cache: Cache, slots: int, rows: int) -> None:
        """As `Model.reserve`. ValueError for a tree that is too large; RuntimeError that says what to lower if the device's
        memory does not suffice."""
        if rows > MAX_NODES_ON_CUDA:
            most = f"at most {MAX_NODES_ON_CUDA} nodes on a CUDA device"
            raise ValueError(f"period, tree_width: expected a tree of {most}, got {rows}; lower one")
        try:
            try:
                super().reserve(cache, slots + AHEAD, rows)
            except torch.OutOfMemoryError:
                self.caches.clear()  # of other sequences, for prompts that may never come
                super().reserve(cache, slots + AHEAD, rows)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"cuda: out of memory for a cache of {slots} tokens and passes of {rows}; lower max_new_tokens, the prompt's "
                f"length, period or tree_width ({error})"
            ) from error

    def _make_room(self, cache: Cache, rows: int) -> None:
        w, functions = self.weights, self._extension()
        few = self._handle.workspace(min(rows, FEW_ROWS), cache.capacity)
        many = 4 * functions.tree_attention_workspace(rows, w.heads, w.head_dim, cache.capacity)
        judged = 4 * max(functions.accept_workspace(rows, w.vocab), functions.tree_expand_workspace(FEW_ROWS, w.vocab, FEW_ROWS))
        followed = 4 * functions.follow_workspace(len(w.layers), rows, w.intermediate)
        size = max(few, many, judged, followed)
        if size > self._workspace.numel():
            self._outgrown.append(self._workspace)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self.device)

    def step(self, cache: Cache, asked: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Model.step`; what is asked stands in the host's memory. The logits are the device's."""
        assert isinstance(cache, CudaCache)
        m, words = asked.mask.shape
        with self.lock:
            nodes, sparsity = cache.staged(asked), cache.take(asked.sparsity)
            key = m, words, nodes.first, asked.keep_z, sparsity
            if key not in cache.steps:
                cache.steps[key] = Replay(
                    lambda: self.run(cache, nodes, sparsity, cache.argmax[:m], keep_z=asked.keep_z),
                    self.device,
                    self.graph_mode != "off",
                    f"a pass of {m} tokens",
                    stream=self.capture_stream,
                )
            cache.steps[key]()
        best = cache.argmax[:m]
        return cache.logits[:m], best if asked.argmax is None else asked.argmax.copy_(best)

    def run(
        self,
        cache: CudaCache,
        nodes: Nodes,
        sparsity: Chosen,
        argmax: torch.Tensor | None = None,
        alive: torch.Tensor | None = None,
        keep_z: bool = False,
    ) -> torch.Tensor:
        """Launch one pass over some nodes of the tree whose root stands at the cache's slot `base`.

        sparsity: what `CudaCache.take` returned.
        argmax: int32 [m], gets every row's; -1 where a logit is not finite.
        alive: int32 [1]; only so many rows count where the pass chooses its neurons.
        keep_z: as in `Pass`.
        Returns the logits, float32 [m, V], which the next pass over this cache overwrites.
        """
        m = len(nodes.tokens)
        if m > FEW_ROWS:
            return self._run_many(cache, nodes, argmax, keep_z)
        arguments, four_bits = sparsity
        drafting = self._streamed is not None and arguments.kind != Kind.DENSE
        if drafting:
            arguments = self._held(arguments, four_bits)
        with dispatch.guard(self.device):
            self._handle_with(four_bits, drafting).step(
                tokens=nodes.tokens.data_ptr(),
                positions=nodes.offsets.data_ptr(),
                cos=cache.cos.data_ptr(),
                sin=cache.sin.data_ptr(),
                max_position=cache.capacity,
                mask=nodes.mask.data_ptr(),
                mask_words=nodes.mask.shape[1],
                k_cache=cache.k.data_ptr(),
                v_cache=cache.v.data_ptr(),
                sparsity=arguments,
                logits=cache.logits.data_ptr(),
                argmax=0 if argmax is None else argmax.data_ptr(),
                workspace=self._workspace.data_ptr(),
                z=cache.z(m).data_ptr() if keep_z else 0,
                num_rows=m,
                first_slot=nodes.first,
                capacity=cache.capacity,
                base=cache.base.data_ptr(),
                alive=0 if alive is None else alive.data_ptr(),
                counters=self.counters.data_ptr(),
                weights=0 if self._streamed is None or drafting else self._streamed.weights.address,
                all_streams=self._streamed is not None and self._streamed.plan.streams_rest,
                z_in_host=is_left_in_host(self.weights),
                stream=dispatch.stream(self.device),
            )
        return cache.logits[:m]

    def _held(self, arguments: Arguments, four_bits: bool) -> Arguments:
        """Launch what has all that S will read on the device. Returns what a pass takes then."""
        assert self._streamed is not None
        if not self._streamed.are_placed(four_bits):
            return arguments
        slots = self._streamed.slots
        assert slots is not None  # `Tiers.check` has seen to that
        weights = self.weights.down_norms if arguments.down_norms else None
        self.launch("hold", **slots.fields(arguments.neurons, arguments.kept, weights))
        norms = slots.row_weights.data_ptr() if arguments.down_norms else 0
        return arguments._replace(neurons=slots.listed_rows.data_ptr(), down_norms=norms)

    def ahead(self, sparsity: Chosen, draft: Chosen) -> contextlib.AbstractContextManager[None]:
        """Around launches that end with such a pass, after passes of `draft` or none: where F's weights are not all on the
        device, the first of them are copied meanwhile."""
        if self._streamed is None or sparsity[0].kind != Kind.DENSE:
            return contextlib.nullcontext()
        if draft[0].kind != Kind.DENSE:
            self._held(*draft)  # before anything is copied: it may come from the slots that this changes
        return self._streamed.ahead()

    def _run_many(self, cache: CudaCache, nodes: Nodes, argmax: torch.Tensor | None, keep_z: bool) -> torch.Tensor:
        """F over more rows than our kernels are for: torch multiplies and writes the cache, our kernel attends."""
        w, m, d = self.weights, len(nodes.tokens), self.weights.description
        places = (cache.base + nodes.offsets).long()
        slots = (cache.base + nodes.first + torch.arange(m, device=self.device)).long()
        angles = cache.cos[:, places], cache.sin[:, places]
        x = embed(w, nodes.tokens.clamp(min=0).long())  # -1 comes after logits that are not finite
        for index, layer in enumerate(w.each_layer()):
            neurons = self._keeping(cache.z(m)[index]) if keep_z else None
            x = decoder_layer(d, layer, x, angles, self._attend_in_tree(cache, nodes, index, slots), neurons)
        normed, out, first = norm(d, x, w.final_norm), cache.logits[:m], 0
        for head in w.each_part_of_head():
            # Products are written side by side: of a part of the columns first to memory of their own.
            part = out if head.rows == w.vocab else torch.empty(m, head.rows, dtype=torch.float32, device=self.device)
            if not head.plain:
                ops.linear(normed, head, scale=d.logit_scale, softcap=d.logit_softcap, out_dtype=torch.float32, out=part)
            elif w.dtype == torch.float32:
                torch.mm(normed, head.data.t(), out=part)
            elif self.device.type == "cuda":
                torch.mm(normed, head.data.t(), out_dtype=torch.float32, out=part)
            else:
                torch.mm(normed.float(), head.data.float().t(), out=part)
            if part is not out:
                out[:, first : first + head.rows] = part
            first += head.rows
        if head.plain and d.logit_scale != 1.0:
            out *= d.logit_scale
        if head.plain and d.logit_softcap:
            out.div_(d.logit_softcap).tanh_().mul_(d.logit_softcap)
        if argmax is not None:
            self.launch("argmax", logits=out, argmax=argmax, num_rows=m, vocab=w.vocab)
        return out

    def _keeping(self, kept: torch.Tensor) -> Neurons:
        """Keeps a layer's z, T [m, I]."""

        def neurons(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            if is_left_in_host(self.weights):
                to_host(z.contiguous(), kept)
            else:
                kept.copy_(z)
            return z

        return neurons

    def _attend_in_tree(self, cache: CudaCache, nodes: Nodes, index: int, slots: torch.Tensor) -> Attend:
        """Attention of a layer for nodes of the tree, whose keys and values go to `slots`."""
        w, d, layer = self.weights, self.weights.description, self.weights.layers[index]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = cache.k[index], cache.v[index]
            keys.index_copy_(1, slots, k.transpose(0, 1))
            values.index_copy_(1, slots, v.transpose(0, 1))
            out = torch.empty(len(q), w.heads * w.head_dim, dtype=w.dtype, device=self.device)
            self.launch(
                "tree_attention",
                dtype=w.dtype_code,
                q=q.contiguous(),
                q_stride=w.heads * w.head_dim,
                k_cache=keys,
                v_cache=values,
                cache=(w.kv_heads, cache.capacity, w.head_dim),
                base=cache.base,
                mask=nodes.mask,
                mask_words=nodes.mask.shape[1],
                positions=nodes.offsets,
                window=layer.window,
                out=out,
                scale=d.attention_scale,
                softcap=d.attention_softcap,
                num_rows=len(q),
                heads=w.heads,
            )
            return out

        return attend

    def launch(self, name: str, /, **fields: object) -> None:
        """Call one of the extension's functions with the fields of its arguments and what they all end with, the
        workspace, the counters and the stream. Tensors go by their address, None as null."""
        plain = {
            field: 0 if value is None else value.data_ptr() if isinstance(value, torch.Tensor) else value
            for field, value in fields.items()
        }
        with dispatch.guard(self.device):
            getattr(self._extension(), name)(
                **plain,
                workspace=self._workspace.data_ptr(),
                counters=self.counters.data_ptr(),
                stream=dispatch.stream(self.device),
            )
