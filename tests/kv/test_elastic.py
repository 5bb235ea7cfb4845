"""Which segments an elastic pool asks for and gives back."""

from itertools import pairwise

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
from xllm.core.segments import Grow, Grown, SegmentNews, SegmentOrder, Shrink, Shrunk
from xllm.kv.elastic import Elastic
from xllm.kv.pool import BlockPool

NO_MEMORY = "another process has the memory"


class Rig:
    """Segments of 4 blocks, and an executor that does at once what it is told."""

    def __init__(self, blocks: int = 40, mapped: int = 4, reserve: int = 4, limit: int | None = None):
        self.pool = BlockPool(blocks, 16, mapped=mapped)
        self.elastic = Elastic(self.pool, 4, reserve, limit, idle_s=10.0)
        self.memory = -(-blocks // 4)  # how many segments there is memory for
        self.mapped = set(range(-(-mapped // 4)))

    def answer(self, order: SegmentOrder) -> SegmentNews:
        if isinstance(order, Shrink):
            self.mapped.remove(order.segment)
            return Shrunk(order.segment)
        if len(self.mapped) >= self.memory:
            return Grown(order.segment, False, NO_MEMORY)
        self.mapped.add(order.segment)
        return Grown(order.segment)

    def run(self, now: float) -> list[SegmentOrder]:
        orders = self.elastic.orders(now)
        self.elastic.take([self.answer(order) for order in orders])
        return orders

    def taken(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)
        assert blocks is not None
        return blocks

    def until_idle(self, now: float) -> float:
        """Runs for as long as `wake_at` says that there is something to do; the time of the last orders."""
        for _ in range(1000):
            self.run(now)
            if (then := self.elastic.wake_at) is None or then > now + 100:
                return now
            now = max(now, then)
        raise AssertionError("there is always something to do")


class TestGrowing:
    def test_the_reserve_is_kept_ahead_of_demand(self):
        rig = Rig(reserve=6)
        assert rig.elastic.orders(0.0) == [Grow(1)]
        assert rig.elastic.busy
        assert rig.elastic.orders(0.1) == []
        rig.elastic.take([Grown(1)])
        assert not rig.elastic.busy
        assert rig.pool.num_mapped == 8
        assert rig.elastic.orders(0.2) == []
        rig.taken(7)
        assert rig.elastic.orders(0.3) == [Grow(2), Grow(3)]

    def test_while_requests_live_the_reserve_is_larger(self):
        rig = Rig()
        rig.elastic = Elastic(rig.pool, 4, 4, idle_s=10.0, reserve_in_use=12)
        assert rig.elastic.orders(0.0) == []
        rig.elastic.in_use = True
        assert rig.run(0.1) == [Grow(1), Grow(2)]
        rig.elastic.in_use = False
        assert rig.until_idle(60.0) < 160
        assert rig.pool.num_mapped == 8, "twice the reserve"

    def test_reusable_blocks_count_as_available(self):
        rig = Rig()
        blocks = rig.taken(4)
        for block in blocks:
            rig.pool.publish(block, block.to_bytes(16, "big"))
        rig.pool.release(blocks)
        assert rig.run(0.0) == []

    def test_who_waits_gets_more_than_the_reserve(self):
        rig = Rig()
        rig.elastic.want(10)
        assert rig.run(0.0) == [Grow(1), Grow(2), Grow(3)]
        assert rig.run(0.1) == []
        rig.taken(10)
        assert rig.run(0.2) == []  # what was wanted has come and is wanted no more

    def test_who_gives_up_waiting_gets_nothing(self):
        rig = Rig()
        rig.elastic.want(10)
        rig.elastic.want(0)
        assert rig.run(0.0) == []

    def test_the_last_segment_may_be_shorter(self):
        rig = Rig(blocks=10, reserve=9)
        assert rig.run(0.0) == [Grow(1), Grow(2)]
        assert rig.pool.num_mapped == 10
        assert not rig.elastic.can_grow
        rig.pool.audit()

    def test_not_beyond_the_limit(self):
        rig = Rig(limit=11)
        rig.elastic.want(30)
        assert rig.run(0.0) == [Grow(1)]
        assert not rig.elastic.can_grow
        assert rig.elastic.wake_at is None
        rig.elastic.set_limit(12)
        assert rig.elastic.can_grow
        assert rig.run(0.1) == [Grow(2)]
        rig.elastic.set_limit(None)
        assert len(rig.run(0.2)) == 6


class TestRefusals:
    def test_each_attempt_waits_twice_as_long_for_one_segment(self):
        rig = Rig(reserve=12)
        rig.memory = 1
        assert rig.run(0.0) == [Grow(1), Grow(2)]
        assert not rig.elastic.can_grow
        attempts, now = [], 0.0
        while now < 15:
            if orders := rig.run(now):
                assert orders == [Grow(1)]
                attempts.append(round(now, 2))
            now += 0.01
        waits = [round(b - a, 1) for a, b in pairwise(attempts)]
        assert attempts[0] == pytest.approx(0.1, abs=0.05)
        assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
        assert rig.elastic.stats.refused == 9
        assert rig.pool.num_mapped == 4

    def test_when_memory_comes_back_all_is_asked_for_again(self):
        rig = Rig(reserve=12)
        rig.memory = 1
        rig.run(0.0)
        rig.memory = 10
        assert rig.run(0.05) == []
        assert not rig.elastic.can_grow
        wake = rig.elastic.wake_at
        assert wake == pytest.approx(0.15)  # the refusal is known since 0.05
        assert rig.run(0.2) == [Grow(1)]
        assert rig.run(0.3) == [Grow(2)]
        rig.taken(12)
        assert rig.run(0.4) == [Grow(3), Grow(4), Grow(5)]

    def test_refusals_do_not_count_against_the_limit(self):
        rig = Rig(reserve=12, limit=12)
        rig.memory = 1
        rig.run(0.0)
        rig.run(1.0)
        rig.memory = 10
        assert [rig.run(now) for now in (2.0, 3.0, 4.0)] == [[Grow(1)], [Grow(2)], []]

    def test_late_refusals_of_one_attempt_do_not_lengthen_the_wait(self):
        rig = Rig(reserve=12)
        assert rig.elastic.orders(0.0) == [Grow(1), Grow(2)]
        rig.elastic.take([Grown(1, False, NO_MEMORY)])
        assert rig.elastic.orders(0.1) == []
        rig.elastic.take([Grown(2, False, NO_MEMORY)])
        assert rig.elastic.orders(0.15) == []
        assert rig.elastic.orders(0.21) == [Grow(1)]


class TestIdleSegments:
    def test_they_go_one_after_the_other_down_to_twice_the_reserve(self):
        rig = Rig(mapped=40)
        assert rig.run(0.0) == []
        assert rig.run(9.9) == []
        assert rig.elastic.orders(10.0) == [Shrink(9)]
        assert rig.elastic.orders(20.0) == []
        rig.elastic.take([Shrunk(9)])
        assert [rig.run(20.0 + i) for i in range(9)] == [[Shrink(i)] for i in range(8, 1, -1)] + [[], []]
        assert rig.pool.num_available == 8
        assert rig.elastic.stats.shrunk == 8

    def test_what_was_used_lately_stays_even_where_it_was_only_for_a_moment(self):
        rig = Rig(mapped=20, reserve=0)
        rig.run(0.0)
        blocks = rig.taken(20)
        rig.pool.release([block for block in blocks if block >= 8])
        rig.run(5.0)
        rig.pool.release(blocks[:8])
        assert rig.run(10.0) == [Shrink(4)]
        assert rig.run(10.0) == [Shrink(3)]
        assert rig.run(10.0) == [Shrink(2)]
        assert rig.run(14.7) == []
        assert rig.run(15.0) == [Shrink(1)]
        assert rig.run(50.0) == []  # the last stays

    def test_not_all_are_looked_at_in_one_step(self, monkeypatch):
        rig = Rig(blocks=2000, mapped=2000, reserve=0)
        looks: list[int] = []
        last_used = rig.pool.last_used

        def look(first: int, count: int) -> float | None:
            looks.append(first)
            return last_used(first, count)

        monkeypatch.setattr(rig.pool, "last_used", look)
        blocks = rig.taken(2000)
        rig.run(0.0)
        for _ in range(20):
            looks.clear()
            rig.run(20.0)
            assert len(looks) <= 64
        rig.pool.release(blocks)
        rig.until_idle(60.0)
        assert rig.pool.num_mapped == 4

    def test_held_ones_stay_and_others_below_them_go(self):
        rig = Rig(mapped=16, reserve=0)
        rig.run(0.0)
        blocks = rig.taken(16)
        rig.pool.release(blocks[:12])
        assert [rig.run(20.0)[:1] for _ in range(4)] == [[Shrink(2)], [Shrink(1)], [], []]
        assert rig.pool.num_mapped == 8
        assert rig.mapped == {0, 3}  # the first stays for good
        rig.pool.audit([blocks[12:]])

    def test_steps_in_flight_hold(self):
        rig = Rig(mapped=8, reserve=0)
        rig.run(0.0)
        blocks = rig.taken(8)
        rig.pool.release(blocks, after=7)
        assert rig.run(30.0) == []
        rig.pool.settle(7)
        assert rig.run(30.0) == []
        assert rig.run(40.0) == [Shrink(1)]

    def test_cached_prefixes_go_with_them(self):
        rig = Rig(mapped=8, reserve=0)
        rig.run(0.0)
        blocks = rig.taken(8)
        for block in blocks:
            rig.pool.publish(block, block.to_bytes(16, "big"))
        rig.pool.release(blocks)
        assert rig.run(10.0) == [Shrink(1)]
        assert rig.pool.num_available == rig.pool.index.num_shelved == 4

    def test_demand_that_comes_and_goes_moves_nothing(self):
        rig = Rig()
        for i in range(200):
            blocks = rig.taken(min(20, rig.pool.num_available))
            rig.run(i * 1.0)
            rig.pool.release(blocks)
            rig.run(i + 0.5)
        stats = rig.elastic.stats
        assert stats.shrunk == 0
        assert stats.grown == stats.mapped - 1 == 5

    def test_who_waits_keeps_them(self):
        rig = Rig(mapped=40, reserve=0)
        rig.elastic.want(50)
        for now in range(0, 50, 5):
            assert rig.run(float(now)) == []

    def test_what_somebody_waited_for_is_left_for_him_to_find(self):
        rig = Rig(mapped=40, reserve=0)
        rig.run(0.0)
        rig.elastic.want(40)
        assert rig.run(15.0) == []
        assert rig.run(24.9) == []
        assert rig.run(25.0) == [Shrink(9)]

    def test_it_says_when_to_ask_again(self):
        rig = Rig(mapped=40)
        assert rig.elastic.wake_at == 0.0
        rig.run(0.0)
        assert rig.elastic.wake_at == 10.0
        assert rig.until_idle(0.0) == 10.0
        assert rig.elastic.wake_at is None


class TestLimit:
    def test_idle_segments_go_at_once(self):
        rig = Rig(mapped=40)
        rig.run(0.0)
        blocks = rig.taken(5)
        rig.elastic.set_limit(20)
        assert rig.elastic.wake_at == 0.0
        assert rig.run(0.0) == [Shrink(i) for i in range(9, 4, -1)]
        assert rig.pool.num_mapped == 20
        rig.pool.audit([blocks])

    def test_held_ones_go_as_they_are_released(self):
        rig = Rig(mapped=16)
        blocks = rig.taken(16)
        rig.elastic.set_limit(8)
        assert rig.run(0.0) == []
        rig.pool.release([15, 9, 1])
        assert rig.run(1.0) == []
        assert rig.pool.num_available == 1  # nobody gets those again that are to go
        assert rig.pool.num_mapped == 14
        rig.pool.release([block for block in blocks if block not in (15, 9, 1)])
        assert rig.run(2.0) == [Shrink(3), Shrink(2)]
        assert rig.mapped == {0, 1}
        assert rig.pool.num_available == 8
        rig.pool.audit()

    def test_what_leaves_stays_when_the_limit_is_raised(self):
        rig = Rig(mapped=16)
        blocks = rig.taken(16)
        rig.elastic.set_limit(8)
        rig.pool.release([15, 9])
        rig.run(0.0)
        assert not rig.elastic.can_grow
        rig.elastic.set_limit(12)
        rig.run(1.0)
        assert rig.pool.num_mapped == 15
        rig.pool.audit([[block for block in blocks if block not in (15, 9)]])
        rig.pool.release([block for block in blocks if block not in (15, 9)])
        assert rig.run(2.0) == [Shrink(3)]

    def test_one_segment_always_stays(self):
        rig = Rig(mapped=16)
        rig.elastic.set_limit(0)
        assert len(rig.run(0.0)) == 3
        assert rig.mapped == {0}
        assert rig.run(1.0) == []
        assert not rig.elastic.can_grow

    def test_nothing_grows_while_others_leave(self):
        rig = Rig(blocks=10, mapped=8)
        rig.taken(8)
        rig.elastic.set_limit(6)
        rig.elastic.want(2)
        assert rig.run(0.0) == []  # the short segment would fit if the second one were gone
        rig.pool.release([4, 5, 6, 7])
        assert rig.run(1.0) == [Shrink(1), Grow(2)]

    def test_many_segments_leave_a_few_at_a_time(self):
        rig = Rig(blocks=800, mapped=800, reserve=0)
        blocks = rig.taken(800)
        rig.elastic.set_limit(4)
        rig.run(0.0)
        rig.pool.release(blocks)
        assert [len(rig.run(1.0)) for _ in range(5)] == [64, 64, 64, 7, 0]


class TestMisuse:
    def test_a_pool_of_all_its_blocks(self):
        with pytest.raises(ValueError, match="cannot grow or shrink"):
            Elastic(BlockPool(8, 4), 4, 0)

    @pytest.mark.parametrize("mapped", [0, 6])
    def test_half_a_segment(self, mapped):
        with pytest.raises(ValueError, match="not whole segments"):
            Elastic(BlockPool(16, 4, mapped=mapped), 4, 0)

    @pytest.mark.parametrize(("size", "reserve", "idle"), [(0, 0, 1.0), (4, -1, 1.0), (4, 0, -1.0)])
    def test_figures(self, size, reserve, idle):
        with pytest.raises(ValueError, match="no pool grows"):
            Elastic(BlockPool(16, 4, mapped=4), size, reserve, None, idle)

    def test_a_limit_below_nothing(self):
        with pytest.raises(ValueError, match="no limit"):
            Rig().elastic.set_limit(-1)

    @pytest.mark.parametrize("news", [Grown(0), Grown(1), Shrunk(0), Shrunk(1)])
    def test_news_of_what_was_not_ordered(self, news):
        rig = Rig()
        with pytest.raises(ValueError, match="comes while the segment is"):
            rig.elastic.take([news])


class ElasticMachine(RuleBasedStateMachine):
    """Requests, a device that may have no memory, news that take their time, a limit that moves: against a set of
    segments that really have memory."""

    @initialize(blocks=st.integers(1, 30), size=st.integers(1, 5), reserve=st.integers(0, 6), data=st.data())
    def start(self, blocks, size, reserve, data):
        segments = -(-blocks // size)
        first = data.draw(st.integers(1, segments))
        self.size, self.reserve = size, reserve
        self.pool = BlockPool(blocks, 4, mapped=min(first * size, blocks))
        self.elastic = Elastic(self.pool, size, reserve, idle_s=2.0)
        self.mapped = set(range(first))
        self.memory = segments  # how many segments the device can have
        self.limit = blocks
        self.tables: list[list[int]] = []
        self.leaving: list[tuple[int, list[int]]] = []
        self.queue: list[SegmentOrder] = []
        self.now, self.step, self.next_name = 100.0, 0, 0

    def held(self) -> set[int]:
        return {block for table in self.tables + [blocks for _, blocks in self.leaving] for block in table}

    def blocks_of(self, segment: int) -> set[int]:
        return set(range(segment * self.size, min((segment + 1) * self.size, self.pool.num_blocks)))

    def ordered(self) -> list[SegmentOrder]:
        orders = self.elastic.orders(self.now)
        for order in orders:
            assert order.segment not in {other.segment for other in self.queue}
            if isinstance(order, Grow):
                assert order.segment not in self.mapped
            else:
                assert order.segment in self.mapped
                assert self.held().isdisjoint(self.blocks_of(order.segment))
            self.queue.append(order)
        if any(isinstance(order, Grow) for order in orders):
            later = self.mapped | {one.segment for one in self.queue if isinstance(one, Grow)}
            later -= {one.segment for one in self.queue if isinstance(one, Shrink)}
            assert sum(len(self.blocks_of(segment)) for segment in later) <= self.limit
        return orders

    @rule(later=st.sampled_from([0.0, 0.05, 1.0, 3.0]))
    def orders(self, later):
        self.now += later
        self.ordered()

    @precondition(lambda self: self.queue)
    @rule(count=st.integers(1, 4))
    def news(self, count):
        done, self.queue = self.queue[:count], self.queue[count:]
        news: list[SegmentNews] = []
        for order in done:
            if isinstance(order, Shrink):
                self.mapped.remove(order.segment)
                news.append(Shrunk(order.segment))
            elif len(self.mapped) >= self.memory:
                news.append(Grown(order.segment, False, NO_MEMORY))
            else:
                self.mapped.add(order.segment)
                news.append(Grown(order.segment))
        self.elastic.take(news)

    @rule(memory=st.integers(0, 10))
    def others_take_memory(self, memory):
        self.memory = memory

    @rule(data=st.data())
    def set_limit(self, data):
        self.limit = data.draw(st.integers(0, self.pool.num_blocks))
        self.elastic.set_limit(self.limit)

    @rule(blocks=st.integers(0, 30))
    def want(self, blocks):
        self.elastic.want(blocks)

    @rule(count=st.integers(1, 8))
    def allocate(self, count):
        before = self.held()
        blocks = self.pool.allocate(count)
        if blocks:
            assert before.isdisjoint(blocks)
            assert len(set(blocks)) == count
            assert all(block // self.size in self.mapped for block in blocks)
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), later=st.booleans())
    def release(self, data, later):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.step += later
        self.pool.release(table, after=self.step if later else None)
        if later:
            self.leaving.append((self.step, table))

    @rule()
    def settle(self):
        self.pool.settle(self.step)
        self.leaving.clear()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data):
        self.next_name += 1
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        self.pool.publish(block, self.next_name.to_bytes(16, "big"))

    @precondition(lambda self: self.next_name)
    @rule(data=st.data())
    def hit(self, data):
        blocks = self.pool.match([data.draw(st.integers(1, self.next_name)).to_bytes(16, "big")])
        assert all(block // self.size in self.mapped for block in blocks)
        if blocks:
            self.pool.share(blocks)
            self.tables.append(blocks)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "pool"):
            return
        self.pool.audit(self.tables)
        for block in range(self.pool.num_blocks):
            assert not self.pool.exists(block) or block // self.size in self.mapped
        assert self.elastic.busy == bool(self.queue)
        stats = self.elastic.stats
        assert stats.mapped == len(self.mapped) <= stats.most
        assert self.pool.num_mapped > 0

    def run_on(self) -> int:
        """A minute in which everything goes well. Returns the most blocks that existed meanwhile."""
        most = 0
        for _ in range(60):
            self.orders(1.0)
            while self.queue:
                self.news(4)
            most = max(most, self.pool.num_mapped)
        return most

    def teardown(self):
        """All end and memory is there again: what is left is what is wanted, and nothing moves any more."""
        if not hasattr(self, "pool"):
            return
        for table in self.tables:
            self.pool.release(table)
        self.tables.clear()
        self.settle()
        self.memory = 100
        limit, self.limit = self.limit, self.pool.num_blocks
        self.elastic.set_limit(None)
        self.elastic.want(self.pool.num_blocks)
        assert self.run_on() == self.pool.num_blocks
        self.limit = limit
        self.elastic.set_limit(limit)
        self.elastic.want(0)
        self.run_on()
        assert self.ordered() == []
        self.books_balance()
        assert (
            self.pool.num_available
            == self.pool.num_mapped
            == sum(len(self.blocks_of(segment)) for segment in self.mapped)
        )
        if len(self.mapped) > 1:
            assert self.pool.num_mapped <= self.limit
            assert self.pool.num_mapped - self.size < 2 * self.reserve
        if self.pool.num_mapped < self.reserve:
            assert not self.elastic.can_grow


def test_random_moves():
    explore(ElasticMachine, 80)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_moves_in_depth():
    explore(ElasticMachine, 2000)
