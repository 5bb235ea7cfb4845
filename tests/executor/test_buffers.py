from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.core.plan import NewSequence, StepPlan
from xllm.core.sampling import SamplingParams
from xllm.device.table import open_device
from xllm.executor.buffers import InputBuffers
from xllm.ops.table import load_ops

KV = torch.empty(0)
SPARE_BLOCK = 77


def sequence(slot, tokens, blocks):
    return NewSequence(
        slot=slot,
        request_id=str(slot),
        token_ids=tokens,
        prompt_len=len(tokens),
        params=SamplingParams(),
        seed=0,
        stop_ids=(),
        blocks=blocks,
    )


def plan(new=(), slots=(), starts=(), counts=(), appended=()):
    return StepPlan(
        step=1,
        new=new,
        slots=slots,
        starts=starts,
        counts=counts,
        samples=[True] * len(slots),
        appended=appended,
    )


def buffers(seqs=4, length=64, block=8, device="cpu"):
    return InputBuffers(
        max_num_seqs=seqs, max_model_len=length, block_size=block, device=open_device(device),
        ops=load_ops(device, torch.float32), spare_block=SPARE_BLOCK,
    )  # fmt: skip


def rows(*indices):
    return np.asarray(indices, dtype=np.int64)


def test_a_chunk_and_a_decode_share_a_step():
    b = buffers()
    first = plan(
        new=[sequence(2, list(range(100, 110)), [5, 3]), sequence(0, [7, 8, 9], [1])],
        slots=[2, 0],
        starts=[0, 0],
        counts=[10, 3],
    )
    b.admit(first)
    fwd = b.forward(first, KV, rows(9, 12))
    assert fwd.token_ids.tolist() == [*range(100, 110), 7, 8, 9]
    assert fwd.positions.tolist() == [*range(10), 0, 1, 2]
    assert fwd.attention.query_starts.tolist() == [0, 10, 13]
    assert fwd.attention.context_lens.tolist() == [10, 3]
    assert fwd.attention.kv_slots.tolist() == [*(5 * 8 + i for i in range(8)), 24, 25, 8, 9, 10]
    assert (fwd.attention.max_query_len, fwd.attention.max_context_len) == (10, 10)


def test_a_sampled_token_is_the_next_steps_input_without_the_host():
    b = buffers()
    first = plan(new=[sequence(1, [4, 5], [6])], slots=[1], starts=[0], counts=[2])
    b.admit(first)
    b.feed_back([1], [2], torch.tensor([42]))
    second = plan(slots=[1], starts=[2], counts=[1])
    b.admit(second)
    fwd = b.forward(second, KV, rows(0))
    assert fwd.token_ids.tolist() == [42]
    assert fwd.attention.kv_slots.tolist() == [6 * 8 + 2]


def test_a_slot_handed_on_forgets_its_former_sequence():
    b = buffers()
    b.admit(plan(new=[sequence(0, list(range(20)), [1, 2, 3])]))
    again = plan(new=[sequence(0, [9], [7])], slots=[0], starts=[0], counts=[1])
    b.admit(again)
    b.admit(plan(appended=[(0, [5])]))
    fwd = b.forward(plan(slots=[0], starts=[8], counts=[1]), KV, rows(0))
    assert fwd.attention.kv_slots.tolist() == [5 * 8]
    assert fwd.attention.block_table[0].tolist() == [7, 5]


def test_the_token_at_the_very_last_position_has_room():
    b = buffers(length=16)
    b.feed_back([3], [16], torch.tensor([1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=4), st.randoms())
def test_any_mixture_reads_and_writes_where_the_plan_says(chunks, random):
    b = buffers()
    blocks = list(range(40))
    random.shuffle(blocks)
    new, expected_tokens, expected_slots = [], [], []
    for slot, (start, count) in enumerate(chunks):
        tokens = [random.randrange(1000) for _ in range(start + count)]
        table = [blocks.pop() for _ in range(-(-len(tokens) // 8))]
        new.append(sequence(slot, tokens, table))
        for p in range(start, start + count):
            expected_tokens.append(tokens[p])
            expected_slots.append(table[p // 8] * 8 + p % 8)
    p = plan(
        new=new, slots=list(range(len(chunks))), starts=[s for s, _ in chunks], counts=[c for _, c in chunks]
    )
    b.admit(p)
    fwd = b.forward(p, KV, rows(0))
    assert fwd.token_ids.tolist() == expected_tokens
    assert fwd.attention.kv_slots.tolist() == expected_slots


def test_a_decode_step_is_found_on_the_device_alone():
    b = buffers(device="reference")
    b.admit(plan(new=[sequence(2, list(range(100, 110)), [5, 3]), sequence(0, [7, 8, 9], [1])]))
    b.feed_back([2, 0], [10, 3], torch.tensor([41, 42]))
    b.admit(plan(appended=[(0, [6])]))
    slots, positions = torch.tensor([0, 2, b.spare_slot]), torch.tensor([3, 10, 0])
    fwd = b.decode_forward(slots, positions, KV)
    assert fwd.token_ids.tolist() == [42, 41, 0]
    assert fwd.positions.tolist() == [3, 10, 0]
    assert fwd.logits_rows is None
    inputs = fwd.attention
    assert inputs.kv_slots.tolist() == [1 * 8 + 3, 3 * 8 + 2, SPARE_BLOCK * 8]
    assert inputs.context_lens.tolist() == [4, 11, 1]
    assert inputs.query_starts.tolist() == [0, 1, 2, 3]
    assert inputs.num_decodes == 3
    assert inputs.block_table[0, :2].tolist() == [1, 6]
    assert inputs.block_table[1, :2].tolist() == [5, 3]


@given(data=st.data())
@settings(max_examples=50)
def test_the_device_knows_what_the_host_knows(data):
    """Blocks and tokens reach the device's tables whatever comes in which plan."""
    b = buffers(device="reference")
    tables: dict[int, list[int]] = {}
    fresh = iter(range(10_000))
    for _ in range(data.draw(st.integers(1, 6))):
        new, appended = [], []
        for slot in data.draw(st.sets(st.integers(0, 3))):
            length = data.draw(st.integers(1, 64))
            tables[slot] = [next(fresh) for _ in range(-(-length // 8))]
            new.append(sequence(slot, [next(fresh) for _ in range(length)], list(tables[slot])))
        for slot in data.draw(st.sets(st.sampled_from(sorted(tables)))) if tables else ():
            more = [next(fresh) for _ in range(data.draw(st.integers(0, 8 - len(tables[slot]))))]
            tables[slot] += more
            appended.append((slot, more))
        b.admit(plan(new=new, appended=appended))
        for seq in new:
            assert b.tokens[seq.slot, : len(seq.token_ids)].tolist() == seq.token_ids
    for slot, blocks in tables.items():
        assert b.block_table[slot, : len(blocks)].tolist() == blocks
        assert b.tables_of(np.array([slot]))[0, : len(blocks)].tolist() == blocks
    assert b.block_table[b.spare_slot, 0] == SPARE_BLOCK


def test_few_queries_behind_a_long_context_share_its_keys():
    b = buffers(length=4000)
    b.ops = replace(b.ops, query_tile=128)
    b.admit(plan(new=[sequence(s, [0] * 3500, list(range(s * 500, s * 500 + 438))) for s in range(2)]))
    step = plan(slots=[1, 0], starts=[100, 2960], counts=[1, 40])
    attention = b.forward(step, KV, rows(0, 40)).attention
    assert attention.num_decodes == 1
    assert attention.tiles.tolist() == [[1, 32]] * 5 + [[1, 0]] * 5
    assert attention.parts.tolist() == [[part, 5] for part in range(5)] * 2
    for counts, starts in (((1, 40), (100, 200)), ((1, 300), (100, 2960)), ((1, 1), (100, 2960))):
        attention = b.forward(plan(slots=[1, 0], starts=starts, counts=counts), KV, rows(0)).attention
        assert attention.parts is None
        assert attention.tiles.shape[0] == -(-(counts[1] - 1) // 128)
