"""Norms of query and key, rotation, KV write and attention in one kernel, for decode steps of a few sequences.

The tiles of a sequence go to its splits in turn, so that the place of a split's first tile does not depend on the
context. That tile is on its way before the kernel's predecessor has ended (`launch`): what is cached was written
steps ago. The token of this step is not: it comes from registers, and split 0 writes it.

Legend: as in `xllm.ops.few` and `key_tiles`; R rotated features.
"""

import torch
import triton
from triton import language as tl

from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import (
    LOG2_E,
    count_splits,
    decode_tiling,
    next_power_of_two,
    padded,
    splits_per_pass,
)
from xllm.ops.cuda.decode_attention import multiprocessors, workspace
from xllm.ops.cuda.key_tiles import LOWEST, finish, fold, load_blocks, load_tile, tile_pointers
from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait

MAX_SPLITS = 32  # more cost more than they hide in a kernel of 5 microseconds


@triton.jit
def load_gains(
    norm_ptr, NORM: tl.constexpr, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):
    """[D] float32 twice: the norm's weights of each feature and of the one it turns with; without a norm, ones."""
    dims = tl.arange(0, DIM)
    if NORM:
        inside = dims < HEAD_DIM
        own_D = tl.load(norm_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        other_D = tl.load(norm_ptr + partners(ROTATED, DIM), mask=inside, other=0.0).to(tl.float32)
    else:
        own_D = tl.full([DIM], 1.0, tl.float32)
        other_D = tl.full([DIM], 1.0, tl.float32)
    return own_D, other_D


@triton.jit
def partners(ROTATED: tl.constexpr, DIM: tl.constexpr):
    """[D]: the feature that each turns with, itself from R on."""
    dims = tl.arange(0, DIM)
    HALF: tl.constexpr = ROTATED // 2
    if ROTATED == DIM:
        return (dims + HALF) % DIM  # Triton sees runs in this form, and loads them whole
    else:
        return tl.where(dims < HALF, dims + HALF, tl.where(dims < ROTATED, dims - HALF, dims))


@triton.jit
def load_turned(
    x_ptr, gains_D, other_gains_D, cos_D, sin_D, COUNT: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """[M, D] float32: COUNT heads from x_ptr on, normed and rotated; zero beyond."""
    rows = tl.arange(0, ROWS)[:, None] * HEAD_DIM
    dims = tl.arange(0, DIM)
    inside_MD = (tl.arange(0, ROWS) < COUNT)[:, None] & (dims < HEAD_DIM)[None, :]
    x_MD = tl.load(x_ptr + rows + dims[None, :], mask=inside_MD, other=0.0).to(tl.float32)
    other_MD = tl.load(x_ptr + rows + partners(ROTATED, DIM)[None, :], mask=inside_MD, other=0.0).to(
        tl.float32
    )
    if NORM:
        shrink_M = tl.rsqrt(tl.sum(x_MD * x_MD, 1) / HEAD_DIM + EPS)
        x_MD = x_MD * shrink_M[:, None] * gains_D[None, :]
        other_MD = other_MD * shrink_M[:, None] * other_gains_D[None, :]
    return x_MD * cos_D[None, :] + other_MD * sin_D[None, :]


@triton.jit(do_not_specialize=["layer", "sequences", "splits", "table_stride", "table_width"])
def _few(
    qkv_ptr, positions_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr,
    kv_ptr, table_ptr, contexts_ptr, slots_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr,
    layer, sequences, splits, table_stride, table_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr, LAYER_STRIDE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    HEADS: tl.constexpr, PASS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per KV head, sequence and split; split i takes tiles i, i + splits, ... of the cached tokens."""
    head = tl.program_id(0) % KV_HEADS
    sequence = tl.program_id(0) // KV_HEADS % sequences
    split = tl.program_id(0) // KV_HEADS // sequences
    TOKEN: tl.constexpr = KV_HEADS * HEAD_DIM
    dims = tl.arange(0, DIM)
    inside_D = dims < HEAD_DIM
    context = tl.load(contexts_ptr + sequence)
    cached = context - 1  # this step's token is the last
    lowest = tl.maximum(context - WINDOW, 0) if WINDOW else 0
    base = lowest // TILE * TILE
    begin = base + split * TILE
    table_ptr += sequence.to(tl.int64) * table_stride
    # By the table's width, not by the context, so that both loads are under way at once: the entry may be undefined.
    blocks = load_blocks(table_ptr, begin, table_width * BLOCK, BLOCK, TILE)
    used = tl.maximum(tl.minimum(splits, tl.cdiv(cached - base, TILE)), 1)
    if split >= used:
        return  # without a wait: split 0 waits, so this kernel does not end before its predecessor
    seen_N = begin + tl.arange(0, TILE) < cached
    if WINDOW:
        seen_N = seen_N & (begin + tl.arange(0, TILE) >= lowest)
    kv_ptr += layer.to(tl.int64) * LAYER_STRIDE + head * HEAD_DIM
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    tile_N = tile_pointers(kv_ptr, blocks, begin, BLOCK_STRIDE, BLOCK, TOKEN, TILE)
    k_ND = load_tile(tile_N, seen_N, HEAD_DIM, DIM, dtype)
    v_ND = load_tile(tile_N + BLOCK * TOKEN, seen_N, HEAD_DIM, DIM, dtype)
    slot = tl.load(slots_ptr + sequence)
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + sequence).to(tl.int64) * ROTATED
    HALF: tl.constexpr = ROTATED // 2
    cos_D = tl.load(angles_ptr + dims % HALF, mask=dims < ROTATED, other=1.0)
    sin_D = tl.load(angles_ptr + HALF + dims % HALF, mask=dims < ROTATED, other=0.0)
    sin_D = tl.where(dims < HALF, -sin_D, sin_D)
    q_gains_D, other_q_gains_D = load_gains(q_norm_ptr, NORM, ROTATED, HEAD_DIM, DIM)
    k_gains_D, other_k_gains_D = load_gains(k_norm_ptr, NORM, ROTATED, HEAD_DIM, DIM)
    wait(PDL)
    trigger(PDL)

    qkv_ptr += sequence * ((GROUP + 2) * TOKEN)
    q_MD = load_turned(
        qkv_ptr + head * GROUP * HEAD_DIM, q_gains_D, other_q_gains_D, cos_D, sin_D,
        GROUP, ROWS, EPS, NORM, ROTATED, HEAD_DIM, DIM,
    ).to(dtype)  # fmt: skip
    qkv_ptr += GROUP * TOKEN + head * HEAD_DIM
    new_k_1D = load_turned(
        qkv_ptr, k_gains_D, other_k_gains_D, cos_D, sin_D, 1, 1, EPS, NORM, ROTATED, HEAD_DIM, DIM
    ).to(kv_ptr.dtype.element_ty)
    new_v_1D = tl.load(qkv_ptr + TOKEN + dims, mask=inside_D, other=0.0)[None, :].to(kv_ptr.dtype.element_ty)
    is_first = split == 0
    if is_first:
        new_ptr = kv_ptr + slot // BLOCK * BLOCK_STRIDE + slot % BLOCK * TOKEN + dims[None, :]
        tl.store(new_ptr, new_k_1D, mask=inside_D[None, :])
        tl.store(new_ptr + BLOCK * TOKEN, new_v_1D, mask=inside_D[None, :])
    # attend to it as the cache holds it
    score_M = tl.sum(q_MD.to(tl.float32) * new_k_1D.to(dtype).to(tl.float32), 1) * SCALE
    weight = tl.where(is_first, 1.0, 0.0)
    peak_M = tl.where(is_first, score_M, LOWEST)
    total_M = tl.zeros([ROWS], tl.float32) + weight
    mixed_MD = tl.zeros([ROWS, DIM], tl.float32) + new_v_1D.to(dtype).to(tl.float32) * weight
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    scores_MN = tl.where(seen_N[None, :], scores_MN, float("-inf"))
    peak_M, total_M, mixed_MD = fold(scores_MN, v_ND, SCALE, peak_M, total_M, mixed_MD)
    blocks = load_blocks(table_ptr, begin + used * TILE, cached, BLOCK, TILE)
    for first in tl.range(begin + used * TILE, cached, used * TILE, num_stages=STAGES):
        seen_N = first + tl.arange(0, TILE) < cached
        tile_N = tile_pointers(kv_ptr, blocks, first, BLOCK_STRIDE, BLOCK, TOKEN, TILE)
        blocks = load_blocks(table_ptr, first + used * TILE, cached, BLOCK, TILE)
        k_ND = load_tile(tile_N, seen_N, HEAD_DIM, DIM, dtype)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        scores_MN = tl.where(seen_N[None, :], scores_MN, float("-inf"))
        v_ND = load_tile(tile_N + BLOCK * TOKEN, seen_N, HEAD_DIM, DIM, dtype)
        peak_M, total_M, mixed_MD = fold(scores_MN, v_ND, SCALE, peak_M, total_M, mixed_MD)

    pair = sequence * KV_HEADS + head
    finish(
        peak_M, total_M, mixed_MD, out_ptr + pair * GROUP * HEAD_DIM,
        partial_ptr, stats_ptr, counters_ptr + pair, pair * splits, split, used,
        GROUP, ROWS, HEAD_DIM, DIM, HEADS, PASS,
    )  # fmt: skip


FEW = Kernel(_few)


def rope_cache_attention(
    qkv_TE: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MR: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """qkv and kv_cache are contiguous. Context lengths, block table, positions and slots must not come from the kernel
    launched just before, which is the projection to qkv (`launch`)."""
    tokens, width = qkv_TE.shape
    block_size, kv_heads, head_dim = kv_cache.shape[3:]
    group = width // head_dim // kv_heads - 2
    tiling = decode_tiling(group, head_dim, qkv_TE.dtype, tokens)
    longest = inputs.max_context_len if window is None else min(inputs.max_context_len, window + tiling.keys)
    splits = count_splits(
        tokens, kv_heads, longest, multiprocessors(qkv_TE.device), tiling.keys, most=MAX_SPLITS
    )
    space = workspace(qkv_TE.device, group, head_dim)
    out_TE = torch.empty((tokens, group * kv_heads * head_dim), dtype=qkv_TE.dtype, device=qkv_TE.device)
    table = inputs.block_table
    FEW(
        kv_heads * tokens * splits,
        qkv_TE, positions_T, cos_sin_MR,
        qkv_TE if q_norm_D is None else q_norm_D, qkv_TE if k_norm_D is None else k_norm_D,
        kv_cache, table, inputs.context_lens, inputs.kv_slots, out_TE,
        space.partial, space.stats, space.counters,
        layer, tokens, splits, table.stride(0), table.shape[1],
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, ROTATED=cos_sin_MR.shape[1],
        BLOCK=block_size, BLOCK_STRIDE=kv_cache.stride(0), LAYER_STRIDE=kv_cache.stride(1),
        NORM=q_norm_D is not None, EPS=eps, SCALE=scale * LOG2_E, WINDOW=window or 0,
        ROWS=tiling.rows, DIM=padded(head_dim), TILE=tiling.keys,
        STAGES=tiling.stages - 1,  # the first tile is on its way before the loop
        HEADS=next_power_of_two(group), PASS=splits_per_pass(group, head_dim),
        warps=tiling.warps, pdl=uses_pdl(),
    )  # fmt: skip
    return out_TE
