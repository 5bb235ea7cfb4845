"""A device that behaves as a card does, on the CPU in plain PyTorch: slow, exact, and the same for everybody.

What a card would punish shows here at once: downloads that are read before they were waited for hold nothing, arrays
are copied when they are uploaded, and graphs only see memory that stays where it is.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from xllm.device.cpu import ClockMark, CpuDevice


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


class _Stream(threading.local):
    """Downloads not marked yet, of whoever submits in this thread."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []


class ReferenceDevice(CpuDevice):
    asynchronous = True

    def __init__(self) -> None:
        self._stream = _Stream()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy())

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, -1 if tensor.dtype != torch.bool else 0)
        self._stream.pending.append((host, tensor.clone()))
        return host

    def mark(self) -> "PendingMark":
        pending, self._stream.pending = self._stream.pending, []
        return PendingMark(pending)

    @contextmanager
    def beside(self, after: Any, lane: int = 0) -> Iterator[None]:
        """A mark made inside brings no download of the ordinary work, as on a card."""
        ordinary, self._stream.pending = self._stream.pending, []
        try:
            yield
        finally:
            self._stream.pending = ordinary
