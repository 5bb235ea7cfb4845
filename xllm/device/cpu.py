"""The CPU as a device: threads and memory. Its "stream" is the executor's thread: work runs in the order it came."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import psutil
import torch

from xllm.device.pages import PageSpace
from xllm.device.pages_cpu import CpuPages
from xllm.device.table import Graph
from xllm.device.virtual import VirtualRange
from xllm.device.virtual_cpu import CpuRange


class ClockMark:
    """A moment: all work before it has run by then."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        pass

    def since(self, earlier: "ClockMark") -> float:
        return self._at - earlier._at


class CpuDevice:
    torch_device = torch.device("cpu")
    asynchronous = False

    def prepare(self, *, threads: int) -> None:
        # Nothing else of the thread is changed (denormals stay denormals): with depth 1 it is the caller's own.
        torch.set_num_threads(threads)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # malloc of this size is mmap: pages become resident when a block is first written
        return torch.empty(shape, dtype=dtype)

    def reserve(self, nbytes: int) -> VirtualRange:
        return CpuRange(nbytes)

    def reserve_pages(self, page_bytes: int, pages: int, places: int) -> PageSpace:
        return CpuPages(page_bytes, pages, places)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def upload_into(self, target: torch.Tensor, array: np.ndarray) -> None:
        target.copy_(torch.from_numpy(array))

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def mark(self) -> "ClockMark":
        return ClockMark()

    def beside(self, after: Any, lane: int = 0) -> AbstractContextManager[None]:
        return nullcontext()  # what came before a mark had run when the mark was made

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def is_lost(self, error: Exception) -> bool:
        return False

    def memory(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def peak(self) -> int:
        return 0

    def release(self, keep: int = 0) -> None:
        pass  # what is freed goes back by itself

    def capture(self, work: Callable[[], tuple[torch.Tensor, ...]]) -> Graph:
        """Nothing is saved here: a replay does the work again."""
        outputs = work()

        def replay() -> None:
            for output, numbers in zip(outputs, work(), strict=True):
                output.copy_(numbers)

        return Graph(replay, outputs)
