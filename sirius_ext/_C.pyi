"""The compiled extension: python/bindings.cpp. Its functions take the fields of csrc/params.h by their names (python/fields.h).

An address is an int; 0 is null. Structs inside a struct may also be given as a dict, or as a tuple in the fields' order.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeAlias

_Address: TypeAlias = int
# In order: weight, bias.
_Projection: TypeAlias = tuple[Matrix, _Address] | tuple[Matrix] | dict[str, Any]
# In order: weight, eps, offset.
_Norm: TypeAlias = tuple[_Address, float, float] | tuple[_Address, float] | dict[str, Any]
# In order: kv_heads, capacity, head_dim.
_CacheShape: TypeAlias = tuple[int, int, int] | dict[str, int]
# In order: kind, neurons, thresholds, kept.
_Sparsity: TypeAlias = tuple[int, _Address, _Address, int] | dict[str, int]

# In order: statistic, down_squares, decay.
_Watch: TypeAlias = tuple[_Address, _Address, float] | dict[str, Any]

# The same for CUDA devices, in builds that have it. Its ops take `workspace`, `counters` and `stream` in place of `threads`, and
# `<op>_workspace` says how large an op's workspace is.
cuda: ModuleType

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def checksums(data: _Address, size: int, count: int, sums: _Address, /) -> None: ...

class Matrix:
    def __init__(
        self,
        *,
        data: _Address,
        format: int,
        rows: int,
        cols: int,
        stride: int,
        lower: _Address = ...,
        lower_stride: int = ...,
        shared: _Address = ...,
        places: _Address = ...,
        place_at: int = ...,
        neuron_of: _Address = ...,
    ) -> None: ...

class Stream:
    address: int
    # layers: of each its images, as (at, bundle, nbytes, rows, resident).
    def __init__(
        self,
        *,
        path: str,
        rows: int,
        layers: list[list[tuple[int, int, int, int, int]]],
        checks: _Address,
        buffers: int,
        slots: int,
        readers: int,
        patience: float,
    ) -> None: ...
    def image(self, layer: int, number: int, /) -> _Address: ...
    def places(self, layer: int, /) -> _Address: ...
    def fill(self, layer: int, /) -> None: ...
    def need(self, layer: int, /) -> None: ...
    def done(self, layer: int, /) -> None: ...
    def hold(self, neurons: _Address, count: int, /) -> None: ...
    def keep(self, layer: int, neurons: _Address, count: int, /) -> None: ...
    def statistics(self) -> tuple[int, int, float, float]: ...

class Model:
    # layers: LayerWeights, by their fields' names.
    def __init__(
        self,
        *,
        dtype: int,
        embedding: Matrix,
        final_norm: _Norm = ...,
        lm_head: Matrix,
        hidden: int,
        intermediate: int,
        vocab: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        activation: int = ...,
        embedding_scale: float = ...,
        residual_scale: float = ...,
        attention_scale: float = ...,
        attention_softcap: float = ...,
        logit_scale: float = ...,
        logit_softcap: float = ...,
        stream: _Address = ...,
        head_rows: int = ...,
        layers: list[dict[str, Any]],
    ) -> None: ...
    def workspace(self, num_rows: int, slots: int, /) -> int: ...
    def step(
        self,
        *,
        tokens: _Address,
        positions: _Address,
        cos: _Address,
        sin: _Address,
        max_position: int,
        mask: _Address,
        mask_words: int,
        k_cache: _Address,
        v_cache: _Address,
        sparsity: _Sparsity,
        logits: _Address,
        argmax: _Address = ...,
        workspace: _Address,
        z: _Address = ...,
        watch: _Watch = ...,
        num_rows: int,
        first_slot: int,
        prefix: int = ...,
        capacity: int,
        threads: int,
    ) -> None: ...

def pack(*, dtype: int, x: _Address, out: Matrix, threads: int) -> None: ...
def unpack(
    *,
    dtype: int,
    matrix: Matrix,
    first_row: int,
    num_rows: int,
    first_col: int,
    num_cols: int,
    out: _Address,
    threads: int,
) -> None: ...
def linear(
    *,
    dtype: int,
    x: _Address,
    parts: Sequence[_Projection],
    residual: _Address = ...,
    out: _Address,
    out_f32: bool = ...,
    scale: float = ...,
    softcap: float = ...,
    num_rows: int,
    out_features: int,
    threads: int,
) -> None: ...
def gate_up(
    *,
    dtype: int,
    x: _Address,
    gate: Matrix,
    up: Matrix,
    neurons: _Address = ...,
    out: _Address,
    activation: int = ...,
    num_rows: int,
    num_neurons: int,
    threads: int,
) -> None: ...
def gate(*, dtype: int, x: _Address, gate: Matrix, out: _Address, activation: int = ..., num_rows: int, threads: int) -> None: ...
def select(
    *,
    gates: _Address,
    threshold: _Address = ...,
    neurons: _Address,
    count: _Address,
    alive: _Address = ...,
    num_rows: int,
    intermediate: int,
    kept: int = ...,
    threads: int,
) -> None: ...
def follow(
    *,
    dtype: int,
    z: _Address,
    rows: _Address,
    count_at: _Address = ...,
    fault: _Address = ...,
    down_squares: _Address,
    statistic: _Address,
    neurons: _Address,
    decay: float,
    layers: int,
    num_rows: int,
    intermediate: int,
    kept: int,
    count: int = ...,
    threads: int,
) -> None: ...
def up(
    *,
    dtype: int,
    x: _Address,
    up: Matrix,
    gates: _Address,
    neurons: _Address,
    num_neurons_at: _Address = ...,
    out: _Address,
    num_rows: int,
    num_neurons: int,
    threads: int,
) -> None: ...
def down(
    *,
    dtype: int,
    x: _Address,
    down: Matrix,
    neurons: _Address = ...,
    num_neurons_at: _Address = ...,
    residual: _Address = ...,
    out: _Address,
    scale: float = ...,
    num_rows: int,
    num_neurons: int,
    threads: int,
) -> None: ...
def rms_norm(
    *,
    dtype: int,
    x: _Address,
    norm: _Norm,
    residual: _Address = ...,
    out: _Address,
    num_rows: int,
    hidden: int,
    threads: int,
) -> None: ...
def rope_kv_write(
    *,
    dtype: int,
    qkv: _Address,
    q_norm: _Norm = ...,
    k_norm: _Norm = ...,
    cos: _Address,
    sin: _Address,
    positions: _Address,
    slots: _Address = ...,
    first_slot: int = ...,
    base: _Address = ...,
    k_cache: _Address,
    v_cache: _Address,
    cache: _CacheShape,
    num_rows: int,
    heads: int,
    rotary_dim: int,
    threads: int,
) -> None: ...
def tree_mask(*, parents: _Address, mask: _Address, num_nodes: int, mask_words: int, threads: int) -> None: ...
def tree_attention(
    *,
    dtype: int,
    q: _Address,
    q_stride: int,
    k_cache: _Address,
    v_cache: _Address,
    cache: _CacheShape,
    prefix: int = ...,
    base: _Address = ...,
    mask: _Address,
    mask_words: int,
    positions: _Address = ...,
    window: int = ...,
    out: _Address,
    scale: float = ...,
    softcap: float = ...,
    num_rows: int,
    heads: int,
    threads: int,
) -> None: ...
def tree_expand(
    *,
    logits: _Address,
    scores: _Address,
    score_temperature: float,
    prune: float,
    tokens: _Address,
    parents: _Address,
    new_scores: _Address,
    count: _Address,
    fault: _Address = ...,
    num_leaves: int,
    vocab: int,
    width: int,
    threads: int,
) -> None: ...
def accept(
    *,
    logits: _Address,
    drafts: _Address,
    parents: _Address = ...,
    scores: _Address = ...,
    threshold: float,
    score_temperature: float,
    match: bool,
    likelihoods: _Address,
    argmax: _Address,
    path: _Address,
    accepted: _Address,
    limit: _Address = ...,
    fault: _Address = ...,
    num_rows: int,
    vocab: int,
    threads: int,
) -> None: ...
def argmax(*, logits: _Address, argmax: _Address, num_rows: int, vocab: int, threads: int) -> None: ...
def kv_rewrite(
    *,
    dtype: int,
    k_cache: _Address,
    v_cache: _Address,
    path: _Address,
    base: _Address = ...,
    length_at: _Address = ...,
    cache: _CacheShape,
    layers: int,
    start: int,
    length: int = ...,
    threads: int,
) -> None: ...
