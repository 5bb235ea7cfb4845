"""What every transport promises, within one process."""

import threading

import pytest
import torch

from tests.executor.transports.giving import contents, needs_mooncake, needs_nixl
from xllm.executor.transports.base import TransportError
from xllm.executor.transports.nixl import NixlTransport
from xllm.executor.transports.table import open_transport

CARD_KINDS = ["local", "tcp", "faulty:tcp", pytest.param("nixl", marks=needs_nixl)]
KINDS = [*CARD_KINDS, pytest.param("mooncake", marks=needs_mooncake)]


@pytest.fixture(params=KINDS)
def opened(request):
    """Opens transports over the memory that it is given."""
    transports = []

    def open_over(memory, **more):
        transports.append(open_transport(request.param, memory, **more))
        return transports[-1]

    yield open_over
    for transport in transports:
        transport.close()


def arrives(reading):
    while not reading.wait(0.2):
        pass
    return True


def test_blocks_of_numbers_come_as_they_are(opened):
    source, memory = torch.randn(10, 2, 2, 4, 8), torch.zeros(7, 2, 2, 4, 8)
    peer = opened(memory).connect(opened(source).descriptor())
    assert arrives(peer.read([9, 0, 1, 2], [1, 6, 0, 3]))
    assert torch.equal(memory[[1, 6, 0, 3]], source[[9, 0, 1, 2]])
    assert not memory[[2, 4, 5]].any()


def test_nothing_is_there_at_once(opened):
    memory = torch.zeros(4, 100, dtype=torch.uint8)
    peer = opened(memory).connect(opened(contents(4, 100, 1)).descriptor())
    reading = peer.read([], [])
    assert reading.wait(0)
    assert reading.wait(0), "and stays there"


def test_several_readers_at_once(opened):
    source = contents(64, 20_000, 1)
    descriptor = opened(source).descriptor()
    memories = [torch.zeros(64, 20_000, dtype=torch.uint8) for _ in range(4)]
    peers = [opened(memory).connect(descriptor) for memory in memories]
    failures = []

    def run(peer, seed):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()
        readings = [peer.read(order[i : i + 8], order[i : i + 8]) for i in range(0, 64, 8)]
        if not all(arrives(reading) for reading in readings):
            failures.append(seed)

    threads = [threading.Thread(target=run, args=(peer, seed)) for seed, peer in enumerate(peers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.equal(memory, source) for memory in memories)


def test_numbers_that_do_not_fit_are_refused_before_anything_is_asked(opened):
    memory = torch.zeros(4, 100, dtype=torch.uint8)
    peer = opened(memory).connect(opened(contents(9, 100, 1)).descriptor())
    for theirs, ours in (([9], [0]), ([-1], [0]), ([0], [4]), ([0], [-1]), ([0, 1], [0]), ([0, 1], [2, 2])):
        with pytest.raises(ValueError):
            peer.read(theirs, ours)
    assert arrives(peer.read([8, 8], [0, 3])), "one of theirs may be wanted twice"


def test_blocks_of_another_size_are_refused(opened):
    there, here = opened(contents(4, 100, 1)), opened(contents(4, 104, 1))
    with pytest.raises(TransportError, match="100 bytes, this engine's 104"):
        here.connect(there.descriptor())


@pytest.mark.parametrize("descriptor", [b"", b"\xc1", b"not a descriptor", b"\x90", bytes(200)])
def test_what_is_no_descriptor_is_refused(opened, descriptor):
    with pytest.raises(TransportError, match="descriptor"):
        opened(contents(4, 100, 1)).connect(descriptor)


def test_a_closed_peer_reads_no_more(opened):
    memory = torch.zeros(4, 100, dtype=torch.uint8)
    here, there = opened(memory), opened(contents(4, 100, 1))
    peer = here.connect(there.descriptor())
    reading = peer.read([0], [0])
    peer.close()
    peer.close()
    before = memory.clone()
    with pytest.raises(TransportError):
        peer.read([1], [1])
    try:
        arrives(reading)  # it may have arrived before
    except TransportError:
        assert torch.equal(memory, before)
    again = here.connect(there.descriptor())
    assert arrives(again.read([1], [1]))


def test_a_closed_transport_gives_and_takes_no_more(opened):
    here, there = opened(torch.zeros(4, 100, dtype=torch.uint8)), opened(contents(4, 100, 1))
    peer = here.connect(there.descriptor())
    assert arrives(peer.read([0], [0]))
    there.close()
    if not isinstance(here, NixlTransport):  # which reads what lies there without asking anybody
        with pytest.raises(TransportError):
            arrives(peer.read([1], [1]))
        with pytest.raises(TransportError):
            here.connect(there.descriptor())
    here.close()
    with pytest.raises(TransportError):
        here.connect(opened(contents(4, 100, 1)).descriptor())


def test_no_two_descriptors_are_alike(opened):
    memory = contents(4, 100, 1)
    first, second = opened(memory), opened(memory)
    assert first.descriptor() == first.descriptor() != second.descriptor()


def test_memory_once_given_can_be_given_back(opened):
    """When the engine sleeps."""
    memory, source = torch.zeros(4, 100, dtype=torch.uint8), contents(4, 100, 1)
    here, there = opened(memory), opened(source)
    assert arrives(here.connect(there.descriptor()).read([0], [0]))
    for transport, tensor in ((here, memory), (there, source)):
        transport.close()
        tensor.untyped_storage().resize_(0)


@pytest.mark.gpu
@pytest.mark.parametrize("opened", CARD_KINDS, indirect=True)
def test_from_card_to_card(opened):
    source = contents(40, 3 << 20, 1)
    memory = torch.zeros(40, 3 << 20, dtype=torch.uint8, device="cuda")
    peer = opened(memory).connect(opened(source.cuda()).descriptor())
    order = torch.randperm(40).tolist()
    assert arrives(peer.read(order, order[::-1]))
    assert torch.equal(memory[order[::-1]].cpu(), source[order])
