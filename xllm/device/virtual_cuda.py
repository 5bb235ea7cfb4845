"""A virtual range in a GPU's memory, by the driver's virtual memory management (CUDA Driver API, "Virtual Memory
Management"; Python's access to it is the package cuda-bindings).

Addresses are reserved once (cuMemAddressReserve). A piece is one allocation (cuMemCreate), mapped to its place (cuMemMap)
and made accessible (cuMemSetAccess). Its handle is released as soon as it is mapped: the memory lives until it is
unmapped, so the mapping alone is to be kept in mind. cuMemUnmap takes back whole mappings only.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch

from xllm.core.errors import ConfigError
from xllm.device.virtual import Pieces, whole_granules


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
        driver = _driver()
        self._call: Callable[..., Any] = partial(_call, driver)
        self._call("cuInit", 0)
        self._allocation, self._access = _in_memory_of(driver, device)
        best = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._allocation, best))
        total = whole_granules(nbytes, self.granularity)
        self._pieces = Pieces(total, self.granularity)
        self._addresses = _Addresses(self._call, total, self.granularity)
        self._stream = torch.cuda.Stream(device)
        self._all = self._tensor(device)
        self.tensor = self._all[:nbytes]

    @property
    def committed(self) -> int:
        return self._pieces.committed

    def commit(self, offset: int, nbytes: int) -> None:
        with self._pieces.adding(offset, nbytes):
            self._map(offset, nbytes)
            try:
                self._zero(offset, nbytes)
            except BaseException:
                self._unmap(offset, nbytes)
                raise

    def decommit(self, offset: int, nbytes: int) -> None:
        with self._pieces.removing(offset, nbytes):
            self._unmap(offset, nbytes)

    def close(self) -> None:
        for offset, nbytes in self._pieces.close():
            self.decommit(offset, nbytes)

    def _tensor(self, device: torch.device) -> torch.Tensor:
        """uint8 over all addresses."""
        # PyTorch may ask the driver what lies there, which for bare addresses answers that it does not know them
        self._map(0, self.granularity)
        try:
            tensor = torch.as_tensor(self._addresses, device=device)
        finally:
            self._unmap(0, self.granularity)
        if tensor.data_ptr() != self._addresses.first:
            raise RuntimeError("PyTorch has copied the range instead of looking at it")
        return tensor

    def _map(self, offset: int, nbytes: int) -> None:
        """Accessible memory with whatever is in it, or an error and nothing."""
        address = self._addresses.first + offset
        handle = self._call("cuMemCreate", nbytes, self._allocation, 0)
        try:
            self._call("cuMemMap", address, nbytes, 0, handle, 0)
        except BaseException:
            self._call("cuMemRelease", handle)
            raise
        try:
            self._call("cuMemRelease", handle)
            self._call("cuMemSetAccess", address, nbytes, [self._access], 1)
        except BaseException:
            self._unmap(offset, nbytes)
            raise

    def _unmap(self, offset: int, nbytes: int) -> None:
        self._call("cuMemUnmap", self._addresses.first + offset, nbytes)

    @torch.inference_mode()
    def _zero(self, offset: int, nbytes: int) -> None:
        # beside the model's work, and waited for: whoever hears of the memory may use it in any order of work
        with torch.cuda.stream(self._stream):
            self._all[offset : offset + nbytes].zero_()
        self._stream.synchronize()


class _Addresses:
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


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    """What the driver's function returns beside its error code: one value or None."""
    code, *values = getattr(driver, name)(*arguments)
    if code == driver.CUresult.CUDA_SUCCESS:
        return values[0] if values else None
    said = f"{name} answers {getattr(code, 'name', code)}"
    if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise MemoryError(f"the GPU has not enough memory left: {said}")
    raise RuntimeError(f"CUDA error: {said}")
