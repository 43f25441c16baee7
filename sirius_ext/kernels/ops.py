"""The kernels, one typed function each: check every argument, then call the compiled extension.

Shapes use m rows of input, H hidden, I intermediate, K kept neurons, V vocabulary, L layers, C cache capacity, D head_dim.
T is float32, float16 or bfloat16, the same for every argument marked T; sums are float32. All tensors are contiguous unless
a docstring says otherwise. Each function has a twin of the same name and signature in `reference.py`, in plain torch.

A weight is a tensor, or a `Matrix` of the same shape, whose rows may stand apart.

Every kernel on rows is *batch-invariant*: the bits of a row do not depend on how many rows are computed beside it, nor on the
number of threads. A wrong argument raises `TypeError` (dtype) or `ValueError` (shape, device, value) that names it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from .. import _C
from . import q4
from .dispatch import check_device, is_cuda, run
from .matrix import Format, Matrix, matrix_of

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def isa() -> str:
    """The kernel bodies in use: "amx", "avx512", "avxvnni", "avx2" or "scalar"; in a build for tests also "amx-soft"."""
    return _C.isa()


def available_isas() -> list[str]:
    """The kernel bodies that this CPU can run, best first."""
    return _C.available_isas()


def set_isa(name: str) -> None:
    """Use the bodies called `name` from now on, in every engine of the process. ValueError if this CPU lacks them."""
    _C.set_isa(name)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _on_one_device(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """All tensors of a call stand on the device of the first, and this build has kernels for it."""
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def checked(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        first = None
        for name, value in (*zip(names, arguments), *named.items()):
            if not isinstance(value, (torch.Tensor, Matrix)):
                continue
            if first is None:
                check_device(name, value.device)
                first = value.device
            elif value.device != first:
                raise ValueError(
                    f"{name}: expected a tensor on {first}, as the arguments before it are, got one on {value.device}"
                )
        return op(*arguments, **named)

    return checked


def _check_is_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> int:
    """Check `tensor` and return its address. `None` in `shape` matches any size."""
    _check_is_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, tensor.shape)):
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{want}], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _check_rows(name: str, tensor: torch.Tensor, *shape: int | None) -> int:
    """Like `_check` for the argument that decides T."""
    _check_is_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    return _check(name, tensor, tensor.dtype, *shape)


def _optional(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, *shape: int | None) -> int:
    return 0 if tensor is None else _check(name, tensor, dtype, *shape)


def _output(out: torch.Tensor | None, device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, int]:
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    return out, _check("out", out, dtype, *shape)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_indices(name: str, indices: torch.Tensor, limit: int) -> None:
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < limit):
        raise ValueError(f"{name}: expected values in [0, {limit}), got {int(indices.min())} to {int(indices.max())}")


def _check_neurons(neurons: torch.Tensor | None, intermediate: int) -> tuple[int, int]:
    """Address and length of a neuron list; all of them without one."""
    if neurons is None:
        return 0, intermediate
    address = _check("neurons", neurons, torch.int32, None)
    _positive("neurons", neurons.numel())
    _check_indices("neurons", neurons, intermediate)
    return address, neurons.numel()


def _check_activation(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


def _check_softcap(softcap: float) -> float:
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a number of at least 0, got {softcap}")
    return float(softcap)


def _check_matrix(name: str, weight: torch.Tensor | Matrix, dtype: torch.dtype, *shape: int | None) -> Matrix:
    """Check a weight for input of `dtype`: like `_check`, but a `Matrix` may have its rows apart."""
    if not isinstance(weight, Matrix):
        _check(name, weight, dtype, *shape)
        return matrix_of(weight)
    data = weight.data
    if data.dim() == 2 and data.stride(1) == 1:
        data = data.as_strided(data.shape, (data.shape[1], 1))  # `_check` then finds nothing wrong with its strides
    if weight.packed is not None:  # for input of any dtype
        _check_is_tensor(name, weight.data)
        planes = (2,) if weight.format == Format.Q8 and weight.apart is None else ()
        if weight.data.stride(-1) == 1:
            data = torch.empty(weight.data.shape, dtype=weight.data.dtype, device="meta")
        _check(name, data, torch.uint8, *planes, None, weight.format.row_bytes(weight.cols))
        _check_shared(name, weight)
        if is_cuda(weight.device):
            if any(place % 16 for place in _alignments(weight)):
                raise ValueError(f"{name}: expected rows that begin at multiples of 16 bytes, got a stride of {weight.stride}")
            if weight.shared is not None and (place := weight.shared.data_ptr() % 16):
                raise ValueError(f"{name}: shared: expected to begin at a multiple of 16 bytes, got {place} bytes after one")
        data = torch.empty(weight.shape, dtype=dtype, device="meta")
    _check(name, data, dtype, *shape)
    return weight


def _alignments(weight: Matrix) -> tuple[int, ...]:
    """Addresses and strides that decide where the parts of a packed matrix's rows are."""
    parts = (weight.upper, weight.lower) if weight.format == Format.Q8 else (weight.data,)
    return tuple(place for part in parts for place in (part.data_ptr(), part.stride(0)))


def _check_shared(name: str, weight: Matrix) -> None:
    """The scales that a matrix of four bits has beside its rows."""
    if weight.format.across:
        if weight.shared is None:
            raise ValueError(f"{name}: expected a matrix of the format {weight.format.name} with its shared scales, got none")
        form = weight.cols, weight.format.supers
        if weight.neuron_of is None:
            _check(f"{name}: shared", weight.shared, torch.uint8, q4.shared_bytes(weight.rows, *form))
            return
        if not is_cuda(weight.device):
            raise ValueError(f"{name}: neuron_of: expected a matrix on a CUDA device, got one on {weight.device}")
        _check(f"{name}: shared", weight.shared, torch.uint8, None)
        _check(f"{name}: neuron_of", weight.neuron_of, torch.int32, weight.rows)
        _check_indices(f"{name}: neuron_of", weight.neuron_of, q4.shared_rows(weight.shared.numel(), *form))


def _check_lies(name: str, weight: Matrix, across: bool) -> None:
    """ValueError for a matrix of four bits whose groups lie the other way."""
    if weight.format.four_bits and weight.format.across != across:
        wanted = ("across", "added up") if across else ("along", "multiplied")
        raise ValueError(f"{name}: expected groups {wanted[0]} the rows, which are {wanted[1]}, got {weight.format.name}")


def _check_product(x: torch.Tensor, weight: torch.Tensor | Matrix, name: str = "weight") -> tuple[int, Matrix, int, int]:
    """Check x, T [m, width], and weight, T [rows, width], called `name`: neither may be empty.

    Returns x's address, the matrix, m and rows.
    """
    px = _check_rows("x", x, None, None)
    m, width = x.shape
    matrix = _check_matrix(name, weight, x.dtype, None, width)
    for size, of in ((m, "x"), (width, "x"), (matrix.rows, name)):
        _positive(f"{of}: size", size)
    _check_lies(name, matrix, across=False)
    return px, matrix, m, matrix.rows


@_on_one_device
def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`cap(scale * (x @ weight.T + bias)) + residual`, rounded once. cap(v) is `softcap * tanh(v / softcap)`, or v if softcap
    is 0.

    x: T [m, in].
    weight: T [out, in].
    bias: T [out].
    residual: T [m, out], which may be `out`.
    softcap: at least 0.
    Returns T [m, out], or float32 with `out_dtype=torch.float32`.
    """
    px, matrix, m, rows = _check_product(x, weight)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in (x.dtype, torch.float32):
        raise TypeError(f"out_dtype: expected {x.dtype} or torch.float32, got {out_dtype}")
    pb = _optional("bias", bias, x.dtype, rows)
    pr = _optional("residual", residual, x.dtype, m, rows)
    softcap = _check_softcap(softcap)
    out, po = _output(out, x.device, out_dtype, m, rows)
    run(
        x.device,
        "linear",
        dtype=DTYPES[x.dtype],
        x=px,
        parts=[(matrix.raw, pb)],
        residual=pr,
        out=po,
        out_f32=out_dtype == torch.float32,
        scale=float(scale),
        softcap=softcap,
        num_rows=m,
        out_features=rows,
    )
    return out


@_on_one_device
def gate_up(
    x: torch.Tensor,
    gate: torch.Tensor | Matrix,
    up: torch.Tensor | Matrix,
    neurons: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(gate x) * (up x)` for the listed neurons, or for all of them (SPEC section 1).

    x: T [m, H].
    gate, up: T [I, H].
    neurons: int32 [K], values in [0, I).
    activation: act, "silu" or "gelu_tanh", `0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))`.
    Returns T [m, K].
    """
    px, gates, m, intermediate = _check_product(x, gate, "gate")
    ups = _check_matrix("up", up, x.dtype, intermediate, gates.cols)
    _check_lies("up", ups, across=False)
    if ups.format != gates.format and (gates.plain or ups.plain):
        raise ValueError(f"up: expected a matrix of the format {gates.format.name}, as gate's, got {ups.format.name}")
    pn, kept = _check_neurons(neurons, intermediate)
    act = _check_activation(activation)
    out, po = _output(out, x.device, x.dtype, m, kept)
    shared: dict[str, Any] = {"dtype": DTYPES[x.dtype], "x": px, "neurons": pn, "num_rows": m, "num_neurons": kept}
    if ups.format == gates.format or not is_cuda(x.device):
        run(x.device, "gate_up", **shared, gate=gates.raw, up=ups.raw, out=po, activation=act)
        return out
    values = torch.empty(m, intermediate, dtype=torch.float32, device=x.device)  # no kernel reads two formats
    run(x.device, "gate", **shared, gate=gates.raw, out=values.data_ptr(), activation=act)
    run(x.device, "up", **shared, up=ups.raw, gates=values.data_ptr(), out=po)
    return out


@_on_one_device
def gate(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    neurons: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(gate x)` of the listed neurons, or of all, not rounded: what FSparse and the cascade choose their neurons by (SPEC
    section 2).

    x: T [m, H].
    weight: T [I, H].
    neurons: int32 [K], values in [0, I).
    activation: as in `gate_up`.
    Returns float32 [m, I], each neuron's value at its place; those of the others stay what they are in `out`, or are zero.
    """
    px, matrix, m, intermediate = _check_product(x, weight)
    pn, listed = _check_neurons(neurons, intermediate)
    act = _check_activation(activation)
    out, po = _output(_places(out, neurons, x, intermediate), x.device, torch.float32, m, intermediate)
    run(
        x.device,
        "gate",
        dtype=DTYPES[x.dtype],
        x=px,
        gate=matrix.raw,
        neurons=pn,
        out=po,
        activation=act,
        num_rows=m,
        num_neurons=listed,
    )
    return out


def _places(out: torch.Tensor | None, neurons: torch.Tensor | None, x: torch.Tensor, intermediate: int) -> torch.Tensor | None:
    """Where listed neurons' values go to their places: zeros, if the caller has nothing there."""
    if out is None and neurons is not None:
        return torch.zeros(len(x), intermediate, dtype=torch.float32, device=x.device)
    return out


@_on_one_device
def select(
    values: torch.Tensor,
    kept: int | None = None,
    threshold: float | None = None,
    *,
    among: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    taken: torch.Tensor | None = None,
) -> torch.Tensor:
    """Neurons by their values in a pass (SPEC section 2), by `score = (sum of |values| over the rows) * weights`: the `kept`
    largest, of equals the lower index; or with a threshold all whose score is at least m times it.

    values: float32 [m, I]; what stands at the places of neurons that cannot be chosen is not read.
    kept, threshold: one of them; kept is 1 to the number of candidates.
    among: int32 [candidates], rising: no others are chosen; without it all may be.
    weights: float32 [I], at least 0; without it 1.
    taken: T [m, kept], gets the values of those chosen, rounded.
    Returns int32 [K], rising.
    """
    pv = _check("values", values, torch.float32, None, None)
    m, intermediate = values.shape
    _positive("values: rows", m)
    _positive("values: neurons", intermediate)
    pa = _optional("among", among, torch.int32, None)
    candidates = intermediate if among is None else _positive("among: size", among.numel())
    if among is not None:
        _check_indices("among", among, intermediate)
        if bool((among[1:] <= among[:-1]).any()):
            raise ValueError(f"among: expected rising values, got {among.tolist()}")
    pw = _optional("weights", weights, torch.float32, intermediate)
    if (kept is None) == (threshold is None):
        raise ValueError(f"kept, threshold: expected one of them, got {kept} and {threshold}")
    if kept is not None and not 1 <= kept <= candidates:
        raise ValueError(f"kept: expected 1 to {candidates}, got {kept}")
    pt = 0
    if taken is not None:
        if kept is None:
            raise ValueError("taken: it needs kept, a number that is known")
        pt = _check_rows("taken", taken, m, kept)
    neurons = torch.empty(candidates, dtype=torch.int32, device=values.device)
    count = torch.empty(1, dtype=torch.int32, device=values.device)
    limit = None if threshold is None else torch.tensor([threshold], dtype=torch.float32, device=values.device)
    run(
        values.device,
        "select",
        workspace=(candidates,),
        dtype=DTYPES[torch.float32 if taken is None else taken.dtype],
        values=pv,
        among=pa,
        weights=pw,
        threshold=0 if limit is None else limit.data_ptr(),
        neurons=neurons.data_ptr(),
        count=count.data_ptr(),
        taken=pt,
        num_rows=m,
        intermediate=intermediate,
        candidates=candidates,
        kept=kept or 0,
    )
    return neurons[: int(count)]


@_on_one_device
def follow(
    z: torch.Tensor,
    rows: torch.Tensor,
    down_squares: torch.Tensor,
    statistic: torch.Tensor,
    kept: int,
    decay: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sets of a sparse model that follows the text, after a verification (SPEC section 2). `statistic`, float32 [L, I],
    becomes `decay * statistic + (1 - decay) * (z / ||z||_2)^2` for each row that joined the sequence; kept are the neurons of the
    largest `statistic * down_squares`.

    z: T [L, m, I], `act(gate x) * (up x)` of a pass through F.
    rows: int32 [a], in [0, m), in the order of the text; may be empty.
    down_squares: float32 [L, I], `||down_i||_2^2`.
    Returns int32 [L, kept], ascending; of equal scores the lower index wins.
    """
    pz = _check_rows("z", z, None, None, None)
    layers, m, intermediate = z.shape
    pr = _check("rows", rows, torch.int32, None)
    pd = _check("down_squares", down_squares, torch.float32, layers, intermediate)
    ps = _check("statistic", statistic, torch.float32, layers, intermediate)
    for name, size in (("layers", layers), ("rows", m), ("neurons", intermediate)):
        _positive(f"z: {name}", size)
    if not 1 <= kept <= intermediate:
        raise ValueError(f"kept: expected 1 to {intermediate}, got {kept}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected 0 to 1, got {decay}")
    _check_indices("rows", rows, m)
    out, po = _output(out, z.device, torch.int32, layers, kept)
    run(
        z.device,
        "follow",
        workspace=(layers, m, intermediate),
        dtype=DTYPES[z.dtype],
        z=pz,
        rows=pr,
        down_squares=pd,
        statistic=ps,
        neurons=po,
        decay=decay,
        layers=layers,
        num_rows=m,
        intermediate=intermediate,
        kept=kept,
        count=len(rows),
    )
    return out


@_on_one_device
def up(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    gates: torch.Tensor,
    neurons: torch.Tensor,
    *,
    spread: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gates * (up x)` for the listed neurons, rounded once: `gate_up` for gates that are known.

    x: T [m, H].
    weight: T [I, H].
    gates: float32 [m, I].
    neurons: int32 [K], values in [0, I).
    Returns T [m, K]; or with `spread` float32 [m, I], not rounded, each neuron's value at its place as in `gate`.
    """
    px, matrix, m, intermediate = _check_product(x, weight)
    pg = _check("gates", gates, torch.float32, m, intermediate)
    pn = _check("neurons", neurons, torch.int32, None)
    _check_indices("neurons", neurons, intermediate)
    kept = neurons.numel()
    if spread:
        out, po = _output(_places(out, neurons, x, intermediate), x.device, torch.float32, m, intermediate)
    else:
        out, po = _output(out, x.device, x.dtype, m, kept)
    run(
        x.device,
        "up",
        dtype=DTYPES[x.dtype],
        x=px,
        up=matrix.raw,
        gates=pg,
        neurons=pn,
        out=po,
        spread=spread,
        num_rows=m,
        num_neurons=kept,
    )
    return out


@_on_one_device
def down(
    x: torch.Tensor,
    weight: torch.Tensor | Matrix,
    neurons: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale * sum_i x[:, i] * weight[neurons[i]] + residual`, rounded once.

    x: T [m, K].
    weight: T [I, H], `down_proj` transposed.
    neurons: int32 [K], values in [0, I); without it K is I.
    residual: T [m, H], which may be `out`.
    Returns T [m, H].
    """
    px = _check_rows("x", x, None, None)
    matrix = _check_matrix("weight", weight, x.dtype, None, None)
    hidden = matrix.cols
    for size, name in ((x.shape[0], "x"), (matrix.rows, "weight"), (hidden, "weight")):
        _positive(f"{name}: size", size)
    _check_lies("weight", matrix, across=True)
    pn, kept = _check_neurons(neurons, matrix.rows)
    _check("x", x, x.dtype, None, kept)
    m = x.shape[0]
    pr = _optional("residual", residual, x.dtype, m, hidden)
    out, po = _output(out, x.device, x.dtype, m, hidden)
    run(
        x.device,
        "down",
        workspace=(m, hidden, kept),
        dtype=DTYPES[x.dtype],
        x=px,
        down=matrix.raw,
        neurons=pn,
        residual=pr,
        out=po,
        scale=float(scale),
        num_rows=m,
        num_neurons=kept,
    )
    return out


@_on_one_device
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset) + residual`, rounded once.

    x: T [m, H], which may be `out`.
    weight: T [H].
    residual: T [m, H], which may be `out`.
    Returns T [m, H].
    """
    px = _check_rows("x", x, None, None)
    m, hidden = x.shape
    _positive("x: size", m)
    _positive("x: size", hidden)
    pw = _check("weight", weight, x.dtype, hidden)
    pr = _optional("residual", residual, x.dtype, m, hidden)
    out, po = _output(out, x.device, x.dtype, m, hidden)
    run(
        x.device,
        "rms_norm",
        dtype=DTYPES[x.dtype],
        x=px,
        norm=(pw, float(eps), float(offset)),
        residual=pr,
        out=po,
        num_rows=m,
        hidden=hidden,
    )
    return out


def _check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> tuple[int, int]:
    pk = _check("k_cache", k_cache, dtype, *shape)
    return pk, _check("v_cache", v_cache, dtype, *k_cache.shape)


@_on_one_device
def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> None:
    """Rotate q and k by their positions (half-split pairs, as Llama does); q stays in `qkv`, k and v go to their cache slots.
    With q_norm or k_norm each head of q or k is first normalised, as by `rms_norm`; it is rounded once, at the end.

    qkv: T [m, (heads + 2 * kv_heads) * D], its q part is overwritten.
    cos, sin: float32 [P, R / 2]; of each head the first R <= D elements are rotated, and with R = 0 none.
    positions: int32 [m] < P.
    slots: int32 [m] < C, distinct.
    k_cache, v_cache: T [kv_heads, C, D].
    q_norm, k_norm: T [D].
    """
    pq = _check_rows("qkv", qkv, None, None)
    m = _positive("qkv: rows", qkv.shape[0])
    pk, pv = _check_cache(k_cache, v_cache, qkv.dtype, None, None, None)
    kv_heads, capacity, head_dim = k_cache.shape
    heads, rest = divmod(qkv.shape[1] - 2 * kv_heads * head_dim, head_dim)
    if rest or heads < 1 or heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"qkv: expected [m, (heads + 2 * {kv_heads}) * {head_dim}] with heads a multiple of {kv_heads} and an even head "
            f"size, got {list(qkv.shape)}"
        )
    pc = _check("cos", cos, torch.float32, None, None)
    half = cos.shape[1]
    if half > head_dim // 2:
        raise ValueError(f"cos: expected shape [any, at most {head_dim // 2}], got {list(cos.shape)}")
    ps = _check("sin", sin, torch.float32, cos.shape[0], half)
    pp = _check("positions", positions, torch.int32, m)
    pl = _check("slots", slots, torch.int32, m)
    _check_indices("positions", positions, cos.shape[0])
    _check_indices("slots", slots, capacity)
    if slots.unique().numel() != m:
        raise ValueError(f"slots: expected distinct values, got {slots.tolist()}")
    norms = [
        (_optional(name, weight, qkv.dtype, head_dim), float(eps), float(offset))
        for name, weight in (("q_norm", q_norm), ("k_norm", k_norm))
    ]
    run(
        qkv.device,
        "rope_kv_write",
        dtype=DTYPES[qkv.dtype],
        qkv=pq,
        q_norm=norms[0],
        k_norm=norms[1],
        cos=pc,
        sin=ps,
        positions=pp,
        slots=pl,
        k_cache=pk,
        v_cache=pv,
        cache=(kv_heads, capacity, head_dim),
        num_rows=m,
        heads=heads,
        rotary_dim=2 * half,
    )


@_on_one_device
def tree_mask(parents: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tree attention mask as bits: bit b of row i is set when node b is i or an ancestor of i (SPEC section 4).

    parents: int32 [m]; parents[i] is -1 (no parent in the window), or at least 0 and smaller than i. A chain is [-1, 0, 1, ...].
    Returns int64 [m, ceil(m / 64)], bit b in word b // 64.
    """
    pp = _check("parents", parents, torch.int32, None)
    m = _positive("parents: size", parents.numel())
    if bool((parents >= torch.arange(m, dtype=torch.int32, device=parents.device)).any()) or int(parents.min()) < -1:
        raise ValueError(f"parents: expected -1 <= parents[i] < i, got {parents.tolist()}")
    words = (m + 63) // 64
    out, po = _output(out, parents.device, torch.int64, m, words)
    run(parents.device, "tree_mask", parents=pp, mask=po, num_nodes=m, mask_words=words)
    return out


@_on_one_device
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix: int,
    mask: torch.Tensor,
    scale: float,
    *,
    positions: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of m rows over the shared cache: row i sees slots [0, prefix) and slot prefix + b for each bit b of mask[i], but
    with a window none of the slots [0, positions[i] - window]. A slot that no row sees is never read. Scores are
    `cap(scale * q k)`, with cap as in `linear`.

    q: T [m, heads, D]; rows may stand apart, so that q can be a view of the fused qkv.
    k_cache, v_cache: T [kv_heads, C, D].
    prefix: 0 to C.
    mask: int64 [m, words], no bit beyond slot C; every row sees at least one slot.
    positions: int32 [m], prefix - 1 to prefix - 1 + window; needed with a window only. The slots of a row's bits hold the tokens
        up to its position.
    window: tokens that a row sees at most, or 0 for no limit.
    softcap: at least 0.
    Returns T [m, heads, D].
    """
    _check_is_tensor("q", q)
    if q.dim() != 3 or q.stride(2) != 1 or q.stride(1) != q.shape[2] or q.stride(0) < q.shape[1] * q.shape[2]:
        raise ValueError(f"q: expected [m, heads, D] with contiguous rows, got {list(q.shape)}, strides {q.stride()}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, float16 or bfloat16, got {q.dtype}")
    m, heads, head_dim = q.shape
    _positive("q: rows", m)
    pk, pv = _check_cache(k_cache, v_cache, q.dtype, None, None, head_dim)
    kv_heads, capacity, _ = k_cache.shape
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, got {heads}")
    pm = _check("mask", mask, torch.int64, m, None)
    words = _positive("mask: words", mask.shape[1])
    if not 0 <= prefix <= capacity:
        raise ValueError(f"prefix: expected 0 to the cache's capacity {capacity}, got {prefix}")
    bits = (mask.unsqueeze(-1) >> torch.arange(64, device=mask.device)) & 1
    if prefix == 0 and not bool(bits.any(-1).any(-1).all()):
        raise ValueError("mask: every row must see at least one slot")
    beyond = bits.flatten(1)[:, max(0, min(capacity - prefix, words * 64)) :]
    if bool(beyond.any()):
        raise ValueError(f"mask: a bit points beyond the cache's capacity {capacity} (prefix {prefix})")
    pp = _optional("positions", positions, torch.int32, m)
    if window < 0:
        raise ValueError(f"window: expected at least 0, got {window}")
    if window:
        if positions is None:
            raise ValueError("positions: expected a tensor, since there is a window, got None")
        seen = bits.flatten(1).sum(-1)
        if bool((positions != prefix - 1 + seen).any()) or bool((seen > window).any()):
            raise ValueError(
                f"positions: expected prefix - 1 + the row's bits, which are at most the window ({prefix} - 1 + {seen.tolist()}, "
                f"window {window}), got {positions.tolist()}"
            )
    softcap = _check_softcap(softcap)
    out, po = _output(out, q.device, q.dtype, m, heads, head_dim)
    run(
        q.device,
        "tree_attention",
        workspace=(m, heads, head_dim, capacity),
        dtype=DTYPES[q.dtype],
        q=q.data_ptr(),
        q_stride=q.stride(0),
        k_cache=pk,
        v_cache=pv,
        cache=(kv_heads, capacity, head_dim),
        prefix=prefix,
        mask=pm,
        mask_words=words,
        positions=pp,
        window=window,
        out=po,
        scale=float(scale),
        softcap=softcap,
        num_rows=m,
        heads=heads,
    )
    return out


@_on_one_device
def tree_expand(
    logits: torch.Tensor, scores: torch.Tensor, width: int, score_temperature: float, prune: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more depth of a draft tree (SPEC section 4): every leaf proposes its `width` likeliest tokens, and of all proposals the
    `width` with the largest cumulative log-likelihood stay. A likelihood is `softmax(logits / tau)`.

    logits: float32 [leaves, V] of S.
    scores: float32 [leaves], the leaves' cumulative log-likelihoods.
    width: 1 to 16.
    score_temperature: tau, more than 0.
    prune: a leaf whose likeliest token has a larger likelihood proposes that one only.
    Returns c <= width proposals, likeliest first: their tokens int32 [c], the rows of the leaves that made them int32 [c] and
    their scores float32 [c].

    A token of likelihood zero is not proposed. Of equal scores the lower row, then the larger logit, then the lower token is
    likelier. A leaf with a logit that is NaN or plus infinity proposes nothing; minus infinity is a token that is impossible.
    """
    pl = _check("logits", logits, torch.float32, None, None)
    leaves, vocab = logits.shape
    _positive("logits: rows", leaves)
    _positive("logits: vocabulary", vocab)
    ps = _check("scores", scores, torch.float32, leaves)
    if not 1 <= width <= 16:
        raise ValueError(f"width: expected 1 to 16, got {width}")
    _check_temperature(score_temperature)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    tokens, parents, new_scores = empty(width, dtype=torch.int32), empty(width, dtype=torch.int32), empty(width)
    count = empty(1, dtype=torch.int32)
    run(
        logits.device,
        "tree_expand",
        workspace=(leaves, vocab, width),
        logits=pl,
        scores=ps,
        score_temperature=float(score_temperature),
        prune=float(prune),
        tokens=tokens.data_ptr(),
        parents=parents.data_ptr(),
        new_scores=new_scores.data_ptr(),
        count=count.data_ptr(),
        num_leaves=leaves,
        vocab=vocab,
        width=width,
    )
    found = slice(int(count))
    return tokens[found], parents[found], new_scores[found]


@_on_one_device
def accept(
    logits: torch.Tensor,
    drafts: torch.Tensor,
    threshold: float,
    score_temperature: float,
    match: bool = False,
    parents: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Acceptance of a chain or a tree, in one pass over the logits (SPEC sections 3, 4 and 5). A node is accepted when its
    likelihood `softmax(logits / tau)` reaches the threshold, or with `match` when it is the argmax, and the nodes before it are
    accepted too.

    logits: float32 [n, V] of F.
    drafts: int32 [n - 1], the tokens of nodes 1 to n - 1.
    threshold: least likelihood.
    score_temperature: tau, more than 0.
    match: accept by the argmax instead.
    parents: int32 [n]; node i was proposed after row parents[i], 0 <= parents[i] < i. Without it after row i - 1, a chain.
    scores: float32 [n], the nodes' cumulative log-likelihoods.
    Returns the likelihoods float32 [n - 1], the argmax of every row int32 [n] (the first of equals) and the nodes of the longest
    accepted run, int32 [a]. Of equally long ones it is the one whose last node has the larger score, then the first.

    F's own token is the argmax of the run's last row. A row with a logit that is NaN or plus infinity has the argmax -1, and so
    has one all of whose logits are minus infinity; what was proposed after it has a likelihood of NaN and is not accepted.
    """
    pl = _check("logits", logits, torch.float32, None, None)
    n, vocab = logits.shape
    _positive("logits: rows", n)
    _positive("logits: vocabulary", vocab)
    pd = _check("drafts", drafts, torch.int32, n - 1)
    _check_indices("drafts", drafts, vocab)
    _check_temperature(score_temperature)
    pp = _optional("parents", parents, torch.int32, n)
    if parents is not None and bool(((parents < 0) | (parents >= torch.arange(n, device=parents.device)))[1:].any()):
        raise ValueError(f"parents: expected 0 <= parents[i] < i after the root, got {parents.tolist()}")
    ps = _optional("scores", scores, torch.float32, n)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    likelihoods, argmax, path = empty(n - 1), empty(n, dtype=torch.int32), empty(n - 1, dtype=torch.int32)
    accepted = empty(1, dtype=torch.int32)
    run(
        logits.device,
        "accept",
        workspace=(n, vocab),
        logits=pl,
        drafts=pd,
        parents=pp,
        scores=ps,
        threshold=float(threshold),
        score_temperature=float(score_temperature),
        match=bool(match),
        likelihoods=likelihoods.data_ptr(),
        argmax=argmax.data_ptr(),
        path=path.data_ptr(),
        accepted=accepted.data_ptr(),
        num_rows=n,
        vocab=vocab,
    )
    return likelihoods, argmax, path[: int(accepted)]


@_on_one_device
def argmax(logits: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The likeliest token of every row of logits that nothing has processed; -1 where a logit is NaN or infinite.

    logits: float32 [m, V].
    Returns int32 [m], the first of equals.
    """
    pl = _check("logits", logits, torch.float32, None, None)
    m, vocab = logits.shape
    _positive("logits: rows", m)
    _positive("logits: vocabulary", vocab)
    out, po = _output(out, logits.device, torch.int32, m)
    run(logits.device, "argmax", workspace=(m, vocab), logits=pl, argmax=po, num_rows=m, vocab=vocab)
    return out


def _check_temperature(score_temperature: float) -> None:
    if not score_temperature > 0:
        raise ValueError(f"score_temperature: expected more than 0, got {score_temperature}")


@_on_one_device
def kv_rewrite(k_cache: torch.Tensor, v_cache: torch.Tensor, start: int, path: torch.Tensor) -> None:
    """Compact the accepted path in place: the entries of slots start + path[i] move to slots start + i, in every layer.

    k_cache, v_cache: T [L, kv_heads, C, D].
    start: 0 to C.
    path: int32 [a], strictly increasing, start + path[-1] < C.
    """
    _check_is_tensor("k_cache", k_cache)
    if k_cache.dtype not in DTYPES:
        raise TypeError(f"k_cache: expected float32, float16 or bfloat16, got {k_cache.dtype}")
    pk, pv = _check_cache(k_cache, v_cache, k_cache.dtype, None, None, None, None)
    pp = _check("path", path, torch.int32, None)
    layers, kv_heads, capacity, head_dim = k_cache.shape
    if not 0 <= start <= capacity:
        raise ValueError(f"start: expected 0 to the cache's capacity {capacity}, got {start}")
    _check_indices("path", path, capacity - start)
    if bool((path[1:] <= path[:-1]).any()):
        raise ValueError(f"path: expected strictly increasing values, got {path.tolist()}")
    run(
        k_cache.device,
        "kv_rewrite",
        dtype=DTYPES[k_cache.dtype],
        k_cache=pk,
        v_cache=pv,
        path=pp,
        cache=(kv_heads, capacity, head_dim),
        layers=layers,
        start=start,
        length=path.numel(),
    )
