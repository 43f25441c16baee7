"""What the op tests share: the backends, guarded memory, and tolerances derived from the arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch

from sirius_ext import _simt
from sirius_ext.kernels import dispatch, ops, reference
from sirius_ext.kernels.matrix import Matrix

# A backend is a name and the module whose functions it stands for; conftest.py turns the names into fixtures.
CPU_BACKENDS = [f"cpu-{isa}" for isa in ops.available_isas() if isa != "avxvnni"]
# AVX2 with products of bytes: beside packed matrices (test_q8.py) it runs AVX2's very bodies.
PACKED_CPU_BACKENDS = [f"cpu-{isa}" for isa in ops.available_isas()]
# The CUDA kernels' own source on the CPU, by the order in which a block's threads run.
SIMT_ORDERS = ["forward", "reverse", "random"]
SIMT_BACKENDS = [f"simt-{order}" for order in SIMT_ORDERS]
# The same kernels on a GPU, if there is one.
CUDA_BACKENDS = ["cuda", "cuda-aligned"] if torch.cuda.is_available() and dispatch.has_cuda_kernels() else []
KERNELS = [*CPU_BACKENDS, *SIMT_BACKENDS, *CUDA_BACKENDS]
PACKED_KERNELS = [*PACKED_CPU_BACKENDS, *SIMT_BACKENDS, *CUDA_BACKENDS]
BACKENDS = ["reference", *KERNELS]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Exact in every element type, and far from anything that the tests compute.
SENTINEL = 57344
# Odd on purpose: the guarded tensors are then not aligned to a vector. CUDA kernels have bodies for aligned tensors and bodies
# for others; in one of the thread orders they get aligned ones.
MARGIN = 67
ALIGNED_MARGIN = 64
# AddressSanitizer sees what is read after the end of a tensor, even if it does not show in the result, where memory ends there.
WALL_BEHIND = os.environ.get("SIRIUS_TESTS_WALL_BEHIND") != "off"


def in_turns(every: int, shapes: Sequence[object], *values: Sequence[object]) -> list[tuple[object, ...]]:
    """Cases of a shape and one of each of the values: of all combinations every shape has one in `every`, others than the shape
    before it."""
    combinations = list(itertools.product(*values))
    return [
        (shape, *each)
        for turn, shape in enumerate(shapes)
        for place, each in enumerate(combinations)
        if (turn + place) % every == 0
    ]


@contextlib.contextmanager
def using(backend: str) -> Iterator[ModuleType]:
    """The module whose functions a backend's name stands for, set up for it."""
    global _margin
    if backend == "reference":
        yield reference
    elif backend in CUDA_BACKENDS:
        _margin = ALIGNED_MARGIN if backend == "cuda-aligned" else MARGIN
        yield OnDevice(ops, torch.device("cuda"))
        _margin = MARGIN
    elif backend.startswith("cpu-"):
        before = ops.isa()
        ops.set_isa(backend.removeprefix("cpu-"))
        yield ops
        ops.set_isa(before)
    else:
        order = backend.removeprefix("simt-")
        _simt.set_order(SIMT_ORDERS.index(order))
        _margin = ALIGNED_MARGIN if order == "random" else MARGIN
        with emulated(_simt):
            yield ops
        _margin = MARGIN


_CPU = dispatch.backend_of(torch.device("cpu"))


def emulated(functions: ModuleType | None) -> contextlib.AbstractContextManager:
    """Within it, tensors on the CPU are computed on by the CUDA kernels of a module built with csrc/simt; with None, by the
    CPU's."""
    return dispatch.registered("cpu", _CPU if functions is None else dispatch.CudaBackend(functions))


class OnDevice:
    """`ops` on another device, for tensors of the CPU: whole storages travel there and back, so that what stands around a tensor,
    NaN or sentinels, stands around it there."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Callable:
        op = getattr(self._module, name)

        def travelling(*arguments, **named):
            storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # bytes here and there

            def there(value):
                if isinstance(value, Matrix):
                    tensors = ("data", "shared", "apart", "neuron_of")
                    return dataclasses.replace(value, **{name: there(getattr(value, name)) for name in tensors})
                if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                    return value
                storage = value.untyped_storage()
                if storage.data_ptr() not in storages:
                    here = torch.empty(0, dtype=torch.uint8).set_(storage)
                    storages[storage.data_ptr()] = here, here.to(self._device, copy=True)
                away = storages[storage.data_ptr()][1].untyped_storage()
                empty = torch.empty(0, dtype=value.dtype, device=self._device)
                return empty.set_(away, value.storage_offset(), value.shape, value.stride())

            out = op(*map(there, arguments), **{key: there(value) for key, value in named.items()})
            for here, away in storages.values():
                here.copy_(away)
            if "out" in named and named["out"] is not None:
                return named["out"]
            return tuple(each.cpu() for each in out) if isinstance(out, tuple) else None if out is None else out.cpu()

        return travelling


def call(functions: ModuleType, name: str, *, workspace: int = 0, **fields) -> None:
    """Call a compiled CUDA function with the fields of csrc/params.h. Tensors go by their address, None as null; beside them go a
    workspace of so many floats, the counters and the stream."""
    floats, counters = torch.full((workspace,), math.nan), torch.zeros(functions.counters, dtype=torch.int32)
    plain = {key: 0 if x is None else x.data_ptr() if isinstance(x, torch.Tensor) else x for key, x in fields.items()}
    getattr(functions, name)(**plain, workspace=floats.data_ptr(), counters=counters.data_ptr(), stream=0)
    assert not counters.any(), "counters that are not left at zero"


_margin = MARGIN


def _frame(content: torch.Tensor, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = torch.full((_margin + content.numel() + (_margin if WALL_BEHIND else 0),), fill, dtype=content.dtype)
    inner = buffer[_margin : _margin + content.numel()].view(content.shape)
    inner.copy_(content)
    return buffer, inner


def walled(content: torch.Tensor) -> torch.Tensor:
    """A copy of an input inside a wall of NaN (of a large number if integer): reading past either end shows in the result."""
    return _frame(content, math.nan if content.is_floating_point() else SENTINEL)[1]


class Guarded:
    """A copy of something written to, between two rows of sentinels."""

    def __init__(self, content: torch.Tensor) -> None:
        self.buffer, self.tensor = _frame(content, SENTINEL)

    def check(self) -> torch.Tensor:
        """The tensor, after making sure that nothing beside it was written."""
        assert (self.buffer[:_margin] == SENTINEL).all(), "written before the start of an output"
        assert (self.buffer[_margin + self.tensor.numel() :] == SENTINEL).all(), "written after the end of an output"
        return self.tensor


def poisoned(*shape: int, dtype: torch.dtype) -> Guarded:
    """An output to be filled. It holds NaN (a large number if integer), so that an element left out shows."""
    return Guarded(torch.full(shape, math.nan if dtype.is_floating_point else SENTINEL, dtype=dtype))


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def small_integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Integers from -3 to 3. Sums of their products stay below 2^24: exact in float32, whatever the order."""
    return torch.randint(-3, 4, shape).to(dtype)


def apart(weight: torch.Tensor) -> Matrix:
    """A weight as a matrix whose rows stand apart, with NaN between them."""
    rows, cols = weight.shape
    wide = torch.full((rows, cols + 5), math.nan, dtype=weight.dtype)
    wide[:, :cols] = weight
    return Matrix(walled(wide)[:, :cols])


def neuron_lists(intermediate: int) -> dict[str, torch.Tensor | None]:
    """Lists of every kind: none, one neuron, all, an odd count, and one that is neither sorted nor free of repeats."""

    def sample(count: int) -> torch.Tensor:
        return torch.randperm(intermediate)[: max(1, count)].sort().values.int()

    return {
        "dense": None,
        "one": sample(1),
        "all": torch.arange(intermediate, dtype=torch.int32),
        "odd": sample(intermediate // 2 | 1),
        "unsorted": torch.randint(intermediate, (intermediate // 2 + 1,), dtype=torch.int32),
    }


def poison_unselected(weight: torch.Tensor, neurons: torch.Tensor | None) -> torch.Tensor:
    """A copy of `weight` whose unlisted rows are NaN: a kernel that reads one shows it."""
    if neurons is None:
        return weight
    selected = torch.full_like(weight, math.nan)
    selected[neurons.long()] = weight[neurons.long()]
    return selected


# float32 rounds by at most U, relatively.
U = 2.0**-24


def sum_error(terms: torch.Tensor, length: int) -> torch.Tensor:
    """How far two float32 sums of the same `length` products may be apart. terms: the sum of the products' absolute values.

    The inputs are exact in T, so only float32's rounding is left. Its worst case is length * U * sum|terms|. Rounding errors are
    as good as independent, though, and the error of a sum in any order stays below lambda * sqrt(length) * U * sum|terms| with
    probability 1 - 2 exp(-lambda^2 / 2) (Higham and Mary, 2019). Lambda is 8 here; both sides err.
    """
    return 2 * 8 * math.sqrt(length + 1) * U * terms


def rounding_error(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far one rounding to T moves `value`: half an ulp. Subnormals have an ulp of their own, and in float32 and bfloat16 they
    may be flushed to zero."""
    info = torch.finfo(dtype)
    return info.eps / 2 * value.abs().double() + max(info.tiny * info.eps / 2, torch.finfo(torch.float32).tiny)


def as_float(*arguments):
    """The arguments with every element type T replaced by float32. A twin then returns what an op has to round to T, once."""
    return [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def assert_close(out: torch.Tensor, exact: torch.Tensor, error: torch.Tensor | float) -> None:
    """`out`, T, is `exact`, which is not rounded to T yet, up to `error` and one rounding."""
    assert out.shape == exact.shape
    assert torch.isfinite(exact).all(), "the expectation itself is not finite"
    assert torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} of {out.numel()} elements are not finite"
    error = torch.as_tensor(error, dtype=torch.float64)
    allowed = error + rounding_error(exact.double().abs() + error, out.dtype)
    excess = (out.double() - exact.double()).abs() / allowed
    worst = int(excess.argmax())
    assert excess.max() <= 1, (
        f"element {worst}: {out.flatten()[worst].item()} instead of {exact.flatten()[worst].item()}, "
        f"{excess.max().item():.3g} times the error allowed"
    )


def assert_same_bits(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    width = {4: torch.int32, 2: torch.int16, 8: torch.int64}[out.element_size()]
    different = out.contiguous().view(width) != expected.contiguous().view(width)
    assert not different.any(), f"{int(different.sum())} of {out.numel()} elements differ"


# ------------------------------------------------------------------------------------------- what the tests of some ops share

# Of the MLP's first half: (rows, hidden, intermediate).
MLP_SHAPES = [
    (1, 1, 1),
    (1, 64, 33),
    (2, 31, 100),
    (3, 129, 63),
    (5, 576, 31),
    (7, 63, 151),
    (16, 151, 129),
    (17, 100, 64),
    (40, 33, 576),
]


def dot_error(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far two float32 results of `x @ weight.T` may be apart."""
    return sum_error(x.float().abs() @ weight.float().abs().T, x.shape[1])


def exponential_error(g: torch.Tensor, u: torch.Tensor | float = 1.0, activation: str = "silu") -> torch.Tensor:
    """How far a float32 result of `act(g) * u` may be from the exact one: the exponential and the division add a few units of
    their own, and may underflow. silu's exponent is g; gelu's is a polynomial in g, whose rounding is a relative error of the
    exponential that grows with it."""
    units = 16 * U * (1 + (0 if activation == "silu" else gelu_exponent(g).abs()))
    return units * (exact_activation(g, activation) * u).abs() + torch.finfo(torch.float32).tiny * (g * u).abs()


def gelu_exponent(g: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(g) is `g * sigmoid` of this."""
    return 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)


def exact_activation(g: torch.Tensor, activation: str) -> torch.Tensor:
    return g * torch.sigmoid(g if activation == "silu" else gelu_exponent(g))


def activation_error(
    x: torch.Tensor,
    gate: torch.Tensor,
    activation: str,
    up: torch.Tensor | None = None,
    dot_error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dot_error,
) -> torch.Tensor:
    """How far two float32 results of `act(gate x) * (up x)`, or without `up` of `act(gate x)`, may be apart. |act'| stays below
    1.2. The twin's gelu adds 1 to a tanh near -1, whose own rounding is then left."""
    g, gate_error = x.float() @ gate.float().T, dot_error(x, gate)
    if up is None:
        u, up_error = torch.ones_like(g), torch.zeros_like(g)
    else:
        u, up_error = x.float() @ up.float().T, dot_error(x, up)
    value = exact_activation(g, activation)
    twin = 4 * U * (g * u).abs() if activation == "gelu_tanh" else 0.0
    return 1.2 * gate_error * (u.abs() + up_error) + value.abs() * up_error + exponential_error(g, u, activation) + twin


# (changed arguments, error, message) for ops that take logits [3, 5], scores [3] and a score temperature.
LOGITS_ERRORS = [
    ({"logits": [[0.0]]}, TypeError, "^logits: expected a tensor"),
    ({"logits": torch.zeros(3, 5, dtype=torch.bfloat16)}, TypeError, "^logits: expected torch.float32"),
    ({"logits": torch.zeros(3, 5, device="meta")}, ValueError, "^logits: .*on meta"),
    ({"logits": torch.zeros(3)}, ValueError, "^logits: expected shape"),
    ({"logits": torch.zeros(3, 0)}, ValueError, "^logits: "),
    ({"logits": torch.zeros(0, 5)}, ValueError, "^logits: "),
    ({"logits": torch.zeros(5, 3).T}, ValueError, "^logits: expected a contiguous"),
    ({"scores": [0.0] * 3}, TypeError, "^scores: expected a tensor"),
    ({"scores": torch.zeros(3, dtype=torch.float64)}, TypeError, "^scores: expected torch.float32"),
    ({"scores": torch.zeros(2)}, ValueError, "^scores: expected shape"),
    ({"scores": torch.zeros(3, device="meta")}, ValueError, "^scores: .*on meta"),
    ({"scores": torch.zeros(6)[::2]}, ValueError, "^scores: expected a contiguous"),
    ({"score_temperature": 0.0}, ValueError, "^score_temperature: "),
    ({"score_temperature": -1.0}, ValueError, "^score_temperature: "),
    ({"score_temperature": math.nan}, ValueError, "^score_temperature: "),
]
