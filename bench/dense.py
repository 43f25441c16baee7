"""The dense baseline: the model in plain torch, each layer compiled by torch.compile, a whole step, the choice of the token
included, replayed as one CUDA graph.

That is how gpt-fast decodes (static cache, fused q, k and v, coordinate descent tuning). It compiles a step as a whole and has
inductor capture it; here one compiled layer serves all of them, which takes seconds."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from timing import Clock
from torch import nn

from sirius_ext.kernels import products
from sirius_ext.kernels.matrix import Matrix
from sirius_ext.models.weights import Layer, Projection, Weights
from sirius_ext.runtime.layers import attention_of, decoder_layer, embed, norm


class Dense:
    """A loaded `transformers` model of a supported family; it shares the model's weights.

    slots: tokens that the cache holds.
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        self._weights = w = Weights(model)
        self.device = w.device
        self._layers = [dataclasses.replace(layer, qkv=(_fused(layer),)) for layer in w.layers]
        shape = len(w.layers), w.kv_heads, slots, w.head_dim
        self._k, self._v = (torch.zeros(shape, dtype=w.dtype, device=self.device) for _ in range(2))
        places = torch.arange(slots, device=self.device)
        self._cos, self._sin = w.angles(places)
        self._seen = {window: places <= places[:, None] for window in {layer.window for layer in w.layers}}
        for window, seen in self._seen.items():
            if window:
                seen &= places > places[:, None] - window
        self._token, self._position = (torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(2))
        self._text = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._compiled = self._layer
        if self.device.type == "cuda":
            options = {"coordinate_descent_tuning": True}
            self._compiled = torch.compile(self._layer, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def decode(self, ids: torch.Tensor, count: int) -> tuple[list[int], float]:
        """ids: int64 [1, t]; t + count at most the slots. Returns `count` tokens and the seconds of all but the first."""
        prompt = ids[0].to(self.device)
        first = self._next(prompt, torch.arange(len(prompt), device=self.device), self._layer)
        self._start(first, len(prompt))
        if self.device.type == "cuda" and self._graph is None:
            self._capture()
            self._start(first, len(prompt))
        clock = Clock(self.device)
        start = clock.mark()
        for _ in range(count - 1):
            self._step() if self._graph is None else self._graph.replay()
        seconds = clock.seconds(start, clock.mark())
        return self._text[len(prompt) : len(prompt) + count].tolist(), seconds

    def _start(self, token: torch.Tensor, position: int) -> None:
        self._token.copy_(token)
        self._position.fill_(position)
        self._text[position : position + 1] = token

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.synchronize(self.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._step()

    def _step(self) -> None:
        """The token at `_position` through all layers; the next one takes its place."""
        self._token.copy_(self._next(self._token, self._position, self._compiled))
        self._position.add_(1)
        self._text.index_copy_(0, self._position, self._token)

    def _next(self, tokens: torch.Tensor, positions: torch.Tensor, layer_step) -> torch.Tensor:
        w = self._weights
        x, angles = embed(w, tokens), (self._cos[:, positions], self._sin[:, positions])
        for index, layer in enumerate(self._layers):
            seen = self._seen[layer.window][positions]
            x = layer_step(layer, x, angles, seen, positions, self._k[index], self._v[index])
        return products.dot(norm(w.description, x[-1:], w.final_norm), w.lm_head).argmax(-1)

    def _layer(self, layer, x, angles, seen, positions, k_cache, v_cache):
        d = self._weights.description

        def attend(q, k, v):
            k_cache[:, positions], v_cache[:, positions] = k.transpose(0, 1), v.transpose(0, 1)
            if len(q) > 1 or d.attention_softcap:
                return attention_of(d, q, k_cache, v_cache, seen)
            # The heads that share keys as so many queries: with a mask torch has no fast kernel that knows of groups.
            grouped = q.view(1, d.kv_heads, d.heads // d.kv_heads, d.head_dim)
            mask = seen[None, None].expand(1, d.kv_heads, d.heads // d.kv_heads, -1)
            attended = F.scaled_dot_product_attention(grouped, k_cache[None], v_cache[None], mask, scale=d.attention_scale)
            return attended.reshape(1, -1)

        return decoder_layer(d, layer, x, angles, attend)


def _fused(layer: Layer) -> Projection:
    """q, k and v as one matrix: fewer kernels."""
    biases = [part.bias for part in layer.qkv if part.bias is not None]
    return Projection(Matrix(torch.cat([part.weight.data for part in layer.qkv])), torch.cat(biases) if biases else None)
