"""Host memory that a driver knows of, with a stand-in for the driver."""

import gc
from types import SimpleNamespace

import pytest
import torch

from xllm.device.cuda import CudaDevice


@pytest.fixture
def driver(monkeypatch):
    """What is registered, by address; `failure` is what the next call answers."""
    known: dict[int, int] = {}
    answer = SimpleNamespace(known=known, failure=0)

    def register(address, nbytes, flags):
        if not answer.failure:
            known[address] = nbytes
        return answer.failure

    def unregister(address):
        del known[address]
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return answer


def test_it_is_known_as_long_as_anybody_sees_a_part_of_it(driver):
    memory = CudaDevice().pinned(1_000_000)
    assert driver.known == {memory.data_ptr(): 1_000_000}, "and no more than was asked for"
    memory[:] = 5
    rows = memory.view(1000, 1000)[3:5].numpy()
    del memory
    gc.collect()
    assert driver.known
    assert rows.min() == rows.max() == 5
    del rows
    gc.collect()
    assert not driver.known


def test_what_cannot_be_pinned_is_said(driver):
    driver.failure = 2
    with pytest.raises(RuntimeError, match=r"CUDA error 2: 1\.0 GiB of host memory cannot be pinned"):
        CudaDevice().pinned(1 << 30)
    gc.collect()
    assert not driver.known
