"""What every device promises, on each that this machine has."""

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
