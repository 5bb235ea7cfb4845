"""What programs of `prefill_attention` that share the keys of a tile leave behind, and the last of them adds up.

Legend: as in `key_tiles`; E entries of `AttentionInputs.tiles` that may be parts, H KV heads.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from triton import language as tl

from xllm.ops.attention import SPLIT_PLACES, SPLIT_TILE
from xllm.ops.cuda.attention_plan import padded
from xllm.ops.cuda.key_tiles import LOWEST


@dataclass(frozen=True, slots=True)
class Places:
    """One per device and shape of heads, for everything on one stream. A place is a program's of an entry: [E, row tiles,
    H] programs of M rows each, where an entry has SPLIT_TILE queries, and fewer where it has fewer."""

    partial: torch.Tensor  # [places * M, D] float32, D padded
    stats: torch.Tensor  # [places * M, 2] float32: peak, total
    counters: torch.Tensor  # [places] int32, zero between kernels


@functools.cache
def places(device: torch.device, kv_heads: int, group: int, head_dim: int, rows: int) -> Places:
    """Made at the first use, which must not be while a graph is captured: graphs share it, and its zeros are real."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention must have run once before a CUDA graph of it is captured")
    count = SPLIT_PLACES * kv_heads * -(-SPLIT_TILE * group // rows)
    return Places(
        partial=torch.empty((count * rows, padded(head_dim)), dtype=torch.float32, device=device),
        stats=torch.empty((count * rows, 2), dtype=torch.float32, device=device),
        counters=torch.zeros(count, dtype=torch.int32, device=device),
    )


@triton.jit
def leave(
    peak_M, total_M, mixed_MD, there_M, place, partial_ptr, stats_ptr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Write one part's result to its place, the rows that exist."""
    at_M = place * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    tl.store(partial_ptr + at_M[:, None] * DIM + dims[None, :], mixed_MD, mask=there_M[:, None])
    tl.store(stats_ptr + at_M * 2, peak_M, mask=there_M)
    tl.store(stats_ptr + at_M * 2 + 1, total_M, mask=there_M)


@triton.jit
def add_up(there_M, first, step, used, partial_ptr, stats_ptr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """(total [M], mixed [M, D]) of `used` parts, whose places are `step` apart, in their order, whoever arrived last.
    One is on its way while another is added. Who calls this has counted with `acquire`, which empties the
    multiprocessor's first-level cache: other programs wrote them."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    peak_M = tl.full([ROWS], LOWEST, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    mixed_MD = tl.zeros([ROWS, DIM], tl.float32)
    for part in tl.range(0, used, num_stages=3):
        at_M = (first + part * step) * ROWS + rows
        peaks_M = tl.load(stats_ptr + at_M * 2, mask=there_M, other=LOWEST, cache_modifier=".cg")
        totals_M = tl.load(stats_ptr + at_M * 2 + 1, mask=there_M, other=0.0, cache_modifier=".cg")
        more_MD = tl.load(
            partial_ptr + at_M[:, None] * DIM + dims[None, :],
            mask=there_M[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher_M = tl.maximum(peak_M, peaks_M)
        shrink_M = tl.exp2(peak_M - higher_M)
        weight_M = tl.exp2(peaks_M - higher_M)
        total_M = total_M * shrink_M + totals_M * weight_M
        mixed_MD = mixed_MD * shrink_M[:, None] + more_MD * weight_M[:, None]
        peak_M = higher_M
    return total_M, mixed_MD
