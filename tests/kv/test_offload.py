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
from xllm.core.transfer import (
    Disown,
    Load,
    Loaded,
    Look,
    News,
    Order,
    Save,
    Saved,
    Seen,
    Send,
    Sent,
    Source,
    Written,
)
from xllm.kv.events import HOST, EventLog, Origin, Removed, Stored
from xllm.kv.tiers.cost import Blocks, Cost
from xllm.kv.tiers.loads import Answered, Arrived
from xllm.kv.tiers.offload import Offload, Released
from xllm.kv.tiers.slots import SlotIndex
from xllm.kv.tiers.store import StoreView

A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def tiers(host: int, disk: int = 0, events: EventLog | None = None, *, stored: bool = False) -> Offload:
    below = SlotIndex(disk, "disk", events) if disk else None
    return Offload(SlotIndex(host, HOST, events), below, Cost(), StoreView() if stored else None)


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

    def test_a_write_that_a_slow_disk_has_no_time_for_is_no_failure(self, offload):
        offload.save(A, 7)
        offload.take([Saved(1, True), Written(1, False, behind=True)])
        assert offload.disk.find(A) is None
        assert [(tier.failures, tier.skipped) for tier in offload.stats] == [(0, 0), (0, 1)]
        offload.audit()

    def test_news_that_nobody_waits_for_is_an_error(self, offload):
        for news in (Saved(1, True), Written(1, True), Loaded(1, 0, [], 0.0)):
            with pytest.raises(KeyError):
                offload.take([news])


class TestLoading:
    def test_blocks_come_from_the_host_first(self, offload):
        save(offload, A, B, C)
        offload.host.forget(B)
        assert offload.find([A, B, C, D]) == 3
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
        assert offload.cost.choose([Blocks(1)], 1) == 0  # what waited for a disk says nothing of the host
        assert offload.cost.choose([Blocks(0, 1)], 1) == -1
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
        assert offload.worthwhile([A, B, C], 16) == 2
        offload.load([A, B], [1, 2])
        offload.take([Loaded(4, 2, [], 1.0)])
        assert not offload.worthwhile([A, B], 16)
        offload.host.forget(B)
        assert offload.worthwhile([A, B], 16) == 2, "nothing is known of the disk"

    def test_what_is_near_is_loaded_without_what_is_too_far(self, offload):
        save(offload, A, B, C)
        offload.host.forget(B)
        offload.cost.computed(1000, 1.0)
        offload.cost.loaded(Blocks(10), 0.001)
        offload.cost.loaded(Blocks(disk=10), 100.0)
        assert offload.worthwhile([A, B, C], 16) == 1
        assert offload.worthwhile([B, C], 16) == 0
        assert offload.worthwhile([C, A], 16) == 2


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


class TestStore:
    @pytest.fixture
    def offload(self) -> Offload:
        return tiers(4, 8, stored=True)

    def ask(self, offload: Offload, names: Sequence[bytes], count: int) -> None:
        """And be told that so many are there."""
        ticket, _ = offload.look(names, 16)
        assert [type(order) for order in offload.orders()] == [Look]
        assert offload.take([Seen(ticket, count, 0.001)]) == [Answered(ticket)]

    def test_a_block_is_saved_and_then_sent(self, offload):
        offload.save(A, 7)
        assert offload.orders() == [Save(1, A, 7, 0, 0)]
        offload.take([Saved(1, True), Written(1, True)])
        assert offload.busy
        offload.audit()
        assert offload.orders() == [Send(2, A, 0)]
        assert offload.orders() == []
        offload.audit()
        offload.take([Sent(2, True)])
        assert not offload.busy
        assert offload.store.has(A)
        assert [tier.stored for tier in offload.stats] == [1, 1, 1]
        offload.audit()

    def test_nothing_is_sent_before_its_steps_have_ended_well(self, offload):
        offload.save(A, 7)
        assert offload.orders(begun=5, done=3) == [Save(1, A, 7, 0, 0)]
        offload.save(B, 8)
        offload.take([Saved(1, True)])
        assert offload.orders(begun=6, done=4) == [Save(2, B, 8, 1, 1)]
        offload.take([Saved(2, True)])
        assert offload.orders(begun=6, done=5) == [Send(3, A, 0)]
        assert offload.orders(begun=9, done=6) == [Send(4, B, 1)]
        offload.audit()

    @pytest.mark.parametrize("forget", ["forget", "clear"])
    @pytest.mark.parametrize("saved", [False, True])
    def test_what_is_forgotten_meanwhile_is_not_sent(self, offload, forget, saved):
        offload.save(A, 7)
        offload.orders(begun=5, done=3)
        if saved:
            offload.take([Saved(1, True), Written(1, True)])
        offload.forget([A]) if forget == "forget" else offload.clear()
        assert not any(isinstance(order, Send) for order in offload.orders(begun=5, done=3))
        if not saved:
            offload.take([Saved(1, True), Written(1, True)])
        assert not offload.busy, "though step 5 may never end"
        assert offload.save(A, 8)
        offload.audit()

    def test_what_was_not_saved_is_not_sent(self, offload):
        offload.save(A, 7)
        offload.orders()
        offload.take([Saved(1, False), Written(1, False)])
        assert offload.orders() == []
        assert not offload.busy
        offload.audit()

    def test_a_slot_that_is_to_be_sent_is_not_handed_out(self):
        offload = tiers(1, stored=True)
        offload.save(A, 0)
        offload.orders()
        offload.take([Saved(1, True)])
        assert not offload.save(B, 1)
        offload.orders()
        assert not offload.save(B, 1)
        offload.take([Sent(2, False)])
        assert offload.stats[1].failures == 1
        assert offload.save(B, 1)

    def test_what_the_store_has_is_not_sent(self, offload):
        self.ask(offload, [A], 1)
        offload.save(A, 7)
        save_ends(offload)
        assert offload.orders() == []
        ticket, _ = offload.look([B], 16)
        offload.save(B, 8)
        save_ends(offload)
        offload.take([Seen(ticket, 1, 0.001)])
        assert offload.orders() == [], "it turned out meanwhile"
        assert not offload.busy
        offload.audit()

    def test_only_what_nobody_has_is_asked_for(self, offload):
        save_all(offload, A, C, stored=False)
        ticket, first = offload.look([A, B, C, D], 16)
        assert offload.orders() == [Look(ticket, [B, D])]
        assert first == B
        offload.take([Seen(ticket, 2, 0.001)])
        assert offload.find([A, B, C, D]) == 4
        assert offload.look([A, B, C, D], 16) == (0, b"")
        offload.audit()

    def test_what_is_on_its_way_is_not_asked_for(self, offload):
        offload.save(A, 0)
        assert offload.look([A, B], 16) == (0, b"")

    def test_blocks_come_from_all_tiers(self, offload):
        save_all(offload, A, B)
        offload.host.forget(B)
        self.ask(offload, [A, B, C, D], 1)
        assert offload.load([A, B, C], [1, 2, 3]) == (6, 3)
        (order,) = offload.orders()
        assert isinstance(order, Load)
        assert order.sources == [Source(A, 0, None), Source(B, 1, 1), Source(C, 2, None, True)]
        offload.audit()
        assert offload.take([Loaded(6, 3, [], 0.1)]) == [Arrived(6, 3)]
        assert offload.host.find(C) == 2
        assert [tier.hits for tier in offload.stats] == [1, 1, 1]
        offload.audit()

    def test_what_is_missing_there_is_believed_no_more(self, offload):
        self.ask(offload, [A, B], 2)
        offload.load([A, B], [1, 2])
        assert offload.take([Loaded(2, 1, [1], 0.1)]) == [Arrived(2, 1)]
        assert offload.find([A]) == 1
        assert offload.find([B]) == 0
        assert offload.look([B], 16) == (0, b""), "it is not there, as of just now"
        assert offload.stats[2].failures == 1
        offload.audit()

    def test_a_silent_store_is_neither_asked_nor_sent_to(self, offload):
        self.ask(offload, [B], 1)
        ticket, _ = offload.look([A], 16)
        offload.take([Seen(ticket, 0, 0.5, pause=3.0)])
        offload.orders()
        assert offload.find([B]) == 0
        assert offload.look([A], 16) == (0, b"")
        offload.save(A, 7)
        save_ends(offload)
        assert offload.orders() == []
        assert offload.stats[2].skipped == 1
        offload.store.now = 3.0
        assert offload.find([B]) == 1
        assert offload.look([C], 16) != (0, b"")

    def test_what_is_forgotten_is_taken_out(self, offload):
        save_all(offload, A)
        offload.forget([A])
        assert offload.orders() == [Disown([A])]
        assert offload.find([A]) == 0
        assert offload.look([A], 16) == (0, b"")
        offload.forget([])
        assert offload.orders() == []

    def test_after_everything_was_forgotten_nothing_of_before_is_believed(self, offload):
        self.ask(offload, [A], 1)
        offload.save(B, 1)
        save_ends(offload)
        (send,) = offload.orders()
        ticket, _ = offload.look([C, D], 16)
        offload.clear()
        offload.leave()
        assert offload.orders()[-1] == Disown(None)
        assert isinstance(send, Send)
        offload.take([Seen(ticket, 2, 0.001), Sent(send.ticket, True)])
        assert [offload.find([one]) for one in (A, B, C, D)] == [0, 0, 0, 0]
        assert not offload.busy
        offload.audit()

    def test_what_others_put_there_outlasts_forgetting_what_is_here(self, offload):
        self.ask(offload, [A], 1)
        offload.clear()
        assert offload.orders() == []
        assert offload.find([A]) == 1

    def test_a_question_that_takes_too_long_is_not_asked(self, offload):
        self.ask(offload, [A], 0)
        offload.cost.looked(10.0)
        offload.cost.computed(1000, 0.001)
        assert offload.look([B], 16) == (0, b"")

    def test_an_answer_that_nobody_waits_for_is_an_error(self, offload):
        for news in (Seen(1, 0, 0.0), Sent(1, True)):
            with pytest.raises(KeyError):
                offload.take([news])


def save_ends(offload: Offload) -> None:
    """All that was asked for, well."""
    for order in offload.orders():
        if not isinstance(order, Save):
            continue
        offload.take([Saved(order.ticket, True)])
        if order.disk_slot is not None:
            offload.take([Written(order.ticket, True)])


def save_all(offload: Offload, *names: bytes, stored: bool = True) -> None:
    """Save, and let the store say whether it has them."""
    for i, one in enumerate(names):
        assert offload.save(one, i)
    save_ends(offload)
    for order in offload.orders():
        assert isinstance(order, Send)
        offload.take([Sent(order.ticket, stored)])


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
        self.store: dict[tuple[int, bytes], object] = {}  # by realm and name
        self.realm = 0
        self.copies: deque[Order] = deque()
        self.writes: deque[Save] = deque()
        self.asides: deque[tuple[int, Order]] = deque()
        self.realms: dict[int, int] = {}  # of orders, by ticket
        self.news: list[News] = []

    def take_in(self, order: Order) -> None:
        if isinstance(order, Disown):
            if order.names is None:
                self.realm += 1
            else:
                self.asides.append((self.realm, order))
            return
        self.realms[order.ticket] = self.realm
        if isinstance(order, Look | Send):
            self.asides.append((self.realm, order))
        else:
            self.copies.append(order)

    def aside(self, fail: bool) -> None:
        """The oldest thing for the store."""
        realm, order = self.asides.popleft()
        match order:
            case Look():
                there = [(realm, one) in self.store for one in order.names]
                count = 0 if fail else [*there, False].index(False)
                self.news.append(Seen(order.ticket, count, 0.01, 0.5 if fail else 0.0))
            case Send():
                good = not fail and self.holds(order.host_slot, order.name)
                if good:
                    self.store.setdefault((realm, order.name), self.host[order.host_slot])
                self.news.append(Sent(order.ticket, good))
            case Disown():
                for one in () if fail else order.names or ():
                    self.store.pop((realm, one), None)

    def copy(self, fails: Sequence[bool]) -> None:
        """Carry out the oldest order; `fails` are drawn upon one by one."""
        order = self.copies.popleft()
        if isinstance(order, Save):
            self.host[order.host_slot] = None if fails[0] else self.device[order.block]
            self.news.append(Saved(order.ticket, not fails[0]))
            if order.disk_slot is not None:
                self.writes.append(order)
            return
        assert isinstance(order, Load)
        realm = self.realms[order.ticket]
        bad = [
            i
            for i, source in enumerate(order.sources)
            if not self.fetch(source, realm, fails[i % len(fails)])
        ]
        count = 0 if fails[-1] else min([len(order.sources), *bad])  # the last one is the device's failure
        for source, block in zip(order.sources[:count], order.blocks, strict=False):
            self.device[block] = self.host[source.host_slot]
        self.news.append(Loaded(order.ticket, count, bad, 0.01))

    def fetch(self, source: Source, realm: int, fail: bool) -> bool:
        if source.stored:
            self.host[source.host_slot] = None if fail else self.store.get((realm, source.name))
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

    @initialize(host=st.integers(1, 6), disk=st.integers(0, 8), stored=st.booleans())
    def start(self, host, disk, stored):
        self.stored = stored
        self.offload = tiers(host, disk, stored=stored)
        self.mover = Mover(host, disk)
        self.age = dict.fromkeys(map(name, range(8)), 0)
        self.next_block = 0
        self.saving: list[int] = []
        self.loading: dict[int, Load] = {}
        self.looking: set[int] = set()
        self.begun = self.done = 0  # steps
        self.filled_by: dict[bytes, tuple[int, int]] = {}  # with the age at that time
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
                self.filled_by[one] = (self.begun, self.age[one])

    @rule(numbers=chosen)
    def load(self, numbers):
        names = [name(number) for number in numbers]
        found = self.offload.find(names)
        blocks = self.new_blocks(len(names))
        ticket, covered = self.offload.load(names, blocks)
        assert 0 <= covered <= found
        if all(self.offload.host.slot_of(one) is not None for one in names[:found]):
            assert covered == found
        assert (ticket == 0) == (covered == 0)
        if covered:
            assert ticket not in self.loading
            self.loading[ticket] = Load(ticket, [Source(one, 0, None) for one in names[:covered]], blocks)

    def hand_over(self):
        self.invalidate()
        for order in self.offload.orders(self.begun, self.done):
            self.mover.take_in(order)
            if isinstance(order, Send):
                step, age = self.filled_by[order.name]
                assert step <= self.done, "nobody knows yet whether it is what it should be"
                assert age == self.age[order.name]
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
        for _ in range(min(writes, len(self.mover.asides))):
            self.mover.aside(fails[0])
            fails = fails[1:] + fails[:1]
        self.deliver(news)

    @precondition(lambda self: self.stored)
    @rule(numbers=chosen)
    def look(self, numbers):
        ticket, first = self.offload.look([name(number) for number in numbers], 16)
        if ticket:
            assert first in map(name, numbers)
            assert self.offload.find([first]) == 0
            self.looking.add(ticket)

    @precondition(lambda self: self.mover.store)
    @rule(which=st.integers(0, 30))
    def lose(self, which):
        """Others let go of what lies in the store."""
        del self.mover.store[list(self.mover.store)[which % len(self.mover.store)]]

    @precondition(lambda self: self.stored)
    @rule(number=st.integers(0, 7))
    def others(self, number):
        """Another engine of the same realm has computed a block. What it is called then is what it is."""
        one = name(number)
        if self.mover.realm == 0 and self.age[one] == 0:
            self.mover.store.setdefault((0, one), (one, 0))

    @rule(begin=st.booleans())
    def step(self, begin):
        if begin:
            self.hand_over()
            self.begun += 1
        else:
            self.done = min(self.done + 1, self.begun)

    @precondition(lambda self: self.stored)
    @rule(seconds=st.sampled_from([0.1, 1.0, 100.0]))
    def pass_time(self, seconds):
        assert self.offload.store is not None
        self.offload.store.now += seconds

    def deliver(self, count):
        news, self.mover.news = self.mover.news[:count], self.mover.news[count:]
        for one in news:
            self.learn(one)
            for done in self.offload.take([one]):
                if isinstance(done, Released):
                    self.saving.remove(done.block)
                elif isinstance(done, Answered):
                    self.looking.remove(done.ticket)
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
        self.offload.leave()
        for one in self.age:
            self.age[one] += 1
        self.known.clear()

    @rule(numbers=chosen)
    def touch(self, numbers):
        self.offload.touch([name(number) for number in numbers])

    @rule()
    def come_to_rest(self):
        self.done = self.begun
        for _ in range(2):  # what has been saved is sent
            self.hand_over()
            while self.mover.copies:
                self.mover.copy([False])
            while self.mover.writes:
                self.mover.write(False)
            while self.mover.asides:
                self.mover.aside(False)
            self.deliver(len(self.mover.news))
        self.invalidate()
        assert not self.offload.busy
        assert not self.saving
        assert not self.loading
        assert not self.looking
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
        self.offload = tiers(len(self.mover.host), len(self.mover.disk), stored=self.stored)
        self.mover.realm, self.mover.store = 0, {}  # what it had disowned nobody remembers
        self.mover.host = [None] * len(self.mover.host)
        assert self.offload.recover((slot, one) for one, slot in left.items()) == len(left)
        self.known = set(left)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "offload"):
            return
        self.offload.audit()
        assert sorted(self.offload.blocks_held()) == sorted(self.saving)
        assert self.offload.busy or not (self.saving or self.loading or self.looking)
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
