"""A hub that ends or stops as if its process did, for instances that are threads."""

import threading

from xllm.wire.doors import Listen
from xllm.wire.hub import Hub
from xllm.wire.messages import Shutdown


class Killed(BaseException):
    """Ends a thread as the end of its process would; no handler is to stop it."""


class Gate:
    """Where threads of an instance that hangs wait, and those of a killed one end."""

    def __init__(self) -> None:
        self.killed = False
        self._open = threading.Event()
        self._open.set()

    def hang(self) -> None:
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def kill(self) -> None:
        self.killed = True
        self._open.set()

    def __call__(self) -> None:
        """`Killed` where that has happened."""
        self._open.wait()
        if self.killed:
            raise Killed


class MortalHub(Hub):
    """A hub that can end without a goodbye, or stop as if its process were stopped."""

    def __init__(self, listen: Listen, gate: Gate, name: str):
        self._gate = gate
        super().__init__([listen], name=name)

    def _patience_ms(self) -> int:
        self._gate()
        return super()._patience_ms()

    def _run(self) -> None:
        try:
            super()._run()
        except Killed:
            for door in self._doors:
                door.socket.close(linger=0)

    def wake(self) -> None:
        """The loop, where it waits for a message."""
        self._inbox.put((None, Shutdown()))

    def bury(self) -> None:
        """After a kill, instead of `close`."""
        self._bell.ring()
        self._thread.join()
        self._bell.close()
        self._context.term()
