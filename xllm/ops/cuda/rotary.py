"""Norm, rotary embedding and KV write in one kernel. Contract in `xllm.ops.rotary`.

Legend: T tokens, E fused width, Q query heads, H KV heads, D head size, R rotated features, G heads of a program,
r = R / 2 turned pairs and p = D - R features that stay, both padded to a power of two.

A program takes some heads of one token, of whatever kind: values are turned by no angle and normed by nothing. A thread
holds both features of a pair, so nothing is exchanged between threads but the sum of squares.
"""

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait
from xllm.ops.cuda.tiling import padded, programs_for

HEADS = 8  # of a program: with 128 features 8 per thread, 16 bytes of bfloat16
MANY_HEADS = (
    16  # where tokens are so many that the card is full anyway: 8192 take 39 us so, and 46 with 8 heads
)
MANY_TOKENS = 256


def rope_and_cache(
    qkv_TE: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MR: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    layer: int,
    kv_slots_T: torch.Tensor,
) -> torch.Tensor:
    tokens, width = qkv_TE.shape
    _, _, _, block_size, kv_heads, head_dim = kv_cache.shape
    q_heads = width // head_dim - 2 * kv_heads
    rotated = cos_sin_MR.shape[1]
    if q_norm_D is None or k_norm_D is None:
        normed, q_norm_D, k_norm_D = False, qkv_TE, qkv_TE  # not read
    else:
        normed = True
    q_TQD = qkv_TE.new_empty((tokens, q_heads, head_dim))
    heads = HEADS if tokens < MANY_TOKENS else MANY_HEADS
    _kernel(
        tokens * programs_for(q_heads + 2 * kv_heads, heads),
        qkv_TE,
        positions_T,
        cos_sin_MR,
        q_norm_D,
        k_norm_D,
        kv_cache,
        kv_slots_T,
        q_TQD,
        layer,
        pdl=uses_pdl(),
        Q=q_heads,
        H=kv_heads,
        D=head_dim,
        R=rotated,
        EPS=eps,
        NORM=normed,
        BLOCK_SIZE=block_size,
        STRIDES=kv_cache.stride(),
        G=heads,
        PAIRS=padded(rotated // 2),
        STAY=padded(head_dim - rotated) if rotated < head_dim else 0,
    )
    return q_TQD


@triton.jit(do_not_specialize=["layer"])
def _rope_and_cache(
    qkv_ptr, positions_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, cache_ptr, slots_ptr, q_ptr, layer,
    Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STRIDES: tl.constexpr,
    G: tl.constexpr, PAIRS: tl.constexpr, STAY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PROGRAMS: tl.constexpr = (Q + 2 * H + G - 1) // G  # of a token
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    head_G1 = (tl.program_id(0) % PROGRAMS * G + tl.arange(0, G))[:, None]
    real_G1, is_query_G1, is_value_G1 = head_G1 < Q + 2 * H, head_G1 < Q, head_G1 >= Q + H
    r_1r = tl.arange(0, PAIRS)[None, :]
    pair_Gr = real_G1 & (r_1r < R // 2)
    wait(PDL)
    trigger(PDL)
    from_G1 = qkv_ptr + token * ((Q + 2 * H) * D) + head_G1 * D
    a_Gr = tl.load(from_G1 + r_1r, mask=pair_Gr, other=0.0).to(tl.float32)
    b_Gr = tl.load(from_G1 + R // 2 + r_1r, mask=pair_Gr, other=0.0).to(tl.float32)
    if STAY > 0:
        p_1p = R + tl.arange(0, STAY)[None, :]
        stay_Gp = real_G1 & (p_1p < D)
        c_Gp = tl.load(from_G1 + p_1p, mask=stay_Gp, other=0.0).to(tl.float32)
    if NORM:
        squares_G = tl.sum(a_Gr * a_Gr, axis=1) + tl.sum(b_Gr * b_Gr, axis=1)
        if STAY > 0:
            squares_G += tl.sum(c_Gp * c_Gp, axis=1)
        scale_G1 = tl.rsqrt(squares_G / D + EPS)[:, None]
        a_Gr *= _gain(scale_G1, q_norm_ptr, k_norm_ptr, r_1r, r_1r < R // 2, is_query_G1, is_value_G1)
        b_Gr *= _gain(
            scale_G1, q_norm_ptr, k_norm_ptr, R // 2 + r_1r, r_1r < R // 2, is_query_G1, is_value_G1
        )
        if STAY > 0:
            c_Gp *= _gain(scale_G1, q_norm_ptr, k_norm_ptr, p_1p, p_1p < D, is_query_G1, is_value_G1)
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * R
    cos_1r = tl.load(angle_ptr + r_1r, mask=r_1r < R // 2, other=0.0)
    sin_1r = tl.load(angle_ptr + R // 2 + r_1r, mask=r_1r < R // 2, other=0.0)
    cos_Gr, sin_Gr = tl.where(is_value_G1, 1.0, cos_1r), tl.where(is_value_G1, 0.0, sin_1r)
    a_Gr, b_Gr = a_Gr * cos_Gr - b_Gr * sin_Gr, b_Gr * cos_Gr + a_Gr * sin_Gr

    slot = tl.load(slots_ptr + token)
    cached_ptr = cache_ptr + slot // BLOCK_SIZE * STRIDES[0] + layer.to(tl.int64) * STRIDES[1]
    cached_ptr += slot % BLOCK_SIZE * STRIDES[3]
    kv_head_G1 = tl.where(is_value_G1, head_G1 - Q - H, head_G1 - Q)
    cached_G1 = cached_ptr + tl.where(is_value_G1, STRIDES[2], 0) + kv_head_G1 * STRIDES[4]
    query_G1 = q_ptr + token * (Q * D) + head_G1 * D
    _store(query_G1, cached_G1, r_1r, a_Gr, pair_Gr, is_query_G1)
    _store(query_G1, cached_G1, R // 2 + r_1r, b_Gr, pair_Gr, is_query_G1)
    if STAY > 0:
        _store(query_G1, cached_G1, p_1p, c_Gp, stay_Gp, is_query_G1)


@triton.jit
def _gain(scale_G1, q_norm_ptr, k_norm_ptr, d_1d, mask_1d, is_query_G1, is_value_G1):
    """[G, d]: what the features d of each head are multiplied by in the norm; values are not normed."""
    q_gain_1d = tl.load(q_norm_ptr + d_1d, mask=mask_1d, other=0.0).to(tl.float32)
    k_gain_1d = tl.load(k_norm_ptr + d_1d, mask=mask_1d, other=0.0).to(tl.float32)
    return tl.where(is_value_G1, 1.0, scale_G1 * tl.where(is_query_G1, q_gain_1d, k_gain_1d))


@triton.jit
def _store(query_G1, cached_G1, d_1d, x_Gd, mask_Gd, is_query_G1):
    """Queries to the output, keys and values to the cache, each in its own dtype."""
    tl.store(query_G1 + d_1d, x_Gd.to(query_G1.dtype.element_ty), mask=mask_Gd & is_query_G1)
    tl.store(cached_G1 + d_1d, x_Gd.to(cached_G1.dtype.element_ty), mask=mask_Gd & (is_query_G1 == 0))


_kernel = Kernel(_rope_and_cache)
