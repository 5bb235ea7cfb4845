"""A lease as its holder knows it: until when it certainly lives, by the holder's own clock."""

import random

from xllm.cluster.etcd import Etcd, EtcdError
from xllm.core.clock import Clock, monotonic

JITTER = 0.2  # share of a wait


def jittered(seconds: float) -> float:
    """Somewhat more or less, so that many who wait do not come at once."""
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)


class Backoff:
    """Waits that double from `first` to `most` seconds, jittered."""

    def __init__(self, first: float = 0.1, most: float = 1.0):
        self._first, self._most, self._next = first, most, first

    def next(self) -> float:
        seconds, self._next = self._next, min(self._most, 2 * self._next)
        return jittered(seconds)

    def reset(self) -> None:
        self._next = self._first


class Lease:
    """`certain_until` counts from the moment at which the last successful call *began*: etcd cannot have let the lease go
    before, whatever the answer's way took. It may live longer (etcd prolongs leases when it restarts)."""

    def __init__(self, etcd: Etcd, id: int, ttl_s: float, asked_at: float, clock: Clock):
        self.id = id
        self.ttl_s = ttl_s
        self.certain_until = asked_at + ttl_s
        self._etcd = etcd
        self._clock = clock

    @classmethod
    async def grant(cls, etcd: Etcd, ttl_s: int, clock: Clock = monotonic) -> "Lease":
        asked_at = clock()
        id, ttl = await etcd.grant(ttl_s)
        return cls(etcd, id, ttl, asked_at, clock)

    @property
    def left_s(self) -> float:
        return self.certain_until - self._clock()

    async def renew(self) -> bool:
        """False when etcd does not know it any more. Raises EtcdError when it cannot be asked."""
        asked_at = self._clock()
        ttl = await self._etcd.keep_alive(self.id)
        if ttl <= 0:
            self.certain_until = asked_at
            return False
        self.certain_until = max(self.certain_until, asked_at + ttl)
        return True

    async def revoke(self) -> None:
        """As far as that is possible: without etcd the lease ends by itself."""
        try:
            await self._etcd.revoke(self.id)
        except EtcdError:
            return
