"""Blocks of another engine in this process: for tests, and for several engines in one process."""

import threading
from collections.abc import Sequence

import torch

from xllm.executor.transports.base import Blocks, Description, Settings, TransportError, pack, unpack
from xllm.executor.transports.staging import neighbours

KIND = "local"

_lock = threading.Lock()  # also held while blocks are copied: nobody's memory goes meanwhile
_open: "dict[bytes, LocalTransport]" = {}


class LocalTransport:
    """See `Transport`."""

    def __init__(self, blocks: Blocks, settings: Settings):
        self.blocks = blocks
        self._description = blocks.describe(KIND, b"")
        with _lock:
            _open[self._description.epoch] = self

    @property
    def closed(self) -> bool:
        return self._description.epoch not in _open

    def descriptor(self) -> bytes:
        return pack(self._description)

    def connect(self, descriptor: bytes) -> "LocalPeer":
        description = unpack(descriptor, KIND, self.blocks)
        with _lock:
            if self.closed:
                raise TransportError("this engine's transport is closed")
            theirs = _open.get(description.epoch)
        if theirs is None:
            raise TransportError("there is no such engine in this process")
        return LocalPeer(self, theirs, description)

    def close(self) -> None:
        with _lock:
            _open.pop(self._description.epoch, None)


class LocalPeer:
    """See `Peer`."""

    def __init__(self, ours: LocalTransport, theirs: LocalTransport, description: Description):
        self._ours, self._theirs, self._description = ours, theirs, description
        self._closed = False

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> "LocalReading":
        self._ours.blocks.check_read(theirs, ours, self._description)
        with _lock:
            self._check_open()
        return LocalReading(self, [*theirs], [*ours])

    def close(self) -> None:
        with _lock:
            self._closed = True

    def copy(self, theirs: list[int], ours: list[int]) -> None:
        with _lock, torch.inference_mode():
            self._check_open()
            into_NB, source_NB = self._ours.blocks.memory_NB, self._theirs.blocks.memory_NB
            place = 0
            for first, count in neighbours(ours):
                into_NB[first : first + count].copy_(source_NB[theirs[place : place + count]])
                place += count
            if into_NB.is_cuda:
                torch.cuda.current_stream(into_NB.device).synchronize()

    def _check_open(self) -> None:
        if self._closed or self._ours.closed or self._theirs.closed:
            raise TransportError("the peer was closed")


class LocalReading:
    """See `Reading`. The blocks are copied when somebody first waits."""

    def __init__(self, peer: LocalPeer, theirs: list[int], ours: list[int]):
        self._peer, self._theirs, self._ours = peer, theirs, ours
        self._done = False

    def wait(self, timeout_s: float) -> bool:
        if not self._done:
            self._peer.copy(self._theirs, self._ours)
            self._done = True
        return True
