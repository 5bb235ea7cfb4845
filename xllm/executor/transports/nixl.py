"""KV blocks by way of NIXL (https://github.com/ai-dynamo/nixl) and UCX, which finds what is fastest between two engines: a
card's copy engine, NVLink, RDMA, or one process that reads another's memory.

Only what reads without the other side's help is used. Where UCX has nothing of the kind it lets the other side send
over TCP, and a process that sends is ended by an assertion of UCX when the reader goes meanwhile: between such machines
there is no connection, and the TCP transport is the one to take. (UCX_TLS in the environment overrules this.)

What was begun cannot be called back: a request that is released, of a peer that is forgotten, may still write into our
blocks. Only the end of the agent that asked is the end of it. So each peer is read from by an agent of its own, which goes
where that peer fails; the one that others read from stays. No agent has NIXL's progress thread, which takes a third of a
core and more for nothing: who waits moves what he waits for, and where others read from is looked after some hundred times a
second, enough for connections to come about.

There is no token: whoever knows a descriptor can read. This is for networks of one's own.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from xllm.core.errors import ConfigError
from xllm.executor.transports.base import (
    STALL_S,
    Blocks,
    Description,
    Settings,
    TransportError,
    pack,
    unpack,
)
from xllm.executor.transports.nixl_agents import card_of, load, open_agent, rows_of, this_host, use_card
from xllm.executor.transports.open_peers import OpenPeers

log = logging.getLogger(__name__)

KIND = "nixl"
LOOK_S = 0.003  # between looks after those that want to connect
POLL_S = 50e-6
LONGEST_LOOK_S = 0.25
PIECE_BYTES = 64 << 20  # of one request, so that a long reading shows signs of life
AHEAD = 8  # requests under way at a time
DRAIN_S = 1.0  # for what is under way when a peer is closed: to leave it be is kinder to the other side
_UNDER_WAY, _DONE = "PROC", "DONE"


class NixlTransport:
    """See `Transport`."""

    def __init__(self, blocks: Blocks, settings: Settings):
        """ConfigError where NIXL is not installed, or cannot use this memory."""
        if settings.mapped and blocks.on_card:
            raise ConfigError(
                "--kv-transport nixl needs memory of one piece, and that of this KV pool is mapped piece by piece; "
                "take --kv-pool paged or --kv-transport tcp"
            )
        self._api = load()
        self._blocks = blocks
        self._peers: OpenPeers[NixlPeer] = OpenPeers()
        self._closing = threading.Event()
        described = blocks.describe(KIND, b"")
        self._agent = open_agent(self._api, f"xllm-{described.epoch.hex()}", blocks, same_host=True)
        place = msgspec.msgpack.encode(
            (blocks.address, card_of(blocks), this_host(), self._agent.get_agent_metadata())
        )
        self._descriptor = pack(msgspec.structs.replace(described, place=place))
        self._thread = threading.Thread(target=self._run, name="xllm-kv-nixl", daemon=True)
        self._thread.start()

    def descriptor(self) -> bytes:
        return self._descriptor

    def connect(self, descriptor: bytes) -> "NixlPeer":
        description = unpack(descriptor, KIND, self._blocks)
        return self._peers.add(NixlPeer(self._api, self._blocks, description))

    def close(self) -> None:
        self._closing.set()
        self._peers.close()
        self._thread.join()
        self._agent = None  # the end of it

    def _run(self) -> None:
        """Messages of those that connect are dealt with whenever somebody asks for notices; there are none."""
        complained = False
        use_card(self._blocks)
        while not self._closing.wait(LOOK_S):
            try:
                self._agent.get_new_notifs()
            except Exception as e:  # a peer has gone badly; others are still there
                log.log(logging.DEBUG if complained else logging.WARNING, "NIXL: %s", e)
                complained = True


class NixlPeer:
    """See `Peer`. `close` may be called from any thread."""

    def __init__(self, api: Any, blocks: Blocks, description: Description):
        self._blocks, self._description = blocks, description
        self._lock = threading.Lock()  # held while the agent is used
        self._broken = ""  # why nothing more can be read
        self._readings: list[NixlReading] = []  # that have not arrived
        self._looked = 0.0
        self._quiet_s = 0.0  # that somebody has waited since anything arrived
        self._agent: Any = None
        self._here: Any = None
        self._there: Any = None
        try:
            address, card, host, metadata = msgspec.msgpack.decode(
                description.place, type=tuple[int, int, str, bytes]
            )
            agent = open_agent(
                api, f"xllm-reader-{os.urandom(8).hex()}", blocks, same_host=host == this_host()
            )
            name = agent.add_remote_agent(metadata)
            self._here = rows_of(
                agent, "NIXL_INIT_AGENT", blocks.address, card_of(blocks), blocks.num_blocks, blocks
            )
            self._there = rows_of(
                agent, name, address, card, description.num_blocks, blocks, description.device
            )
            self._agent = agent
        except ConfigError as e:
            raise TransportError(e.message) from e
        except Exception as e:  # of NIXL: see nixl_agents.py
            raise TransportError(
                f"the peer cannot be reached by NIXL ({e or type(e).__name__}); between machines without RDMA take "
                "--kv-transport tcp"
            ) from e

    @property
    def closed(self) -> bool:
        return bool(self._broken)

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> "NixlReading":
        self._blocks.check_read(theirs, ours, self._description)
        with self._lock:
            if self._broken:
                raise TransportError(self._broken)
            reading = NixlReading(self, list(self._pieces(theirs, ours)))
            self._readings.append(reading)
            with self._failing():
                self._progress()
        return reading

    def close(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        while True:
            with self._lock:
                if not self._broken:
                    with self._failing():
                        self._progress(begin=False)
                under_way = not self._broken and any(reading.requests for reading in self._readings)
                if not under_way or time.monotonic() > deadline:
                    self._end("the peer was closed")
                    return
            time.sleep(POLL_S)

    def wait_for(self, reading: "NixlReading", timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if not self._broken and not reading.done:
                    with self._failing():
                        self._progress()
                    if not reading.done and self._quiet_s > STALL_S:
                        self._end(f"nothing has come from the peer for {self._quiet_s:.1f} s")
                if reading.done:
                    break
                if self._broken:
                    raise TransportError(self._broken)
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, POLL_S))
        return True

    def _pieces(self, theirs: Sequence[int], ours: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        each = max(1, PIECE_BYTES // self._blocks.block_bytes)
        for begin in range(0, len(ours), each):
            there, here = (
                np.array(numbers[begin : begin + each], dtype=np.int32) for numbers in (theirs, ours)
            )
            yield here, there

    # under the lock

    def _progress(self, *, begin: bool = True) -> None:
        """Sees what has arrived, and begins what may be begun, in order."""
        use_card(self._blocks)
        now = time.monotonic()
        self._quiet_s += min(now - self._looked, LONGEST_LOOK_S)  # while nobody looks nothing can come
        self._looked = now
        under_way = 0
        for reading in self._readings:
            requests = [request for request in reading.requests if not self._arrived(request)]
            if len(requests) < len(reading.requests):
                self._quiet_s = 0.0
            reading.requests = requests
            under_way += len(requests)
        for reading in self._readings:
            while begin and reading.left and under_way < AHEAD:
                if not under_way:
                    self._quiet_s = 0.0
                here, there = reading.left.pop(0)
                request = self._agent.make_prepped_xfer("READ", self._here, here, self._there, there)
                reading.requests.append(request)
                under_way += 1
                if self._agent.transfer(request) not in (_UNDER_WAY, _DONE):
                    raise TransportError("the peer does not let itself be read")
            reading.done = not reading.left and not reading.requests
        self._readings = [reading for reading in self._readings if not reading.done]

    def _arrived(self, request: Any) -> bool:
        state = self._agent.check_xfer_state(request)
        if state == _DONE:
            request.release()
        elif state != _UNDER_WAY:
            raise TransportError("a reading failed")
        return bool(state == _DONE)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        why = ""
        try:
            yield
        except Exception as e:  # of NIXL
            why = f"the peer can be read no more: {e or type(e).__name__}"
        if why:  # not while the error is handled: it holds on to the agent
            self._end(why)

    def _end(self, why: str) -> None:
        """The agent goes, and with it whatever was under way."""
        if self._broken:
            return
        self._broken = why
        under_way = any(reading.requests for reading in self._readings)
        self._let_go()
        self._agent = None
        if under_way and self._blocks.on_card:  # copies between cards that had been handed to the driver
            torch.cuda.synchronize(self._blocks.memory_NB.device)

    def _let_go(self) -> None:
        """Of everything that holds on to the agent."""
        for reading in self._readings:
            for request in reading.requests:
                with contextlib.suppress(Exception):
                    request.release()
            reading.requests.clear()
        self._readings.clear()
        for rows in (self._here, self._there):
            with contextlib.suppress(Exception):
                rows.release()
        self._here = self._there = None


class NixlReading:
    """See `Reading`."""

    def __init__(self, peer: NixlPeer, pieces: list[tuple[np.ndarray, np.ndarray]]):
        self.left = pieces
        self.requests: list[Any] = []
        self.done = not pieces
        self._peer = peer

    def wait(self, timeout_s: float) -> bool:
        return self._peer.wait_for(self, timeout_s)
