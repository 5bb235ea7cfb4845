"""How attention over paged KV is cut for a card: tiles, splits and the choice of path. Integers only, no Triton.

A *tile* is what one matrix product takes of the keys, a *split* one program's share of a sequence's tiles. The figures
were measured on an H200 (132 multiprocessors) with bfloat16, 8 KV heads of size 128 and blocks of 64 tokens.
"""

import math
from dataclasses import dataclass

import torch

LOG2_E = math.log2(math.e)
QUERY_TILE = 128  # queries in a tile of `AttentionInputs.tiles`
MAX_SPLITS = 64
FEW_SEQUENCES = 16  # of a decode step
PREFILL_ROWS = 128  # of a tile, where all multiprocessors have some
COMBINED = 8192  # numbers of partial results that are added up at once, held in registers


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one kernel is compiled."""

    keys: int  # of a tile
    rows: int  # of a tile: pairs of a query and a query head, the heads of one KV head together
    warps: int
    stages: int  # tiles at once, the one in use and those on their way


def padded(size: int) -> int:
    """The power of two, 16 at least, that matrix products want."""
    return max(16, next_power_of_two(size))


def next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def decode_tiling(group: int, head_dim: int, dtype: torch.dtype, sequences: int | None = None) -> Tiling:
    """One query against many keys: bound by memory, so deep rather than wide. `sequences`: None for many.

    Few sequences are many splits of few tiles each, and each waits for its own: small tiles and programs let more of
    them wait at a time. With many sequences loads are under way anyway, and larger tiles cost fewer instructions.
    """
    wide, rows = padded(head_dim) > 128, padded(group)
    if dtype == torch.float32:
        return Tiling(keys=16 if wide else 32, rows=rows, warps=4, stages=2)
    few = sequences is not None and sequences <= FEW_SEQUENCES
    if few and rows == 16 and not wide:  # two warps have no registers for more
        return Tiling(keys=32, rows=rows, warps=2, stages=4)
    return Tiling(keys=32 if wide else 64, rows=rows, warps=4, stages=3)


def prefill_tiling(head_dim: int, dtype: torch.dtype, share: int | None = None) -> Tiling:
    """Bound by arithmetic. float32 goes without tensor cores (they would round), where tiles only cost registers.

    share: rows that there are for each multiprocessor, None for many. What one tile of many rows would hold is better
    spread over two: they run beside each other, and each takes less time from key tile to key tile.
    """
    wide = padded(head_dim) > 128
    if dtype == torch.float32:
        return Tiling(keys=16 if wide else 32, rows=32, warps=4, stages=2)
    short = share is not None and share <= PREFILL_ROWS
    return Tiling(keys=64, rows=64 if wide or short else PREFILL_ROWS, warps=4, stages=2)


def count_splits(
    sequences: int,
    kv_heads: int,
    max_context_len: int,
    multiprocessors: int,
    tile: int,
    most: int = MAX_SPLITS,
) -> int:
    """Splits of each sequence: as many as bring 3.5 programs to each multiprocessor, never finer than a tile.

    In a graph `max_context_len` is that of the model, so that the number of sequences decides. A sequence too short
    for so many uses fewer of them, and the programs of the rest end at once.
    """
    pairs = sequences * kv_heads
    filling = -(-7 * multiprocessors // (2 * pairs))
    return max(1, min(filling, -(-max_context_len // tile), most))


def most_partial_results(multiprocessors: int) -> int:
    """Splits over all sequences and KV heads that `count_splits` ever makes of more than one each, at most."""
    return 7 * multiprocessors


def splits_per_pass(heads: int, head_dim: int) -> int:
    """So many partial results of `heads` query heads each are added up at once; a power of two."""
    return max(1, min(32, COMBINED // (next_power_of_two(heads) * padded(head_dim))))


def can_use_descriptors(
    head_dim: int, block_size: int, tile: int, dtype: torch.dtype, kv_dtype: torch.dtype, cache_rows: int
) -> bool:
    """Whether the copy engine (TMA) can fetch key tiles: whole, 16 bytes aligned, inside one block, unconverted.

    cache_rows: tokens of all blocks, layers, keys and values, counted in 32 bits by the hardware.
    """
    return (
        head_dim in (64, 128)
        and block_size % tile == 0
        and dtype == kv_dtype == torch.bfloat16
        and cache_rows < 2**31
    )
