"""Numbered batches to whoever subscribes, and the last of them again for who missed some. Never waits for anybody.

Every batch goes out on a PUB socket as `topic | number | payload`; numbers are 8 bytes big-endian, from 0 up by one. On
a ROUTER socket a subscriber sends the number of the first batch it lacks (a DEALER with an empty frame before it, a REQ
as it is) and gets all that are kept from there on, each as `topic | number | payload`, then an end: number -1 and an
empty payload. A number that never comes is lost: what was dropped keeps its number.

Sockets and encoding belong to one thread; `publish` only puts the batch in its queue.
"""

import errno
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import zmq

from xllm.config.decided import KvEventsConfig
from xllm.core.errors import ConfigError
from xllm.wire.bell import Bell

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")

END = (-1).to_bytes(8, "big", signed=True)
KEPT_BYTES = 256 << 20  # of payloads for replay, however many steps that is
LINGER_MS = 200  # for the last batches on their way out: never a hang at exit
REQUEST_BYTES = 64  # longest frame anybody may send us
KEEPALIVE_S = 60  # after this silence TCP looks whether a subscriber is still there


class Publisher(Generic[Batch]):
    """`ConfigError` with a sentence where an endpoint cannot be opened. `publish` and `close` belong to one thread.

    `encode` runs in the publisher's own thread.
    """

    def __init__(self, config: KvEventsConfig, encode: Callable[[Batch], bytes]):
        self.published = 0  # batches; written by the thread
        self.dropped = 0  # batches that found the queue full, or that `encode` failed on
        self._config = config
        self._encode = encode
        self._topic = config.topic.encode()
        self._next = 0
        self._queue: deque[tuple[int, Batch]] = deque()
        self._kept = Kept(config.buffer_steps, KEPT_BYTES)
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._live, self._replay = self._open()
            # where it listens, with the port that was found
            self.endpoint = self._live.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._bell = Bell()
        self._thread = threading.Thread(target=self._run, name="xllm-kv-events", daemon=True)
        self._thread.start()

    def publish(self, batch: Batch) -> None:
        """Hand a batch over. Where too many wait already it is dropped, and its number with it."""
        number = self._next
        self._next += 1
        if len(self._queue) >= self._config.max_queue_size:
            self.dropped += 1
            return
        self._queue.append((number, batch))
        self._bell.ring()

    def close(self) -> None:
        """Send what waits, then end. A second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._bell.ring()
        self._thread.join()
        self._bell.close()
        self._context.term()

    # opening

    def _open(self) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes] | None]":
        config = self._config
        live = self._socket(zmq.PUB, hwm=config.hwm)
        _attach(live, config.endpoint, config.bind)
        if config.replay_endpoint is None:
            return live, None
        # one whole replay and the next one fit into what may wait for a slow reader
        replay = self._socket(zmq.ROUTER, hwm=2 * (config.buffer_steps + 1))
        replay.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES)
        _attach(replay, config.replay_endpoint, bind=True)
        return live, replay

    def _socket(self, kind: int, hwm: int) -> "zmq.Socket[bytes]":
        made = self._context.socket(kind)
        made.set_hwm(hwm)
        made.linger = LINGER_MS
        made.setsockopt(zmq.TCP_KEEPALIVE, 1)
        made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
        return made

    # the thread

    def _run(self) -> None:
        poller = self._bell.poller([] if self._replay is None else [self._replay])
        stopping = False
        while not stopping:
            ready = self._bell.wait(poller, lambda: 0 if self._queue or self._stopping else None)
            # after the bell, or `close` might ring unheard; before the queue, for what came before `close` goes out
            stopping = self._stopping
            for _ in range(len(self._queue)):
                self._send(*self._queue.popleft())
            if self._replay is not None and self._replay in ready:
                self._answer(self._replay)
        self._live.close()
        if self._replay is not None:
            self._replay.close()

    def _send(self, number: int, batch: Batch) -> None:
        try:
            payload = self._encode(batch)
        except Exception:  # one batch is lost, visibly; the next may do
            log.exception("a batch of events cannot be encoded; number %d will be missing", number)
            self.dropped += 1
            return
        frame = zmq.Frame(payload, copy=True)  # one copy for all subscribers and for replay
        self._live.send_multipart([self._topic, number.to_bytes(8, "big"), frame], copy=False)
        if self._replay is not None:
            self._kept.add(number, frame, len(payload))
        self.published += 1

    def _answer(self, replay: "zmq.Socket[bytes]") -> None:
        peer, *delimiter, request = replay.recv_multipart()
        if len(request) != 8 or delimiter not in ([], [b""]):
            log.warning(
                "a replay request of %d bytes in %d frames is not understood",
                len(request),
                len(delimiter) + 1,
            )
            return
        for number, frame in self._kept.since(int.from_bytes(request, "big")):
            replay.send_multipart(
                [peer, *delimiter, self._topic, number.to_bytes(8, "big"), frame], copy=False
            )
        replay.send_multipart([peer, *delimiter, b"", END, b""])


class Kept:
    """The last batches, as many as `steps` and no more than `limit_bytes`; the newest is always there."""

    def __init__(self, steps: int, limit_bytes: int):
        self._steps = steps
        self._limit = limit_bytes
        self._batches: deque[tuple[int, zmq.Frame, int]] = deque()  # (number, payload, its bytes)
        self._bytes = 0

    def add(self, number: int, frame: zmq.Frame, size: int) -> None:
        self._batches.append((number, frame, size))
        self._bytes += size
        while len(self._batches) > 1 and (len(self._batches) > self._steps or self._bytes > self._limit):
            self._bytes -= self._batches.popleft()[2]

    def since(self, first: int) -> Iterator[tuple[int, zmq.Frame]]:
        return ((number, frame) for number, frame, _ in self._batches if number >= first)


def _attach(to: "zmq.Socket[bytes]", endpoint: str, bind: bool) -> None:
    """`ConfigError` where it cannot be."""
    if "[" in endpoint:
        to.setsockopt(zmq.IPV6, 1)
    if bind and endpoint.startswith("ipc://") and unix_answers(endpoint.removeprefix("ipc://")):
        raise ConfigError(f"KV events: {endpoint} is in use by another process")  # ZMQ would take it over
    try:
        (to.bind if bind else to.connect)(endpoint)
    except zmq.ZMQError as e:
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(f"KV events: {endpoint} is in use by another process") from e
        raise ConfigError(
            f"KV events: cannot {'listen at' if bind else 'connect to'} {endpoint}: {e.strerror}"
        ) from e


def unix_answers(path: str) -> bool:
    """Whether somebody listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex("\0" + path[1:] if path.startswith("@") else path) == 0
