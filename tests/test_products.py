"""Products for passes of many tokens: torch's or our kernels', whichever are fast on this CPU; the same within rounding."""

import types

import pytest
import torch
from backends import assert_close, randn, sum_error
from test_packed import packed, same_numbers
from test_q4 import groups_of
from tiny import FAMILY_NAMES, NAMES, prompt, tiny

from sirius_ext.decoding.reading import Reader
from sirius_ext.engine import prepare
from sirius_ext.kernels import ops, products
from sirius_ext.kernels.matrix import Matrix


@pytest.fixture(params=[False, True], ids=["without instructions", "with instructions"])
def instructions(request, monkeypatch):
    """A CPU that oneDNN has, or does not have, products of 16 bits for."""
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: request.param)
    return request.param


@pytest.fixture
def asked(monkeypatch):
    """The ops of ours that were called, by name."""
    names: list[str] = []
    for name in ("linear", "down"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, op=op, **more: names.append(name) or op(*args, **more))
    return names


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with bias or residual"])
def test_whoever_multiplies(dtype, instructions, asked, extra):
    x, z, weight = randn(37, 150, dtype=dtype), randn(37, 65, dtype=dtype), Matrix(randn(65, 150, dtype=dtype))
    bias, residual = (randn(65, dtype=dtype), randn(37, 150, dtype=dtype)) if extra else (None, None)
    numbers = weight.data.float()
    exact, terms = x.float() @ numbers.T, x.float().abs() @ numbers.abs().T
    added, added_terms = z.float() @ numbers, z.float().abs() @ numbers.abs()
    if bias is not None and residual is not None:
        exact, terms = exact + bias.float(), terms + bias.float().abs()
        added, added_terms = added + residual.float(), added_terms + residual.float().abs()
    assert_close(products.dot(x, weight, bias), exact, sum_error(terms, 150 + 1))
    assert_close(products.add_rows(z, weight, residual), added, sum_error(added_terms, 65 + 1))
    ours = dtype != torch.float32 and not instructions
    assert asked == (["linear", "down"] if ours else [])


@pytest.fixture
def tiles(monkeypatch):
    """A CPU that has AMX, as far as anybody asks; and few numbers are unpacked at a time."""
    monkeypatch.setattr(ops, "isa", lambda: "amx")
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: True)
    monkeypatch.setattr(products, "NUMBERS", 5000)


PACKED = {
    "q8": lambda rows, cols: 2 * [Matrix(torch.randn(rows, cols)).in_eight_bits()],
    "q8_upper": lambda rows, cols: 2 * [Matrix(torch.randn(rows, cols)).in_eight_bits().in_four_bits()],
    "q4": lambda rows, cols: of_four_bits(rows, cols, supers=False),
    "q4_k": lambda rows, cols: of_four_bits(rows, cols, supers=True),
}


def of_four_bits(rows: int, cols: int, supers: bool) -> list[Matrix]:
    return [Matrix.of_groups(groups_of(rows, cols, supers)), Matrix.of_groups(groups_of(cols, rows, supers), transposed=True)]


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with bias or residual"])
@pytest.mark.parametrize("matrices", PACKED.values(), ids=PACKED)
def test_many_rows_of_packed_weights_are_multiplied_as_numbers(tiles, asked, matrices, extra):
    """Which are rounded to 16 bits; in parts that end where the matrix does, or a group."""
    rows, cols, m = 75, 330, products.MANY
    along, across = matrices(rows, cols)
    x, z = randn(m, cols, dtype=torch.bfloat16), randn(m, rows, dtype=torch.bfloat16)
    bias, residual = (randn(*size, dtype=torch.bfloat16) if extra else None for size in ((rows,), (m, cols)))
    for found, factor, weight, added in (
        (products.dot(x, along, bias), x, along.dense().T, bias),
        (products.add_rows(z, across, residual), z, across.dense(), residual),
    ):
        exact, terms = factor.float() @ weight, factor.float().abs() @ weight.abs()
        if added is not None:
            exact, terms = exact + added.float(), terms + added.float().abs()
        assert_close(found, exact, sum_error(terms, len(weight) + 1) + 2.0**-9 * terms)
    assert asked == []


def test_packed_weights_are_ours_elsewhere(dtype, tiles, asked, monkeypatch):
    """With fewer rows, other element types, or instructions that multiply no faster than our own."""
    matrix = Matrix(torch.randn(33, 64)).in_eight_bits()

    def multiply(m):
        products.dot(randn(m, 64, dtype=dtype), matrix)
        products.add_rows(randn(m, 33, dtype=dtype), matrix)

    multiply(products.MANY - 1)
    if dtype != torch.bfloat16:
        multiply(products.MANY)
    for isa in ("amx-soft", "avx512", "scalar"):
        monkeypatch.setattr(ops, "isa", lambda isa=isa: isa)
        multiply(products.MANY)
    monkeypatch.setattr(ops, "isa", lambda: "amx")
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: False)  # a torch that does not know of tiles
    multiply(products.MANY)
    assert asked == ["linear", "down"] * (5 if dtype == torch.bfloat16 else 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_onednn_says_is_asked(dtype, monkeypatch):
    """Without instructions torch takes a hundred times as long as our kernels: it must not be asked then."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for known, built in ((True, True), (False, True), (True, False)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda known=known: known, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda built=built: built)
        assert products._has_instructions.__wrapped__(dtype) == (known and built)
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())  # a torch that no longer says
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert not products._has_instructions.__wrapped__(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_prompts_of_16_bits(name, dtype, instructions, asked):
    """Every family's logits after a prompt are about those in float32, whoever multiplies."""
    exact, rounded = tiny(name), tiny(name, dtype)
    text = prompt(100)
    with torch.no_grad():
        expected = exact(text).logits[0, -1]
    reader = Reader(prepare(rounded), 100)
    reader.prefill(text[0])
    assert (reader.next - expected).norm() <= 30 * torch.finfo(dtype).eps * expected.norm()
    assert ("down" in asked) != instructions


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("name", [*NAMES, *FAMILY_NAMES])
def test_prompts_with_packed_weights(name, weights, tiles, asked):
    """The same with the numbers that packed weights stand for, by tiles."""
    text, model = prompt(100), packed(name, torch.bfloat16, weights)
    with torch.no_grad():
        expected = same_numbers(name, weights=weights, of=torch.bfloat16)(text).logits[0, -1]
    reader = Reader(prepare(model), 100)
    reader.prefill(text[0])
    # A random model's seven layers of four bits make most of what rounding has left.
    factor = 40 if (name, weights) == ("gemma3", "q4") else 30
    assert (reader.next - expected).norm() <= factor * torch.finfo(torch.bfloat16).eps * expected.norm()
    assert "down" not in asked
