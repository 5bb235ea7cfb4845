from collections import deque
from collections.abc import Sequence

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
from xllm.core.transfer import Load, Loaded, News, Order, Save, Saved, Source, Written
from xllm.kv.events import HOST, EventLog, Origin, Removed, Stored
from xllm.kv.tiers.cost import Cost
from xllm.kv.tiers.offload import Arrived, Offload, Released
from xllm.kv.tiers.slots import SlotIndex

A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def tiers(host: int, disk: int = 0, events: EventLog | None = None) -> Offload:
    return Offload(SlotIndex(host, HOST, events), SlotIndex(disk, "disk", events) if disk else None, Cost())


def save(offload: Offload, *names: bytes) -> None:
    """Save, and let everything end well."""
    for i, one in enumerate(names):
        assert offload.save(one, i, Origin(None, [i]))
    finish(offload)


def finish(offload: Offload) -> None:
    for order in offload.orders():
        assert isinstance(order, Save)
        offload.take([Saved(order.ticket, True)])
        if order.disk_slot is not None:
            offload.take([Written(order.ticket, True)])


def only_on_disk(offload: Offload, *names: bytes) -> None:
    save(offload, *names)
    offload.host.clear()


@pytest.fixture
def offload() -> Offload:
    return tiers(4, 8)


class TestSaving:
    def test_a_block_goes_to_both_tiers(self, offload):
        assert offload.save(A, 7)
        (order,) = offload.orders()
        assert order == Save(1, A, 7, 0, 0)
        assert offload.orders() == []
        assert offload.blocks_held() == [7]
        assert offload.find([A]) == 0
        assert offload.take([Saved(1, True)]) == [Released(7)]
        assert offload.find([A]) == 1
        assert offload.blocks_held() == []
        assert offload.busy
        offload.audit()
        assert offload.take([Written(1, True)]) == []
        assert not offload.busy
        assert (offload.host.find(A), offload.disk.find(A)) == (0, 0)
        offload.audit()

    def test_a_block_is_saved_once(self, offload):
        assert offload.save(A, 7)
        assert not offload.save(A, 8)
        finish(offload)
        assert not offload.save(A, 9)
        assert offload.orders() == []

    def test_what_the_disk_has_goes_to_the_host_alone(self, offload):
        only_on_disk(offload, A)
        assert offload.save(A, 7)
        assert offload.orders() == [Save(2, A, 7, 0, None)]
        assert offload.take([Saved(2, True)]) == [Released(7)]
        assert not offload.busy

    def test_a_host_tier_alone_will_do(self):
        offload = tiers(4)
        save(offload, A, B)
        assert offload.find([A, B, C]) == 2
        assert len(offload.stats) == 1
        assert offload.distrusted() == []
        with pytest.raises(ValueError, match="no disk tier"):
            offload.recover([])

    def test_without_a_host_slot_nothing_is_saved(self):
        offload = tiers(1, 8)
        assert offload.save(A, 0)
        assert not offload.save(B, 1)
        offload.take([Saved(1, True)])
        assert not offload.save(B, 1)  # the slot is still being written to disk
        offload.take([Written(1, True)])
        assert offload.save(B, 1)
        assert offload.stats[0].skipped == 2

    def test_without_a_disk_slot_the_host_has_it(self):
        offload = tiers(4, 1)
        assert offload.save(A, 0)
        assert offload.save(B, 1)
        assert offload.orders() == [Save(1, A, 0, 0, 0), Save(2, B, 1, 1, None)]
        assert offload.stats[1].skipped == 1

    def test_a_failed_copy_is_as_if_it_had_not_been_asked_for(self, offload):
        offload.save(A, 7)
        assert offload.take([Saved(1, False), Written(1, False)]) == [Released(7)]
        assert offload.find([A]) == 0
        assert [tier.used for tier in offload.stats] == [0, 0]
        assert [tier.failures for tier in offload.stats] == [1, 1]
        offload.audit()
        assert offload.save(A, 7)

    def test_a_failed_write_leaves_the_host_s_block(self, offload):
        offload.save(A, 7)
        offload.take([Saved(1, True), Written(1, False)])
        assert offload.host.find(A) == 0
        assert offload.disk.find(A) is None
        assert offload.distrusted() == [0]

    def test_news_that_nobody_waits_for_is_an_error(self, offload):
        for news in (Saved(1, True), Written(1, True), Loaded(1, 0, [], 0.0)):
            with pytest.raises(KeyError):
                offload.take([news])


class TestLoading:
    def test_blocks_come_from_the_host_first(self, offload):
        save(offload, A, B, C)
        offload.host.forget(B)
        assert offload.find([A, B, C, D]) == 3
        assert offload.on_disk([A, B, C]) == 1
        assert offload.load([A, B, C], [10, 11, 12]) == (4, 3)
        (order,) = offload.orders()
        assert order == Load(4, [Source(A, 0, None), Source(B, 1, 1), Source(C, 2, None)], [10, 11, 12])
        offload.audit()
        assert offload.take([Loaded(4, 3, [], 0.5)]) == [Arrived(4, 3)]
        assert offload.host.find(B) == 1
        assert [tier.hits for tier in offload.stats] == [2, 1]
        assert not offload.busy
        offload.audit()

    def test_a_load_ends_where_a_name_is_unknown(self, offload):
        save(offload, A, C)
        assert offload.load([A, B, C], [1, 2, 3]) == (3, 1)
        assert offload.load([B], [2]) == (0, 0)
        assert len(offload.orders()) == 1
        offload.take([Loaded(3, 1, [], 0.0)])
        offload.audit()

    def test_making_room_for_one_block_does_not_evict_another_of_the_load(self):
        offload = tiers(2, 8)
        only_on_disk(offload, A)
        save(offload, B, C)  # B is the oldest in a host tier that is full
        assert offload.load([A, B], [1, 2]) == (4, 2)
        (order,) = offload.orders()
        assert isinstance(order, Load)
        assert [source.disk_slot for source in order.sources] == [0, None]
        offload.take([Loaded(4, 2, [], 0.0)])
        assert offload.host.find(C) is None
        offload.audit()

    def test_a_load_ends_where_no_host_slot_can_be_had(self):
        offload = tiers(2, 8)
        only_on_disk(offload, A, B)
        save(offload, C, D)
        assert offload.load([C, A, B, D], [1, 2, 3, 4]) == (
            5,
            1,
        )  # C and D are pinned, and there is no third slot
        offload.audit()
        assert offload.load([A], [2]) == (6, 1)  # D is not any more
        offload.audit()

    def test_nothing_is_loaded_where_nothing_fits(self):
        offload = tiers(1, 8)
        only_on_disk(offload, A)
        offload.save(B, 1)
        assert offload.load([A], [2]) == (0, 0)
        offload.audit()

    def test_blocks_and_names_must_be_as_many(self, offload):
        with pytest.raises(ValueError, match="1 blocks are to be loaded into 2"):
            offload.load([A], [1, 2])

    def test_what_is_loaded_is_not_evicted_meanwhile(self):
        offload = tiers(1)
        save(offload, A)
        offload.load([A], [1])
        assert not offload.save(B, 2)
        offload.take([Loaded(2, 1, [], 0.0)])
        assert offload.save(B, 2)

    def test_two_loads_of_a_block_on_disk_read_it_once(self, offload):
        only_on_disk(offload, A)
        assert offload.load([A], [1]) == (2, 1)
        assert offload.find([A]) == 1
        assert offload.load([A], [2]) == (3, 1)
        one, other = offload.orders()
        assert one == Load(2, [Source(A, 0, 0)], [1])
        assert other == Load(3, [Source(A, 0, None)], [2])
        offload.audit()
        assert offload.take([Loaded(2, 1, [], 9.0), Loaded(3, 1, [], 9.0)]) == [Arrived(2, 1), Arrived(3, 1)]
        offload.cost.computed(1, 1.0)
        assert offload.cost.worthwhile(1, 0, 1)  # what waited for a disk says nothing of the host
        assert not offload.cost.worthwhile(0, 1, 1)
        offload.audit()

    def test_the_second_fails_with_the_first(self, offload):
        only_on_disk(offload, A)
        offload.load([A], [1])
        offload.load([A], [2])
        news = [Loaded(2, 0, [0], 0.0), Loaded(3, 0, [0], 0.0)]
        assert offload.take(news) == [Arrived(2, 0), Arrived(3, 0)]
        assert [tier.failures for tier in offload.stats] == [0, 1]
        assert [tier.used for tier in offload.stats] == [0, 0]
        offload.audit()

    def test_the_head_of_what_was_loaded_is_the_last_to_go(self):
        offload = tiers(3, 3)
        save(offload, A, B, C)
        offload.load([A, B, C], [1, 2, 3])
        offload.take([Loaded(4, 3, [], 0.0)])
        offload.save(D, 4)
        assert [offload.host.find(one) for one in (A, B, C)] == [0, 1, None]
        assert offload.disk is not None
        assert [offload.disk.find(one) for one in (A, B, C)] == [0, 1, None]

    def test_a_touched_sequence_goes_tail_first(self):
        offload = tiers(3, 3)
        save(offload, A, B, C)
        offload.touch([A, B])
        for number, gone in enumerate((C, B, A)):
            assert offload.find([gone]) == 1
            save(offload, name(number))
            assert offload.find([gone]) == 0

    def test_costs_are_learnt_from_whole_loads(self, offload):
        save(offload, A, B)
        offload.cost.computed(1000, 1.0)
        offload.load([A, B], [1, 2])
        offload.take([Loaded(3, 1, [], 99.0)])
        assert offload.worthwhile(2, 16)
        offload.load([A, B], [1, 2])
        offload.take([Loaded(4, 2, [], 1.0)])
        assert not offload.worthwhile(2, 16)
        assert offload.worthwhile(2, 16, disk_blocks=2)


class TestDamage:
    def test_a_damaged_host_block_is_forgotten_there(self, offload):
        save(offload, A, B, C)
        offload.load([A, B, C], [1, 2, 3])
        assert offload.take([Loaded(4, 1, [1], 0.0)]) == [Arrived(4, 1)]
        assert offload.host.find(B) is None
        assert offload.disk.find(B) == 1
        assert offload.find([A, B, C]) == 3
        assert [tier.failures for tier in offload.stats] == [1, 0]
        offload.audit()

    def test_a_damaged_disk_block_is_forgotten_there(self, offload):
        only_on_disk(offload, A, B, C)
        offload.load([A, B, C], [1, 2, 3])
        assert offload.take([Loaded(4, 1, [1], 0.0)]) == [Arrived(4, 1)]
        assert [offload.host.find(one) is None for one in (A, B, C)] == [False, True, True]
        assert [offload.disk.find(one) is None for one in (A, B, C)] == [False, True, False]
        assert offload.distrusted() == [1]
        assert [tier.failures for tier in offload.stats] == [0, 1]
        offload.audit()

    def test_of_what_was_not_tried_nothing_is_forgotten(self, offload):
        save(offload, A)
        only_on_disk(offload, B)
        offload.load([B], [2])
        offload.take([Loaded(3, 0, [], 0.0)])
        assert offload.find([B]) == 1
        assert [tier.failures for tier in offload.stats] == [0, 0]
        offload.audit()

    def test_what_is_written_from_a_damaged_slot_is_not_believed(self, offload):
        offload.save(A, 7)
        offload.take([Saved(1, True)])
        offload.load([A], [1])
        offload.take([Loaded(2, 0, [0], 0.0)])
        assert offload.take([Written(1, True)]) == []
        assert offload.find([A]) == 0
        assert offload.distrusted() == [0]
        assert [tier.used for tier in offload.stats] == [0, 0]
        offload.audit()

    def test_bad_news_of_an_old_slot_does_not_touch_a_new_one(self, offload):
        save(offload, A)
        offload.load([A], [1])
        offload.forget([A])
        assert offload.save(A, 5)
        offload.take([Saved(3, True), Loaded(2, 0, [0], 0.0)])
        assert offload.find([A]) == 1
        offload.audit()


class TestForgetting:
    def test_both_tiers_forget(self, offload):
        save(offload, A, B)
        offload.forget([A, C])
        assert (offload.find([A]), offload.find([B])) == (0, 1)
        assert offload.distrusted() == [0]

    @pytest.mark.parametrize("taken", [False, True])
    def test_a_save_under_way_ends_forgotten(self, offload, taken):
        offload.save(A, 7)
        if taken:
            offload.orders()
        offload.forget([A])
        assert offload.blocks_held() == [7]
        offload.audit()
        assert offload.take([Saved(1, True), Written(1, True)]) == [Released(7)]
        assert offload.find([A]) == 0
        assert [tier.used for tier in offload.stats] == [0, 0]
        assert offload.distrusted() == [0]
        offload.audit()

    def test_a_block_computed_again_is_saved_beside_the_void_one(self, offload):
        offload.save(A, 7)
        offload.forget([A])
        assert offload.save(A, 8)
        offload.take([Saved(2, True), Written(2, True)])
        assert offload.find([A]) == 1
        offload.take([Saved(1, False), Written(1, False)])
        assert offload.find([A]) == 1
        offload.audit()

    def test_a_load_under_way_ends_before_what_was_forgotten(self, offload):
        save(offload, A, B, C)
        offload.load([A, B, C], [1, 2, 3])
        offload.forget([B])
        assert offload.take([Loaded(4, 3, [], 0.0)]) == [Arrived(4, 1)]
        assert offload.host.find(C) is not None
        offload.audit()

    def test_clear_voids_what_is_under_way(self, offload):
        save(offload, A)
        only_on_disk(offload, B)
        offload.save(C, 3)
        offload.load([B], [1])
        offload.clear()
        news = [Saved(3, True), Loaded(4, 1, [], 0.0), Written(3, True)]
        assert offload.take(news) == [Released(3), Arrived(4, 0)]
        assert offload.find([A]) == offload.find([B]) == offload.find([C]) == 0
        assert [tier.used for tier in offload.stats] == [0, 0]
        assert sorted(offload.distrusted()) == [0, 1, 2]
        offload.audit()


def test_recovered_blocks_are_found_once(offload):
    assert offload.recover([(3, A), (5, B), (6, A), (8, C), (-1, D)]) == 2
    assert offload.find([A, B]) == 2
    assert offload.find([C]) == offload.find([D]) == 0
    assert offload.distrusted() == [6]
    assert offload.load([A], [1]) == (1, 1)
    assert offload.orders() == [Load(1, [Source(A, 0, 3)], [1])]
    offload.audit()


def test_events_tell_each_tier():
    log = EventLog()
    offload = tiers(2, 2, log)
    offload.save(A, 1, Origin(None, [1]))
    offload.take([Saved(1, True)])
    assert log.drain() == [Stored([A], None, [1], "", HOST)]
    offload.take([Written(1, True)])
    assert log.drain() == [Stored([A], None, [1], "", "disk")]
    offload.host.clear()
    assert log.drain() == [Removed([A], HOST)]
    offload.load([A], [1], [Origin(None, [1])])
    offload.take([Loaded(2, 1, [], 0.0)])
    assert log.drain() == [Stored([A], None, [1], "", HOST)]
    offload.clear()
    assert log.drain() == [Removed([A], HOST), Removed([A], "disk")]


class Mover:
    """Moves blocks that are plain objects, in the order of the contract; whoever drives it says what fails."""

    def __init__(self, host: int, disk: int):
        self.device: dict[int, object] = {}
        self.host: list[object] = [None] * host
        self.disk: list[tuple[bytes, object] | None] = [None] * disk
        self.copies: deque[Order] = deque()
        self.writes: deque[Save] = deque()
        self.news: list[News] = []

    def copy(self, fails: Sequence[bool]) -> None:
        """Carry out the oldest order; `fails` are drawn upon one by one."""
        order = self.copies.popleft()
        if isinstance(order, Save):
            self.host[order.host_slot] = None if fails[0] else self.device[order.block]
            self.news.append(Saved(order.ticket, not fails[0]))
            if order.disk_slot is not None:
                self.writes.append(order)
            return
        bad = [i for i, source in enumerate(order.sources) if not self.fetch(source, fails[i % len(fails)])]
        count = 0 if fails[-1] else min([len(order.sources), *bad])  # the last one is the device's failure
        for source, block in zip(order.sources[:count], order.blocks, strict=False):
            self.device[block] = self.host[source.host_slot]
        self.news.append(Loaded(order.ticket, count, bad, 0.01))

    def fetch(self, source: Source, fail: bool) -> bool:
        if source.disk_slot is not None:
            record = self.disk[source.disk_slot]
            self.host[source.host_slot] = None
            if fail or record is None or record[0] != source.name:
                return False
            self.host[source.host_slot] = record[1]
        return self.holds(source.host_slot, source.name)

    def write(self, fail: bool) -> None:
        order = self.writes.popleft()
        assert order.disk_slot is not None
        good = not fail and self.holds(order.host_slot, order.name)
        if good:
            self.disk[order.disk_slot] = (order.name, self.host[order.host_slot])
        self.news.append(Written(order.ticket, good))

    def holds(self, slot: int, name: bytes) -> bool:
        content = self.host[slot]
        return isinstance(content, tuple) and content[0] == name


chosen = st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True)
faults = st.just([False] * 4) | st.lists(st.booleans(), min_size=4, max_size=4)


class OffloadMachine(RuleBasedStateMachine):
    """Blocks whose content is (name, age of trust): forgetting a name ends its age. What is found, or arrives, must be
    of the name asked for and of its present age, whatever failed on the way."""

    @initialize(host=st.integers(1, 6), disk=st.integers(0, 8))
    def start(self, host, disk):
        self.offload = tiers(host, disk)
        self.mover = Mover(host, disk)
        self.age = dict.fromkeys(map(name, range(8)), 0)
        self.next_block = 0
        self.saving: list[int] = []
        self.loading: dict[int, Load] = {}
        self.known: set[bytes] = set()  # saved well, neither forgotten nor found damaged since
        self.save_of: dict[int, tuple[Save, int]] = {}  # by ticket, with the age of its content

    def new_blocks(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    @rule(numbers=chosen)
    def save(self, numbers):
        for one in map(name, numbers):
            (block,) = self.new_blocks(1)
            self.mover.device[block] = (one, self.age[one])
            there = self.offload.host.slot_of(one)
            if self.offload.save(one, block):
                assert there is None
                self.saving.append(block)

    @rule(numbers=chosen)
    def load(self, numbers):
        names = [name(number) for number in numbers]
        found = self.offload.find(names)
        blocks = self.new_blocks(len(names))
        ticket, covered = self.offload.load(names, blocks)
        assert 0 <= covered <= found
        if all(self.offload.host.find(one) is not None for one in names[:found]):
            assert covered == found
        assert (ticket == 0) == (covered == 0)
        if covered:
            assert ticket not in self.loading
            self.loading[ticket] = Load(ticket, [Source(one, 0, None) for one in names[:covered]], blocks)

    def hand_over(self):
        self.invalidate()
        for order in self.offload.orders():
            self.mover.copies.append(order)
            if isinstance(order, Save):
                content = self.mover.device[order.block]
                assert isinstance(content, tuple)
                self.save_of[order.ticket] = (order, content[1])

    def invalidate(self):
        for slot in self.offload.distrusted():
            self.mover.disk[slot] = None

    @precondition(lambda self: self.offload.busy)
    @rule(copies=st.integers(0, 4), writes=st.integers(0, 4), fails=faults, news=st.integers(0, 8))
    def work(self, copies, writes, fails, news):
        self.hand_over()
        for _ in range(min(copies, len(self.mover.copies))):
            self.mover.copy(fails)
            fails = fails[1:] + fails[:1]
        for _ in range(min(writes, len(self.mover.writes))):
            self.mover.write(fails[0])
            fails = fails[1:] + fails[:1]
        self.deliver(news)

    def deliver(self, count):
        news, self.mover.news = self.mover.news[:count], self.mover.news[count:]
        for one in news:
            self.learn(one)
            for done in self.offload.take([one]):
                if isinstance(done, Released):
                    self.saving.remove(done.block)
                else:
                    self.arrive(done)

    def learn(self, news):
        if isinstance(news, Saved):
            order, age = self.save_of.pop(news.ticket)
            if news.host and age == self.age[order.name]:
                self.known.add(order.name)
        elif isinstance(news, Loaded):
            sources = self.loading[news.ticket].sources
            self.known -= {source.name for source in sources[news.count :]}

    def arrive(self, done):
        load = self.loading.pop(done.ticket)
        for source, block in zip(load.sources[: done.count], load.blocks, strict=False):
            assert self.mover.device[block] == (source.name, self.age[source.name])

    @rule(slot=st.integers(0, 13))
    def damage(self, slot):
        if slot < len(self.mover.host):
            self.mover.host[slot] = None
            self.known.clear()
        elif slot - 6 in range(len(self.mover.disk)):
            self.mover.disk[slot - 6] = None
            self.known.clear()

    @rule(numbers=chosen)
    def forget(self, numbers):
        names = {name(number) for number in numbers}
        self.offload.forget(names)
        for one in names:
            self.age[one] += 1
        self.known -= names

    @rule(seldom=st.integers(0, 3))
    def clear(self, seldom):
        if seldom:
            return
        self.offload.clear()
        for one in self.age:
            self.age[one] += 1
        self.known.clear()

    @rule(numbers=chosen)
    def touch(self, numbers):
        self.offload.touch([name(number) for number in numbers])

    @rule()
    def come_to_rest(self):
        self.hand_over()
        while self.mover.copies:
            self.mover.copy([False])
        while self.mover.writes:
            self.mover.write(False)
        self.deliver(len(self.mover.news))
        self.invalidate()
        assert not self.offload.busy
        assert not self.saving
        assert not self.loading
        self.offload.audit()  # knows of no order: nothing is filling or pinned

    @precondition(lambda self: self.mover.disk)
    @rule(seldom=st.integers(0, 3))
    def restart(self, seldom):
        """What an engine leaves on disk is what it would have found there, but for what was damaged."""
        if seldom:
            return
        self.come_to_rest()
        left = {name: slot for slot, record in enumerate(self.mover.disk) if record for name in record[:1]}
        assert self.offload.disk is not None
        assert all(self.offload.disk.find(one) == slot for one, slot in left.items())
        self.offload = tiers(len(self.mover.host), len(self.mover.disk))
        self.mover.host = [None] * len(self.mover.host)
        assert self.offload.recover((slot, one) for one, slot in left.items()) == len(left)
        self.known = set(left)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "offload"):
            return
        self.offload.audit()
        assert sorted(self.offload.blocks_held()) == sorted(self.saving)
        assert self.offload.busy or not (self.saving or self.loading)
        for one, age in self.age.items():
            slot = self.offload.host.find(one)
            if slot is not None:
                assert self.mover.host[slot] in ((one, age), None)
        if all(tier.evicted == 0 for tier in self.offload.stats):
            assert all(self.offload.find([one]) == 1 for one in self.known)

    def teardown(self):
        if hasattr(self, "offload"):
            self.come_to_rest()


def test_random_moves():
    explore(OffloadMachine, 200, moves=50)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_moves_in_depth():
    explore(OffloadMachine, 3000, moves=50)
