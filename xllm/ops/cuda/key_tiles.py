"""What the attention kernels share: where a tile of keys lies in the paged cache, and softmax tile by tile.

Legend: N keys of a tile, M rows (a query of a query head each), D head size padded to a power of two.

Softmax runs in powers of two: SCALE has log2(e) in it. `peak` is the largest score so far, `total` the sum of
weights relative to it, `mixed` the so weighted sum of values (Milakov and Gimelshein 2018, Dao et al. 2022).
"""

import triton
from triton import language as tl

# Below every score yet finite: a row that has seen no key keeps weights of zero where -inf would give NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_blocks(table_ptr, first, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The block of the tile of tokens at `first`, a multiple of the tile, or, where tiles do not fit into blocks, [N]
    the block of each token. The table is not read for tokens from `end` on, whose block is then 0.

    A loop over tiles asks for the next tile's before it needs them: its loads then wait for nothing but themselves.
    """
    if BLOCK % TILE == 0:
        return tl.load(table_ptr + first // BLOCK, mask=first < end, other=0)
    else:
        tokens = first + tl.arange(0, TILE)
        return tl.load(table_ptr + tokens // BLOCK, mask=tokens < end, other=0)


@triton.jit
def tile_pointers(
    layer_ptr, blocks, first, BLOCK_STRIDE: tl.constexpr, BLOCK: tl.constexpr, TOKEN: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """[N]: where the tokens from `first` lie, of which layer_ptr is the first in block 0. TOKEN: numbers per token.

    Inside one block only the tile's place takes 64 bits and changes from tile to tile, which saves registers.
    """
    steps = tl.arange(0, TILE)
    if BLOCK % TILE == 0:
        return layer_ptr + blocks.to(tl.int64) * BLOCK_STRIDE + first % BLOCK * TOKEN + steps * TOKEN
    else:
        return layer_ptr + (blocks.to(tl.int64) * BLOCK_STRIDE + (first + steps) % BLOCK * TOKEN)


@triton.jit
def load_tile(pointers_N, there_N, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, dtype: tl.constexpr):
    """[N, D] keys or values, zero where not `there` and past the head size."""
    dims = tl.arange(0, DIM)
    if HEAD_DIM == DIM:
        inside = there_N[:, None]
    else:
        inside = there_N[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(pointers_N[:, None] + dims[None, :], mask=inside, other=0.0).to(dtype)


@triton.jit
def fold(scores_MN, v_ND, SCALE: tl.constexpr, peak_M, total_M, mixed_MD):
    """One tile more into the running softmax. scores: raw products, -inf where unseen; SCALE > 0."""
    higher_M = tl.maximum(peak_M, tl.max(scores_MN, 1) * SCALE)
    weights_MN = tl.exp2(scores_MN * SCALE - higher_M[:, None])
    shrink_M = tl.exp2(peak_M - higher_M)
    total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
    mixed_MD = mixed_MD * shrink_M[:, None]
    mixed_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, mixed_MD, input_precision="ieee")
    return higher_M, total_M, mixed_MD


@triton.jit
def average(mixed_MD, total_M):
    """[M, D]: what attention gives; zero for rows that have seen no key, which nobody uses."""
    return mixed_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]


@triton.jit
def finish(
    peak_M, total_M, mixed_MD, out_ptr, partial_ptr, stats_ptr, counter_ptr, first_partial, split, used,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Write one split's result: as the output where there is no other split, else for the last to arrive to add up.

    out_ptr: the output [GROUP, head size] of this sequence and KV head. partial_ptr [*, GROUP, head size] and
    stats_ptr [*, GROUP, 2] (peak, total) begin at row `first_partial` of it; counter_ptr is its own, zero before
    and after. The order of adding is that of the splits, whoever arrives last.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    inside_MD = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    if used == 1:
        out_MD = average(mixed_MD, total_M).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out_MD, mask=inside_MD)
    else:
        mine_M = (first_partial + split) * GROUP + rows
        tl.store(partial_ptr + mine_M[:, None] * HEAD_DIM + dims[None, :], mixed_MD, mask=inside_MD)
        tl.store(stats_ptr + mine_M * 2, peak_M, mask=rows < GROUP)
        tl.store(stats_ptr + mine_M * 2 + 1, total_M, mask=rows < GROUP)
        tl.debug_barrier()  # the whole program has written before one thread says so
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == used - 1:
            combine(out_ptr, partial_ptr, stats_ptr, first_partial, used, GROUP, HEAD_DIM, DIM, HEADS, PASS)
            tl.store(counter_ptr, 0)


@triton.jit
def combine(
    out_ptr, partial_ptr, stats_ptr, first_partial, used,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Add up `used` partial results, PASS at a time, past the first-level cache: other programs wrote them."""
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    inside_GD = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    peak_G = tl.full([HEADS], LOWEST, tl.float32)
    total_G = tl.zeros([HEADS], tl.float32)
    mixed_GD = tl.zeros([HEADS, DIM], tl.float32)
    for begin in tl.range(0, used, PASS, num_stages=1):
        splits = begin + tl.arange(0, PASS)
        theirs_SG = (first_partial + splits)[:, None] * GROUP + heads[None, :]
        there_SG = (splits < used)[:, None] & (heads < GROUP)[None, :]
        peaks_SG = tl.load(stats_ptr + theirs_SG * 2, mask=there_SG, other=LOWEST, cache_modifier=".cg")
        totals_SG = tl.load(stats_ptr + theirs_SG * 2 + 1, mask=there_SG, other=0.0, cache_modifier=".cg")
        mixed_SGD = tl.load(
            partial_ptr + theirs_SG[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=there_SG[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher_G = tl.maximum(peak_G, tl.max(peaks_SG, 0))
        weights_SG = tl.exp2(peaks_SG - higher_G[None, :])
        shrink_G = tl.exp2(peak_G - higher_G)
        total_G = total_G * shrink_G + tl.sum(weights_SG * totals_SG, 0)
        mixed_GD = mixed_GD * shrink_G[:, None] + tl.sum(weights_SG[:, :, None] * mixed_SGD, 0)
        peak_G = higher_G
    out_GD = average(mixed_GD, total_G).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + heads[:, None] * HEAD_DIM + dims[None, :], out_GD, mask=inside_GD)
