"""KV blocks by way of Mooncake's transfer engine over TCP, in host memory.

https://github.com/kvcache-ai/Mooncake. What it reads it may still write when nobody waits for it any more:
a reading cannot be called back, and goes on when a stopped peer does. So it reads into memory that is
nobody's (`mooncake_engines.py`), and whoever waits copies from there into our blocks, and nobody else.

A process that was started anew may listen where another one did. So each gives out its epoch beside its
blocks, and that is read first.

It keeps nobody out: it listens at all addresses of its machine, whatever `--listen` says, at two ports of
15000 to 17000, has no token, and whoever reaches it can read the KV cache and write into it too. This is
for networks of one's own.
"""

import ctypes
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from xllm.core.errors import ConfigError
from xllm.executor.lanes import Lane
from xllm.executor.transports.base import (
    EPOCH_BYTES,
    STALL_S,
    Blocks,
    Description,
    Settings,
    TransportError,
    pack,
    unpack,
)
from xllm.executor.transports.mooncake_engines import SLOT_BYTES, Piece, Reader, Route, load, open_engine
from xllm.executor.transports.open_peers import OpenPeers

log = logging.getLogger(__name__)

KIND = "mooncake"
SETUP_S = 20.0
CONNECT_S = 3.0
CLOSE_S = 10.0  # for an engine to end, where no call hangs
LONGEST_LOOK_S = 0.25
MOST_READERS = 32  # peers at a time, with those whose calls hang
_ANY = ("", "0.0.0.0")


class MooncakeTransport:
    """See `Transport`."""

    def __init__(self, blocks: Blocks, settings: Settings):
        """ConfigError where Mooncake is not installed, or cannot use this memory."""
        if blocks.on_card:
            raise ConfigError("--kv-transport mooncake reads host memory only; for a card's take nixl or tcp")
        host = settings.advertise or settings.listen
        if ":" in host:
            raise ConfigError(f"--kv-transport mooncake: {host}: there is no IPv6; take --kv-transport tcp")
        self._host = socket.gethostname() if host in _ANY else host
        self._api = load()
        self._blocks = blocks
        self._lock = threading.Lock()
        self._readers: list[Reader] = []
        self._idle: list[Reader] = []
        self._peers: OpenPeers[MooncakePeer] = OpenPeers()
        described = blocks.describe(KIND, b"")
        self._epoch = ctypes.create_string_buffer(described.epoch, EPOCH_BYTES)
        self._lane = Lane("xllm-kv-mooncake-serve")
        self._engine: Any = None
        try:
            port = self._lane.call(self._start, SETUP_S)
        except (OSError, TimeoutError) as e:
            self._lane.close()
            raise ConfigError(f"--kv-transport mooncake: {str(e) or 'Mooncake does not answer'}") from e
        log.warning(
            "Mooncake listens at every address of this machine and asks for no token: whoever reaches it can "
            "read and change the KV cache"
        )
        place = (self._host, port, blocks.address, ctypes.addressof(self._epoch))
        self._descriptor = pack(msgspec.structs.replace(described, place=msgspec.msgpack.encode(place)))

    def descriptor(self) -> bytes:
        return self._descriptor

    def connect(self, descriptor: bytes) -> "MooncakePeer":
        description = unpack(descriptor, KIND, self._blocks)
        try:
            place = msgspec.msgpack.decode(description.place, type=tuple[str, int, int, int])
        except msgspec.MsgspecError as e:
            raise TransportError(f"a peer's address cannot be read: {e}") from e
        host, port, address, epoch_address = place
        route = Route(f"{host}:{port}")
        reader = self._reader_for(route.target)
        peer = MooncakePeer(self._blocks, description, address, route, reader)
        reader.serve(route)
        try:
            peer.enter(epoch_address)
        except TransportError:
            peer.close()
            raise
        return self._peers.add(peer)

    def close(self) -> None:
        if not self._peers.close():
            return
        with self._lock:
            readers = self._readers
        for reader in readers:
            reader.close()
        until = time.monotonic() + CLOSE_S + 2.0 * len(readers)
        ended = True
        try:
            self._lane.call(self._stop, until - time.monotonic())
        except TimeoutError:
            ended = False
        self._lane.close()
        if not all(reader.join(until) for reader in readers) or not ended:
            log.warning("an engine of Mooncake hangs and is left alone")

    def _start(self) -> int:
        engine = open_engine(self._api, self._host)
        memory = self._blocks.memory_NB
        for address, nbytes in (
            (self._blocks.address, memory.nbytes),
            (ctypes.addressof(self._epoch), EPOCH_BYTES),
        ):
            if code := engine.register_memory(address, nbytes):
                raise OSError(f"Mooncake cannot use the KV cache's memory ({code})")
        self._engine = engine
        port: int = engine.get_rpc_port()
        return port

    def _stop(self) -> None:
        engine, self._engine = self._engine, None
        for address in (self._blocks.address, ctypes.addressof(self._epoch)):
            engine.unregister_memory(address)

    def _reader_for(self, target: str) -> Reader:
        """One that is free, if possible such as has not known another process there."""
        with self._lock:
            if self._peers.closed:
                raise TransportError("this engine's transport is closed")
            fit = [reader for reader in self._idle if target not in reader.stale]
            if not fit and len(self._readers) < MOST_READERS:
                self._readers.append(Reader(self._api, self._host, self._freed))
                return self._readers[-1]
            if not (fit := fit or self._idle):
                raise TransportError(
                    f"{MOST_READERS} peers are read by Mooncake, or hang; there can be no more"
                )
            self._idle.remove(fit[0])
            return fit[0]

    def _freed(self, reader: Reader) -> None:
        with self._lock:
            self._idle.append(reader)


class MooncakePeer:
    """See `Peer`. `close` may be called from any thread."""

    def __init__(
        self, blocks: Blocks, description: Description, address: int, route: Route, reader: Reader
    ):  # fmt: skip
        self._blocks, self._description, self._address = blocks, description, address
        self._route, self._reader = route, reader
        self._going: dict[Piece, tuple[MooncakeReading, int]] = {}  # for which reading, and where to
        self._looked = 0.0
        self._quiet_s = 0.0  # that somebody has waited since anything arrived

    @property
    def closed(self) -> bool:
        return bool(self._route.broken)

    def enter(self, epoch_address: int) -> None:
        """TransportError unless the peer is there, and is the one that was meant."""
        route, piece = self._route, Piece(epoch_address, EPOCH_BYTES)
        with route.changed:
            route.wanted.append(piece)
            route.changed.notify_all()
            route.changed.wait_for(lambda: route.arrived or route.broken, CONNECT_S)
            why = route.broken
            if route.arrived:
                route.arrived.clear()
                route.free.append(piece.slot)
                if self._reader.bytes_of(piece) != self._description.epoch:
                    why = "the peer was started anew"
            elif not why:
                why = "it does not answer"
            if why and route.opened:
                self._reader.stale.add(route.target)
        if why:
            raise TransportError(f"no KV from {route.target}: {why}")

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> "MooncakeReading":
        self._blocks.check_read(theirs, ours, self._description)
        route, reading = self._route, MooncakeReading(self)
        with route.changed:
            if route.broken:
                raise TransportError(route.broken)
            if not self._going:
                self._quiet_s = 0.0
            for piece, place in self._pieces(theirs, ours):
                self._going[piece] = (reading, place)
                reading.left += 1
                route.wanted.append(piece)
            route.changed.notify_all()
        return reading

    def close(self) -> None:
        self._route.end("the peer was closed")

    def wait_for(self, reading: "MooncakeReading", timeout_s: float) -> bool:
        route, deadline = self._route, time.monotonic() + timeout_s
        with route.changed:
            while True:
                if not route.broken:
                    self._take()
                if not reading.left:
                    return True
                if not route.broken and self._quiet_s > STALL_S:
                    route.end(f"nothing has come from the peer for {self._quiet_s:.1f} s")
                if route.broken:
                    raise TransportError(route.broken)
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                route.changed.wait(min(left, LONGEST_LOOK_S))

    def _pieces(self, theirs: Sequence[int], ours: Sequence[int]) -> Iterator[tuple[Piece, int]]:
        """Each with the address of ours that it goes to."""
        each = self._blocks.block_bytes
        for begin, count in _together(theirs, ours):
            there, here = self._address + theirs[begin] * each, self._blocks.address + ours[begin] * each
            for offset in range(0, count * each, SLOT_BYTES):
                yield Piece(there + offset, min(SLOT_BYTES, count * each - offset)), here + offset

    def _take(self) -> None:
        """What has come goes into our blocks. With the lock, and while nothing is broken."""
        route, now = self._route, time.monotonic()
        self._quiet_s += min(
            now - self._looked, LONGEST_LOOK_S
        )  # what comes while nobody looks counts as well
        self._looked = now
        if not route.arrived:
            return
        self._quiet_s = 0.0
        while route.arrived:
            piece = route.arrived.popleft()
            reading, place = self._going.pop(piece)
            ctypes.memmove(place, self._reader.address(piece), piece.nbytes)
            route.free.append(piece.slot)
            reading.left -= 1
        route.changed.notify_all()


class MooncakeReading:
    """See `Reading`."""

    def __init__(self, peer: MooncakePeer):
        self.left = 0  # pieces
        self._peer = peer

    def wait(self, timeout_s: float) -> bool:
        return self._peer.wait_for(self, timeout_s)


def _together(theirs: Sequence[int], ours: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index of the first, count) of numbers that follow each other on both sides."""
    begin = 0
    for i in range(1, len(ours) + 1):
        if i == len(ours) or theirs[i] != theirs[i - 1] + 1 or ours[i] != ours[i - 1] + 1:
            yield begin, i - begin
            begin = i
