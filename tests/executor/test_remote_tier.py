"""What comes from a store is what went there or nothing, and in bounded time, whatever the store does."""

import threading
import time

import numpy as np
import pytest

from tests.executor.stores.faulty import LONG, FaultyStore
from xllm.executor import records, remote_tier
from xllm.executor.host_tier import checksum
from xllm.executor.remote_tier import HEADER, Pause, RemoteTier

BLOCK = 5000


def name_of(n):
    return n.to_bytes(16, "big")


def block_of(n):
    return np.random.default_rng(n).integers(0, 256, BLOCK, dtype=np.uint8)


@pytest.fixture
def store():
    return FaultyStore()


@pytest.fixture
def tier(store):
    tier = RemoteTier(store, BLOCK, b"model")
    yield tier
    store.gate.set()
    store.error = None
    tier.close()
    assert store.closed == 1


@pytest.fixture
def impatient(monkeypatch):
    for limit in ("LOOK_S", "CALL_S", "CLOSE_S"):
        monkeypatch.setattr(remote_tier, limit, 0.05)


def put(tier, *numbers):
    blocks = [(name_of(n), block_of(n), checksum(name_of(n), block_of(n))) for n in numbers]
    return tier.put(blocks, tier.realm)


def get(tier, *numbers, realm=None):
    """Of each: whether it came; if so it is the right one, if not its array is as it was."""
    into = np.full((len(numbers), BLOCK), 77, dtype=np.uint8)
    known = tier.get([(name_of(n), row) for n, row in zip(numbers, into, strict=True)], realm or tier.realm)
    for n, row, came in zip(numbers, into, known, strict=True):
        if came is None:
            assert (row == 77).all()
        else:
            assert row.tobytes() == block_of(n).tobytes()
            assert came == checksum(name_of(n), row)
    return [came is not None for came in known]


def count(tier, *numbers):
    return tier.count([name_of(n) for n in numbers], tier.realm)


def key(tier, n):
    return f"{tier.realm}-{name_of(n).hex()}"


def test_what_was_put_comes_back(tier):
    assert put(tier, 1, 2, 3) == [True] * 3
    assert get(tier, 3, 4, 1) == [True, False, True]
    assert count(tier, 1, 2, 4, 3) == 2
    assert count(tier, 4) == 0
    assert count(tier) == 0


def test_engines_of_one_model_share_and_others_do_not(store, tier):
    put(tier, 1)
    same, other = RemoteTier(store, BLOCK, b"model"), RemoteTier(store, BLOCK, b"another model")
    assert get(same, 1) == [True]
    assert get(other, 1) == [False]
    assert count(other, 1) == 0
    # even under the same key, which nobody can bring about by accident
    assert get(other, 1, realm=tier.realm) == [False]
    store.closed -= 2
    same.close()
    other.close()


def test_a_block_that_changed_before_it_left_is_not_sent(store, tier):
    known = checksum(name_of(1), block_of(1))
    damaged = block_of(1)
    damaged[4000] ^= 1
    blocks = [(name_of(1), damaged, known), (name_of(2), block_of(2), checksum(name_of(2), block_of(2)))]
    assert tier.put(blocks, tier.realm) == [False, True]
    assert [*store.records] == [key(tier, 2)]


def test_no_flipped_bit_makes_a_wrong_block(store, tier):
    """One in every byte that means something. What is damaged is taken out, so that somebody puts it there again."""
    places = [*range(records.BYTES), *range(HEADER, HEADER + BLOCK, 97), HEADER + BLOCK - 1]
    for place in places:
        put(tier, 1)
        store.damage(key(tier, 1), place, 1 << place % 8)
        assert get(tier, 1) == [False]
        assert key(tier, 1) not in store.records


def test_no_truncation_makes_a_wrong_block(store, tier):
    put(tier, 1)
    whole = store.records[key(tier, 1)]
    for size in [*range(0, len(whole), 501), records.BYTES, HEADER, len(whole) - 1]:
        store.records[key(tier, 1)] = whole[:size]
        assert get(tier, 1) == [False] or (size == len(whole) - 1 and whole[-1] == 0)


def test_a_record_under_another_name_is_not_taken(store, tier):
    put(tier, 1)
    store.records[key(tier, 2)] = store.records[key(tier, 1)]
    assert get(tier, 2, 1) == [False, True]


def test_what_lies_in_the_memory_from_before_is_not_taken(store, tier):
    """A store that says yes and fills nothing."""
    put(tier, 1, 2)
    assert get(tier, 1, 2) == [True, True]
    store.get = lambda keys, into: [True] * len(keys)
    assert get(tier, 2, 1) == [False, False]


@pytest.mark.parametrize("error", [OSError("it is down"), RuntimeError("what"), MemoryError()])
def test_a_store_that_raises(store, tier, monkeypatch, caplog, error):
    put(tier, 1)
    store.error = error
    for use in (lambda: count(tier, 1), lambda: get(tier, 1), lambda: put(tier, 2)):
        monkeypatch.setattr(tier, "pause", Pause())
        assert use() in (None, [False])
        assert tier.pause.left > 0
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 3
    monkeypatch.setattr(tier, "pause", Pause())
    store.error = None
    assert get(tier, 1) == [True]


def test_during_a_pause_nobody_is_asked(store, tier):
    put(tier, 1)
    store.error = OSError("it is down")
    get(tier, 1)
    store.calls.clear()
    begin = time.perf_counter()
    assert count(tier, 1) is None
    assert get(tier, 1) == [False]
    assert put(tier, 2) == [False]
    assert store.calls == []
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize("what", ["count", "get", "put"])
def test_a_store_that_hangs_is_left_to_itself(store, tier, monkeypatch, impatient, what):
    put(tier, 1)
    store.gate.clear()
    assert {"count": count, "get": get, "put": put}[what](tier, 1) in (None, [False])
    assert tier.pause.left > 0
    monkeypatch.setattr(remote_tier, "CALL_S", LONG)
    monkeypatch.setattr(remote_tier, "LOOK_S", LONG)
    store.gate.set()
    deadline = time.monotonic() + LONG
    done = False
    while not done:  # its lane is back once the call has ended
        assert time.monotonic() < deadline
        tier.pause = Pause()
        done = count(tier, 1) == 1 and get(tier, 1, 1) == [True, True] and put(tier, 2) == [True]
    assert get(tier, 2) == [True]


def test_what_comes_too_late_overwrites_nothing(store, tier, monkeypatch, impatient):
    """The array belongs to somebody else by then."""
    put(tier, 1)
    into = np.zeros(BLOCK, dtype=np.uint8)
    store.gate.clear()
    assert tier.get([(name_of(1), into)], tier.realm) == [None]
    into[:] = 5
    ended = threading.Event()
    tier._getting._all[0].when_free(ended.set)
    store.gate.set()
    assert ended.wait(LONG)
    assert (into == 5).all()


def test_a_call_that_never_ends_does_not_take_every_lane(store, tier, monkeypatch, impatient):
    put(tier, 1)
    store.gate.clear()
    assert get(tier, 1) == [False]
    tier.pause = Pause()
    assert get(tier, 1) == [False]
    tier.pause = Pause()
    begin = time.perf_counter()
    assert get(tier, 1) == [False], "there is no lane left"
    assert time.perf_counter() - begin < 0.04
    assert tier.pause.left > 0


def test_a_store_that_hangs_is_closed_nevertheless(store, impatient, caplog):
    tier = RemoteTier(store, BLOCK, b"model")
    store.gate.clear()
    tier.close()
    assert "could not be given back in the store: no answer in time" in caplog.text
    store.gate.set()


def test_a_store_that_is_still_called_is_not_closed(store, impatient, caplog):
    tier = RemoteTier(store, BLOCK, b"model")
    store.gate.clear()
    get(tier, 1)
    tier.close()
    assert "left open" in caplog.text
    assert "close" not in store.calls
    store.gate.set()


def test_what_is_removed(store, tier):
    put(tier, 1, 2)
    tier.remove([name_of(1), name_of(9)], tier.realm)
    assert get(tier, 1, 2) == [False, True]
    assert put(tier, 1) == [True]
    assert get(tier, 1) == [True]


def test_who_left_finds_only_what_it_puts_there_since(store, tier):
    put(tier, 1)
    before = tier.realm
    tier.leave()
    assert get(tier, 1) == [False]
    put(tier, 2)
    assert get(tier, 2) == [True]
    same = RemoteTier(store, BLOCK, b"model")
    assert same.realm == before
    assert get(same, 1, 2) == [True, False]
    store.closed -= 1
    same.close()


def test_large_blocks_go_in_small_parties(store):
    sizes = {size: RemoteTier(store, size, b"").at_once for size in (100, 5 << 20, 40 << 20)}
    assert sizes == {100: 16, 5 << 20: 3, 40 << 20: 1}


class TestPause:
    @pytest.fixture
    def pause(self):
        self.now = 10.0
        return Pause(lambda: self.now)

    def test_none_at_first(self, pause):
        assert pause.left == 0
        pause.worked()
        assert pause.left == 0

    def test_each_is_longer_than_the_one_before(self, pause):
        most = remote_tier.FIRST_PAUSE_S
        for _ in range(12):
            pause.failed()
            assert 0.7 * most <= pause.left <= most
            pause.failed()  # together with the first
            assert pause.left <= most
            self.now += most
            assert pause.left == 0
            most = min(2 * most, remote_tier.LONGEST_PAUSE_S)
        pause.worked()
        pause.failed()
        assert pause.left <= remote_tier.FIRST_PAUSE_S

    def test_a_late_answer_does_not_end_it(self, pause):
        pause.failed()
        pause.worked()
        assert pause.left > 0
