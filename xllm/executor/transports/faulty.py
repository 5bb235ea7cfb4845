"""Another transport, on which things go wrong at given rates and from a seed: for tests.

    faulty:tcp?drop=0.01&corrupt=0.05&seed=7

is `tcp` with one of these to each reading, or none:

    drop      it never arrives, and never fails
    delay     it arrives `delay_s` late
    corrupt   one bit of one block is another
    swap      two blocks arrive in each other's place
    reorder   it begins after a later one has arrived, or `delay_s` late
    double    it is written a second time, `delay_s` later, before it counts as arrived
    break     the connection breaks in the midst of it
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from urllib.parse import parse_qsl

import torch

from xllm.core.errors import ConfigError
from xllm.executor.transports.base import Blocks, Peer, Reading, Settings, Transport, TransportError

FAULTS = ("drop", "delay", "corrupt", "swap", "reorder", "double", "break")
DELAY_S = 0.05
TICK_S = 0.002


class FaultyTransport:
    """See `Transport`."""

    def __init__(self, blocks: Blocks, settings: Settings):
        from xllm.executor.transports.table import open_blocks  # which knows this file

        inner, _, query = settings.detail.partition("?")
        rates, self.delay_s, seed = _parse(query)
        self.blocks = blocks
        self.injected: Counter[str] = Counter()
        self._rates = rates
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._inner: Transport = open_blocks(inner or "tcp", blocks, replace(settings, detail=""))

    def descriptor(self) -> bytes:
        return self._inner.descriptor()

    def connect(self, descriptor: bytes) -> "FaultyPeer":
        return FaultyPeer(self, self._inner.connect(descriptor))

    def close(self) -> None:
        self._inner.close()

    def draw(self) -> tuple[str, random.Random]:
        """What happens to the next reading ("" for nothing), and a source of its own for the rest."""
        with self._lock:
            at, fault = self._random.random(), ""
            for kind, rate in self._rates.items():
                if 0 <= at < rate:
                    fault = kind
                at -= rate
            if fault:
                self.injected[fault] += 1
            return fault, random.Random(self._random.random())


def _parse(query: str) -> tuple[dict[str, float], float, int]:
    rates: dict[str, float] = {}
    delay_s, seed = DELAY_S, 0
    for name, text in parse_qsl(query, keep_blank_values=True):
        try:
            if name == "seed":
                seed = int(text)
            elif name == "delay_s":
                delay_s = float(text)
            elif name in FAULTS:
                rates[name] = float(text)
            else:
                raise ConfigError(
                    f"faulty: there is no {name!r}; there are seed, delay_s, {', '.join(FAULTS)}"
                )
        except ValueError as e:
            raise ConfigError(f"faulty: {name}={text} is no number") from e
    if any(rate < 0 for rate in rates.values()) or sum(rates.values()) > 1 or delay_s < 0:
        raise ConfigError("faulty: rates are shares of all readings, together at most 1")
    return rates, delay_s, seed


class FaultyPeer:
    """See `Peer`."""

    def __init__(self, transport: FaultyTransport, inner: Peer):
        self.transport = transport
        self.inner = inner
        self.arrived = 0  # readings
        self.closed = threading.Event()

    def read(self, theirs: Sequence[int], ours: Sequence[int]) -> Reading:
        fault, source = self.transport.draw()
        if fault == "swap" and len(ours) > 1:
            ours = [*ours]
            i, j = source.sample(range(len(ours)), 2)
            ours[i], ours[j] = ours[j], ours[i]
        return FaultyReading(self, fault, source, [*theirs], [*ours])

    def close(self) -> None:
        self.closed.set()
        self.inner.close()


class FaultyReading:
    """See `Reading`."""

    def __init__(
        self, peer: FaultyPeer, fault: str, source: random.Random, theirs: list[int], ours: list[int]
    ):
        self._peer, self._fault, self._source = peer, fault, source
        self._theirs, self._ours = theirs, ours
        self._begun = time.monotonic()
        self._before = peer.arrived
        self._done = False
        self._inner: Reading | None = None
        if fault not in ("drop", "reorder"):
            self._inner = peer.inner.read(theirs, ours)

    def wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        if self._fault == "break" and not self._done:
            self._peer.close()
        if self._fault == "drop":
            self._until(lambda: False, deadline)
        elif self._fault == "reorder" and self._inner is None:
            if not self._until(lambda: self._late() or self._peer.arrived > self._before, deadline):
                return False
            self._inner = self._peer.inner.read(self._theirs, self._ours)
        if self._inner is None or not self._inner.wait(max(0.0, deadline - time.monotonic())):
            return False
        return self._done or self._arrive(deadline)

    def _arrive(self, deadline: float) -> bool:
        if self._fault in ("delay", "double") and not self._until(self._late, deadline):
            return False
        if self._fault == "double":
            self._fault = ""
            self._inner = self._peer.inner.read(self._theirs, self._ours)
            return self.wait(max(0.0, deadline - time.monotonic()))
        if self._fault == "corrupt" and self._ours:
            self._corrupt()
        self._done = True
        self._peer.arrived += 1
        return True

    def _late(self) -> bool:
        return time.monotonic() - self._begun >= self._peer.transport.delay_s

    def _until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """False where it is time before it holds."""
        while not condition():
            if self._peer.closed.is_set():
                raise TransportError("the peer was closed")
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._peer.closed.wait(min(left, TICK_S))
        return True

    def _corrupt(self) -> None:
        blocks = self._peer.transport.blocks
        block, byte = self._source.choice(self._ours), self._source.randrange(blocks.block_bytes)
        with torch.inference_mode():
            blocks.memory_NB[block, byte] ^= 1 << self._source.randrange(8)
            if blocks.on_card:
                torch.cuda.current_stream(blocks.memory_NB.device).synchronize()
