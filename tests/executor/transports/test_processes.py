"""Between two processes, over every transport that can: what arrives, and what is told when the other side dies, stops or
is another. `nixl over posix...` is UCX's way where nothing reads by itself, and the
hardest on who reads."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.executor.transports.giving import LONG, Giver, needs_mooncake, needs_nixl
from tests.processes import freeze
from xllm.executor.block_sums import BlockSums
from xllm.executor.transports.base import STALL_S, TransportError
from xllm.executor.transports.table import open_transport

LARGE = 256 << 10  # bytes of a block, so that some hundred do not fit any buffer on the way
SLACK_S = 3.0  # of a machine with other work


@pytest.fixture(
    params=[
        "tcp",
        pytest.param("nixl", marks=needs_nixl),
        pytest.param("nixl over posix,sysv,self", marks=needs_nixl),
        pytest.param("mooncake", marks=needs_mooncake),
    ]
)
def kind(request, monkeypatch):
    name, _, way = request.param.partition(" over ")
    if way:
        monkeypatch.setenv("UCX_TLS", way)
    return name


@pytest.fixture
def given(kind):
    """Starts processes that give blocks, and transports here to read them with."""
    opened = []

    def start(blocks=64, nbytes=1000, **more):
        giver = Giver(kind, blocks, nbytes, **more)
        opened.append(giver.end)
        return giver

    def here(blocks=64, nbytes=1000, **more):
        memory = torch.zeros(blocks, nbytes, dtype=torch.uint8)
        transport = open_transport(kind, memory, **more)
        opened.append(transport.close)
        return memory, transport

    yield start, here
    for end in opened[::-1]:
        end()


def arrives(reading):
    deadline = time.monotonic() + LONG
    while not reading.wait(0.5):
        assert time.monotonic() < deadline
    return True


def fails(reading):
    """Seconds until it does."""
    begun = time.monotonic()
    with pytest.raises(TransportError) as raised:
        arrives(reading)
    assert str(raised.value)
    return time.monotonic() - begun


def reads_by_itself(kind):
    """Whether the other process need not run for its memory to be read."""
    return kind == "nixl" and os.environ.get("UCX_TLS") is None


def test_a_thousand_blocks_arrive_equal(given):
    start, here = given
    giver = start(1000, 4096)
    memory, transport = here(1200, 4096)
    peer = transport.connect(giver.descriptor)
    theirs, ours = torch.randperm(1000).tolist(), torch.randperm(1200)[:1000].tolist()
    readings = [peer.read(theirs[i : i + n], ours[i : i + n]) for i, n in ((0, 1), (1, 99), (100, 900))]
    assert all(arrives(reading) for reading in readings[::-1])
    assert torch.equal(memory[ours], giver.blocks[theirs])
    assert BlockSums(memory).sums(ours) == BlockSums(giver.blocks).sums(theirs)
    untouched = sorted(set(range(1200)) - set(ours))
    assert not memory[untouched].any()


def test_killed_amid_a_reading(given, kind):
    start, here = given
    giver = start(200, LARGE)
    _, transport = here(200, LARGE)
    peer = transport.connect(giver.descriptor)
    assert arrives(peer.read([0], [0]))
    if reads_by_itself(kind):
        giver.end()
        took = _fails_to_read(peer)
    else:
        freeze(giver.pid)
        reading = peer.read(range(200), range(200))
        assert not reading.wait(0.05)
        giver.end()
        took = fails(reading)
    assert took < STALL_S + SLACK_S
    with pytest.raises(TransportError):
        peer.read([0], [0])


def _fails_to_read(peer):
    begun = time.monotonic()
    with pytest.raises(TransportError):
        arrives(peer.read(range(200), range(200)))
    return time.monotonic() - begun


def test_stopped_amid_a_reading_and_nothing_comes_late(given, kind):
    start, here = given
    giver = start(200, LARGE)
    memory, transport = here(200, LARGE)
    peer = transport.connect(giver.descriptor)
    assert arrives(peer.read([0], [0]))
    freeze(giver.pid)
    reading = peer.read(range(200), range(200))
    if reads_by_itself(kind):
        assert arrives(reading)
        return
    assert STALL_S - 0.5 < fails(reading) < STALL_S + SLACK_S
    memory.zero_()
    giver.process.send_signal(signal.SIGCONT)
    after = transport.connect(giver.descriptor)
    assert arrives(after.read(range(150), range(150))), (
        "it gives to others, so it has had time to send what it owed"
    )
    assert torch.equal(memory[:150], giver.blocks[:150])
    assert not memory[150:].any()


def test_closed_amid_a_reading_and_nothing_comes_late(given, kind):
    start, here = given
    giver = start(200, LARGE)
    memory, transport = here(200, LARGE)
    peer = transport.connect(giver.descriptor)
    assert arrives(peer.read([0], [0]))
    freeze(giver.pid)
    reading = peer.read(range(200), range(200))
    peer.close()
    memory.zero_()
    giver.process.send_signal(signal.SIGCONT)
    other = transport.connect(giver.descriptor)
    assert arrives(other.read([1], [199]))
    assert not memory[:199].any()
    if not reads_by_itself(kind):
        fails(reading)


def test_a_reader_that_dies_amid_a_reading_leaves_the_giver_well(given, kind):
    start, here = given
    giver = start(200, LARGE)
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.executor.transports.test_processes", kind, giver.descriptor.hex()],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with reader:
        assert reader.stdout is not None
        assert any(line.startswith("under way") for line in reader.stdout)
        reader.send_signal(signal.SIGKILL)
    memory, transport = here(200, LARGE)
    assert arrives(transport.connect(giver.descriptor).read(range(200), range(200)))
    assert torch.equal(memory, giver.blocks)
    assert giver.process.poll() is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tcp", pytest.param("nixl", marks=needs_nixl)])
def test_from_card_to_card(kind):
    giver = Giver(kind, 40, 3 << 20, device="cuda")
    memory = torch.zeros(40, 3 << 20, dtype=torch.uint8, device="cuda")
    transport = open_transport(kind, memory)
    try:
        peer = transport.connect(giver.descriptor)
        order = torch.randperm(40).tolist()
        for _ in range(3):
            memory.zero_()
            torch.cuda.synchronize()
            assert arrives(peer.read(order, order[::-1]))
            assert torch.equal(memory[order[::-1]].cpu(), giver.blocks[order])
        giver.end()
        assert _fails_or_arrives(peer) < STALL_S + SLACK_S
    finally:
        transport.close()
        giver.end()


def _fails_or_arrives(peer):
    """A card's memory may be read for a while after its process has gone."""
    begun = time.monotonic()
    with contextlib.suppress(TransportError):
        arrives(peer.read([0], [0]))
    return time.monotonic() - begun


def test_one_that_was_started_anew_is_another(given):
    start, here = given
    old, new = start(), start(seed=2)
    memory, transport = here()
    before = transport.connect(old.descriptor)
    assert arrives(before.read([3], [3]))
    old.end()
    assert old.descriptor != new.descriptor
    with pytest.raises(TransportError):
        arrives(transport.connect(old.descriptor).read([0], [0]))
    assert arrives(transport.connect(new.descriptor).read([5], [5]))
    assert torch.equal(memory[5], new.blocks[5])


def main():
    """A reader that never comes to its end."""
    kind, descriptor = sys.argv[1:]
    memory = torch.zeros(200, LARGE, dtype=torch.uint8)
    transport = open_transport(kind, memory)
    peer = transport.connect(bytes.fromhex(descriptor))
    arrives(peer.read([0], [0]))
    peer.read(range(200), range(200)).wait(0.001)
    print("under way", flush=True)
    while True:
        arrives(peer.read(range(200), range(200)))


if __name__ == "__main__":
    main()
