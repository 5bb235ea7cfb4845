"""Attention of sequences with one query each, over paged KV, the keys of a sequence split over programs (flash
decoding, Dao et al. 2023). The program that arrives last adds the splits up, so that a step is one launch.

Legend: as in `xllm.ops.attention`; S sequences here are the leading ones with one query each.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from triton import language as tl

from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import (
    LOG2_E,
    count_splits,
    decode_tiling,
    most_partial_results,
    next_power_of_two,
    padded,
    splits_per_pass,
)
from xllm.ops.cuda.key_tiles import LOWEST, finish, fold, load_blocks, load_tile, tile_pointers
from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait

INTERPRETED_MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where splits leave their results. One per device and shape of a head group, for everything on one stream."""

    partial: torch.Tensor  # [most splits, G, D] float32
    stats: torch.Tensor  # [most splits, G, 2] float32
    counters: torch.Tensor  # [most splits] int32, zero between kernels


@functools.cache
def workspace(device: torch.device, group: int, head_dim: int) -> Workspace:
    """Made at the first use, which must not be while a graph is captured: graphs share it, and its zeros are real."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention must have run once before a CUDA graph of it is captured")
    most = most_partial_results(multiprocessors(device))
    return Workspace(
        partial=torch.empty((most, group, head_dim), dtype=torch.float32, device=device),
        stats=torch.empty((most, group, 2), dtype=torch.float32, device=device),
        counters=torch.zeros(most, dtype=torch.int32, device=device),
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["layer", "sequences", "splits", "table_stride"])
def _decode(
    q_ptr, kv_ptr, table_ptr, contexts_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr,
    layer, sequences, splits, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, LAYER_STRIDE: tl.constexpr, Q_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    HEADS: tl.constexpr, PASS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per KV head, sequence and split. The tiles that a sequence's query sees are shared evenly."""
    head = tl.program_id(0) % KV_HEADS
    sequence = tl.program_id(0) // KV_HEADS % sequences
    split = tl.program_id(0) // KV_HEADS // sequences
    wait(PDL)
    context = tl.load(contexts_ptr + sequence)
    lowest = tl.maximum(context - WINDOW, 0) if WINDOW else 0
    base = lowest // TILE * TILE
    tiles = tl.cdiv(context - base, TILE)
    used = tl.minimum(splits, tiles)
    if split >= used:
        return
    begin = base + split * tiles // used * TILE
    end = tl.minimum(base + (split + 1) * tiles // used * TILE, context)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    q_ptr += sequence.to(tl.int64) * Q_STRIDE + head * GROUP * HEAD_DIM
    inside_MD = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_MD = tl.load(q_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=inside_MD, other=0.0)
    table_ptr += sequence.to(tl.int64) * table_stride
    layer_ptr = kv_ptr + layer.to(tl.int64) * LAYER_STRIDE + head * HEAD_DIM
    TOKEN: tl.constexpr = KV_HEADS * HEAD_DIM
    peak_M = tl.full([ROWS], LOWEST, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    mixed_MD = tl.zeros([ROWS, DIM], tl.float32)
    blocks = load_blocks(table_ptr, begin, end, BLOCK, TILE)
    for first in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = first + tl.arange(0, TILE)
        seen_N = tokens < end
        if WINDOW:
            seen_N = seen_N & (tokens >= lowest)
        tile_N = tile_pointers(layer_ptr, blocks, first, BLOCK_STRIDE, BLOCK, TOKEN, TILE)
        blocks = load_blocks(table_ptr, first + TILE, end, BLOCK, TILE)
        k_ND = load_tile(tile_N, seen_N, HEAD_DIM, DIM, q_MD.dtype)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        scores_MN = tl.where(seen_N[None, :], scores_MN, float("-inf"))
        v_ND = load_tile(tile_N + BLOCK * TOKEN, seen_N, HEAD_DIM, DIM, q_MD.dtype)
        peak_M, total_M, mixed_MD = fold(scores_MN, v_ND, SCALE, peak_M, total_M, mixed_MD)

    trigger(PDL)
    pair = sequence * KV_HEADS + head
    finish(
        peak_M, total_M, mixed_MD, out_ptr + pair.to(tl.int64) * GROUP * HEAD_DIM,
        partial_ptr, stats_ptr, counters_ptr + pair, pair * splits, split, used,
        GROUP, ROWS, HEAD_DIM, DIM, HEADS, PASS,
    )  # fmt: skip


DECODE = Kernel(_decode)


def decode_attention(
    q_TQD: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
    out_TE: torch.Tensor,
) -> None:
    """Attention of the first `inputs.num_decodes` sequences, into as many rows of `out_TE`."""
    _, q_heads, head_dim = q_TQD.shape
    block_size, kv_heads = kv_cache.shape[3:5]
    group, sequences = q_heads // kv_heads, inputs.num_decodes
    tiling = decode_tiling(group, head_dim, q_TQD.dtype, sequences)
    longest = inputs.max_context_len if window is None else min(inputs.max_context_len, window + tiling.keys)
    splits = count_splits(sequences, kv_heads, longest, multiprocessors(q_TQD.device), tiling.keys)
    space = workspace(q_TQD.device, group, head_dim)
    DECODE(
        kv_heads * sequences * splits,
        q_TQD, kv_cache, inputs.block_table, inputs.context_lens, out_TE,
        space.partial, space.stats, space.counters,
        layer, sequences, splits, inputs.block_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK=block_size,
        BLOCK_STRIDE=kv_cache.stride(0), LAYER_STRIDE=kv_cache.stride(1), Q_STRIDE=q_TQD.stride(0),
        SCALE=scale * LOG2_E, WINDOW=window or 0,
        ROWS=tiling.rows, DIM=padded(head_dim), TILE=tiling.keys, STAGES=tiling.stages,
        HEADS=next_power_of_two(group), PASS=splits_per_pass(group, head_dim),
        warps=tiling.warps, pdl=uses_pdl(),
    )  # fmt: skip
