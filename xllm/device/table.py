"""Hardware by name. A new one is one file and one line here."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch

from xllm.core.errors import ConfigError
from xllm.device.pages import PageSpace
from xllm.device.virtual import VirtualRange

DEVICES = {
    "cpu": "xllm.device.cpu:CpuDevice",
    "cuda": "xllm.device.cuda:CudaDevice",
    "reference": "xllm.device.reference:ReferenceDevice",
}


@dataclass(frozen=True, slots=True)
class Graph:
    """Work that was captured once and runs again as a whole, on the same memory."""

    replay: Callable[[], None]
    outputs: tuple[torch.Tensor, ...]  # what the work returned; every replay writes it anew


class Mark(Protocol):
    """A place in the order of the device's work."""

    def wait(self) -> None:
        """Until everything submitted before it has run."""
        ...

    def since(self, earlier: Any) -> float:
        """Seconds on the device from an earlier mark to this one; both have been waited for."""
        ...


LANES = 2  # orders beside the ordinary one


class Device(Protocol):
    """What the executor needs of a piece of hardware. All calls come from the thread that runs the model, but for
    `beside` and what is done inside it, which one other thread for each lane may do.

    Work on the device runs in the order it was submitted. Where `asynchronous`, submitting returns before the work has
    run; elsewhere nothing here ever waits or overlaps.
    """

    torch_device: torch.device
    asynchronous: bool

    def prepare(self, *, threads: int) -> None:
        """Called once by the thread that will run the model, before anything else."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for the KV cache: finite numbers on a device with graphs, elsewhere undefined; resident only as it is
        touched where the hardware allows."""
        ...

    def reserve(self, nbytes: int) -> VirtualRange:
        """Addresses on the device for so much, without memory. ConfigError where the device has no such thing."""
        ...

    def reserve_pages(self, page_bytes: int, pages: int, places: int) -> PageSpace:
        """Addresses on the device for so many places, all bare, and numbers for so many pages, none of which has memory.
        ValueError where `page_bytes` are not whole granules: those of `reserve`. ConfigError where the device has no
        such thing, MemoryError where there are no such addresses."""
        ...

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the device, in submission order. The array may be changed as soon as this returns if the device
        is asynchronous; elsewhere the tensor may share its memory."""
        ...

    def upload_into(self, target: torch.Tensor, array: np.ndarray) -> None:
        """Fill memory that stays where it is, in submission order."""
        ...

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the host. Its numbers are there once a `mark` made after this call has been waited for."""
        ...

    def mark(self) -> Mark: ...

    def beside(self, after: Any, lane: int = 0) -> AbstractContextManager[None]:
        """What is submitted inside runs in an order of its own, one for each of the `LANES`, beside the other work and,
        where that is not None, after the mark `after`. A mark made inside is of that order. For copies between the KV cache and memory that is `pinned`: nothing may be
        allocated inside."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of host memory that the device copies to and from while other work runs. Raises what the
        system raises where there is not so much."""
        ...

    def is_lost(self, error: Exception) -> bool:
        """Whether after this error nothing more can run here."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes (free, in all) as the driver sees them, other programs included. Waits for what was submitted."""
        ...

    def peak(self) -> int:
        """Bytes that were taken at most since the last call, beyond what is taken now."""
        ...

    def release(self, keep: int = 0) -> None:
        """Give memory that nothing refers to any more back to the system, but for `keep` bytes in one piece, which work
        to come finds here whatever other programs have taken by then."""
        ...

    def capture(self, work: Callable[[], tuple[torch.Tensor, ...]]) -> Graph:
        """`work` as a graph; it runs at least once for real, and may allocate. Graphs share their memory, so the outputs of one are good until another is replayed. Raises what the hardware raises."""
        ...


def open_device(name: str) -> Device:
    device: Device = device_class(name)()
    return device


def device_class(name: str) -> Any:
    """The class of a device, whose attributes tell what is known without opening it."""
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is not known; known: {', '.join(DEVICES)}")
    module, attr = DEVICES[name].split(":")
    return getattr(import_module(module), attr)
