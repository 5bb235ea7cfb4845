"""A store in memory that does what it is told to."""

import threading
from collections.abc import Sequence

import numpy as np

LONG = 30.0  # seconds; only a failing test waits that long


class FaultyStore:
    """What is in `error` is raised; while `gate` is closed calls hang, and go on where they were when it opens."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.closed = 0
        self.memories: list[np.ndarray] = []

    def register(self, memory: np.ndarray) -> None:
        self.memories.append(memory)

    def put(self, keys: Sequence[str], records: Sequence[np.ndarray]) -> list[bool]:
        self._enter("put", records)
        for key, record in zip(keys, records, strict=True):
            self.records.setdefault(key, record.tobytes())
        return [True] * len(keys)

    def get(self, keys: Sequence[str], into: Sequence[np.ndarray]) -> list[bool]:
        self._enter("get", into)
        for key, record in zip(keys, into, strict=True):
            if key in self.records:
                record[:] = np.frombuffer(self.records[key].ljust(record.nbytes, b"\0"), dtype=np.uint8)
        return [key in self.records for key in keys]

    def exists(self, keys: Sequence[str]) -> list[bool]:
        self._enter("exists", ())
        return [key in self.records for key in keys]

    def remove(self, keys: Sequence[str]) -> None:
        self._enter("remove", ())
        for key in keys:
            self.records.pop(key, None)

    def close(self) -> None:
        self._enter("close", ())
        self.closed += 1

    def damage(self, key: str, place: int, bits: int = 1) -> None:
        record = bytearray(self.records[key])
        record[place] ^= bits
        self.records[key] = bytes(record)

    def _enter(self, what: str, rows: Sequence[np.ndarray]) -> None:
        self.calls.append(what)
        self.entered.set()
        assert self.gate.wait(LONG)
        for row in rows:
            assert any(np.shares_memory(row, memory) for memory in self.memories), "only what was registered"
        if self.error is not None:
            raise self.error
