"""A virtual range in a GPU's memory. A piece is one allocation, mapped to its place. Its handle is released as soon as it
is mapped: the memory lives until it is unmapped, so the mapping alone is to be kept in mind."""

import threading
from contextlib import suppress

import torch

from xllm.device.cuda_driver import CudaDriver, zero_beside
from xllm.device.virtual import Pieces, whole_granules

SPARE_BYTES = (
    512 << 20
)  # left for graphs and work of every program on the card: they fail where KV would wait


class CudaRange:
    """See `VirtualRange`. Nothing may touch what has no memory, not even a masked-out load that a kernel makes from a
    default address. `torch` must have opened the device.

    Not every launch is possible where the beginning of the range is bare: Triton asks the driver about each tensor it
    is given, by its first address. Who gives kernels the whole range keeps the first piece committed.
    """

    def __init__(self, nbytes: int, device: torch.device):
        """`device` with its index. ConfigError without cuda-bindings, MemoryError where one granule is not to be had,
        RuntimeError for whatever else the driver says."""
        if nbytes <= 0:
            raise ValueError(f"a range of {nbytes} bytes")
        self._driver = CudaDriver(device)
        self.granularity = self._driver.granularity
        total = whole_granules(nbytes, self.granularity)
        self._pieces = Pieces(total, self.granularity)
        addresses = self._driver.reserve(total)
        self._first = addresses.first
        self._device = device
        # -1 goes before the steps: somebody waits for the memory, and the work is one of microseconds
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._joining = threading.Lock()
        self._zeroed: torch.cuda.Event | None = None  # behind the last zeroing
        self._unjoined: torch.cuda.Event | None = None  # the same, until it has been joined
        self._all = self._driver.tensor(addresses)  # holds on to the addresses, and so does every view of it
        self.tensor = self._all[:nbytes]

    @property
    def committed(self) -> int:
        return self._pieces.committed

    def commit(self, offset: int, nbytes: int) -> None:
        with self._pieces.adding(offset, nbytes):
            free = torch.cuda.mem_get_info(self._device)[0]
            if free < nbytes + SPARE_BYTES:
                raise MemoryError(
                    f"the GPU has not enough memory left: {free / 2**20:.0f} MiB are free, of which {SPARE_BYTES >> 20} stay so"
                )
            self._driver.map_new(self._first + offset, nbytes)
            try:
                zeroed = zero_beside([self._all[offset : offset + nbytes]], self._stream)
            except BaseException:
                with suppress(Exception):  # some of it may have been submitted
                    self._stream.synchronize()
                self._unmap(offset, nbytes)
                raise
            with self._joining:
                self._zeroed = self._unjoined = (
                    zeroed  # and with it all that was committed before, in the same stream
                )

    def join(self) -> None:
        if self._unjoined is None:
            return
        with self._joining:
            if self._unjoined is not None:
                torch.cuda.current_stream(self._device).wait_event(self._unjoined)
                self._unjoined = None  # no earlier: who finds nothing to join relies on that wait

    def follow(self) -> None:
        if (zeroed := self._zeroed) is not None:
            torch.cuda.current_stream(self._device).wait_event(zeroed)

    def decommit(self, offset: int, nbytes: int) -> None:
        with self._pieces.removing(offset, nbytes):
            self._stream.synchronize()  # a piece may go before it was zeroed
            self._unmap(offset, nbytes)

    def close(self) -> None:
        for offset, nbytes in self._pieces.close():
            self.decommit(offset, nbytes)

    def _unmap(self, offset: int, nbytes: int) -> None:
        self._driver.unmap(self._first + offset, nbytes)
