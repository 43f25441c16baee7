"""The formats of eight bits, q8 and q8_upper: the numbers that they hold, and the ops that multiply them."""

import functools
import math

import pytest
import torch
from backends import (
    PACKED_CPU_BACKENDS,
    PACKED_KERNELS,
    OnDevice,
    U,
    activation_error,
    assert_close,
    assert_same_bits,
    dot_error,
    in_turns,
    neuron_lists,
    poisoned,
    randn,
    sum_error,
    using,
    walled,
)

from sirius_ext.kernels import dispatch, ops, q8, reference
from sirius_ext.kernels.matrix import Format, Matrix

FORMATS = [Format.Q8, Format.Q8_UPPER]
TINY = torch.finfo(torch.float32).tiny
# (rows, in, out): x of 16 bits aligned and not, whole groups and broken ones, scales of one piece of 16 bytes and of more, one
# round of a block's warps and more.
SHAPES = [
    (1, 1, 1), (1, 64, 31), (2, 31, 33), (3, 160, 17), (5, 72, 129), (7, 151, 64), (9, 1096, 20), (16, 40, 63), (17, 264, 33),
    (33, 33, 15), (1, 1344, 16),
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


@pytest.fixture(params=FORMATS, ids=lambda form: form.name.lower())
def form(request):
    return request.param


def packed(weight: torch.Tensor, form: Format) -> Matrix:
    return Matrix(weight).in_eight_bits() if form == Format.Q8 else Matrix(weight).in_four_bits()


def among_faults(matrix: Matrix, neurons: torch.Tensor | None = None) -> Matrix:
    """A copy with bytes of 255, of which two are a scale of NaN, before, between and after its rows; and in those not listed."""
    *planes, rows, width = matrix.data.shape
    wide = torch.full((*planes, rows + 2, width + 48 - width % 16), 255, dtype=torch.uint8)
    selected = slice(None) if neurons is None else neurons.long()
    wide[..., 1:-1, :][..., selected, 16 : 16 + width] = matrix.data[..., selected, :]
    return Matrix(wide[..., 1:-1, 16 : 16 + width], matrix.packed)


def on_cuda(kernels) -> bool:
    return isinstance(kernels, OnDevice) or dispatch.is_cuda(torch.device("cpu"))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Input as the CPU's kernels multiply it: rounded to integers of up to 127 times a scale, in groups of 32 along its rows.
    x: float32 [..., cols]."""
    cols = x.shape[-1]
    grouped = torch.nn.functional.pad(x, (0, -cols % q8.GROUP)).unflatten(-1, (-1, q8.GROUP))
    largest = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)  # a number / tensor rounds twice
    integers = (grouped * inverse).round()
    result: torch.Tensor = (integers * (largest / 127)).flatten(-2)[..., :cols]
    return result


def multiplied(kernels, x: torch.Tensor) -> torch.Tensor:
    """The input that products of rows multiply: the CPU's round it to eight bits."""
    return x.float() if on_cuda(kernels) else rounded(x.float())


def product_error(kernels, matrix: Matrix):
    """Of products of rows, as `dot_error` of the numbers. The CPU's take 120.5 times an odd sum of integers for a half less."""

    def error(x, weight):
        rounding = dot_error(x, weight)
        if on_cuda(kernels) or matrix.format == Format.Q8:
            return rounding
        scales = [numbers.abs().amax(-1) for numbers in grouped(x, weight)]
        return rounding + 0.5 * (scales[0] / 127) @ (scales[1] / 119).T

    return error


def grouped(*numbers):
    return [torch.nn.functional.pad(each, (0, -each.shape[1] % q8.GROUP)).unflatten(1, (-1, q8.GROUP)) for each in numbers]


# --------------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 255, 257, 512])
def test_numbers_are_rounded_to_the_nearest_code(cols):
    weight = torch.randn(7, cols) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0.0
    matrix = Matrix(weight).in_eight_bits()
    assert matrix.shape == weight.shape and matrix.stride % 16 == 0 and matrix.data.shape == (2, 7, q8.row_bytes(cols))
    (wide,) = grouped(weight)
    scales = (wide.abs().amax(-1) / 127).half().float().repeat_interleave(q8.GROUP, 1)[:, :cols]
    # Half a code; or of the largest what rounding its scale has left, which may be subnormal.
    allowed = torch.maximum(0.5 * scales, 127 * (scales * 2.0**-11 + 2.0**-25))
    assert ((matrix.dense() - weight).abs() <= allowed * (1 + 4 * U)).all()
    upper = matrix.in_four_bits()
    assert ((upper.dense() - matrix.dense()).abs() <= 7.5 * scales).all()
    # Of the same bytes, whether it is a view, made of numbers, or made by torch.
    assert upper.data.data_ptr() == matrix.data.data_ptr()
    assert torch.equal(upper.data, Matrix(weight).in_four_bits().data)
    assert torch.equal(upper.data, q8.encode(weight, upper=True)) and torch.equal(matrix.data, q8.encode(weight))


def every_code(form: Format) -> tuple[Matrix, torch.Tensor]:
    """A matrix with all 256 codes, laid out as csrc/q8.h says, scales of 1; and its numbers."""
    codes = torch.arange(256).view(8, 32)
    first, second = codes[:, :16], codes[:, 16:]
    planes = torch.stack((first >> 4 | second & 0xF0, first & 15 | (second & 15) << 4)).to(torch.uint8)
    scales = torch.zeros(2, 8, 8, dtype=torch.float16)
    scales[0, :, 0] = 1.0
    data = torch.cat((scales.view(torch.uint8), planes), 2).contiguous()
    if form == Format.Q8:
        return Matrix(data, (form, 32)), codes - 128.0
    return Matrix(data[0], (form, 32)), codes // 16 * 16 - 120.5


def test_every_code_is_its_number(kernels, dtype, form):
    matrix, numbers = every_code(form)
    assert torch.equal(matrix.dense(), numbers)
    out = kernels.linear(torch.eye(32, dtype=dtype), matrix, out_dtype=torch.float32)
    added = kernels.down(torch.eye(8, dtype=dtype), matrix)
    if on_cuda(kernels):
        assert torch.equal(out, numbers.T) and torch.equal(added.float(), numbers)
    else:  # 1 is 127 / 127, an odd sum: see `product_error`
        half = 0.5 / 127 if form == Format.Q8_UPPER else 0.0
        assert_close(out, numbers.T, half + 4 * U * numbers.T.abs())
        assert_close(added, numbers, half + 4 * U * numbers.abs())


def check_unpacking(matrix: Matrix, dtype: torch.dtype) -> None:
    """All numbers, and those of parts that begin at groups and end anywhere, by one thread and by several."""
    (rows, cols), numbers, threads = matrix.shape, matrix.dense(), torch.get_num_threads()
    for row, column in {(0, 0), ((rows - 1) // 32 * 32, 0), (0, (cols - 1) // 32 * 32), (rows // 64 * 32, cols // 64 * 32)}:
        for height, width in {(rows - row, cols - column), (1, 1), ((rows - row + 1) // 2, (cols - column + 1) // 2)}:
            expected = numbers[row : row + height, column : column + width].to(dtype)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                out = poisoned(height, width, dtype=dtype)
                assert matrix.unpack(out.tensor, row, column) is out.tensor
                assert_same_bits(out.check(), expected)
    torch.set_num_threads(threads)


UNPACKED = [(1, 1), (33, 31), (64, 32), (70, 161), (129, 545), (3, 4200)]


@pytest.mark.parametrize("rows, cols", UNPACKED)
def test_numbers_of_packed_weights(cpu_kernels, dtype, form, rows, cols):
    weight = torch.randn(rows, cols)
    weight[rows // 2] = 0.0
    check_unpacking(among_faults(packed(weight, form)), dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_numbers_that_cannot_be_packed(value):
    weight = torch.zeros(3, 40)
    weight[1, 35] = value
    for pack in (Matrix(weight).in_eight_bits, Matrix(weight).in_four_bits, functools.partial(q8.encode, weight)):
        with pytest.raises(ValueError, match="^expected finite weights of at most 8.3e\\+06"):
            pack()


# --------------------------------------------------------------------------------------------------------- products of rows


@pytest.mark.parametrize(("shape", "extras"), in_turns(3, SHAPES, ["plain", "bias", "residual"]), ids=str)
def test_linear_against_reference(kernels, dtype, form, shape, extras):
    m, width, rows = shape
    x, matrix = walled(randn(m, width, dtype=dtype)), packed(torch.randn(rows, width), form)
    bias = walled(randn(rows, dtype=dtype)) if extras == "bias" else None
    residual = walled(randn(m, rows, dtype=dtype)) if extras == "residual" else None
    seen, weight = multiplied(kernels, x), matrix.dense()
    exact = seen @ weight.T
    error = product_error(kernels, matrix)(seen, weight)
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
def test_gate_up_against_reference(kernels, dtype, form, shape, kind):
    m, hidden, intermediate = shape
    neurons, x = neuron_lists(intermediate)[kind], walled(randn(m, hidden, dtype=dtype))
    gate, up = (packed(torch.randn(intermediate, hidden), form) for _ in "gu")
    rows = slice(None) if neurons is None else neurons.long()
    seen, dense = multiplied(kernels, x), [matrix.dense()[rows] for matrix in (gate, up)]
    exact = reference.gate_up(seen, *dense)
    error = activation_error(seen, dense[0], "silu", dense[1], product_error(kernels, gate))
    out = poisoned(*exact.shape, dtype=dtype)
    listed = None if neurons is None else walled(neurons)
    kernels.gate_up(x, among_faults(gate, neurons), among_faults(up, neurons), listed, out=out.tensor)
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
def test_gate_and_up_against_reference(kernels, dtype, form, shape):
    m, hidden, intermediate = shape
    neurons, x = neuron_lists(intermediate)["odd"], walled(randn(m, hidden, dtype=dtype))
    gate, up = (packed(torch.randn(intermediate, hidden), form) for _ in "gu")
    seen, dense = multiplied(kernels, x), [matrix.dense() for matrix in (gate, up)]
    gates = poisoned(m, intermediate, dtype=torch.float32)
    kernels.gate(x, among_faults(gate), out=gates.tensor)
    assert_close(
        gates.check(),
        reference.gate(seen, dense[0]),
        activation_error(seen, dense[0], "silu", dot_error=product_error(kernels, gate)),
    )
    exact = reference.up(seen, dense[1], gates.tensor, neurons)
    error = gates.tensor[:, neurons.long()].abs() * product_error(kernels, up)(seen, dense[1][neurons.long()])
    out = poisoned(m, len(neurons), dtype=dtype)
    kernels.up(x, among_faults(up, neurons), gates.tensor, neurons, out=out.tensor)
    assert_close(out.check(), exact, error + 2 * U * exact.abs() + TINY)
    assert_same_bits(out.tensor, kernels.gate_up(x, gate, up, neurons))


# ------------------------------------------------------------------------------------------------------------- rows added up

# (rows, intermediate, hidden)
DOWN_SHAPES = [
    (1, 1, 1), (1, 64, 31), (2, 33, 100), (3, 151, 129), (5, 1134, 33), (7, 63, 64), (16, 129, 151), (17, 300, 260), (33, 31, 96),
]  # fmt: skip


def sums_of_rows(kernels, x, weight, form):
    """`x @ weight`, and how far a result may be from it.

    CUDA multiplies 16 bits of each coefficient times its scale. The CPU rounds that to an integer, here 127, 0 or -127, so that
    the scale's own rounding is left; and of q8_upper it takes 120.5 times an odd sum of 32 rows for a half less."""
    terms = x.float().abs() @ weight.abs()
    error = sum_error(terms, x.shape[1])
    if on_cuda(kernels):
        return x.float() @ weight, error + 2.0**-17 * terms
    pieces = -(-x.shape[1] // 32) + 8  # the neurons are summed in up to eight parts
    return x.float() @ weight, error + 8 * U * terms + 0.5 / 127 * pieces * (form == Format.Q8_UPPER)


@pytest.mark.parametrize(("shape", "kind"), in_turns(3, DOWN_SHAPES, LISTS), ids=str)
def test_down_against_reference(kernels, dtype, form, shape, kind):
    m, intermediate, hidden = shape
    neurons = neuron_lists(intermediate)[kind]
    kept = intermediate if neurons is None else len(neurons)
    numbers = torch.randint(-126, 127, (intermediate, hidden)).float()
    if on_cuda(kernels):
        x = randn(m, kept, dtype=dtype)
        numbers *= 0.01 * torch.rand(intermediate, 1)
    else:
        x = torch.randint(-1, 2, (m, kept)).to(dtype)
        numbers[:, ::32] = 127  # all scales are 1
    residual = walled(randn(m, hidden, dtype=dtype)) if kind in ("one", "odd") else None
    matrix = packed(numbers, form)
    weight = matrix.dense() if neurons is None else matrix.dense()[neurons.long()]
    exact, error = sums_of_rows(kernels, x, weight, form)
    if residual is not None:
        exact = exact + residual.float()
        error = error + 8 * U * (exact.abs() + residual.float().abs())
    out = poisoned(m, hidden, dtype=dtype)
    listed = None if neurons is None else walled(neurons)
    kernels.down(walled(x), among_faults(matrix, neurons), listed, residual, out=out.tensor)
    assert_close(out.check(), exact, error)


@pytest.mark.parametrize("shape", [(1, 400, 96), (5, 33, 200), (17, 129, 64)], ids=str)
def test_down_of_any_numbers(kernels, dtype, form, shape):
    """The CPU's integers are as far from the coefficients as the weights' codes are from the weights."""
    m, intermediate, hidden = shape
    x, matrix = randn(m, intermediate, dtype=dtype), packed(torch.randn(intermediate, hidden), form)
    exact = x.float() @ matrix.dense()
    out = kernels.down(x, matrix).float()
    assert (out - exact).square().mean() <= 0.01**2 * exact.square().mean()


# ----------------------------------------------------------------------------------------------------------------- all of them


def everything(kernels, x, z, matrices):
    """Every product of x [m, width] and z [m, 65]."""
    gate, up, down = matrices
    neurons = torch.arange(1, 65, 3, dtype=torch.int32)
    gates = kernels.gate(x, gate)
    return (
        kernels.linear(x, gate),
        kernels.linear(x, up, residual=z, out_dtype=torch.float32),
        kernels.gate_up(x, gate, up),
        kernels.gate_up(x, gate, up, neurons, activation="gelu_tanh"),
        gates,
        kernels.up(x, up, gates, neurons),
        kernels.down(z, down),
        kernels.down(z[:, : len(neurons)].contiguous(), down, neurons),
    )


def three(form, width=151):
    return [packed(torch.randn(65, width), form) for _ in range(3)]


def check_batch_invariance(kernels, dtype, matrices, width):
    """A row's bits are the same among others and alone."""
    x, z = randn(33, width, dtype=dtype), randn(33, 65, dtype=dtype)
    single = zip(*(everything(kernels, *rows, matrices) for rows in zip(x[:17].split(1), z[:17].split(1))))
    alone = [torch.cat(outs) for outs in single]
    # The CPU has a body for each number of rows up to eight, and for twelve and sixteen.
    for m in (2, 8, 9, 17, 33) if on_cuda(kernels) else (*range(2, 18), 33):
        for out, expected in zip(everything(kernels, x[:m], z[:m], matrices), alone):
            assert_same_bits(out[:17], expected[:m])


def check_thread_invariance(kernels, dtype, matrices):
    x, z = randn(3, 151, dtype=dtype), randn(3, 65, dtype=dtype)
    torch.set_num_threads(1)
    one = everything(kernels, x, z, matrices)
    torch.set_num_threads(3)
    for out, expected in zip(everything(kernels, x, z, matrices), one):
        assert_same_bits(out, expected)


def check_views(kernels, dtype, matrices, views):
    """Views of the matrices give what they give."""
    x, z = randn(3, 151, dtype=dtype), randn(3, 65, dtype=dtype)
    for out, expected in zip(everything(kernels, x, z, views), everything(kernels, x, z, matrices)):
        assert_same_bits(out, expected)


def check_faults_stay(kernels, dtype, matrices, value):
    """A row of input that is not finite, and no other, gives what is not."""
    x, z = randn(3, 151, dtype=dtype), randn(3, 65, dtype=dtype)
    x[1, 150] = z[1, 2] = value
    for out in everything(kernels, x, z, matrices):
        assert not out[1].isfinite().any()
        assert out[::2].isfinite().all()


def rows_of_several_tiles(kernels) -> int:
    """Of gate and up, so many that a block of a GPU has several tiles of them."""
    return 4500 if isinstance(kernels, OnDevice) else 150


def check_several_tiles(kernels, dtype, gate, up):
    """gate_up, whose blocks have several tiles on a GPU, gives what gate and up do, whose blocks have one each."""
    neurons = torch.randperm(gate.shape[0])[: gate.shape[0] - 9].sort().values.int()
    for m in (1, 8, 16):
        x = randn(m, gate.shape[1], dtype=dtype)
        gates = kernels.gate(x, gate)
        assert_same_bits(kernels.gate_up(x, gate, up, neurons), kernels.up(x, up, gates, neurons))
        all_of_them = torch.arange(gate.shape[0], dtype=torch.int32)
        assert_same_bits(kernels.gate_up(x, gate, up), kernels.up(x, up, gates, all_of_them))


@pytest.mark.parametrize("width", [264, 2600])  # one step of one of a block's warps, and two of some
def test_blocks_with_several_tiles(kernels, form, width):
    gate, up = (packed(torch.randn(rows_of_several_tiles(kernels), width), form) for _ in "gu")
    check_several_tiles(kernels, torch.bfloat16, gate, up)


@pytest.mark.parametrize("width", [151, 200])
def test_batch_invariance(kernels, dtype, form, width):
    check_batch_invariance(kernels, dtype, three(form, width), width)


def test_thread_invariance(cpu_kernels, dtype, form):
    check_thread_invariance(cpu_kernels, dtype, three(form))


def test_rows_that_stand_apart(kernels, dtype, form):
    """Among them the upper half of a matrix in eight bits."""
    matrices = three(form)
    for view in (among_faults, in_itself):
        check_views(kernels, dtype, matrices, list(map(view, matrices)))


def in_itself(matrix: Matrix) -> Matrix:
    """The same rows in a matrix of eight bits."""
    if matrix.format == Format.Q8:
        return matrix
    lower = torch.full_like(matrix.data, 255)
    return Matrix(torch.stack((matrix.data, lower)), (Format.Q8, matrix.cols)).in_four_bits()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(kernels, dtype, form, value):
    check_faults_stay(kernels, dtype, three(form), value)


# ---------------------------------------------------------------------------------------------------------------------- errors

WEIGHT = Matrix(torch.ones(4, 40)).in_eight_bits()


@pytest.mark.parametrize(
    ("data", "cols", "error", "message"),
    [
        (WEIGHT.data[..., :-16], 40, ValueError, r"^weight: expected shape \[2, any, 48\], got \[2, 4, 32\]"),
        (WEIGHT.data[0], 40, ValueError, r"^weight: expected shape \[2, any, 48\], got \[4, 48\]"),
        (WEIGHT.data, 64, ValueError, r"^weight: expected shape \[any, 40\], got \[4, 64\]"),
        (WEIGHT.data, 72, ValueError, r"^weight: expected shape \[2, any, 64\], got \[2, 4, 48\]"),
        (WEIGHT.data.float(), 40, TypeError, "^weight: expected torch.uint8"),
        (WEIGHT.data.flatten(), 40, ValueError, "^weight: expected shape"),
        (WEIGHT.data.mT.contiguous().mT, 40, ValueError, "^weight: expected a contiguous"),
    ],
)
def test_errors(data, cols, error, message):
    with pytest.raises(error, match=message):
        ops.linear(torch.zeros(2, 40), Matrix(data, (Format.Q8, cols)))


@pytest.mark.parametrize(("stride", "first"), [(56, 0), (48, 8)])
def test_rows_that_16_byte_loads_may_not_read(kernels, stride, first):
    """A file that is mapped into memory may have them."""
    data = (
        torch.zeros(8 * stride + 8, dtype=torch.uint8)[first:].as_strided((2, 4, 48), (4 * stride, stride, 1)).copy_(WEIGHT.data)
    )
    x, matrix = torch.ones(2, 40), Matrix(data, (Format.Q8, 40))
    if not on_cuda(kernels):
        assert_same_bits(kernels.linear(x, matrix), kernels.linear(x, WEIGHT))
        return
    with pytest.raises(ValueError, match=f"^weight: expected rows that begin at multiples of 16 bytes, got a stride of {stride}"):
        kernels.linear(x, matrix)


def test_gate_and_up_of_two_formats(kernels):
    """Packed ones need not be of one; plain ones have the input's element type."""
    x, upper = torch.randn(2, 40), Matrix(torch.randn(4, 40)).in_four_bits()
    with pytest.raises(ValueError, match="^up: expected a matrix of the format Q8, as gate's, got F32"):
        kernels.gate_up(x, WEIGHT, torch.ones(4, 40))
    neurons = torch.arange(4, dtype=torch.int32)
    assert_same_bits(kernels.gate_up(x, WEIGHT, upper), kernels.up(x, upper, kernels.gate(x, WEIGHT), neurons))
