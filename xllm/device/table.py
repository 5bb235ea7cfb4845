"""Hardware by name. A new one is one file and one line here."""

from importlib import import_module
from typing import Protocol

import torch

from xllm.core.errors import ConfigError

DEVICES = {"cpu": "xllm.device.cpu:CpuDevice"}


class Device(Protocol):
    """What the executor needs of a piece of hardware."""

    torch_device: torch.device

    def prepare(self, *, threads: int) -> None:
        """Called once by the thread that will run the model, before anything else."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for the KV cache; contents undefined, resident only as it is touched where the hardware allows."""
        ...


def open_device(name: str) -> Device:
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is not known; known: {', '.join(DEVICES)}")
    module, attr = DEVICES[name].split(":")
    device: Device = getattr(import_module(module), attr)()
    return device
