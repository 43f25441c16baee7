"""Products for passes of many tokens: torch's or our kernels', whichever are fast on this CPU; the same within rounding."""

import types

import pytest
import torch
from backends import assert_close, randn, sum_error
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


def test_packed_weights_are_ours_alone(dtype, instructions, asked):
    products.dot(randn(2, 64, dtype=dtype), Matrix(torch.randn(33, 64)).in_eight_bits())
    products.add_rows(randn(2, 33, dtype=dtype), Matrix(torch.randn(33, 64)).in_eight_bits())
    assert asked == ["linear", "down"]


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
    text = prompt(70)
    with torch.no_grad():
        expected = exact(text).logits[0, -1]
    reader = Reader(prepare(rounded), 70)
    reader.prefill(text[0])
    assert (reader.next - expected).norm() <= 30 * torch.finfo(dtype).eps * expected.norm()
    assert ("down" in asked) != instructions
