"""KV blocks in a store that several engines share, as the mover sees it: whole blocks or none, in bounded time.

A block travels as one record: a header (`xllm.executor.records`) and its bytes. Records go through memory of this file's
own. So a call that hangs reads and writes nothing else, and can be left to itself while its host slots are used on. Who
gets a record compares name and checksum before a byte of it is taken over.

A store that does not answer is left alone for a while, each time for longer, until it answers again.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from xllm.executor import records
from xllm.executor.host_tier import checksum
from xllm.executor.lanes import NO_MEMORY, Lane, Lanes
from xllm.executor.records import Record
from xllm.executor.stores.table import Store

log = logging.getLogger(__name__)

T = TypeVar("T")
HEADER = 128  # bytes in front of a block: its record header, filled up
LOOK_S = 0.5  # for a question
CALL_S = 4.0  # for some blocks to go or to come
CLOSE_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
BATCH_BYTES, MOST_AT_ONCE = 16 << 20, 16  # of one call; the first is for one lane


class Pause:
    """How long to leave alone what has failed. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._next = FIRST_PAUSE_S
        self._until = 0.0

    @property
    def left(self) -> float:
        """Seconds; 0 where it may be tried."""
        return max(0.0, self._until - self._clock())

    def failed(self) -> None:
        """Once for all that failed at the same time."""
        with self._lock:
            if not self.left:  # engines that saw it fail together do not come back together
                self._until = self._clock() + self._next * random.uniform(0.75, 1.0)
                self._next = min(2 * self._next, LONGEST_PAUSE_S)

    def worked(self) -> None:
        with self._lock:
            if not self.left:  # else it is the late answer to what was asked before
                self._next = FIRST_PAUSE_S


class RemoteTier:
    """Threads may share it: `readers` may get at once, one may put, one may look. Owns the store."""

    def __init__(self, store: Store, block_bytes: int, fingerprint: bytes, *, readers: int = 2):
        self.block_bytes = block_bytes
        self._store = store
        self._owner = records.owner_of(fingerprint)
        self.realm = self._owner.hex()  # in front of every key: others' blocks have other keys
        record_bytes = HEADER + block_bytes
        self.at_once = max(1, min(MOST_AT_ONCE, BATCH_BYTES // record_bytes))
        memory_LNB = np.zeros((readers + 1, self.at_once, record_bytes), dtype=np.uint8)
        store.register(memory_LNB.reshape(-1))
        self._looking = Lanes("xllm-kv-look", [NO_MEMORY])
        self._getting = Lanes("xllm-kv-get", [*memory_LNB[:readers]])
        self._putting = Lanes("xllm-kv-put", [memory_LNB[readers]])
        self.pause = Pause()
        self._complaints: set[tuple[str, type]] = set()

    def count(self, names: Sequence[bytes], realm: str) -> int | None:
        """How many of `names` are there, from the front. None where the store does not answer."""
        keys = _keys(realm, names)
        with self._lane(self._looking) as lane:
            if lane is None:
                return None
            there = self._call("looked for", lane, lambda: self._store.exists(keys), LOOK_S)
        return None if there is None else [*there, False].index(False)

    def get(self, blocks: Sequence[tuple[bytes, np.ndarray]], realm: str) -> list[int | None]:
        """Fill each array (uint8 [block_bytes]; `at_once` at most) with the block of its name. The checksum of each, or
        None where it is not there, not sound, or did not come in time; then its array is untouched."""
        keys = _keys(realm, [name for name, _ in blocks])
        known: list[int | None] = [None] * len(blocks)
        with self._lane(self._getting) as lane:
            if lane is None:
                return known
            rows = [*lane.memory[: len(blocks)]]
            there = self._call("fetched", lane, lambda: self._store.get(keys, rows), CALL_S)
            if there is None:
                return known
            for i, (name, into) in enumerate(blocks):
                known[i] = self._sound(rows[i], name) if there[i] else None
                if known[i] is not None:
                    np.copyto(into, rows[i][HEADER:])
            unsound = [
                key for key, came, good in zip(keys, there, known, strict=True) if came and good is None
            ]
            if unsound:
                log.warning("%d KV blocks in the store are damaged and are taken out of it", len(unsound))
                self._call("removed", lane, lambda: self._store.remove(unsound), CALL_S)
        return known

    def put(self, blocks: Sequence[tuple[bytes, np.ndarray, int]], realm: str) -> list[bool]:
        """Send blocks (name, uint8 [block_bytes], checksum of what it should be; `at_once` at most). Which of them are
        there by now. A block that is not what it should be is not sent."""
        stored = [False] * len(blocks)
        with self._lane(self._putting) as lane:
            if lane is None:
                return stored
            rows: dict[int, np.ndarray] = {}
            for i, (name, data, known) in enumerate(blocks):
                row = lane.memory[i]
                np.copyto(row[HEADER:], data)
                if checksum(name, row[HEADER:]) == known:
                    header = records.pack(Record(0, name, known), self.block_bytes, self._owner)
                    row[: len(header)] = np.frombuffer(header, dtype=np.uint8)
                    rows[i] = row
            keys = _keys(realm, [blocks[i][0] for i in rows])
            if keys:
                done = self._call("sent", lane, lambda: self._store.put(keys, [*rows.values()]), CALL_S)
                for i, there in zip(rows, done or (), strict=False):
                    stored[i] = there
        return stored

    def _sound(self, record: np.ndarray, name: bytes) -> int | None:
        """The checksum of a record that is the block of this name, whole."""
        header = records.parse(record[: records.BYTES].tobytes(), self.block_bytes, self._owner)
        if header is None or header.name != name or checksum(name, record[HEADER:]) != header.known:
            return None
        return header.known

    # what is not to be trusted

    def remove(self, names: Sequence[bytes], realm: str) -> None:
        """Take them out of the store, if it answers."""
        keys = _keys(realm, names)
        with self._lane(self._putting) as lane:
            if lane is not None:
                self._call("removed", lane, lambda: self._store.remove(keys), CALL_S)

    def leave(self) -> None:
        """Into a realm where nothing is yet and nobody else comes."""
        self.realm = f"{self._owner.hex()}{os.urandom(8).hex()}"
        log.warning("the cache was forgotten: KV blocks are no longer shared with other engines")

    def close(self) -> None:
        """What hangs is left to itself, and the store then open: it is still in use."""
        until = time.monotonic() + CLOSE_S
        closing = Lane("xllm-kv-close")
        all_lanes = (self._looking, self._getting, self._putting)
        if all(lanes.rest(until) for lanes in all_lanes):
            self._call("given back", closing, lambda: self._store.close(), CLOSE_S)
        else:
            log.warning("the store of KV blocks does not answer and is left open")
        for one in (closing, *all_lanes):
            one.close()

    # calls

    @contextmanager
    def _lane(self, lanes: Lanes) -> Iterator[Lane | None]:
        """None where the store is to be left alone."""
        lane = None if self.pause.left else lanes.take()
        if lane is None:
            self.pause.failed()  # nothing is changed by that during a pause
            yield None
            return
        try:
            yield lane
        finally:
            lanes.give(lane)

    def _call(self, what: str, lane: Lane, work: Callable[[], T], seconds: float) -> T | None:
        try:
            result = lane.call(work, seconds)
        except Exception as e:
            self.pause.failed()
            self._complain(what, e)
            return None
        self.pause.worked()
        return result

    def _complain(self, what: str, e: Exception) -> None:
        """Once per kind: a store that is down fails again and again."""
        kind = (what, type(e))
        level = logging.DEBUG if kind in self._complaints else logging.WARNING
        self._complaints.add(kind)
        why = "no answer in time" if isinstance(e, TimeoutError) else e
        log.log(level, "KV blocks could not be %s in the store: %s", what, why)


def _keys(realm: str, names: Sequence[bytes]) -> list[str]:
    return [f"{realm}-{name.hex()}" for name in names]
