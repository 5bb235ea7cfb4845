"""The free blocks of a pool, in the order in which they are handed out."""

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Protocol


class FreeBlocks(Protocol):
    """Blocks that nobody holds and nobody knows by a name. A block stands in it once at most."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...

    def take(self, count: int) -> list[int]:
        """The next `count`, which are there."""
        ...

    def put(self, block: int) -> None: ...

    def remove(self, block: int) -> None:
        """Takes out a block that is there, wherever it stands."""
        ...


class Stack:
    """What came last goes first: its memory is warm. `remove` is O(blocks)."""

    def __init__(self, count: int):
        self._blocks = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def take(self, count: int) -> list[int]:
        blocks = self._blocks
        taken = blocks[: -count - 1 : -1]
        del blocks[len(blocks) - count :]
        return taken

    def put(self, block: int) -> None:
        self._blocks.append(block)

    def remove(self, block: int) -> None:
        self._blocks.remove(block)


class Lowest:
    """The lowest number goes first, so that use gathers at one end. O(log blocks) for each."""

    def __init__(self, count: int):
        self._heap = list(range(count))
        self._gone: set[int] = set()  # in the heap, but taken out

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def __iter__(self) -> Iterator[int]:
        return (block for block in self._heap if block not in self._gone)

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            block = heappop(self._heap)
            if block in self._gone:
                self._gone.remove(block)
            else:
                taken.append(block)
        return taken

    def put(self, block: int) -> None:
        if block in self._gone:
            self._gone.remove(block)
        else:
            heappush(self._heap, block)

    def remove(self, block: int) -> None:
        self._gone.add(block)


class Ordered:
    """As `Stack`, with any block taken out in O(1). Iterates from what goes last."""

    def __init__(self, count: int):
        self._blocks = dict.fromkeys(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def take(self, count: int) -> list[int]:
        pop = self._blocks.popitem
        return [pop()[0] for _ in range(count)]

    def put(self, block: int) -> None:
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        del self._blocks[block]
