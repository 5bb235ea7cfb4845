"""Pages in a GPU's memory: each is one allocation, whose handle is kept so that it can be mapped again and again."""

from collections.abc import Sequence, Set
from typing import Any

import torch

from xllm.device.cuda_driver import CudaDriver, zero_beside
from xllm.device.pages import BookedSpace, PageBooks, runs


class CudaPages(BookedSpace):
    """See `PageSpace`, and `CudaRange` for what may not touch bare places. Who gives kernels the whole range keeps its
    first place mapped. `torch` must have opened the device.

    Two places of one page are what NVIDIA calls virtual aliases (CUDA C++ Programming Guide, "Virtual Aliasing Support").
    """

    def __init__(self, page_bytes: int, pages: int, places: int, device: torch.device):
        """`device` with its index. ConfigError without cuda-bindings, MemoryError where one granule or the addresses are
        not to be had, RuntimeError for whatever else the driver says."""
        self._driver = CudaDriver(device)
        self.granularity = self._driver.granularity
        self._books = PageBooks(page_bytes, pages, places, self.granularity)
        self._page_bytes = page_bytes
        self.most_mappings: int | None = None
        self._handles: dict[int, Any] = {}  # by page
        addresses = self._driver.reserve(places * page_bytes)
        self._first = addresses.first
        self._stream = torch.cuda.Stream(device)
        # holds on to the addresses, and so does every view of it
        self.tensor = self._driver.tensor(addresses)

    def create(self, first: int, count: int) -> None:
        """What is in the memory is cleared when it is first mapped: only then has it an address."""
        with self._books.creating(first, count):
            try:
                for page in range(first, first + count):
                    self._handles[page] = self._driver.create(self._page_bytes)
            except BaseException:
                self._release(first, count)
                raise

    def destroy(self, first: int, count: int) -> None:
        with self._books.destroying(first, count):
            self._release(first, count)

    def map(self, place: int, pages: Sequence[int], *, replace: bool = False) -> None:
        with self._books.lock:
            if replace:
                self.unmap(place, len(pages), bare_ok=True)
            with self._books.mapping(place, pages) as fresh:
                address, nbytes = self._at(place, len(pages))
                self._driver.map(address, self._page_bytes, [self._handles[page] for page in pages])
                try:
                    self._driver.make_accessible(address, nbytes)
                    if fresh:
                        self._zero(place, pages, fresh)
                except BaseException:
                    self._driver.unmap(address, nbytes)
                    raise

    def unmap(self, place: int, count: int = 1, *, bare_ok: bool = False) -> None:
        with self._books.lock:
            for first, many in self._books.not_bare(place, count) if bare_ok else [(place, count)]:
                with self._books.unmapping(first, many):
                    self._driver.unmap(*self._at(first, many))

    def _zero(self, place: int, pages: Sequence[int], fresh: Set[int]) -> None:
        """Those that are mapped for the first time, and waits for it. That is at start, before there is work."""
        zero_beside(
            [
                self.tensor[(place + first) * self._page_bytes : (place + first + many) * self._page_bytes]
                for first, many in runs(i for i, page in enumerate(pages) if page in fresh)
            ],
            self._stream,
        )
        self._stream.synchronize()

    def _release(self, first: int, count: int) -> None:
        """Of these pages, those that have memory. Where the driver fails, a second attempt goes on."""
        for page in range(first, first + count):
            if page in self._handles:
                self._driver.release(self._handles[page])
                del self._handles[page]

    def _at(self, place: int, count: int) -> tuple[int, int]:
        """(address, nbytes)"""
        return self._first + place * self._page_bytes, count * self._page_bytes
