"""Against a real master: what goes to a Mooncake store comes back, and what it does when it is full, dead or hangs."""

import signal
import socket
import sys
import time

import numpy as np
import pytest

from tests.executor.stores.mooncake_master import LONG, Master, needed
from xllm.core.errors import ConfigError
from xllm.executor import remote_tier
from xllm.executor.host_tier import checksum
from xllm.executor.remote_tier import Pause, RemoteTier
from xllm.executor.stores.table import check_url, open_store

RECORD = 50_000
SEGMENT = {"segment": "64MiB"}


@pytest.fixture
def master(tmp_path):
    master = Master(tmp_path / "master.log")
    yield master
    master.kill()


class Client:
    """An engine's store and the memory it gave it."""

    def __init__(self, url):
        self.store = open_store(url)
        self.rows = np.zeros((64, RECORD), dtype=np.uint8)
        self.store.register(self.rows.reshape(-1))

    def put(self, *numbers):
        rows = [*self.rows[: len(numbers)]]
        for n, row in zip(numbers, rows, strict=True):
            row[:] = record(n)
        return self.store.put([key(n) for n in numbers], rows)

    def get(self, *numbers):
        rows = [*self.rows[: len(numbers)]]
        self.rows[:] = 0
        there = self.store.get([key(n) for n in numbers], rows)
        assert all(row.tobytes() == record(n).tobytes() for n, row, came in zip(numbers, rows, there, strict=True) if came)  # fmt: skip
        return there

    def exists(self, *numbers):
        return self.store.exists([key(n) for n in numbers])


def key(n):
    return f"realm-{n:032x}"


def record(n):
    return np.random.default_rng(n).integers(0, 256, RECORD, dtype=np.uint8)


def test_what_one_puts_another_gets(master):
    one, other = Client(master.url(**SEGMENT)), Client(master.url(segment="0"))
    assert one.put(*range(20)) == [True] * 20
    assert one.put(3) == [True], "it is there already"
    assert other.exists(0, 5, 99) == [True, True, False]
    assert other.get(19, 99, 3) == [True, False, True]
    assert other.put(40) == [True], "in the other's memory"
    assert one.get(40) == [True]
    one.store.remove([key(3), key(77)])
    assert other.get(3, 4) == [False, True]
    other.store.close()
    one.store.close()


def test_a_full_store_gives_up_old_blocks_or_takes_no_new_ones(master):
    client = Client(master.url(segment="16MiB"))
    stored = [client.put(n)[0] for n in range(600)]
    assert sum(stored) > 200
    assert not all(stored)
    last = max(n for n, there in enumerate(stored) if there)
    assert client.get(last) in ([True], [False])
    client.store.close()


def test_a_record_of_another_length_is_not_there(master):
    client = Client(master.url(**SEGMENT))
    row = client.rows[0]
    client.store.put([key(1)], [row[: RECORD // 2]])
    assert client.get(1) == [False]
    client.store.put([key(2)], [client.rows[:2].reshape(-1)])
    assert client.get(2) == [False]
    client.store.close()


def test_an_engine_that_is_gone_takes_its_memory_with_it(master):
    one, other = Client(master.url(**SEGMENT)), Client(master.url(**SEGMENT))
    one.put(*range(10))
    one.store.close()
    assert other.exists(0) in ([False], [True])
    assert other.get(*range(10)).count(True) in range(11), "or it raises nothing and says no"
    assert other.put(50) == [True]
    other.store.close()


def test_nobody_there_is_said_at_once():
    needed()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"no Mooncake master can be reached at 127.0.0.1:{port}"):
        open_store(f"mooncake://127.0.0.1:{port}")
    assert time.monotonic() - begin < 10


def test_without_the_package_a_sentence_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match="needs the package mooncake-transfer-engine"):
        check_url("mooncake://127.0.0.1:50051")


def test_the_memory_it_lends_is_known_beforehand():
    needed()
    assert check_url("mooncake://127.0.0.1:1?segment=3GiB") == 3 << 30
    assert check_url("mooncake://127.0.0.1") == 1 << 30


BLOCK = RECORD - remote_tier.HEADER


def put(tier, n):
    name, data = n.to_bytes(16, "big"), record(n)[:BLOCK]
    return tier.put([(name, data, checksum(name, data))], tier.realm)


def get(tier, n):
    into = np.zeros(BLOCK, dtype=np.uint8)
    (known,) = tier.get([(n.to_bytes(16, "big"), into)], tier.realm)
    assert known is None or into.tobytes() == record(n)[:BLOCK].tobytes()
    return known is not None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_master_that_dies_or_hangs(master, monkeypatch, how):
    monkeypatch.setattr(remote_tier, "CALL_S", 1.0)
    tier = RemoteTier(open_store(master.url(**SEGMENT)), BLOCK, b"model")
    assert put(tier, 1) == [True]
    assert get(tier, 1)
    master.signal(how)
    for use in (
        lambda: put(tier, 2),
        lambda: get(tier, 2),
        lambda: tier.count([bytes(16)], tier.realm),
        lambda: get(tier, 1),
    ):
        tier.pause = Pause()
        begin = time.monotonic()
        assert use() in ([False], False, None)
        assert time.monotonic() - begin < 2.0
        assert tier.pause.left > 0
    if how == signal.SIGSTOP:
        master.signal(signal.SIGCONT)
    else:
        master.kill()
        master.start()
    deadline = time.monotonic() + 2 * LONG
    while put(tier, 3) != [True] or not get(tier, 3):  # once the client has found the master again
        assert time.monotonic() < deadline
        tier.pause = Pause()
        time.sleep(0.1)
    tier.close()
