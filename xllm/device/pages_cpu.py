"""Pages in host memory: a file that lies in memory alone (memfd), parts of which are mapped where they are wanted.

All pages are one file, page `i` at byte `i * page_bytes`. Memory is taken by fallocate and given back by punching holes.
The range is reserved without access, and a place that is bare again is such a reservation again, so nobody else's memory
ever comes to lie there. Linux only.

Linux keeps neighbouring places as one mapping where their pages are neighbours too, or both are bare. It keeps only so many
mappings for a process (vm.max_map_count), everything else it has mapped included, and at that number even malloc fails and
nothing can be unmapped any more. So they are counted here, and no more are made than a share of that.
"""

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from xllm.core.errors import ConfigError
from xllm.device.facts import cpu_facts
from xllm.device.pages import BookedSpace, PageBooks, runs

# numbers of Linux (mman.h, falloc.h) that Python does not name in all its versions
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_FAILED = ctypes.c_void_p(-1).value

_SETTING = Path("/proc/sys/vm/max_map_count")
_ITS_DEFAULT = 65530
_SHARE = 0.75  # of the mappings that a process may have


class CpuPages(BookedSpace):
    """See `PageSpace`. To touch a bare place is a segmentation fault.

    A page is cleared by the system when it is first touched. Page tables are filled when a place is mapped, so that work
    there meets no page faults, but for pages that are mapped for the first time: start-up maps all of them and would
    have to wait until they are cleared.
    """

    def __init__(self, page_bytes: int, pages: int, places: int):
        """MemoryError where the system does not even give addresses for so much, ConfigError elsewhere than on Linux."""
        if sys.platform != "linux":
            raise ConfigError("host memory that lies in several places at once needs Linux")
        self.granularity = mmap.PAGESIZE
        self._books = PageBooks(page_bytes, pages, places, self.granularity)
        self._page_bytes = page_bytes
        self._apart = 1  # mappings that the system keeps for the range
        self._most_apart = int(_SHARE * _mappings_of_a_process())
        self.most_mappings: int | None = self._most_apart
        memory = _reserve(places * page_bytes)
        self._first = ctypes.addressof(memory)
        # holds on to `memory`, and so does every view of it
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._file = os.memfd_create("xllm-kv-pages")
        self._close_file = weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, pages * page_bytes)

    def create(self, first: int, count: int) -> None:
        with self._books.creating(first, count):
            nbytes = count * self._page_bytes
            # Linux takes memory for a file by ending somebody's process where it has to, so it is asked before
            free = cpu_facts().free_bytes
            if free < nbytes:
                raise MemoryError(_not_to_be_had(nbytes, f"{free / 2**20:.0f} MiB are free"))
            try:
                os.posix_fallocate(self._file, first * self._page_bytes, nbytes)
            except OSError as e:  # by now the system has taken back what there was of it
                if e.errno not in (errno.ENOMEM, errno.ENOSPC):
                    raise
                raise MemoryError(_not_to_be_had(nbytes, str(e))) from e

    def destroy(self, first: int, count: int) -> None:
        with self._books.destroying(first, count):
            offset, nbytes = first * self._page_bytes, count * self._page_bytes
            if _libc().fallocate(self._file, _KEEP_SIZE_AND_PUNCH_HOLE, offset, nbytes):
                raise _last_error()

    def map(self, place: int, pages: Sequence[int], *, replace: bool = False) -> None:
        with self._books.lock:
            if replace:
                self.unmap(place, len(pages), bare_ok=True)
            with self._books.mapping(place, pages) as fresh:
                apart = self._more_apart(place, [None] * len(pages), [*pages])
                if apart > 0 and self._apart + apart > self._most_apart:
                    raise MemoryError(_no_more_mappings(f"there are {self._apart} for the KV cache"))
                self._lay(place, pages, mmap.MAP_SHARED | (0 if fresh else _MAP_POPULATE))
                self._apart += apart

    def unmap(self, place: int, count: int = 1, *, bare_ok: bool = False) -> None:
        with self._books.lock:
            for first, many in self._books.not_bare(place, count) if bare_ok else [(place, count)]:
                with self._books.unmapping(first, many):
                    pages = self._books.pages_at(range(first, first + many))
                    apart = self._more_apart(first, pages, [None] * many)
                    self._put(first, many, _PROT_NONE, _RESERVED, -1, 0)
                    self._apart += apart

    def close(self) -> None:
        super().close()
        self._close_file()

    def _lay(self, place: int, pages: Sequence[int], flags: int) -> None:
        """On bare places, all or none; pages that are neighbours in one step."""
        access, at = mmap.PROT_READ | mmap.PROT_WRITE, place
        try:
            for page, count in runs(pages):
                self._put(at, count, access, flags, self._file, page * self._page_bytes)
                at += count
        except BaseException:
            # where not even that can be done, something lies there until the next page comes: nobody looks
            with suppress(MemoryError):
                if at > place:
                    self._put(place, at - place, _PROT_NONE, _RESERVED, -1, 0)
            raise

    def _put(self, place: int, count: int, access: int, flags: int, file: int, offset: int) -> None:
        """In one step, over what lies there. The system refuses before it changes anything."""
        address, nbytes = self._first + place * self._page_bytes, count * self._page_bytes
        if _libc().mmap(address, nbytes, access, flags | _MAP_FIXED, file, offset) != _FAILED:
            return
        e = _last_error()
        if e.errno != errno.ENOMEM:
            raise e
        raise MemoryError(_no_more_mappings(str(e)))

    def _more_apart(self, place: int, old: list[int | None], new: list[int | None]) -> int:
        """How many more mappings there are when places from `place` on hold `new` pages, and not `old` ones."""
        before, after = self._books.pages_at((place - 1, place + len(old)))
        return _borders([before, *new, after]) - _borders([before, *old, after])


_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE  # nothing of it counts as memory promised


def _borders(pages: list[int | None]) -> int:
    """Between neighbouring places that hold these, None for bare ones."""
    return sum(right != (None if left is None else left + 1) for left, right in pairwise(pages))


def _mappings_of_a_process() -> int:
    try:
        return int(_SETTING.read_text())
    except (OSError, ValueError):
        return _ITS_DEFAULT


def _reserve(nbytes: int) -> Any:
    """A ctypes array over addresses that nobody may touch; they are given back with it."""
    libc = _libc()
    first = libc.mmap(None, nbytes, _PROT_NONE, _RESERVED, -1, 0)
    if first == _FAILED:
        raise MemoryError(f"the system reserves no {nbytes / 2**30:.1f} GiB of addresses: {_last_error()}")
    memory = (ctypes.c_uint8 * nbytes).from_address(first)
    # at the end of the process other threads may still work there
    weakref.finalize(memory, libc.munmap, first, nbytes).atexit = False
    return memory


@cache
def _libc() -> Any:
    """The system's calls. Errors are kept for `_last_error`."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, nbytes, number, offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, nbytes, number, number, number, offset]
    libc.munmap.argtypes = [address, nbytes]
    libc.fallocate.argtypes = [number, number, offset, offset]
    return libc


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def _no_more_mappings(why: str) -> str:
    return f"no more KV pages can be mapped, {why}: the setting vm.max_map_count limits them"


def _not_to_be_had(nbytes: int, why: str) -> str:
    return f"{nbytes / 2**20:.0f} MiB of host memory are not to be had: {why}"
