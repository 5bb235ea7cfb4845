"""Every fault as it is described, and that checksums see those that damage."""

import time

import pytest
import torch

from tests.executor.transports.giving import contents
from xllm.core.errors import ConfigError
from xllm.executor.block_sums import BlockSums
from xllm.executor.transports.base import Transport, TransportError
from xllm.executor.transports.faulty import FAULTS
from xllm.executor.transports.table import open_transport

SOURCE = contents(16, 400, 1)
DELAY = "delay_s=0.1"


@pytest.fixture
def faulty():
    opened: list[Transport] = []

    def open_with(settings, inner="local"):
        memory = torch.zeros(16, 400, dtype=torch.uint8)
        here = open_transport(f"faulty:{inner}?{settings}", memory)
        there = open_transport(inner, SOURCE)
        opened.extend((here, there))
        return memory, here, here.connect(there.descriptor())

    yield open_with
    for transport in opened:
        transport.close()


def arrives(reading):
    while not reading.wait(0.02):
        pass
    return True


def test_without_rates_nothing_goes_wrong(faulty):
    memory, here, peer = faulty("")
    assert peer.read(range(16), range(16)).wait(0)
    assert torch.equal(memory, SOURCE)
    assert not here.injected


def test_dropped_it_never_arrives_and_never_fails(faulty):
    memory, here, peer = faulty("drop=1")
    reading = peer.read([1], [1])
    assert not any(reading.wait(0.01) for _ in range(5))
    assert not memory.any()
    peer.close()
    with pytest.raises(TransportError):
        reading.wait(0)
    assert here.injected == {"drop": 1}


def test_delayed_it_arrives_late(faulty):
    memory, _, peer = faulty(f"delay=1&{DELAY}")
    begun = time.monotonic()
    reading = peer.read([1], [2])
    assert not reading.wait(0)
    assert arrives(reading)
    assert time.monotonic() - begun >= 0.1
    assert torch.equal(memory[2], SOURCE[1])


def test_corrupted_it_has_one_other_bit(faulty):
    memory, _, peer = faulty("corrupt=1")
    assert arrives(peer.read(range(16), range(16)))
    other = memory ^ SOURCE
    assert torch.count_nonzero(other) == 1
    assert other.max().item().bit_count() == 1


def test_swapped_two_are_in_each_others_place(faulty):
    memory, _, peer = faulty("swap=1")
    assert arrives(peer.read(range(16), range(16)))
    wrong = (memory != SOURCE).any(1).nonzero().flatten().tolist()
    assert len(wrong) == 2
    assert torch.equal(memory[wrong], SOURCE[wrong[::-1]])


def test_reordered_it_comes_after_the_next(faulty):
    memory, here, peer = faulty(f"reorder=1&{DELAY}")
    draws = iter(("reorder", ""))
    here.draw = lambda: (next(draws), None)
    first, second = peer.read([1], [1]), peer.read([2], [2])
    assert not first.wait(0)
    assert second.wait(0)
    assert not memory[1].any()
    assert first.wait(0)
    assert torch.equal(memory[1:3], SOURCE[1:3])


def test_reordered_with_nothing_behind_it_comes_late(faulty):
    _, _, peer = faulty(f"reorder=1&{DELAY}")
    assert arrives(peer.read([1], [1]))


def test_doubled_it_is_written_again_while_it_is_open(faulty):
    memory, _, peer = faulty(f"double=1&{DELAY}")
    reading = peer.read([1], [1])
    assert not reading.wait(0)
    assert torch.equal(memory[1], SOURCE[1]), "the first time"
    memory[1] = 0
    assert arrives(reading)
    assert torch.equal(memory[1], SOURCE[1])
    memory[1] = 0
    assert reading.wait(0.15)
    assert not memory[1].any(), "and never after it has arrived"


def test_broken_the_peer_is_of_no_use(faulty):
    _, _, peer = faulty("break=1")
    reading = peer.read([1], [1])
    with pytest.raises(TransportError):
        arrives(reading)
    with pytest.raises(TransportError):
        peer.read([1], [1])


def test_the_same_seed_has_the_same_faults(faulty):
    rates = "&".join(f"{fault}=0.1" for fault in FAULTS)

    def drawn(seed):
        _, here, _ = faulty(f"{rates}&seed={seed}")
        return [here.draw()[0] for _ in range(200)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert set(drawn(3)) == {"", *FAULTS}


def test_checksums_see_everything_that_arrives_wrong(faulty):
    memory, here, peer = faulty("corrupt=0.3&swap=0.3&double=0.1&delay=0.1&delay_s=0.001&seed=5", inner="tcp")
    offered = BlockSums(SOURCE).sums(range(16))
    sums, seen = BlockSums(memory), 0
    for _ in range(300):
        assert arrives(peer.read(range(16), range(16)))
        sound = sums.sums(range(16)) == offered
        assert sound == torch.equal(memory, SOURCE)
        seen += not sound
    assert seen == here.injected["corrupt"] + here.injected["swap"] > 100


@pytest.mark.parametrize(
    "settings", ["drop=2", "drop=-0.1", "drop=x", "drop=0.6&swap=0.6", "tear=0.1", "delay_s=-1"]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match="faulty"):
        open_transport(f"faulty:local?{settings}", SOURCE)
