import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.state_machines import explore
from xllm.kv.pool import BlockPool


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def taken(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8, 4)


def test_all_or_nothing(pool):
    assert pool.allocate(9) is None
    assert pool.num_available == 8
    blocks = taken(pool, 8)
    assert sorted(blocks) == list(range(8))
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    assert pool.usage == 1.0
    pool.audit([blocks])


def test_freed_blocks_are_handed_out_again(pool):
    blocks = taken(pool, 8)
    pool.release(blocks)
    assert pool.usage == 0.0
    assert sorted(taken(pool, 8)) == sorted(blocks)


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0), (-1, 1)])
def test_a_pool_of_nothing_is_refused(blocks, size):
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(blocks, size)


def test_double_free_raises_and_does_nothing(pool):
    blocks = taken(pool, 3)
    pool.release(blocks[:1])
    with pytest.raises(ValueError, match="more often than it is held"):
        pool.release(blocks)
    pool.audit([blocks[1:]])


def test_double_free_raises_while_a_release_is_pending(pool):
    blocks = taken(pool, 1)
    pool.release(blocks, after=3)
    with pytest.raises(ValueError, match="more often than it is held"):
        pool.release(blocks, after=3)
    with pytest.raises(ValueError, match="more often than it is held"):
        pool.release(blocks)
    pool.settle(3)
    pool.audit()


def test_a_block_twice_in_one_table_raises(pool):
    blocks = taken(pool, 1)
    pool.share(pool.match([]))
    with pytest.raises(ValueError, match="stands twice"):
        pool.release(blocks * 2)


class TestDeferredRelease:
    def test_allocatable_only_after_the_step(self, pool):
        blocks = taken(pool, 8)
        pool.release(blocks, after=7)
        assert pool.num_available == 0
        assert pool.num_returning == 8
        pool.settle(6)
        assert pool.allocate(1) is None
        pool.settle(7)
        assert pool.num_returning == 0
        assert pool.num_available == 8
        pool.audit()

    def test_later_steps_settle_earlier_ones(self, pool):
        one, other = taken(pool, 2), taken(pool, 2)
        pool.release(one, after=1)
        pool.release(other, after=2)
        pool.audit()
        pool.settle(5)
        assert pool.num_available == 8

    def test_steps_must_not_go_backwards(self, pool):
        one, other = taken(pool, 1), taken(pool, 1)
        pool.release(one, after=2)
        with pytest.raises(ValueError, match="others after step 2 already"):
            pool.release(other, after=1)
        pool.audit([other])

    def test_a_hit_on_a_leaving_block_keeps_it(self, pool):
        blocks = taken(pool, 1)
        pool.publish(blocks[0], name(1))
        pool.release(blocks, after=4)
        pool.share(pool.match([name(1)]))
        assert pool.num_returning == 0
        pool.settle(4)
        assert not pool.is_available(blocks[0])
        pool.audit([blocks])

    def test_a_block_shared_and_left_by_both(self, pool):
        blocks = taken(pool, 1)
        pool.publish(blocks[0], name(1))
        pool.share(blocks)
        pool.release(blocks, after=4)
        assert pool.num_returning == 0
        pool.release(blocks, after=5)
        assert pool.num_returning == 1
        pool.settle(4)
        assert pool.num_returning == 1
        assert not pool.is_available(blocks[0])
        pool.settle(5)
        assert pool.is_available(blocks[0])
        pool.audit()

    def test_the_last_stayer_leaves_at_once(self, pool):
        blocks = taken(pool, 1)
        pool.publish(blocks[0], name(1))
        pool.share(blocks)
        pool.release(blocks, after=4)
        pool.release(blocks)
        assert pool.num_returning == 1
        pool.audit()
        pool.settle(4)
        assert pool.num_available == 8
        pool.audit()


class TestPrefixCache:
    def test_published_blocks_are_found_and_shared(self, pool):
        blocks = taken(pool, 2)
        assert pool.publish(blocks[0], name(1))
        assert pool.publish(blocks[1], name(2))
        assert pool.match([name(1), name(2), name(3)]) == blocks
        assert pool.match([name(1), name(2)], 1) == blocks[:1]
        assert pool.num_reusable(blocks) == 0
        pool.share(blocks)
        pool.release(blocks)
        assert pool.usage == 0.25
        pool.audit([blocks])

    def test_released_blocks_stay_findable(self, pool):
        blocks = taken(pool, 1)
        pool.publish(blocks[0], name(1))
        pool.release(blocks)
        assert pool.usage == 0
        assert pool.match([name(1)]) == blocks
        assert pool.num_reusable(blocks) == 1
        pool.share(blocks)
        assert pool.num_available == 7
        pool.audit([blocks])

    def test_the_least_recently_used_sequence_goes_first_and_its_tail_before_its_head(self, pool):
        tables = [taken(pool, 4), taken(pool, 4)]
        for table, base in zip(tables, (10, 20), strict=True):
            for i, block in enumerate(table):
                pool.publish(block, name(base + i))
        pool.release(tables[1])
        pool.release(tables[0])
        assert taken(pool, 5) == tables[1][::-1] + tables[0][3:]
        assert pool.evictions == 5
        assert pool.match([name(10), name(11), name(12), name(13)]) == tables[0][:3]
        assert pool.match([name(20)]) == []

    def test_free_blocks_go_before_cached_ones(self, pool):
        blocks = taken(pool, 1)
        pool.publish(blocks[0], name(1))
        pool.release(blocks)
        assert blocks[0] not in taken(pool, 7)
        assert pool.evictions == 0

    def test_a_name_belongs_to_the_first(self, pool):
        one, other = taken(pool, 2)
        assert pool.publish(one, name(1))
        assert not pool.publish(other, name(1))
        pool.release([other])
        pool.audit([[one]])
        assert pool.match([name(1)]) == [one]

    def test_withdrawn_blocks_are_found_no_more(self, pool):
        blocks = taken(pool, 1)
        pool.publish(blocks[0], name(1))
        pool.withdraw(blocks[0])
        pool.withdraw(blocks[0])
        assert pool.match([name(1)]) == []
        pool.release(blocks)
        pool.audit()

    def test_only_held_blocks_are_published_withdrawn_or_shared(self, pool):
        with pytest.raises(ValueError, match="not held"):
            pool.publish(0, name(1))
        with pytest.raises(ValueError, match="not held"):
            pool.withdraw(0)
        with pytest.raises(ValueError, match="nothing in it to share"):
            pool.share([0])

    def test_reset_frees_what_nobody_holds(self, pool):
        one, other = taken(pool, 1), taken(pool, 1)
        pool.publish(one[0], name(1))
        pool.publish(other[0], name(2))
        pool.release(one)
        pool.reset_cache()
        assert pool.match([name(1)]) == pool.match([name(2)]) == []
        pool.audit([other])
        pool.release(other)
        assert pool.num_available == 8
        assert pool.index.num_shelved == 0
        pool.audit()

    def test_switched_off_it_knows_nothing(self):
        pool = BlockPool(4, 4, prefix_caching=False)
        blocks = taken(pool, 1)
        assert not pool.publish(blocks[0], name(1))
        assert pool.match([name(1)]) == []

    def test_lookups_are_counted_in_tokens(self, pool):
        pool.count_lookup(10, 4)
        pool.count_lookup(5, 0)
        assert (pool.queried_tokens, pool.hit_tokens) == (15, 4)


class TestAudit:
    def test_a_leak_is_named(self, pool):
        blocks = taken(pool, 2)
        with pytest.raises(
            AssertionError, match=f"block {min(blocks)} counts 1 references, but 0 sequences hold it"
        ):
            pool.audit()

    def test_an_unknown_holder_is_named(self, pool):
        with pytest.raises(AssertionError, match="block 5 counts 0 references, but 1 sequences hold it"):
            pool.audit([[5]])

    def test_two_states_are_named(self, pool):
        blocks = taken(pool, 1)
        pool._free.put(blocks[0])
        with pytest.raises(AssertionError, match="is in 2 states"):
            pool.audit([blocks])

    def test_a_lost_block_is_named(self, pool):
        pool._free.remove(3)
        with pytest.raises(AssertionError, match="block 3 is in 0 states"):
            pool.audit()

    def test_a_free_block_with_a_name_is_named(self, pool):
        pool.index.add(3, name(1))
        with pytest.raises(AssertionError, match="block 3 is free but has a name"):
            pool.audit()

    def test_miscounted_releases_are_named(self, pool):
        blocks = taken(pool, 1)
        pool.release(blocks, after=1)
        pool._leaving[blocks[0]] = 0
        with pytest.raises(AssertionError, match="0 releases counted, 1 waiting"):
            pool.audit()

    def test_miscounted_returning_blocks_are_named(self, pool):
        pool._num_returning = 2
        with pytest.raises(AssertionError, match="2 blocks counted as returning, 0 are"):
            pool.audit()


class PoolMachine(RuleBasedStateMachine):
    """The pool against a naive model: tables of holders, and a dictionary of names."""

    @initialize(blocks=st.integers(1, 10), caching=st.booleans())
    def start(self, blocks, caching):
        self.pool = BlockPool(blocks, 4, caching)
        self.tables: list[list[int]] = []
        self.leaving: list[tuple[int, list[int]]] = []
        self.names: dict[bytes, int] = {}
        self.step = 0
        self.next_name = 0

    def held(self) -> set[int]:
        return {block for table in self.tables + [blocks for _, blocks in self.leaving] for block in table}

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        before = self.held()
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > self.pool.num_blocks - len(before))
        if blocks:
            assert not set(blocks) & before
            assert len(set(blocks)) == count
            self.names = {name: block for name, block in self.names.items() if block not in blocks}
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), later=st.integers(0, 3))
    def release(self, data, later):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if later:
            self.step += later - 1
            self.pool.release(table, after=self.step)
            self.leaving.append((self.step, table))
        else:
            self.pool.release(table)

    @rule(back=st.integers(0, 2))
    def settle(self, back):
        self.pool.settle(self.step - back)
        self.leaving = [(step, blocks) for step, blocks in self.leaving if step > self.step - back]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), fresh=st.booleans())
    def publish(self, data, fresh):
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        self.next_name += fresh
        new = name(self.next_name)
        expected = self.pool.prefix_caching and new not in self.names and block not in self.names.values()
        assert self.pool.publish(block, new) == expected
        if expected:
            self.names[new] = block

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def hit(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.names)), min_size=1, max_size=3, unique=True))
        blocks = self.pool.match(chosen)
        assert blocks == [self.names[one] for one in chosen]
        assert self.pool.num_reusable(blocks) == len(set(blocks) - self.held())
        self.pool.share(blocks)
        self.tables.append(blocks)

    @rule()
    def reset(self):
        self.pool.reset_cache()
        self.names.clear()

    @invariant()
    def books_balance(self):
        if not hasattr(self, "pool"):
            return
        self.pool.audit(self.tables)
        held = self.held()
        assert self.pool.num_available == self.pool.num_blocks - len(held)
        assert all(
            self.pool.is_available(block) == (block not in held) for block in range(self.pool.num_blocks)
        )
        only_leaving = held - {block for table in self.tables for block in table}
        assert self.pool.num_returning == len(only_leaving)
        assert len(self.pool.index) == len(self.names)
        assert self.pool.match(sorted(self.names)) == [self.names[one] for one in sorted(self.names)]


def test_random_moves():
    explore(PoolMachine, 80)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_moves_in_depth():
    explore(PoolMachine, 3000)
