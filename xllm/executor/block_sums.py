"""Checksums of KV blocks where they lie: on the host xxh3 over their bytes, on a card a sum of products.

A card's sum is that of the block as 32-bit words, each times an odd number of 64 bits that belongs to its place, modulo
2**64. An odd number has an inverse, so any one word that changes changes the sum; words in each other's place, or changes
in several, escape with a chance of about 2**-32 at most, for numbers that look random. Both are good for what breaks by itself,
and no defence against forgery. The same bytes have the same sum in every process, but the two ways do not agree
with each other: both ends must have the same kind of device.
"""

from collections.abc import Sequence

import torch
import xxhash

from xllm.executor.transports.base import Blocks

WORD_BYTES = 4
ROW_WORDS = 4096
SCRATCH_WORDS = 4 << 20  # looked at together; 12 bytes of the card for each, taken once
_SEED = 0x78_4C_4C_4D
_MASK = (1 << 64) - 1


class BlockSums:
    """Belongs to one thread. What wrote the blocks has run."""

    def __init__(self, memory: torch.Tensor):
        """As `Blocks`. On a card it takes 48 MiB and a little, and has a stream of its own."""
        self._blocks = Blocks(memory)
        self._words = WordSums(self._blocks.memory_NB) if self._blocks.on_card else None

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """64 bits for each of these blocks. Waits for the card at most once."""
        if self._words is not None:
            return self._words.sums(numbers)
        return [xxhash.xxh3_64_intdigest(self._blocks.bytes_of(number)) for number in numbers]


class WordSums:
    """The card's way; it gives the same on the host.

    A block is R rows of W words, and the number of a place is that of its row times that of its column: few numbers to
    keep, and a product of odd numbers is odd.
    """

    def __init__(self, memory_NB: torch.Tensor):
        """`memory_NB` uint8 [blocks, bytes]; ValueError where those are not whole words."""
        blocks, nbytes = memory_NB.shape
        if nbytes % WORD_BYTES:
            raise ValueError(f"blocks of {nbytes} bytes are not whole words")
        device = memory_NB.device
        words = nbytes // WORD_BYTES
        width = row_words(words)
        self._words_NRW = memory_NB.view(torch.int32).view(blocks, words // width, width)
        self._rows_R = _numbers(words // width, 1, device)
        self._columns_W = _numbers(width, 2, device)
        self._empty = _mix(words ^ _SEED)
        # of small blocks some at a time, of large ones some rows
        self._group = max(1, SCRATCH_WORDS // words)
        self._rows_at_once = max(1, min(words // width, SCRATCH_WORDS // width))
        scratch = self._group * self._rows_at_once * width
        self._gathered = torch.empty(scratch, dtype=torch.int32, device=device)
        self._products = torch.empty(scratch, dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device) if memory_NB.is_cuda else None

    def sums(self, numbers: Sequence[int]) -> list[int]:
        if not numbers:
            return []
        numbers_N = torch.tensor(numbers)
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # None: no stream at all
            if self._stream is not None:
                numbers_N = numbers_N.pin_memory().to(self._words_NRW.device, non_blocking=True)
            parts = [
                self._group_sums(numbers_N[begin : begin + self._group])
                for begin in range(0, len(numbers), self._group)
            ]
            return [(total + self._empty) & _MASK for total in torch.cat(parts).tolist()]

    def _group_sums(self, numbers_N: torch.Tensor) -> torch.Tensor:
        """int64 [N]"""
        total_N = torch.zeros_like(numbers_N)
        count, (_, rows, width) = numbers_N.numel(), self._words_NRW.shape
        for first in range(0, rows, self._rows_at_once):
            some = slice(first, min(first + self._rows_at_once, rows))
            shape = (count, some.stop - first, width)
            used = count * shape[1] * width
            words_NRW, products_NRW = self._gathered[:used].view(shape), self._products[:used].view(shape)
            torch.index_select(self._words_NRW[:, some], 0, numbers_N, out=words_NRW)
            torch.mul(words_NRW, self._columns_W, out=products_NRW)
            total_N += (products_NRW.sum(2) * self._rows_R[some]).sum(1)
        return total_N


def row_words(words: int) -> int:
    """The longest rows that a block divides into."""
    return next(width for width in range(min(ROW_WORDS, words), 0, -1) if words % width == 0)


def _numbers(count: int, kind: int, device: torch.device) -> torch.Tensor:
    """int64 [count]: odd, and looking random."""
    return torch.tensor([_signed(place_number(i, kind)) for i in range(count)], dtype=torch.int64).to(device)


def place_number(i: int, kind: int) -> int:
    return _mix((i << 8) ^ kind ^ (_SEED << 40)) | 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _mix(number: int) -> int:
    """Bits of which each depends on all (the finalizer of MurmurHash3)."""
    number &= _MASK
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        number = ((number ^ (number >> 33)) * multiplier) & _MASK
    return number ^ (number >> 33)
