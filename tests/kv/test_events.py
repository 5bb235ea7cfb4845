import pytest

from xllm.kv.events import DEVICE, HOST, Cleared, EventLog, Origin, Removed, Stored
from xllm.kv.pool import BlockPool


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def log() -> EventLog:
    return EventLog()


def test_a_chain_is_one_event(log):
    log.stored(name(1), Origin(None, [1, 2], "s"), DEVICE)
    log.stored(name(2), Origin(name(1), (3, 4)), DEVICE)
    log.stored(name(9), Origin(name(1), (5, 6)), DEVICE)
    assert log.drain() == [
        Stored([name(1), name(2)], None, [1, 2, 3, 4], "s", DEVICE),
        Stored([name(9)], name(1), [5, 6], "", DEVICE),
    ]
    assert log.drain() == []


def test_what_lies_between_keeps_its_place(log):
    log.stored(name(1), Origin(None, [1, 2]), DEVICE)
    log.removed(name(7), DEVICE)
    log.removed(name(8), DEVICE)
    log.stored(name(2), Origin(name(1), [3, 4]), DEVICE)
    log.cleared()
    log.removed(name(2), DEVICE)
    kinds = [type(event) for event in log.drain()]
    assert kinds == [Stored, Removed, Stored, Cleared, Removed]


def test_tiers_are_told_apart(log):
    log.stored(name(1), Origin(None, [1]), DEVICE)
    log.stored(name(2), Origin(name(1), [2]), HOST)
    log.removed(name(1), DEVICE)
    log.removed(name(2), HOST)
    assert [event.medium for event in log.drain()] == ["GPU", "CPU", "GPU", "CPU"]


def test_what_was_drained_does_not_change(log):
    origin = [1, 2]
    log.stored(name(1), Origin(None, origin), DEVICE)
    (before,) = log.drain()
    log.stored(name(2), Origin(name(1), [3, 4]), DEVICE)
    assert before.names == [name(1)]
    assert before.token_ids == origin == [1, 2]


def test_a_pool_tells_what_it_publishes_evicts_withdraws_and_forgets(log):
    pool = BlockPool(2, 4, events=log)
    assert log.drain() == []
    blocks = pool.allocate(2)
    assert blocks == [0, 1]
    assert pool.publish(0, name(1), Origin(None, [1] * 4))
    assert not pool.publish(1, name(1), Origin(None, [1] * 4))  # taken: nothing new to tell
    assert pool.publish(1, name(2), Origin(name(1), [2] * 4))
    assert log.drain() == [Stored([name(1), name(2)], None, [1] * 4 + [2] * 4, "", DEVICE)]
    pool.withdraw(0)
    pool.withdraw(0)
    assert log.drain() == [Removed([name(1)], DEVICE)]
    pool.release([0, 1])
    assert log.drain() == []  # reusable is still cached
    assert pool.allocate(2) == [0, 1]
    assert log.drain() == [Removed([name(2)], DEVICE)]
    pool.publish(0, name(3), Origin(None, [3] * 4))
    pool.reset_cache()
    assert [type(event) for event in log.drain()] == [Stored, Cleared]
    pool.audit([[0, 1]])


def test_a_name_of_unknown_origin_is_refused(log):
    pool = BlockPool(2, 4, events=log)
    pool.allocate(1)
    with pytest.raises(ValueError, match="unknown origin"):
        pool.publish(0, name(1))
    assert len(pool.index) == 0


def test_nobody_listens_and_nothing_is_recorded():
    pool = BlockPool(2, 4)
    pool.allocate(1)
    assert pool.events is None
    assert pool.publish(0, name(1))
