"""The CUDA ops against torch doing the same, in bf16: microseconds a call with cold weights, and the share of the card's read
bandwidth.

A case runs over so many copies of what it reads that the L2 cache holds none of it when its turn comes again, all in one CUDA
graph; torch's calls are captured the same way. Bytes are those that must move: weights, caches or logits, read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from common import alternate, console
from rich.table import Table
from shapes import Shape, shape_of
from timing import Repeated, read_bandwidth

from sirius_ext.decoding.sparsity import kept_neurons
from sirius_ext.kernels import dispatch
from sirius_ext.kernels.matrix import Matrix
from sirius_ext.kernels.ops import DTYPES

COLD_BYTES = 1 << 30  # ten times the largest L2 cache, that of an L40
MIN_CALLS = 64  # in a graph: what starting a graph costs is then under 0.2 us a call
DTYPE = torch.bfloat16
CODE = DTYPES[DTYPE]
VOCAB = 128256
ACCEPT_ROWS = (16, 64)
CONTEXTS = (512, 1024, 4096)
TREE_NODES = 121  # period 16, width 8


@dataclasses.dataclass
class Case:
    """ours, torch: the call on copy i, i < copies. bytes: that it must move."""

    op: str
    rows: int
    bytes: int
    copies: int
    ours: Callable[[int], object]
    torch: Callable[[int], object]
    density: float | None = None
    context: int | None = None


class Cases:
    """The cases of one shape. cold_bytes, contexts, vocab: smaller ones serve tests."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        cold_bytes: int = COLD_BYTES,
        contexts: Sequence[int] = CONTEXTS,
        vocab: int = VOCAB,
    ) -> None:
        self.shape, self.device, self._cold = shape, device, cold_bytes
        self._contexts, self._vocab = contexts, vocab
        # An even number, since gate and up are two of them.
        copies = max(2, self._copies(shape.intermediate * shape.hidden * 2))
        self._weights = self._random(copies + copies % 2, shape.intermediate, shape.hidden)
        self._matrices = [Matrix(weight).raw for weight in self._weights]

    def _random(self, *size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(*size, device=self.device, dtype=dtype).mul_(size[-1] ** -0.5)

    def _empty(self, *size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.empty(*size, device=self.device, dtype=dtype)

    def _copies(self, size: int) -> int:
        """How many arrays of so many bytes no cache holds; no more than that are needed of small ones."""
        return min(512, -(-self._cold // size))

    def _launch(self, name: str, *, workspace: tuple[int, ...] = (), **fields) -> None:
        """Call a compiled function: the checks of `ops` wait for the device, which a capture cannot. Tensors go by their address,
        None as null."""
        plain = {
            field: 0 if value is None else value.data_ptr() if isinstance(value, torch.Tensor) else value
            for field, value in fields.items()
        }
        dispatch.run(self.device, name, workspace=workspace, **plain)

    def neurons(self, density: float) -> torch.Tensor | None:
        """int32 [K], rising; None for all of them."""
        if density == 1:
            return None
        order = torch.randperm(self.shape.intermediate, device=self.device)
        return order[: kept_neurons(density, self.shape.intermediate)].sort().values.int()

    def linear(self, rows: int) -> Iterator[Case]:
        weights, hidden = self._weights, self.shape.hidden
        x = self._random(rows, hidden)
        for features in (self.shape.intermediate, hidden):
            out = self._empty(rows, features)
            matrices = [Matrix(weight[:features]).raw for weight in weights]

            def ours(i: int, features: int = features, out: torch.Tensor = out, matrices: list = matrices) -> None:
                parts = [(matrices[i],)]
                self._launch("linear", dtype=CODE, x=x, parts=parts, out=out, num_rows=rows, out_features=features)

            yield Case(
                f"linear {hidden} to {features}", rows, features * hidden * 2, len(weights), ours,
                lambda i, features=features: F.linear(x, weights[i, :features]),
            )  # fmt: skip

    def mlp(self, rows: int, density: float) -> Iterator[Case]:
        """gate_up and down."""
        weights, matrices, (hidden, intermediate) = self._weights, self._matrices, (self.shape.hidden, self.shape.intermediate)
        neurons = self.neurons(density)
        kept = intermediate if neurons is None else len(neurons)
        places = None if neurons is None else neurons.long()
        pick = lambda w: w if places is None else w[places]  # noqa: E731
        x, out = self._random(rows, hidden), self._empty(rows, kept)
        yield Case(
            "gate_up", rows, 2 * kept * hidden * 2, len(weights) // 2,
            lambda i: self._launch(
                "gate_up", dtype=CODE, x=x, gate=matrices[2 * i], up=matrices[2 * i + 1], neurons=neurons, out=out,
                num_rows=rows, num_neurons=kept,
            ),
            lambda i: F.silu(F.linear(x, pick(weights[2 * i]))) * F.linear(x, pick(weights[2 * i + 1])),
            density,
        )  # fmt: skip
        h, back = self._random(rows, kept), self._empty(rows, hidden)
        yield Case(
            "down", rows, kept * hidden * 2, len(weights),
            lambda i: self._launch(
                "down", dtype=CODE, x=h, down=matrices[i], neurons=neurons, out=back, num_rows=rows, num_neurons=kept,
                workspace=(rows, hidden, kept),
            ),
            lambda i: torch.mm(h, pick(weights[i])),
            density,
        )  # fmt: skip

    def gate(self, rows: int) -> Iterator[Case]:
        """FSparse's dense half."""
        weights, (hidden, intermediate) = self._weights, (self.shape.hidden, self.shape.intermediate)
        x, out = self._random(rows, hidden), self._empty(rows, intermediate, dtype=torch.float32)
        yield Case(
            "gate", rows, intermediate * hidden * 2, len(weights),
            lambda i: self._launch(
                "gate", dtype=CODE, x=x, gate=self._matrices[i], out=out, num_rows=rows, num_neurons=intermediate
            ),
            lambda i: F.silu(F.linear(x, weights[i])).float(),
        )  # fmt: skip

    def fsparse(self, rows: int, density: float) -> Iterator[Case]:
        """FSparse's select and up."""
        weights, (hidden, intermediate) = self._weights, (self.shape.hidden, self.shape.intermediate)
        kept = kept_neurons(density, intermediate)
        gates = self._random(rows, intermediate, dtype=torch.float32)
        chosen, count = self._empty(intermediate, dtype=torch.int32), self._empty(1, dtype=torch.int32)
        copies = MIN_CALLS
        many = gates.repeat(copies, 1, 1)
        yield Case(
            "select", rows, gates.nbytes, copies,
            lambda i: self._launch(
                "select", values=many[i], neurons=chosen, count=count, num_rows=rows, intermediate=intermediate,
                candidates=intermediate, kept=kept, workspace=(intermediate,),
            ),
            lambda i: many[i].abs().sum(0).topk(kept).indices.sort().values,
            density,
        )  # fmt: skip
        neurons = torch.randperm(intermediate, device=self.device)[:kept].sort().values
        listed, few, x, out = neurons.int(), gates[:, neurons].to(DTYPE), self._random(rows, hidden), self._empty(rows, kept)
        yield Case(
            "up", rows, kept * hidden * 2, len(weights),
            lambda i: self._launch(
                "up", dtype=CODE, x=x, up=self._matrices[i], gates=gates, neurons=listed, out=out, num_rows=rows,
                num_neurons=kept,
            ),
            lambda i: few * F.linear(x, weights[i, neurons]),
            density,
        )  # fmt: skip

    def rms_norm(self, rows: int) -> Iterator[Case]:
        hidden = self.shape.hidden
        copies = max(MIN_CALLS, self._copies(rows * hidden * 2))
        x, weight, out = self._random(copies, rows, hidden), self._random(hidden), self._empty(rows, hidden)
        yield Case(
            "rms_norm", rows, 2 * rows * hidden * 2, copies,
            lambda i: self._launch(
                "rms_norm", dtype=CODE, x=x[i], norm=(weight.data_ptr(), 1e-5), out=out, num_rows=rows, hidden=hidden
            ),
            lambda i: F.rms_norm(x[i], (hidden,), weight, 1e-5),
        )  # fmt: skip

    def attention(self, rows: int, context: int) -> Iterator[Case]:
        """tree_attention of a chain after `context` tokens."""
        heads, kv_heads, head_dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        slots = context + rows
        copies = self._copies(2 * kv_heads * slots * head_dim * 2)
        k, v = (self._random(copies, kv_heads, slots, head_dim) for _ in range(2))
        q, out = self._random(rows, heads, head_dim), self._empty(rows, heads, head_dim)
        masks = torch.tensor([[(2 << row) - 1] for row in range(rows)], device=self.device)
        seen = torch.ones(rows, slots, dtype=torch.bool, device=self.device).tril(context)
        yield Case(
            "tree_attention", rows, 2 * kv_heads * slots * head_dim * 2, copies,
            lambda i: self._launch(
                "tree_attention", dtype=CODE, q=q, q_stride=heads * head_dim, k_cache=k[i], v_cache=v[i],
                cache=(kv_heads, slots, head_dim), prefix=context, mask=masks, mask_words=1, out=out, scale=head_dim**-0.5,
                num_rows=rows, heads=heads, workspace=(rows, heads, head_dim, slots),
            ),
            lambda i: F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], k[i][None], v[i][None], attn_mask=seen, enable_gqa=True
            ),
            context=context,
        )  # fmt: skip

    def accept(self, rows: int) -> Iterator[Case]:
        vocab = self._vocab
        copies = self._copies(rows * vocab * 4)
        logits = self._random(copies, rows, vocab, dtype=torch.float32)
        drafts = logits[0, :-1].argmax(-1).int()
        likelihoods = self._empty(rows, dtype=torch.float32)
        argmax, path, accepted = (self._empty(rows, dtype=torch.int32) for _ in range(3))

        def by_torch(i: int) -> tuple:
            p = (logits[i, :-1] / 0.6).softmax(-1).gather(1, drafts.long()[:, None])
            return (p >= 0.1).int().cumprod(0).sum(), logits[i].argmax(-1)

        yield Case(
            "accept", rows, rows * vocab * 4, copies,
            lambda i: self._launch(
                "accept", logits=logits[i], drafts=drafts, threshold=0.1, score_temperature=0.6, match=False,
                likelihoods=likelihoods, argmax=argmax, path=path, accepted=accepted, num_rows=rows, vocab=vocab,
                workspace=(rows, vocab),
            ),
            by_torch,
        )  # fmt: skip

    def tree_expand(self, width: int) -> Iterator[Case]:
        vocab = self._vocab
        copies = self._copies(width * vocab * 4)
        logits = self._random(copies, width, vocab, dtype=torch.float32)
        scores = torch.zeros(width, device=self.device)
        tokens, parents, count = (self._empty(width, dtype=torch.int32) for _ in range(3))
        grown = self._empty(width, dtype=torch.float32)

        def by_torch(i: int) -> tuple:
            best = (logits[i] / 0.6).log_softmax(-1).topk(width)
            top = (best.values + scores[:, None]).flatten().topk(width)
            return top.values, best.indices.flatten()[top.indices], top.indices // width

        yield Case(
            "tree_expand", width, width * vocab * 4, copies,
            lambda i: self._launch(
                "tree_expand", logits=logits[i], scores=scores, score_temperature=0.6, prune=1.0, tokens=tokens,
                parents=parents, new_scores=grown, count=count, num_leaves=width, vocab=vocab, width=width,
                workspace=(width, vocab, width),
            ),
            by_torch,
        )  # fmt: skip

    def kv_rewrite(self, context: int) -> Iterator[Case]:
        """The accepted path of a tree, in all layers."""
        layers, kv_heads, head_dim = self.shape.layers, self.shape.kv_heads, self.shape.head_dim
        slots, moved = context + TREE_NODES, 15
        one = layers * kv_heads * slots * head_dim * 2
        copies = max(1, min(MIN_CALLS, self._cold // (2 * one)))
        k, v = (self._random(copies, layers, kv_heads, slots, head_dim) for _ in range(2))
        path = torch.arange(moved, device=self.device) * 8 + 3
        nodes = path.int()

        def by_torch(i: int) -> None:
            for cache in (k[i], v[i]):
                cache[:, :, context : context + moved] = cache[:, :, context + path]

        yield Case(
            f"kv_rewrite, {layers} layers", moved, 2 * 2 * layers * kv_heads * moved * head_dim * 2, copies,
            lambda i: self._launch(
                "kv_rewrite", dtype=CODE, k_cache=k[i], v_cache=v[i], path=nodes, cache=(kv_heads, slots, head_dim),
                layers=layers, start=context, length=moved,
            ),
            by_torch,
            context=context,
        )  # fmt: skip

    def all(self, rows: Sequence[int], densities: Sequence[float]) -> Iterator[Case]:
        for m in rows:
            yield from self.linear(m)
            yield from self.gate(m)
            for density in sorted(densities, reverse=True):
                yield from self.mlp(m, density)
                yield from self.fsparse(m, density)
            yield from self.rms_norm(m)
        del self._weights  # room for caches and logits
        for context in self._contexts:
            for m in rows:
                yield from self.attention(m, context)
        yield from self.kv_rewrite(self._contexts[len(self._contexts) // 2])
        for m in ACCEPT_ROWS:
            yield from self.accept(m)
        for width in (4, 8):
            yield from self.tree_expand(width)


def measure(case: Case, device: torch.device, rounds: int) -> dict:
    calls = range(case.copies) if case.copies >= MIN_CALLS else [i % case.copies for i in range(MIN_CALLS)]
    runs = {
        name: Repeated([lambda i=i, body=body: body(i) for i in calls], device)
        for name, body in (("ours", case.ours), ("torch", case.torch))
    }
    times = alternate(runs, rounds, case.op)
    return {
        "op": case.op,
        "rows": case.rows,
        "density": case.density,
        "context": case.context,
        "us": times["ours"] * 1e6,
        "gb_per_s": case.bytes / times["ours"] / 1e9,
        "torch_us": times["torch"] * 1e6,
        "vs_torch": times["torch"] / times["ours"],
    }


def bench(
    shapes: Sequence[str],
    rows: Sequence[int],
    densities: Sequence[float],
    rounds: int,
    device: torch.device,
    cases: Callable[[Shape, torch.device], Cases] = Cases,
    bandwidth: dict[str, float] | None = None,
    on_result: Callable[[dict], object] = lambda record: None,
) -> dict:
    """Measure and print. Returns what is saved: the bandwidths in bytes a second, and one record a case. on_result: gets the same
    after each case, as far as it is known."""
    bandwidth = dict(bandwidth or read_bandwidth(device))
    records: list[dict] = []
    for name in shapes:
        for case in cases(shape_of(name), device).all(rows, densities):
            records.append({"shape": name, **measure(case, device, rounds)})
            on_result({"bandwidth": bandwidth, "results": records})
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' memory
    linear = [record["gb_per_s"] * 1e9 for record in records if record["op"].startswith("linear") and record["rows"] == 1]
    bandwidth["linear, 1 row"] = max(linear, default=0.0)
    best = max(bandwidth.values())
    dense = {(r["shape"], r["op"], r["rows"]): r["us"] for r in records if r["density"] == 1}
    for record in records:
        record["share"] = record["gb_per_s"] * 1e9 / best
        full = dense.get((record["shape"], record["op"], record["rows"]))
        record["vs_dense"] = record["us"] / full if full and record["density"] != 1 else None
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in bandwidth.items())
    console.print(f"bandwidth: {rates}; the best of them is 100 %")
    for name in shapes:
        console.print(table(name, [record for record in records if record["shape"] == name]))
    return {"bandwidth": bandwidth, "results": records}


def table(name: str, records: list[dict]) -> Table:
    out = Table(title=f"{name}, bf16, cold; vs dense: time over the time at density 1")
    for column in ("op", "rows", "context", "density", "us", "GB/s", "of read", "torch us", "vs torch", "vs dense"):
        out.add_column(column, justify="left" if column == "op" else "right")
    for r in records:
        out.add_row(
            r["op"],
            str(r["rows"]),
            str(r["context"] or ""),
            "" if r["density"] is None else str(r["density"]),
            f"{r['us']:.1f}",
            f"{r['gb_per_s']:.0f}",
            f"{r['share']:.0%}",
            f"{r['torch_us']:.1f}",
            f"{r['vs_torch']:.2f}",
            "" if r["vs_dense"] is None else f"{r['vs_dense']:.2f}",
        )
    return out
