"""KV between modelled instances. Who asks whom, what is offered, held and taken is all real; only what a transport would
copy is not there, and takes its time all the same.
"""

import os
import threading
import time
from collections.abc import Sequence

from xllm.engine.admission import Admission
from xllm.engine.fetches import Means
from xllm.engine.modelled import TRANSPORT
from xllm.engine.peers import Peers
from xllm.executor.transports.base import TransportError
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import Channel

_MARK = b"modelled "


def modelled_peers(
    scheduler: Scheduler, admission: Admission, channel: Channel, *, name: str, block_size: int, block_s: float,
    fingerprint: str, token: str | None,
) -> Peers:  # fmt: skip
    """`block_s`: seconds that a block takes from another instance."""
    means = Means(
        transport=ModelledTransport(block_s),
        sums=lambda blocks: [0] * len(blocks),  # nothing is there that could be damaged
        block_size=block_size,
        fingerprint=fingerprint,
        token=token or "",
        name=name,
    )
    return Peers(scheduler, admission, channel, means, transport_name=TRANSPORT)


class ModelledTransport:
    """See `Transport`. All that comes in comes over one line, one reading after the other."""

    def __init__(self, block_s: float):
        self._block_s = block_s
        self._descriptor = _MARK + os.urandom(16)
        self._free_at = 0.0  # when the last reading will have come
        self._lock = threading.Lock()

    def descriptor(self) -> bytes:
        return self._descriptor

    def connect(self, descriptor: bytes) -> "_Peer":
        if not descriptor.startswith(_MARK):
            raise TransportError("the peer is no modelled instance")
        return _Peer(self)

    def close(self) -> None:
        """There is nothing to give back."""

    def due(self, blocks: int) -> float:
        """When so many more will have come."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + blocks * self._block_s
            return self._free_at


class _Peer:
    """See `Peer`."""

    def __init__(self, transport: ModelledTransport):
        self._transport = transport
        self._closed = threading.Event()

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> "_Reading":
        if self._closed.is_set():
            raise TransportError("the peer was closed")
        return _Reading(self._transport.due(len(ours)), self._closed)

    def close(self) -> None:
        self._closed.set()


class _Reading:
    """See `Reading`."""

    def __init__(self, due: float, closed: threading.Event):
        self._due, self._closed = due, closed

    def wait(self, timeout_s: float) -> bool:
        left = self._due - time.perf_counter()
        if self._closed.wait(max(0.0, min(left, timeout_s))):
            raise TransportError("the peer was closed")
        return left <= timeout_s
