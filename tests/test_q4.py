"""The formats of four bits (csrc/q4.h): the numbers that they hold, and the ops that multiply them."""

import dataclasses
import math

import pytest
import torch
from backends import (
    PACKED_CPU_BACKENDS,
    PACKED_KERNELS,
    U,
    activation_error,
    assert_close,
    assert_same_bits,
    in_turns,
    neuron_lists,
    poisoned,
    randn,
    sum_error,
    using,
    walled,
)
from test_q8 import (
    TINY,
    UNPACKED,
    check_batch_invariance,
    check_faults_stay,
    check_several_tiles,
    check_thread_invariance,
    check_unpacking,
    check_views,
    multiplied,
    on_cuda,
    rows_of_several_tiles,
)

from sirius_ext.kernels import dispatch, ops, q4, q8, reference
from sirius_ext.kernels.matrix import Format, Matrix

# (rows, in, out): groups and headers that are whole and broken, one tile of rows and more, blocks of 48 groups and more.
SHAPES = [
    (1, 1, 1), (1, 64, 31), (2, 31, 33), (3, 160, 17), (5, 72, 129), (7, 257, 64), (9, 1096, 20), (16, 40, 63), (17, 264, 33),
    (33, 33, 15), (1, 1600, 16),
]  # fmt: skip
MLP_SHAPES = [(1, 1, 1), (2, 31, 100), (7, 151, 63), (9, 1096, 40), (16, 40, 33), (17, 64, 31)]
LISTS = list(neuron_lists(8))


@pytest.fixture(params=PACKED_KERNELS)
def kernels(request):
    """As everywhere, and instruction sets that differ in these formats alone."""
    with using(request.param) as module:
        yield module


@pytest.fixture(params=PACKED_CPU_BACKENDS)
def cpu_kernels(request):
    with using(request.param) as module:
        yield module


@pytest.fixture(params=[False, True], ids=["pairs", "supers"])
def supers(request):
    return request.param


def groups_of(rows: int, cols: int, supers: bool) -> q4.Groups:
    """Random ones, with all codes and fields, and scales of both signs."""
    count, codes = q8.groups(cols), torch.randint(16, (rows, cols), dtype=torch.uint8)
    if not supers:
        return q4.Groups(codes, (torch.randn(rows, count, 2) * torch.tensor([0.1, 1.0])).half())
    pairs = (torch.randn(rows, math.ceil(count / 8), 2) * torch.tensor([0.003, 0.02])).half()
    return q4.Groups(codes, pairs, torch.randint(64, (rows, count, 2), dtype=torch.uint8))


def size_of(weight: q4.Groups) -> torch.Tensor:
    """What a weight's two terms amount to before they cancel out: float32 [rows, cols]."""
    return q4.Groups(torch.full_like(weight.codes, 15), weight.pairs.abs(), negated(weight.fields)).numbers().abs() + (
        q4.Groups(torch.zeros_like(weight.codes), weight.pairs, weight.fields).numbers().abs()
    )


def negated(fields: torch.Tensor | None) -> torch.Tensor | None:
    return fields if fields is None else torch.stack((fields[..., 0], torch.zeros_like(fields[..., 1])), -1)


def among_faults(matrix: Matrix, neurons: torch.Tensor | None = None) -> Matrix:
    """A copy with bytes of 255 before, between and after its rows, and in those not listed, and after the shared scales: as a
    scale they are NaN."""
    rows, width = matrix.data.shape
    wide = torch.full((rows + 2, width + 48 - width % 16), 255, dtype=torch.uint8)
    selected = slice(None) if neurons is None else neurons.long()
    wide[1:-1][selected, 16 : 16 + width] = matrix.data[selected]
    shared = None
    if matrix.shared is not None:
        size = matrix.shared.numel()
        shared = torch.full((size + 128,), 255, dtype=torch.uint8)[64 : 64 + size].copy_(matrix.shared)
    return dataclasses.replace(matrix, data=wide[1:-1, 16 : 16 + width], shared=shared)


# --------------------------------------------------------------------------------------------------------------------- numbers


def nibble(data: bytes, at: int, place: int) -> int:
    return data[at + place % 16] >> place // 16 * 4 & 15


def half(data: bytes, at: int) -> torch.Tensor:
    return torch.tensor(list(data[at : at + 2]), dtype=torch.uint8).view(torch.float16)[0].float()


def field(data: bytes, at: int, number: int) -> int:
    """Number `number` of six bits of a header: of dwords 1 to 3 four each, and four of their tops together."""
    place, shift = divmod(number * 6, 24)
    dwords = [int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in (1, 2, 3)]
    tops = sum((dword >> 24) << 8 * i for i, dword in enumerate(dwords))
    return ([*dwords, tops][place] >> shift) & 63


def weight_along(data: bytes, c: int, cols: int, supers: bool) -> torch.Tensor:
    group, at = c // 32, 16 * math.ceil(q8.groups(cols) / (8 if supers else 4))
    code = nibble(data, at + 16 * group, c % 32)
    if not supers:
        return half(data, 4 * group) * code + half(data, 4 * group + 2)
    header, place = group // 8 * 16, group % 8
    d, e = half(data, header), half(data, header + 2)
    return d * field(data, header, 2 * place) * code - e * field(data, header, 2 * place + 1)


def weight_across(row: bytes, shared: bytes, r: int, c: int, cols: int, supers: bool) -> torch.Tensor:
    columns, group, code = 32 * q8.groups(cols), r // 32, nibble(row, c // 32 * 16, c % 32)
    if not supers:
        at = 4 * (group * columns + c)
        return half(shared, at) * code + half(shared, at + 2)
    start = group // 8 * 20 * columns
    d, e = half(shared, start + 4 * c), half(shared, start + 4 * c + 2)
    s, m = shared[start + (4 + group % 8 * 2) * columns + 2 * c :][:2]
    return d * s * code - e * m


@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 33), (2, 128), (2, 161), (3, 300), (2, 545)])
def test_where_everything_lies(rows, cols, supers):
    weight = groups_of(rows, cols, supers)
    matrix, numbers = Matrix.of_groups(weight), weight.numbers()
    assert matrix.shape == (rows, cols) and matrix.stride % 16 == 0 and matrix.nbytes == matrix.data.numel()
    assert torch.equal(matrix.dense(), numbers)
    for r in range(rows):
        row = bytes(matrix.data[r].tolist())
        assert torch.equal(torch.stack([weight_along(row, c, cols, supers) for c in range(cols)]), numbers[r])
    down = Matrix.of_groups(weight, transposed=True)
    assert down.shape == (cols, rows) and down.stride % 16 == 0
    assert down.nbytes == down.bytes.numel() == down.data.numel() + q4.shared_bytes(cols, rows, supers)
    assert torch.equal(down.dense(), numbers.t())
    shared = bytes(down.shared.tolist())
    for r in range(cols):
        row = bytes(down.data[r].tolist())
        found = torch.stack([weight_across(row, shared, r, c, rows, supers) for c in range(rows)])
        assert torch.equal(found, numbers[:, r])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows, cols", UNPACKED)
def test_numbers_of_packed_weights(cpu_kernels, dtype, supers, rows, cols, transposed):
    check_unpacking(Matrix.of_groups(groups_of(rows, cols, supers), transposed), dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_tensor_holds_all_of_a_matrix(supers, transposed):
    matrix = Matrix.of_groups(groups_of(40, 70, supers), transposed)
    again = Matrix.of_bytes(matrix.bytes, matrix.format, *matrix.shape)
    assert again.shape == matrix.shape and torch.equal(again.dense(), matrix.dense())


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 255, 257])
def test_numbers_are_rounded_to_the_nearest_code(cols):
    weight = torch.randn(7, cols) * torch.logspace(-3, 3, 7)[:, None]
    weight[3], weight[4] = 0.0, 0.25
    found = q4.round_to_groups(weight)
    scales, minima = (each.float().repeat_interleave(32, 1)[:, :cols] for each in found.pairs.unbind(-1))
    # Half a code, and what rounding the scale and the minimum has left.
    allowed = 0.5 * scales + 15 * (scales.abs() * 2.0**-11 + 2.0**-25) + minima.abs() * 2.0**-11 + 2.0**-25
    assert ((found.numbers() - weight).abs() <= allowed * (1 + 8 * U)).all()
    assert torch.equal(found.numbers()[3:5], weight[3:5])


def test_numbers_are_rounded_in_pieces(monkeypatch):
    weight = torch.randn(50, 70)
    whole = q4.round_to_groups(weight)
    monkeypatch.setattr(q4, "CHUNK", 3 * 70 + 5)
    found = q4.round_to_groups(weight)
    assert torch.equal(found.codes, whole.codes) and torch.equal(found.pairs, whole.pairs)
    weight[47, 3] = math.inf
    with pytest.raises(ValueError, match="row 47 has others"):
        q4.round_to_groups(weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_numbers_that_cannot_be_packed(value):
    weight = torch.zeros(3, 40)
    weight[1, 35] = value
    with pytest.raises(ValueError, match="^expected finite weights of at most 65504, row 1 has others"):
        q4.round_to_groups(weight)


# ------------------------------------------------------------------------------------------------------------ products of rows


def product_error(weight: q4.Groups, rows=slice(None)):
    """Of products of rows, of which each is a sum of two: codes, and the minimum."""

    def error(x, _):
        terms = x.abs() @ size_of(weight)[rows].T
        return sum_error(terms, 2 * x.shape[1])

    return error


@pytest.mark.parametrize(("shape", "extras"), in_turns(3, SHAPES, ["plain", "bias", "residual"]), ids=str)
def test_linear_against_reference(kernels, dtype, supers, shape, extras):
    m, width, rows = shape
    x, groups = walled(randn(m, width, dtype=dtype)), groups_of(rows, width, supers)
    matrix = Matrix.of_groups(groups)
    bias = walled(randn(rows, dtype=dtype)) if extras == "bias" else None
    residual = walled(randn(m, rows, dtype=dtype)) if extras == "residual" else None
    seen, weight = multiplied(kernels, x), groups.numbers()
    exact, error = seen @ weight.T, product_error(groups)(seen, weight)
    for extra in (bias, residual):
        if extra is not None:
            exact = exact + extra.float()
            error = error + 8 * U * (exact.abs() + extra.float().abs())
    out = poisoned(m, rows, dtype=dtype)
    kernels.linear(x, among_faults(matrix), bias, residual, out=out.tensor)
    assert_close(out.check(), exact, error)
    wide = poisoned(m, rows, dtype=torch.float32)
    kernels.linear(x, matrix, bias, residual, out_dtype=torch.float32, out=wide.tensor)
    assert_close(wide.check(), exact, error)


@pytest.mark.parametrize(("shape", "kind"), in_turns(3, MLP_SHAPES, LISTS), ids=str)
def test_gate_up_against_reference(kernels, dtype, supers, shape, kind):
    m, hidden, intermediate = shape
    neurons, x = neuron_lists(intermediate)[kind], walled(randn(m, hidden, dtype=dtype))
    groups = [groups_of(intermediate, hidden, supers) for _ in "gu"]
    rows = slice(None) if neurons is None else neurons.long()
    seen, dense = multiplied(kernels, x), [each.numbers()[rows] for each in groups]
    exact = reference.gate_up(seen, *dense)
    gate_error, up_error = (product_error(each, rows) for each in groups)
    error = activation_error(
        seen, dense[0], "silu", dense[1], lambda x, weight: (gate_error if weight is dense[0] else up_error)(x, weight)
    )
    out = poisoned(*exact.shape, dtype=dtype)
    listed = None if neurons is None else walled(neurons)
    gate, up = (among_faults(Matrix.of_groups(each), neurons) for each in groups)
    kernels.gate_up(x, gate, up, listed, out=out.tensor)
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
def test_gate_and_up_against_reference(kernels, dtype, supers, shape):
    m, hidden, intermediate = shape
    neurons, x = neuron_lists(intermediate)["odd"], walled(randn(m, hidden, dtype=dtype))
    groups = [groups_of(intermediate, hidden, supers) for _ in "gu"]
    gate, up = map(Matrix.of_groups, groups)
    seen, dense = multiplied(kernels, x), [each.numbers() for each in groups]
    gates = poisoned(m, intermediate, dtype=torch.float32)
    kernels.gate(x, among_faults(gate), out=gates.tensor)
    error = activation_error(seen, dense[0], "silu", dot_error=product_error(groups[0]))
    assert_close(gates.check(), reference.gate(seen, dense[0]), error)
    exact = reference.up(seen, dense[1], gates.tensor, neurons)
    error = gates.tensor[:, neurons.long()].abs() * product_error(groups[1], neurons.long())(seen, None)
    out = poisoned(m, len(neurons), dtype=dtype)
    kernels.up(x, among_faults(up, neurons), gates.tensor, neurons, out=out.tensor)
    assert_close(out.check(), exact, error + 2 * U * exact.abs() + TINY)
    assert_same_bits(out.tensor, kernels.gate_up(x, gate, up, neurons))


@pytest.mark.parametrize("m", [1, 3, 17])
def test_gate_and_up_of_two_formats(kernels, dtype, m):
    """A file may have any format for each of its matrices."""
    x, neurons = randn(m, 151, dtype=dtype), torch.arange(70, dtype=torch.int32)
    eight = Matrix(torch.randn(70, 151)).in_eight_bits()
    matrices = [Matrix.of_groups(groups_of(70, 151, supers)) for supers in (False, True)]
    for gate, up in ((matrices[0], eight), (eight, matrices[1]), (matrices[1], eight.in_four_bits())):
        assert_same_bits(kernels.gate_up(x, gate, up), kernels.up(x, up, kernels.gate(x, gate), neurons))


def test_up_without_a_list(kernels):
    """As a pass calls it where gate and up are of two formats."""
    x, up = randn(3, 151, dtype=torch.bfloat16), Matrix.of_groups(groups_of(70, 151, True))
    gates, out = torch.randn(3, 70), poisoned(3, 70, dtype=torch.bfloat16)
    fields = {"dtype": ops.DTYPES[x.dtype], "x": x.data_ptr(), "up": up.raw, "gates": gates.data_ptr()}
    dispatch.run(x.device, "up", **fields, out=out.tensor.data_ptr(), num_rows=3, num_neurons=70)
    assert_same_bits(out.check(), ops.up(x, up, gates, torch.arange(70, dtype=torch.int32)))


# ------------------------------------------------------------------------------------------------------------- rows added up

# (rows, intermediate, hidden)
DOWN_SHAPES = [
    (1, 1, 1), (1, 64, 31), (2, 33, 100), (3, 151, 129), (5, 1134, 33), (7, 63, 64), (16, 129, 151), (17, 300, 260), (33, 31, 96),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "kind"), in_turns(3, DOWN_SHAPES, LISTS), ids=str)
def test_down_against_reference(kernels, dtype, supers, shape, kind):
    """Of the CPU coefficients that are rounded to 127, 0 and -127: then nothing is lost."""
    m, intermediate, hidden = shape
    neurons = neuron_lists(intermediate)[kind]
    kept = slice(None) if neurons is None else neurons.long()
    groups = groups_of(hidden, intermediate, supers)
    matrix, weight, size = Matrix.of_groups(groups, transposed=True), groups.numbers().T[kept], size_of(groups).T[kept]
    x = randn(m, len(weight), dtype=dtype) if on_cuda(kernels) else torch.randint(-1, 2, (m, len(weight))).to(dtype)
    residual = walled(randn(m, hidden, dtype=dtype)) if kind in ("one", "odd") else None
    exact, terms = x.float() @ weight, x.float().abs() @ size
    error = sum_error(terms, 2 * len(weight)) + 8 * U * terms  # of 127 times 1 / 127
    if residual is not None:
        exact = exact + residual.float()
        error = error + 8 * U * (exact.abs() + residual.float().abs())
    out = poisoned(m, hidden, dtype=dtype)
    listed = None if neurons is None else walled(neurons)
    kernels.down(walled(x), among_faults(matrix, neurons), listed, residual, out=out.tensor)
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("shape", [(1, 400, 96), (5, 33, 200), (17, 129, 64)], ids=str)
def test_down_of_any_numbers(kernels, dtype, supers, shape):
    """The CPU's coefficients are rounded to eight bits for each group of 32 neurons, as the input of other products is."""
    m, intermediate, hidden = shape
    x, groups = randn(m, intermediate, dtype=dtype), groups_of(hidden, intermediate, supers)
    seen = multiplied(kernels, x)
    terms = seen.abs() @ size_of(groups).T
    out = kernels.down(x, Matrix.of_groups(groups, transposed=True))
    assert_close(out, seen @ groups.numbers().T, sum_error(terms, 2 * intermediate) + 8 * U * terms)


@pytest.mark.parametrize("shape", [(1, 64, 31), (2, 1134, 33), (3, 151, 129), (9, 320, 64), (17, 300, 260)], ids=str)
def test_down_of_rows_that_say_whose_they_are(kernels, dtype, supers, shape):
    """As slots on a CUDA device have them, in any order; the list is of rows. Rows that are not listed may be anything."""
    m, intermediate, hidden = shape
    neurons, matrix = (
        neuron_lists(intermediate)["odd"],
        Matrix.of_groups(groups_of(hidden, intermediate, supers), transposed=True),
    )
    x, rows = randn(m, len(neurons), dtype=dtype), len(neurons) + 3
    listed = torch.randperm(rows)[: len(neurons)].int()
    data, neuron_of = torch.full((rows, matrix.data.shape[1]), 255, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int32)
    data[listed.long()], neuron_of[listed.long()] = matrix.data[neurons.long()], neurons
    held = Matrix(data, matrix.packed, matrix.shared, neuron_of=walled(neuron_of))
    if not on_cuda(kernels):
        with pytest.raises(ValueError, match="^weight: neuron_of: expected a matrix on a CUDA device, got one on cpu"):
            kernels.down(x, held, listed)
        return
    out = poisoned(m, hidden, dtype=dtype)
    kernels.down(walled(x), among_faults(held, listed), walled(listed), out=out.tensor)
    assert_same_bits(out.check(), kernels.down(x, matrix, neurons))
    for wrong, message in (
        (neuron_of[1:], rf"expected shape \[{rows}\], got \[{rows - 1}\]"),
        (neuron_of - 1, "expected values in"),
        (neuron_of + 32 * q8.groups(intermediate), rf"expected values in \[0, {32 * q8.groups(intermediate)}\)"),
    ):
        with pytest.raises(ValueError, match=f"^weight: neuron_of: {message}"):
            kernels.down(x, dataclasses.replace(held, neuron_of=wrong), listed)


# ----------------------------------------------------------------------------------------------------------------- all of them


def three(supers, width=151):
    along = [Matrix.of_groups(groups_of(65, width, supers)) for _ in "gu"]
    return [*along, Matrix.of_groups(groups_of(width, 65, supers), transposed=True)]


@pytest.mark.parametrize("width", [264, 2600])
def test_blocks_with_several_tiles(kernels, supers, width):
    gate, up = (Matrix.of_groups(groups_of(rows_of_several_tiles(kernels), width, supers)) for _ in "gu")
    check_several_tiles(kernels, torch.bfloat16, gate, up)


@pytest.mark.parametrize("width", [151, 200])
def test_batch_invariance(kernels, dtype, supers, width):
    check_batch_invariance(kernels, dtype, three(supers, width), width)


def test_thread_invariance(cpu_kernels, dtype, supers):
    check_thread_invariance(cpu_kernels, dtype, three(supers))


def test_rows_that_stand_apart(kernels, dtype, supers):
    matrices = three(supers)
    check_views(kernels, dtype, matrices, list(map(among_faults, matrices)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(kernels, dtype, supers, value):
    check_faults_stay(kernels, dtype, three(supers), value)


# ---------------------------------------------------------------------------------------------------------------------- errors


def test_errors():
    x = torch.zeros(2, 40)
    along, down = (Matrix.of_groups(groups_of(*shape, False), shape[0] == 4) for shape in ((3, 40), (4, 40)))
    for data, message in (
        (along.data[:, :-16], r"^weight: expected shape \[any, 48\], got \[3, 32\]"),
        (along.data.flatten(), r"^weight: expected shape \[any, 48\], got \[144\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear(x, Matrix(data, (Format.Q4, 40)))
    with pytest.raises(TypeError, match="^weight: expected torch.uint8"):
        ops.linear(x, Matrix(along.data.float(), (Format.Q4, 40)))
    with pytest.raises(ValueError, match="^weight: expected a matrix of the format Q4_ACROSS with its shared scales, got none"):
        ops.down(x, Matrix(down.data, down.packed))
    with pytest.raises(ValueError, match=r"^weight: shared: expected shape \[256\], got \[255\]"):
        ops.down(x, Matrix(down.data, down.packed, down.shared[1:]))


def test_groups_that_lie_the_other_way():
    x = torch.zeros(2, 40)
    along, across = (Matrix.of_groups(groups_of(40, 40, True), transposed) for transposed in (False, True))
    for op in (ops.linear, ops.gate, lambda x, weight: ops.gate_up(x, weight, along)):
        with pytest.raises(
            ValueError, match="^(weight|gate): expected groups along the rows, which are multiplied, got Q4_K_ACR"
        ):
            op(x, across)
    with pytest.raises(ValueError, match="^up: expected groups along the rows"):
        ops.gate_up(x, along, across)
    with pytest.raises(ValueError, match="^weight: expected groups across the rows, which are added up, got Q4_K"):
        ops.down(x, along)


def test_scales_that_16_byte_loads_may_not_read(kernels):
    """A file that is mapped into memory may have them."""
    down = Matrix.of_groups(groups_of(40, 33, False), transposed=True)
    moved = torch.zeros(down.shared.numel() + 16, dtype=torch.uint8)[8:-8].copy_(down.shared)
    x, matrix = randn(2, 33, dtype=torch.float32), Matrix(down.data, down.packed, moved)
    if not on_cuda(kernels):
        assert_same_bits(kernels.down(x, matrix), kernels.down(x, down))
        return
    with pytest.raises(ValueError, match="^weight: shared: expected to begin at a multiple of 16 bytes, got 8 bytes after one"):
        kernels.down(x, matrix)
