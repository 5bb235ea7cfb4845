"""The peers that a transport has connected, and that it ends with itself."""

import threading
from typing import Generic, Protocol, TypeVar

from xllm.executor.transports.base import TransportError


class Closable(Protocol):
    @property
    def closed(self) -> bool: ...

    def close(self) -> None: ...


P = TypeVar("P", bound=Closable)


class OpenPeers(Generic[P]):
    """Any thread may call. Those that have ended by themselves are forgotten when another one comes."""

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._peers: set[P] = set()

    def add(self, peer: P) -> P:
        """The same peer. TransportError, and it is closed, where the transport is."""
        with self._lock:
            if not self.closed:
                self._peers = {each for each in self._peers if not each.closed} | {peer}
                return peer
        peer.close()
        raise TransportError("this engine's transport is closed")

    def close(self) -> bool:
        """Ends them all. False where that was done before."""
        with self._lock:
            before, self.closed = self.closed, True
            peers, self._peers = self._peers, set()
        for peer in peers:
            peer.close()
        return not before
