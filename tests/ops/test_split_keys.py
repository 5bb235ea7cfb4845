"""How the keys of tiles are cut into parts, for steps of few queries behind long contexts."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xllm.ops.attention import (
    SPLIT_ENTRIES,
    SPLIT_KEYS,
    SPLIT_PLACES,
    SPLIT_TILE,
    query_tiles,
    split_keys,
)

SEQUENCES = st.lists(
    st.tuples(st.integers(0, 100), st.one_of(st.integers(0, 3000), st.integers(0, 200_000))), max_size=70
)


def cut(queries: list[int], before: list[int], spare: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tiles, the same in parts, their parts)."""
    query_lens = np.array(queries, dtype=np.int64)
    tiles = query_tiles(query_lens, 0, SPLIT_TILE)
    return tiles, *split_keys(
        tiles, query_lens, query_lens + np.array(before, dtype=np.int64), len(tiles) + spare
    )


@given(sequences=SEQUENCES, spare=st.integers(0, 50))
def test_every_tile_comes_once_in_each_of_its_parts(sequences: list[tuple[int, int]], spare: int) -> None:
    queries, before = [n for n, _ in sequences], [b for _, b in sequences]
    whole, tiles, parts = cut(queries, before, spare)
    assert tiles.dtype == parts.dtype == np.int32 and tiles.shape == parts.shape
    assert tiles.flags.c_contiguous and parts.flags.c_contiguous
    assert len(whole) <= len(tiles) <= len(whole) + spare
    seen, keys_before = [], None
    rows = [(*tile, *part) for tile, part in zip(tiles.tolist(), parts.tolist(), strict=True)]
    for (sequence, first), group in itertools.groupby(rows, key=lambda row: row[:2]):
        of = [(part, count) for *_, part, count in group]
        assert of == [(part, len(of)) for part in range(len(of))], "neighbours, in order"
        seen.append((sequence, first))
        keys = before[sequence] + min(first + SPLIT_TILE, queries[sequence])
        assert len(of) == 1 or keys // len(of) >= SPLIT_KEYS
        assert keys_before is None or keys <= keys_before, "most keys first"
        keys_before = keys
    assert sorted(seen) == sorted(map(tuple, whole.tolist()))
    in_parts = np.flatnonzero(parts[:, 1] > 1)
    assert len(in_parts) == 0 or in_parts[-1] < SPLIT_PLACES, "a card has places for so many"


@given(tile_keys=st.integers(1, 3000), parts=st.integers(1, 64), keys=st.sampled_from([32, 64]))
def test_every_key_tile_is_in_one_part(tile_keys: int, parts: int, keys: int) -> None:
    """As the kernel cuts, of whose tiles of rows each sees other keys."""
    tiles = -(-tile_keys // keys)
    used = min(parts, max(tiles * keys // SPLIT_KEYS, 1))
    borders = [part * tiles // used for part in range(used + 1)]
    assert borders[0] == 0 and borders[-1] == tiles
    assert all(low < high for low, high in itertools.pairwise(borders))


def test_the_longest_parts_get_shorter() -> None:
    _, tiles, parts = cut([64, 1, 1], [8192, 4000, 100], SPLIT_ENTRIES)
    counts = {
        (sequence, first): count
        for (sequence, first), (_, count) in zip(tiles.tolist(), parts.tolist(), strict=True)
    }
    assert counts == {(0, 32): 13, (0, 0): 12, (1, 0): 6, (2, 0): 1}
    _, tiles, _ = cut([64], [2100], SPLIT_ENTRIES)
    assert len(tiles) == 2 * 4, "512 keys each"


def test_many_tiles_leave_room_for_a_long_one() -> None:
    _, tiles, parts = cut([32] + [1] * 50, [20_000] + [700] * 50, 100)
    assert parts[:17].tolist() == [[part, 17] for part in range(17)]
    assert len(tiles) == 51 + 16


def test_nothing_is_nothing() -> None:
    _, tiles, parts = cut([], [], 5)
    assert len(tiles) == len(parts) == 0
