"""What only Mooncake's transfer engine does, or cannot do."""

import ctypes
import mmap
import signal
import sys
import threading
import time

import msgspec
import pytest
import torch

from tests.executor.transports.giving import LONG, Giver, contents, needs_mooncake
from tests.processes import freeze
from xllm.core.errors import ConfigError
from xllm.executor.transports import mooncake
from xllm.executor.transports.base import Blocks, Description, Settings, TransportError, pack
from xllm.executor.transports.mooncake import CONNECT_S
from xllm.executor.transports.mooncake_engines import SLOT_BYTES
from xllm.executor.transports.table import open_blocks, open_transport

MEMORY = contents(4, 100, 1)
SLACK_S = 3.0


@pytest.fixture
def opened():
    transports = []

    def open_over(memory, **more):
        transports.append(open_transport("mooncake", memory, **more))
        return transports[-1]

    yield open_over
    for transport in transports:
        transport.close()


@pytest.fixture
def given():
    givers = []

    def start(*asked, **more):
        givers.append(Giver("mooncake", *asked, **more))
        return givers[-1]

    yield start
    for giver in givers:
        giver.end()


def arrives(reading):
    deadline = time.monotonic() + LONG
    while not reading.wait(0.5):
        assert time.monotonic() < deadline
    return True


def changed(descriptor, **fields):
    return pack(msgspec.structs.replace(msgspec.msgpack.decode(descriptor, type=Description), **fields))


def test_without_the_package_it_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match="needs the package mooncake-transfer-engine"):
        open_transport("mooncake", MEMORY)


def test_a_cards_memory_is_refused():
    blocks = Blocks(MEMORY)
    blocks.on_card = True
    with pytest.raises(ConfigError, match="mooncake reads host memory only"):
        open_blocks("mooncake", blocks, Settings())


def test_ipv6_is_refused():
    with pytest.raises(ConfigError, match="there is no IPv6"):
        open_transport("mooncake", MEMORY, listen="::1")


@needs_mooncake
def test_an_engine_that_does_not_start_is_refused(monkeypatch):
    def fail(*_):
        raise OSError("there are no ports")

    monkeypatch.setattr(mooncake, "open_engine", fail)
    with pytest.raises(ConfigError, match="--kv-transport mooncake: there are no ports"):
        open_transport("mooncake", MEMORY)


@needs_mooncake
def test_blocks_longer_than_one_reading(opened):
    source = contents(5, 2 * SLOT_BYTES + 4099, 1)
    memory = torch.zeros_like(source)
    peer = opened(memory).connect(opened(source).descriptor())
    assert arrives(peer.read([0, 1, 4, 2], [3, 4, 0, 2]))
    assert torch.equal(memory[[3, 4, 0, 2]], source[[0, 1, 4, 2]])
    assert not memory[1].any()


@needs_mooncake
def test_a_process_that_listens_where_another_did_is_found_out(opened):
    there, here = opened(MEMORY), opened(torch.zeros_like(MEMORY))
    for _ in range(2):
        with pytest.raises(TransportError, match="the peer was started anew"):
            here.connect(changed(there.descriptor(), epoch=bytes(16)))
    assert arrives(here.connect(there.descriptor()).read([0], [0]))


@needs_mooncake
def test_nobody_there_and_places_that_make_no_sense(opened):
    there, here = opened(MEMORY), opened(torch.zeros_like(MEMORY))
    host, port, address, epoch = msgspec.msgpack.decode(
        msgspec.msgpack.decode(there.descriptor(), type=Description).place
    )
    for place, told in (
        ((host, 1, address, epoch), "cannot be reached"),
        (("no-such-host.invalid", port, address, epoch), "cannot be reached"),
        ((host, port, address, 4096), "has gone, or does not give out"),
        ((host, port), "cannot be read"),
    ):
        with pytest.raises(TransportError, match=told):
            here.connect(changed(there.descriptor(), place=msgspec.msgpack.encode(place)))
    peer = here.connect(changed(there.descriptor(), place=msgspec.msgpack.encode((host, port, 4096, epoch))))
    with pytest.raises(TransportError, match="does not give out"):
        arrives(peer.read([0], [0]))


@needs_mooncake
def test_one_that_is_stopped_keeps_nobody_else_waiting(opened, given):
    stopped, well = given(), given(seed=2)
    memory = torch.zeros(64, 1000, dtype=torch.uint8)
    transport = opened(memory)
    peer = transport.connect(well.descriptor)
    freeze(stopped.pid)
    failures = []

    def connect():
        begun = time.monotonic()
        with pytest.raises(TransportError, match="it does not answer"):
            transport.connect(stopped.descriptor)
        failures.append(time.monotonic() - begun)

    thread = threading.Thread(target=connect)
    thread.start()
    while thread.is_alive():
        assert arrives(peer.read([5, 6], [0, 1]))
        other = transport.connect(well.descriptor)
        assert arrives(other.read([7], [7]))
        other.close()
        thread.join(0.1)
    assert failures and failures[0] < CONNECT_S + SLACK_S
    assert torch.equal(memory[[0, 1]], well.blocks[[5, 6]])
    stopped.process.send_signal(signal.SIGCONT)
    assert arrives(transport.connect(stopped.descriptor).read([9], [9]))
    assert torch.equal(memory[9], stopped.blocks[9])


@needs_mooncake
def test_ways_that_ended_leave_their_engine_to_the_next(opened, given):
    giver = given()
    transport = opened(torch.zeros(64, 1000, dtype=torch.uint8))
    before = threading.active_count()
    for number in range(10):
        peer = transport.connect(giver.descriptor)
        assert arrives(peer.read([number], [number]))
        peer.close()
        time.sleep(0.02)
    assert threading.active_count() <= before + 3


@needs_mooncake
def test_more_peers_than_there_may_be_engines(opened, monkeypatch):
    monkeypatch.setattr(mooncake, "MOST_READERS", 1)
    there, here = opened(MEMORY), opened(torch.zeros_like(MEMORY))
    peer = here.connect(there.descriptor())
    with pytest.raises(TransportError, match="there can be no more"):
        here.connect(there.descriptor())
    assert arrives(peer.read([1], [1]))


@needs_mooncake
def test_memory_that_is_mapped_in_pieces(opened):
    """What is not mapped cannot be read, and hurts nobody."""
    with mmap.mmap(-1, 8 * mmap.PAGESIZE) as place:
        source = torch.frombuffer(place, dtype=torch.uint8).view(8, mmap.PAGESIZE)
        source[:] = contents(8, mmap.PAGESIZE, 1)
        memory = torch.zeros_like(source)
        there, here = opened(source, mapped=True), opened(memory)
        address = source.data_ptr()
        expected = source[:4].clone()
        assert arrives(here.connect(there.descriptor()).read([3], [3]))
        protect(address + 4 * mmap.PAGESIZE, 4 * mmap.PAGESIZE, allowed=0)
        peer = here.connect(there.descriptor())
        assert arrives(peer.read([0, 1, 2], [0, 1, 2]))
        with pytest.raises(TransportError, match="does not give out"):
            arrives(peer.read([5], [5]))
        assert arrives(here.connect(there.descriptor()).read([0], [4]))
        assert torch.equal(memory[[0, 1, 2, 3, 4]], expected[[0, 1, 2, 3, 0]])
        there.close()
        protect(address + 4 * mmap.PAGESIZE, 4 * mmap.PAGESIZE, allowed=3)
        del source


def protect(address, nbytes, allowed):
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), allowed) == 0
