"""A stand-in for the CUDA driver's virtual memory calls that keeps books, with PyTorch's side of it: zeroing runs at once,
and what waits for it is written down."""

import ctypes
import gc
import mmap
import os
import sys
import threading
from contextlib import nullcontext
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xllm.device import cuda_driver, pages_cpu

GRANULE = 4096


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class Driver:
    """Does what the driver's documentation says, on host memory; every misuse fails the test."""

    CUresult = Code
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="rw")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED="recommended")

    def __init__(self):
        self.calls: list[str] = []
        self.reserved: dict[int, Any] = {}  # by first address: a ctypes array
        self.handles: dict[int, int] = {}  # bytes of those not released
        self.mapped: dict[int, list] = {}  # by address: bytes, accessible
        self.under: dict[int, int] = {}  # the handle that was mapped, by address; it may have been released
        self.free = 1 << 30
        self.fails: dict[str, Code] = {}
        self.recorded: list[int] = []  # by whose thread, each event
        self.waited = 0  # for so many of them the steps wait
        self.file = os.memfd_create("all-memory")  # an allocation lies at the byte that its handle says

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not name.startswith("cu"):
            return found

        def call(*arguments):
            self.calls.append(name)
            if self.fails.get(name):
                return (self.fails[name], None)
            return found(*arguments)

        return call

    @staticmethod
    def CUmemAllocationProp():
        return SimpleNamespace(location=SimpleNamespace())

    CUmemAccessDesc = CUmemAllocationProp

    def cuInit(self, flags):
        assert flags == 0
        return (Code.CUDA_SUCCESS,)

    def cuMemGetAllocationGranularity(self, allocation, option):
        assert allocation.type == "pinned" and option == "recommended"
        assert vars(allocation.location) == {"type": "device", "id": 0}
        return Code.CUDA_SUCCESS, GRANULE

    def cuMemAddressReserve(self, nbytes, alignment, address, flags):
        assert (nbytes % GRANULE, alignment, address, flags) == (0, GRANULE, 0, 0)
        memory = pages_cpu._reserve(nbytes)  # to touch it before it is accessible is a segmentation fault
        self.reserved[ctypes.addressof(memory)] = memory
        return Code.CUDA_SUCCESS, ctypes.addressof(memory)

    def cuMemAddressFree(self, address, nbytes):
        assert len(self.reserved.pop(address)) == nbytes
        assert not any(address <= one < address + nbytes for one in self.mapped)
        return (Code.CUDA_SUCCESS,)

    def cuMemCreate(self, nbytes, allocation, flags):
        assert nbytes % GRANULE == 0 and flags == 0 and allocation.type == "pinned"
        if nbytes > self.free:
            return Code.CUDA_ERROR_OUT_OF_MEMORY, None
        self.free -= nbytes
        handle = os.fstat(self.file).st_size  # another one each time
        os.pwrite(self.file, b"\xab" * nbytes, handle)
        self.handles[handle] = nbytes
        return Code.CUDA_SUCCESS, handle

    def cuMemMap(self, address, nbytes, offset, handle, flags):
        assert (self.handles[handle], offset, flags) == (nbytes, 0, 0)
        assert address % GRANULE == 0
        assert any(
            one <= address and address + nbytes <= one + len(memory) for one, memory in self.reserved.items()
        )
        assert not any(
            address < one + size and one < address + nbytes for one, (size, _) in self.mapped.items()
        )
        self.mapped[address] = [nbytes, False]
        self.under[address] = handle
        return (Code.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, nbytes, access, count):
        assert count == len(access) == 1 and access[0].flags == "rw"
        assert vars(access[0].location) == {"type": "device", "id": 0}
        for one in self.whole_mappings(address, nbytes):
            assert not self.mapped[one][1]
            self.mapped[one][1] = True
            self.lay(one, 3, mmap.MAP_SHARED, self.file, self.under[one])
        return (Code.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, nbytes):
        for one in self.whole_mappings(address, nbytes):
            self.lay(one, 0, pages_cpu._RESERVED, -1, 0)
            size = self.mapped.pop(one)[0]
            handle = self.under.pop(one)
            if handle not in self.handles and handle not in self.under.values():
                self.free += size
        return (Code.CUDA_SUCCESS,)

    def cuMemRelease(self, handle):
        nbytes = self.handles.pop(handle)
        if handle not in self.under.values():
            self.free += nbytes
        return (Code.CUDA_SUCCESS,)

    def whole_mappings(self, address, nbytes):
        """Addresses of mappings that fill so many bytes, back to back."""
        found, end = [], address
        while end < address + nbytes:
            found.append(end)
            end += self.mapped[end][0]
        assert end == address + nbytes
        return found

    def lay(self, address, access, flags, file, offset):
        flags |= pages_cpu._MAP_FIXED
        assert (
            pages_cpu._libc().mmap(address, self.mapped[address][0], access, flags, file, offset) == address
        )


class Stream:
    """Beside the steps. Its events are numbered."""

    def __init__(self, driver):
        self._driver = driver

    def record_event(self):
        self._driver.recorded.append(threading.get_ident())
        return len(self._driver.recorded)

    def synchronize(self):
        self._driver.calls.append("synchronize")


class OrdinaryStream:
    """That of the steps."""

    def __init__(self, driver):
        self._driver = driver

    def wait_event(self, event):
        self._driver.calls.append("wait")
        self._driver.waited = max(self._driver.waited, event)


def stand_in(monkeypatch):
    """Yields the stand-in that is the driver from now on. All handles are released at the end."""
    if sys.platform != "linux":
        pytest.skip("its memory is a memfd")
    driver = Driver()

    def as_tensor(over, device):
        shown = over.__cuda_array_interface__
        (nbytes,), (first, read_only) = shown["shape"], shown["data"]
        assert (shown["typestr"], read_only, device) == ("|u1", False, torch.device("cuda", 0))
        assert driver.mapped.get(first, [0, False])[1], "PyTorch asks what lies at the first address"
        memory = (ctypes.c_uint8 * nbytes).from_address(first)
        memory.owner = over
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(cuda_driver, "import_module", sys.modules.__getitem__)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: Stream(driver))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: OrdinaryStream(driver))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (driver.free + (1 << 40), 1 << 41))
    yield driver
    gc.collect()
    os.close(driver.file)
    assert not driver.handles, "all have been released"
