"""A step that fills a graph computes what the same step computes alone; the rest of the graph is the spare slot's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.executor.test_buffers import KV, SPARE_BLOCK, buffers, plan, sequence
from xllm.executor.chunk_graphs import (
    LONGEST_CONTEXT,
    SEQUENCES,
    SEQUENCES_UNSPLIT,
    SIZES,
    ChunkGraphs,
    most_sequences,
)
from xllm.executor.graphs import GraphTable
from xllm.ops.attention import SPLIT_KEYS, SPLIT_TILE, SPLIT_TOKENS

LENGTH = 200


class Seen:
    """A step that keeps what it was given, as numbers."""

    def __call__(self, fwd, slots, positions):
        self.fwd, self.slots, self.positions = fwd, slots, positions
        return (slots * 1000 + positions,)


def make(tile=0, enabled=True, length=LENGTH):
    b = buffers(seqs=80, length=length, device="reference")
    b.ops = type(b.ops)(
        **{name: getattr(b.ops, name) for name in b.ops.__slots__ if name != "query_tile"}, query_tile=tile
    )
    seen = Seen()
    return b, ChunkGraphs(GraphTable(b.device), seen, b, KV, enabled=enabled), seen


@given(data=st.data(), tile=st.sampled_from([0, 16, 64]))
@settings(max_examples=80)
def test_real_rows_are_those_of_the_step_alone(data, tile):
    b, graphs, seen = make(tile, length=4000)
    count = data.draw(st.integers(1, 6))
    before = st.one_of(st.integers(0, 60), st.integers(0, 60), st.integers(0, 3000))
    starts = data.draw(st.lists(before, min_size=count, max_size=count))
    counts = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    counts[0] += data.draw(st.sampled_from([0, 0, 200, 300]))
    samples = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    fresh = iter(range(SPARE_BLOCK + 1, 10_000))
    new = [
        sequence(slot, [next(fresh) for _ in range(s + c)], [next(fresh) for _ in range(-(-(s + c) // 8))])
        for slot, s, c in zip(range(count), starts, counts, strict=True)
    ]
    step = plan(new=new, slots=list(range(count)), starts=starts, counts=counts)
    step = type(step)(**{f: getattr(step, f) for f in step.__struct_fields__} | {"samples": samples})
    b.admit(step)
    sampling = [i for i in range(count) if samples[i]]
    alone = b.forward(step, KV, np.asarray([sum(counts[: i + 1]) - 1 for i in sampling], dtype=np.int64))
    outputs = graphs.run(step)
    fwd, tokens = seen.fwd, sum(counts)

    assert len(fwd.token_ids) == min(size for size in SIZES if size >= tokens)
    for name in ("token_ids", "positions"):
        assert torch.equal(getattr(fwd, name)[:tokens], getattr(alone, name)), name
    assert torch.equal(fwd.logits_rows[: len(sampling)], alone.logits_rows)
    inputs, exact = fwd.attention, alone.attention
    assert torch.equal(inputs.kv_slots[:tokens], exact.kv_slots)
    assert torch.equal(inputs.query_starts[: count + 1], exact.query_starts)
    assert torch.equal(inputs.context_lens[:count], exact.context_lens)
    width = exact.block_table.shape[1]
    for row, length in enumerate(exact.context_lens.tolist()):
        blocks = -(-length // 8)
        assert torch.equal(inputs.block_table[row, :blocks], exact.block_table[row, :blocks]), width
    ends = [starts[i] + counts[i] for i in sampling]
    assert outputs[0][: len(sampling)].tolist() == [i * 1000 + e for i, e in zip(sampling, ends, strict=True)]

    # the rest writes nobody's memory
    assert (inputs.kv_slots[tokens:] // 8 == SPARE_BLOCK).all()
    assert (seen.slots[len(sampling) :] == b.spare_slot).all()
    assert int(inputs.query_starts[-1]) == len(fwd.token_ids)
    assert (inputs.block_table[count:] == SPARE_BLOCK).all()
    if tile:
        check_tiles(inputs, tile, len(fwd.token_ids))


def check_tiles(inputs, tile, size):
    """Every query is in one tile, and every tile that is cut comes in all its parts."""
    lens = inputs.query_starts.diff().tolist()
    tiles = [tuple(pair) for pair in inputs.tiles.tolist()]
    if size > SPLIT_TOKENS:
        assert inputs.parts is None
    else:
        tile = SPLIT_TILE
        parts = [tuple(pair) for pair in inputs.parts.tolist()]
        assert len(parts) == len(tiles)
        for i, (part, count) in enumerate(parts):
            first = i - part
            assert parts[first : first + count] == [(j, count) for j in range(count)]
            assert tiles[i] == tiles[first]
            assert count == 1 or inputs.context_lens[tiles[i][0]] >= count * SPLIT_KEYS
        tiles = [pair for pair, (part, _) in zip(tiles, parts, strict=True) if part == 0]
    covered = [(s, first + i) for s, first in tiles for i in range(tile) if first + i < lens[s]]
    assert sorted(covered) == [(s, i) for s, n in enumerate(lens) for i in range(n)]


def test_what_a_size_has_to_spare_reads_a_long_context():
    b, graphs, seen = make(128, length=4000)
    b.admit(plan(new=[sequence(0, [0] * 3000, list(range(375)))]))
    graphs.run(plan(slots=[0], starts=[2960], counts=[40]))
    assert seen.fwd.attention.parts.tolist()[:13] == [
        *([i, 5] for i in range(5)), *([i, 5] for i in range(5)), *([0, 1] for _ in range(3)),
    ]  # fmt: skip
    check_tiles(seen.fwd.attention, 128, 64)


@pytest.mark.parametrize("size", SIZES)
def test_as_many_sequences_as_a_size_takes_have_tiles(size):
    _, graphs, seen = make(128, length=2000)
    count = most_sequences(size)
    tokens = [1] * (count - 1)
    tokens.append(size - sum(tokens))
    graphs.run(plan(slots=list(range(count)), starts=[0] * count, counts=tokens))
    check_tiles(seen.fwd.attention, 128, size)
    assert len(seen.slots) == count


def test_what_is_too_large_or_switched_off_has_no_graph():
    b, graphs, _ = make(length=600)
    for count, tokens in ((SEQUENCES, 1), (SEQUENCES_UNSPLIT, 30)):
        many = plan(slots=list(range(count + 1)), starts=[0] * (count + 1), counts=[tokens] * (count + 1))
        assert not graphs.fits(many)
        fewer = plan(slots=list(range(count)), starts=[0] * count, counts=[tokens] * count)
        assert graphs.fits(fewer)
    long = plan(slots=[0], starts=[0], counts=[550])
    assert graphs.run(long) is None, "no size between the longest sequence and this one"
    assert graphs.fits(plan(slots=[0], starts=[LONGEST_CONTEXT + 1], counts=[SPLIT_TOKENS]))
    far = plan(slots=[0], starts=[LONGEST_CONTEXT + 1], counts=[SPLIT_TOKENS + 1])
    assert graphs.run(far) is None, "one program would read all of its context"
    _, off, _ = make(enabled=False)
    assert off.run(plan(slots=[0], starts=[0], counts=[3])) is None
    assert b.spare_slot == 80


def test_every_size_is_captured_once():
    _, graphs, seen = make()
    sizes = []
    while graphs.capture_one():
        sizes.append(len(seen.fwd.token_ids))
    assert sizes == [size for size in SIZES if size <= LENGTH]
