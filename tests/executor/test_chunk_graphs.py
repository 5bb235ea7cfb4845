"""A step that fills a graph computes what the same step computes alone; the rest of the graph is the spare slot's."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.executor.test_buffers import KV, SPARE_BLOCK, buffers, plan, sequence
from xllm.executor.chunk_graphs import LONGEST_CONTEXT, SEQUENCES, SIZES, ChunkGraphs
from xllm.executor.graphs import GraphTable

LENGTH = 200


class Seen:
    """A step that keeps what it was given, as numbers."""

    def __call__(self, fwd, slots, positions):
        self.fwd, self.slots, self.positions = fwd, slots, positions
        return (slots * 1000 + positions,)


def make(tile=0, enabled=True):
    b = buffers(seqs=20, length=LENGTH, device="reference")
    b.ops = type(b.ops)(
        **{name: getattr(b.ops, name) for name in b.ops.__slots__ if name != "query_tile"}, query_tile=tile
    )
    seen = Seen()
    return b, ChunkGraphs(GraphTable(b.device), seen, b, KV, enabled=enabled), seen


@given(data=st.data(), tile=st.sampled_from([0, 16, 64]))
@settings(max_examples=80)
def test_real_rows_are_those_of_the_step_alone(data, tile):
    b, graphs, seen = make(tile)
    count = data.draw(st.integers(1, 6))
    starts = data.draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    counts = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
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
        lens = inputs.query_starts.diff()
        covered = {
            (s, first + i) for s, first in inputs.tiles.tolist() for i in range(tile) if first + i < lens[s]
        }
        assert covered == {(s, i) for s, n in enumerate(lens.tolist()) for i in range(n)}


def test_what_is_too_large_or_switched_off_has_no_graph():
    b, graphs, _ = make()
    many = plan(slots=list(range(SEQUENCES + 1)), starts=[0] * 17, counts=[1] * 17)
    assert graphs.run(many) is None
    long = plan(slots=[0], starts=[0], counts=[LENGTH])
    assert graphs.run(long) is None, "no size between the longest sequence and this one"
    far = plan(slots=[0], starts=[LONGEST_CONTEXT + 1], counts=[1])
    assert graphs.run(far) is None, "its context is better read by many programs"
    _, off, _ = make(enabled=False)
    assert off.run(plan(slots=[0], starts=[0], counts=[3])) is None
    assert b.spare_slot == 20


def test_every_size_is_captured_once():
    _, graphs, seen = make()
    sizes = []
    while graphs.capture_one():
        sizes.append(len(seen.fwd.token_ids))
    assert sizes == [size for size in SIZES if size <= LENGTH]
