"""Blocks go to a store and come back through the mover, side by side with host memory and disk, whatever the store does."""

import random
import threading
import time

import pytest
import torch

from tests.executor.stores.faulty import LONG, FaultyStore
from tests.executor.test_mover import BLOCKS, BYTES, Rig, block_of, loaded, name_of
from xllm.core.transfer import Disown, Load, Look, Order, Save, Saved, Seen, Send, Sent, Source
from xllm.device.reference import ReferenceDevice
from xllm.executor import remote_mover, remote_tier
from xllm.executor.host_tier import HostTier
from xllm.executor.mover import Mover
from xllm.executor.remote_tier import Pause, RemoteTier


class RemoteRig(Rig):
    """The same with a store."""

    def __init__(self, path, *, host_slots=32):
        super().__init__(ReferenceDevice(), path, host_slots=host_slots)
        self.mover.close()
        self.store = FaultyStore()
        self.tier = RemoteTier(self.store, BYTES, b"test")
        self.disk = type(self.disk)(path / "kv.bin", self.disk.slots, BYTES, b"test")
        self.mover = Mover(self.device, self.kv_cache, self.host, self.disk, self.tier)

    def start(self, *orders, void=()):
        self.expected -= sum(isinstance(order, Disown) for order in orders)
        super().start(*orders, void=void)

    def close(self):
        self.store.gate.set()
        self.store.error = None
        super().close()
        assert self.store.closed == 1

    def key(self, n):
        return f"{self.tier.realm}-{name_of(n).hex()}"


@pytest.fixture
def rig(tmp_path):
    rig = RemoteRig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def impatient(monkeypatch):
    for limit in ("LOOK_S", "CALL_S"):
        monkeypatch.setattr(remote_tier, limit, 0.05)


def save(n, block=None, slot=None, disk_slot=None):
    """To host memory, perhaps to disk, and to the store."""
    slot = n if slot is None else slot
    return Save(n, name_of(n), n if block is None else block, slot, disk_slot), Send(n, name_of(n), slot)


def saves(*numbers):
    return [order for n in numbers for order in save(n)]


def stored(name, slot):
    return Source(name, slot, None, True)


def sent(news):
    return {one.ticket: one.stored for one in news if isinstance(one, Sent)}


def test_a_block_goes_there_and_comes_back(rig):
    for n in range(3):
        rig.fill(n, n)
    news = rig.run(*save(0), *save(1, disk_slot=1), *save(2, disk_slot=2))
    assert {one.ticket for one in news if isinstance(one, Saved) and one.host} == {0, 1, 2}
    assert sent(news) == {0: True, 1: True, 2: True}
    sources = [stored(name_of(0), 5), Source(name_of(1), 6, 1), Source(name_of(2), 2, None)]
    assert loaded(rig.run(Load(9, sources, [8, 6, 7]))) == [(9, 3, ())]
    assert [rig.device_bytes(block) for block in (8, 6, 7)] == [block_of(n).tobytes() for n in range(3)]
    assert rig.host.check(5, name_of(0)), "it lies in host memory by now"


def test_another_engine_finds_it(rig, tmp_path):
    rig.fill(0, 7)
    rig.run(*save(0))
    other = RemoteRig(tmp_path / "other")
    other.store.records = rig.store.records
    (seen,) = other.run(Look(1, [name_of(0), name_of(1)]))
    assert (seen.ticket, seen.count, seen.pause) == (1, 1, 0.0)
    assert seen.seconds > 0
    assert loaded(other.run(Load(2, [stored(name_of(0), 3)], [4]))) == [(2, 1, ())]
    assert other.device_bytes(4) == block_of(7).tobytes()
    other.close()


def test_orders_of_one_slot_are_kept_in_order(rig):
    for n in range(30):
        rig.fill(0, n)
        rig.start(Save(3 * n, name_of(n), 0, 3, None), Send(3 * n, name_of(n), 3))
        rig.hear_all()
        rig.start(
            Load(3 * n + 1, [stored(name_of(n), 4)], [1]),
            Load(3 * n + 2, [Source(name_of(n), 4, None)], [2]),  # what the one before brings
        )
        assert sorted(loaded(rig.hear_all()[-2:])) == [(3 * n + 1, 1, ()), (3 * n + 2, 1, ())]
        assert rig.device_bytes(1) == rig.device_bytes(2) == block_of(n).tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_random_orders_bring_what_they_should_or_say_so(rig, seed, monkeypatch):
    """With bits that flip in the store and calls that fail."""
    rnd = random.Random(seed)
    contents = {}
    for block in range(4):
        rig.fill(block, 100 + block)
    ticket = sound = 0
    for _ in range(60):
        rig.tier.pause = Pause()
        rig.store.error = OSError("down") if rnd.random() < 0.1 else None
        orders: list[Order] = []
        for slot in rnd.sample(range(8), rnd.randrange(1, 6)):
            ticket += 1
            n = rnd.randrange(4)
            if rnd.random() < 0.4:
                orders += [Save(ticket, name_of(n), n, slot, None), Send(ticket, name_of(n), slot)]
            else:
                orders.append(Load(ticket, [stored(name_of(n), slot)], [4 + slot]))
                contents[ticket] = n, 4 + slot
        for one in rig.run(*orders):
            if getattr(one, "count", 0):
                n, block = contents[one.ticket]
                assert rig.device_bytes(block) == block_of(100 + n).tobytes()
                sound += 1
        if rnd.random() < 0.3 and rig.store.records:
            rig.store.damage(rnd.choice([*rig.store.records]), rnd.randrange(BYTES), 1 << rnd.randrange(8))
    assert sound > 20


def test_damage_in_memory_does_not_go_to_the_store(rig):
    rig.store.gate.clear()
    rig.fill(0, 0)
    rig.fill(1, 1)
    rig.start(*save(0))
    assert rig.store.entered.wait(LONG)
    rig.start(*save(1))
    rig.hear(2)
    rig.host.array(1)[3] ^= 1
    rig.store.gate.set()
    assert sent(rig.hear_all()) == {0: True, 1: False}
    assert rig.key(1) not in rig.store.records


def test_a_slow_store_holds_up_nobody_else(rig):
    for n in range(3):
        rig.fill(n, n)
    rig.run(*(order for n in range(3) for order in save(n, disk_slot=n)))
    rig.store.gate.clear()
    rig.start(
        Load(10, [stored(name_of(0), 5)], [8]), Look(11, [name_of(0)]), Load(12, [Source(name_of(0), 5, None)], [9])
    )  # fmt: skip
    heard = len(rig.told)
    rig.start(Load(13, [Source(name_of(1), 1, None)], [10]), Load(14, [Source(name_of(2), 6, 2)], [11]))
    assert sorted(loaded(rig.hear(heard + 2)[-2:])) == [(13, 1, ()), (14, 1, ())]
    rig.store.gate.set()
    news = rig.hear_all()[heard + 2 :]
    assert sorted(loaded(news)) == [(10, 1, ()), (12, 1, ())]
    assert [one.count for one in news if isinstance(one, Seen)] == [1]


def test_what_the_store_cannot_take_in_time_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_mover, "QUEUED_SENDS", 2)
    rig = RemoteRig(tmp_path, host_slots=12)
    rig.store.gate.clear()
    rig.start(*save(0))
    assert rig.store.entered.wait(LONG)
    rig.start(*saves(*range(1, 6)))
    rig.hear(6 + 3)
    rig.store.gate.set()
    assert sent(rig.hear_all()) == {0: True, 1: True, 2: True, 3: False, 4: False, 5: False}
    rig.close()


def test_a_store_that_hangs_is_news_in_time(rig, impatient, monkeypatch):
    rig.fill(0, 0)
    rig.run(*save(0))
    rig.store.gate.clear()
    begin = time.perf_counter()
    news = rig.run(Look(1, [name_of(0)]), Load(2, [stored(name_of(0), 5)], [8]), *save(3))
    assert time.perf_counter() - begin < 5.0
    assert loaded(news) == [(2, 0, (0,))]
    assert sent(news) == {3: False}
    (seen,) = [one for one in news if isinstance(one, Seen)]
    assert seen.count == 0
    assert seen.pause > 0
    (again,) = rig.run(Look(4, [name_of(0)]))
    assert again.pause > 0
    assert again.seconds < 0.05, "nobody was asked"
    assert (
        "exists" not in rig.store.calls[rig.store.calls.index("get") :]
        or rig.store.calls.count("exists") == 1
    )


def test_what_does_not_come_in_time_is_left_out(rig, monkeypatch):
    for n in range(3):
        rig.fill(n, n)
    rig.run(*saves(0, 1, 2))
    monkeypatch.setattr(remote_mover, "FETCH_S", -1.0)
    calls = len(rig.store.calls)
    sources = [Source(name_of(0), 0, None), stored(name_of(1), 5), stored(name_of(2), 6)]
    assert loaded(rig.run(Load(9, sources, [8, 9, 10]))) == [(9, 1, (1, 2))]
    assert len(rig.store.calls) == calls
    assert rig.tier.pause.left > 0, "a store that is too slow is as good as none"


@pytest.mark.parametrize("what", ["get", "put", "exists", "remove"])
def test_what_nobody_expects_ends_no_thread(rig, monkeypatch, what):
    """An answer of the wrong length, say."""
    rig.fill(0, 0)
    rig.run(*save(0))
    with monkeypatch.context() as patch:
        patch.setattr(FaultyStore, what, lambda *_: [])
        rig.run(Look(1, [name_of(0)]), Load(2, [stored(name_of(0), 5)], [8]), *save(3), Disown([name_of(9)]))
    rig.tier.pause = Pause()
    assert loaded(rig.run(Load(4, [stored(name_of(0), 5)], [8]))) == [(4, 1, ())]
    assert sent(rig.run(*save(5, 1))) == {5: True}
    assert [one.count for one in rig.run(Look(6, [name_of(0)]))] == [1]


def test_what_is_disowned_is_taken_out_though_it_was_on_its_way(rig):
    rig.fill(0, 0)
    rig.fill(1, 1)
    rig.run(*save(0))
    rig.store.gate.clear()
    rig.store.entered.clear()
    rig.start(*save(1))
    assert rig.store.entered.wait(LONG)
    rig.start(Save(3, name_of(2), 2, 2, None))
    rig.hear(len(rig.told) + 2)  # both copies
    rig.start(Send(2, name_of(2), 2), Disown([name_of(0), name_of(1), name_of(2)]))
    rig.store.gate.set()
    rig.hear_all()
    rig.run(*save(4, 3))  # behind the removal
    assert [*rig.store.records] == [rig.key(4)]


def test_after_all_was_disowned_nothing_of_before_is_found_or_put(rig):
    rig.fill(0, 0)
    rig.fill(1, 1)
    rig.run(*save(0))
    before = rig.tier.realm
    rig.store.gate.clear()
    rig.start(*save(1), Disown(None), Look(2, [name_of(0)]), Load(3, [stored(name_of(0), 5)], [8]))
    rig.start(*save(4, 3))
    rig.store.gate.set()
    news = rig.hear_all()
    assert rig.tier.realm != before
    assert {*rig.store.records} == {f"{before}-{name_of(n).hex()}" for n in (0, 1)} | {rig.key(4)}
    assert [one.count for one in news if isinstance(one, Seen)] == [0]
    assert loaded(news) == [(3, 0, (0,))]


def test_closing_leaves_the_rest_to_nobody(tmp_path):
    rig = RemoteRig(tmp_path)
    rig.fill(0, 0)
    rig.run(*save(0))
    rig.store.entered.clear()
    rig.store.gate.clear()
    rig.start(*saves(1, 2))
    assert rig.store.entered.wait(LONG)
    rig.start(*save(3), Load(9, [stored(name_of(0), 6)], [8]), Look(10, [name_of(0)]))
    closing = threading.Thread(target=rig.mover.close)
    closing.start()
    with rig.mover._changed:
        assert rig.mover._changed.wait_for(lambda: rig.mover._closing, LONG)
    rig.store.gate.set()
    closing.join()
    rig.mover.close()  # twice is once
    assert rig.store.closed == 1
    rig.hear_all()
    assert not rig.threads()
    assert sent(rig.run(*save(11))) == {11: False}
    assert [one.count for one in rig.run(Look(12, [name_of(0)]), Disown([name_of(0)]))] == [0]


def test_without_a_store_nothing_comes_from_there():
    device = ReferenceDevice()
    host = HostTier(device.pinned(2 * BYTES), 2, BYTES)
    mover = Mover(device, device.empty((BLOCKS, BYTES), torch.uint8), host)
    host.seal(1, name_of(1))
    mover.start([Load(1, [stored(name_of(1), 1)], [3])])
    assert mover.wait(LONG)
    assert loaded(mover.news()) == [(1, 0, (0,))]
    mover.close()
