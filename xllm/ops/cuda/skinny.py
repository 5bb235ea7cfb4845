"""2 to 16 rows times a weight on tensor cores.

Legend: T tokens, K input features, N output features, R weight rows of a program, C columns of a tile, M tokens
padded to 8 or 16.

Still bound by the bytes of the weight, so the weight is the tall operand of the product and the tokens are its narrow
side. Where N gives too few programs for the card, the columns are split between several. Their sums meet in a
workspace, and the program that comes last adds them up, always in the same order, and writes the result.
"""

import functools

import torch
import triton
from triton import language as tl

from xllm.ops.cuda import tiling
from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait


@functools.cache
def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of programs whose columns are split, and a counter for each of their groups.

    The counters are zero between kernels: each kernel leaves them so. All kernels of a device share this, one after
    the other. It is large enough for all settings, so it never moves under a captured graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "run a step before capturing one: the workspace of split products must outlive the graph"
        )
    numbers = tiling.SPLIT_PROGRAMS * tiling.SPLIT_ROWS * tiling.SKINNY_TOKENS
    sums = torch.empty(numbers, dtype=torch.float32, device=device)
    return sums, torch.zeros(tiling.SPLIT_PROGRAMS, dtype=torch.int32, device=device)


def skinny(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias -> [T, N], for 1 to 16 tokens. All tensors are contiguous and of one dtype."""
    (tokens, columns), rows = x_TK.shape, weight.shape[0]
    y_TN = x_TK.new_empty((tokens, rows))
    cut = tiling.skinny(rows, columns, x_TK.dtype == torch.float32)
    sums, counters = workspace(x_TK.device)
    _kernel(
        tiling.programs_for(rows, cut.rows) * cut.splits,
        x_TK,
        weight,
        x_TK if bias_N is None else bias_N,
        y_TN,
        sums,
        counters,
        tokens,
        warps=cut.warps,
        stages=cut.stages,
        pdl=uses_pdl(),
        N=rows,
        K=columns,
        TOKENS=8 if tokens <= 8 else tiling.SKINNY_TOKENS,
        ROWS=cut.rows,
        TILE=cut.tile,
        SPLITS=cut.splits,
        STAGES=cut.stages,
        BIAS=bias_N is not None,
    )
    return y_TN


@triton.jit(do_not_specialize=["tokens"])
def _skinny(
    x_ptr, weight_ptr, bias_ptr, y_ptr, sums_ptr, counters_ptr, tokens,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    n_R = group * ROWS + tl.arange(0, ROWS)
    m_M = tl.arange(0, TOKENS)
    k_C = tl.arange(0, TILE)
    TILES: tl.constexpr = (K + TILE - 1) // TILE
    EACH: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * TILE  # columns of a split
    begin = split * EACH
    end = tl.minimum(begin + EACH, K)
    w_RC = _load_weight(weight_ptr, n_R, begin + k_C, N, K, ROWS, TILE)
    wait(PDL)
    trigger(PDL)
    x_CM = _load_tokens(x_ptr, m_M, begin + k_C, tokens, K, TILE)
    sum_RM = tl.dot(w_RC, x_CM, input_precision="ieee")
    for k in tl.range(begin + TILE, end, TILE, num_stages=STAGES):
        w_RC = _load_weight(weight_ptr, n_R, k + k_C, N, K, ROWS, TILE)
        x_CM = _load_tokens(x_ptr, m_M, k + k_C, tokens, K, TILE)
        sum_RM = tl.dot(w_RC, x_CM, sum_RM, input_precision="ieee")
    if SPLITS == 1:
        _store(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N, BIAS)
    else:
        of_group_RM = sums_ptr + group * (SPLITS * ROWS * TOKENS)
        of_group_RM += tl.arange(0, ROWS)[:, None] * TOKENS + m_M[None, :]
        tl.store(of_group_RM + split * (ROWS * TOKENS), sum_RM)
        tl.debug_barrier()  # every thread has stored before the program counts as done
        if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(counters_ptr + group, 0)
            sum_RM = tl.zeros([ROWS, TOKENS], tl.float32)
            for i in tl.static_range(SPLITS):
                # .cg: not from this multiprocessor's own cache, where others' stores do not arrive
                sum_RM += tl.load(of_group_RM + i * (ROWS * TOKENS), cache_modifier=".cg")
            _store(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N, BIAS)


@triton.jit
def _load_weight(
    weight_ptr, n_R, k_C, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """[R, C], zero past the edges."""
    at_RC = weight_ptr + n_R.to(tl.int64)[:, None] * K + k_C[None, :]
    if N % ROWS == 0 and K % TILE == 0:  # no masks where nothing can be past an edge
        return tl.load(at_RC)
    else:
        return tl.load(at_RC, mask=(n_R < N)[:, None] & (k_C < K)[None, :], other=0.0)


@triton.jit
def _load_tokens(x_ptr, m_M, k_C, tokens, K: tl.constexpr, TILE: tl.constexpr):
    """[C, M], zero past the edges."""
    mask_CM = (m_M < tokens)[None, :]
    if K % TILE != 0:
        mask_CM = mask_CM & (k_C < K)[:, None]
    return tl.load(x_ptr + m_M[None, :] * K + k_C[:, None], mask=mask_CM, other=0.0)


@triton.jit
def _store(sum_RM, bias_ptr, y_ptr, n_R, m_M, tokens, N: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        sum_RM += tl.load(bias_ptr + n_R, mask=n_R < N, other=0.0).to(tl.float32)[:, None]
    mask_RM = (n_R < N)[:, None] & (m_M < tokens)[None, :]
    tl.store(y_ptr + m_M[None, :] * N + n_R[:, None], sum_RM.to(y_ptr.dtype.element_ty), mask=mask_RM)


_kernel = Kernel(_skinny)
