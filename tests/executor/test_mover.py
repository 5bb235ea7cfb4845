"""Bytes arrive where they were ordered to or it is said that they have not, on every device, whatever fails."""

import random
import threading
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from xllm.core.transfer import Load, Loaded, News, Save, Saved, Source, Written
from xllm.device.reference import ReferenceDevice
from xllm.device.table import DEVICES, open_device
from xllm.executor import disk_mover
from xllm.executor import mover as mover_module
from xllm.executor.block_copies import runs
from xllm.executor.disk_tier import PAGE, DiskTier
from xllm.executor.host_tier import HostTier
from xllm.executor.mover import Mover
from xllm.executor.sleep import Sleeper

BLOCKS, SHAPE = 12, (2, 2, 4, 1, 8)
BYTES = 2 * 2 * 4 * 1 * 8 * 2
LONG = 30.0  # seconds; only a failing test waits that long


def name_of(n):
    return n.to_bytes(16, "big")


class Rig:
    """A mover with what it moves between, and all news it ever told."""

    def __init__(self, device, path, *, host_slots=8, disk_slots=6, disk_class=DiskTier):
        self.before = set(threading.enumerate())
        self.device = device
        self.kv_cache = device.empty((BLOCKS, *SHAPE), torch.bfloat16)
        self.bytes_NB = self.kv_cache.view(torch.uint8).view(BLOCKS, -1)
        self.host = HostTier(device.pinned(host_slots * BYTES), host_slots, BYTES)
        self.disk = disk_class(path / "kv.bin", disk_slots, BYTES, b"test")
        self.mover = Mover(device, self.kv_cache, self.host, self.disk)
        self.told: list = []
        self.expected = 0

    def start(self, *orders, void=()):
        self.expected += sum(1 + (isinstance(o, Save) and o.disk_slot is not None) for o in orders)
        self.mover.start(orders, void)

    def hear(self, count):
        """News until there are so many in all."""
        while len(self.told) < count:
            assert self.mover.wait(LONG), f"{self.told}, and no more"
            self.told += self.mover.news()
        assert len(self.told) == count
        return self.told

    def hear_all(self):
        return self.hear(self.expected)

    def run(self, *orders):
        before = self.expected
        self.start(*orders)
        return self.hear_all()[before:]

    def device_bytes(self, block):
        return self.bytes_NB[block].cpu().numpy().tobytes()

    def fill(self, block, n):
        self.bytes_NB[block] = torch.from_numpy(block_of(n)).to(self.device.torch_device)

    def threads(self):
        """Of the mover."""
        return [one for one in set(threading.enumerate()) - self.before if one.name.startswith("xllm-kv-")]

    def close(self):
        self.mover.close()
        assert not self.threads()


def block_of(n):
    return np.random.default_rng(n).integers(0, 256, BYTES, dtype=np.uint8)


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n == "cuda" else ()) for n in DEVICES])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = open_device(request.param)
    device.prepare(threads=1)
    return device


@pytest.fixture
def rig(device, tmp_path):
    rig = Rig(device, tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def reference(tmp_path):
    rig = Rig(ReferenceDevice(), tmp_path)
    yield rig
    rig.close()


def loaded(news):
    return [(n.ticket, n.count, tuple(n.bad)) for n in news if isinstance(n, Loaded)]


def test_a_block_goes_down_and_comes_up_from_each_tier(rig):
    for n in range(3):
        rig.fill(n, n)
    saves = [Save(n, name_of(n), block=n, host_slot=2 * n, disk_slot=n) for n in range(3)]
    news = rig.run(*saves)
    assert {n.ticket for n in news if isinstance(n, Saved) and n.host} == {0, 1, 2}
    assert {n.ticket for n in news if isinstance(n, Written) and n.disk} == {0, 1, 2}
    sources = [Source(name_of(0), 0, None), Source(name_of(1), 5, 1), Source(name_of(2), 4, None)]
    (news,) = rig.run(Load(9, sources, [8, 6, 7]))
    assert (news.ticket, news.count, list(news.bad)) == (9, 3, [])
    assert news.seconds > 0
    assert [rig.device_bytes(block) for block in (8, 6, 7)] == [block_of(n).tobytes() for n in range(3)]
    assert rig.host.check(5, name_of(1)), "it lies in the host tier by now"


def test_orders_of_one_slot_are_kept_in_order(rig):
    """A load may name what a save before it is still filling, in memory and on disk."""
    for n in range(40):
        rig.fill(0, n)
        rig.start(
            Save(2 * n, name_of(n), block=0, host_slot=3, disk_slot=2),
            Load(2 * n + 1, [Source(name_of(n), 3, None), Source(name_of(n), 4, 2)], [1, 2]),
        )
        # what steps read and write on the device is the scheduler's affair: it waits for news
        news = rig.hear_all()[-3:]
        assert {type(one) for one in news} == {Saved, Written, Loaded}
        assert loaded(news) == [(2 * n + 1, 2, ())]
        assert rig.device_bytes(1) == rig.device_bytes(2) == block_of(n).tobytes()


def test_a_save_takes_what_steps_before_it_wrote(rig):
    """However busy the device is, and while it goes on with steps behind the order."""
    busy = torch.randn(512, 512, device=rig.device.torch_device)
    for n in range(12):
        for _ in range(5):
            busy = (busy @ busy).softmax(0)
        rig.bytes_NB[n % 4] = n
        rig.start(Save(n, name_of(n), block=n % 4, host_slot=n % 8, disk_slot=None))
        for _ in range(2):
            busy = (busy @ busy).softmax(0)
        rig.bytes_NB[4 + n % 4] = 200  # others' blocks
        if n % 4 == 3:
            assert all(one.host for one in rig.hear_all())
            assert [int(rig.host.array(m % 8)[0]) for m in range(n - 3, n + 1)] == [*range(n - 3, n + 1)]
            assert all(rig.host.check(m % 8, name_of(m)) for m in range(n - 3, n + 1))


def test_what_is_loaded_is_there_for_the_next_step(rig):
    rig.fill(0, 77)
    rig.run(Save(0, name_of(0), block=0, host_slot=0, disk_slot=0))
    busy = torch.randn(512, 512, device=rig.device.torch_device)
    for n in range(1, 10):
        rig.bytes_NB[1:3] = n
        rig.device.mark().wait()  # nothing in flight touches what is to be filled
        for _ in range(5):
            busy = (busy @ busy).softmax(0)
        sources = [Source(name_of(0), 0, None), Source(name_of(0), n % 7 + 1, 0)]
        assert loaded(rig.run(Load(n, sources, [1, 2]))) == [(n, 2, ())]
        copies = [rig.device.download(rig.bytes_NB[block] + 0) for block in (1, 2)]
        rig.device.mark().wait()
        assert all(copy.numpy().tobytes() == block_of(77).tobytes() for copy in copies)


def test_a_cache_that_has_slept_is_served_on(tmp_path):
    """Its memory is another one afterwards."""
    rig = Rig(ReferenceDevice(), tmp_path)
    rig.fill(3, 3)
    rig.run(Save(0, name_of(3), block=3, host_slot=0, disk_slot=None))
    sleeper = Sleeper([], [rig.kv_cache])
    sleeper.sleep()
    sleeper.wake()
    assert loaded(rig.run(Load(1, [Source(name_of(3), 0, None)], [5]))) == [(1, 1, ())]
    assert rig.device_bytes(5) == block_of(3).tobytes()
    rig.fill(4, 4)
    rig.run(Save(2, name_of(4), block=4, host_slot=1, disk_slot=None))
    assert rig.host.array(1).tobytes() == block_of(4).tobytes()
    rig.close()


def test_time_spent_behind_other_loads_is_theirs(rig):
    rig.run(*(Save(n, name_of(n), block=n, host_slot=n, disk_slot=n) for n in range(4)))
    begin = time.perf_counter()
    orders = [Load(10 + n, [Source(name_of(n % 4), n % 4, None)], [4 + n % 8]) for n in range(200)]
    orders += [Load(300 + n, [Source(name_of(0), 4 + n % 4, 0)], [4]) for n in range(50)]
    news = rig.run(*orders)
    took = time.perf_counter() - begin
    for kind in (range(10, 210), range(300, 350)):
        assert 0 < sum(one.seconds for one in news if one.ticket in kind) <= took


class Model:
    """One order after the other, in dictionaries."""

    def __init__(self, rig):
        self.device = {block: rig.device_bytes(block) for block in range(BLOCKS)}
        self.host: dict[int, tuple[bytes, bytes]] = {}
        self.disk: dict[int, tuple[bytes, bytes]] = {}

    def run(self, order, written):
        """What should be told of the order; whether a write found room in the queue is for the queue to say."""
        if isinstance(order, Save):
            self.host[order.host_slot] = order.name, self.device[order.block]
            if order.disk_slot is not None and written[order.ticket]:
                self.disk[order.disk_slot] = self.host[order.host_slot]
            return None
        bad = []
        for source in order.sources:
            if source.disk_slot is not None:
                self.host.pop(source.host_slot, None)
                held = self.disk.get(source.disk_slot)
                if held is not None and held[0] == source.name:
                    self.host[source.host_slot] = held
        for i, (source, block) in enumerate(zip(order.sources, order.blocks, strict=True)):
            held = self.host.get(source.host_slot)
            if held is None or held[0] != source.name:
                bad.append(i)
            elif not bad:
                self.device[block] = held[1]
        return (order.ticket, bad[0] if bad else len(order.sources), tuple(bad))


def random_order(rnd, ticket, model, host_slots, disk_slots):
    if rnd.random() < 0.5:
        disk_slot = rnd.choice([None, rnd.randrange(disk_slots)])
        return Save(
            ticket, name_of(rnd.randrange(5)), rnd.randrange(BLOCKS), rnd.randrange(host_slots), disk_slot
        )
    sources = []
    for host_slot in rnd.sample(range(host_slots), rnd.randrange(1, 5)):
        disk_slot = rnd.choice([None, rnd.randrange(disk_slots)])
        held = model.host.get(host_slot) if disk_slot is None else model.disk.get(disk_slot)
        name = held[0] if held is not None and rnd.random() < 0.9 else name_of(rnd.randrange(5))
        sources.append(Source(name, host_slot, disk_slot))
    return Load(ticket, sources, rnd.sample(range(BLOCKS), len(sources)))


def damage(rnd, rig, model):
    """One bit in a host slot or in a record on disk."""
    if rnd.random() < 0.5:
        slot = rnd.randrange(rig.host.slots)
        rig.host.array(slot)[rnd.randrange(BYTES)] ^= 1 << rnd.randrange(8)
        model.host.pop(slot, None)
    elif model.disk:
        slot = rnd.choice(sorted(model.disk))
        with open(rig.disk.path, "r+b") as file:
            place = PAGE + slot * 2 * PAGE + rnd.choice([rnd.randrange(72), PAGE + rnd.randrange(BYTES)])
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << rnd.randrange(8)]))
        del model.disk[slot]


@pytest.mark.parametrize("seed", range(4))
def test_random_orders_as_one_after_the_other(rig, seed):
    rnd = random.Random(seed)
    for block in range(BLOCKS):
        rig.fill(block, 1000 * seed + block)
    model = Model(rig)
    ticket = sound = 0
    for _ in range(40):
        orders = []
        for _ in range(rnd.randrange(1, 12)):
            ticket += 1
            orders.append(random_order(rnd, ticket, model, rig.host.slots, rig.disk.slots))
        before, cut = rig.expected, rnd.randrange(len(orders))
        rig.start(*orders[:cut])
        rig.start(*orders[cut:])
        news = rig.hear_all()[before:]
        assert all(one.host for one in news if isinstance(one, Saved))
        written = {one.ticket: one.disk for one in news if isinstance(one, Written)}
        expected = [model.run(order, written) for order in orders]
        assert sorted(loaded(news)) == [one for one in expected if one is not None]
        sound += sum(count for _, count, _ in loaded(news))
        assert {block: rig.device_bytes(block) for block in range(BLOCKS)} == model.device
        for slot, (name, content) in model.host.items():
            assert rig.host.check(slot, name)
            assert rig.host.array(slot).tobytes() == content
        if rnd.random() < 0.4:
            damage(rnd, rig, model)
        if rnd.random() < 0.2 and model.disk:
            voided = rnd.choice(sorted(model.disk))
            rig.start(void=[voided])
            del model.disk[voided]
    assert sound > 50
    rig.close()
    again = DiskTier(rig.disk.path, rig.disk.slots, BYTES, b"test")
    found = again.recover()
    assert {name for name, _ in model.disk.values()} <= {name for _, name in found}
    for slot, name in found:
        into = np.zeros(BYTES, dtype=np.uint8)
        if again.read(slot, name, into) is not None:
            assert model.disk[slot] == (name, into.tobytes())
        else:
            assert slot not in model.disk, "it was damaged"
    again.close()


# what fails


class Gated(DiskTier):
    """A disk that answers when it is let, and fails when it is told to."""

    def __init__(self, *args):
        super().__init__(*args)
        self.reads, self.writes = threading.Event(), threading.Event()
        self.reads.set()
        self.writes.set()
        self.writing = threading.Event()
        self.error: Exception | None = None

    def read(self, slot, name, into):
        assert self.reads.wait(LONG)
        if self.error:
            raise self.error
        return super().read(slot, name, into)

    def write(self, slot, name, data, known):
        self.writing.set()
        assert self.writes.wait(LONG)
        if self.error:
            raise self.error
        return super().write(slot, name, data, known)


@pytest.fixture
def gated(tmp_path):
    rig = Rig(ReferenceDevice(), tmp_path, disk_class=Gated)
    yield rig
    rig.disk.reads.set()
    rig.disk.writes.set()
    rig.close()


def test_a_load_is_cut_at_the_first_bad_source(reference):
    for n in range(4):
        reference.fill(n, n)
    reference.run(*(Save(n, name_of(n), block=n, host_slot=n, disk_slot=n) for n in range(4)))
    reference.host.array(1)[5] ^= 1
    before = reference.device_bytes(9), reference.device_bytes(10)
    sources = [Source(name_of(0), 4, 0), Source(name_of(1), 1, None), Source(name_of(2), 2, None)]
    sources.append(Source(name_of(7), 5, 3))  # not what lies there
    assert loaded(reference.run(Load(9, sources, [8, 9, 10, 11]))) == [(9, 1, (1, 3))]
    assert reference.device_bytes(8) == block_of(0).tobytes()
    assert (reference.device_bytes(9), reference.device_bytes(10)) == before
    assert not reference.host.check(5, name_of(3))


def test_a_slow_disk_holds_up_nobody_else(gated):
    for n in range(3):
        gated.fill(n, n)
    gated.run(*(Save(n, name_of(n), block=n, host_slot=n, disk_slot=n) for n in range(3)))
    gated.disk.reads.clear()
    gated.start(Load(10, [Source(name_of(0), 5, 0)], [8]))
    gated.start(Load(11, [Source(name_of(0), 5, None)], [9]))  # what the one before is to bring
    heard = gated.expected - 2
    gated.start(
        Load(12, [Source(name_of(1), 1, None)], [10]), Save(13, name_of(9), block=3, host_slot=6, disk_slot=4)
    )
    heard += 3
    news = gated.hear(heard)[-3:]
    assert {one.ticket for one in news} == {12, 13}
    gated.disk.reads.set()
    assert loaded(gated.hear_all()[-2:]) == [(10, 1, ()), (11, 1, ())]
    assert gated.device_bytes(8) == gated.device_bytes(9) == block_of(0).tobytes()


def test_what_a_disk_cannot_take_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_mover, "QUEUED_WRITES", 2)
    rig = Rig(ReferenceDevice(), tmp_path, disk_class=Gated)
    rig.disk.writes.clear()
    rig.start(Save(0, name_of(0), block=0, host_slot=0, disk_slot=0))
    assert rig.disk.writing.wait(LONG)  # taken out of the queue
    rig.start(*(Save(n, name_of(n), block=n, host_slot=n, disk_slot=n) for n in range(1, 6)))
    news = Counter((type(one), getattr(one, "disk", None)) for one in rig.hear(6 + 3))
    assert news == {(Saved, None): 6, (Written, False): 3}
    rig.disk.writes.set()
    written = {one.ticket: one.disk for one in rig.hear_all() if isinstance(one, Written)}
    assert written == {0: True, 1: True, 2: True, 3: False, 4: False, 5: False}
    rig.close()


def test_damage_in_memory_does_not_get_a_sound_record(gated):
    gated.disk.writes.clear()
    gated.start(*(Save(n, name_of(n), block=n, host_slot=n, disk_slot=n) for n in range(2)))
    gated.hear(2)
    assert gated.disk.writing.wait(LONG)
    gated.host.array(0)[3] ^= 1  # while it is being written
    gated.host.array(1)[3] ^= 1  # before
    gated.disk.writes.set()
    written = {one.ticket: one.disk for one in gated.hear_all() if isinstance(one, Written)}
    assert not written[1]
    assert loaded(gated.run(Load(9, [Source(name_of(0), 5, 0)], [8]))) == [(9, 0, (0,))]


@pytest.mark.parametrize("error", [RuntimeError("what"), MemoryError()])
def test_a_disk_that_raises(gated, caplog, error):
    gated.run(Save(0, name_of(0), block=0, host_slot=0, disk_slot=0))
    gated.disk.error = error
    assert gated.run(Save(1, name_of(1), block=1, host_slot=1, disk_slot=1))[1] == Written(1, disk=False)
    sources = [Source(name_of(1), 1, None), Source(name_of(0), 2, 0)]
    for _ in range(2):
        assert loaded(gated.run(Load(2, sources, [8, 9]))) == [(2, 1, (1,))]
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2, "one for each kind"
    gated.disk.error = None
    assert loaded(gated.run(Load(3, sources, [8, 9]))) == [(3, 2, ())]


class Failing(ReferenceDevice):
    """Fails where it is told to, as a card that is lost would."""

    at = ""

    def mark(self):
        self._may_fail("mark")
        return super().mark()

    @contextmanager
    def beside(self, after, lane=0):
        self._may_fail("beside")
        with super().beside(after, lane):
            yield
            self._may_fail("end")

    def _may_fail(self, place):
        if self.at == place:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("at", ["mark", "beside", "end"])
def test_a_device_that_fails_is_news(tmp_path, at):
    device = Failing()
    rig = Rig(device, tmp_path)
    rig.fill(0, 5)
    rig.run(Save(0, name_of(0), block=0, host_slot=0, disk_slot=0))
    device.at = at
    assert rig.run(Save(1, name_of(1), block=1, host_slot=1, disk_slot=1)) == [
        Saved(1, False),
        Written(1, False),
    ]
    assert not rig.host.check(1, name_of(1))
    rig.run(Load(5, [Source(name_of(0), 3, 0)], [8]))  # brings it into slot 3, if not to the device
    assert rig.run(Save(6, name_of(0), block=0, host_slot=3, disk_slot=None)) == [Saved(6, False)]
    for source in (Source(name_of(0), 0, None), Source(name_of(0), 2, 0)):
        assert loaded(rig.run(Load(2, [source], [8]))) == [(2, 0, ())], "nothing is wrong with the source"
    device.at = ""
    assert loaded(rig.run(Load(3, [Source(name_of(0), 0, None)], [8]))) == [(3, 1, ())], "no thread has ended"
    rig.close()


def test_a_save_waits_for_no_later_step_than_its_own(tmp_path):
    """What was ordered at once is copied at once, and no more: the next mark may lie behind a long step."""
    marks, gate = [], threading.Event()

    class Watched(ReferenceDevice):
        @contextmanager
        def beside(self, after, lane=0):
            marks.append(after)
            assert gate.wait(LONG)
            with super().beside(after, lane):
                yield

    rig = Rig(Watched(), tmp_path)
    saves = [Save(n, name_of(n), block=n, host_slot=n, disk_slot=None) for n in range(5)]
    for some in (saves[:1], saves[1:3], saves[3:]):
        rig.start(*some)
    gate.set()
    rig.hear_all()
    assert len(marks) == len({id(mark) for mark in marks}) == 3
    rig.close()


def test_what_a_copy_may_still_touch_is_waited_for(tmp_path, monkeypatch):
    """A copy fails with others under way: nobody is told before they have ended."""
    ended: list[None] = []

    class Slow(ReferenceDevice):
        def mark(self):
            mark = super().mark()
            return type("Mark", (), {"wait": lambda _: ended.append(mark.wait())})()

    rig = Rig(Slow(), tmp_path)
    monkeypatch.setattr(rig.host, "rows", lambda first, count: 1 / 0)
    assert rig.run(Save(1, name_of(1), block=1, host_slot=1, disk_slot=None)) == [Saved(1, False)]
    assert len(ended) == 1
    rig.close()


def test_without_a_disk(tmp_path):
    device = ReferenceDevice()
    host = HostTier(device.pinned(2 * BYTES), 2, BYTES)
    mover = Mover(device, device.empty((BLOCKS, *SHAPE), torch.bfloat16), host)
    assert mover.recover() == []
    mover.start([Save(1, name_of(1), 1, 0, 0), Load(2, [Source(name_of(1), 1, 0)], [3])], void=[1])
    news: list[News] = []
    while len(news) < 3:
        assert mover.wait(LONG)
        news += mover.news()
    assert {Saved(1, True), Written(1, False)} <= {one for one in news if not isinstance(one, Loaded)}
    assert loaded(news) == [(2, 0, (0,))]
    mover.close()


def test_a_cache_and_slots_of_other_sizes_are_refused():
    device = ReferenceDevice()
    with pytest.raises(ValueError, match="blocks of 256 bytes, host slots of 200"):
        Mover(device, device.empty((BLOCKS, *SHAPE), torch.bfloat16), HostTier(device.pinned(400), 2, 200))


# the end


def test_closing_leaves_the_rest_to_nobody(gated):
    gated.run(Save(0, name_of(0), block=0, host_slot=0, disk_slot=0))
    gated.disk.writing.clear()
    gated.disk.writes.clear()
    gated.disk.reads.clear()
    gated.start(*(Save(n, name_of(n), block=n, host_slot=n, disk_slot=n) for n in range(1, 5)))
    gated.start(Load(9, [Source(name_of(0), 6, 0)], [8]), void=[0])
    assert gated.disk.writing.wait(LONG)
    closing = threading.Thread(target=gated.mover.close)
    closing.start()
    with gated.mover._changed:
        assert gated.mover._changed.wait_for(lambda: gated.mover._closing, LONG)
    gated.disk.reads.set()
    gated.disk.writes.set()
    closing.join()
    gated.close()  # twice is once
    news = gated.hear_all()
    written = {one.ticket: one.disk for one in news if isinstance(one, Written)}
    assert written == {0: True, 1: True, 2: False, 3: False, 4: False}, "what was under way, and no more"
    assert sum(isinstance(one, Saved) and one.host for one in news) == 5
    assert not gated.threads()
    again = DiskTier(gated.disk.path, 6, BYTES, b"test")
    assert again.recover() == [(1, name_of(1))], "what was void is void"
    again.close()
    assert gated.run(Save(10, name_of(3), 3, 3, 3)) == [Saved(10, False), Written(10, False)]
    assert loaded(gated.run(Load(11, [Source(name_of(1), 1, None)], [8]))) == [(11, 0, ())]


def test_a_disk_that_hangs_does_not_hold_up_the_end(gated, monkeypatch, caplog):
    gated.disk.writes.clear()
    gated.start(Save(1, name_of(1), block=1, host_slot=1, disk_slot=1))
    assert gated.disk.writing.wait(LONG)
    monkeypatch.setattr(mover_module, "CLOSE_S", 0.05)
    gated.mover.close()
    assert "given up" in caplog.text
    gated.disk.writes.set()
    assert gated.hear_all()[-1] == Written(1, True), "the file was still its own"
    monkeypatch.undo()


def test_nothing_is_awaited_for_ever(reference):
    assert not reference.mover.wait(0.0)
    assert reference.mover.news() == []
    reference.start()
    assert not reference.mover.wait(0.001)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], []),
        ([(3, 5)], [(3, 5, 1)]),
        ([(3, 5), (4, 6), (5, 7), (7, 8), (8, 10)], [(3, 5, 3), (7, 8, 1), (8, 10, 1)]),
        ([(3, 5), (2, 4), (2, 5)], [(3, 5, 1), (2, 4, 1), (2, 5, 1)]),
    ],
)
def test_neighbours_go_as_one(pairs, expected):
    assert list(runs(pairs)) == expected
