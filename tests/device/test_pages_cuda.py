"""Pages in a GPU's memory: the calls to the driver over a stand-in that keeps books, and what a card does with them."""

import random
import threading

import pytest
import torch

from tests.device.cuda_stand_in import GRANULE, Code, Driver, Stream, stand_in
from xllm.device.pages_cuda import CudaPages
from xllm.device.table import open_device

MIB = 1 << 20


@pytest.fixture
def driver(monkeypatch):
    yield from stand_in(monkeypatch)


def cuda_pages(pages=4, places=8):
    return CudaPages(2 * GRANULE, pages, places, torch.device("cuda", 0))


def test_the_calls_of_one_run(driver):
    space = cuda_pages()
    assert driver.free == 1 << 30, "nothing is left of looking at the range"
    driver.calls.clear()
    space.create(0, 3)
    assert driver.calls == ["cuMemCreate"] * 3
    assert not driver.mapped
    driver.calls.clear()
    space.map(1, range(3))
    assert driver.calls == [*["cuMemMap"] * 3, "cuMemSetAccess", "synchronize"]
    first = space.tensor.data_ptr()
    assert driver.mapped == {first + n * 2 * GRANULE: [2 * GRANULE, True] for n in (1, 2, 3)}
    driver.calls.clear()
    space.map(4, range(1, 3))
    assert driver.calls == [*["cuMemMap"] * 2, "cuMemSetAccess"], "they are clean"
    driver.calls.clear()
    space.unmap(2, 4)
    assert driver.calls == ["cuMemUnmap"]
    space.unmap(1)
    driver.calls.clear()
    space.map(1, [2, 0, 1, 1])
    assert driver.calls == [*["cuMemMap"] * 4, "cuMemSetAccess"], "whatever their numbers"
    driver.calls.clear()
    space.map(0, [1, 2, 2, 0, 1, 0, 2], replace=True)
    assert driver.calls == ["cuMemUnmap", *["cuMemMap"] * 7, "cuMemSetAccess"]
    space.unmap(2)
    space.unmap(4)
    driver.calls.clear()
    space.map(1, [2, 1, 0, 0], replace=True)
    assert driver.calls == ["cuMemUnmap"] * 2 + ["cuMemMap"] * 4 + ["cuMemSetAccess"]
    driver.calls.clear()
    space.unmap(4, 4, bare_ok=True)
    space.unmap(7, 1, bare_ok=True)
    assert driver.calls == ["cuMemUnmap"]
    space.unmap(0, 4)
    assert driver.free == (1 << 30) - 6 * GRANULE
    driver.calls.clear()
    space.destroy(0, 3)
    assert driver.calls == ["cuMemRelease"] * 3
    assert driver.free == 1 << 30
    space.close()


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess", "synchronize"])
@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize(
    ("code", "error"),
    [(Code.CUDA_ERROR_OUT_OF_MEMORY, MemoryError), (Code.CUDA_ERROR_ILLEGAL_ADDRESS, RuntimeError)],
)
def test_a_mapping_that_fails_leaves_nothing(driver, monkeypatch, name, after, code, error):
    space, really = cuda_pages(), driver.cuMemMap
    space.create(0, 4)
    space.map(0, [0])
    if name == "synchronize":
        monkeypatch.setattr(Driver, "cuIt", lambda self: (code,), raising=False)
        monkeypatch.setattr(Stream, "synchronize", lambda self: space._driver.call("cuIt"))
    elif name == "cuMemMap":
        left = iter(range(after))
        fails = lambda *a: really(*a) if next(left, None) is not None else (code, None)  # noqa: E731
        monkeypatch.setattr(driver, "cuMemMap", fails)
    else:
        driver.fails[name] = code
    with pytest.raises(error, match=code.name):
        space.map(2, range(1, 4))
    assert space.mappings == 1
    assert list(driver.mapped) == [space.tensor.data_ptr()]
    driver.fails.clear()
    monkeypatch.setattr(Stream, "synchronize", lambda self: None)
    monkeypatch.setattr(driver, "cuMemMap", really)
    space.map(2, range(1, 4))
    assert not space.tensor[4 * GRANULE : 10 * GRANULE].any(), "cleared, though it has been mapped before"
    space.close()


def test_more_pages_than_the_card_holds(driver):
    space = cuda_pages(pages=10)
    driver.free = 7 * 2 * GRANULE
    with pytest.raises(MemoryError, match="the GPU has not enough memory left: cuMemCreate"):
        space.create(1, 8)
    assert (space.created, driver.handles, driver.free) == (0, {}, 14 * GRANULE)
    space.create(1, 7)
    with pytest.raises(MemoryError):
        space.create(8, 1)
    assert space.created == 14 * GRANULE
    space.close()
    assert driver.free == 14 * GRANULE


def test_what_the_driver_does_not_take_back_stays_in_the_books(driver):
    space = cuda_pages()
    space.create(0, 2)
    space.map(0, [0])
    driver.fails["cuMemUnmap"] = driver.fails["cuMemRelease"] = Code.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="CUDA error: cuMemUnmap answers"):
        space.unmap(0)
    with pytest.raises(RuntimeError, match="CUDA error: cuMemRelease answers"):
        space.destroy(1, 1)
    assert (space.created, space.mappings) == (4 * GRANULE, 1)
    driver.fails.clear()
    space.close()
    assert (space.created, driver.handles, driver.mapped) == (0, {}, {})


def test_addresses_go_with_the_last_tensor(driver):
    space = cuda_pages()
    space.create(0, 1)
    space.map(0, [0])
    view = space.tensor.view(torch.bfloat16)[3:7]
    space.close()
    del space
    assert driver.reserved
    del view
    assert not driver.reserved


@pytest.mark.parametrize("name", ["cuMemAddressReserve", "cuMemCreate", "cuMemSetAccess"])
def test_a_space_that_cannot_be_made(driver, name):
    driver.fails[name] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(MemoryError, match=f"the GPU has not enough memory left: {name}"):
        cuda_pages()
    assert not driver.mapped and not driver.handles


# on a card


@pytest.fixture
def card():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    card = open_device("cuda")
    card.prepare(threads=1)
    return card


@pytest.mark.gpu
def test_one_stream_of_kernels_through_many_places(card):
    """Each kernel reads through another place what the one before it wrote, without a word in between."""
    size = card.reserve(1).granularity
    space = card.reserve_pages(size, 2, 1 << 21)  # addresses for terabytes
    space.create(0, 2)
    space.map(0, range(2))
    for n in range(1, 64):
        space.map(n * 32768 - 1, [n % 2])
    rows_NE = space.tensor.view(torch.float32).view(-1, size // 4)
    rows_NE[:2] = 0
    sums = torch.zeros(1000, device=card.torch_device, dtype=torch.float64)
    rnd, counts, expected = random.Random(0), [0, 0], []
    for n in range(1000):
        page = rnd.randrange(2)
        places = [page, *(m * 32768 - 1 for m in range(1, 64) if m % 2 == page)]
        source, target, reader = (rnd.choice(places) for _ in range(3))
        torch.add(rows_NE[source], 1, out=rows_NE[target])
        sums[n] = rows_NE[reader].sum(dtype=torch.float64)
        counts[page] += 1
        expected.append(counts[page] * (size // 4))
    assert sums.tolist() == expected
    space.close()


@pytest.mark.gpu
def test_places_are_mapped_anew_beside_running_kernels(card):
    size = card.reserve(1).granularity
    space = card.reserve_pages(size, 64, 512)
    space.create(0, 64)
    space.map(0, range(64))
    rows_NE = space.tensor.view(torch.float32).view(512, -1)
    rows_NE[:64] = torch.arange(64, device=card.torch_device, dtype=torch.float32)[:, None]
    torch.cuda.synchronize()
    wrong = torch.zeros(1, device=card.torch_device, dtype=torch.int64)
    stream = torch.cuda.Stream(card.torch_device)
    stop, errors = threading.Event(), []

    def remap():
        rnd = random.Random(1)
        try:
            while not stop.is_set():
                place, pages = 256 + rnd.randrange(200), rnd.choices(range(64), k=rnd.randrange(1, 18))
                space.map(place, pages, replace=True)
                with torch.cuda.stream(stream):  # so that this waits for its own reading alone
                    low, high = rows_NE[place : place + len(pages)].aminmax(dim=1)
                    seen = (low.tolist(), high.tolist())
                assert seen == (pages, pages)
        except BaseException as e:
            errors.append(e)

    space.map(64, range(8, 40))
    thread = threading.Thread(target=remap)
    thread.start()
    here = torch.arange(8, 40, device=card.torch_device, dtype=torch.float32)[:, None]
    for _ in range(2000):
        wrong += (rows_NE[64:96] != here).sum()
    torch.cuda.synchronize()
    stop.set()
    thread.join()
    assert not errors
    assert wrong.item() == 0
    space.close()


@pytest.mark.gpu
def test_a_graph_reads_whatever_lies_there(card):
    size = card.reserve(1).granularity
    space = card.reserve_pages(size, 3, 8)
    space.create(0, 3)
    space.map(0, range(3))
    rows_NE = space.tensor.view(torch.float32).view(8, -1)
    for n in range(3):
        rows_NE[n] = n + 1
    row = torch.full((1,), 5, dtype=torch.int64, device=card.torch_device)
    space.map(5, [0])
    graph = card.capture(lambda: (rows_NE.index_select(0, row).mean(),))
    for page in (0, 2, 1):
        torch.cuda.synchronize()
        space.unmap(5)
        space.map(5, [page])
        graph.replay()
        assert graph.outputs[0].item() == page + 1
    torch.cuda.synchronize()
    space.close()


@pytest.mark.gpu
def test_the_cards_memory_follows(card):
    free, total = card.memory()
    size = 64 * MIB
    pages = total // size + 1
    space = card.reserve_pages(size, pages, 4 * pages)
    with pytest.raises(MemoryError, match="the GPU has not enough memory left"):
        space.create(0, pages)
    assert space.created == 0
    assert abs(free - card.memory()[0]) < 64 * MIB
    space.create(0, 16)
    for n in range(4):
        space.map(16 * n, range(16))
    assert abs(free - card.memory()[0] - 1024 * MIB) < 64 * MIB, "once, however often it is mapped"
    space.unmap(0, 64)
    space.destroy(4, 8)
    assert abs(free - card.memory()[0] - 512 * MIB) < 64 * MIB
    space.close()
    assert abs(free - card.memory()[0]) < 64 * MIB
