"""How other threads wake the one that waits for sockets."""

import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Any

import zmq


class Bell:
    """One thread waits with it, any may ring. No ring is lost, and one costs a system call only where somebody may be
    waiting."""

    def __init__(self) -> None:
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._waiting = True  # the thread may be in `poll`, so somebody has to ring

    def ring(self) -> None:
        if self._waiting:
            self._waiting = False
            with contextlib.suppress(OSError):  # it rings already, or is closed
                self._bell.send(b"\0")

    def poller(self, sockets: Iterable["zmq.Socket[bytes]"]) -> zmq.Poller:
        """For `wait`: hears these sockets, and the bell."""
        poller = zmq.Poller()
        for readable in (self._ear, *sockets):
            poller.register(readable, zmq.POLLIN)
        return poller

    def wait(self, poller: zmq.Poller, patience_ms: Callable[[], int | None]) -> dict[Any, int]:
        """What can be read. `patience_ms` is asked when ringing works, so what it looks at cannot be missed; None: for
        ever."""
        self._waiting = True
        ready: dict[Any, int] = dict(poller.poll(patience_ms()))
        self._waiting = False
        if self._ear.fileno() in ready:
            self._ear.recv(4096)
        return ready

    def close(self) -> None:
        self._bell.close()
        self._ear.close()
