"""Addresses without memory: a range that is reserved once, and memory that comes and goes under parts of it."""

import threading
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class VirtualRange(Protocol):
    """Memory is committed in pieces: whole granules, counted from the beginning of the range. A piece goes as it came,
    never in part. All calls may come from any thread; those that change something wait for each other.

    Who uses the range keeps its work away from what has no memory: a read there is undefined on a CPU and loses a GPU.
    """

    tensor: torch.Tensor  # uint8 [nbytes]: all addresses, the same ones for good, whatever is committed
    granularity: int  # bytes

    @property
    def committed(self) -> int:
        """Bytes that have memory."""
        ...

    def commit(self, offset: int, nbytes: int) -> None:
        """Memory under `nbytes` from `offset` on, all zeros for who has called `join` after this has returned. The last
        piece may reach beyond `tensor`, up to the next granule. MemoryError, with a sentence for the user, where it is
        not to be had; then and after any other error nothing has changed. ValueError where some of it is committed
        already."""
        ...

    def follow(self) -> None:
        """As `join`, for a thread and an order of work of its own, however often: others have joined or will."""
        ...

    def join(self) -> None:
        """What the calling thread submits to its current stream from now on comes after the zeroing of everything
        committed so far. That holds for one stream: work in others is to begin behind work of that one. Does not wait,
        and costs next to nothing where nothing has been committed since the last time."""
        ...

    def decommit(self, offset: int, nbytes: int) -> None:
        """Give the memory of one piece back to the system. Nothing that was submitted may still touch it: this waits for
        nothing but the zeroing. ValueError where it is not what one `commit` brought."""
        ...

    def close(self) -> None:
        """Give all memory back, under the same condition. The addresses go with the last tensor over them. A second
        time does nothing; `commit` is a ValueError from then on."""
        ...


class Pieces:
    """The books of a range: what is committed. One change at a time."""

    def __init__(self, limit: int, granularity: int):
        """Both in bytes; `limit` is a multiple of `granularity`."""
        self._limit = limit
        self._granularity = granularity
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}  # by offset
        self._offsets: list[int] = []  # sorted
        self._closed = False
        self.committed = 0

    @contextmanager
    def adding(self, offset: int, nbytes: int) -> Iterator[None]:
        """The piece is committed once the body has ended without an error."""
        with self._lock:
            self._check_new(offset, nbytes)
            yield
            insort(self._offsets, offset)
            self._sizes[offset] = nbytes
            self.committed += nbytes

    @contextmanager
    def removing(self, offset: int, nbytes: int) -> Iterator[None]:
        """The piece is no longer committed once the body has ended without an error."""
        with self._lock:
            if self._sizes.get(offset) != nbytes:
                raise ValueError(f"{nbytes} bytes at {offset} were not committed as one piece")
            yield
            self._offsets.remove(offset)
            del self._sizes[offset]
            self.committed -= nbytes

    def close(self) -> list[tuple[int, int]]:
        """Nothing more is added. -> (offset, nbytes) of what is left to remove."""
        with self._lock:
            self._closed = True
            return sorted(self._sizes.items())

    def _check_new(self, offset: int, nbytes: int) -> None:
        if self._closed:
            raise ValueError("the range is closed")
        if offset % self._granularity or nbytes % self._granularity:
            raise ValueError(f"{nbytes} bytes at {offset} are not whole granules of {self._granularity}")
        if offset < 0 or nbytes <= 0 or offset + nbytes > self._limit:
            raise ValueError(f"{nbytes} bytes at {offset} are not inside a range of {self._limit}")
        i = bisect_right(self._offsets, offset)
        before = self._offsets[i - 1] if i else 0
        if (i and before + self._sizes[before] > offset) or (
            i < len(self._offsets) and self._offsets[i] < offset + nbytes
        ):
            raise ValueError(f"some of the {nbytes} bytes at {offset} are committed already")


def whole_granules(nbytes: int, granularity: int) -> int:
    """`nbytes` rounded up."""
    return -(-nbytes // granularity) * granularity
