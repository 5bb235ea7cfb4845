import torch

from xllm.device.cpu import CpuDevice
from xllm.device.table import open_device


def test_the_callers_thread_keeps_its_arithmetic():
    """Flushing denormals once leaked out of an in-process engine into everything else the thread computed."""
    threads = torch.get_num_threads()
    CpuDevice().prepare(threads=threads)
    assert 5e-324 / 1.0 > 0.0
    assert torch.get_num_threads() == threads


def test_the_cpu_is_in_the_table():
    device = open_device("cpu")
    assert device.empty((2, 3), torch.bfloat16).shape == (2, 3)
