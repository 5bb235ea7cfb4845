"""How rows and weights are cut for a card: tiles, programs, and why so. Integers only, no Triton.

The figures were measured on an H200 (132 multiprocessors, 4.3 TB/s) with bfloat16 at the shapes of Qwen3-0.6B and 8B, each
within a decode step; for shapes between and beyond they follow the reason. Attention has its own (`attention_plan`).
"""

import functools
from dataclasses import dataclass

SKINNY_TOKENS = 16  # more are cuBLAS's
MULTIPROCESSORS = 128  # at least so many are to have work
MANY_ROWS = 6144  # a weight of so many rows gives programs enough, however it is cut
MAX_SPLITS = 4
AT_ONCE = 4096  # rows under way at a time: 4 programs of 8 on each multiprocessor, registers permitting
SPLIT_ROWS = 32  # rows of a program whose columns are split, at most
SPLIT_PROGRAMS = MANY_ROWS // 16 * MAX_SPLITS  # programs whose columns are split, at most


@dataclass(frozen=True, slots=True)
class Gemv:
    """How plain multiply-adds go through a weight."""

    rows: int  # of the weight, per program; where it has a gate and an up half, as many of each
    tile: int  # columns at a time
    warps: int
    ahead: int  # tiles loaded before the wait for the predecessor
    unrolled: int  # tiles, those ahead among them, in straight code; the others go through shared memory
    fold: int = 1  # neighbouring columns added up at once: sums take so many times fewer registers
    stages: int = 4  # of the loop through shared memory


@dataclass(frozen=True, slots=True)
class Skinny:
    """How tensor cores go through a weight for 2 to 16 tokens."""

    rows: int  # of the weight, per program
    tile: int  # columns at a time
    splits: int  # programs that share the columns of their rows
    stages: int  # tiles on their way at a time
    warps: int = 4


def programs_for(count: int, each: int) -> int:
    """Programs for so many rows or columns where each takes so many. (Triton's `cdiv` takes microseconds.)"""
    return -(-count // each)


def padded(count: int) -> int:
    """The next power of two: what tiles are measured in."""
    return 1 << (count - 1).bit_length()


def norm_warps(columns: int) -> int:
    """Warps for one row: 8 numbers a thread, 16 in wide rows."""
    return 4 if columns <= 1024 else 8 if columns <= 4096 else 16


@functools.cache
def gemv(tokens: int, rows: int, columns: int, gated: bool) -> Gemv:
    """For a weight of so many rows, or so many in each half where gated."""
    if tokens > 1:
        # Tiles of 256 columns give every warp rows of its own, so few sums cross lanes and none crosses warps.
        return Gemv(16 if rows > 2048 else 8, _tile(columns, 256), warps=4, ahead=1, unrolled=1, fold=8)
    per_program, most, warps, ahead = _one_token(rows, columns, gated)
    tile = _tile(columns, most)
    tiles = programs_for(columns, tile)
    return Gemv(per_program, tile, warps, min(ahead, tiles), unrolled=tiles)


def _one_token(rows: int, columns: int, gated: bool) -> tuple[int, int, int, int]:
    """(rows of a program, columns of a tile at most, warps, tiles ahead).

    More rows and more tiles ahead are more loads on their way in a program and more registers, so fewer programs at a
    time. What counts is both, and that the last programs do not run alone for long.
    """
    if gated and columns <= 1024:  # two halves of 4 rows load as much as 8, and 3072 of each run at once
        return 4, 512, 2, 1
    if gated:  # two halves take registers twice: without a tile ahead there is room for a third program
        return 8, 1024, 4, 0
    if columns <= 1024:  # a vocabulary is bound by bytes alone: smaller programs, more of them at a time
        return 8, 512 if rows > 65536 else 1024, 4, 3
    if columns > 8192:  # long rows: the last programs of 8 would run alone for long, and those of 4 warps
        return 4, 1024, 2, 3
    if rows <= 2048:  # all programs have a place: much of a row is on its way before the wait
        return (8, 2048, 4, 1) if columns <= 2048 else (4, 1024, 4, 3)
    if rows <= AT_ONCE:  # registers for a second tile ahead would leave some programs for later
        return 8, 1024, 4, 1
    if rows <= 4 * AT_ONCE:  # programs come in a few turns: of smaller ones the last turn is shorter
        return 4, 1024, 4, 3
    return 8, 1024, 4, 3


@functools.cache
def skinny(rows: int, columns: int, exact: bool) -> Skinny:
    """exact: float32, which is for tests; without tensor cores its products take registers, so tiles are small."""
    if exact:
        return Skinny(rows=16, tile=32, splits=1 if rows >= MANY_ROWS else _even(columns, 32, 2), stages=1)
    if rows >= MANY_ROWS:
        return Skinny(rows=64, tile=128, splits=1, stages=4)  # the tokens are loaded for more rows at once
    splits = max(
        programs_for(MULTIPROCESSORS, programs_for(rows, SPLIT_ROWS)),  # work for all
        2 if columns >= 2048 else 1,  # long rows: more loads on their way
    )
    if splits == 1:
        return Skinny(rows=32, tile=256, splits=1, stages=3)
    return Skinny(SPLIT_ROWS, tile=128, splits=_even(columns, 128, min(splits, MAX_SPLITS)), stages=4)


def _tile(columns: int, most: int) -> int:
    return min(most, max(32, padded(columns)))


def _even(columns: int, tile: int, splits: int) -> int:
    """At most so many splits, none of them without a tile."""
    tiles = programs_for(columns, tile)
    return programs_for(tiles, programs_for(tiles, splits))
