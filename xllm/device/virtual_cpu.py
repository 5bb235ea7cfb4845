"""A virtual range in host memory: anonymous pages, which are resident from the first write until the system is told
that they are not needed."""

import errno
import mmap
import sys

import torch

from xllm.device.facts import cpu_facts
from xllm.device.virtual import Pieces, whole_granules

# Python names neither in all its versions; the numbers are those of Linux (mman.h)
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_MADV_POPULATE_WRITE = getattr(mmap, "MADV_POPULATE_WRITE", 23)
_NOT_KNOWN_HERE = (errno.EINVAL, errno.ENOSYS, errno.EPERM)  # a kernel before 5.14, or a sandbox


class CpuRange:
    """See `VirtualRange`. What has no memory reads as zeros, and a write there takes memory that is in nobody's books.

    On other systems than Linux memory comes with the first write too, but may stay when it is given back.
    """

    def __init__(self, nbytes: int):
        """MemoryError where the system does not even give addresses for so much."""
        if nbytes <= 0:
            raise ValueError(f"a range of {nbytes} bytes")
        self.granularity = mmap.PAGESIZE
        total = whole_granules(nbytes, self.granularity)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._memory = mmap.mmap(-1, total, flags=flags)
        except OSError as e:
            raise MemoryError(f"the system reserves no {total / 2**30:.1f} GiB of addresses: {e}") from e
        # holds on to the memory, and so does every view of it
        self._all = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.tensor = self._all[:nbytes]
        self._pieces = Pieces(total, self.granularity)

    @property
    def committed(self) -> int:
        return self._pieces.committed

    def commit(self, offset: int, nbytes: int) -> None:
        with self._pieces.adding(offset, nbytes):
            # Linux promises more than it has and ends somebody's process when it cannot keep it, so it is asked before
            free = cpu_facts().free_bytes
            if free < nbytes:
                raise MemoryError(_not_to_be_had(nbytes, f"{free / 2**20:.0f} MiB are free"))
            self._populate(offset, nbytes)

    def follow(self) -> None:
        pass

    def join(self) -> None:
        pass  # it is all zeros when `commit` returns

    def decommit(self, offset: int, nbytes: int) -> None:
        with self._pieces.removing(offset, nbytes):
            self._give_back(offset, nbytes)

    def close(self) -> None:
        for offset, nbytes in self._pieces.close():
            self.decommit(offset, nbytes)

    @torch.inference_mode()
    def _populate(self, offset: int, nbytes: int) -> None:
        if sys.platform == "linux":
            # also what somebody may have written there while it was not theirs
            self._memory.madvise(mmap.MADV_DONTNEED, offset, nbytes)
            try:
                self._memory.madvise(_MADV_POPULATE_WRITE, offset, nbytes)
                return
            except OSError as e:
                if e.errno not in _NOT_KNOWN_HERE:
                    self._give_back(offset, nbytes)
                    raise MemoryError(_not_to_be_had(nbytes, str(e))) from e
        self._all[offset : offset + nbytes].zero_()

    def _give_back(self, offset: int, nbytes: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, offset, nbytes)


def _not_to_be_had(nbytes: int, why: str) -> str:
    return f"{nbytes / 2**20:.0f} MiB of host memory are not to be had: {why}"
