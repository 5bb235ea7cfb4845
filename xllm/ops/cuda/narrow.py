"""17 to 128 rows times a weight on tensor cores, where one wave of programs covers the weight.

Legend: T tokens, K input features, N output features, R weight rows of a program, C columns of a tile, M tokens of a
program.

Such a product is latency more than bytes: what counts is that every multiprocessor has a program at once and that each
has many tiles on their way. The copy engine (TMA) fetches tiles of weight and tokens into a ring in shared memory, and
fills with zeros where there are no tokens. Before the wait for the predecessor the first columns of a program's weight
rows are fetched into the second-level cache. Where columns are split, sums meet as in `skinny`: the program that comes
last adds them up, always in the same order. Which weights fare better so than by cuBLAS, and how: `tiling.narrow`.
"""

import functools

import torch
import triton
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xllm.ops.cuda import tiling
from xllm.ops.cuda.launch import launch, trigger, uses_pdl, wait
from xllm.ops.cuda.skinny import workspace

ALIGNED = 16  # bytes, of what the copy engine fetches


def fits(x_TK: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel is for this card and these tensors, and faster than cuBLAS."""
    (tokens, columns), rows = x_TK.shape, weight.shape[0]
    return (
        tiling.SKINNY_TOKENS < tokens <= tiling.NARROW_TOKENS
        and tiling.narrow(rows, columns, tokens) is not None
        and x_TK.dtype == weight.dtype == torch.bfloat16
        and x_TK.is_contiguous()
        and weight.is_contiguous()
        and (x_TK.data_ptr() | weight.data_ptr()) % ALIGNED == 0
        and _has_room(x_TK.device)
    )


@functools.cache
def _has_room(device: torch.device) -> bool:
    """Settings are for Hopper: others have less shared memory, or other tensor cores."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def narrow(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias -> [T, N], where `fits`."""
    (tokens, columns), rows = x_TK.shape, weight.shape[0]
    cut = tiling.narrow(rows, columns, tokens)
    assert cut is not None
    y_TN = x_TK.new_empty((tokens, rows))
    token_tiles = tiling.programs_for(tokens, cut.tokens)
    # Made anew each time, so they cannot go stale; a captured graph keeps what they say.
    x = TensorDescriptor(x_TK, [tokens, columns], [columns, 1], [cut.tokens, cut.tile])
    w = TensorDescriptor(weight, [rows, columns], [columns, 1], [cut.rows, cut.tile])
    sums, counters = workspace(x_TK.device)
    pdl = uses_pdl()
    launch(
        _narrow, (rows // cut.rows * cut.splits * token_tiles,),
        x, w, weight, x_TK if bias_N is None else bias_N, y_TN, sums, counters, tokens,
        N=rows, K=columns, TOKENS=cut.tokens, TOKEN_TILES=token_tiles, ROWS=cut.rows, TILE=cut.tile,
        SPLITS=cut.splits, STAGES=cut.stages, AHEAD=cut.ahead, BIAS=bias_N is not None, PDL=pdl,
        num_warps=cut.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y_TN


@triton.jit(do_not_specialize=["tokens"])
def _narrow(
    x, weight, weight_ptr, bias_ptr, y_ptr, sums_ptr, counters_ptr, tokens,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, TOKEN_TILES: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x, weight: descriptors of [T, K] and [N, K]. N is whole programs, K whole tiles in every split."""
    # Programs of the same weight rows are neighbours, so that they find in the cache what one of them has fetched.
    token_tile = tl.program_id(0) % TOKEN_TILES
    split = tl.program_id(0) // TOKEN_TILES % SPLITS
    group = tl.program_id(0) // (TOKEN_TILES * SPLITS)
    EACH: tl.constexpr = K // SPLITS  # columns of a split
    n_R = group * ROWS + tl.arange(0, ROWS)
    m_M = token_tile * TOKENS + tl.arange(0, TOKENS)
    if PDL:
        _fetch_ahead(weight_ptr, n_R, split * EACH, K, AHEAD)
    wait(PDL)
    trigger(PDL)
    sum_RM = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, EACH, TILE, num_stages=STAGES):
        x_MC = x.load([token_tile * TOKENS, split * EACH + k])
        w_RC = weight.load([group * ROWS, split * EACH + k])
        sum_RM = tl.dot(w_RC, tl.trans(x_MC), sum_RM)
    if SPLITS == 1:
        _store(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N, BIAS)
    else:
        output = group * TOKEN_TILES + token_tile
        of_output_RM = sums_ptr + output * (SPLITS * ROWS * TOKENS)
        of_output_RM += tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(of_output_RM + split * (ROWS * TOKENS), sum_RM)
        tl.debug_barrier()  # every thread has stored before the program counts as done
        if tl.atomic_add(counters_ptr + output, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(counters_ptr + output, 0)
            sum_RM = tl.zeros([ROWS, TOKENS], tl.float32)
            for i in tl.static_range(SPLITS):
                # .cg: not from this multiprocessor's own cache, where others' stores do not arrive
                sum_RM += tl.load(of_output_RM + i * (ROWS * TOKENS), cache_modifier=".cg")
            _store(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N, BIAS)


@triton.jit
def _fetch_ahead(weight_ptr, n_R, first_column, K: tl.constexpr, AHEAD: tl.constexpr):
    """So many columns towards the second-level cache, which takes lines of 128 bytes: 64 numbers."""
    line_L = first_column + tl.arange(0, AHEAD // 64) * 64
    at_RL = weight_ptr + n_R.to(tl.int64)[:, None] * K + line_L[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at_RL], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _store(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        sum_RM += tl.load(bias_ptr + n_R).to(tl.float32)[:, None]
    at_RM = y_ptr + m_M[None, :] * N + n_R[:, None]
    tl.store(at_RM, sum_RM.to(y_ptr.dtype.element_ty), mask=(m_M < tokens)[None, :])
