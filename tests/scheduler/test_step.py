import pytest

from tests.scheduler.rig import request
from xllm.core.request import Request
from xllm.kv.pool import BlockPool
from xllm.scheduler.step import StepBuilder
from xllm.scheduler.tables import BlockTables


@pytest.fixture
def tables() -> BlockTables:
    return BlockTables(BlockPool(16, 4))


def seated(tables: BlockTables, slot: int, prompt: int, **fields) -> Request:
    one = request(f"r{slot}", list(range(prompt)), max_total_tokens=12, **fields)
    tables.take(one, [])
    one.slot = slot
    return one


def decoding(tables: BlockTables, slot: int, prompt: int, in_flight: int = 1) -> Request:
    one = seated(tables, slot, prompt)
    one.num_computed = prompt + in_flight - 1
    one.num_in_flight = in_flight
    return one


def test_prompts_are_cut_by_budget_and_limit(tables):
    one = seated(tables, 3, 10)
    builder = StepBuilder(6, tables)
    assert not builder.prefill(one, 4)
    assert (builder.budget, one.num_computed, one.num_in_flight, one.num_published) == (2, 4, 0, 1)
    assert not builder.prefill(one, 100)
    step = builder.build(7)
    assert step.plan.step == 7
    assert (step.plan.slots, step.plan.starts, step.plan.counts) == ([3, 3], [0, 4], [4, 2])
    assert step.plan.samples == [False, False]
    assert step.plan.num_tokens == builder.num_prefill_tokens == 6


def test_the_last_chunk_samples(tables):
    one = seated(tables, 0, 5)
    builder = StepBuilder(100, tables)
    assert builder.prefill(one, 100)
    assert builder.samples == [True]
    assert (one.num_computed, one.num_in_flight, one.num_published) == (5, 1, 1)


def test_decodes_compute_the_token_in_flight(tables):
    one, other = decoding(tables, 0, 5), decoding(tables, 1, 6, in_flight=2)
    builder = StepBuilder(100, tables)
    assert builder.decode([one, other]) == 2
    assert (builder.starts, builder.counts, builder.samples) == ([5, 7], [1, 1], [True, True])
    assert builder.budget == 98
    assert (one.num_computed, one.num_in_flight) == (6, 2)
    assert builder.appended == []


def test_a_full_table_grows(tables):
    one = decoding(tables, 0, 4)
    builder = StepBuilder(100, tables)
    builder.decode([one])
    assert builder.appended == [(0, one.blocks[1:])]
    assert len(one.blocks) == 2


def test_who_lacks_a_block_goes_without(tables):
    one, other = decoding(tables, 0, 4), decoding(tables, 1, 5)
    tables.pool.allocate(tables.pool.num_available)
    builder = StepBuilder(100, tables)
    assert builder.decode([one, other]) == 2
    assert builder.slots == [1]
    assert (one.num_computed, one.num_in_flight) == (4, 1)


def test_who_has_sampled_to_the_limit_only_waits(tables):
    one = decoding(tables, 0, 11)
    builder = StepBuilder(100, tables)
    assert builder.decode([one]) == 1
    assert builder.slots == []


def test_a_spent_budget_ends_the_turns(tables):
    everyone = [decoding(tables, slot, 5) for slot in range(3)]
    builder = StepBuilder(2, tables)
    assert builder.decode(everyone) == 2
    assert builder.slots == [0, 1]
    assert StepBuilder(0, tables).decode(everyone) == 0


def test_several_known_tokens_are_computed_at_once_or_by_and_by(tables):
    one = decoding(tables, 0, 5, in_flight=0)
    one.num_computed = 5
    one.output_token_ids = [7, 8, 9]
    builder = StepBuilder(2, tables)
    builder.decode([one])
    assert (builder.starts, builder.counts, builder.samples) == ([5], [2], [False])
    builder = StepBuilder(2, tables)
    builder.decode([one])
    assert (builder.starts, builder.counts, builder.samples) == ([7], [1], [True])


def test_introduction_carries_everything(tables):
    one = seated(tables, 2, 5, seed=77, stop_ids=frozenset({9, 4}))
    builder = StepBuilder(8, tables)
    builder.introduce(one)
    (new,) = builder.new
    assert (new.slot, new.request_id, new.prompt_len, new.seed) == (2, "r2", 5, 77)
    assert (list(new.token_ids), list(new.stop_ids), list(new.blocks)) == (
        [0, 1, 2, 3, 4],
        [4, 9],
        one.blocks,
    )
    one.output_token_ids = [6]
    builder.introduce(one)
    assert (builder.new[1].token_ids, builder.new[1].prompt_len) == ((0, 1, 2, 3, 4, 6), 5)
    one.blocks.append(99)
    assert 99 not in builder.new[1].blocks, "a plan does not change afterwards"
