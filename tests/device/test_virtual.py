"""Addresses stay, memory comes and goes: the promises of a virtual range on every device, and the CUDA one's calls
against a stand-in for the driver that keeps books."""

import ctypes
import errno
import gc
import mmap
import random
import sys
import threading
from contextlib import nullcontext
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xllm.core.errors import ConfigError
from xllm.device import virtual_cpu, virtual_cuda
from xllm.device.table import DEVICES, open_device
from xllm.device.virtual import Pieces, whole_granules
from xllm.device.virtual_cpu import CpuRange
from xllm.device.virtual_cuda import CudaRange

MIB = 1 << 20
GRANULE = 4096  # of the stand-in
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def settle():
    """Nothing that was submitted touches anything any more."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# what every range promises


def open_or_skip(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = open_device(name)
    device.prepare(threads=1)
    return device


ON_ALL = [pytest.param(n, marks=pytest.mark.gpu if n == "cuda" else ()) for n in DEVICES]


@pytest.fixture(params=ON_ALL)
def device(request):
    return open_or_skip(request.param)


@pytest.fixture(params=[*ON_ALL, "stand-in"])
def reserve(request):
    """`Device.reserve` of all devices, and of CUDA over the stand-in."""
    if request.param == "stand-in":
        request.getfixturevalue("driver")
        return lambda nbytes: CudaRange(nbytes, torch.device("cuda", 0))
    return open_or_skip(request.param).reserve


def test_memory_comes_as_zeros_and_keeps_what_is_written(reserve):
    some = reserve(1 << 20)
    step = some.granularity
    some.close()
    memory = reserve(8 * step)
    assert memory.tensor.shape == (8 * step,)
    assert memory.tensor.dtype == torch.uint8
    assert memory.committed == 0
    address = memory.tensor.data_ptr()
    memory.commit(2 * step, 2 * step)
    memory.commit(0, step)
    assert memory.committed == 3 * step
    for offset, nbytes in ((0, step), (2 * step, 2 * step)):
        piece = memory.tensor[offset : offset + nbytes]
        assert not piece.any()
        piece.fill_(offset // step + 1)
    settle()
    memory.decommit(0, step)
    assert memory.committed == 2 * step
    memory.commit(step, step)
    memory.commit(0, step)
    assert not memory.tensor[: 2 * step].any(), "what was there before is gone"
    assert memory.tensor[2 * step : 4 * step].unique().tolist() == [3], "neighbours are left alone"
    assert memory.tensor.data_ptr() == address
    memory.close()
    memory.close()
    assert memory.committed == 0
    with pytest.raises(ValueError, match="closed"):
        memory.commit(0, step)


def test_it_is_seen_as_blocks_of_another_type(reserve):
    probe = reserve(1)
    step = probe.granularity
    memory = reserve(3 * step)
    blocks_NE = memory.tensor.view(torch.bfloat16).view(3, -1)
    memory.commit(step, step)
    blocks_NE[1] = 1.5
    assert blocks_NE[1].unique().tolist() == [1.5]
    assert memory.tensor[step : 2 * step].view(torch.bfloat16).sum(dtype=torch.float64) == 1.5 * (step // 2)
    memory.close()
    probe.close()


def test_the_last_piece_reaches_beyond_the_end(reserve):
    probe = reserve(1)
    step = probe.granularity
    memory = reserve(step + 100)
    assert memory.tensor.shape == (step + 100,)
    memory.commit(step, step)
    assert memory.tensor[step:].sum() == 0
    with pytest.raises(ValueError, match="not inside a range"):
        memory.commit(step, 2 * step)
    memory.close()
    probe.close()


def test_misuse_is_refused_and_changes_nothing(reserve):
    probe = reserve(1)
    step = probe.granularity
    memory = reserve(8 * step)
    memory.commit(2 * step, 3 * step)
    for offset, count in ((2, 3), (1, 2), (4, 1), (3, 1), (0, 8), (4, 3)):
        with pytest.raises(ValueError, match="committed already"):
            memory.commit(offset * step, count * step)
    for offset, count in ((2, 2), (3, 2), (0, 1), (1, 4)):
        with pytest.raises(ValueError, match="not committed as one piece"):
            memory.decommit(offset * step, count * step)
    for offset, nbytes in ((1, step), (0, step - 1)):
        with pytest.raises(ValueError, match="whole granules"):
            memory.commit(offset, nbytes)
    for offset, nbytes in ((-step, step), (0, 0), (0, -step), (8 * step, step)):
        with pytest.raises(ValueError, match="not inside a range"):
            memory.commit(offset, nbytes)
    assert memory.committed == 3 * step
    memory.commit(5 * step, step)
    memory.commit(step, step)
    memory.close()
    probe.close()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_range_of_nothing(reserve, nbytes):
    with pytest.raises(ValueError, match=f"a range of {nbytes} bytes"):
        reserve(nbytes)


def test_memory_that_is_not_to_be_had(device):
    memory = device.reserve(1 << 42)  # addresses there are
    with pytest.raises(MemoryError, match="memory"):
        memory.commit(0, 1 << 41)
    assert memory.committed == 0
    memory.commit(0, memory.granularity)
    memory.close()


def test_many_threads_at_once(reserve):
    probe = reserve(1)
    step = probe.granularity
    memory = reserve(32 * step)
    errors: list[BaseException] = []

    @torch.inference_mode()
    def use(thread):
        rnd = random.Random(thread)
        try:
            for _ in range(30):
                offset = (8 * thread + rnd.randrange(8)) * step
                memory.commit(offset, step)
                assert not memory.tensor[offset : offset + step].any()
                memory.tensor[offset : offset + step].fill_(thread + 1)
                settle()
                memory.decommit(offset, step)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert memory.committed == 0
    memory.close()
    probe.close()


def test_a_range_made_in_inference_mode_grows_outside_of_it(reserve):
    with torch.inference_mode():
        memory = reserve(1)
    memory.commit(0, memory.granularity)
    memory.close()


@pytest.mark.parametrize("seed", range(5))
def test_books_as_one_flag_for_each_granule(seed):
    rnd = random.Random(seed)
    pieces, model = Pieces(64, 4), [False] * 16
    owned: dict[int, int] = {}
    for _ in range(500):
        offset, count = rnd.randrange(16), rnd.randrange(1, 5)
        if rnd.random() < 0.6:
            good = offset + count <= 16 and not any(model[offset : offset + count])
            context = pieces.adding(4 * offset, 4 * count)
        else:
            if owned and rnd.random() < 0.8:
                offset, count = rnd.choice(sorted(owned.items()))
            good = owned.get(offset) == count
            context = pieces.removing(4 * offset, 4 * count)
        fails = rnd.random() < 0.2
        expected = pytest.raises(RuntimeError if good else ValueError)
        with nullcontext() if good and not fails else expected, context:
            if fails:
                raise RuntimeError("the work itself")
            if offset in owned:
                del owned[offset]
            else:
                owned[offset] = count
            model[offset : offset + count] = [offset in owned] * count
        assert pieces.committed == 4 * sum(model)
    assert pieces.close() == [(4 * o, 4 * c) for o, c in sorted(owned.items())]


def test_rounding():
    assert [whole_granules(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


# the CPU


@linux
def test_resident_memory_follows():
    memory = CpuRange(1 << 40)
    begun = resident()
    memory.tensor[: 4 * MIB].fill_(3)  # by somebody who may not
    for n in range(4):
        memory.commit(n * 100 * MIB, 32 * MIB)
    grown = resident() - begun
    assert abs(grown - 128 * MIB) < 8 * MIB
    assert not memory.tensor[: 32 * MIB].any()
    memory.tensor[: 32 * MIB].fill_(7)
    assert abs(resident() - begun - grown) < 8 * MIB, "it was all there"
    memory.decommit(0, 32 * MIB)
    memory.decommit(200 * MIB, 32 * MIB)
    assert abs(resident() - begun - 64 * MIB) < 8 * MIB
    memory.close()
    assert abs(resident() - begun) < 8 * MIB


@linux
def test_a_kernel_that_cannot_bring_pages_in(monkeypatch):
    monkeypatch.setattr(virtual_cpu, "_MADV_POPULATE_WRITE", 9999)
    memory = CpuRange(64 * MIB)
    memory.tensor[:MIB].fill_(3)  # by somebody who may not
    begun = resident()
    memory.commit(0, 32 * MIB)
    assert resident() - begun > 24 * MIB
    assert not memory.tensor[: 32 * MIB].any()
    memory.close()


@linux
def test_pages_that_the_system_does_not_bring_in():
    memory = CpuRange(64 * MIB)
    real, asked = memory._memory, []

    def madvise(advice, offset, nbytes):
        asked.append(advice)
        if advice == virtual_cpu._MADV_POPULATE_WRITE:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        real.madvise(advice, offset, nbytes)

    memory._memory = SimpleNamespace(madvise=madvise)  # type: ignore[assignment]
    with pytest.raises(
        MemoryError, match=r"32 MiB of host memory are not to be had: .*Cannot allocate memory"
    ):
        memory.commit(0, 32 * MIB)
    assert asked[-1] == mmap.MADV_DONTNEED, "of some pages it did"
    assert memory.committed == 0


def test_what_the_machine_has_not_free_is_not_taken(monkeypatch):
    memory = CpuRange(64 * MIB)
    monkeypatch.setattr(virtual_cpu, "cpu_facts", lambda: SimpleNamespace(free_bytes=10 * MIB))
    with pytest.raises(MemoryError, match="32 MiB of host memory are not to be had: 10 MiB are free"):
        memory.commit(0, 32 * MIB)
    memory.commit(0, 8 * MIB)
    memory.close()


def test_addresses_that_the_system_does_not_have():
    with pytest.raises(MemoryError, match="the system reserves no"):
        CpuRange(1 << 60)


def test_host_memory_lives_as_long_as_a_view():
    memory = CpuRange(4096)
    memory.commit(0, memory.granularity)
    view = memory.tensor[5:10]
    del memory
    gc.collect()
    view.fill_(2)
    assert view.sum() == 10


# CUDA, over a stand-in


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
        self.reserved: dict[int, mmap.mmap] = {}
        self.handles: dict[int, int] = {}  # bytes
        self.mapped: dict[int, list] = {}  # by address: bytes, accessible
        self.under: dict[int, int] = {}  # the handle that was mapped, by address
        self.free = 1 << 30
        self.fails: dict[str, Code] = {}

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
        memory = mmap.mmap(-1, nbytes)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.reserved[first] = memory
        return Code.CUDA_SUCCESS, first

    def cuMemAddressFree(self, address, nbytes):
        assert len(self.reserved.pop(address)) == nbytes
        assert not any(address <= one < address + nbytes for one in self.mapped)
        return (Code.CUDA_SUCCESS,)

    def cuMemCreate(self, nbytes, allocation, flags):
        assert nbytes % GRANULE == 0 and flags == 0 and allocation.type == "pinned"
        if nbytes > self.free:
            return Code.CUDA_ERROR_OUT_OF_MEMORY, None
        self.free -= nbytes
        handle = len(self.calls)  # another one each time
        self.handles[handle] = nbytes
        return Code.CUDA_SUCCESS, handle

    def cuMemMap(self, address, nbytes, offset, handle, flags):
        assert (self.handles[handle], offset, flags) == (nbytes, 0, 0)
        assert address % GRANULE == 0
        assert not any(
            address < one + size and one < address + nbytes for one, (size, _) in self.mapped.items()
        )
        first = max(one for one in self.reserved if one <= address)
        self.reserved[first][address - first : address - first + nbytes] = (
            b"\xab" * nbytes
        )  # within, or it raises
        self.mapped[address] = [nbytes, False]
        self.under[address] = handle
        return (Code.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, nbytes, access, count):
        assert count == len(access) == 1 and access[0].flags == "rw"
        assert vars(access[0].location) == {"type": "device", "id": 0}
        assert self.mapped[address] == [nbytes, False]
        self.mapped[address][1] = True
        return (Code.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, nbytes):
        assert self.mapped.pop(address)[0] == nbytes
        if self.under.pop(address) not in self.handles:
            self.free += nbytes
        return (Code.CUDA_SUCCESS,)

    def cuMemRelease(self, handle):
        nbytes = self.handles.pop(handle)
        if handle not in self.under.values():
            self.free += nbytes
        return (Code.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch):
    """The stand-in, with PyTorch's side of it: tensors over its addresses, streams that do nothing."""
    driver = Driver()
    waited = SimpleNamespace(synchronize=lambda: driver.calls.append("synchronize"))

    def as_tensor(over, device):
        shown = over.__cuda_array_interface__
        (nbytes,), (first, read_only) = shown["shape"], shown["data"]
        assert (shown["typestr"], read_only, device) == ("|u1", False, torch.device("cuda", 0))
        assert driver.mapped.get(first, [0, False])[1], "PyTorch asks what lies at the first address"
        memory = (ctypes.c_uint8 * nbytes).from_address(first)
        memory.owner = over
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(virtual_cuda, "import_module", sys.modules.__getitem__)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: waited)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    yield driver
    gc.collect()
    assert not driver.handles, "all have been released"


def cuda_range(nbytes=8 * GRANULE):
    return CudaRange(nbytes, torch.device("cuda", 0))


def test_the_calls_of_one_piece(driver):
    memory = cuda_range()
    assert not driver.mapped, "nothing is left of looking at the range"
    assert driver.free == 1 << 30
    driver.calls.clear()
    memory.commit(GRANULE, 2 * GRANULE)
    assert driver.calls == ["cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess", "synchronize"]
    assert driver.mapped == {memory.tensor.data_ptr() + GRANULE: [2 * GRANULE, True]}
    driver.calls.clear()
    memory.decommit(GRANULE, 2 * GRANULE)
    assert driver.calls == ["cuMemUnmap"]
    assert driver.free == 1 << 30
    memory.close()


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "synchronize"])
@pytest.mark.parametrize(
    ("code", "error"),
    [(Code.CUDA_ERROR_OUT_OF_MEMORY, MemoryError), (Code.CUDA_ERROR_ILLEGAL_ADDRESS, RuntimeError)],
)
def test_a_failure_in_the_middle_leaves_nothing(driver, monkeypatch, name, code, error):
    memory = cuda_range()
    memory.commit(0, GRANULE)
    before = driver.free
    driver.fails[name] = code
    if name == "synchronize":
        monkeypatch.setattr(
            memory, "_stream", SimpleNamespace(synchronize=lambda: virtual_cuda._call(driver, "cuIt"))
        )
        monkeypatch.setattr(Driver, "cuIt", lambda self: (code,), raising=False)
    with pytest.raises(error, match=code.name):
        memory.commit(GRANULE, 3 * GRANULE)
    assert memory.committed == GRANULE
    assert list(driver.mapped) == [memory.tensor.data_ptr()]
    assert not driver.handles
    assert driver.free == before
    driver.fails.clear()
    monkeypatch.setattr(memory, "_stream", SimpleNamespace(synchronize=lambda: None))
    memory.commit(GRANULE, 3 * GRANULE)
    memory.close()


def test_a_handle_that_does_not_go_takes_the_piece_with_it(driver):
    memory = cuda_range()
    driver.fails["cuMemRelease"] = Code.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="cuMemRelease answers CUDA_ERROR_INVALID_VALUE"):
        memory.commit(0, GRANULE)
    assert not driver.mapped
    assert memory.committed == 0
    driver.handles.clear()


def test_memory_that_does_not_go_stays_in_the_books(driver):
    memory = cuda_range()
    memory.commit(0, GRANULE)
    driver.fails["cuMemUnmap"] = Code.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="CUDA error: cuMemUnmap answers"):
        memory.decommit(0, GRANULE)
    assert memory.committed == GRANULE
    driver.fails.clear()
    memory.decommit(0, GRANULE)
    memory.close()


def test_addresses_go_with_the_last_tensor(driver):
    memory = cuda_range()
    memory.commit(0, GRANULE)
    view = memory.tensor.view(torch.bfloat16)[3:7]
    memory.close()
    assert not driver.mapped
    del memory
    gc.collect()
    assert driver.reserved
    del view
    gc.collect()
    assert not driver.reserved
    assert driver.calls[-1] == "cuMemAddressFree"


@pytest.mark.parametrize("name", ["cuMemAddressReserve", "cuMemCreate", "cuMemSetAccess"])
def test_a_range_that_cannot_be_made(driver, name):
    driver.fails[name] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(MemoryError, match=f"the GPU has not enough memory left: {name}"):
        cuda_range()
    gc.collect()
    assert not driver.reserved and not driver.mapped


def test_a_copy_of_the_range_is_not_taken_for_it(driver, monkeypatch):
    monkeypatch.setattr(torch, "as_tensor", lambda over, device: torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="has copied the range"):
        cuda_range()
    assert not driver.mapped


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ConfigError, match="needs the Python package cuda-bindings"):
        cuda_range()


# on a card


@pytest.fixture
def card():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    card = open_device("cuda")
    card.prepare(threads=1)
    return card


@pytest.mark.gpu
def test_the_cards_memory_follows(card):
    memory = card.reserve(1 << 40)
    free = card.memory()[0]
    for n in range(4):
        memory.commit(n * 640 * MIB, 256 * MIB)
    assert abs(free - card.memory()[0] - 1024 * MIB) < 64 * MIB
    for n in (3, 1):
        memory.decommit(n * 640 * MIB, 256 * MIB)
    assert abs(free - card.memory()[0] - 512 * MIB) < 64 * MIB
    memory.close()
    assert abs(free - card.memory()[0]) < 64 * MIB


@pytest.mark.gpu
def test_a_graph_sees_memory_that_came_after_it(card):
    memory = card.reserve(1 << 30)
    step = memory.granularity
    rows_NE = memory.tensor.view(torch.float32).view(-1, step // 4)
    memory.commit(0, step)
    row = torch.zeros(1, dtype=torch.int64, device=card.torch_device)
    graph = card.capture(lambda: (rows_NE.index_select(0, row).sum(),))
    last = len(rows_NE) - 1
    for number in (2.0, 3.0):
        memory.commit(last * step, step)
        rows_NE[last] = number
        row.fill_(last)
        graph.replay()
        assert graph.outputs[0].item() == number * (step // 4)
        torch.cuda.synchronize()
        memory.decommit(last * step, step)
    row.fill_(0)
    graph.replay()
    assert graph.outputs[0].item() == 0
    memory.close()


@pytest.mark.gpu
def test_another_thread_commits_while_the_card_works(card):
    memory = card.reserve(1 << 34)
    step = 64 * MIB
    busy = torch.ones(2000, 2000, device=card.torch_device)

    def grow():
        for n in range(64):
            memory.commit(n * step, step)

    thread = threading.Thread(target=grow)
    thread.start()
    while thread.is_alive():
        busy = (busy @ busy).softmax(0)
    thread.join()
    assert not memory.tensor[: 64 * step].any()
    assert bool(busy.isfinite().all())
    here = card.pinned(step)
    memory.tensor[5 * step : 6 * step].fill_(9)
    with card.beside(card.mark()):
        here.copy_(memory.tensor[5 * step : 6 * step], non_blocking=True)
        card.mark().wait()
    assert here.unique().tolist() == [9]
    memory.close()
