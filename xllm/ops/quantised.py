"""Weights in 8 and 4 bits: how they are kept, made and multiplied with. Contracts and plain PyTorch references.

Legend: T tokens, N output features, K input features, G groups of K / G neighbouring inputs that share a scale,
W 32-bit words of a row.

A weight class knows its layout, which all devices share; only the product differs between devices (`*_linear`).
`quantise` and a checkpoint's tensors give the same thing, rows in their natural order (`Fp8Rows`, `Int8Rows`,
`Int4Rows`), and `put` lays them into the weight.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from xllm.ops.schemes import BLOCK, CHUNK, int4_group, int4_shape

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # of a row or token; what is smaller counts as this
SLICE = 1024  # rows quantised at once, so that their float32 copies stay small


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    numbers_NK: torch.Tensor  # float8_e4m3fn
    scales_N: torch.Tensor  # float32; a weight is number * scale


@dataclass(frozen=True, slots=True)
class Int8Rows:
    numbers_NK: torch.Tensor  # int8
    scales_N: torch.Tensor  # float32; a weight is number * scale


@dataclass(frozen=True, slots=True)
class Int4Rows:
    numbers_NK: torch.Tensor  # uint8, 0 to 15
    scales_NG: torch.Tensor  # float32; a weight is (number - zero) * scale
    zeros_NG: torch.Tensor  # uint8, 0 to 15


Rows = Fp8Rows | Int8Rows | Int4Rows


class QuantisedWeight(Protocol):
    """What a scheme's class offers; it is made by `cls(rows, columns, group)` on PyTorch's default device."""

    rows: int
    columns: int
    numbers: torch.Tensor
    scales: torch.Tensor

    def quantise(self, rows_NK: torch.Tensor) -> Rows: ...

    def put(self, first_row: int, rows: Rows) -> None: ...

    def dequantise(self) -> torch.Tensor: ...


def store_rows(weight: QuantisedWeight, first_row: int, rows: torch.Tensor | Rows) -> None:
    """Fill rows from `first_row` on: from floats, which are quantised where the weight lies, or ready ones."""
    if not isinstance(rows, torch.Tensor):
        weight.put(first_row, rows)
        return
    for piece_NK in rows.split(SLICE):
        weight.put(first_row, weight.quantise(piece_NK.to(weight.numbers.device).float()))
        first_row += piece_NK.shape[0]


class Fp8Weight:
    """[N, K] e4m3 numbers and a scale per row."""

    __slots__ = ("columns", "numbers", "rows", "scales")

    def __init__(self, rows: int, columns: int, group: int | None = None):
        self.rows, self.columns = rows, columns
        self.numbers = torch.empty((rows, columns), dtype=FP8)
        self.scales = torch.empty(rows, dtype=torch.float32)

    def quantise(self, rows_NK: torch.Tensor) -> Fp8Rows:
        """The largest number of a row becomes 448; each is off by at most 1/16 of itself or scale / 1024."""
        return Fp8Rows(*quantise_tokens(rows_NK))

    def put(self, first_row: int, rows: Rows) -> None:
        assert isinstance(rows, Fp8Rows)
        end = first_row + rows.numbers_NK.shape[0]
        # as bytes: copies between float8 tensors go through other types on some devices
        self.numbers.view(torch.uint8)[first_row:end] = rows.numbers_NK.view(torch.uint8)
        self.scales[first_row:end] = rows.scales_N

    def dequantise(self) -> torch.Tensor:
        """[N, K] float32"""
        return self.numbers.float() * self.scales[:, None]


class Int8Weight:
    """[N, K] numbers from -127 to 127 and a scale per row."""

    __slots__ = ("columns", "numbers", "rows", "scales")

    def __init__(self, rows: int, columns: int, group: int | None = None):
        self.rows, self.columns = rows, columns
        self.numbers = torch.empty((rows, columns), dtype=torch.int8)
        self.scales = torch.empty(rows, dtype=torch.float32)

    def quantise(self, rows_NK: torch.Tensor) -> Int8Rows:
        """Each is off by at most half a scale, which is 1/254 of the largest number of the row."""
        scales_N = rows_NK.abs().amax(dim=1).clamp(min=SMALLEST) / 127
        return Int8Rows((rows_NK / scales_N[:, None]).round().to(torch.int8), scales_N)

    def put(self, first_row: int, rows: Rows) -> None:
        assert isinstance(rows, Int8Rows)
        end = first_row + rows.numbers_NK.shape[0]
        self.numbers[first_row:end] = rows.numbers_NK
        self.scales[first_row:end] = rows.scales_N

    def dequantise(self) -> torch.Tensor:
        """[N, K] float32"""
        return self.numbers.float() * self.scales[:, None]


class Int4Weight:
    """[N, W] int32 words of 8 numbers each, and [G, N] int32 with a scale and a zero point in each.

    A row is cut into blocks of 128 columns, which are 8 chunks of 16; the last block is padded. A block is 16 words, and
    one nibble of word c holds column c of one of the chunks. So what lies at one place in neighbouring words are
    neighbouring columns: a kernel unpacks 8 tiles out of one load, and each multiplies a contiguous piece of the input.
    Chunks 2 i and 2 i + 1, which nearly always share a scale, lie at bits 4 i of the lower and of the upper half.

    A zero point stands in the last four bits of its float32 scale, so that kernels load both at once. Scales of
    checkpoints are 16-bit floats, whose last bits are zero as float32.
    """

    SHIFTS: ClassVar = (0, 16, 4, 20, 8, 24, 12, 28)  # of chunk 0, 1, ...
    __slots__ = ("columns", "group", "numbers", "rows", "scales", "span")

    def __init__(self, rows: int, columns: int, group: int | None = None):
        self.rows, self.columns = rows, columns
        self.group = group or int4_group(columns)
        self.span = math.gcd(self.group, BLOCK) // CHUNK  # chunks that surely share a scale
        blocks, groups = int4_shape(columns, self.group)
        self.numbers = torch.empty((rows, blocks * CHUNK), dtype=torch.int32)
        self.scales = torch.empty((groups, rows), dtype=torch.int32)

    def quantise(self, rows_NK: torch.Tensor) -> Int4Rows:
        """Symmetric: zero is 8, and each is off by at most half a scale, 1/15 of the largest number of the group."""
        groups_NGk = rows_NK.unflatten(1, (-1, self.group))
        scales_NG = groups_NGk.abs().amax(dim=2).clamp(min=SMALLEST) / 7.5
        scales_NG = ((scales_NG.view(torch.int32) + 15) & ~15).view(torch.float32)  # room for the zero point
        numbers_NGk = ((groups_NGk / scales_NG[:, :, None]).round() + 8).clamp(0, 15)
        zeros_NG = torch.full_like(scales_NG, 8, dtype=torch.uint8)
        return Int4Rows(numbers_NGk.to(torch.uint8).flatten(1), scales_NG, zeros_NG)

    def put(self, first_row: int, rows: Rows) -> None:
        assert isinstance(rows, Int4Rows)
        end = first_row + rows.numbers_NK.shape[0]
        padded_NK = F.pad(rows.numbers_NK, (0, -self.columns % BLOCK))
        blocks_NBic = padded_NK.unflatten(1, (-1, len(self.SHIFTS), CHUNK))
        words_NBc = torch.zeros_like(blocks_NBic[:, :, 0], dtype=torch.int32)
        for i, shift in enumerate(self.SHIFTS):
            words_NBc |= blocks_NBic[:, :, i].int() << shift
        self.numbers[first_row:end] = words_NBc.flatten(1)
        scales_NG = rows.scales_NG.contiguous().view(torch.int32) & ~15 | rows.zeros_NG.int()
        self.scales[:, first_row:end] = scales_NG.T

    def dequantise(self) -> torch.Tensor:
        """[N, K] float32"""
        words_NBc = self.numbers.unflatten(1, (-1, CHUNK))
        numbers_NBic = torch.stack([(words_NBc >> shift) & 15 for shift in self.SHIFTS], dim=2)
        numbers_NGk = numbers_NBic.flatten(1)[:, : self.columns].unflatten(1, (-1, self.group))
        scales_NG, zeros_NG = (self.scales & ~15).view(torch.float32).T, (self.scales & 15).T
        return ((numbers_NGk - zeros_NG[:, :, None]) * scales_NG[:, :, None]).flatten(1)


def quantise_tokens(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ([T, K] e4m3, [T] float32 scales): each token divided by its largest number / 448. Computed in float32."""
    x_TK = x_TK.float()
    largest_T = x_TK.abs().amax(dim=1).clamp(min=SMALLEST)
    # by a tensor: on a card PyTorch multiplies by the rounded reciprocal of a Python number
    scales_T = largest_T / torch.full_like(largest_T, FP8_MAX)
    return (x_TK / scales_T[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales_T


def fp8_linear(x_TK: torch.Tensor, weight: Fp8Weight, bias_N: torch.Tensor | None) -> torch.Tensor:
    """As `xllm.ops.linear:linear`, tokens quantised too. A device may keep the tokens of small batches as they are:
    there the weights' bytes are all that counts, and the product is the more exact."""
    numbers_TK, scales_T = quantise_tokens(x_TK)
    y_TN = F.linear(numbers_TK.to(x_TK.dtype), weight.numbers.to(x_TK.dtype))
    y_TN = y_TN * scales_T.to(x_TK.dtype)[:, None] * weight.scales.to(x_TK.dtype)
    return y_TN if bias_N is None else y_TN + bias_N


def weight_only_linear(
    x_TK: torch.Tensor, weight: Int8Weight | Int4Weight, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """As `xllm.ops.linear:linear`, with the weight dequantised: the tokens keep their bits."""
    return F.linear(x_TK, weight.dequantise().to(x_TK.dtype), bias_N)
