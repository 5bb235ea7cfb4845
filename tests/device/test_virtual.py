"""Addresses stay, memory comes and goes: the promises of a virtual range on every device, and the CUDA one's calls
against a stand-in for the driver that keeps books."""

import errno
import gc
import mmap
import random
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.device.cuda_stand_in import GRANULE, Code, Driver, OrdinaryStream, Stream, stand_in
from xllm.core.errors import ConfigError
from xllm.device import virtual_cpu
from xllm.device.table import DEVICES, open_device
from xllm.device.virtual import Pieces, whole_granules
from xllm.device.virtual_cpu import CpuRange
from xllm.device.virtual_cuda import SPARE_BYTES, CudaRange

MIB = 1 << 20
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
    memory.join()
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
    memory.join()
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
    memory.join()
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
    memory.join()
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
                memory.join()
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


@pytest.fixture
def driver(monkeypatch):
    yield from stand_in(monkeypatch)


def cuda_range(nbytes=8 * GRANULE):
    return CudaRange(nbytes, torch.device("cuda", 0))


def test_the_calls_of_one_piece(driver):
    memory = cuda_range()
    assert not driver.mapped, "nothing is left of looking at the range"
    assert driver.free == 1 << 30
    driver.calls.clear()
    memory.commit(GRANULE, 2 * GRANULE)
    assert driver.calls == ["cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess"], "nobody waits"
    assert len(driver.recorded) == 1
    assert driver.mapped == {memory.tensor.data_ptr() + GRANULE: [2 * GRANULE, True]}
    driver.calls.clear()
    memory.decommit(GRANULE, 2 * GRANULE)
    assert driver.calls == ["synchronize", "cuMemUnmap"], "it may not have been zeroed yet"
    assert driver.free == 1 << 30
    memory.close()


def test_some_memory_stays_for_work_that_cannot_wait(driver, monkeypatch):
    memory = CudaRange(4 * GRANULE, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (SPARE_BYTES + GRANULE - 1, 1 << 41))
    with pytest.raises(MemoryError, match="512 stay so"):
        memory.commit(0, GRANULE)
    assert memory.committed == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (SPARE_BYTES + GRANULE, 1 << 41))
    memory.commit(0, GRANULE)
    memory.close()


def test_steps_come_behind_the_zeroing_of_all_there_is(driver):
    memory = cuda_range()
    driver.calls.clear()
    memory.join()
    assert driver.calls == [], "there is nothing"
    memory.commit(0, GRANULE)
    memory.commit(2 * GRANULE, GRANULE)
    assert driver.waited == 0
    memory.join()
    assert driver.waited == 2, "one stream zeroes, so the last one is enough"
    driver.calls.clear()
    memory.join()
    assert driver.calls == []
    memory.commit(GRANULE, GRANULE)
    memory.join()
    assert driver.waited == 3
    memory.close()


def test_a_wait_that_fails_is_tried_again(driver, monkeypatch):
    memory = cuda_range()
    memory.commit(0, GRANULE)
    with monkeypatch.context() as patched:
        patched.setattr(OrdinaryStream, "wait_event", lambda self, event: driver.cuNothing())
        with pytest.raises(AttributeError):
            memory.join()
    memory.join()
    assert driver.waited == 1
    memory.close()


def test_many_threads_commit_and_join(driver, monkeypatch):
    """Whoever has joined what it committed finds the steps behind it, whichever thread made them wait."""
    memory = cuda_range(4 * 8 * GRANULE)
    errors: list[BaseException] = []
    plain = OrdinaryStream.wait_event

    def slow(self, event):
        time.sleep(1e-5)
        plain(self, event)

    monkeypatch.setattr(OrdinaryStream, "wait_event", slow)

    def use(thread):
        try:
            for n in range(200):
                offset = (8 * thread + n % 8) * GRANULE
                memory.commit(offset, GRANULE)
                mine = max(i for i, who in enumerate(driver.recorded, 1) if who == threading.get_ident())
                memory.join()
                assert driver.waited >= mine
                memory.decommit(offset, GRANULE)
        except BaseException as e:
            errors.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not errors
    memory.close()


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "record_event"])
@pytest.mark.parametrize(
    ("code", "error"),
    [(Code.CUDA_ERROR_OUT_OF_MEMORY, MemoryError), (Code.CUDA_ERROR_ILLEGAL_ADDRESS, RuntimeError)],
)
def test_a_failure_in_the_middle_leaves_nothing(driver, monkeypatch, name, code, error):
    memory = cuda_range()
    memory.commit(0, GRANULE)
    before = driver.free
    driver.fails[name] = code
    if name == "record_event":
        monkeypatch.setattr(Driver, "cuIt", lambda self: (code,), raising=False)
        monkeypatch.setattr(Stream, "record_event", lambda self: memory._driver.call("cuIt"))
        driver.calls.clear()
    with pytest.raises(error, match=code.name):
        memory.commit(GRANULE, 3 * GRANULE)
    if name == "record_event":
        assert driver.calls[-2:] == ["synchronize", "cuMemUnmap"], "some of it may have been submitted"
    assert memory.committed == GRANULE
    assert list(driver.mapped) == [memory.tensor.data_ptr()]
    assert not driver.handles
    assert driver.free == before
    driver.fails.clear()
    monkeypatch.setattr(Stream, "record_event", lambda self: 1)
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
    memory.join()
    row = torch.zeros(1, dtype=torch.int64, device=card.torch_device)
    graph = card.capture(lambda: (rows_NE.index_select(0, row).sum(),))
    last = len(rows_NE) - 1
    for number in (2.0, 3.0):
        memory.commit(last * step, step)
        memory.join()
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
    memory.join()
    assert not memory.tensor[: 64 * step].any()
    assert bool(busy.isfinite().all())
    here = card.pinned(step)
    memory.tensor[5 * step : 6 * step].fill_(9)
    with card.beside(card.mark()):
        here.copy_(memory.tensor[5 * step : 6 * step], non_blocking=True)
        card.mark().wait()
    assert here.unique().tolist() == [9]
    memory.close()


@pytest.mark.gpu
def test_nobody_waits_for_the_zeroing_but_the_work_behind_it(card):
    """Memory is committed at once behind a queue of work, read after it, and may go before it was zeroed."""
    memory = card.reserve(1 << 34)
    step, pieces = 64 * MIB, 16
    memory.commit(0, step)  # what is set up on first use
    memory.join()
    busy = torch.ones(8000, 8000, device=card.torch_device)
    wrong = torch.zeros(1, dtype=torch.int64, device=card.torch_device)
    for _ in range(3):
        torch.cuda.synchronize()
        for _ in range(40):  # 20 ms each
            busy = (busy @ busy).softmax(0)
        queued = torch.cuda.Event()
        queued.record()
        begun = time.perf_counter()
        for n in range(1, pieces):
            memory.commit(n * step, step)
        took = time.perf_counter() - begun
        assert not queued.query(), "the card is still busy"
        memory.decommit(step, step)
        memory.commit(step, step)
        memory.join()
        wrong += memory.tensor[: pieces * step].count_nonzero()
        memory.tensor[: pieces * step].fill_(7)
        memory.tensor[:step].zero_()
        assert took / pieces < 2e-3, f"{took / pieces * 1e3:.2f} ms for a piece"
        torch.cuda.synchronize()
        for n in range(1, pieces):
            memory.decommit(n * step, step)
    assert wrong.item() == 0
    memory.close()
