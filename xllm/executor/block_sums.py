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
SCRATCH_WORDS = 4 << 20  # that the host looks at together
_SEED = 0x78_4C_4C_4D
_MASK = (1 << 64) - 1


class BlockSums:
    """Belongs to one thread. What wrote the blocks has run."""

    def __init__(self, memory: torch.Tensor):
        """As `Blocks`. On a card it has a stream of its own."""
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
        self._stream = None
        if memory_NB.is_cuda:
            self._stream = torch.cuda.Stream(device)
            self._warm_up()

    def sums(self, numbers: Sequence[int]) -> list[int]:
        if not numbers:
            return []
        numbers_N = torch.tensor(numbers)
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # None: no stream at all
            if self._stream is None:
                total_N = self._on_the_host(numbers_N)
            else:
                at = numbers_N.pin_memory().to(self._words_NRW.device, non_blocking=True)
                total_N = self._on_the_card(self._words_NRW, at)
            return [(total + self._empty) & _MASK for total in total_N.tolist()]

    def _on_the_card(self, words_NRW: torch.Tensor, numbers_N: torch.Tensor) -> torch.Tensor:
        from xllm.ops.cuda.word_sums import word_sums  # wants Triton

        return word_sums(words_NRW, numbers_N, self._rows_R, self._columns_W)

    def _warm_up(self) -> None:
        """Compiles, over memory that is surely there."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            block_1RW = torch.zeros_like(self._words_NRW[:1])
            self._on_the_card(block_1RW, torch.zeros(1, dtype=torch.int64, device=block_1RW.device)).tolist()

    def _on_the_host(self, numbers_N: torch.Tensor) -> torch.Tensor:
        """int64 [N]; of small blocks some at a time, of large ones some rows."""
        _, rows, width = self._words_NRW.shape
        group = max(1, SCRATCH_WORDS // (rows * width))
        rows_at_once = max(1, min(rows, SCRATCH_WORDS // width))
        total_N = torch.zeros_like(numbers_N)
        for begin in range(0, numbers_N.numel(), group):
            some_N = slice(begin, begin + group)
            for first in range(0, rows, rows_at_once):
                some_R = slice(first, first + rows_at_once)
                products_NRW = self._words_NRW[numbers_N[some_N], some_R] * self._columns_W
                total_N[some_N] += (products_NRW.sum(2) * self._rows_R[some_R]).sum(1)
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
