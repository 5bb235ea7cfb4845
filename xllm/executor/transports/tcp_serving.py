"""The end of the TCP transport that gives out blocks: one thread that waits for sockets, and what they say to each other.

    server  GREETING   magic, 16 random bytes
    client  ENTRY      magic, the epoch it looks for, and a proof that it knows the token, which itself does not travel
    server  one byte   WELCOME, or why not
    client  REQUEST    number, count; and as many block numbers, 4 bytes each
    server  REPLY      number, bytes; and those bytes: the blocks in the order asked for

All numbers are big-endian. Replies come in the order of the requests. Whoever says something else is disconnected.
"""

import errno
import hmac
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator

from xllm.core.errors import ConfigError
from xllm.executor.transports.base import EPOCH_BYTES, STALL_S, Blocks
from xllm.executor.transports.staging import open_access

log = logging.getLogger(__name__)

MAGIC = b"xkv1"
CHALLENGE_BYTES = 16
GREETING_BYTES = len(MAGIC) + CHALLENGE_BYTES
PROOF_BYTES = 32
ENTRY_BYTES = len(MAGIC) + EPOCH_BYTES + PROOF_BYTES
WELCOME, WRONG_TOKEN, OTHER_EPOCH = b"\0", b"\1", b"\2"
REQUEST = struct.Struct(">QI")
REPLY = struct.Struct(">QQ")

UNSENT_S = 10.0  # a client that takes nothing of what it asked for is given up
MOST_CONNECTIONS = 256
MOST_REQUESTS = 64  # of one client; what it asks beyond waits in its socket
TURN_BYTES = 8 << 20  # sent to one client before the others' turn
TICK_S = 0.5


def proof(token: str | None, challenge: bytes, epoch: bytes) -> bytes:
    return hmac.digest((token or "").encode(), challenge + epoch, "sha256")


class Malformed(Exception):
    """A client said what no client says."""


class Client:
    """One connection. Belongs to the serving thread."""

    def __init__(self, sock: socket.socket, who: str, blocks: Blocks, token: str | None, epoch: bytes):
        self.socket, self.who = sock, who
        self.since = time.monotonic()  # of the last progress
        self.admitted = self.leaving = False
        self._blocks, self._token, self._epoch = blocks, token, epoch
        self._access = open_access(blocks)
        self._challenge = os.urandom(CHALLENGE_BYTES)
        self._read = bytearray()
        self._requests: deque[tuple[int, list[int]]] = deque()
        self._sending: Iterator[memoryview] = iter([memoryview(MAGIC + self._challenge)])
        self._piece = memoryview(b"")
        self.wants_to_send = True

    @property
    def events(self) -> int:
        reads = selectors.EVENT_READ if len(self._requests) < MOST_REQUESTS and not self.leaving else 0
        return reads | (selectors.EVENT_WRITE if self.wants_to_send else 0)

    @property
    def overdue(self) -> bool:
        silent = time.monotonic() - self.since
        return (not self.admitted and silent > STALL_S) or (self.wants_to_send and silent > UNSENT_S)

    def receive(self) -> bool:
        """False: it has gone."""
        data = self.socket.recv(1 << 16)
        self._read += data
        if not self.admitted and len(self._read) >= ENTRY_BYTES:
            self._enter(bytes(self._read[:ENTRY_BYTES]))
            del self._read[:ENTRY_BYTES]
        while self.admitted and self._take_request():
            pass
        return bool(data)

    def _enter(self, entry: bytes) -> None:
        if not entry.startswith(MAGIC):
            raise Malformed("it does not speak the protocol of KV blocks")
        epoch, shown = entry[len(MAGIC) : -PROOF_BYTES], entry[-PROOF_BYTES:]
        answer = WELCOME
        if not hmac.compare_digest(shown, proof(self._token, self._challenge, epoch)):
            answer = WRONG_TOKEN
            log.warning("a client at %s that wants KV blocks shows a wrong token", self.who)
        elif epoch != self._epoch:
            answer = OTHER_EPOCH
        self.admitted, self.leaving = answer == WELCOME, answer != WELCOME
        self._say(answer)

    def _say(self, data: bytes) -> None:
        before, now = self._sending, iter([memoryview(data)])
        self._sending = (piece for pieces in (before, now) for piece in pieces)
        self.wants_to_send = True

    def _take_request(self) -> bool:
        """Whether there was a whole one."""
        if len(self._read) < REQUEST.size:
            return False
        number, count = REQUEST.unpack_from(self._read)
        if not 0 < count <= self._blocks.num_blocks:
            raise Malformed(f"it asks for {count} blocks of {self._blocks.num_blocks}")
        end = REQUEST.size + 4 * count
        if len(self._read) < end:
            return False
        blocks = list(struct.unpack_from(f">{count}I", self._read, REQUEST.size))
        if max(blocks) >= self._blocks.num_blocks:
            raise Malformed(f"it asks for block {max(blocks)} of {self._blocks.num_blocks}")
        del self._read[:end]
        self._requests.append((number, blocks))
        if not self.wants_to_send:
            self.since = time.monotonic()
        self.wants_to_send = True
        return True

    def send(self) -> None:
        """As much as the socket takes, but for the others' turn."""
        sent = 0
        while sent < TURN_BYTES:
            if not self._piece and not self._next_piece():
                self.wants_to_send = False
                return
            count = self.socket.send(self._piece)
            self._piece = self._piece[count:]
            sent += count
            self.since = time.monotonic()

    def _next_piece(self) -> bool:
        piece = next(self._sending, None)
        while piece is None:
            if not self._requests:
                return False
            number, blocks = self._requests.popleft()
            self._sending = self._reply(number, blocks)
            piece = next(self._sending, None)
        self._piece = piece
        return True

    def _reply(self, number: int, blocks: list[int]) -> Iterator[memoryview]:
        yield memoryview(REPLY.pack(number, len(blocks) * self._blocks.block_bytes))
        yield from self._access.outgoing(blocks)


class Serving:
    """Listens, and answers in a thread of its own until it is closed."""

    def __init__(self, blocks: Blocks, token: str | None, epoch: bytes, host: str):
        """ConfigError where nobody can listen there."""
        self._blocks, self._token, self._epoch = blocks, token, epoch
        try:
            self._listener = socket.create_server((host, 0), family=_family(host))
        except OSError as e:
            raise ConfigError(f"KV cannot be given out at {host}: {e.strerror or e}") from e
        self.port: int = self._listener.getsockname()[1]
        self._listener.setblocking(False)
        self._bell, self._ear = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._clients: dict[socket.socket, Client] = {}
        self._thread = threading.Thread(target=self._run, name="xllm-kv-serve", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._bell.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for key, events in self._selector.select(TICK_S if self._clients else None):
                if key.fileobj is self._ear:
                    self._end()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(self._clients[key.fileobj], events)  # type: ignore[index]
            for client in [client for client in self._clients.values() if client.overdue]:
                self._drop(
                    client, "it says or takes nothing" if client.admitted else "it never said who it is"
                )

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(TICK_S)  # it stays there, and is heard of again at once
            return
        if len(self._clients) >= MOST_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock, f"{address[0]}:{address[1]}", self._blocks, self._token, self._epoch)
        self._clients[sock] = client
        self._selector.register(sock, client.events)

    def _serve(self, client: Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ and not client.receive():
                self._drop(client)
                return
            if events & selectors.EVENT_WRITE:
                client.send()
            if client.leaving and not client.wants_to_send:
                self._drop(client)
                return
        except (BlockingIOError, InterruptedError):
            pass
        except ConnectionError:
            self._drop(client)
            return
        except Malformed as e:
            self._drop(client, str(e))
            return
        except Exception as e:  # the card is lost, say: one client's failure is not the others'
            log.exception("KV blocks could not be given out")
            self._drop(client, str(e))
            return
        self._selector.modify(client.socket, client.events)

    def _drop(self, client: Client, why: str = "") -> None:
        if why:
            log.warning("a client of KV blocks at %s is disconnected: %s", client.who, why)
        self._selector.unregister(client.socket)
        del self._clients[client.socket]
        client.socket.close()

    def _end(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        self._listener.close()
        self._ear.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
