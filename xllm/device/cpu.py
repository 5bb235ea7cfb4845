"""The CPU as a device: threads and memory. Its "stream" is the executor's thread: work runs in the order it came."""

from collections.abc import Callable

import numpy as np
import torch


class CpuDevice:
    torch_device = torch.device("cpu")
    asynchronous = False

    def prepare(self, *, threads: int) -> None:
        # Nothing else of the thread is changed (denormals stay denormals): with depth 1 it is the caller's own.
        torch.set_num_threads(threads)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # malloc of this size is mmap: pages become resident when a block is first written
        return torch.empty(shape, dtype=dtype)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def mark(self) -> Callable[[], None]:
        return _nothing_to_wait_for


def _nothing_to_wait_for() -> None:
    pass
