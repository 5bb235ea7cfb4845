"""Free address ranges that show free pages, by what they are good for."""

from collections.abc import Callable


class ReadyRanges:
    """A range is good for a request that begins with `start` cached blocks where the page at that place of it is free; the
    better the more pages follow. Size classes are powers of two. O(1) but for the handful of classes."""

    def __init__(self) -> None:
        self._ranges: dict[int, dict[int, dict[int, None]]] = {}  # by start, then size class
        self._where: dict[int, tuple[int, int]] = {}  # by range

    def __contains__(self, one: int) -> bool:
        return one in self._where

    def count(self, start: int) -> int:
        return sum(map(len, self._ranges.get(start, {}).values()))

    def add(self, one: int, start: int, pages: int) -> None:
        """It shows `pages` of them from `start` on."""
        self.discard(one)
        self._where[one] = start, pages.bit_length()
        self._ranges.setdefault(start, {}).setdefault(pages.bit_length(), {})[one] = None

    def discard(self, one: int) -> None:
        if (where := self._where.pop(one, None)) is not None:
            start, size = where
            del self._ranges[start][size][one]
            if not self._ranges[start][size]:
                del self._ranges[start][size]
            if not self._ranges[start]:
                del self._ranges[start]

    def clear(self) -> None:
        self._ranges.clear()
        self._where.clear()

    def take(self, start: int, pages: int, is_ready: Callable[[int, int], bool]) -> int | None:
        """One of the smallest class that has enough pages, or of the largest there is, for which `is_ready(range, start)`
        still holds. Others that are looked at are forgotten."""
        wanted = pages.bit_length()
        classes = self._ranges.get(start, {})
        for size in sorted(classes, key=lambda size: (size < wanted, abs(size - wanted))):
            while ranges := classes.get(size):
                one = next(reversed(ranges))
                self.discard(one)
                if is_ready(one, start):
                    return one
        return None

    def audit(self, idle: Callable[[int], bool]) -> None:
        if not all(idle(one) for one in self._where):
            raise AssertionError("a range is ready that somebody has")
        if sorted(
            one for sizes in self._ranges.values() for ones in sizes.values() for one in ones
        ) != sorted(self._where):
            raise AssertionError("a ready range stands in two places, or in none")
