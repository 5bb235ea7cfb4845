"""Hardware by name. A new one is one file and one line here."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import numpy as np
import torch

from xllm.core.errors import ConfigError

DEVICES = {"cpu": "xllm.device.cpu:CpuDevice", "cuda": "xllm.device.cuda:CudaDevice"}


class Device(Protocol):
    """What the executor needs of a piece of hardware. All calls come from the thread that runs the model.

    Work on the device runs in the order it was submitted. Where `asynchronous`, submitting returns before the work has
    run; elsewhere nothing here ever waits or overlaps.
    """

    torch_device: torch.device
    asynchronous: bool

    def prepare(self, *, threads: int) -> None:
        """Called once by the thread that will run the model, before anything else."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for the KV cache; contents undefined, resident only as it is touched where the hardware allows."""
        ...

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the device, in submission order. The array may be changed as soon as this returns if the device
        is asynchronous; elsewhere the tensor may share its memory."""
        ...

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the host. Its numbers are there once a `mark` made after this call has been waited for."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until everything submitted before this call has run."""
        ...


def open_device(name: str) -> Device:
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is not known; known: {', '.join(DEVICES)}")
    module, attr = DEVICES[name].split(":")
    device: Device = getattr(import_module(module), attr)()
    return device
