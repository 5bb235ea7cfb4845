"""The gateway client against a real etcd, and against nobody."""

import asyncio
import contextlib
import os
import signal
import time

import pytest

from tests.cluster.real import TTL_S
from tests.processes import freeze
from xllm.cluster.etcd import Compacted, Etcd, EtcdError, EtcdUnavailable, end_of
from xllm.cluster.etcd_types import Compare, Put
from xllm.core.errors import ConfigError


async def test_keys_are_bytes(shared, keys):
    key, value = keys.root + b"\x00\xff\n", bytes(range(256))
    revision = await shared.put(key, value)
    found = (await shared.list(keys.root)).kvs
    assert [(kv.key, kv.value, kv.mod_revision, kv.create_revision) for kv in found] == [
        (key, value, revision, revision)
    ]
    assert (await shared.range(key + b"?")).kvs == []


async def test_newest_only(shared, keys):
    for name in (b"b", b"c", b"a"):
        await shared.put(keys.root + name, b"1")
    found = await shared.range(keys.root, end_of(keys.root), newest_only=True)
    assert (found.count, [kv.key for kv in found.kvs], found.kvs[0].value) == (3, [keys.root + b"a"], b"")


async def test_a_transaction_compares(shared, keys):
    key = keys.root + b"k"
    free = Compare(key, "CREATE", 0)
    first = await shared.txn([free], [Put(key, b"1"), Put(keys.root + b"l", b"2")])
    again = await shared.txn([free], [Put(key, b"3")])
    assert (first.succeeded, again.succeeded) == (True, False)
    changed = await shared.txn([Compare(key, "MOD", first.revision)], [Put(key, b"4")])
    assert changed.succeeded and changed.revision > first.revision
    assert [kv.value for kv in (await shared.list(keys.root)).kvs] == [b"4", b"2"]


async def test_leases(shared, keys):
    lease, ttl = await shared.grant(TTL_S)
    assert ttl >= TTL_S
    await shared.put(keys.root + b"k", b"1", lease)
    assert await shared.keep_alive(lease) == ttl
    await shared.revoke(lease)
    assert (await shared.list(keys.root)).count == 0
    assert await shared.keep_alive(lease) == 0
    await shared.revoke(lease)  # gone already
    with pytest.raises(EtcdError, match="lease not found") as e:
        await shared.put(keys.root + b"k", b"1", lease)
    assert e.value.grpc_code == 5 and not isinstance(e.value, EtcdUnavailable)


async def test_a_watch_tells_what_was_and_what_comes(shared, keys):
    revision = await shared.put(keys.root + b"k", b"1")
    lease, _ = await shared.grant(60)
    watch = shared.watch(keys.root, revision)
    events = []
    async with contextlib.aclosing(watch):
        async for batch in watch:
            events += [(e.kind, e.kv.value, e.kv.mod_revision - revision) for e in batch.events]
            if len(events) == 1:
                await shared.put(keys.root + b"l", b"2", lease)
            elif len(events) == 2:
                await shared.revoke(lease)
            elif len(events) == 3:
                break
    assert [(kind, value) for kind, value, _ in events] == [("put", b"1"), ("put", b"2"), ("delete", b"")]
    assert events[0][2] < events[1][2] < events[2][2]


async def test_a_watch_of_the_past_is_refused_once_that_is_compacted(etcd, keys):
    revision = 0
    for n in range(3):
        revision = await etcd.put(keys.root + b"k", b"%d" % n)
    await etcd.compact(revision)
    with pytest.raises(Compacted) as e:
        async for _ in etcd.watch(keys.root, 1):
            pass
    assert e.value.revision == revision


async def test_the_next_endpoint_is_asked(shared_child, keys):
    etcd = Etcd(f"http://127.0.0.1:9, {shared_child.url}/")
    try:
        await etcd.put(keys.root + b"k", b"1")
        assert etcd.current == 1
        assert (await etcd.list(keys.root)).count == 1
    finally:
        await etcd.aclose()


async def test_nobody_there():
    etcd = Etcd("http://127.0.0.1:9")
    with pytest.raises(EtcdUnavailable, match=r"127\.0\.0\.1:9"):
        await etcd.put(b"k", b"v")
    with pytest.raises(EtcdUnavailable, match="watch"):
        await anext(etcd.watch(b"k", 1))
    await etcd.aclose()


async def test_one_that_hangs_is_waited_for_no_longer_than_said(child, keys):
    etcd = Etcd(child.url, timeout_s=0.3)
    freeze(child.pid)
    try:
        begin = time.monotonic()
        with pytest.raises(EtcdUnavailable):
            await etcd.list(keys.root)
        assert time.monotonic() - begin < 3
    finally:
        os.kill(child.pid, signal.SIGCONT)
        await etcd.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\nsad",
        b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{",
        b"not HTTP at all\r\n\r\n",
    ],
)
async def test_something_else_that_listens_there(answer):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    etcd = Etcd(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(EtcdUnavailable):
        await etcd.range(b"k")
    with pytest.raises(EtcdUnavailable):
        async for _ in etcd.watch(b"k", 1):
            pass
    await etcd.aclose()
    server.close()


@pytest.mark.parametrize(
    "urls", ["", " , ", "127.0.0.1:2379", ["etcd://a"], "http://", "http://h:port", "http://me:secret@h"]
)
def test_urls_that_are_none(urls):
    with pytest.raises(ConfigError, match="http://") as e:
        Etcd(urls)
    assert "secret" not in e.value.message
