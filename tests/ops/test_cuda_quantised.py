"""Products with quantised weights on a card against their references in float64.

Triton's interpreter runs them too; it cuts numbers off where a card rounds, so its bfloat16 is less exact.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from xllm.ops import quantised as reference
from xllm.ops.cuda import quantised as card
from xllm.ops.cuda import quantised_tiles
from xllm.ops.cuda.skinny import workspace
from xllm.ops.quantised import Fp8Weight, Int4Rows, Int4Weight, Int8Weight, store_rows
from xllm.ops.table import is_available, load_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not is_available("cuda"), reason="Triton can run on this machine neither with nor without a card"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 2.0 ** (-6 if card.interpreted() else -8)}
# Rows, columns, columns to a group: ragged edges, padded blocks, groups within, across and beyond blocks of 128.
SHAPES = [(64, 128, 128), (200, 256, 64), (33, 336, 112), (70, 96, 96), (130, 384, 384), (40, 640, 16), (7, 1152, 32)]  # fmt: skip
TOKENS = [1, 2, 9, 16, 17, 33, 70]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def make(kind: Any, rows: int, columns: int, group: int | None = None) -> Any:
    with torch.device(DEVICE):
        weight = kind(rows, columns, group)
        store_rows(weight, 0, torch.randn(rows, columns) * 0.05)
    return weight


def asymmetric(rows: int, columns: int, group: int) -> Any:
    """As checkpoints bring them: every zero point, scales of both signs."""
    with torch.device(DEVICE):
        weight = Int4Weight(rows, columns, group)
        groups = columns // group
        numbers_NK = torch.randint(16, (rows, columns), dtype=torch.uint8)
        scales_NG = torch.randn(rows, groups).half().float() * 0.01
        zeros_NG = torch.randint(16, (rows, groups), dtype=torch.uint8)
        store_rows(weight, 0, Int4Rows(numbers_NK, scales_NG, zeros_NG))
    return weight


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(given: torch.Tensor, exact: torch.Tensor) -> None:
    assert given.shape == exact.shape
    assert (given.double() - exact).abs().max() <= LIMITS[given.dtype] * exact.abs().max()


def exactly(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """With numbers rounded to the dtype of x where tensor cores take them so: those of 4 bits for several tokens, those
    of 8 bits where they are dequantised ahead of the product. Elsewhere they are exact, scaled in float32."""
    wide, tokens = None if bias is None else bias.double(), x.shape[0]
    if isinstance(weight, Fp8Weight) and tokens > card.KEPT_TOKENS:
        return reference.fp8_linear(x.double(), weight, wide)
    numbers = weight.dequantise()
    least = {Int4Weight: 2, Int8Weight: card.TILED_TOKENS + 1}.get(type(weight))
    if least is not None and tokens >= least:
        numbers = numbers.to(x.dtype)
    return torch.nn.functional.linear(x.double(), numbers.double(), wide)


@DTYPES
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_products(rows: int, columns: int, group: int, tokens: int, dtype: torch.dtype) -> None:
    x, bias = normal(tokens, columns + 3, dtype=dtype)[:, :columns], normal(rows, dtype=dtype)
    for product, weight in (
        (card.fp8_linear, make(Fp8Weight, rows, columns)),
        (card.int8_linear, make(Int8Weight, rows, columns)),
        (card.int4_linear, make(Int4Weight, rows, columns, group)),
        (card.int4_linear, asymmetric(rows, columns, group)),
    ):
        given = bias if tokens % 2 else None
        check(product(x, weight, given), exactly(x, weight, given))
    assert not workspace(x.device)[1].any()  # counters are left as they were found


@DTYPES
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("rows", "columns"), [(20, 4096), (9, 3072), (3000, 256)])
def test_long_and_many_rows(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    """Tiles loaded ahead and those after them, few and many rows to a program, columns split."""
    x = normal(tokens, columns, dtype=dtype)
    for product, weight in (
        (card.fp8_linear, make(Fp8Weight, rows, columns)),
        (card.int8_linear, make(Int8Weight, rows, columns)),
        (card.int4_linear, make(Int4Weight, rows, columns)),
    ):
        check(product(x, weight, None), exactly(x, weight, None))


@DTYPES
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_many_tokens_by_parts(
    rows: int, columns: int, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "TILED_TOKENS", 8)
    monkeypatch.setattr(card, "PART", 256)
    monkeypatch.setattr(card, "PART_STEP", 32)
    x, bias = normal(11, columns, dtype=dtype), normal(rows, dtype=dtype)
    for product, weight in (
        (card.int8_linear, make(Int8Weight, rows, columns)),
        (card.int4_linear, asymmetric(rows, columns, group)),
    ):
        for given in (None, bias):
            check(product(x, weight, given), exactly(x, weight, given))


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_dequantised_parts_are_exact(rows: int, columns: int, group: int) -> None:
    for weight in (make(Int8Weight, rows, columns), asymmetric(rows, columns, group)):
        for first, last in ((0, rows), (1, 3), (rows // 2, rows)):
            part = card.dequantise(weight, first, last, torch.float32)
            assert torch.equal(part, weight.dequantise()[first:last])


@DTYPES
@pytest.mark.parametrize("columns", [1, 96, 336, 1024, 3000])
def test_tokens_are_quantised_as_in_the_reference(columns: int, dtype: torch.dtype) -> None:
    x = normal(9, columns, dtype=dtype) * torch.logspace(-9, 9, 9, device=DEVICE)[:, None].to(dtype)
    x[3] = 0
    numbers, scales = card.quantise_tokens(x)
    exact_numbers, exact_scales = reference.quantise_tokens(x)
    assert torch.equal(scales, exact_scales)
    assert torch.equal(numbers.view(torch.uint8), exact_numbers.view(torch.uint8))


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4", "awq", "gptq"])
def test_operators_of_the_table(scheme: str) -> None:
    """Quantised weights beside plain ones, and a step without tokens."""
    ops = load_ops("cuda", torch.bfloat16, scheme)
    assert ops.quantised is not None
    rows_NK = normal(48, 128, dtype=torch.bfloat16)
    with torch.device(DEVICE):
        quantised, plain = ops.quantised.new_weight(48, 128, None), ops.new_weight(48, 128, torch.bfloat16)
    ops.quantised.store_rows(quantised, 0, rows_NK)
    ops.store_rows(plain, 0, rows_NK)
    for tokens in (0, 3):
        x = normal(tokens, 128, dtype=torch.bfloat16)
        assert ops.linear(x, plain, None).shape == (tokens, 48)
        given = ops.linear(x, quantised, None)
        assert given.dtype == torch.bfloat16
        if tokens:
            check(given, exactly(x, quantised, None))


@pytest.mark.parametrize("exact", [False, True])
def test_sums_of_splits_fit_the_workspace(exact: bool) -> None:
    sums, counters = workspace(torch.device(DEVICE))
    for rows in (1, 64, 1000, 1024, 4096, 6144, 8192, 24576, 57344):
        for columns in (64, 896, 4096, 28672):
            for tokens in (8, 16, 32, 64, 128, 256, 512):
                cut = quantised_tiles.settings(tokens, rows, columns, exact=exact)
                groups = -(-tokens // cut.tokens) * -(-rows // cut.rows)
                assert cut.splits == 1 or groups <= counters.numel()
                assert cut.splits == 1 or groups * cut.splits * cut.rows * cut.tokens <= sums.numel()
