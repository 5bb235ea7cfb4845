"""A transport between engines of one process, and what can go wrong in it."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from xllm.executor.transports.base import TransportError


@dataclass
class Network:
    """Memories by descriptor. `fault` is asked at every reading: what goes wrong with it."""

    fault: Callable[[int], str] = lambda number: ""
    memories: dict[bytes, torch.Tensor] = field(default_factory=dict)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    readings: "list[Reading]" = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)  # what is held back may go on

    def open(self, memory: torch.Tensor) -> "Local":
        blocks_NB = memory.view(torch.uint8).flatten(1)
        descriptor = f"memory {next(self.numbers)}".encode()
        self.memories[descriptor] = blocks_NB
        return Local(self, descriptor)


@dataclass
class Local:
    network: Network
    own: bytes

    def descriptor(self) -> bytes:
        return self.own

    def connect(self, descriptor: bytes) -> "Way":
        if descriptor not in self.network.memories:
            raise TransportError("nobody is there")
        return Way(self, self.network.memories[descriptor], self.network.memories[self.own])

    def close(self) -> None:
        self.network.memories.pop(self.own, None)


class Way:
    def __init__(self, local: Local, theirs: torch.Tensor, ours: torch.Tensor):
        self._local, self._theirs, self._ours = local, theirs, ours
        self._closed = False

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> "Reading":
        assert not self._closed
        network = self._local.network
        fault = network.fault(len(network.readings))
        if fault == "refuse":
            raise TransportError("no")
        reading = Reading(network, fault, self._theirs, self._ours, theirs, ours, lambda: self._closed)
        network.readings.append(reading)
        return reading

    def close(self) -> None:
        self._closed = True


class Reading:
    def __init__(self, network, fault, theirs_NB, ours_NB, theirs, ours, closed):
        self.network, self.fault = network, fault
        self.theirs, self.ours, self.closed = list(theirs), list(ours), closed
        self._theirs_NB, self._ours_NB = theirs_NB, ours_NB
        self.over = False

    def wait(self, timeout_s: float) -> bool:
        assert not self.over and not self.closed()
        if self.fault == "drop":
            return self.network.released.wait(timeout_s) and False
        if self.fault == "delay" and not self.network.released.wait(timeout_s):
            return False
        self.over = True
        if self.fault == "break":
            self._copy(self.ours[:1], self.theirs[:1])
            raise TransportError("the connection broke")
        if self.fault == "reorder":
            self._copy(self.ours, [*self.theirs[1:], self.theirs[0]])
        else:
            self._copy(self.ours, self.theirs)
        if self.fault == "double":
            self._copy(self.ours, self.theirs)
        if self.fault == "corrupt":
            self._ours_NB[self.ours[-1], 5] += 1
        return True

    def _copy(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            self._ours_NB[mine] = self._theirs_NB[other]
