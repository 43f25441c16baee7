"""The model on a CUDA device: passes that can be captured in graphs, and periods that need the host only for their record."""

from __future__ import annotations

from types import ModuleType

import torch

from ..config import SiriusConfig
from ..decoding.sparsity import DECAY, CSparse, FSparse, Kind
from ..decoding.tree import Tree
from ..kernels import dispatch
from ..models.weights import Weights
from .graphs import Nodes, Replay, graph_mode
from .layers import Attend, Neurons, decoder_layer, embed, norm
from .model import Model

FEW_ROWS = 16  # rows of a pass up to which our own kernels read the weights; a library multiplies more
MAX_NODES = 256  # of a tree
AHEAD = 2  # slots that a period beyond the end of a text may need
FIRST_CAPACITY = 256  # slots of the first cache; it doubles as needed, and graphs are captured anew when it does


class CudaModel(Model):
    """As `Model`. Everything that changes between two passes of one shape stands in device memory."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.graph_mode = graph_mode()
        self.base = torch.zeros(1, dtype=torch.int32, device=self.device)  # the root's slot
        # Its own: what is made while a graph is captured belongs to that graph.
        self.counters = torch.zeros(self._extension().counters, dtype=torch.int32, device=self.device)
        self._steps: dict[object, Replay] = {}
        self._periods: dict[object, object] = {}
        # CSparse's sets, int32 [layers, kept], by kept, and the statistic of one that follows the text: where graphs find them.
        self._neurons: dict[int, torch.Tensor] = {}
        self._statistic: torch.Tensor | None = None
        self._joined, self._joined_count = (torch.zeros(n, dtype=torch.int32, device=self.device) for n in (MAX_NODES, 1))
        self._thresholds: torch.Tensor | None = None
        self._taken: CSparse | FSparse | None = None  # what stands there

    def _extension(self) -> ModuleType:
        return dispatch.cuda_functions(self.device)

    def _grown(self, slots: int) -> int:
        capacity = max(FIRST_CAPACITY, self.capacity)
        while capacity < slots:
            capacity *= 2
        return capacity

    def reserve(self, slots: int, rows: int) -> None:
        """As `Model.reserve`. RuntimeError that says what to lower if the device's memory does not suffice."""
        if rows > MAX_NODES:
            raise ValueError(
                f"period, tree_width: expected a tree of at most {MAX_NODES} nodes on a CUDA device, got {rows}; lower one"
            )
        try:
            super().reserve(slots + AHEAD, rows)
        except torch.OutOfMemoryError as error:
            self.capacity = 0
            raise RuntimeError(
                f"cuda: out of memory for a cache of {slots} tokens and passes of {rows}; lower max_new_tokens, the prompt's "
                f"length, period or tree_width ({error})"
            ) from error

    def _make_room(self, rows: int) -> None:
        self._steps.clear()
        self._periods.clear()
        w, words = self.weights, -(-rows // 64)
        integers = {"dtype": torch.int32, "device": self.device}
        self._logits = torch.empty(rows, w.vocab, device=self.device)
        self._argmax = torch.empty(rows, **integers)
        self._tokens, self._offsets = torch.zeros(rows, **integers), torch.zeros(rows, **integers)
        self._masks = torch.zeros(rows * words, dtype=torch.int64, device=self.device)
        few = self._handle.workspace(min(rows, FEW_ROWS), self.capacity)
        many = 4 * self._extension().tree_attention_workspace(rows, w.heads, w.head_dim, self.capacity)
        judged = 4 * max(
            self._extension().accept_workspace(rows, w.vocab),
            self._extension().tree_expand_workspace(FEW_ROWS, w.vocab, FEW_ROWS),
        )
        followed = 4 * self._extension().follow_workspace(len(w.layers), rows, w.intermediate)
        self._workspace = torch.empty(max(few, many, judged, followed), dtype=torch.uint8, device=self.device)

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
        """As `Model.step`, whose arguments stand in the host's memory. The logits are the device's."""
        m, words = mask.shape
        nodes = Nodes(self._tokens[:m], self._offsets[:m], self._masks[: m * words].view(m, words), first_slot - prefix)
        nodes.tokens.copy_(tokens)
        nodes.offsets.copy_(positions - prefix)
        nodes.mask.copy_(mask)
        self.base.fill_(prefix)
        key = m, words, nodes.first, keep_z, self.take(sparsity)
        if key not in self._steps:
            self._steps[key] = Replay(
                lambda: self.run(nodes, key[-1], self._argmax[:m], keep_z=keep_z),
                self.device,
                self.graph_mode != "off",
                f"a pass of {m} tokens",
            )
        self._steps[key]()
        best = self._argmax[:m]
        return self._logits[:m], best if argmax is None else argmax.copy_(best)

    def take(self, sparsity: CSparse | FSparse | None) -> tuple[int, ...]:
        """Put a prompt's sets, or the thresholds, where passes find them. Returns what `run` takes."""
        if sparsity is None:
            return Kind.DENSE, 0, 0, 0
        if sparsity is not self._taken:  # a text's passes all come with the same one
            if isinstance(self._taken, CSparse):
                self._taken.keep(self._taken.neurons.clone(), self._taken.statistic.clone())
            self._taken, self._arguments = sparsity, self._held(sparsity)
        return self._arguments

    def _held(self, sparsity: CSparse | FSparse) -> tuple[int, ...]:
        kind, _, thresholds, kept = sparsity.arguments()
        neurons = 0
        if kind == Kind.LISTED:
            held = self._neurons.get(kept)
            if held is None:
                held = self._neurons[kept] = torch.empty_like(sparsity.neurons)
            if self._statistic is None:
                self._statistic = torch.empty_like(sparsity.statistic)
            # From now on what stands here is the set, which graphs change.
            sparsity.keep(held.copy_(sparsity.neurons), self._statistic.copy_(sparsity.statistic))
            neurons = held.data_ptr()
        if kind == Kind.THRESHOLD:
            if self._thresholds is None:
                self._thresholds = torch.empty_like(sparsity.thresholds)
            self._thresholds.copy_(sparsity.thresholds)
            thresholds = self._thresholds.data_ptr()
        return kind, neurons, thresholds, kept

    def run(
        self,
        nodes: Nodes,
        sparsity: tuple[int, ...],
        argmax: torch.Tensor | None = None,
        alive: torch.Tensor | None = None,
        keep_z: bool = False,
    ) -> torch.Tensor:
        """Launch one pass over some nodes of the tree whose root stands at slot `base`.

        sparsity: what `take` returned.
        argmax: int32 [m], gets every row's; -1 where a logit is not finite.
        alive: int32 [1]; only so many rows count in FSparse's choice.
        keep_z: as in `Model.step`.
        Returns the logits, float32 [m, V], which the next pass overwrites.
        """
        m = len(nodes.tokens)
        if m > FEW_ROWS:
            return self._run_many(nodes, argmax, keep_z)
        with dispatch.guard(self.device):
            self._handle.step(
                tokens=nodes.tokens.data_ptr(),
                positions=nodes.offsets.data_ptr(),
                cos=self.cos.data_ptr(),
                sin=self.sin.data_ptr(),
                max_position=self.capacity,
                mask=nodes.mask.data_ptr(),
                mask_words=nodes.mask.shape[1],
                k_cache=self.k_cache.data_ptr(),
                v_cache=self.v_cache.data_ptr(),
                sparsity=sparsity,
                logits=self._logits.data_ptr(),
                argmax=0 if argmax is None else argmax.data_ptr(),
                workspace=self._workspace.data_ptr(),
                z=self._kept_z(m).data_ptr() if keep_z else 0,
                num_rows=m,
                first_slot=nodes.first,
                capacity=self.capacity,
                base=self.base.data_ptr(),
                alive=0 if alive is None else alive.data_ptr(),
                counters=self.counters.data_ptr(),
                stream=dispatch.stream(self.device),
            )
        return self._logits[:m]

    def _run_many(self, nodes: Nodes, argmax: torch.Tensor | None, keep_z: bool) -> torch.Tensor:
        """F over more rows than our kernels are for: torch multiplies and writes the cache, our kernel attends."""
        w, m, d = self.weights, len(nodes.tokens), self.weights.description
        places = (self.base + nodes.offsets).long()
        slots = (self.base + nodes.first + torch.arange(m, device=self.device)).long()
        angles = self.cos[:, places], self.sin[:, places]
        x = embed(w, nodes.tokens.clamp(min=0).long())  # -1 stands behind logits that are not finite
        for index, layer in enumerate(w.layers):
            neurons = _keeping(self._kept_z(m)[index]) if keep_z else None
            x = decoder_layer(d, layer, x, angles, self._attend_in_tree(nodes, index, slots), neurons)
        normed, head, out = norm(d, x, w.final_norm), w.lm_head.data.t(), self._logits[:m]
        if w.dtype == torch.float32:
            torch.mm(normed, head, out=out)
        elif self.device.type == "cuda":
            torch.mm(normed, head, out_dtype=torch.float32, out=out)
        else:
            torch.mm(normed.float(), head.float(), out=out)
        if d.logit_scale != 1.0:
            out *= d.logit_scale
        if d.logit_softcap:
            out.div_(d.logit_softcap).tanh_().mul_(d.logit_softcap)
        if argmax is not None:
            self.launch("argmax", logits=out, argmax=argmax, num_rows=m, vocab=w.vocab)
        return out

    def _attend_in_tree(self, nodes: Nodes, index: int, slots: torch.Tensor) -> Attend:
        """Attention of a layer for nodes of the tree, whose keys and values go to `slots`."""
        w, d, layer = self.weights, self.weights.description, self.weights.layers[index]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.k_cache[index], self.v_cache[index]
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
                cache=(w.kv_heads, self.capacity, w.head_dim),
                base=self.base,
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

    def launch(self, name: str, **fields) -> None:
        """Call one of the extension's functions with the fields of its arguments and what they all end with, the workspace, the
        counters and the stream. Tensors go by their address, None as null."""
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

    def follow(self, sparsity: CSparse, nodes: int, path: list[int]) -> None:
        """As `Model.follow`."""
        self._joined[: len(path) + 1].copy_(torch.tensor([0, *path], dtype=torch.int32))
        self._joined_count.fill_(len(path) + 1)
        self.launch_follow(self._joined, self._joined_count, nodes, self.take(sparsity))

    def launch_follow(
        self,
        joined: torch.Tensor,
        count: torch.Tensor,
        nodes: int,
        sparsity: tuple[int, ...],
        fault: torch.Tensor | None = None,
    ) -> None:
        """Choose the set that `take` has put in its place anew.

        joined: int32, in device memory: the nodes of the last pass, over so many nodes, that joined the sequence.
        count: int32 [1], how many.
        fault: int32 [1]; where it is 1 the set stays what it was.
        """
        w, (_, neurons, _, kept) = self.weights, sparsity
        self.launch(
            "follow",
            dtype=w.dtype_code,
            z=self._kept_z(nodes),
            rows=joined,
            count_at=count,
            fault=fault,
            down_squares=w.down_squares,
            statistic=self._statistic,
            neurons=neurons,
            decay=DECAY,
            layers=len(w.layers),
            num_rows=nodes,
            intermediate=w.intermediate,
            kept=kept,
        )

    def following(self, kept: int) -> tuple[torch.Tensor, ...]:
        """What a set that follows the text changes, for who must undo it."""
        return self._neurons[kept], self._statistic

    def replay(self, config: SiriusConfig, tree: Tree, sparsity: CSparse | FSparse | None) -> PeriodGraph | None:  # noqa: F821
        """As `Model.replay`, after the prefill."""
        if self.graph_mode == "step":
            return None
        depth = config.period - 1 if config.mode == "sirius" else 0
        draft = self.take(sparsity)
        judge = draft if config.mode == "sparse" else self.take(None)
        follows = config.mode == "sirius" and sparsity.follows
        settings = config.prune, config.accept, config.threshold, config.score_temperature
        key = depth, tree.width, *settings, draft, judge, follows
        if key not in self._periods:
            from ..decoding.period_graph import PeriodGraph

            self._periods[key] = PeriodGraph(self, config, depth, draft, judge, follows)
        return self._periods[key]


def _keeping(kept: torch.Tensor) -> Neurons:
    """Keeps a layer's z, T [m, I]."""

    def neurons(gates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        kept.copy_(z)
        return z

    return neurons
