"""One engine, several front ends: the engine core's `Channel` where any number of clients (`dial`) use it at once.

A thread owns the sockets, so that clients are heard, and told that the process lives, whatever the engine's loop does.
To the loop a Hub is one front end: ids are rewritten on the way (`ledger`), and a client that leaves, dies, falls silent
or does not take what it is sent is forgotten as a whole, with an `Abort` of all that it had asked for. No single message
is ever lost while a client stays.
"""

import hmac
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from xllm.wire.bell import Bell
from xllm.wire.doors import Door, Listen, open_door
from xllm.wire.ledger import Ledger
from xllm.wire.messages import (
    Beat,
    Fault,
    FirstToken,
    FromHub,
    Goodbye,
    Hello,
    KvChanges,
    Message,
    Offer,
    Outputs,
    Provided,
    Ready,
    Refused,
    Reply,
    ToEngine,
    Welcome,
    WireError,
)
from xllm.wire.session import BEAT_S, OVERHEAD_BYTES, away_s, from_client, seal, unseal

log = logging.getLogger(__name__)
FRAMES_A_ROUND = 512  # read from a socket before others have their turn
COMPLAIN_S = 1.0  # at most one line about malformed frames in this time
NEVER = float("-inf")


@dataclass(frozen=True)
class Limits:
    silence_s: float = 5.0  # a client of which nothing is heard for so long is gone
    unacknowledged_bytes: int = 64 << 20  # sent to a client and not taken by its owner
    unread: int = 65536  # messages of a client that the loop has not taken
    requests: int = 65536  # outstanding ones of a client


@dataclass(eq=False, slots=True)
class _Client:
    number: int
    door: Door
    identity: bytes  # ZMQ's name of the connection
    session: int
    name: str
    heard: float  # when
    received: int = 0  # frames in, without the Hello
    sent: int = 0  # frames out
    sent_bytes: int = 0  # with OVERHEAD_BYTES each
    taken_bytes: int = 0  # of those, by its owner
    put: int = 0  # messages to the loop; written by the hub's thread
    got: int = 0  # of those, taken by the loop; written by the loop's thread


class Hub:
    """A `Channel` for one loop. `send` may be called by any thread; `receive` by one. `ConfigError` where it cannot listen."""

    def __init__(self, listen: Sequence[Listen], limits: Limits | None = None, *, name: str = ""):
        self._name = name  # told to clients
        self._limits = limits or Limits()
        self._inbox: queue.SimpleQueue[tuple[_Client | None, ToEngine]] = queue.SimpleQueue()
        self._outbox: deque[Message] = deque()
        self._ledger = Ledger(self._limits.requests)
        self._clients: dict[tuple[Door, bytes], _Client] = {}
        self._by_number: dict[int, _Client] = {}
        self._joined = 0
        self._standing: dict[type, Ready | Fault] = {}  # for those who come later: Ready, Fault
        self._complained = NEVER
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            # a client is dropped before that; strangers, who are refused again and again, are cut off by it
            most = self._limits.unacknowledged_bytes // OVERHEAD_BYTES
            self._doors = [open_door(self._context, one, most) for one in listen]
        except BaseException:
            self._context.destroy(linger=0)
            raise
        # where it listens, with the ports that were found
        self.addresses = [door.address for door in self._doors]
        self._bell = Bell()
        self._thread = threading.Thread(target=self._run, name="xllm-hub", daemon=True)
        self._thread.start()

    @property
    def clients(self) -> int:
        return len(self._by_number)

    @property
    def outstanding(self) -> int:
        """Requests of all clients that have not ended, those that the loop has not taken yet included. Any thread may ask."""
        return self._ledger.total

    # the loop's side

    def send(self, message: Message) -> None:
        """Never waits. What is for a client that has gone is for nobody."""
        self._outbox.append(message)
        self._bell.ring()

    def receive(self, timeout_s: float | None = 0.0) -> Message | None:
        try:
            client, message = self._inbox.get(block=timeout_s != 0.0, timeout=timeout_s)
        except queue.Empty:
            return None
        if client is not None:
            client.got += 1
        return message

    def close(self) -> None:
        """Send what waits and a goodbye to all, then end. A second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._bell.ring()
        self._thread.join()
        self._bell.close()
        self._context.term()

    # the thread

    def _patience_ms(self) -> int:
        return 0 if self._outbox or self._stopping else round(BEAT_S * 1000)

    def _run(self) -> None:
        poller = self._bell.poller(door.socket for door in self._doors)
        last, stopping = time.monotonic(), False
        while not stopping:
            ready = self._bell.wait(poller, self._patience_ms)
            stopping = self._stopping
            now = time.monotonic()
            away, last = away_s(now - last), now
            for client in self._by_number.values():
                client.heard += away
            for door in self._doors:
                if door.socket in ready:
                    self._take_in(door, now)
            for _ in range(len(self._outbox)):
                self._give_out(self._outbox.popleft())
            for client in [c for c in self._by_number.values() if self._is_silent(c, now)]:
                self._drop(client, f"nothing was heard for {self._limits.silence_s:g} s")
        for client in list(self._by_number.values()):
            self._post(client, Goodbye())
        for door in self._doors:
            door.socket.close()

    def _is_silent(self, client: _Client, now: float) -> bool:
        """An owner never is: it may be stopped for as long as somebody debugs it, and the engine ends with it."""
        return not client.door.listen.owner and now - client.heard > self._limits.silence_s

    def _take_in(self, door: Door, now: float) -> None:
        for _ in range(FRAMES_A_ROUND):
            try:
                identity, *frames = door.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            client = self._clients.get((door, identity))
            try:
                if len(frames) != 1:
                    raise WireError(f"{len(frames)} frames instead of one")
                session, number, message = unseal(frames[0], from_client)
                if client is not None and not isinstance(message, Hello):
                    client.heard = now
                self._handle(door, identity, client, session, number, message, now)
            except WireError as e:
                self._complain(door, e.message, now)
                if client is not None:  # to pass over one message of it would be to lose it
                    self._drop(client, e.message)
                else:
                    self._refuse(door, identity, e.message)
            except Exception:  # never for a message's sake
                log.exception("a message from a client broke the hub")
                if client is not None and client.number in self._by_number:
                    self._drop(client, "its message could not be dealt with")

    def _handle(
        self, door: Door, identity: bytes, client: _Client | None, session: int, number: int, message: Any, now: float
    ) -> None:  # fmt: skip
        """`WireError` where the session is broken."""
        if isinstance(message, Hello) and session and (client is None or client.session != session):
            if client is not None:
                self._drop(client, "it has begun another session")
            self._welcome(door, identity, session, message, now)
            return
        if isinstance(message, Hello) and session:
            return  # said again before it had the welcome
        if client is None or client.session != session:
            if not isinstance(message, Goodbye):
                self._refuse(door, identity, "there is no such session")
            return
        if number != client.received:
            raise WireError(f"message {client.received} should have come, {number} came")
        client.received += 1
        match message:
            case Beat(taken=taken):
                client.taken_bytes = min(max(taken, client.taken_bytes), client.sent_bytes)
                self._post(client, Beat())
            case Goodbye():
                self._drop(client, None)
            case _:
                inward, answer = self._ledger.inward(client.number, message, owner=door.listen.owner)
                if inward is not None:
                    client.put += 1
                    self._inbox.put((client, inward))
                if answer is not None:
                    self._post(client, answer)
                if client.put - client.got > self._limits.unread:
                    self._drop(client, "it sends more than the engine takes")

    def _welcome(self, door: Door, identity: bytes, session: int, hello: Hello, now: float) -> None:
        token = door.listen.token
        if token is not None and not hmac.compare_digest(token.encode(), hello.token.encode()):
            self._complain(door, "a client without the right token", now)
            self._refuse(door, identity, "the token is not the right one")
            return
        self._joined += 1
        client = _Client(self._joined, door, identity, session, hello.name[:64], now)
        self._clients[door, identity] = self._by_number[client.number] = client
        self._ledger.join(client.number)
        log.info("client %d (%r) has come", client.number, client.name)
        limits = self._limits
        self._post(client, Welcome(limits.silence_s, limits.unacknowledged_bytes, self._name))
        for message in self._standing.values():
            self._post(client, message)

    def _give_out(self, message: Any) -> None:
        try:
            if isinstance(message, Outputs | Reply | KvChanges | Offer | FirstToken | Provided):
                for number, news in self._ledger.outward(message):
                    if (client := self._by_number.get(number)) is not None:
                        self._post(client, news)
                return
            if isinstance(message, Ready | Fault):
                self._standing[type(message)] = message
            for client in list(self._by_number.values()):
                self._post(client, message)
        except Exception:  # a message that cannot be encoded: whoever waits for it would wait for ever
            log.exception("a message from the engine broke the hub")
            for client in list(self._by_number.values()):
                self._drop(client, "the engine sent what cannot be passed on")

    def _post(self, client: _Client, message: FromHub) -> None:
        if client.number not in self._by_number:
            return
        frame = seal(client.session, client.sent, message)
        client.sent += 1
        client.sent_bytes += len(frame) + OVERHEAD_BYTES
        if client.sent_bytes - client.taken_bytes > self._limits.unacknowledged_bytes:
            self._drop(client, "it does not take what it is sent")
        elif not client.door.transmit(client.identity, frame):
            self._drop(client, "its connection has ended")

    def _drop(self, client: _Client, reason: str | None) -> None:
        """Forget it with all it has asked for; None: it has said goodbye. A second call does nothing."""
        if client.number not in self._by_number:
            return
        del self._clients[client.door, client.identity]
        del self._by_number[client.number]
        log.info("client %d (%r) is gone: %s", client.number, client.name, reason or "goodbye")
        if (abort := self._ledger.leave(client.number)) is not None:
            self._inbox.put((None, abort))
        if reason is not None:
            client.door.transmit(client.identity, seal(client.session, client.sent, Refused(reason=reason)))

    def _refuse(self, door: Door, identity: bytes, reason: str) -> None:
        door.transmit(identity, seal(0, 0, Refused(reason=reason)))

    def _complain(self, door: Door, what: str, now: float) -> None:
        if now - self._complained >= COMPLAIN_S:
            self._complained = now
            log.warning("%s: dropped: %s", door.listen.address, what)
