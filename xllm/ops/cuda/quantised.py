"""Products with quantised weights on a card: which kernel for how many tokens.

Legend: T tokens, K input features, N output features, R rows of a weight, C columns of a tile.

- One token: `quantised_gemv`. Several: `quantised_tiles`. Both are bound by the weight's bytes.
- Many tokens are bound by arithmetic. In fp8 they are quantised too, and cuBLAS multiplies 8-bit floats. In int8 and
  int4 the weight is dequantised to bfloat16, a part at a time, and cuBLAS multiplies that.
"""

import os

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, wait
from xllm.ops.cuda.quantised_gemv import MAX_COLUMNS, byte_gemv, int4_gemv
from xllm.ops.cuda.quantised_tiles import byte_tiles, int4_tiles
from xllm.ops.cuda.tiling import padded, programs_for
from xllm.ops.cuda.widen import EXPONENT, nibble_scale, widen_bytes, widen_nibbles
from xllm.ops.quantised import FP8, FP8_MAX, SMALLEST, Fp8Weight, Int4Weight, Int8Weight
from xllm.ops.schemes import BLOCK, CHUNK

KEPT_TOKENS = 16  # steps of so many tokens keep them in bfloat16 where weights are fp8
TILED_TOKENS = 256  # beyond, dequantising once for cuBLAS costs less than widening in every program
PART = 32 << 20  # numbers dequantised at a time
PART_STEP = 256  # rows at a time, a multiple of it
PART_ROWS = 32  # of a program
LARGEST, LEAST = tl.constexpr(FP8_MAX), tl.constexpr(SMALLEST)


def fp8_linear(x_TK: torch.Tensor, weight: Fp8Weight, bias_N: torch.Tensor | None) -> torch.Tensor:
    x_TK = x_TK.contiguous()
    tokens = x_TK.shape[0]
    if tokens <= KEPT_TOKENS:
        y_TN = x_TK.new_empty(tokens, weight.rows)
        _few_byte_tokens(x_TK, weight, bias_N, y_TN)
        return y_TN
    numbers_TK, scales_T = quantise_tokens(x_TK)
    if x_TK.dtype == torch.bfloat16 and weight.rows % 16 == weight.columns % 16 == 0:
        y_TN = torch._scaled_mm(
            numbers_TK, weight.numbers.T, scales_T[:, None], weight.scales[None, :], out_dtype=torch.bfloat16
        )
    else:  # what cuBLAS does not take: the same numbers, widened
        y_TN = torch.empty((tokens, weight.rows), dtype=torch.float32, device=x_TK.device)
        byte_tiles(numbers_TK.to(x_TK.dtype), weight, None, y_TN)
        y_TN = (y_TN * scales_T[:, None]).to(x_TK.dtype)
    return y_TN if bias_N is None else y_TN.add_(bias_N)


def int8_linear(x_TK: torch.Tensor, weight: Int8Weight, bias_N: torch.Tensor | None) -> torch.Tensor:
    x_TK = x_TK.contiguous()
    y_TN = x_TK.new_empty(x_TK.shape[0], weight.rows)
    if x_TK.shape[0] <= TILED_TOKENS:
        _few_byte_tokens(x_TK, weight, bias_N, y_TN)
    else:
        by_parts(x_TK, weight, bias_N, y_TN)
    return y_TN


def int4_linear(x_TK: torch.Tensor, weight: Int4Weight, bias_N: torch.Tensor | None) -> torch.Tensor:
    x_TK = x_TK.contiguous()
    tokens = x_TK.shape[0]
    y_TN = x_TK.new_empty(tokens, weight.rows)
    if tokens == 1 and weight.columns <= MAX_COLUMNS:
        int4_gemv(x_TK, weight, bias_N, y_TN)
    elif tokens <= TILED_TOKENS:
        int4_tiles(x_TK, weight, bias_N, y_TN)
    else:
        by_parts(x_TK, weight, bias_N, y_TN)
    return y_TN


def _few_byte_tokens(
    x_TK: torch.Tensor, weight: Fp8Weight | Int8Weight, bias_N: torch.Tensor | None, y_TN: torch.Tensor
) -> None:
    if x_TK.shape[0] == 1 and weight.columns <= MAX_COLUMNS:
        byte_gemv(x_TK, weight, bias_N, y_TN)
    else:
        byte_tiles(x_TK, weight, bias_N, y_TN)


def by_parts(
    x_TK: torch.Tensor, weight: Int8Weight | Int4Weight, bias_N: torch.Tensor | None, y_TN: torch.Tensor
) -> None:
    """y = x weight^T + bias, so many rows of the weight at a time that their floats stay few.

    The weight's numbers are rounded to the dtype of x once dequantised; the bias is added before y is rounded.
    """
    if bias_N is not None:
        y_TN.copy_(bias_N)
    step = max(1, PART // weight.columns // PART_STEP) * PART_STEP
    for first in range(0, weight.rows, step):
        last = min(first + step, weight.rows)
        part_RK = dequantise(weight, first, last, x_TK.dtype)
        y_TN[:, first:last].addmm_(x_TK, part_RK.T, beta=0 if bias_N is None else 1)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: it does not round to 8-bit floats."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def quantise_tokens(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ([T, K] e4m3, [T] float32 scales), as `xllm.ops.quantised:quantise_tokens`."""
    tokens, columns = x_TK.shape
    numbers_TK = torch.empty_like(x_TK, dtype=torch.float32 if interpreted() else FP8)
    scales_T = torch.empty(tokens, dtype=torch.float32, device=x_TK.device)
    tile = padded(columns)
    warps = min(16, max(1, tile // 1024))
    _tokens_kernel(tokens, x_TK, numbers_TK, scales_T, warps=warps, K=columns, TILE=tile)
    return numbers_TK.to(FP8), scales_T


@triton.jit
def _quantise_tokens(x_ptr, numbers_ptr, scales_ptr, K: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    k_C = tl.arange(0, TILE)
    wait(PDL)
    trigger(PDL)
    x_C = tl.load(x_ptr + token * K + k_C, mask=k_C < K, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x_C), axis=0), LEAST), LARGEST)
    number_C = tl.clamp(tl.div_rn(x_C, tl.zeros_like(x_C) + scale), -LARGEST, LARGEST)
    tl.store(numbers_ptr + token * K + k_C, number_C.to(numbers_ptr.dtype.element_ty), mask=k_C < K)
    tl.store(scales_ptr + token, scale)


def dequantise(weight: Int8Weight | Int4Weight, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, K] of the rows first .. last - 1, rounded to `dtype`."""
    columns = weight.columns
    part_RK = torch.empty((last - first, columns), dtype=dtype, device=weight.numbers.device)
    programs = programs_for(last - first, PART_ROWS) * programs_for(columns, BLOCK)
    tensors = (weight.numbers, weight.scales, part_RK)
    if isinstance(weight, Int4Weight):
        _int4_kernel(
            programs, *tensors, first, last, EXPONENT,
            N=weight.rows, K=columns, GROUP=weight.group, SPAN=weight.span, BLOCK=BLOCK, CHUNK=CHUNK, ROWS=PART_ROWS,
        )  # fmt: skip
    else:
        _byte_kernel(programs, *tensors, first, last, K=columns, BLOCK=BLOCK, ROWS=PART_ROWS)
    return part_RK


@triton.jit(do_not_specialize=["first", "last"])
def _dequantise_bytes(
    numbers_ptr, scales_ptr, part_ptr, first, last,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    r_R = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    k_C = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    n_R = first + r_R
    wait(PDL)
    trigger(PDL)
    inside_RC = (n_R < last)[:, None] & (k_C < K)[None, :]
    numbers_RC = tl.load(numbers_ptr + n_R.to(tl.int64)[:, None] * K + k_C[None, :], mask=inside_RC, other=0)
    scale_R = tl.load(scales_ptr + n_R, mask=n_R < last, other=0.0)
    part_RC = (widen_bytes(numbers_RC) * scale_R[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(part_ptr + r_R.to(tl.int64)[:, None] * K + k_C[None, :], part_RC, mask=inside_RC)


@triton.jit(do_not_specialize=["first", "last", "exponent"])
def _dequantise_int4(
    words_ptr, scales_ptr, part_ptr, first, last, exponent,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    r_R = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % BLOCKS
    n_R = first + r_R
    inside_R = n_R < last
    c = tl.arange(0, CHUNK)
    wait(PDL)
    trigger(PDL)
    at_Rc = n_R.to(tl.int64)[:, None] * (BLOCKS * CHUNK) + block * CHUNK + c[None, :]
    words_Rc = tl.load(words_ptr + at_Rc, mask=inside_R[:, None], other=0)
    for i in tl.static_range(8):
        column = block * BLOCK + i * CHUNK
        if i % SPAN == 0:
            scale_R = tl.load(scales_ptr + column // GROUP * N + n_R, mask=inside_R & (column < K), other=0)
        number_Rc = widen_nibbles(words_Rc, (scale_R & 15)[:, None], i // 2, i % 2, exponent)
        part_Rc = (number_Rc * nibble_scale(scale_R, i // 2)[:, None]).to(part_ptr.dtype.element_ty)
        to_Rc = part_ptr + r_R.to(tl.int64)[:, None] * K + (column + c)[None, :]
        tl.store(to_Rc, part_Rc, mask=inside_R[:, None] & (column + c < K)[None, :])


_tokens_kernel = Kernel(_quantise_tokens)
_byte_kernel = Kernel(_dequantise_bytes)
_int4_kernel = Kernel(_dequantise_int4)
