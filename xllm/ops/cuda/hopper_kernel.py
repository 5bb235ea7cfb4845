"""Attention of tiles of queries over paged KV for Hopper: copies, products and exponentials run beside each other.

The design is FlashAttention 3's (Shah et al. 2024), here over a paged cache. In each program one warp has the copy
engine (TMA) bring tiles of keys and values into a ring in shared memory; two groups of four warps, 64 rows each, use
them. A group issues the next tile's product with keys and this tile's with values, and computes the next tile's
weights while they run. The groups take turns to issue, so that one multiplies while the other computes exponentials.

Barriers in shared memory guard the ring. Each counts phases; who waits for a phase passes if it is over, and for the
phase before the first at once. A place's n-th filling is over with phase n of `full`, when all bytes have come; it may
begin with phase n - 1 of `free`, when both groups have multiplied with what was there. Everybody goes through the same
items and the same tiles of each, so that one count serves for everything: that of tiles so far.

Legend: as in `xllm.ops.attention` and `key_tiles`; M rows of a group: row r of an item is query r // G, query head r % G
of one KV head. Tiles of keys come last first: those that need masks are in front.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(128)  # of an item, half of them for each group
HALF = gl.constexpr(64)
TILE = gl.constexpr(128)  # keys; of one block or two
PANEL = gl.constexpr(64)  # columns: shared memory has all rows of these before those of the next
LOWEST = gl.constexpr(-1e30)  # see `key_tiles`
# Together they have the 504 registers that a lane of each warp, of twelve, can have; multiples of 8.
GROUP_REGISTERS = gl.constexpr(240)
COPY_REGISTERS = gl.constexpr(24)


@gluon.jit
def _find(
    item, items, row_tiles, tiles_ptr, starts_ptr, contexts_ptr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Where an item stands: (head, its first row within the tile of queries, sequence, the tile's first query, queries
    and context of the sequence, tokens that some row sees, tiles of keys). No tiles where there is nothing to do."""
    there = item < items
    item = gl.minimum(item, items - 1)
    head = item % KV_HEADS
    rest = item // KV_HEADS
    first_row = (row_tiles - 1 - rest % row_tiles) * ROWS  # the rows that see most come first
    tiles_ptr += rest // row_tiles * 2
    sequence = gl.load(tiles_ptr)
    first_query = gl.load(tiles_ptr + 1)
    queries = gl.load(starts_ptr + sequence + 1) - gl.load(starts_ptr + sequence)
    context = gl.load(contexts_ptr + sequence)
    last_query = gl.minimum(first_query + (first_row + ROWS - 1) // GROUP, queries - 1)
    end = context - queries + last_query + 1
    there = there & (first_query + first_row // GROUP < queries)
    tiles = gl.where(there, (end + TILE - 1) // TILE, 0)
    return head, first_row, sequence, first_query, queries, context, end, tiles


@gluon.jit
def _copy(
    kv, ring, table_ptr, tiles_ptr, starts_ptr, contexts_ptr, items, row_tiles, layer, table_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, PLANES: gl.constexpr,
    STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """The warp that keeps the ring full."""
    k_ring, v_ring, k_full, v_full, k_free, v_free = ring
    boxes: gl.constexpr = STAGES * (HEAD_DIM // PANEL) * (TILE // BOX)
    box_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    k_boxes = k_ring._reinterpret(gl.bfloat16, [boxes, BOX, PANEL], box_layout)
    v_boxes = v_ring._reinterpret(gl.bfloat16, [boxes, BOX, PANEL], box_layout)
    programs = gl.num_programs(0)
    mine = gl.program_id(0)
    count = 0
    for base in range(0, items, programs):
        head, _, sequence, _, _, context, _, tiles = _find(
            base + mine, items, row_tiles, tiles_ptr, starts_ptr, contexts_ptr, KV_HEADS, GROUP
        )
        blocks_ptr = table_ptr + sequence.to(gl.int64) * table_stride
        for i in range(tiles):
            place = count % STAGES
            before = count // STAGES & 1 ^ 1
            first = (tiles - 1 - i) * TILE
            at = (blocks_ptr, first, context, head * HEAD_DIM, place)
            mbarrier.wait(k_free.index(place), before)
            _copy_tile(kv, k_boxes, k_full, layer * 2, at, HEAD_DIM, BLOCK, PLANES, BOX)
            mbarrier.wait(v_free.index(place), before)
            _copy_tile(kv, v_boxes, v_full, layer * 2 + 1, at, HEAD_DIM, BLOCK, PLANES, BOX)
            count += 1
        mine = programs - 1 - mine


@gluon.jit
def _copy_tile(
    kv, boxes, full, plane, at,
    HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, PLANES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Ask for one tile, box by box: a box lies within one block of tokens. Tokens behind the context are anybody's."""
    blocks_ptr, first, context, column, place = at
    panels: gl.constexpr = HEAD_DIM // PANEL
    full = full.index(place)
    mbarrier.expect(full, TILE * HEAD_DIM * 2)
    for part in gl.static_range(TILE // BOX):
        token = first + part * BOX
        block = gl.load(blocks_ptr + token // BLOCK, mask=token < context, other=0)
        row = (block * PLANES + plane) * BLOCK + token % BLOCK
        for panel in gl.static_range(panels):
            box = boxes.index((place * panels + panel) * (TILE // BOX) + part)
            tma.async_copy_global_to_shared(kv, [row, column + panel * PANEL], full, box)


@gluon.jit
def _weigh(
    scores_MN, position_M, first, peak_M, SCALE: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr
):
    """(weights relative to the highest score so far, that, what earlier weights shrink by); see `key_tiles.fold`."""
    if MASKED:
        tokens = first + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
        scores_MN = gl.where(tokens[None, :] <= position_M[:, None], scores_MN, float("-inf"))
    higher_M = gl.maximum(peak_M, gl.max(scores_MN, 1) * SCALE)
    weights_MN = gl.exp2(scores_MN * SCALE - higher_M[:, None])
    return weights_MN, higher_M, gl.exp2(peak_M - higher_M)


@gluon.jit
def _multiply_keys(q, k_ring, place, layout: gl.constexpr):
    unused_MN = gl.zeros([HALF, TILE], gl.float32, layout)
    return warpgroup_mma(q, k_ring.index(place).permute((1, 0)), unused_MN, use_acc=False, is_async=True)


@gluon.jit
def _step(
    q, ring, my_turn, other_turn, count, first, position_M, weights_MN, peak_M, total_M, mixed_MD,
    GROUP_INDEX: gl.constexpr, HEAD_DIM: gl.constexpr, SCALE: gl.constexpr, MASKED: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The values of the tile before, and the weights of tile number `count`, which begins at token `first`."""
    k_ring, v_ring, k_full, v_full, k_free, v_free = ring
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    place = count % STAGES
    v_place = (count - 1) % STAGES
    v_phase = (count - 1) // STAGES & 1
    weights_MP = gl.convert_layout(weights_MN.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
    mbarrier.wait(k_full.index(place), count // STAGES & 1)
    mbarrier.wait(my_turn, count & 1 ^ 1 - GROUP_INDEX)
    scores_MN = _multiply_keys(q, k_ring, place, s_layout)
    mbarrier.wait(v_full.index(v_place), v_phase)
    mixed_MD = warpgroup_mma(weights_MP, v_ring.index(v_place), mixed_MD, is_async=True)
    mbarrier.arrive(other_turn)
    scores_MN = warpgroup_mma_wait(1, deps=[scores_MN])
    mbarrier.arrive(k_free.index(place))
    weights_MN, peak_M, shrink_M = _weigh(scores_MN, position_M, first, peak_M, SCALE, MASKED, s_layout)
    total_M = total_M * shrink_M + gl.sum(weights_MN, 1)
    # Over since long ago. The assembler moves arithmetic behind the next line's wait, but not past a branch.
    mbarrier.wait(v_full.index(v_place), v_phase)
    mixed_MD, weights_MP, weights_MN = warpgroup_mma_wait(0, deps=[mixed_MD, weights_MP, weights_MN])
    mbarrier.arrive(v_free.index(v_place))
    mixed_MD = mixed_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, o_layout))[:, None]
    return weights_MN, peak_M, total_M, mixed_MD


@gluon.jit
def _forget(number):
    """The same, but the compiler does not know."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _place_rows(
    start, first_query, first_row, queries, head,
    STRIDE: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """([M, D] where a group's rows lie in a tensor of such a stride from token to token, [M, 1] whether they exist)."""
    rows = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    query_M = first_query + rows // GROUP
    feature_M = (head * GROUP + rows % GROUP) * HEAD_DIM
    at_M = (start + query_M).to(gl.int64) * STRIDE + feature_M
    return at_M[:, None] + dims[None, :], (query_M < queries)[:, None]


@gluon.jit
def _blank_values(v, full, phase, first, end, HEAD_DIM: gl.constexpr, layout: gl.constexpr):
    """Zero for the values that nobody has written: a weight of zero does not undo a NaN. Both groups do it, each before
    it multiplies; they write the same."""
    mbarrier.wait(full, phase)
    v_ND = v.load(layout)
    tokens = first + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    v.store(gl.where((tokens < end)[:, None], v_ND, gl.zeros([TILE, HEAD_DIM], gl.bfloat16, layout)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _use(
    q_ptr, out_ptr, q_smem, ring, my_turn, other_turn, tiles_ptr, starts_ptr, contexts_ptr, items, row_tiles,
    GROUP_INDEX: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    Q_STRIDE: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: its half of every item's rows."""
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    q = q_smem.index(GROUP_INDEX)
    programs = gl.num_programs(0)
    mine = gl.program_id(0)
    count = 0
    for base in range(0, items, programs):
        item = base + mine
        head, first_row, sequence, first_query, queries, context, end, tiles = _find(
            item, items, row_tiles, tiles_ptr, starts_ptr, contexts_ptr, KV_HEADS, GROUP
        )
        if tiles > 0:
            first_row += GROUP_INDEX * HALF
            start = gl.load(starts_ptr + sequence)
            at_MD, inside_M1 = _place_rows(
                start, first_query, first_row, queries, head, Q_STRIDE, GROUP, HEAD_DIM, row_layout
            )
            q.store(gl.load(q_ptr + at_MD, mask=inside_M1, other=0.0))
            fence_async_shared()
            gl.thread_barrier()
            if tiles * TILE > context:
                place = count % STAGES
                v_full = ring[3].index(place)
                v = ring[1].index(place)
                _blank_values(v, v_full, count // STAGES & 1, (tiles - 1) * TILE, end, HEAD_DIM, row_layout)
            lowest = context - queries + first_query + first_row // GROUP
            out_MD = _attend_item(
                q, ring, my_turn, other_turn, count, tiles, lowest, first_row,
                GROUP_INDEX, GROUP, HEAD_DIM, SCALE, STAGES,
            )  # fmt: skip
            count += tiles
            q.store(out_MD.to(gl.bfloat16))  # for rows that are stored in one piece
            gl.thread_barrier()
            # Where they belong, found anew: kept over the loops it would take registers.
            start, first_query, first_row, head = (
                _forget(start),
                _forget(first_query),
                _forget(first_row),
                _forget(head),
            )
            at_MD, inside_M1 = _place_rows(
                start,
                first_query,
                first_row,
                queries,
                head,
                KV_HEADS * GROUP * HEAD_DIM,
                GROUP,
                HEAD_DIM,
                row_layout,
            )
            gl.store(out_ptr + at_MD, q.load(row_layout), mask=inside_M1)
            gl.thread_barrier()  # before the next queries come
        mine = programs - 1 - mine


@gluon.jit
def _attend_item(
    q, ring, my_turn, other_turn, count, tiles, lowest, first_row,
    GROUP_INDEX: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, SCALE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """[M, D] of a group's rows, the first of which stands at position `lowest`. There is a tile at least."""
    k_ring, v_ring, k_full, v_full, k_free, v_free = ring
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows = first_row % GROUP + gl.arange(0, HALF, layout=gl.SliceLayout(1, s_layout))
    position_M = lowest + rows // GROUP
    masked = tiles - gl.minimum((lowest + 1) // TILE, tiles)  # tiles that not all rows see all of
    place = count % STAGES
    mbarrier.wait(k_full.index(place), count // STAGES & 1)
    mbarrier.wait(my_turn, count & 1 ^ 1 - GROUP_INDEX)
    scores_MN = _multiply_keys(q, k_ring, place, s_layout)
    mbarrier.arrive(other_turn)
    scores_MN = warpgroup_mma_wait(0, deps=[scores_MN])
    mbarrier.arrive(k_free.index(place))
    peak_M = gl.full([HALF], LOWEST, gl.float32, gl.SliceLayout(1, s_layout))
    weights_MN, peak_M, _ = _weigh(scores_MN, position_M, (tiles - 1) * TILE, peak_M, SCALE, True, s_layout)
    total_M = gl.sum(weights_MN, 1)
    mixed_MD = gl.zeros([HALF, HEAD_DIM], gl.float32, o_layout)
    for i in range(1, masked):
        weights_MN, peak_M, total_M, mixed_MD = _step(
            q, ring, my_turn, other_turn, count + i, (tiles - 1 - i) * TILE, position_M,
            weights_MN, peak_M, total_M, mixed_MD, GROUP_INDEX, HEAD_DIM, SCALE, True, STAGES,
        )  # fmt: skip
    for i in range(gl.maximum(masked, 1), tiles):
        weights_MN, peak_M, total_M, mixed_MD = _step(
            q, ring, my_turn, other_turn, count + i, (tiles - 1 - i) * TILE, position_M,
            weights_MN, peak_M, total_M, mixed_MD, GROUP_INDEX, HEAD_DIM, SCALE, False, STAGES,
        )  # fmt: skip
    last = count + tiles - 1
    place = last % STAGES
    weights_MP = gl.convert_layout(weights_MN.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
    mbarrier.wait(v_full.index(place), last // STAGES & 1)
    mixed_MD = warpgroup_mma(weights_MP, v_ring.index(place), mixed_MD, is_async=True)
    mixed_MD, weights_MP = warpgroup_mma_wait(0, deps=[mixed_MD, weights_MP])
    mbarrier.arrive(v_free.index(place))
    share_M = 1.0 / gl.where(total_M == 0.0, 1.0, total_M)
    return mixed_MD * gl.convert_layout(share_M, gl.SliceLayout(1, o_layout))[:, None]


@gluon.jit
def _new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["items", "row_tiles", "layer", "table_stride"])
def attend(
    q_ptr, kv, table_ptr, starts_ptr, contexts_ptr, tiles_ptr, out_ptr,
    items, row_tiles, layer, table_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr,
    PLANES: gl.constexpr, Q_STRIDE: gl.constexpr, SCALE: gl.constexpr,
    STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Any grid: programs share the `items`, which are `row_tiles` and KV heads of each of the tiles of queries. `kv`
    describes the whole cache, as [block, layer, k|v, token] by [KV head, feature]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, HEAD_DIM], layout)
    k_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, HEAD_DIM], layout)
    v_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, HEAD_DIM], layout)
    # a full place is said by the copy engine once it has brought what was asked for, a free one by both groups
    k_full, v_full = _new_barriers(STAGES, 1), _new_barriers(STAGES, 1)
    k_free, v_free = _new_barriers(STAGES, 2), _new_barriers(STAGES, 2)
    turn_0, turn_1 = _new_barriers(1, 1).index(0), _new_barriers(1, 1).index(0)
    fence_async_shared()
    ring = (k_ring, v_ring, k_full, v_full, k_free, v_free)
    gl.warp_specialize(
        [
            (_use, (q_ptr, out_ptr, q_smem, ring, turn_0, turn_1, tiles_ptr, starts_ptr, contexts_ptr, items,
                    row_tiles, 0, KV_HEADS, GROUP, HEAD_DIM, Q_STRIDE, SCALE, STAGES)),
            (_use, (q_ptr, out_ptr, q_smem, ring, turn_1, turn_0, tiles_ptr, starts_ptr, contexts_ptr, items,
                    row_tiles, 1, KV_HEADS, GROUP, HEAD_DIM, Q_STRIDE, SCALE, STAGES)),
            (_copy, (kv, ring, table_ptr, tiles_ptr, starts_ptr, contexts_ptr, items, row_tiles, layer, table_stride,
                     KV_HEADS, GROUP, HEAD_DIM, BLOCK, PLANES, STAGES, BOX)),
        ],
        [4, 1],
        [GROUP_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
