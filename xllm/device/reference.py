"""A device that behaves as a card does, on the CPU in plain PyTorch: slow, exact, and the same for everybody.

What a card would punish shows here at once: downloads that are read before they were waited for hold nothing, arrays
are copied when they are uploaded, and graphs only see memory that stays where it is.
"""

import gc
from collections.abc import Callable

import numpy as np
import psutil
import torch

from xllm.device.cpu import ClockMark
from xllm.device.table import Graph


class PendingMark(ClockMark):
    """Holds the downloads that arrive when it is waited for."""

    __slots__ = ("_pending",)

    def __init__(self, pending: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self._pending = pending

    @torch.inference_mode()
    def wait(self) -> None:
        while self._pending:
            host, numbers = self._pending.pop()
            host.copy_(numbers)


class ReferenceDevice:
    torch_device = torch.device("cpu")
    asynchronous = True

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prepare(self, *, threads: int) -> None:
        torch.set_num_threads(threads)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy())

    def upload_into(self, target: torch.Tensor, array: np.ndarray) -> None:
        target.copy_(torch.from_numpy(array))

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, -1 if tensor.dtype != torch.bool else 0)
        self._pending.append((host, tensor.clone()))
        return host

    def mark(self) -> "PendingMark":
        pending, self._pending = self._pending, []
        return PendingMark(pending)

    def is_lost(self, error: Exception) -> bool:
        return False

    def memory(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def release(self) -> None:
        gc.collect()

    def capture(self, work: Callable[[], tuple[torch.Tensor, ...]]) -> Graph:
        outputs = work()

        def replay() -> None:
            for output, numbers in zip(outputs, work(), strict=True):
                output.copy_(numbers)

        return Graph(replay, outputs)
