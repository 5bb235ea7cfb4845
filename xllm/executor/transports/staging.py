"""KV blocks as bytes on the host, for transports that move those: as they lie, or by way of pinned memory from and to a card.

Both ways give one piece of memory after the other. A piece is done with when the next is asked for.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from xllm.executor.transports.base import Blocks

PIECE_BYTES = 8 << 20  # of pinned memory, twice for each direction of a connection


class Access(Protocol):
    """Belongs to one thread."""

    def outgoing(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        """The bytes of these blocks in order."""
        ...

    def incoming(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        """Where their bytes in order are to be put. At the end all are there, for work submitted to the device afterwards."""
        ...


def open_access(blocks: Blocks) -> Access:
    return CardAccess(blocks) if blocks.on_card else HostAccess(blocks)


class HostAccess:
    def __init__(self, blocks: Blocks):
        self._blocks = blocks

    def outgoing(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        for first, count in neighbours(numbers):
            yield self._blocks.bytes_of(first, count)

    def incoming(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        return self.outgoing(numbers)


class CardAccess:
    """Copies in an order of their own, beside the steps. The blocks are such as no step in flight writes."""

    def __init__(self, blocks: Blocks):
        self._blocks = blocks
        self._each = max(1, PIECE_BYTES // blocks.block_bytes)
        self._stream = torch.cuda.Stream(blocks.memory_NB.device)
        self._staging: list[torch.Tensor] = []

    def outgoing(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        staging_NB = self._pinned()[0]
        for begin in range(0, len(numbers), self._each):
            piece = numbers[begin : begin + self._each]
            self._copy(piece, staging_NB, down=True)
            self._stream.synchronize()
            yield _view(staging_NB, len(piece))

    def incoming(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        turn = 0
        for begin in range(0, len(numbers), self._each):
            piece = numbers[begin : begin + self._each]
            staging_NB = self._pinned()[turn]
            yield _view(staging_NB, len(piece))
            self._stream.synchronize()  # the copy out of the other half: this half is next to be filled after it
            self._copy(piece, staging_NB, down=False)
            turn = 1 - turn
        self._stream.synchronize()

    def _pinned(self) -> list[torch.Tensor]:
        if not self._staging:
            shape = (self._each, self._blocks.block_bytes)
            self._staging = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        return self._staging

    def _copy(self, numbers: Sequence[int], staging_NB: torch.Tensor, *, down: bool) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            place = 0
            for first, count in neighbours(numbers):
                device_NB = self._blocks.memory_NB[first : first + count]
                host_NB = staging_NB[place : place + count]
                into, source = (host_NB, device_NB) if down else (device_NB, host_NB)
                into.copy_(source, non_blocking=True)
                place += count


def _view(staging_NB: torch.Tensor, count: int) -> memoryview:
    return staging_NB[:count].flatten().numpy().data


def neighbours(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of numbers that follow each other."""
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], i - begin
            begin = i
