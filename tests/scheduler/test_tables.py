import pytest

from tests.scheduler.rig import request
from xllm.kv.pool import BlockPool
from xllm.scheduler.tables import NEVER, BlockTables


@pytest.fixture
def tables() -> BlockTables:
    return BlockTables(BlockPool(16, 4))


def admitted(tables: BlockTables, id: str, prompt: list[int], max_total: int = 20, **fields):
    one = request(id, prompt, max_total_tokens=max_total, **fields)
    tables.take(one, tables.find(one))
    return one


def computed(tables: BlockTables, one, tokens: int):
    one.num_computed = tokens
    tables.publish(one)
    return one


def test_blocks_are_counted_up(tables):
    assert [tables.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_take_allocates_for_all_known_tokens(tables):
    one = admitted(tables, "a", [1] * 9)
    assert len(one.blocks) == 3
    assert one.num_computed == 0
    assert tables.promised == 5 - 3
    tables.audit([one])


def test_a_second_request_shares_full_blocks(tables):
    one = computed(tables, admitted(tables, "a", [1] * 9), 9)
    other = admitted(tables, "b", [1] * 8 + [2])
    assert other.blocks[:2] == one.blocks[:2]
    assert other.num_computed == 8
    assert tables.pool.usage == 4 / 16
    tables.audit([one, other])


def test_only_what_is_computed_is_published(tables):
    computed(tables, admitted(tables, "a", [1] * 9), 7)
    assert len(tables.find(request("b", [1] * 9))) == 1


def test_the_last_known_token_is_never_cached(tables):
    computed(tables, admitted(tables, "a", [1] * 9), 9)
    assert len(tables.find(request("b", [1] * 8))) == 1
    assert len(tables.find(request("c", [1] * 9))) == 2
    assert tables.find(request("d", [1] * 4)) == []


def test_salts_share_nothing(tables):
    computed(tables, admitted(tables, "a", [1] * 9, cache_salt="x"), 9)
    assert tables.find(request("b", [1] * 9)) == []
    assert len(tables.find(request("c", [1] * 9, cache_salt="x"))) == 2


def test_prompt_logprobs_owed_are_computed(tables):
    computed(tables, admitted(tables, "a", [1] * 9), 9)
    asking = request("b", [1] * 9, params={"prompt_logprobs": 0})
    assert tables.find(asking) == []
    asking.num_prompt_logprobs = 5  # sent before it was preempted: positions 1 to 5
    assert len(tables.find(asking)) == 1
    asking.num_prompt_logprobs = 8  # all of them
    assert len(tables.find(asking)) == 2


def test_switched_off_nothing_is_hashed():
    tables = BlockTables(BlockPool(16, 4, prefix_caching=False))
    one = computed(tables, admitted(tables, "a", [1] * 9), 9)
    assert one.block_hashes == []
    assert tables.find(request("b", [1] * 9)) == []


def test_output_is_published_as_it_becomes_known(tables):
    one = computed(tables, admitted(tables, "a", [1, 2, 3]), 3)
    one.num_computed = 4
    tables.publish(one)
    assert one.num_published == 0, "position 3 is computed, but its token is not known yet"
    one.output_token_ids += [9, 8]
    tables.publish(one)
    assert one.num_published == 1
    assert len(tables.find(request("b", [1, 2, 3, 9, 8, 7]))) == 1


def test_growing_stops_where_the_pool_ends(tables):
    one = admitted(tables, "a", [1] * 4, max_total=68)
    fresh = tables.grow(one, 64)
    assert fresh is not None
    assert len(fresh) == 15
    assert one.blocks[1:] == fresh
    assert tables.grow(one, 64) == []
    assert tables.grow(one, 65) is None
    assert tables.promised == 1
    tables.audit([one])


def test_needs_of_the_next_step(tables):
    full = admitted(tables, "a", [1] * 4)
    roomy = admitted(tables, "b", [1] * 5)
    ending = admitted(tables, "c", [1] * 4, max_total=5)
    for one in (full, roomy, ending):
        one.num_computed = len(one.prompt_token_ids)
        one.num_in_flight = 1
    assert tables.blocks_needed([full, roomy, ending]) == 1, (
        "of which one has room and one only awaits its last token"
    )


def test_release_returns_to_before_take(tables):
    one = computed(tables, admitted(tables, "a", [1] * 9), 9)
    tables.release(one, after=3)
    assert (one.blocks, one.num_computed, one.num_published) == ([], 0, 0)
    assert tables.promised == 0
    assert tables.pool.num_returning == 3
    tables.audit([])
    tables.take(one, tables.find(one))
    assert one.num_computed == 8
    assert tables.pool.num_returning == 1


def test_withdrawn_tables_are_not_found(tables):
    one = computed(tables, admitted(tables, "a", [1] * 9), 9)
    tables.withdraw(one)
    assert tables.find(request("b", [1] * 9)) == []


def test_never_publishes_nothing(tables):
    one = admitted(tables, "a", [1] * 9)
    one.num_published = NEVER
    computed(tables, one, 9)
    assert tables.find(request("b", [1] * 9)) == []


def test_admission_without_memory_is_a_fault(tables):
    with pytest.raises(AssertionError, match="admitted without the memory"):
        tables.take(request("a", [1] * 100), [])


def test_audit_compares_the_ledger(tables):
    one = admitted(tables, "a", [1] * 9)
    with pytest.raises(AssertionError, match="ledger says 3 blocks held and 5 at most, tables say 0 and 0"):
        tables.audit([])
    tables.audit([one])
