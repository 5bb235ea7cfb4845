"""What a router knows stays right through kills, wipes, compactions, hangs and cut cables; nobody is lost for etcd's sake."""

import asyncio
import contextlib
import os
import signal
from urllib.parse import urlsplit

import pytest

from tests.cluster.real import TTL_S, Cable, Counter, instance, until
from tests.processes import freeze
from xllm.cluster.etcd import Etcd
from xllm.cluster.instance import LoadSummary, encode
from xllm.cluster.membership import Changed, Joined, Left, Member, Membership, differences
from xllm.cluster.registration import Registration

GRACE_S = 2.0


@pytest.fixture
async def cluster(keys):
    """Opens instances and memberships on one etcd; closes them all."""
    async with contextlib.AsyncExitStack() as stack:

        class Cluster:
            async def join(self, url: str, id: str, epoch: int = 1) -> Registration:
                etcd = Etcd(url, timeout_s=1.0)
                stack.push_async_callback(etcd.aclose)
                one = Registration(etcd, keys, instance(id, epoch), Counter(), ttl_s=TTL_S, load_s=0.3)
                stack.push_async_callback(one.close)
                await one.start()
                return one

            async def watch(self, url: str, kind: type[Etcd] = Etcd) -> Membership:
                etcd = kind(url, timeout_s=1.0)
                stack.push_async_callback(etcd.aclose)
                membership = Membership(etcd, keys, grace_s=GRACE_S, probe_s=0.3)
                stack.push_async_callback(membership.close)
                await membership.start(0.5)
                return membership

        yield Cluster()


@contextlib.asynccontextmanager
async def kept(membership: Membership):
    """Collects changes meanwhile."""
    found: list = []

    async def collect() -> None:
        async for change in membership.changes():
            found.append(change)  # noqa: PERF401 (seen while it goes on)

    task = asyncio.create_task(collect())
    await asyncio.sleep(0)
    yield found
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def ids(membership: Membership) -> str:
    return "".join(sorted(membership.snapshot()))


async def test_who_comes_changes_and_goes(shared_child, cluster):
    await cluster.join(shared_child.url, "a")
    membership = await cluster.watch(shared_child.url)
    assert ids(membership) == "a" and membership.stale_s == 0
    async with kept(membership) as changes:
        b = await cluster.join(shared_child.url, "b")
        await until(lambda: ids(membership) == "ab")
        old = membership.snapshot()
        await until(lambda: membership.snapshot()["b"].load.sequence > old["b"].load.sequence)
        assert old["b"].load != membership.snapshot()["b"].load, "a snapshot does not change"
        b.update(instance("b", draining=True))
        await until(lambda: membership.snapshot()["b"].info.draining)
        await b.close()
        assert await until(lambda: ids(membership) == "a") < 2
        await until(lambda: any(isinstance(c, Left) for c in changes))
    of_b = [type(c).__name__ for c in changes if c.member.info.id == "b"]
    assert (of_b[0], of_b[-1], set(of_b[1:-1])) == ("Joined", "Left", {"Changed"})


async def test_another_incarnation_leaves_and_joins(shared_child, cluster):
    await cluster.join(shared_child.url, "a", 1)
    membership = await cluster.watch(shared_child.url)
    async with kept(membership) as changes:
        await cluster.join(shared_child.url, "a", 2)
        await until(lambda: membership.snapshot()["a"].info.epoch == 2)
        await until(lambda: len([c for c in changes if isinstance(c, Joined)]) == 2)
    told = [(type(c).__name__, c.member.info.epoch) for c in changes if not isinstance(c, Changed)]
    assert told == [("Joined", 1), ("Left", 1), ("Joined", 2)]


@pytest.mark.parametrize("wiped", [False, True])
async def test_etcd_dies_and_one_instance_dies_meanwhile(child, cluster, wiped):
    await cluster.join(child.url, "a")
    b = await cluster.join(child.url, "b")
    membership = await cluster.watch(child.url)
    async with kept(membership) as changes:
        child.kill()
        b._task.cancel()
        await until(lambda: membership.stale_s > (0.5 if wiped else TTL_S), "it knows that it is stale")
        assert ids(membership) == "ab", "nobody leaves while etcd is away"
        if wiped:
            child.wipe()
        await asyncio.to_thread(child.start)
        await until(lambda: membership.stale_s == 0, "it is back")
        assert ids(membership) == "ab", "nobody leaves at once"
        assert await until(lambda: ids(membership) == "a") < 10
        before = membership.snapshot()["a"].load.sequence
        await until(lambda: membership.snapshot()["a"].load.sequence > before, "loads come")
    assert [c.member.info.id for c in changes if isinstance(c, Left)] == ["b"]
    assert len([c for c in changes if isinstance(c, Joined)]) == 2


async def test_etcd_stands_still_for_longer_than_the_leases(child, cluster):
    await cluster.join(child.url, "a")
    membership = await cluster.watch(child.url)
    async with kept(membership) as changes:
        freeze(child.pid)
        try:
            await until(lambda: membership.stale_s > TTL_S + 0.5)
        finally:
            os.kill(child.pid, signal.SIGCONT)
        await until(lambda: membership.stale_s == 0)
        before = membership.snapshot()["a"].load.sequence
        await until(lambda: membership.snapshot()["a"].load.sequence > before + 2)
    assert not [c for c in changes if isinstance(c, Left)]


async def test_compaction_between_list_and_watch(child, etcd, keys, cluster):
    lists = []

    class Unlucky(Etcd):
        async def list(self, prefix):
            found = await super().list(prefix)
            lists.append(found.revision)
            if len(lists) == 1:
                await etcd.put(keys.instance("b"), encode(instance("b")))
                await etcd.compact(await etcd.put(keys.load("b"), encode(LoadSummary(1))))
            return found

    await etcd.put(keys.instance("a"), encode(instance("a")))
    membership = await cluster.watch(child.url, Unlucky)
    await until(lambda: ids(membership) == "ab")
    assert len(lists) == 2 and membership.snapshot()["b"].load == LoadSummary(1)


async def test_compaction_while_the_cable_is_cut(child, etcd, keys, cluster):
    for id in "abc":
        await etcd.put(keys.instance(id), encode(instance(id)))
    async with Cable(urlsplit(child.url).port) as cable:
        membership = await cluster.watch(cable.url)
        assert ids(membership) == "abc"
        cable.cut()
        await until(lambda: membership.stale_s > 0)
        lease, _ = await etcd.grant(60)
        await etcd.put(keys.instance("a"), encode(instance("a")), lease)
        await etcd.put(keys.instance("d"), encode(instance("d")))
        await etcd.revoke(lease)  # a leaves while nobody here can see it
        await etcd.compact((await etcd.list(keys.root)).revision)
        cable.mend()
        await until(lambda: "d" in membership.snapshot())
        assert ids(membership) == "abcd"
        assert await until(lambda: ids(membership) == "bcd") < 10
        await membership.close()


async def test_a_watch_that_brings_nothing_is_replaced(shared_child, keys, cluster):
    watches = []

    class Deaf(Etcd):
        async def watch(self, prefix, start_revision):
            watches.append(start_revision)
            async for batch in super().watch(prefix, start_revision):
                if len(watches) > 1 or not batch.events:
                    yield batch

    membership = await cluster.watch(shared_child.url, Deaf)
    await cluster.join(shared_child.url, "a")
    assert await until(lambda: ids(membership) == "a") < 5
    assert len(watches) == 2


async def test_it_starts_without_etcd(child, cluster):
    child.stop()
    membership = await cluster.watch(child.url)
    assert membership.stale_s == float("inf") and not membership.snapshot()
    await asyncio.to_thread(child.start)
    await cluster.join(child.url, "a")
    await until(lambda: ids(membership) == "a")
    assert membership.stale_s == 0


async def test_entries_that_cannot_be_read_are_passed_over(shared, shared_child, keys, cluster):
    await shared.put(keys.instance("x"), b"not json")
    await shared.put(keys.instance("y"), b'{"v":99,"body":{}}')
    await shared.put(keys.root + b"\xff/\xff", b"")
    await cluster.join(shared_child.url, "a")
    membership = await cluster.watch(shared_child.url)
    assert ids(membership) == "a"


async def test_a_late_reader_gets_everybody_and_a_slow_one_the_last_state(
    shared, shared_child, keys, cluster
):
    await shared.put(keys.instance("a"), encode(instance("a")))
    membership = await cluster.watch(shared_child.url)
    changes = membership.changes()
    assert await anext(changes) == Joined(Member(instance("a")))
    for n in range(50):
        await shared.put(keys.load("a"), encode(LoadSummary(n)))
    await until(lambda: membership.snapshot()["a"].load == LoadSummary(49))
    assert await anext(changes) == Changed(Member(instance("a"), LoadSummary(49)))
    await changes.aclose()


def test_differences():
    a, b, newer = Member(instance("a")), Member(instance("b")), Member(instance("a", 2))
    assert differences({}, {"a": a}) == [Joined(a)]
    assert differences({"a": a, "b": b}, {"a": newer}) == [Left(a), Left(b), Joined(newer)]
    assert differences({"a": a}, {"a": a}) == []
    assert differences({"a": a}, {"a": Member(a.info, LoadSummary(1))}) == [
        Changed(Member(a.info, LoadSummary(1)))
    ]
