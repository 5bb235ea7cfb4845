"""Weights in 8 and 4 bits: what rounding may take, where the numbers lie, and the plain products."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xllm.core.errors import ConfigError
from xllm.ops.quantised import (
    Fp8Weight,
    Int4Rows,
    Int4Weight,
    Int8Weight,
    fp8_linear,
    quantise_tokens,
    store_rows,
    weight_only_linear,
)
from xllm.ops.schemes import SCHEMES
from xllm.ops.table import QUANTISED, load_ops, resolve

CLASSES = [Fp8Weight, Int8Weight, Int4Weight]
SLACK = 1 + 1e-4  # float32 arithmetic on the way


def stored(kind: Any, rows_NK: torch.Tensor, group: int | None = None, pieces: int = 1) -> Any:
    """The rows in a weight, stored in several pieces in no order."""
    weight = kind(*rows_NK.shape, group)
    parts, first = [], 0
    for part in rows_NK.tensor_split(pieces):
        parts.append((first, part))
        first += part.shape[0]
    random.Random(0).shuffle(parts)
    for first, part in parts:
        store_rows(weight, first, part)
    return weight


@st.composite
def matrices(draw: st.DrawFn, multiple: int = 1) -> torch.Tensor:
    """Rows of many magnitudes, some of them all zero."""
    rows, columns = draw(st.integers(1, 40)), multiple * draw(st.integers(1, 320 // multiple))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * 10.0 ** torch.randint(-4, 4, (rows, 1), generator=generator) * (matrix[:, :1] > -1)


@given(rows_NK=matrices())
def test_fp8_is_off_by_a_sixteenth_at_most(rows_NK: torch.Tensor) -> None:
    weight = stored(Fp8Weight, rows_NK, pieces=3)
    error = (weight.dequantise() - rows_NK).abs()
    assert (error <= torch.maximum(rows_NK.abs() / 16, weight.scales[:, None] / 1024) * SLACK).all()


@given(rows_NK=matrices())
def test_int8_is_off_by_half_a_step_at_most(rows_NK: torch.Tensor) -> None:
    weight = stored(Int8Weight, rows_NK, pieces=2)
    largest = rows_NK.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    assert ((weight.dequantise() - rows_NK).abs() <= largest / 254 * SLACK).all()


@given(rows_NK=matrices(multiple=16), data=st.data())
def test_int4_is_off_by_half_a_step_at_most(rows_NK: torch.Tensor, data: st.DataObject) -> None:
    columns = rows_NK.shape[1]
    groups = [None, *(group for group in range(16, columns + 1, 16) if columns % group == 0)]
    weight = stored(Int4Weight, rows_NK, data.draw(st.sampled_from(groups)), pieces=3)
    error, largest = (
        part.abs().unflatten(1, (-1, weight.group)).amax(dim=2)
        for part in (weight.dequantise() - rows_NK, rows_NK)
    )
    assert (error <= largest.clamp(min=1e-12) / 15 * SLACK).all()


@given(
    rows=st.integers(1, 30), groups=st.integers(1, 12), width=st.sampled_from([16, 32, 64, 128, 384]),
    seed=st.integers(0, 2**31), scales=st.sampled_from([torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_ready_rows_come_back_exactly(
    rows: int, groups: int, width: int, seed: int, scales: torch.dtype
) -> None:
    """Zero points, and scales of 16 bits, lose nothing by lying in one word."""
    torch.manual_seed(seed)
    ready = Int4Rows(
        torch.randint(16, (rows, groups * width), dtype=torch.uint8),
        (torch.randn(rows, groups) * 10.0 ** torch.randint(-3, 3, (rows, groups))).to(scales).float(),
        torch.randint(16, (rows, groups), dtype=torch.uint8),
    )
    weight = Int4Weight(rows + 2, groups * width, width)
    store_rows(weight, 1, ready)
    numbers_NGk = ready.numbers_NK.int().unflatten(1, (groups, width))
    exact = (numbers_NGk - ready.zeros_NG.int()[:, :, None]) * ready.scales_NG[:, :, None]
    assert torch.equal(weight.dequantise()[1:-1], exact.flatten(1))


def test_neighbouring_columns_lie_in_neighbouring_words() -> None:
    """Chunks of 16 columns; chunks 2 i and 2 i + 1 at bits 4 i of the two halves."""
    columns = 256
    numbers_NK = torch.zeros(1, columns, dtype=torch.uint8)
    for column, word, shift in ((0, 0, 0), (15, 15, 0), (16, 0, 16), (37, 5, 4), (127, 15, 28), (128, 16, 0)):
        weight = Int4Weight(1, columns, 128)
        numbers_NK.zero_()[0, column] = 9
        weight.put(0, Int4Rows(numbers_NK, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.uint8)))
        expected = torch.zeros(1, columns // 8, dtype=torch.int64)
        expected[0, word] = 9 << shift
        assert torch.equal(weight.numbers.long() % 2**32, expected), column


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_products_are_those_of_the_dequantised_weight(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, bias = torch.randn(tokens, 96).to(dtype), torch.randn(50).to(dtype)
    for kind in (Int8Weight, Int4Weight):
        weight = stored(kind, torch.randn(50, 96))
        exact = x.double() @ weight.dequantise().double().T
        limit = 3e-6 if dtype == torch.float32 else 2**-7
        for given_bias in (None, bias):
            wanted = exact if given_bias is None else exact + bias.double()
            product = weight_only_linear(x, weight, given_bias)
            assert product.dtype == dtype
            assert (product - wanted).abs().max() <= limit * wanted.abs().max()


def test_fp8_products_round_the_tokens_too() -> None:
    torch.manual_seed(1)
    x, bias = torch.randn(5, 96) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 7.0])[:, None], torch.randn(50)
    weight = stored(Fp8Weight, torch.randn(50, 96))
    numbers, scales = quantise_tokens(x)
    rounded = numbers.double() * scales.double()[:, None]
    assert ((rounded - x).abs() <= torch.maximum(x.abs() / 16, scales[:, None] / 1024) * SLACK).all()
    exact = rounded @ (weight.numbers.double() * weight.scales.double()[:, None]).T + bias
    assert torch.allclose(fp8_linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.allclose(fp8_linear(x.double(), weight, bias.double()), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("columns", "group"), [(64, None), (336, None), (384, 128), (512, 32), (96, 96)])
def test_sizes_are_foretold(scheme: str, columns: int, group: int | None) -> None:
    weight = resolve(SCHEMES[scheme].weight)(7, columns, group)
    parts = [getattr(weight, name) for name in weight.__slots__]
    resident = sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))
    assert resident == 7 * SCHEMES[scheme].row_bytes(columns, group)


def test_groups_that_do_not_fit_are_refused() -> None:
    for columns, group, sentence in (
        (100, None, "int4 needs rows of a multiple of 16 columns, not 100"),
        (64, 24, "groups of 24 in rows of 64 columns are not supported"),
        (96, 64, "groups of 64 in rows of 96 columns are not supported"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Int4Weight(8, columns, group)
        with pytest.raises(ConfigError, match=sentence):
            SCHEMES["int4"].row_bytes(columns, group)


def test_every_scheme_has_a_product_where_it_may_run() -> None:
    for device, products in QUANTISED.items():
        assert products.keys() == SCHEMES.keys(), device
    for at in QUANTISED["reference"].values():
        assert callable(resolve(at))


def test_operators_take_plain_weights_beside_quantised_ones() -> None:
    torch.manual_seed(0)
    ops = load_ops("reference", torch.float32, "int8")
    assert ops.quantised is not None
    assert ops.few is None
    x, rows = torch.randn(3, 32), torch.randn(8, 32)
    quantised, plain = ops.quantised.new_weight(8, 32, None), ops.new_weight(8, 32, torch.float32)
    ops.quantised.store_rows(quantised, 0, rows)
    ops.store_rows(plain, 0, rows)
    assert torch.equal(ops.linear(x, quantised, None), weight_only_linear(x, quantised, None))
    assert torch.equal(ops.linear(x, plain, None), x @ rows.T)


@pytest.mark.parametrize(
    ("device", "scheme", "sentence"),
    [
        ("cpu", "int4", "weights in int4 cannot be multiplied on 'cpu'; devices that can: reference, cuda"),
        ("reference", "int3", "weights in int3 cannot be multiplied on 'reference'; devices that can: none"),
    ],
)
def test_what_cannot_run_is_refused(device: str, scheme: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_ops(device, torch.float32, scheme)
