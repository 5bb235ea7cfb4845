import numpy as np
import pytest
import torch
import xxhash

from xllm.executor import block_sums
from xllm.executor.block_sums import BlockSums, WordSums, place_number, row_words

MASK = (1 << 64) - 1


def blocks_of(count=6, nbytes=4 * 3 * 40, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, nbytes), dtype=np.uint8))


def slowly(block, words):
    """The card's sum of one block, in Python's integers."""
    width = row_words(words)
    total = block_sums._mix(words ^ block_sums._SEED)
    for i, word in enumerate(block.numpy().view(np.int32).tolist()):
        total += word * place_number(i // width, 1) * place_number(i % width, 2)
    return total & MASK


def test_on_the_host_it_is_xxh3():
    memory = blocks_of()
    assert BlockSums(memory).sums([4, 0]) == [
        xxhash.xxh3_64_intdigest(memory[n].numpy().tobytes()) for n in (4, 0)
    ]


@pytest.mark.parametrize("scratch", [1, 8, 64, 300, 1 << 20])
def test_the_cards_way_is_what_it_says(monkeypatch, scratch):
    monkeypatch.setattr(block_sums, "ROW_WORDS", 8)
    monkeypatch.setattr(block_sums, "SCRATCH_WORDS", scratch)
    memory = blocks_of()
    numbers = [5, 0, 1, 3, 1]
    assert WordSums(memory).sums(numbers) == [slowly(memory[n], 120) for n in numbers]


@pytest.mark.parametrize("words", [1, 7, 4097, 8192, 3 * 4096])
def test_blocks_of_any_number_of_words(words):
    memory = blocks_of(2, 4 * words)
    assert WordSums(memory).sums([1, 0]) == [slowly(memory[n], words) for n in (1, 0)]
    assert WordSums(memory).sums([]) == []


@pytest.mark.parametrize("kind", [BlockSums, WordSums])
def test_every_flipped_bit_is_seen(kind):
    memory = blocks_of(2, 480)
    sums = kind(memory)
    (before,) = sums.sums([1])
    for bit in range(8 * 480):
        memory[1, bit // 8] ^= 1 << bit % 8
        assert sums.sums([1]) != [before], bit
        memory[1, bit // 8] ^= 1 << bit % 8
    assert sums.sums([1]) == [before]


@pytest.mark.parametrize("kind", [BlockSums, WordSums])
def test_words_in_each_others_place_are_seen(kind):
    rng = np.random.default_rng(3)
    memory = blocks_of(1, 4 * 2 * 4096)
    sums = kind(memory)
    (before,) = sums.sums([0])
    words = memory.view(torch.int32)[0]
    for _ in range(300):
        i, j = rng.choice(words.numel(), 2, replace=False).tolist()
        words[[i, j]] = words[[j, i]]
        assert sums.sums([0]) != [before]
        words[[i, j]] = words[[j, i]]
    words[:] = words.roll(1)
    assert sums.sums([0]) != [before]


@pytest.mark.parametrize("kind", [BlockSums, WordSums])
def test_blocks_in_each_others_place_and_empty_ones(kind):
    memory = blocks_of(4)
    one, other = kind(memory).sums([1, 2])
    assert one != other
    assert kind(memory[[0, 2, 1, 3]]).sums([1, 2]) == [other, one]
    memory[3] = 0
    (empty,) = kind(memory).sums([3])
    assert empty not in (0, one, other)
    shorter = torch.zeros(1, memory.shape[1] - 4, dtype=torch.uint8)
    assert kind(shorter).sums([0]) != [empty], "of another length"


def test_what_is_not_whole_words_is_refused():
    with pytest.raises(ValueError, match="whole words"):
        WordSums(torch.zeros(2, 6, dtype=torch.uint8))


def test_a_kv_cache_of_numbers():
    memory = torch.randn(3, 2, 2, 4, 2, 8)
    as_bytes = memory.view(torch.uint8).flatten(1)
    assert BlockSums(memory).sums([0, 2]) == BlockSums(as_bytes).sums([0, 2])


@pytest.mark.gpu
def test_a_card_says_what_the_host_says():
    memory = blocks_of(40, 4 * 4096 * 3)
    numbers = [*range(0, 40, 3), 1, 0]
    assert BlockSums(memory.cuda()).sums(numbers) == WordSums(memory).sums(numbers)
