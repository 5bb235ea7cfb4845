"""How rows and weights are cut for a card: tiles, programs, and why so. Integers only, no Triton.

The figures were measured on an H200 (132 multiprocessors, 4.3 TB/s) with bfloat16 at the shapes of Qwen3-0.6B and 8B, each
within a decode step; for shapes between and beyond they follow the reason. Attention has its own (`attention_plan`).
"""

import functools
from dataclasses import dataclass

SKINNY_TOKENS = 16  # more are `narrow`'s or cuBLAS's
NARROW_TOKENS = 128  # more are cuBLAS's
MULTIPROCESSORS = 128  # at least so many are to have work
MANY_ROWS = 6144  # a weight of so many rows gives programs enough, however it is cut
MAX_SPLITS = 4
AT_ONCE = 4096  # rows under way at a time: 4 programs of 8 on each multiprocessor, registers permitting
SPLIT_ROWS = 32  # rows of a program whose columns are split, at most
SPLIT_PROGRAMS = MANY_ROWS // 16 * MAX_SPLITS  # programs whose columns are split, at most
NARROW_TILE = 128
NARROW_ROWS = 1024, 4096  # of a weight: more give cuBLAS programs enough, of fewer nothing has been measured
SMALL_WEIGHT = 1 << 22  # numbers: so few that reading them from the second-level cache again costs little
LONG_ROW = 8192  # numbers; so long are those of "down" in models of 8B and more


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


@dataclass(frozen=True, slots=True)
class Narrow:
    """How tensor cores go through a weight for 17 to 128 tokens: by one wave of programs."""

    tokens: int  # of a program
    rows: int  # of the weight, per program
    splits: int  # programs that share the columns of their rows
    tile: int  # columns at a time
    stages: int = 6  # tiles on their way at a time: what shared memory holds of 64 rows and 64 tokens
    warps: int = 4
    ahead: int = 512  # columns fetched before the wait for the predecessor; every split has as many


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
        return (8, 2048, 4, 1) if columns <= 2048 else (8, 1024, 4, 3)
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


@functools.cache
def narrow(rows: int, columns: int, tokens: int) -> Narrow | None:
    """None where cuBLAS is as fast or faster. For bfloat16; nothing is left over at any edge of the weight.

    What is gained is latency, 4 to 25 %, and only where the weight goes into exactly one wave: a program for nearly
    every multiprocessor, none with two, the ring of each full of tiles on their way. With wider weights cuBLAS is near
    the memory's speed, and with more tokens its larger tiles are better to the tensor cores: then only small weights
    are left, which arrive in no time, and very long rows. Splits cost the meeting of their sums, which grow with the
    tokens, so each must have enough of a row.
    """
    least, most = NARROW_ROWS
    if not (SKINNY_TOKENS < tokens <= NARROW_TOKENS and least <= rows <= most):
        return None
    if tokens <= 32:
        each = 32
    elif rows * columns <= SMALL_WEIGHT:
        each = padded(tokens) // 2  # two programs read the same rows, which makes fewer splits
    elif tokens <= 64 and columns > LONG_ROW:
        each = 64
    else:
        return None
    places = MULTIPROCESSORS // programs_for(tokens, each)  # programs for the weight
    height = 64 if places * 64 <= rows * MAX_SPLITS else 32  # 64 are what Hopper's tensor cores take at once
    splits = places * height // rows
    if splits * rows != places * height or splits > MAX_SPLITS or columns % (splits * NARROW_TILE):
        return None
    if columns < (1024 if splits == 1 else 2048) or (tokens > 64 and columns // splits < 768):
        return None
    return Narrow(each, height, splits, NARROW_TILE)


def _tile(columns: int, most: int) -> int:
    return min(most, max(32, padded(columns)))


def _even(columns: int, tile: int, splits: int) -> int:
    """At most so many splits, none of them without a tile."""
    tiles = programs_for(columns, tile)
    return programs_for(tiles, programs_for(tiles, splits))
