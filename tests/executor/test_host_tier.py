import pytest
import torch

from xllm.executor.host_tier import Hashers, HostTier, checksum

NAMES = [bytes([n]) * 16 for n in range(4)]


@pytest.fixture
def host():
    tier = HostTier(torch.zeros(4 * 100, dtype=torch.uint8), 4, 100)
    for slot in range(4):
        tier.array(slot)[:] = range(slot, slot + 100)
    return tier


def test_a_sealed_slot_is_what_it_was(host):
    host.seal(2, NAMES[0])
    assert host.check(2, NAMES[0])
    assert not host.check(2, NAMES[1]), "another name"
    assert not host.check(1, NAMES[0]), "another slot"
    host.unseal(2)
    assert not host.check(2, NAMES[0])


def test_every_flipped_bit_is_seen(host):
    host.seal(1, NAMES[3])
    for bit in range(800):
        host.array(1)[bit // 8] ^= 1 << bit % 8
        assert not host.check(1, NAMES[3]), bit
        host.array(1)[bit // 8] ^= 1 << bit % 8
    assert host.check(1, NAMES[3])


def test_bytes_do_not_count_under_another_name(host):
    """What a slot holds by mistake is some block, whole and with a checksum of its own."""
    host.seal(0, NAMES[0])
    host.seal(1, NAMES[1])
    host.array(0)[:] = host.array(1)
    assert not host.check(0, NAMES[0])
    assert checksum(NAMES[0], host.array(1)) != checksum(NAMES[1], host.array(1))


def test_a_checksum_that_is_known_is_compared_with_the_bytes(host):
    host.seal(0, NAMES[0], checksum(NAMES[0], host.array(0)))
    host.seal(1, NAMES[1], checksum(NAMES[1], host.array(0)))
    assert host.check(0, NAMES[0])
    assert not host.check(1, NAMES[1])
    assert host.sealed(0, NAMES[0]) == checksum(NAMES[0], host.array(0))
    assert host.sealed(0, NAMES[1]) is None


def test_rows_and_arrays_are_the_same_memory(host):
    host.rows(1, 2)[:] = 7
    assert [int(host.array(slot).max()) for slot in range(4)] == [99, 7, 7, 102]


def test_the_memory_fits_exactly():
    with pytest.raises(ValueError, match="3 slots of 100 bytes do not fit 400 bytes"):
        HostTier(torch.zeros(400, dtype=torch.uint8), 3, 100)


def test_hashers_answer_in_order():
    host = HostTier(torch.arange(50 * 8, dtype=torch.uint8), 50, 8)
    slots = [(slot, bytes([slot]) * 16) for slot in range(50)]
    hashers = Hashers(host, 3)
    hashers.seal(slots)
    host.array(13)[2] ^= 1
    host.unseal(40)
    assert [slot for slot, sound in enumerate(hashers.check(slots)) if not sound] == [13, 40]
    hashers.seal([])
    assert list(hashers.check([])) == []
    hashers.close()
