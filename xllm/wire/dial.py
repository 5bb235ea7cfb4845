"""A client's end of an engine that serves several (`hub`): one session over a DEALER socket.

A session is `connecting` until it is welcome, then `ready`, in the end `lost`, and nothing comes after that: whoever
wants to go on makes another Dial, and what was outstanding in this one is lost. `connecting` waits for an engine that is
not there yet, so a new Dial may be made at once.
"""

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import NoReturn

import zmq
from zmq.utils.monitor import parse_monitor_message

from xllm.wire.bell import Bell
from xllm.wire.messages import (
    Beat,
    FromClient,
    Goodbye,
    Hello,
    Message,
    Refused,
    ToEngine,
    Welcome,
    WireError,
)
from xllm.wire.session import BEAT_S, LINGER_MS, OVERHEAD_BYTES, away_s, from_hub, prepare, seal, unseal

SILENCE_S = 2.0  # noticed within BEAT_S more
REPORTS = 16  # while the owner takes what the hub lets stand untaken; between them beats are enough
FRAMES_A_ROUND = 512
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2000
CONNECT_TIMEOUT_MS = 3000  # a host that does not answer


class State(StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"


class Dial:
    """`send` may be called by any thread, `receive` by one. A thread of its own keeps the session alive.

    `notify` is called by that thread when there is something to receive or the state has changed: the way into an event
    loop (`lambda: loop.call_soon_threadsafe(event.set)`), or into one wait for several Dials. An owner that does not
    take what comes is in the end refused by the hub; nothing grows without bound.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        name: str = "",
        silence_s: float = SILENCE_S,  # nothing heard for so long: lost
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,  # shared by several; otherwise one of its own
        notify: Callable[[], object] = lambda: None,
    ):
        self.address = address
        self.state = State.CONNECTING
        self.reason: str | None = None  # why it is lost
        self.peer: str | None = None  # what the hub calls itself, once welcome
        self._hello = Hello(name=name, token=token)
        self._silence_s = silence_s
        self._notify = notify
        self._session = secrets.randbits(63) or 1
        self._inbox: queue.SimpleQueue[tuple[Message | None, int]] = queue.SimpleQueue()  # with its bytes
        self._outbox: deque[ToEngine] = deque()
        self._sent = self._received = 0  # frames; written by the thread
        self._taken = self._kept = 0  # bytes of frames: taken by the owner, and by the thread as its own
        self._reported = 0  # of both, with the last beat
        self._report_bytes = 1 << 20  # so many unreported: the next beat does not wait
        self._heard = time.monotonic()
        self._closed = False
        self._ready = threading.Event()  # or lost
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context() if context is None else context
        self._own_context = context is None
        try:
            self._dealer = self._connect()
        except zmq.ZMQError as e:
            if self._own_context:
                self._context.destroy(linger=0)
            raise WireError(f"cannot connect to {address}: {e.strerror}") from e
        self._bell = Bell()
        self._thread = threading.Thread(target=self._run, name="xllm-dial", daemon=True)
        self._thread.start()

    # the owner's side

    def send(self, message: ToEngine) -> None:
        """Never waits. `WireError` unless ready; what is sent as the session is lost may or may not arrive."""
        if self.state is not State.READY:
            raise WireError(f"{self.address} is {self.state}{f': {self.reason}' if self.reason else ''}")
        self._outbox.append(message)
        self._bell.ring()

    def receive(self, timeout_s: float | None = 0.0) -> Message | None:
        """What came before the session was lost can still be received; after that it is None at once."""
        try:
            wait = timeout_s != 0.0 and self.state is not State.LOST
            message, size = self._inbox.get(block=wait, timeout=timeout_s)
        except queue.Empty:
            return None
        self._taken += size
        if self._untold > self._report_bytes:
            self._bell.ring()
        return message

    def wait_ready(self, timeout_s: float) -> bool:
        return self._ready.wait(timeout_s) and self.state is State.READY

    @property
    def silent_s(self) -> float:
        """Since anything was heard of the other end, or since this one began."""
        return time.monotonic() - self._heard

    def close(self) -> None:
        """Say goodbye; the engine aborts what is outstanding. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._bell.ring()
        self._thread.join()
        self._bell.close()
        if self._own_context:
            self._context.term()

    @property
    def _untold(self) -> int:
        return self._taken + self._kept - self._reported

    # the thread

    def _connect(self) -> "zmq.Socket[bytes]":
        made = prepare(self._context.socket(zmq.DEALER), self.address)
        # not IMMEDIATE: with it, what has come and is not read yet is lost as the connection ends
        made.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        made.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        try:
            self._events = made.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            made.connect(self.address)
        except BaseException:
            made.disable_monitor()
            made.close(linger=0)
            raise
        return made

    def _run(self) -> None:
        linger_ms = 0  # who is lost is sent nothing more
        try:
            self._converse()
            linger_ms = LINGER_MS
            self._lose("it was closed")
        except WireError as e:
            self._lose(e.message)
        except BaseException as e:
            self._lose(f"{type(e).__name__}: {e}")
            raise
        finally:
            self._dealer.disable_monitor()
            self._events.close(linger=0)
            self._dealer.close(linger=linger_ms)

    def _converse(self) -> None:
        """Until the session ends. `WireError` says why."""
        poller = self._bell.poller((self._dealer, self._events))
        last = beat_at = time.monotonic()

        def patience_ms() -> int:
            idle_s = 0.0 if self._outbox or self._closed else max(0.0, beat_at - time.monotonic())
            return round(idle_s * 1000)

        while not self._closed:
            ready = self._bell.wait(poller, patience_ms)
            now = time.monotonic()
            self._heard, last = self._heard + away_s(now - last), now
            drained = self._take_in(now)
            if self._events in ready and drained:
                self._follow()
            if self.state is State.READY:
                for _ in range(len(self._outbox)):
                    self._transmit(self._outbox.popleft())
                if now - self._heard > self._silence_s:
                    raise WireError(f"nothing was heard for {self._silence_s:g} s")
                if now >= beat_at or self._untold > self._report_bytes:
                    self._reported += self._untold
                    self._transmit(Beat(taken=self._reported))
            if now >= beat_at:
                beat_at = now + BEAT_S
        if self.state is State.READY:
            for _ in range(len(self._outbox)):
                self._transmit(self._outbox.popleft())
            self._transmit(Goodbye())

    def _follow(self) -> None:
        """The connection has come or gone. Until we are welcome it may do so as often as it likes; each gets a Hello."""
        event = parse_monitor_message(self._events.recv_multipart())["event"]
        if self.state is State.CONNECTING and event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._dealer.send(seal(self._session, 0, self._hello), zmq.NOBLOCK)
        elif self.state is State.READY and event == zmq.EVENT_DISCONNECTED:
            self._over()

    def _transmit(self, message: FromClient) -> None:
        self._dealer.send(seal(self._session, self._sent, message), zmq.NOBLOCK)
        self._sent += 1

    def _over(self) -> NoReturn:
        """The connection has ended. What came before that counts, and may say why."""
        while not self._take_in(time.monotonic()):
            pass
        raise WireError("the connection has ended")

    def _take_in(self, now: float) -> bool:
        """-> whether everything that has come was taken."""
        arrived = 0
        try:
            while arrived < FRAMES_A_ROUND:
                frame = self._dealer.recv(zmq.NOBLOCK)
                arrived += 1
                self._handle(frame)
        except zmq.Again:
            pass
        finally:
            if arrived:
                self._heard = now
                self._notify()
        return arrived < FRAMES_A_ROUND

    def _handle(self, frame: bytes) -> None:
        session, number, message = unseal(frame, from_hub)
        if isinstance(message, Refused):
            raise WireError(f"refused: {message.reason}")
        if session != self._session or number != self._received:
            raise WireError(f"message {self._received} should have come, {number} came")
        self._received += 1
        size = len(frame) + OVERHEAD_BYTES
        match message:
            case Welcome():
                self._kept += size
                self._report_bytes = message.unacknowledged_bytes // REPORTS
                self.peer = message.name
                self.state = State.READY
                self._ready.set()
            case Beat():
                self._kept += size
            case Goodbye():
                raise WireError("the engine has said goodbye")
            case _:
                self._inbox.put((message, size))

    def _lose(self, reason: str) -> None:
        """The first reason stays."""
        if self.state is State.LOST:
            return
        self.reason = reason
        self.state = State.LOST
        self._inbox.put((None, 0))  # whoever waits
        self._ready.set()
        self._notify()
