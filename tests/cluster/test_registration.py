"""An instance stays registered through whatever happens to etcd, and only the newest incarnation of an id is."""

import asyncio
import time

import pytest

from tests.cluster.real import TTL_S, Counter, instance, until
from xllm.cluster.etcd import Etcd
from xllm.cluster.instance import InstanceInfo, LoadSummary, decode
from xllm.cluster.registration import Registration, Superseded, next_epoch


@pytest.fixture
async def register(keys):
    """Starts registrations that end with the test."""
    made: list[Registration] = []

    async def start(etcd: Etcd, info: InstanceInfo, load=None) -> Registration:
        one = Registration(etcd, keys, info, load or Counter(), ttl_s=TTL_S, load_s=0.2)
        made.append(one)
        await one.start()
        return one

    yield start
    await asyncio.gather(*(one.close() for one in made))


async def stored(etcd: Etcd, keys, id: str = "a") -> InstanceInfo | None:
    found = (await etcd.range(keys.instance(id))).kvs
    return decode(found[0].value, InstanceInfo) if found else None


async def load(etcd: Etcd, keys) -> LoadSummary:
    return decode((await etcd.range(keys.load("a"))).kvs[0].value, LoadSummary)


async def becomes(etcd: Etcd, keys, info: InstanceInfo | None) -> None:
    begin = time.monotonic()
    while (found := await stored(etcd, keys)) != info:
        assert time.monotonic() - begin < 15, found
        await asyncio.sleep(0.05)


async def test_it_is_there_longer_than_its_lease_and_gone_when_it_leaves(shared, keys, register):
    one = await register(shared, instance())
    assert one.registered.is_set()
    first, begin = await load(shared, keys), time.monotonic()
    while time.monotonic() - begin < TTL_S + 0.8:
        assert await stored(shared, keys) == instance()
        await asyncio.sleep(0.1)
    assert (await load(shared, keys)).sequence > first.sequence + 3
    await one.close()
    assert await stored(shared, keys) is None
    assert [kv.key for kv in (await shared.list(keys.root)).kvs] == [keys.epoch("a")]


async def test_what_changes_is_written(shared, keys, register):
    one = await register(shared, instance())
    one.update(instance(draining=True, role="decode"))
    await becomes(shared, keys, instance(draining=True, role="decode"))
    assert not one.superseded.is_set()


@pytest.mark.parametrize("wiped", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_etcd_dies_and_returns(child, etcd, keys, register, wiped):
    one = await register(etcd, instance())
    child.kill()
    if wiped:
        child.wipe()
    else:
        await asyncio.sleep(TTL_S + 0.5)  # the lease is over by any clock
    await asyncio.to_thread(child.start)
    await becomes(etcd, keys, instance())
    before = one._load.asked
    await until(lambda: one._load.asked > before + 2)
    assert (await load(etcd, keys)).sequence > before
    assert not one.superseded.is_set()


async def test_it_starts_without_etcd(child, etcd, keys, register):
    child.stop()
    one = await register(etcd, instance())
    assert not one.registered.is_set()
    await asyncio.to_thread(child.start)
    await becomes(etcd, keys, instance())
    await until(one.registered.is_set)


async def test_a_lease_that_is_taken_away_is_asked_for_again(shared, keys, register):
    one = await register(shared, instance())
    await shared.revoke(one._lease.id)
    await becomes(shared, keys, instance())


async def test_a_newer_incarnation_wins_and_the_older_is_told(shared, keys, register):
    old = await register(shared, instance(epoch=1))
    new = await register(shared, instance(epoch=2))
    await until(old.superseded.is_set, "the old one hears of it")
    assert not old.registered.is_set() and new.registered.is_set()
    await old.close()  # takes nothing of the newer one's away
    assert await stored(shared, keys) == instance(epoch=2)
    await new.close()
    with pytest.raises(Superseded, match="epoch 2"):  # though nobody is registered
        await register(shared, instance(epoch=1))
    assert await stored(shared, keys) is None
    with pytest.raises(Superseded):  # another process of the same epoch
        await register(shared, instance(epoch=2))
    assert await next_epoch(shared, keys, "a") > 2


async def test_one_that_sleeps_for_longer_than_its_lease_finds_its_id_taken(shared, keys, register):
    """As a process that was stopped: its task does not run, its lease ends, another takes over and goes again."""
    old = await register(shared, instance(epoch=1))
    old._task.cancel()
    begin = time.monotonic()
    await becomes(shared, keys, None)
    assert time.monotonic() - begin < TTL_S + 2
    new = await register(shared, instance(epoch=2))
    await new.close()
    old._task = asyncio.create_task(old._run())
    await until(old.superseded.is_set)
    assert await stored(shared, keys) is None


async def test_after_a_wipe_the_newer_incarnation_wins_whoever_is_first(child, etcd, keys, register):
    new = await register(etcd, instance(epoch=5))
    child.kill()
    child.wipe()
    await asyncio.to_thread(child.start)
    other = Etcd(child.url)
    new._task.cancel()  # it has not noticed yet
    old = await register(other, instance(epoch=4))
    assert await stored(other, keys) == instance(epoch=4)
    new._task = asyncio.create_task(new._run())
    await becomes(other, keys, instance(epoch=5))
    await until(old.superseded.is_set)
    await old.close()
    await other.aclose()


async def test_two_incarnations_race(shared, keys, register):
    """Whatever the order of their transactions, the highest epoch stands in the end and the others know."""
    done = await asyncio.gather(
        *(register(shared, instance(epoch=n)) for n in (3, 1, 6, 2, 5, 4)), return_exceptions=True
    )
    assert all(isinstance(one, Registration | Superseded) for one in done)
    alive = [one for one in done if isinstance(one, Registration)]
    await until(lambda: all(one.superseded.is_set() for one in alive if one.info.epoch < 6))
    assert await stored(shared, keys) == instance(epoch=6)


async def test_a_load_that_cannot_be_told_does_not_end_the_registration(shared, keys, register, caplog):
    counter = Counter()

    def sometimes() -> LoadSummary:
        if 2 <= counter().sequence <= 4:
            raise ZeroDivisionError
        return counter()

    one = await register(shared, instance(), sometimes)
    await until(lambda: counter.asked > 8)
    assert await stored(shared, keys) == instance() and not one.superseded.is_set()
    assert "ZeroDivisionError" in caplog.text


async def test_leaving_does_not_wait_for_an_etcd_that_is_away(child, etcd, register):
    one = await register(etcd, instance())
    child.kill()
    begin = time.monotonic()
    await one.close()
    assert time.monotonic() - begin < 3
