"""Attention of tiles of queries over paged KV: prompts, chunks of them behind a cached prefix, and single queries.

A program takes the queries of one KV head, its query heads packed as rows beside each other: with few queries the
tile is still full, and the fewer queries it spans the less of it the causal mask wastes. Where there are
`AttentionInputs.parts`, several programs share the keys, and the last to arrive adds up what they found.

Legend: as in `xllm.ops.attention` and `key_tiles`; M rows, row r of a tile is query r // G, query head r % G.
"""

import torch
import triton
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xllm.ops.attention import SPLIT_KEYS, SPLIT_TILE, AttentionInputs
from xllm.ops.cuda.attention_plan import LOG2_E, QUERY_TILE, can_use_descriptors, padded, prefill_tiling
from xllm.ops.cuda.decode_attention import multiprocessors
from xllm.ops.cuda.key_tiles import LOWEST, average, fold, load_blocks, load_tile, tile_pointers
from xllm.ops.cuda.launch import launch
from xllm.ops.cuda.prefill_parts import add_up, leave, places


@triton.jit
def _sweep(
    q_MD, kv, table_ptr, position_M, begin, stop, end, plane, column, peak_M, total_M, mixed_MD,
    TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_STRIDE: tl.constexpr,
    PLANES: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The tiles from `begin` to `stop` into the running softmax. No query of this program sees token `end` or later.

    MASKED: not every row sees every token here. LAST: not all of these tokens are written; what a descriptor brings of
    the others is what the block's former owner left.
    """
    blocks = load_blocks(table_ptr, begin, end, BLOCK, TILE)
    for first in tl.range(begin, stop, TILE, num_stages=STAGES):
        tokens = first + tl.arange(0, TILE)
        if DESCRIPTOR:
            row = (blocks * PLANES + plane) * BLOCK + first % BLOCK
            k_ND = kv.load([row, column])
            v_ND = kv.load([row + BLOCK, column])
        else:
            tile_N = tile_pointers(kv, blocks, first, BLOCK_STRIDE, BLOCK, TOKEN, TILE)
            k_ND = load_tile(tile_N, tokens < end, HEAD_DIM, DIM, q_MD.dtype)
            v_ND = load_tile(tile_N + BLOCK * TOKEN, tokens < end, HEAD_DIM, DIM, q_MD.dtype)
        blocks = load_blocks(table_ptr, first + TILE, end, BLOCK, TILE)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if MASKED:
            seen_MN = tokens[None, :] <= position_M[:, None]
            if WINDOW:
                seen_MN = seen_MN & (tokens[None, :] > position_M[:, None] - WINDOW)
            scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        if DESCRIPTOR and LAST:  # a weight of zero does not undo a NaN
            v_ND = tl.where((tokens < end)[:, None], v_ND, 0.0)
        peak_M, total_M, mixed_MD = fold(scores_MN, v_ND, SCALE, peak_M, total_M, mixed_MD)
    return peak_M, total_M, mixed_MD


@triton.jit
def _store(
    mixed_MD, total_M, out_ptr, starts_ptr, tiles_ptr, sequence, queries, first_row, feature_M,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """What attention gives to the rows of this program. TOKEN: numbers per token.

    Where the rows belong is read from memory again: kept in registers over the loops it would spill what they need.
    """
    dims = tl.arange(0, DIM)
    start = tl.load(starts_ptr + sequence, volatile=True)
    query_M = tl.load(tiles_ptr + 1, volatile=True) + (first_row + tl.arange(0, ROWS)) // GROUP
    inside_MD = (query_M < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptr += ((start + query_M).to(tl.int64) * TOKEN + feature_M)[:, None]
    out_MD = average(mixed_MD, total_M).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + dims[None, :], out_MD, mask=inside_MD)


@triton.jit
def _store_shared(
    peak_M, mixed_MD, total_M, out_ptr, starts_ptr, tiles_ptr, sequence, queries, first_row, feature_M, there_M,
    partial_ptr, stats_ptr, counters_ptr, part, used,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """As `_store` where this is the only part, else this part's result, for the last to arrive to add up and store.

    A place per program of an entry: those of its parts are a grid's width apart. The first one's counter is theirs."""
    if used == 1:
        _store(
            mixed_MD, total_M, out_ptr, starts_ptr, tiles_ptr, sequence, queries, first_row, feature_M,
            GROUP, ROWS, HEAD_DIM, DIM, TOKEN,
        )  # fmt: skip
    else:
        width = tl.num_programs(0)
        place = tl.program_id(1) * width + tl.program_id(0)
        first = place - part * width
        leave(peak_M, total_M, mixed_MD, there_M, place, partial_ptr, stats_ptr, ROWS, DIM)
        tl.debug_barrier()  # the whole program has written before one thread says so
        arrived = tl.atomic_add(counters_ptr + first, 1, sem="acq_rel", scope="gpu")
        if arrived == used - 1:
            total_M, mixed_MD = add_up(there_M, first, width, used, partial_ptr, stats_ptr, ROWS, DIM)
            _store(
                mixed_MD, total_M, out_ptr, starts_ptr, tiles_ptr, sequence, queries, first_row, feature_M,
                GROUP, ROWS, HEAD_DIM, DIM, TOKEN,
            )  # fmt: skip
            tl.store(counters_ptr + first, 0)


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _prefill(
    q_ptr, kv, table_ptr, starts_ptr, contexts_ptr, tiles_ptr, out_ptr,
    parts_ptr, partial_ptr, stats_ptr, counters_ptr,
    layer, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, LAYER_STRIDE: tl.constexpr, Q_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr, SPLIT: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows * KV heads, tiles of queries). `kv` is the cache, or a descriptor of all of it as
    [block, layer, k|v, token] by [KV head, feature].

    SPLIT: several programs share the key tiles that these rows see, evenly, at least LEAST keys each; with fewer keys
    than the host thought of, or less of them in the window, those that are not needed end at once.
    """
    head = tl.program_id(0) % KV_HEADS
    # the rows that see most come first
    first_row = (tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS) * ROWS
    tiles_ptr += tl.program_id(1) * 2
    sequence = tl.load(tiles_ptr)
    first_query = tl.load(tiles_ptr + 1)
    start = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - start
    if first_query + first_row // GROUP >= queries:
        return
    context = tl.load(contexts_ptr + sequence)
    before = context - queries  # positions in front of this step's queries

    rows = first_row + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    feature_M = (head * GROUP + rows % GROUP) * HEAD_DIM
    query_M = first_query + rows // GROUP
    inside_MD = (query_M < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + ((start + query_M).to(tl.int64) * Q_STRIDE + feature_M)[:, None] + dims[None, :]
    q_MD = tl.load(q_ptrs, mask=inside_MD, other=0.0)
    # the position of the first row's query, then of the last's
    lowest = before + first_query + first_row // GROUP
    highest = before + tl.minimum(first_query + (first_row + ROWS - 1) // GROUP, queries - 1)
    position_M = lowest + (first_row % GROUP + tl.arange(0, ROWS)) // GROUP
    end = highest + 1
    if WINDOW:  # no tile is seen by all, then: it would take one more sweep for little
        begin = tl.maximum(lowest - WINDOW + 1, 0) // TILE * TILE
        seen_by_all = begin
    else:
        begin = 0
        seen_by_all = (lowest + 1) // TILE * TILE
    written = context // TILE * TILE  # tiles up to here are
    whole = tl.maximum(tl.minimum(end, written), seen_by_all)
    stop = end
    if SPLIT:
        part = tl.load(parts_ptr + tl.program_id(1) * 2)
        parts = tl.load(parts_ptr + tl.program_id(1) * 2 + 1)
        key_tiles = tl.cdiv(end - begin, TILE)
        used = tl.minimum(parts, tl.maximum(key_tiles * TILE // LEAST, 1))
        if part >= used:
            return
        lower = begin + part * key_tiles // used * TILE
        upper = begin + (part + 1) * key_tiles // used * TILE
        begin = lower
        seen_by_all = tl.minimum(tl.maximum(seen_by_all, lower), upper)
        whole = tl.minimum(tl.maximum(whole, lower), upper)
        stop = tl.minimum(end, upper)

    table_ptr += sequence.to(tl.int64) * table_stride
    plane = layer * 2
    column = head * HEAD_DIM
    if not DESCRIPTOR:
        kv += layer.to(tl.int64) * LAYER_STRIDE + column
    peak_M = tl.full([ROWS], LOWEST, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    mixed_MD = tl.zeros([ROWS, DIM], tl.float32)
    PLANES: tl.constexpr = BLOCK_STRIDE // LAYER_STRIDE * 2
    if not WINDOW:
        peak_M, total_M, mixed_MD = _sweep(
            q_MD, kv, table_ptr, position_M, begin, seen_by_all, end, plane, column, peak_M, total_M, mixed_MD,
            KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK, BLOCK_STRIDE, PLANES, SCALE, WINDOW, DIM, TILE, STAGES,
            DESCRIPTOR, False, False,
        )  # fmt: skip
    if DESCRIPTOR:
        peak_M, total_M, mixed_MD = _sweep(
            q_MD, kv, table_ptr, position_M, seen_by_all, whole, end, plane, column, peak_M, total_M, mixed_MD,
            KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK, BLOCK_STRIDE, PLANES, SCALE, WINDOW, DIM, TILE, STAGES,
            DESCRIPTOR, True, False,
        )  # fmt: skip
    else:
        whole = seen_by_all
    peak_M, total_M, mixed_MD = _sweep(
        q_MD, kv, table_ptr, position_M, whole, stop, end, plane, column, peak_M, total_M, mixed_MD,
        KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK, BLOCK_STRIDE, PLANES, SCALE, WINDOW, DIM, TILE, STAGES,
        DESCRIPTOR, True, True,
    )  # fmt: skip

    TOKEN: tl.constexpr = KV_HEADS * GROUP * HEAD_DIM
    if SPLIT:
        _store_shared(
            peak_M, mixed_MD, total_M, out_ptr, starts_ptr, tiles_ptr, sequence, queries, first_row, feature_M,
            query_M < queries, partial_ptr, stats_ptr, counters_ptr, part, used, GROUP, ROWS, HEAD_DIM, DIM, TOKEN,
        )  # fmt: skip
    else:
        _store(
            mixed_MD, total_M, out_ptr, starts_ptr, tiles_ptr, sequence, queries, first_row, feature_M,
            GROUP, ROWS, HEAD_DIM, DIM, TOKEN,
        )  # fmt: skip


def prefill_attention(
    q_TQD: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
    out_TE: torch.Tensor,
    descriptors: bool | None = None,
) -> None:
    """Attention of the queries in `inputs.tiles`, which have SPLIT_TILE queries where there are `inputs.parts`, else
    QUERY_TILE, into their rows of `out_TE`. `descriptors`: force or forbid them."""
    assert inputs.tiles is not None
    tokens, q_heads, head_dim = q_TQD.shape
    blocks, layers, _, block_size, kv_heads, _ = kv_cache.shape
    group, split = q_heads // kv_heads, inputs.parts is not None
    # by queries, not by tiles: a graph has tiles to spare, which end at once
    share = 0 if split else -(-(tokens - inputs.num_decodes) * q_heads // multiprocessors(q_TQD.device))
    tiling = prefill_tiling(head_dim, q_TQD.dtype, share)
    row_tiles = -(-min(SPLIT_TILE if split else QUERY_TILE, inputs.max_query_len) * group // tiling.rows)
    space = places(q_TQD.device, kv_heads, group, head_dim, tiling.rows) if split else None
    cache_rows = blocks * layers * 2 * block_size
    if descriptors is None:
        descriptors = kv_cache.is_contiguous() and can_use_descriptors(
            head_dim, block_size, tiling.keys, q_TQD.dtype, kv_cache.dtype, cache_rows
        )
    kv = kv_cache
    if descriptors:
        # One for all layers, keys and values. It costs a microsecond, so it is made anew and cannot go stale.
        width = kv_heads * head_dim
        kv = TensorDescriptor(kv_cache, [cache_rows, width], [width, 1], [tiling.keys, head_dim])
    launch(
        _prefill, (kv_heads * row_tiles, inputs.tiles.shape[0]),
        q_TQD, kv, inputs.block_table, inputs.query_starts, inputs.context_lens, inputs.tiles, out_TE,
        inputs.parts, *((space.partial, space.stats, space.counters) if space else (None, None, None)),
        layer, inputs.block_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK=block_size,
        BLOCK_STRIDE=kv_cache.stride(0), LAYER_STRIDE=kv_cache.stride(1), Q_STRIDE=q_TQD.stride(0),
        SCALE=scale * LOG2_E, WINDOW=window or 0,
        ROWS=tiling.rows, DIM=padded(head_dim), TILE=tiling.keys, STAGES=tiling.stages,
        DESCRIPTOR=descriptors, SPLIT=split, LEAST=SPLIT_KEYS, num_warps=tiling.warps,
    )  # fmt: skip
