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
from xllm.kv.events import HOST, Cleared, EventLog, Origin, Removed, Stored
from xllm.kv.tiers.slots import SlotIndex

A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def filled(index: SlotIndex, *names: bytes) -> list[int]:
    slots = []
    for one in names:
        slot = index.reserve(one)
        assert slot is not None
        assert index.ready(slot)
        slots.append(slot)
    return slots


@pytest.fixture
def index() -> SlotIndex:
    return SlotIndex(3, HOST)


def test_a_tier_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a tier needs slots, not 0"):
        SlotIndex(0, HOST)


def test_a_block_is_found_when_it_is_ready(index):
    slot = index.reserve(A)
    assert slot == 0
    assert (index.find(A), index.slot_of(A), index.is_filling(0)) == (None, 0, True)
    assert index.ready(0)
    assert (index.find(A), index.slot_of(A), index.is_filling(0)) == (0, 0, False)
    assert index.find(B) is index.slot_of(B) is None
    assert (index.used, index.stored) == (1, 1)
    index.audit()


def test_a_block_that_did_not_come_is_not_found(index):
    assert index.reserve(A) == 0
    index.cancel(0)
    assert index.slot_of(A) is None
    assert (index.used, index.stored) == (0, 0)
    assert index.reserve(A) == 0
    index.audit([0])


def test_a_name_has_one_slot(index):
    index.reserve(A)
    with pytest.raises(ValueError, match="slot 0 of CPU has this name already"):
        index.reserve(A)
    index.audit([0])


class TestEviction:
    def test_the_least_recently_used_goes_first(self, index):
        assert filled(index, A, B, C) == [0, 1, 2]
        index.touch(0)
        assert index.reserve(D) == 1
        assert index.find(B) is None
        assert index.evicted == 1
        index.audit([1])

    def test_free_slots_go_before_cached_ones(self, index):
        filled(index, A, B)
        assert index.reserve(C) == 2
        assert index.evicted == 0

    def test_what_is_pinned_or_filling_stays(self, index):
        filled(index, A, B)
        index.reserve(C)
        index.pin(0)
        assert index.reserve(D) == 1
        assert index.reserve(name(1)) is None
        assert index.skipped == 1
        index.audit([1, 2], [0])

    def test_the_last_unpin_makes_it_the_youngest(self, index):
        filled(index, A, B, C)
        index.pin(0)
        index.pin(0)
        index.unpin(0)
        assert index.reserve(D) == 1
        index.unpin(0)
        assert index.reserve(name(1)) == 2
        index.audit([1, 2])


class TestForgetting:
    def test_a_slot_nobody_uses_is_free_at_once(self, index):
        filled(index, A)
        index.forget(A)
        index.forget(A)
        assert index.find(A) is None
        assert index.used == 0
        index.audit()

    def test_a_pinned_slot_is_free_after_its_last_pin(self, index):
        filled(index, A)
        index.pin(0)
        index.pin(0)
        index.forget(A)
        assert index.find(A) is index.name_of(0) is None
        index.unpin(0)
        assert index.used == 1
        index.audit([], [0])
        index.unpin(0)
        assert index.used == 0
        index.audit()

    def test_a_filling_slot_is_free_after_it_is_filled(self, index):
        index.reserve(A)
        index.forget(A)
        assert index.reserve(A) == 1  # the name can be had again, by another slot
        assert not index.ready(0)
        assert index.slot_of(A) == 1
        assert (index.used, index.stored) == (1, 0)
        index.audit([1])

    def test_a_cancelled_slot_stays_while_it_is_pinned(self, index):
        index.reserve(A)
        index.pin(0)
        index.cancel(0)
        assert index.name_of(0) is None
        assert index.used == 1
        index.unpin(0)
        assert index.used == 0
        index.audit()

    def test_clear_forgets_whatever_state_it_is_in(self, index):
        filled(index, A, B)
        index.pin(1)
        index.reserve(C)
        index.clear()
        assert [index.slot_of(one) for one in (A, B, C)] == [None] * 3
        assert index.used == 2
        index.audit([2], [1])
        index.unpin(1)
        assert not index.ready(2)
        assert index.used == 0
        index.audit()


class TestRecovery:
    def test_adopted_blocks_are_found_and_evicted_in_order(self, index):
        assert index.adopt(2, A)
        assert index.adopt(1, B)
        assert index.find(A) == 2
        assert filled(index, C, D) == [0, 2]
        assert index.stored == 2
        index.audit()

    def test_a_name_is_adopted_once(self, index):
        assert index.adopt(2, A)
        assert not index.adopt(1, A)
        assert index.distrusted() == [1]
        assert index.used == 1
        index.audit()

    def test_a_slot_in_use_is_not_adopted(self, index):
        filled(index, A)
        with pytest.raises(ValueError, match="slot 0 of CPU is not free"):
            index.adopt(0, B)


def test_what_must_not_be_believed_later_is_told(index):
    filled(index, A)
    index.reserve(B)
    index.reserve(C)
    assert index.distrusted() == []
    index.forget(A)
    index.forget(B)
    index.cancel(2)
    assert index.distrusted() == [0, 1, 2]
    assert index.distrusted() == []
    index.ready(1)  # forgotten, and then written nevertheless
    assert index.distrusted() == [1]


def test_what_is_evicted_was_sound(index):
    filled(index, A, B, C, D)
    assert index.distrusted() == []


@pytest.mark.parametrize(
    ("misuse", "sentence"),
    [
        (lambda index: index.ready(0), "is not being filled"),
        (lambda index: index.cancel(1), "is not being filled"),
        (lambda index: index.pin(1), "there is nothing in it to pin"),
        (lambda index: index.unpin(0), "is not pinned"),
    ],
)
def test_misuse_is_refused_and_does_nothing(index, misuse, sentence):
    filled(index, A)
    with pytest.raises(ValueError, match=sentence):
        misuse(index)
    index.audit()


def test_statistics(index):
    filled(index, A, B, C, D)
    stats = index.stats
    assert (stats.medium, stats.capacity, stats.used, stats.stored, stats.evicted) == (HOST, 3, 3, 4, 1)


class TestEvents:
    @pytest.fixture
    def log(self) -> EventLog:
        return EventLog()

    @pytest.fixture
    def index(self, log) -> SlotIndex:
        return SlotIndex(2, "shelf", log)

    def test_a_block_is_told_when_it_is_ready_and_when_it_goes(self, index, log):
        index.reserve(A, Origin(None, [1, 2], "s"))
        index.reserve(B, Origin(A, [3, 4]))
        assert log.drain() == []
        index.ready(0)
        index.ready(1)
        assert log.drain() == [Stored([A, B], None, [1, 2, 3, 4], "s", "shelf")]
        index.reserve(C, Origin(B, [5, 6]))
        assert log.drain() == [Removed([A], "shelf")]
        index.cancel(0)
        index.pin(1)
        index.forget(B)
        assert log.drain() == [Removed([B], "shelf")]
        index.unpin(1)
        assert log.drain() == []

    def test_what_was_never_told_is_never_taken_back(self, index, log):
        filled(index, A)
        index.reserve(B, Origin(A, [1]))
        index.forget(A)
        index.forget(B)
        index.ready(1)
        index.clear()
        assert log.drain() == []

    def test_clearing_speaks_for_this_tier_alone(self, index, log):
        for one in (A, B):
            index.ready(index.reserve(one, Origin(None, [1])))
        log.drain()
        index.clear()
        (event,) = log.drain()
        assert not isinstance(event, Cleared)
        assert event == Removed([A, B], "shelf")


class TestAudit:
    def test_a_forgotten_user_is_named(self, index):
        filled(index, A)
        index.pin(0)
        with pytest.raises(AssertionError, match="slot 0 counts 1 pins, but 0 pin it"):
            index.audit()

    def test_a_forgotten_filler_is_named(self, index):
        index.reserve(A)
        with pytest.raises(AssertionError, match=r"slots \[0\] count as being filled"):
            index.audit()

    def test_a_broken_map_is_named(self, index):
        index._slot_of[A] = 1
        with pytest.raises(AssertionError, match="two-way map"):
            index.audit()

    def test_a_lost_slot_is_named(self, index):
        del index._free[1]
        with pytest.raises(AssertionError, match="slot 1 is free and in use, or neither"):
            index.audit()

    def test_a_slot_that_cannot_be_evicted_is_named(self, index):
        filled(index, A)
        index._unused.clear()
        with pytest.raises(AssertionError, match="slot 0 can be evicted and must not be, or the reverse"):
            index.audit()

    def test_an_event_of_what_is_not_there_is_named(self, index):
        index._told.add(2)
        with pytest.raises(AssertionError, match="events tell of slot 2, which nobody can find"):
            index.audit()

    def test_a_slot_of_no_such_number_is_named(self, index):
        index._free[3] = None
        with pytest.raises(AssertionError, match="no slot of such a number"):
            index.audit()


class SlotMachine(RuleBasedStateMachine):
    """The index against a naive model: a list of slots with their state, and a list of names by age."""

    @initialize(capacity=st.integers(1, 5))
    def start(self, capacity):
        self.log = EventLog()
        self.index = SlotIndex(capacity, HOST, self.log)
        self.name_of: list[bytes | None] = [None] * capacity
        self.filling: set[int] = set()
        self.pins = [0] * capacity
        self.ages: list[
            int
        ] = []  # slots, least recently used first; whoever cannot be evicted is passed over
        self.told: set[bytes] = set()

    def is_evictable(self, slot: int) -> bool:
        return self.name_of[slot] is not None and slot not in self.filling and not self.pins[slot]

    def is_free(self, slot: int) -> bool:
        return self.name_of[slot] is None and slot not in self.filling and not self.pins[slot]

    def make_youngest(self, slot: int) -> None:
        if slot in self.ages:
            self.ages.remove(slot)
        self.ages.append(slot)

    @rule(number=st.integers(0, 7))
    def reserve(self, number):
        if name(number) in self.name_of:
            return
        slot = self.index.reserve(name(number), Origin(None, [number]))
        evictable = [one for one in self.ages if self.is_evictable(one)]
        free = [one for one in range(self.index.capacity) if self.is_free(one)]
        if slot is None:
            assert not free and not evictable
            return
        assert slot in (free or evictable[:1])
        self.name_of[slot] = name(number)
        self.filling.add(slot)

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), good=st.booleans())
    def end_filling(self, data, good):
        slot = data.draw(st.sampled_from(sorted(self.filling)))
        if good:
            assert self.index.ready(slot) == (self.name_of[slot] is not None)
        else:
            self.index.cancel(slot)
            self.name_of[slot] = None
        self.filling.remove(slot)
        self.make_youngest(slot)

    @rule(data=st.data())
    def pin(self, data):
        slot = data.draw(st.integers(0, self.index.capacity - 1))
        if self.is_free(slot):
            with pytest.raises(ValueError):
                self.index.pin(slot)
        else:
            self.index.pin(slot)
            self.pins[slot] += 1

    @rule(data=st.data())
    def unpin(self, data):
        slot = data.draw(st.integers(0, self.index.capacity - 1))
        if not self.pins[slot]:
            with pytest.raises(ValueError):
                self.index.unpin(slot)
        else:
            self.index.unpin(slot)
            self.pins[slot] -= 1
            self.make_youngest(slot)

    @rule(data=st.data())
    def touch(self, data):
        slot = data.draw(st.integers(0, self.index.capacity - 1))
        self.index.touch(slot)
        if self.is_evictable(slot):
            self.make_youngest(slot)

    @rule(number=st.integers(0, 7))
    def forget(self, number):
        self.index.forget(name(number))
        self.name_of = [None if one == name(number) else one for one in self.name_of]

    @rule(data=st.data(), number=st.integers(0, 7))
    def adopt(self, data, number):
        slot = data.draw(st.integers(0, self.index.capacity - 1))
        if not self.is_free(slot):
            with pytest.raises(ValueError):
                self.index.adopt(slot, name(number))
        elif self.index.adopt(slot, name(number), Origin(None, [number])):
            assert name(number) not in self.name_of
            self.name_of[slot] = name(number)
            self.make_youngest(slot)
        else:
            assert name(number) in self.name_of

    @rule()
    def clear(self):
        self.index.clear()
        self.name_of = [None] * len(self.name_of)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "index"):
            return
        self.index.audit(self.filling, [slot for slot, pins in enumerate(self.pins) for _ in range(pins)])
        ready = {one: slot for slot, one in enumerate(self.name_of) if one and slot not in self.filling}
        for number in range(8):
            assert self.index.find(name(number)) == ready.get(name(number))
        assert self.index.used == sum(not self.is_free(slot) for slot in range(self.index.capacity))
        for event in self.log.drain():
            assert not isinstance(event, Cleared)
            change = self.told.update if isinstance(event, Stored) else self.told.difference_update
            change(event.names)
        assert self.told == set(ready)


def test_random_moves():
    explore(SlotMachine, 80)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_moves_in_depth():
    explore(SlotMachine, 3000)
