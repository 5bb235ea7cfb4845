"""KV blocks over TCP: works everywhere, needs nothing installed, and copies through the host.

What is read is put into our blocks by whoever waits for it and by nobody else, so nothing can come late. The token proves
itself without travelling, the blocks travel in clear: this is for networks of one's own.
"""

import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from xllm.executor.transports import tcp_serving as said
from xllm.executor.transports.base import (
    STALL_S,
    Blocks,
    Description,
    Settings,
    TransportError,
    pack,
    unpack,
)
from xllm.executor.transports.open_peers import OpenPeers
from xllm.executor.transports.staging import open_access
from xllm.executor.transports.tcp_serving import Serving

KIND = "tcp"
CONNECT_S = 3.0
_ANY = ("", "0.0.0.0", "::")
_REFUSALS = {
    said.WRONG_TOKEN: "the peer has another XLLM_CLUSTER_TOKEN",
    said.OTHER_EPOCH: "the peer was started anew",
}


class TcpTransport:
    """See `Transport`."""

    def __init__(self, blocks: Blocks, settings: Settings):
        self._blocks = blocks
        self._token = settings.token
        host = settings.advertise or settings.listen
        if host in _ANY:
            host = socket.gethostname()
        self._peers: OpenPeers[TcpPeer] = OpenPeers()
        described = blocks.describe(KIND, b"")
        self._serving = Serving(blocks, settings.token, described.epoch, settings.listen)
        place = msgspec.msgpack.encode((host, self._serving.port))
        self._descriptor = pack(msgspec.structs.replace(described, place=place))

    def descriptor(self) -> bytes:
        return self._descriptor

    def connect(self, descriptor: bytes) -> "TcpPeer":
        description = unpack(descriptor, KIND, self._blocks)
        try:
            host, port = msgspec.msgpack.decode(description.place, type=tuple[str, int])
        except msgspec.MsgspecError as e:
            raise TransportError(f"a peer's address cannot be read: {e}") from e
        connection = _enter(host, port, self._token, description.epoch)
        return self._peers.add(TcpPeer(self._blocks, description, connection))

    def close(self) -> None:
        self._peers.close()
        self._serving.close()


def _enter(host: str, port: int, token: str | None, epoch: bytes) -> socket.socket:
    """A connection that may ask for blocks."""
    where = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), CONNECT_S)
    except (OSError, OverflowError, UnicodeError) as e:
        raise TransportError(f"no connection to the KV of {where}: {e}") from e
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.monotonic() + CONNECT_S
        greeting = _exactly(sock, said.GREETING_BYTES, deadline)
        if not greeting.startswith(said.MAGIC):
            raise TransportError(f"what listens at {where} gives out no KV")
        challenge = greeting[len(said.MAGIC) :]
        sock.sendall(said.MAGIC + epoch + said.proof(token, challenge, epoch))
        answer = _exactly(sock, 1, deadline)
        if answer != said.WELCOME:
            raise TransportError(f"no KV from {where}: {_REFUSALS.get(answer, 'it refuses')}")
        sock.setblocking(False)
    except OSError as e:
        sock.close()
        raise TransportError(f"no KV from {where}: {e}") from e
    except TransportError:
        sock.close()
        raise
    return sock


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("it hangs up")
        data += more
    return data


class TcpPeer:
    """See `Peer`. `close` may be called from any thread: it waits until nobody receives."""

    def __init__(self, blocks: Blocks, description: Description, sock: socket.socket):
        self._blocks, self._description, self._socket = blocks, description, sock
        self._access = open_access(blocks)
        self._lock = threading.Lock()  # held while the socket is used, never while it is waited for
        self._broken = ""  # why nothing more can be read
        self._number = 0
        self._unsent = bytearray()
        self._owed: deque[TcpReading] = deque()
        self._heard = 0.0
        self._poll = select.poll()

    @property
    def closed(self) -> bool:
        return bool(self._broken)

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> "TcpReading":
        self._blocks.check_read(theirs, ours, self._description)
        with self._lock:
            if self._broken:
                raise TransportError(self._broken)
            self._number += 1
            reading = TcpReading(self, self._number, len(ours) * self._blocks.block_bytes)
            if not ours:
                reading.done = True
                return reading
            if not self._owed:
                self._heard = time.monotonic()
            reading.places = self._access.incoming([*ours])
            self._owed.append(reading)
            self._unsent += said.REQUEST.pack(self._number, len(theirs)) + struct.pack(
                f">{len(theirs)}I", *theirs
            )
            self._guarded(self._send)
        return reading

    def close(self) -> None:
        with self._lock:
            self._end("the peer was closed")

    def wait_for(self, reading: "TcpReading", timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if reading.done:
                    return True
                self._guarded(lambda: self._progress(reading, deadline))
                if reading.done:
                    return True
                if self._broken:
                    raise TransportError(self._broken)
                quiet = time.monotonic() - self._heard
                if quiet > STALL_S:
                    self._end(f"nothing has come from the peer for {quiet:.1f} s")
                    raise TransportError(self._broken)
                events = select.POLLIN | (select.POLLOUT if self._unsent else 0)
                self._poll.register(self._socket, events)
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._poll.poll(1000 * min(left, STALL_S - quiet, 0.5) + 1)  # closing elsewhere is seen soon

    # under the lock

    def _guarded(self, work: Callable[[], None]) -> None:
        """What goes wrong breaks the connection."""
        try:
            work()
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, TransportError) as e:
            self._end(f"the connection to the peer is broken: {e}")
        except Exception as e:  # the card is lost, say
            self._end(f"what came from the peer could not be taken: {e}")

    def _send(self) -> None:
        while self._unsent:
            del self._unsent[: self._socket.send(self._unsent)]

    def _progress(self, reading: "TcpReading", deadline: float) -> None:
        """Takes what has come, whoever waits for it, until there is no more of it, or `reading` is done, or it is time."""
        if self._unsent:
            self._guarded(self._send)
        while not reading.done and not self._broken:
            first = self._owed[0]
            count = self._socket.recv_into(first.room())
            if not count:
                raise ConnectionError("it hangs up")
            self._heard = time.monotonic()
            if first.take(count):
                self._owed.popleft()
            if self._heard >= deadline:
                return

    def _end(self, why: str) -> None:
        if not self._broken:
            self._broken = why
            self._owed.clear()
            self._socket.close()


class TcpReading:
    """See `Reading`."""

    def __init__(self, peer: TcpPeer, number: int, nbytes: int):
        self.done = False
        self.places: Iterator[memoryview] = iter(())
        self._peer, self._number, self._nbytes = peer, number, nbytes
        self._header = bytearray(said.REPLY.size)
        self._room = memoryview(self._header)
        self._in_header = True

    def wait(self, timeout_s: float) -> bool:
        return self._peer.wait_for(self, timeout_s)

    def room(self) -> memoryview:
        """Where the next bytes go."""
        return self._room

    def take(self, count: int) -> bool:
        """So many have come. Whether that was all."""
        self._room = self._room[count:]
        if self._room:
            return False
        if self._in_header:
            self._in_header = False
            if said.REPLY.unpack(self._header) != (self._number, self._nbytes):
                raise TransportError("it answers something else than was asked")
        piece = next(self.places, None)
        self.done = piece is None
        self._room = memoryview(b"") if piece is None else piece
        return self.done
