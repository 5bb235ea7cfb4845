"""Never two who act: by the holder's own clock, by etcd's revisions, or both."""

import asyncio
import os
import signal

import pytest

from tests.cluster.real import TTL_S, until
from tests.processes import freeze
from xllm.cluster.etcd import Etcd
from xllm.cluster.etcd_types import Put
from xllm.cluster.leadership import Leadership
from xllm.core.errors import ConfigError

MARGIN_S = 0.5


@pytest.fixture
async def candidate(keys):
    made: list[tuple[Leadership, Etcd]] = []

    def make(url: str, owner: str) -> Leadership:
        etcd = Etcd(url, timeout_s=0.5)
        made.append((Leadership(etcd, keys, "planner", owner, ttl_s=TTL_S, margin_s=MARGIN_S), etcd))
        return made[-1][0]

    yield make
    for one, etcd in made:
        await one.resign()
        await etcd.aclose()


async def test_one_of_two_leads_and_the_next_after_it(shared_child, shared, keys, candidate):
    a, b = candidate(shared_child.url, "a"), candidate(shared_child.url, "b")
    first = await a.campaign()
    assert a.still_leader(first) and not a.still_leader(first - 1) and not b.still_leader(first)
    campaign = asyncio.create_task(b.campaign())
    await asyncio.sleep(TTL_S + 0.5)
    assert not campaign.done() and a.still_leader(first), "a lease that is renewed is not taken"
    assert await a.write(first, [Put(keys.root + b"plan", b"a")])
    await a.resign()
    second = await asyncio.wait_for(campaign, 5)
    assert second > first and b.still_leader(second) and not a.still_leader(first)
    assert not await a.write(first, [Put(keys.root + b"plan", b"late")])
    assert [kv.value for kv in (await shared.range(keys.root + b"plan")).kvs] == [b"a"]


async def test_a_leader_that_stops_knows_before_another_leads(shared_child, shared, keys, candidate):
    """Its task does not run, as in a process that is stopped; its clock goes on."""
    a, b = candidate(shared_child.url, "a"), candidate(shared_child.url, "b")
    first = await a.campaign()
    a._task.cancel()
    campaign = asyncio.create_task(b.campaign())
    await until(lambda: campaign.done() or not a.still_leader(first))
    assert not campaign.done()
    second = await asyncio.wait_for(campaign, 10)
    assert not a.still_leader(first) and second > first
    # one that stopped between the check and the act: etcd refuses what it writes, whatever its clock says
    a._fence, a._lease.certain_until = first, a._clock() + 60
    assert a.still_leader(first)
    assert not await a.write(first, [Put(keys.root + b"plan", b"late")])
    assert (await shared.range(keys.root + b"plan")).count == 0
    assert not a.still_leader(first)


async def test_it_gives_up_while_etcd_stands_still(child, candidate):
    a, b = candidate(child.url, "a"), candidate(child.url, "b")
    first = await a.campaign()
    campaign = asyncio.create_task(b.campaign())
    freeze(child.pid)
    try:
        await asyncio.wait_for(a.lost(first), TTL_S)
        assert not a.still_leader(first) and not campaign.done()
    finally:
        os.kill(child.pid, signal.SIGCONT)
    second = await asyncio.wait_for(campaign, 10)
    assert second > first and not a.still_leader(first)


async def test_a_wipe_does_not_make_two(child, candidate):
    a, b = candidate(child.url, "a"), candidate(child.url, "b")
    first = await a.campaign()
    campaign = asyncio.create_task(b.campaign())
    await until(lambda: b._newest > 0)
    child.kill()
    child.wipe()
    await asyncio.to_thread(child.start)
    while not campaign.done():
        assert not (b._fence and a.still_leader(first))
        await asyncio.sleep(0.01)
    assert b.still_leader(campaign.result()) and not a.still_leader(first)


async def test_many_campaign_and_each_leads_alone(shared_child, candidate):
    acting: list[str] = []
    fences: list[int] = []

    async def serve(name: str) -> None:
        one = candidate(shared_child.url, name)
        fence = await one.campaign()
        assert acting == []
        acting.append(name)
        fences.append(fence)
        await asyncio.sleep(0.05)
        assert one.still_leader(fence)
        acting.remove(name)
        await one.resign()

    await asyncio.gather(*(serve(str(n)) for n in range(4)))
    assert fences == sorted(set(fences)) and len(fences) == 4


def test_an_office_has_a_name(keys):
    with pytest.raises(ConfigError, match="office"):
        Leadership(Etcd("http://127.0.0.1:9"), keys, "a/b", "me")
