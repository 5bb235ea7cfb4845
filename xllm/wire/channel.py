"""Two ends that exchange messages: in memory, or over ZMQ sockets between processes. One Protocol for both."""

import queue
from typing import Protocol

import zmq

from xllm.wire.messages import Message, WireError, decode, encode


class Channel(Protocol):
    """One end. `receive` belongs to one thread and `send` to one thread (they may be different ones)."""

    def send(self, message: Message) -> None: ...

    def receive(self, timeout_s: float | None = 0.0) -> Message | None:
        """Next message, or None when none came within `timeout_s` (None waits for ever)."""
        ...

    def close(self) -> None: ...


class MemoryChannel:
    """Both ends in one process; `pair()` makes two connected ones. Any number of threads may use it."""

    def __init__(self, inbox: "queue.SimpleQueue[Message]", outbox: "queue.SimpleQueue[Message]"):
        self._inbox = inbox
        self._outbox = outbox

    @classmethod
    def pair(cls) -> "tuple[MemoryChannel, MemoryChannel]":
        a: queue.SimpleQueue[Message] = queue.SimpleQueue()
        b: queue.SimpleQueue[Message] = queue.SimpleQueue()
        return cls(a, b), cls(b, a)

    def send(self, message: Message) -> None:
        self._outbox.put(message)

    def receive(self, timeout_s: float | None = 0.0) -> Message | None:
        try:
            return self._inbox.get(block=timeout_s != 0.0, timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        pass


class ZmqChannel:
    """A PUSH socket out and a PULL socket in. The front end binds, engines connect.

    Sockets are not thread-safe: a second sending thread opens a `ZmqSender` of its own.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], *, send_to: str, receive_from: str, bind: bool
    ):
        self._sender = ZmqSender(context, send_to, bind=bind)
        self._pull = context.socket(zmq.PULL)
        self._pull.set_hwm(0)  # bounded by admission control above, never by silently dropped frames
        self._pull.linger = 0
        (self._pull.bind if bind else self._pull.connect)(receive_from)

    def wait_connected(self, timeout_s: float) -> bool:
        """Connecting takes a moment; until then `send` has nobody to send to."""
        return self._sender.wait_connected(timeout_s)

    def send(self, message: Message) -> None:
        self._sender.send(message)

    def receive(self, timeout_s: float | None = 0.0) -> Message | None:
        if not self._pull.poll(None if timeout_s is None else round(timeout_s * 1000)):
            return None
        return decode(self._pull.recv())

    def close(self) -> None:
        self._sender.close()
        self._pull.close()


class ZmqSender:
    """The sending half alone, for a thread that only reports (heartbeats)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, bind: bool = False):
        self._push = context.socket(zmq.PUSH)
        self._push.set_hwm(0)
        self._push.linger = 500  # ms: enough for a last word, never a hang at exit
        (self._push.bind if bind else self._push.connect)(address)

    def wait_connected(self, timeout_s: float) -> bool:
        return bool(self._push.poll(round(timeout_s * 1000), zmq.POLLOUT))

    def send(self, message: Message) -> None:
        """Never blocks. Raises WireError when nobody is connected: a PUSH socket would wait for a peer for ever."""
        try:
            self._push.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise WireError("nobody is connected at the other end") from None

    def close(self) -> None:
        self._push.close()
