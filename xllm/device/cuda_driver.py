"""The driver's virtual memory calls for one card (CUDA Driver API, "Virtual Memory Management"; Python's access to it is
the package cuda-bindings).

Addresses are reserved (cuMemAddressReserve). Memory is an allocation with a handle (cuMemCreate), mapped to addresses
(cuMemMap) and made accessible there (cuMemSetAccess). It lives until its handle is released and nothing of it is mapped.
An allocation is mapped and unmapped as a whole; neighbouring mappings are made accessible, and unmapped, in one call.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch

from xllm.core.errors import ConfigError


class CudaDriver:
    """Errors of the driver are raised: MemoryError where there is not enough memory, RuntimeError otherwise."""

    def __init__(self, device: torch.device):
        """`device` with its index; `torch` must have opened it. ConfigError without cuda-bindings."""
        self._device = device
        self._driver = driver = _driver()
        self._success = driver.CUresult.CUDA_SUCCESS
        self.call("cuInit", 0)
        self._allocation, self._access = _in_memory_of(driver, device)
        best = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(self.call("cuMemGetAllocationGranularity", self._allocation, best))

    def call(self, name: str, *arguments: Any) -> Any:
        """What the driver's function returns beside its error code: one value or None."""
        code, *values = getattr(self._driver, name)(*arguments)
        if code == self._success:
            return values[0] if values else None
        said = f"{name} answers {getattr(code, 'name', code)}"
        if code == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError(f"the GPU has not enough memory left: {said}")
        raise RuntimeError(f"CUDA error: {said}")

    def create(self, nbytes: int) -> Any:
        """Memory with whatever is in it -> its handle."""
        return self.call("cuMemCreate", nbytes, self._allocation, 0)

    def release(self, handle: Any) -> None:
        self.call("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handles: Sequence[Any]) -> None:
        """Whole allocations of `nbytes` each, one behind the other, not accessible: all, or an error and none."""
        done = 0
        try:
            for done, handle in enumerate(handles):
                self.call("cuMemMap", address + done * nbytes, nbytes, 0, handle, 0)
        except BaseException:
            if done:
                self.unmap(address, done * nbytes)
            raise

    def make_accessible(self, address: int, nbytes: int) -> None:
        self.call("cuMemSetAccess", address, nbytes, [self._access], 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Whole mappings. Does not wait for work that touches them."""
        self.call("cuMemUnmap", address, nbytes)

    def map_new(self, address: int, nbytes: int) -> None:
        """Accessible memory that goes when it is unmapped, or an error and nothing."""
        handle = self.create(nbytes)
        try:
            self.map(address, nbytes, [handle])
        except BaseException:
            self.release(handle)
            raise
        try:
            self.release(handle)
            self.make_accessible(address, nbytes)
        except BaseException:
            self.unmap(address, nbytes)
            raise

    def reserve(self, nbytes: int) -> "Addresses":
        """Whole granules."""
        return Addresses(self.call, nbytes, self.granularity)

    def tensor(self, addresses: "Addresses") -> torch.Tensor:
        """uint8 over all of them, which are bare. MemoryError where one granule of memory is not to be had."""
        # PyTorch may ask the driver what lies there, which for bare addresses answers that it does not know them
        self.map_new(addresses.first, self.granularity)
        try:
            tensor = torch.as_tensor(addresses, device=self._device)
        finally:
            self.unmap(addresses.first, self.granularity)
        if tensor.data_ptr() != addresses.first:
            raise RuntimeError("PyTorch has copied the range instead of looking at it")
        return tensor


class Addresses:
    """Reserved addresses, until the last tensor over them has gone. By then nothing may be mapped there."""

    def __init__(self, call: Callable[..., Any], nbytes: int, granularity: int):
        self.first = int(call("cuMemAddressReserve", nbytes, granularity, 0, 0))
        self._free = partial(call, "cuMemAddressFree", self.first, nbytes)
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (self.first, False), "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        with suppress(Exception):  # not reserved at all, or the driver has gone before us
            self._free()


@torch.inference_mode()
def zero_beside(parts: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Beside the model's work, and not waited for. -> what has happened once they are zeros."""
    with torch.cuda.stream(stream):
        for part in parts:
            part.zero_()
        return stream.record_event()


def _driver() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as e:
        raise ConfigError(
            "memory that comes and goes on a GPU needs the Python package cuda-bindings,"
            f" of the same major version as PyTorch's CUDA ({e})"
        ) from e


def _in_memory_of(driver: Any, device: torch.device) -> tuple[Any, Any]:
    """(CUmemAllocationProp, CUmemAccessDesc): ordinary memory of the card, read and written by the card itself."""
    allocation = driver.CUmemAllocationProp()
    allocation.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    access = driver.CUmemAccessDesc()
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    for location in (allocation.location, access.location):
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device.index
    return allocation, access
