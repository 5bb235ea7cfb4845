"""A pool whose blocks come and go."""

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
from xllm.kv.events import EventLog, Origin, Removed
from xllm.kv.pool import BlockPool


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def taken(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(12, 4, mapped=4)


def test_only_what_is_mapped_exists(pool):
    assert (pool.num_blocks, pool.num_mapped, pool.num_available) == (12, 4, 4)
    assert pool.allocate(5) is None
    assert taken(pool, 4) == [0, 1, 2, 3]
    assert pool.usage == pytest.approx(4 / 12)
    assert not pool.is_available(4)
    assert [pool.exists(block) for block in (3, 4)] == [True, False]
    pool.audit([[0, 1, 2, 3]])


def test_added_blocks_are_handed_out(pool):
    blocks = taken(pool, 4)
    pool.add(8, 4)
    assert (pool.num_mapped, pool.num_available) == (8, 4)
    assert taken(pool, 4) == [8, 9, 10, 11]
    pool.audit([blocks, [8, 9, 10, 11]])


def test_the_lowest_free_block_goes_first(pool):
    pool.add(4, 4)
    blocks = taken(pool, 8)
    for block in (6, 1, 4, 2):
        pool.release([block])
    assert taken(pool, 3) == [1, 2, 4]
    pool.audit([[block for block in blocks if block != 6]])


def test_dropped_blocks_are_handed_out_no_more(pool):
    assert pool.drop(1, 2)
    assert (pool.num_mapped, pool.num_available) == (2, 2)
    pool.audit()
    assert taken(pool, 2) == [0, 3]
    assert pool.allocate(1) is None
    pool.audit([[0, 3]])


@pytest.mark.parametrize("taken_between", [0, 4])
def test_blocks_dropped_and_added_again_exist_once(pool, taken_between):
    pool.add(4, 4)
    assert pool.drop(0, 4)
    blocks = taken(pool, taken_between)
    pool.add(0, 4)
    pool.audit([blocks])
    assert sorted(taken(pool, 8 - taken_between) + blocks) == list(range(8))


@pytest.mark.parametrize("after", [None, 3])
def test_held_blocks_are_not_dropped(pool, after):
    blocks = taken(pool, 1)
    assert not pool.drop(0, 4)
    assert pool.num_mapped == 4
    pool.release(blocks, after=after)
    assert pool.drop(0, 4) == (after is None)
    pool.settle(3)
    assert pool.num_mapped == (4 if after else 0)
    pool.audit()


def test_what_nobody_holds_goes_piece_by_piece(pool):
    blocks = taken(pool, 3)
    pool.publish(blocks[1], name(1))
    pool.release(blocks[1:2])
    assert pool.drop_unheld(0, 4) == 2
    pool.audit([[0, 2]])
    assert pool.drop_unheld(0, 4) == 2
    pool.release([0, 2])
    assert pool.drop_unheld(0, 4) == 0
    assert pool.num_mapped == pool.num_available == 0
    pool.audit()


def test_cached_blocks_lose_their_names_and_the_events_tell():
    log = EventLog()
    pool = BlockPool(4, 4, events=log, mapped=4)
    blocks = taken(pool, 2)
    pool.publish(blocks[0], name(1), Origin(None, [1, 2, 3, 4]))
    pool.release(blocks)
    log.drain()
    assert pool.drop(0, 2)
    assert log.drain() == [Removed([name(1)], "GPU")]
    assert pool.match([name(1)]) == []
    assert pool.evictions == 1
    pool.add(0, 2)
    assert taken(pool, 4) == [0, 1, 2, 3]


def test_the_cache_is_reset_between(pool):
    blocks = taken(pool, 4)
    for i, block in enumerate(blocks):
        pool.publish(block, name(i))
    pool.release(blocks)
    assert pool.drop(1, 1)
    pool.reset_cache()
    pool.audit()
    assert taken(pool, 3) == [0, 2, 3]


def test_the_lowest_goes_first_after_a_reset_too(pool):
    blocks = taken(pool, 4)
    for i, block in enumerate(blocks):
        pool.publish(block, name(i))
    for block in (3, 0, 2, 1):
        pool.release([block])
    pool.reset_cache()
    pool.add(4, 2)
    assert taken(pool, 6) == [0, 1, 2, 3, 4, 5]


def test_last_use_is_when_the_last_holder_left(pool):
    pool.moment = 1.0
    blocks = taken(pool, 2)
    assert pool.last_used(0, 4) is None
    assert pool.last_used(2, 2) == 0.0
    pool.moment = 2.0
    pool.release(blocks[:1])
    pool.release(blocks[1:], after=5)
    assert pool.last_used(0, 1) == 2.0
    pool.moment = 3.0
    pool.settle(5)
    assert pool.last_used(0, 4) == 3.0
    pool.moment = 4.0
    pool.add(4, 1)
    assert pool.last_used(0, 5) == 4.0


class TestMisuse:
    @pytest.mark.parametrize("mapped", [-1, 13])
    def test_no_such_number(self, mapped):
        with pytest.raises(ValueError, match="cannot exist"):
            BlockPool(12, 4, mapped=mapped)

    def test_a_pool_of_all_its_blocks(self):
        pool = BlockPool(12, 4)
        for change in (pool.add, pool.drop, pool.drop_unheld):
            with pytest.raises(ValueError, match="none come and go"):
                change(0, 4)

    def test_blocks_that_exist_are_not_added(self, pool):
        with pytest.raises(ValueError, match="some exist already"):
            pool.add(3, 2)
        pool.audit()

    def test_blocks_that_do_not_exist_are_not_dropped(self, pool):
        with pytest.raises(ValueError, match="some do not exist"):
            pool.drop(3, 2)
        pool.audit()

    @pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (8, 5)])
    def test_blocks_out_of_range(self, pool, first, count):
        with pytest.raises(ValueError, match="are not among 12"):
            pool.drop(first, count)

    def test_nobody_uses_what_does_not_exist(self, pool):
        with pytest.raises(ValueError, match="more often than it is held"):
            pool.release([4])
        with pytest.raises(ValueError, match="more often than it is held"):
            pool.release([4], after=1)
        with pytest.raises(ValueError, match="nothing in it to share"):
            pool.share([4])
        with pytest.raises(ValueError, match="not held"):
            pool.publish(4, name(1))
        with pytest.raises(ValueError, match="not held"):
            pool.withdraw(4)
        pool.audit()


class TestAudit:
    def test_a_holder_of_what_does_not_exist_is_named(self, pool):
        with pytest.raises(AssertionError, match="block 5 does not exist, but somebody has it"):
            pool.audit([[5]])

    def test_a_free_block_that_does_not_exist_is_named(self, pool):
        pool._free.put(6)
        with pytest.raises(AssertionError, match="block 6 does not exist"):
            pool.audit()

    def test_a_wrong_number_is_named(self, pool):
        pool.num_mapped = 5
        with pytest.raises(AssertionError, match="5 blocks are said to exist"):
            pool.audit()


class SegmentedPoolMachine(RuleBasedStateMachine):
    """An elastic pool against sets: those that exist, tables of holders, and a dictionary of names."""

    @initialize(blocks=st.integers(1, 10), data=st.data())
    def start(self, blocks, data):
        mapped = data.draw(st.integers(0, blocks))
        self.pool = BlockPool(blocks, 4, mapped=mapped)
        self.existing = set(range(mapped))
        self.tables: list[list[int]] = []
        self.leaving: list[tuple[int, list[int]]] = []
        self.names: dict[bytes, int] = {}
        self.step = 0

    def held(self) -> set[int]:
        return {block for table in self.tables + [blocks for _, blocks in self.leaving] for block in table}

    def span(self, data) -> range:
        first = data.draw(st.integers(0, self.pool.num_blocks - 1))
        return range(first, data.draw(st.integers(first + 1, self.pool.num_blocks)))

    def forget(self, blocks) -> None:
        self.names = {name: block for name, block in self.names.items() if block not in blocks}

    @rule(data=st.data())
    def add(self, data):
        span = self.span(data)
        if self.existing.isdisjoint(span):
            self.pool.add(span.start, len(span))
            self.existing.update(span)
        else:
            with pytest.raises(ValueError, match="exist already"):
                self.pool.add(span.start, len(span))

    @rule(data=st.data())
    def drop(self, data):
        span = self.span(data)
        if not self.existing.issuperset(span):
            with pytest.raises(ValueError, match="do not exist"):
                self.pool.drop(span.start, len(span))
            return
        dropped = self.pool.drop(span.start, len(span))
        assert dropped == self.held().isdisjoint(span)
        if dropped:
            self.existing.difference_update(span)
            self.forget(span)

    @rule(data=st.data())
    def drop_unheld(self, data):
        span = self.span(data)
        held = self.held().intersection(span)
        assert self.pool.drop_unheld(span.start, len(span)) == len(held)
        self.existing.difference_update(set(span) - held)
        self.forget(set(span) - held)

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        before = self.held()
        free = sorted(self.existing - before - set(self.names.values()))
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > len(self.existing - before))
        if blocks:
            assert len(set(blocks)) == count
            assert self.existing - before >= set(blocks)
            assert blocks[: len(free)] == free[:count]
            self.forget(blocks)
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), later=st.booleans())
    def release(self, data, later):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.step += later
        self.pool.release(table, after=self.step if later else None)
        if later:
            self.leaving.append((self.step, table))

    @rule(back=st.integers(0, 2))
    def settle(self, back):
        self.pool.settle(self.step - back)
        self.leaving = [(step, blocks) for step, blocks in self.leaving if step > self.step - back]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), number=st.integers(0, 20))
    def publish(self, data, number):
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        if self.pool.publish(block, name(number)):
            self.names[name(number)] = block

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def hit(self, data):
        blocks = self.pool.match([data.draw(st.sampled_from(sorted(self.names)))])
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
        available = self.existing - self.held()
        assert self.pool.num_mapped == len(self.existing)
        assert self.pool.num_available == len(available)
        for block in range(self.pool.num_blocks):
            assert self.pool.exists(block) == (block in self.existing)
            assert self.pool.is_available(block) == (block in available)
        assert {one: self.pool.match([one])[0] for one in self.names} == self.names
        assert len(self.pool.index) == len(self.names)


def test_random_moves():
    explore(SegmentedPoolMachine, 80)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_moves_in_depth():
    explore(SegmentedPoolMachine, 3000)
