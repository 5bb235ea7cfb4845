"""Several rows times a weight in 8 or 4 bits, on tensor cores.

Legend: T tokens, K input features, N output features, R weight rows of a program, M tokens of a program, C columns of a
tile, c words of a block (`ops.quantised.Int4Weight`).

The weight is the tall operand and the tokens are the narrow one, as in `skinny`: numbers are widened in registers, where
tensor cores can take them from, and come from memory once for all tokens of a program. Where few rows give too few
programs for the card, the columns are split between several; the last to come adds up their sums, always in the same
order.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait
from xllm.ops.cuda.skinny import workspace
from xllm.ops.cuda.tiling import padded, programs_for
from xllm.ops.cuda.widen import EXPONENT, nibble_scale, widen_bytes, widen_nibbles
from xllm.ops.quantised import Fp8Weight, Int4Weight, Int8Weight
from xllm.ops.schemes import BLOCK, CHUNK

PROGRAMS = 128  # an H200 has 132 multiprocessors
MAX_SPLITS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    tokens: int  # of a program
    rows: int  # of the weight, per program
    tile: int  # columns at a time
    splits: int
    stages: int  # tiles on their way at a time
    warps: int = 4


@functools.cache
def settings(tokens: int, rows: int, columns: int, *, exact: bool) -> Settings:
    """For a power of two of tokens and a weight. exact: float32, for tests; small tiles, as its products take registers.

    The more tokens share a program, the less often numbers are widened; but all multiprocessors are to have work.
    """
    if exact:
        splits = 2 if rows * tokens <= 1 << 17 else 1
        return Settings(tokens=16, rows=16, tile=32, splits=_even(columns, BLOCK, splits), stages=1)
    if tokens >= 128 and programs_for(tokens, 128) * programs_for(rows, 128) >= PROGRAMS:
        return Settings(tokens=128, rows=128, tile=64, splits=1, stages=3, warps=8)
    for share in (64, 32, 16):
        programs = programs_for(tokens, share) * programs_for(rows, 64)
        if programs >= PROGRAMS and share <= tokens:
            return Settings(
                share, rows=64, tile=64 if share > 16 else 128, splits=1, stages=3 if share > 16 else 4
            )
    # twice as many programs as multiprocessors: they are short, and bound by loads on their way
    splits = _even(columns, BLOCK, min(MAX_SPLITS, programs_for(2 * PROGRAMS, programs)))
    return Settings(min(tokens, 16), rows=64, tile=128, splits=splits, stages=4)


def _even(columns: int, tile: int, splits: int) -> int:
    """At most so many splits of whole tiles, none of them empty."""
    tiles = programs_for(columns, tile)
    return programs_for(tiles, programs_for(tiles, splits))


def byte_tiles(
    x_TK: torch.Tensor, weight: Fp8Weight | Int8Weight, bias_N: torch.Tensor | None, y_TN: torch.Tensor
) -> None:
    """y = x weight^T + bias"""
    chosen = _choose(x_TK, weight)
    _run(_byte_kernel, chosen, x_TK, weight, bias_N, y_TN, TILE=chosen.tile)


def int4_tiles(
    x_TK: torch.Tensor, weight: Int4Weight, bias_N: torch.Tensor | None, y_TN: torch.Tensor
) -> None:
    """y = x weight^T + bias. The weight's numbers are rounded to the dtype of x once dequantised."""
    layout = {"GROUP": weight.group, "SPAN": weight.span, "BLOCK": BLOCK, "CHUNK": CHUNK}
    _run(_int4_kernel, _choose(x_TK, weight), x_TK, weight, bias_N, y_TN, EXPONENT, **layout)


def _choose(x_TK: torch.Tensor, weight: Fp8Weight | Int8Weight | Int4Weight) -> Settings:
    tokens = max(8, padded(x_TK.shape[0]))
    return settings(tokens, weight.rows, weight.columns, exact=x_TK.dtype == torch.float32)


def _run(
    kernel: Kernel,
    chosen: Settings,
    x_TK: torch.Tensor,
    weight: Fp8Weight | Int8Weight | Int4Weight,
    bias_N: torch.Tensor | None,
    y_TN: torch.Tensor,
    *integers: int,
    **layout: int,
) -> None:
    tokens = x_TK.shape[0]
    if tokens == 0:
        return
    programs = programs_for(tokens, chosen.tokens) * programs_for(weight.rows, chosen.rows) * chosen.splits
    sums, counters = workspace(x_TK.device)
    assert chosen.splits == 1 or programs * chosen.rows * chosen.tokens <= sums.numel()
    kernel(
        programs,
        x_TK,
        weight.numbers,
        weight.scales,
        x_TK if bias_N is None else bias_N,
        y_TN,
        sums,
        counters,
        tokens,
        *integers,
        warps=chosen.warps,
        stages=chosen.stages,
        pdl=uses_pdl(),
        N=weight.rows,
        K=weight.columns,
        **layout,
        TOKENS=chosen.tokens,
        ROWS=chosen.rows,
        SPLITS=chosen.splits,
        STAGES=chosen.stages,
        BIAS=bias_N is not None,
    )


@triton.jit(do_not_specialize=["tokens"])
def _byte_tiles(
    x_ptr, numbers_ptr, scales_ptr, bias_ptr, y_ptr, sums_ptr, counters_ptr, tokens,
    N: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n_R, m_M, mine, split = _place(tokens, N, TOKENS, ROWS, SPLITS)
    k_C = tl.arange(0, TILE)
    EACH: tl.constexpr = ((K + TILE - 1) // TILE + SPLITS - 1) // SPLITS * TILE
    begin = split * EACH
    rows_ptr = numbers_ptr + n_R.to(tl.int64)[:, None] * K
    wait(PDL)
    trigger(PDL)
    sum_RM = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(begin, tl.minimum(begin + EACH, K), TILE, num_stages=STAGES):
        if N % ROWS == 0 and K % TILE == 0:
            numbers_RC = tl.load(rows_ptr + (k + k_C)[None, :])
        else:
            inside_RC = (n_R < N)[:, None] & (k + k_C < K)[None, :]
            numbers_RC = tl.load(rows_ptr + (k + k_C)[None, :], mask=inside_RC, other=0.0)
        x_CM = _tokens(x_ptr, k + k_C, m_M, tokens, K, TILE)
        sum_RM = tl.dot(widen_bytes(numbers_RC).to(x_CM.dtype), x_CM, sum_RM, input_precision="ieee")
    if SPLITS > 1:
        sum_RM, last = _gather(sum_RM, sums_ptr, counters_ptr, mine, split, ROWS, TOKENS, SPLITS)
    else:
        last = True
    if last:
        sum_RM *= tl.load(scales_ptr + n_R, mask=n_R < N, other=0.0)[:, None]
        _finish(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N, BIAS)


@triton.jit(do_not_specialize=["tokens", "exponent"])
@no_type_check  # a tuple that grows
def _int4_tiles(
    x_ptr, words_ptr, scales_ptr, bias_ptr, y_ptr, sums_ptr, counters_ptr, tokens, exponent,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n_R, m_M, mine, split = _place(tokens, N, TOKENS, ROWS, SPLITS)
    ALL: tl.constexpr = (K + BLOCK - 1) // BLOCK
    EACH: tl.constexpr = (ALL + SPLITS - 1) // SPLITS
    begin = split * EACH
    rows_ptr = words_ptr + n_R.to(tl.int64)[:, None] * (ALL * CHUNK) + tl.arange(0, CHUNK)[None, :]
    wait(PDL)
    trigger(PDL)
    sum_RM = tl.zeros([ROWS, TOKENS], tl.float32)
    for block in tl.range(begin, tl.minimum(begin + EACH, ALL), num_stages=STAGES):
        if N % ROWS == 0:
            words_Rc = tl.load(rows_ptr + block * CHUNK)
        else:
            words_Rc = tl.load(rows_ptr + block * CHUNK, mask=(n_R < N)[:, None], other=0)
        chunks = ()
        for i in tl.static_range(8):
            if i % SPAN == 0:
                scale_R = _scales(scales_ptr, n_R, block * BLOCK + i * CHUNK, N, K, GROUP, BLOCK, ROWS)
            number_Rc = widen_nibbles(words_Rc, (scale_R & 15)[:, None], i // 2, i % 2, exponent)
            chunks += ((number_Rc * nibble_scale(scale_R, i // 2)[:, None]).to(x_ptr.dtype.element_ty),)
        x_CM = _tokens(x_ptr, block * BLOCK + tl.arange(0, BLOCK), m_M, tokens, K, BLOCK)
        sum_RM = tl.dot(_in_order(chunks, ROWS, BLOCK), x_CM, sum_RM, input_precision="ieee")
    if SPLITS > 1:
        sum_RM, last = _gather(sum_RM, sums_ptr, counters_ptr, mine, split, ROWS, TOKENS, SPLITS)
    else:
        last = True
    if last:
        _finish(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N, BIAS)


@triton.jit
def _in_order(chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """8 tiles [R, c] -> [R, C], one beside the other."""
    low = tl.join(tl.join(chunks[0], chunks[1]), tl.join(chunks[2], chunks[3]))  # [R, c, ones, twos]
    high = tl.join(tl.join(chunks[4], chunks[5]), tl.join(chunks[6], chunks[7]))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), [ROWS, BLOCK])


@triton.jit
def _place(tokens, N: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """(rows [R], tokens [M], number of this output tile, which split of it). Programs that share weights are neighbours."""
    token_tiles = (tokens + TOKENS - 1) // TOKENS
    mine, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    n_R = mine // token_tiles * ROWS + tl.arange(0, ROWS)
    m_M = mine % token_tiles * TOKENS + tl.arange(0, TOKENS)
    return n_R, m_M, mine, split


@triton.jit
def _tokens(x_ptr, k_C, m_M, tokens, K: tl.constexpr, STEP: tl.constexpr):
    """[C, M] of the tokens, zero past the edges."""
    at_CM = x_ptr + m_M.to(tl.int64)[None, :] * K + k_C[:, None]
    if K % STEP == 0:
        return tl.load(at_CM, mask=(m_M < tokens)[None, :], other=0.0)
    else:
        return tl.load(at_CM, mask=(m_M < tokens)[None, :] & (k_C < K)[:, None], other=0.0)


@triton.jit
def _scales(
    scales_ptr, n_R, column,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[R] scales, with their zero points, of the group that this column lies in."""
    at_R = column // GROUP * N + n_R
    if N % ROWS == 0 and K % BLOCK == 0:
        return tl.load(scales_ptr + at_R)
    else:
        return tl.load(scales_ptr + at_R, mask=(n_R < N) & (column < K), other=0)


@triton.jit
def _gather(
    sum_RM, sums_ptr, counters_ptr, mine, split,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(the sum over all splits, whether this program came last and has it)"""
    at_RM = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    mine_RM = sums_ptr + mine * (SPLITS * ROWS * TOKENS) + at_RM
    tl.store(mine_RM + split * (ROWS * TOKENS), sum_RM)
    tl.debug_barrier()  # all threads have stored before one of them counts the program
    last = tl.atomic_add(counters_ptr + mine, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        sum_RM = tl.zeros([ROWS, TOKENS], tl.float32)
        for i in tl.static_range(SPLITS):
            # past the first cache, which other multiprocessors' stores do not reach
            sum_RM += tl.load(mine_RM + i * (ROWS * TOKENS), cache_modifier=".cg")
        tl.store(counters_ptr + mine, 0)
    return sum_RM, last


@triton.jit
def _finish(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        sum_RM += tl.load(bias_ptr + n_R, mask=n_R < N, other=0.0).to(tl.float32)[:, None]
    at_RM = y_ptr + m_M.to(tl.int64)[None, :] * N + n_R[:, None]
    tl.store(at_RM, sum_RM.to(y_ptr.dtype.element_ty), mask=(m_M < tokens)[None, :] & (n_R < N)[:, None])


_byte_kernel = Kernel(_byte_tiles)
_int4_kernel = Kernel(_int4_tiles)
