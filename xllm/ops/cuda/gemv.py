"""A few rows, one above all, times a weight, with what stands before and after it in a decoder layer, in one kernel.

Legend: T tokens, K input features, N output features, R weight rows of a program, C columns of a tile.

Plain multiply-adds in float32: with so few tokens there is next to nothing for a tensor core to share. A program takes
R rows of the weight over all their columns, so nothing has to be added up between programs. All that counts is how many
loads are on their way: the first tiles are loaded before the wait for the predecessor (`launch`), and the others are
either all in sight of the compiler (one token: the loop is unrolled) or prefetched into shared memory (several, whose
sums take the registers).
"""

from typing import no_type_check

import torch
import triton
from triton import language as tl

from xllm.ops.cuda import tiling
from xllm.ops.cuda.activation import silu
from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait

MAX_TOKENS = 8  # sums of more do not fit in registers
MAX_COLUMNS = 65536  # the unrolled loop over tiles: 64 of them


def gemv(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    bias_N: torch.Tensor | None,
    y_TN: torch.Tensor,
    *,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> None:
    """y = x weight^T + bias, for 1 to 8 tokens. All tensors are contiguous and of one dtype.

    With norm_K, x is RMS-normed first. Gated, weight and bias have 2N rows and y is silu(upper half) * lower half.
    With `add`, y is added to.
    """
    (tokens, columns), rows = x_TK.shape, y_TN.shape[1]
    cut = tiling.gemv(tokens, rows, columns, gated)
    _kernel(
        tiling.programs_for(rows, cut.rows),
        x_TK,
        x_TK if norm_K is None else norm_K,
        weight,
        x_TK if bias_N is None else bias_N,
        y_TN,
        warps=cut.warps,
        pdl=uses_pdl(),
        T=tokens,
        N=rows,
        K=columns,
        EPS=eps,
        ROWS=cut.rows,
        TILE=cut.tile,
        AHEAD=cut.ahead,
        UNROLLED=cut.unrolled,
        FOLD=cut.fold,
        STAGES=cut.stages,
        NORM=norm_K is not None,
        BIAS=bias_N is not None,
        GATED=gated,
        ADD=add,
    )


@triton.jit
@no_type_check  # tuples that grow
def _gemv(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    AHEAD: tl.constexpr, UNROLLED: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k_C = tl.arange(0, TILE)
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead += (_load_weight(weight_ptr, n_R, i * TILE + k_C, N, K, ROWS, TILE, GATED),)
    wait(PDL)
    trigger(PDL)
    sums = (), (), ()
    for _ in tl.static_range(T):
        first_RC = tl.zeros([ROWS, TILE // FOLD], tl.float32)
        sums = (
            sums[0] + (tl.zeros([1, TILE // FOLD], tl.float32),),
            sums[1] + (first_RC,),
            sums[2] + (first_RC,),
        )
    for i in tl.static_range(UNROLLED):
        k = i * TILE + k_C
        if i < AHEAD:
            weights = ahead[i]
        else:
            weights = _load_weight(weight_ptr, n_R, k, N, K, ROWS, TILE, GATED)
        sums = _accumulate(sums, weights, x_ptr, norm_ptr, k, T, K, ROWS, TILE, FOLD, NORM, GATED)
    if UNROLLED * TILE < K:
        for start in tl.range(UNROLLED * TILE, K, TILE, num_stages=STAGES):
            k = start + k_C
            weights = _load_weight(weight_ptr, n_R, k, N, K, ROWS, TILE, GATED)
            sums = _accumulate(sums, weights, x_ptr, norm_ptr, k, T, K, ROWS, TILE, FOLD, NORM, GATED)
    for t in tl.static_range(T):
        y_R, up_R = tl.sum(sums[1][t], axis=1), tl.sum(sums[2][t], axis=1)
        if NORM:
            scale_1 = tl.rsqrt(tl.sum(sums[0][t], axis=1) / K + EPS)
            y_R, up_R = y_R * scale_1, up_R * scale_1
        _finish(y_R, up_R, bias_ptr, y_ptr + t * N, n_R, N, BIAS, GATED, ADD)


@triton.jit
def _load_weight(
    weight_ptr, n_R, k_C,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """([R, C] of the weight or its gate half, [R, C] of its up half), zero past the edges."""
    at_RC = weight_ptr + n_R.to(tl.int64)[:, None] * K + k_C[None, :]
    if GATED:
        return _load(at_RC, n_R, k_C, N, K, ROWS, TILE), _load(at_RC + N * K, n_R, k_C, N, K, ROWS, TILE)
    else:
        w_RC = _load(at_RC, n_R, k_C, N, K, ROWS, TILE)
        return w_RC, w_RC


@triton.jit
def _load(at_RC, n_R, k_C, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    if N % ROWS == 0 and K % TILE == 0:  # no masks where nothing can be past an edge
        return tl.load(at_RC)
    else:
        return tl.load(at_RC, mask=(n_R < N)[:, None] & (k_C < K)[None, :], other=0.0)


@triton.jit
@no_type_check
def _accumulate(
    sums, weights, x_ptr, norm_ptr, k_C,
    T: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One tile more into the sums, which are squares of x, products, and products of the up half, each per token."""
    w_RC, up_RC = weights[0].to(tl.float32), weights[1].to(tl.float32)
    if NORM:
        gain_1C = _load_row(norm_ptr, k_C, K, TILE)
    squares, products, up_products = (), (), ()
    for t in tl.static_range(T):
        x_1C = _load_row(x_ptr + t * K, k_C, K, TILE)
        square, product, up_product = sums[0][t], sums[1][t], sums[2][t]
        if NORM:
            square += _fold(x_1C * x_1C, 1, TILE, FOLD)
            x_1C *= gain_1C  # what the norm divides by is one number: the end's business
        product += _fold(w_RC * x_1C, ROWS, TILE, FOLD)
        if GATED:
            up_product += _fold(up_RC * x_1C, ROWS, TILE, FOLD)
        squares += (square,)
        products += (product,)
        up_products += (up_product,)
    return squares, products, up_products


@triton.jit
def _load_row(row_ptr, k_C, K: tl.constexpr, TILE: tl.constexpr):
    """[1, C] float32, zero past the end."""
    if K % TILE == 0:
        return tl.load(row_ptr + k_C).to(tl.float32)[None, :]
    else:
        return tl.load(row_ptr + k_C, mask=k_C < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _fold(x_RC, ROWS: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr):
    """Sums of FOLD neighbours, which are in one thread's registers."""
    if FOLD == 1:
        return x_RC
    else:
        return tl.sum(tl.reshape(x_RC, [ROWS, TILE // FOLD, FOLD]), axis=2)


@triton.jit
def _finish(
    y_R, up_R, bias_ptr, y_ptr, n_R,
    N: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """From products to what is stored."""
    mask_R = n_R < N
    if BIAS:
        y_R += tl.load(bias_ptr + n_R, mask=mask_R, other=0.0).to(tl.float32)
    if GATED:
        if BIAS:
            up_R += tl.load(bias_ptr + N + n_R, mask=mask_R, other=0.0).to(tl.float32)
        y_R = silu(y_R) * up_R
    if ADD:
        y_R += tl.load(y_ptr + n_R, mask=mask_R, other=0.0).to(tl.float32)
    tl.store(y_ptr + n_R, y_R.to(y_ptr.dtype.element_ty), mask=mask_R)


_kernel = Kernel(_gemv)
