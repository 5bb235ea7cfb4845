"""One row times a weight in 8 or 4 bits: multiply-adds in float32, as `gemv` does them.

Legend: K input features, N output features, R weight rows of a program, C columns of a tile, B blocks of a tile,
c words of a block (`ops.quantised.Int4Weight`).

The numbers are widened in registers, the tokens keep their bits. Weights are a half or a quarter as many bytes as in
bfloat16, so arithmetic counts too: 4-bit numbers become floats by setting an exponent around them, where they lie.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait
from xllm.ops.cuda.tiling import padded, programs_for
from xllm.ops.cuda.widen import EXPONENT, nibble_scale, widen_bytes, widen_nibbles
from xllm.ops.quantised import Fp8Weight, Int4Weight, Int8Weight
from xllm.ops.schemes import BLOCK, CHUNK

MAX_COLUMNS = 32768  # loops over tiles are unrolled
AHEAD, INT4_AHEAD = 2, 4  # tiles loaded before they are needed
# Blocks of 4-bit numbers in a tile. Four are 64 words of a row, fewer than a program has threads: each thread then
# loads the inputs it needs, and none are exchanged.
INT4_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    rows: int  # of the weight, per program
    tile: int  # columns at a time


@functools.cache
def settings(rows: int, columns: int) -> Settings:
    """For a weight of so many rows and columns. Few or long rows: fewer to a program, so that there are more of them."""
    tile = min(1024, max(32, padded(columns)))
    return Settings(4 if columns > 8192 or rows <= 2048 else 8, tile)


def byte_gemv(
    x_TK: torch.Tensor, weight: Fp8Weight | Int8Weight, bias_N: torch.Tensor | None, y_TN: torch.Tensor
) -> None:
    """y = weight x + bias, for T = 1."""
    chosen = settings(weight.rows, weight.columns)
    _byte_kernel(
        programs_for(weight.rows, chosen.rows),
        x_TK,
        weight.numbers,
        weight.scales,
        x_TK if bias_N is None else bias_N,
        y_TN,
        pdl=uses_pdl(),
        N=weight.rows,
        K=weight.columns,
        ROWS=chosen.rows,
        TILE=chosen.tile,
        AHEAD=AHEAD,
        BIAS=bias_N is not None,
    )


def int4_gemv(
    x_TK: torch.Tensor, weight: Int4Weight, bias_N: torch.Tensor | None, y_TN: torch.Tensor
) -> None:
    """y = weight x + bias, for T = 1."""
    rows = 4 if weight.rows <= 2048 else 8
    _int4_kernel(
        programs_for(weight.rows, rows),
        x_TK,
        weight.numbers,
        weight.scales,
        x_TK if bias_N is None else bias_N,
        y_TN,
        EXPONENT,
        pdl=uses_pdl(),
        N=weight.rows,
        K=weight.columns,
        GROUP=weight.group,
        SPAN=weight.span,
        BLOCK=BLOCK,
        CHUNK=CHUNK,
        ROWS=rows,
        BLOCKS=INT4_BLOCKS,
        AHEAD=INT4_AHEAD,
        BIAS=bias_N is not None,
    )


@triton.jit
@no_type_check  # tuples that grow
def _byte_gemv(
    x_ptr, numbers_ptr, scales_ptr, bias_ptr, y_ptr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k_C = tl.arange(0, TILE)
    mask_R = n_R < N
    rows_ptr = numbers_ptr + n_R.to(tl.int64)[:, None] * K
    TILES: tl.constexpr = (K + TILE - 1) // TILE
    tiles = ()
    for t in tl.static_range(min(AHEAD, TILES)):
        tiles += (_bytes(rows_ptr, n_R, t * TILE + k_C, N, K, ROWS, TILE),)
    scale_R = tl.load(scales_ptr + n_R, mask=mask_R, other=0.0)
    wait(PDL)
    trigger(PDL)
    sum_RC = tl.zeros([ROWS, TILE], tl.float32)
    for t in tl.static_range(TILES):
        if t + AHEAD < TILES:
            tiles += (_bytes(rows_ptr, n_R, (t + AHEAD) * TILE + k_C, N, K, ROWS, TILE),)
        k = t * TILE + k_C
        if K % TILE == 0:
            x_C = tl.load(x_ptr + k).to(tl.float32)
        else:
            x_C = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        sum_RC += widen_bytes(tiles[t]) * x_C[None, :]
    y_R = tl.sum(sum_RC, axis=1) * scale_R
    if BIAS:
        y_R += tl.load(bias_ptr + n_R, mask=mask_R, other=0.0).to(tl.float32)
    tl.store(y_ptr + n_R, y_R.to(y_ptr.dtype.element_ty), mask=mask_R)


@triton.jit
def _bytes(rows_ptr, n_R, k_C, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """[R, C] numbers, those past the edges multiplied by zeros of the input or not stored."""
    if N % ROWS == 0 and K % TILE == 0:
        return tl.load(rows_ptr + k_C[None, :])
    else:
        return tl.load(rows_ptr + k_C[None, :], mask=(n_R < N)[:, None] & (k_C < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["exponent"])
@no_type_check
def _int4_gemv(
    x_ptr, words_ptr, scales_ptr, bias_ptr, y_ptr, exponent,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCKS * BLOCK
    n_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHUNK)
    TILES: tl.constexpr = (K + TILE - 1) // TILE
    EACH: tl.constexpr = 8 // SPAN  # scales of a block
    tiles, scales = (), ()
    for t in tl.static_range(min(AHEAD, TILES)):
        block_B = t * BLOCKS + tl.arange(0, BLOCKS)
        tiles += (_words(words_ptr, n_R, block_B, c, N, K, BLOCK, CHUNK, ROWS, BLOCKS),)
        for i in tl.static_range(EACH):
            scales += (_scales(scales_ptr, n_R, block_B * BLOCK + i * SPAN * CHUNK, N, K, GROUP, ROWS, TILE),)
    wait(PDL)
    trigger(PDL)
    sum_RBc = tl.zeros([ROWS, BLOCKS, CHUNK], tl.float32)
    for t in tl.static_range(TILES):
        block_B = t * BLOCKS + tl.arange(0, BLOCKS)
        if t + AHEAD < TILES:
            ahead_B = block_B + AHEAD * BLOCKS
            tiles += (_words(words_ptr, n_R, ahead_B, c, N, K, BLOCK, CHUNK, ROWS, BLOCKS),)
            for i in tl.static_range(EACH):
                scales += (
                    _scales(scales_ptr, n_R, ahead_B * BLOCK + i * SPAN * CHUNK, N, K, GROUP, ROWS, TILE),
                )
        for pair in tl.static_range(4):
            part_RBc = tl.zeros([ROWS, BLOCKS, CHUNK], tl.float32)
            for half in tl.static_range(2):
                scale_RB = scales[t * EACH + (2 * pair + half) // SPAN]
                k_Bc = (block_B * BLOCK + (2 * pair + half) * CHUNK)[:, None] + c[None, :]
                if K % TILE == 0:
                    x_Bc = tl.load(x_ptr + k_Bc).to(tl.float32)
                else:
                    x_Bc = tl.load(x_ptr + k_Bc, mask=k_Bc < K, other=0.0).to(tl.float32)
                number_RBc = widen_nibbles(tiles[t], (scale_RB & 15)[:, :, None], pair, half, exponent)
                part_RBc += number_RBc * x_Bc[None, :, :]
                if SPAN == 1 or half == 1:
                    sum_RBc += part_RBc * nibble_scale(scale_RB, pair)[:, :, None]
                    part_RBc = tl.zeros([ROWS, BLOCKS, CHUNK], tl.float32)
    y_R = tl.sum(tl.sum(sum_RBc, axis=2), axis=1)
    mask_R = n_R < N
    if BIAS:
        y_R += tl.load(bias_ptr + n_R, mask=mask_R, other=0.0).to(tl.float32)
    tl.store(y_ptr + n_R, y_R.to(y_ptr.dtype.element_ty), mask=mask_R)


@triton.jit
def _words(
    words_ptr, n_R, block_B, c, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[R, B, c] words of these blocks, zero past the edges."""
    ALL: tl.constexpr = (K + BLOCK - 1) // BLOCK
    word_Bc = block_B[:, None] * CHUNK + c[None, :]
    at_RBc = words_ptr + n_R.to(tl.int64)[:, None, None] * (ALL * CHUNK) + word_Bc[None, :, :]
    if N % ROWS == 0 and ALL % BLOCKS == 0:
        return tl.load(at_RBc)
    else:
        return tl.load(at_RBc, mask=((n_R < N)[:, None] & (block_B < ALL)[None, :])[:, :, None], other=0)


@triton.jit
def _scales(
    scales_ptr, n_R, column_B,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[R, B] scales, with their zero points, of the groups that these columns lie in."""
    at_RB = (column_B // GROUP)[None, :] * N + n_R[:, None]
    if N % ROWS == 0 and K % TILE == 0:
        return tl.load(scales_ptr + at_RB)
    else:
        return tl.load(scales_ptr + at_RB, mask=(n_R < N)[:, None] & (column_B < K)[None, :], other=0)


_byte_kernel = Kernel(_byte_gemv)
_int4_kernel = Kernel(_int4_gemv)
