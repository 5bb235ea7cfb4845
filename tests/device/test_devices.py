"""What every device promises, on each that this machine has."""

import threading

import numpy as np
import pytest
import torch

from xllm.device.table import DEVICES, open_device


def open_or_skip(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = open_device(name)
    device.prepare(threads=1)
    return device


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n == "cuda" else ()) for n in DEVICES])
def device(request):
    return open_or_skip(request.param)


@pytest.fixture(
    params=["reference", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def card(request):
    return open_or_skip(request.param)


def test_what_goes_up_comes_back(device):
    array = np.arange(12, dtype=np.int64).reshape(3, 4)
    there = device.upload(array)
    assert there.device.type == device.torch_device.type
    here = device.download(there * 2)
    device.mark().wait()
    assert here.tolist() == (array * 2).tolist()


def test_memory_is_told(device):
    free, total = device.memory()
    assert 0 < free <= total
    device.release()


def test_an_uploaded_array_may_be_changed_at_once(card):
    array = np.arange(1000)
    there = card.upload(array)
    target = torch.zeros(1000, dtype=torch.int64, device=card.torch_device)
    card.upload_into(target, array)
    array[:] = -1
    here, same = card.download(there), card.download(target)
    card.mark().wait()
    assert here.tolist() == same.tolist() == list(range(1000))


def test_a_download_is_of_its_place_in_the_order(card):
    numbers = torch.ones(4, device=card.torch_device)
    before = card.download(numbers)
    early = card.mark()
    numbers += 1
    after = card.download(numbers)
    card.mark().wait()
    early.wait()
    assert (before.tolist(), after.tolist()) == ([1.0] * 4, [2.0] * 4)


def test_the_cache_begins_finite(card):
    assert bool(card.empty((100, 10), torch.bfloat16).isfinite().all())


def test_a_graph_reads_what_lies_there_when_it_is_replayed(card):
    given = torch.zeros(4, device=card.torch_device)
    kept = torch.zeros(4, device=card.torch_device)

    def work():
        kept.add_(given)
        return (given * 2, kept + 0)

    graph = card.capture(work)
    kept.zero_()
    seen = []
    for number in (1.0, 5.0):
        card.upload_into(given, np.full(4, number, dtype=np.float32))
        graph.replay()
        seen.append([card.download(output) for output in graph.outputs])
    card.mark().wait()
    assert [[output[0].item() for output in outputs] for outputs in seen] == [[2.0, 1.0], [10.0, 6.0]]


def test_marks_tell_the_time_between_them(device):
    first = device.mark()
    numbers = torch.ones(1000, device=device.torch_device)
    for _ in range(10):
        numbers = numbers * 2
    second = device.mark()
    second.wait()
    first.wait()
    assert second.since(first) > 0
    assert first.since(first) == 0


def test_work_beside_comes_after_its_mark(device):
    numbers = torch.zeros(1 << 16, dtype=torch.uint8, device=device.torch_device)
    down, up = device.pinned(1 << 16), device.pinned(1 << 16)
    up[:] = 9
    busy = torch.ones(300, 300, device=device.torch_device)
    for n in range(1, 6):
        for _ in range(10):
            busy = (busy @ busy).softmax(0)
        numbers += n
        mark = device.mark()
        with device.beside(mark):
            down.copy_(numbers, non_blocking=True)
            numbers.copy_(up, non_blocking=True)
            copied = device.mark()
        copied.wait()
        assert down.unique().tolist() == [n if n == 1 else 9 + n]
        assert numbers.unique().tolist() == [9]
        assert copied.since(mark) >= 0


def test_a_mark_beside_is_not_one_of_the_ordinary_work(card):
    numbers = torch.ones(4, device=card.torch_device)
    here = card.download(numbers)
    mark = card.mark()
    later = card.download(numbers + 1)
    with card.beside(mark):
        beside = card.mark()
    end = card.mark()
    beside.wait()
    mark.wait()
    assert here.tolist() == [1.0] * 4
    end.wait()
    assert later.tolist() == [2.0] * 4


def test_work_beside_is_submitted_by_another_thread(card):
    numbers, there = torch.full((1000,), 7, device=card.torch_device), []
    down = card.pinned(1000 * numbers.element_size()).view(numbers.dtype)

    def copy(mark):
        with card.beside(mark):
            down.copy_(numbers, non_blocking=True)
            there.append(card.mark())

    later = card.download(numbers)
    thread = threading.Thread(target=copy, args=(card.mark(),))
    thread.start()
    latest = card.download(numbers + 1)
    thread.join()
    there[0].wait()
    assert down.unique().tolist() == [7]
    card.mark().wait()
    assert latest.unique().tolist() == [8]
    del later


def test_pinned_memory_has_the_size_asked_for(device):
    memory = device.pinned(3 * 4096 + 17)
    assert memory.dtype == torch.uint8
    assert memory.shape == (3 * 4096 + 17,)
    assert memory.device.type == "cpu"
    assert memory.is_pinned() == (device.torch_device.type == "cuda")
    memory[:] = 3
    assert memory.sum() == 3 * memory.numel()


@pytest.mark.gpu
def test_what_is_kept_is_there_for_work_to_come():
    card = open_or_skip("cuda")
    card.release()
    card.peak()
    large = torch.empty(1 << 28, dtype=torch.uint8, device=card.torch_device)
    del large
    assert card.peak() >= 1 << 28
    assert card.peak() < 1 << 28
    free, _ = card.memory()
    card.release(keep=1 << 28)
    assert free - card.memory()[0] <= 0, "the freed tensor was cached before"
    kept = card.memory()[0]
    large = torch.empty(1 << 28, dtype=torch.uint8, device=card.torch_device)
    assert card.memory()[0] == kept
    del large
    card.release()
    assert card.memory()[0] >= kept + (1 << 28)
