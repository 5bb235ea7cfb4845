"""Mooncake's transfer engines: how we want them, and threads that read with them.

A call may never end: whoever opens a way to a process that is stopped waits until that one goes on, and
every other call of the same engine with it. So each way has an engine and a thread of its own, and whoever
waits for bytes waits for a condition. What an engine reads it puts into memory of its thread, which is used
for something else only once the engine has said that this reading is over.

To end an engine takes a second in which no Python runs at all. So one that is of no use any more is used
for the next way, and all of them end with the transport.
"""

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from xllm.core.errors import ConfigError

SETTINGS = {"MC_FORCE_TCP": "1"}  # else it takes RDMA wherever it finds a device, whatever it was asked for
SLOT_BYTES = 1 << 20  # most of one reading; what is longer goes in several, by several connections
SLOTS = 32  # readings under way at a time
POLL_S = 50e-6
SETTLE_POLL_S = 0.02
NO_BATCH = (0, -1, (1 << 64) - 1)
ARRIVED, UNDER_WAY, TIMED_OUT = 1, 0, -2  # anything else: failed, and over
_starting = threading.Lock()


def load() -> Any:
    """Mooncake's module. ConfigError where it is not installed."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        import mooncake.engine
    except (ImportError, OSError) as e:
        raise ConfigError(
            "--kv-transport mooncake needs the package mooncake-transfer-engine (on a machine without CUDA "
            f"mooncake-transfer-engine-non-cuda) and what it links to: {e}"
        ) from e
    return mooncake.engine


def open_engine(api: Any, host: str) -> Any:
    """An engine that others find at `host`. OSError where there can be none."""
    engine = api.TransferEngine()
    with _starting:  # it reads the environment, which a store of this process may want otherwise
        before = {name: os.environ.get(name) for name in SETTINGS}
        os.environ.update(SETTINGS)
        try:
            code = engine.initialize(host, "P2PHANDSHAKE", "tcp", "")
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    if code:
        raise OSError(f"a transfer engine of Mooncake does not start ({code})")
    return engine


@dataclass(eq=False)
class Piece:
    """Bytes that lie together, on either side."""

    theirs: int  # address in the peer's process
    nbytes: int
    slot: int = -1  # where they lie once they have come, and until they are taken


class Route:
    """A way to one peer: what is wanted and what has come. All of it is used under `changed`."""

    def __init__(self, target: str):
        self.target = target  # HOST:PORT of the peer's engine
        self.changed = threading.Condition()
        self.wanted: deque[Piece] = deque()
        self.arrived: deque[Piece] = deque()
        self.free = list(range(SLOTS))
        self.opened = False  # the engine has found something there, and remembers it
        self.broken = ""  # why nothing more comes

    def end(self, why: str) -> None:
        """From any thread, also of one that holds `changed`."""
        with self.changed:
            self.broken = self.broken or why
            self.changed.notify_all()


class Reader:
    """An engine that reads, and its thread: for one route at a time, then for the next."""

    def __init__(self, api: Any, host: str, freed: Callable[["Reader"], None]):
        """`freed` is called, in its thread, whenever it can take a route again."""
        self.stale: set[str] = set()  # targets at which another process is than the engine remembers
        self._api, self._host, self._freed = api, host, freed
        self._staging = np.empty(SLOTS * SLOT_BYTES, dtype=np.uint8)
        self._routes: SimpleQueue[Route | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="xllm-kv-mooncake", daemon=True)
        self._thread.start()

    def serve(self, route: Route) -> None:
        self._routes.put(route)

    def address(self, piece: Piece) -> int:
        """Where a piece that has arrived lies."""
        place: int = self._staging.ctypes.data
        return place + piece.slot * SLOT_BYTES

    def bytes_of(self, piece: Piece) -> bytes:
        return ctypes.string_at(self.address(piece), piece.nbytes)

    def close(self) -> None:
        """The engine ends once its route has, if a call hangs with that."""
        self._closing = True
        self._routes.put(None)

    def join(self, until: float) -> bool:
        """Whether it has ended by that time (of `time.monotonic`)."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        engine: Any = None
        while (route := self._routes.get()) is not None:
            under_way: dict[int, Piece] = {}
            try:
                engine = engine or open_engine(self._api, self._host)
                self._serve(engine, route, under_way)
            except Exception as e:  # of Mooncake
                route.end(f"the peer can be read no more: {str(e) or type(e).__name__}")
            while under_way and not self._closing:  # they still write
                time.sleep(SETTLE_POLL_S)
                _look(engine, under_way)
            if not self._closing:
                self._freed(self)

    def _serve(self, engine: Any, route: Route, under_way: dict[int, Piece]) -> None:
        """Until the route has ended."""
        while True:
            with route.changed:
                route.changed.wait_for(lambda: route.broken or under_way or (route.wanted and route.free))
                if route.broken:
                    return
                begun = []
                while route.wanted and route.free:
                    begun.append(route.wanted.popleft())
                    begun[-1].slot = route.free.pop()
            for piece in begun:
                batch = engine.batch_transfer_async_read(
                    route.target, [self.address(piece)], [piece.theirs], [piece.nbytes]
                )
                if batch in NO_BATCH:
                    route.end("the peer cannot be reached")
                    return
                route.opened = True
                under_way[batch] = piece
            arrived, failed = _look(engine, under_way)
            if failed:
                route.end("the peer has gone, or does not give out what was asked for")
            elif arrived:
                with route.changed:
                    route.arrived.extend(arrived)
                    route.changed.notify_all()
            else:
                time.sleep(POLL_S)


def _look(engine: Any, under_way: dict[int, Piece]) -> tuple[list[Piece], bool]:
    """Those that have arrived, which are no longer under way then, and whether one has failed."""
    arrived, failed = [], False
    for batch in list(under_way):
        state = engine.transfer_check_status(batch)
        if state == ARRIVED:
            arrived.append(under_way.pop(batch))
        elif state == TIMED_OUT:
            failed = True  # and it may write yet
        elif state != UNDER_WAY:
            failed = True
            del under_way[batch]
    return arrived, failed
