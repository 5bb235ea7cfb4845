"""etcd is gone for a minute at the settings that a service runs with: RELIABILITY 15 for the registry's part."""

import asyncio
from typing import Any

import pytest

from tests.cluster.real import Counter, instance, until
from xllm.cluster.etcd import Etcd
from xllm.cluster.membership import Joined, Left, Membership
from xllm.cluster.registration import Registration

INSTANCES, DEAD, ROUTERS, AWAY_S = 20, 5, 3, 60


@pytest.mark.slow
@pytest.mark.parametrize("wiped", [False, True])
async def test_a_minute_without_etcd(child, keys, wiped):
    clients = [Etcd(child.url) for _ in range(INSTANCES + ROUTERS)]
    ones: list[Any] = [Registration(clients[n], keys, instance(f"i{n}"), Counter()) for n in range(INSTANCES)]
    for one in ones:
        await one.start()
    routers = [Membership(client, keys) for client in clients[INSTANCES:]]
    changes: list[Any] = []

    async def collect(router: Membership) -> None:
        async for change in router.changes():
            changes.append(change)  # noqa: PERF401 (seen while it goes on)

    for router in routers:
        assert await router.start()
        assert len(router.snapshot()) == INSTANCES
    readers = [asyncio.create_task(collect(router)) for router in routers]
    child.kill()
    for one in ones[:DEAD]:
        one._task.cancel()
    await until(lambda: all(r.stale_s > AWAY_S for r in routers), timeout_s=AWAY_S + 10)
    assert all(len(r.snapshot()) == INSTANCES for r in routers)
    if wiped:
        child.wipe()
    await asyncio.to_thread(child.start)

    alive = {one.info.id for one in ones[DEAD:]}
    took_s = await until(lambda: all(r.snapshot().keys() == alive for r in routers), timeout_s=20)
    # the same data: leases of the dead live again for as long as they were given for
    assert took_s < 10
    before: dict[str, Any] = dict(routers[0].snapshot())
    await until(lambda: all(routers[0].snapshot()[i].load != before[i].load for i in alive))
    assert {c.member.info.id for c in changes if isinstance(c, Left)} == {o.info.id for o in ones[:DEAD]}
    assert len([c for c in changes if isinstance(c, Joined)]) == INSTANCES * ROUTERS
    for reader in readers:
        reader.cancel()
    await asyncio.gather(
        *readers, *(r.close() for r in routers), *(o.close() for o in ones), return_exceptions=True
    )
    await asyncio.gather(*(c.aclose() for c in clients))
