"""One of several who acts, and how those it acts on can tell that it still may.

A lock in etcd does not exclude: its holder can stop for longer than the lease and go on as if nothing had happened (Jepsen
on etcd 3.4.3). So there are two guards, and who leads uses both:

- before each act, `still_leader(fence)`: by the holder's own clock the lease is certain to live for at least `margin_s`
  more, so nobody else has been elected yet. Loss is noticed here before others can take over.
- with each act, the `fence`, which grows from leader to leader: whoever is acted upon remembers the highest it has seen and
  refuses lower ones. What is written to etcd goes through `write`, which etcd itself refuses from a leader of the past. This
  alone covers a holder that stops between the check and the act.

A wiped etcd elects anew at once and begins to count again. A candidate that sees revisions go back therefore waits for one
whole lease before it takes office, and a leader looks for its key a few times within a lease. What is left: a candidate that
has only just started cannot know of the wipe, and may lead beside the old one for a quarter of a lease; and who checks
fences refuses every leader of the new count until it is told of the wipe.
"""

import asyncio
import contextlib
import logging
import math

from xllm.cluster.etcd import Etcd, EtcdError
from xllm.cluster.etcd_types import Compare, Put
from xllm.cluster.instance import Keys, check_name
from xllm.cluster.lease import Backoff, Lease, jittered
from xllm.core.clock import Clock, monotonic

log = logging.getLogger(__name__)


class Leadership:
    """`owner` is for people who look into etcd. One object stands for one candidate and can win many times."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        office: str,
        owner: str,
        *,
        ttl_s: int = 10,
        margin_s: float = 2.0,
        clock: Clock = monotonic,
    ):
        check_name(office, "an office's name")
        assert 0 < margin_s < ttl_s / 2
        self._etcd, self._key, self._owner = etcd, keys.leader(office), owner
        self._ttl_s, self._margin_s, self._clock = ttl_s, margin_s, clock
        self._lease: Lease | None = None
        self._fence = 0  # 0: not the leader
        self._newest = 0  # revision seen, to notice a wipe
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()

    async def campaign(self) -> int:
        """Waits, for as long as it takes, until this candidate leads. Returns the fence: the create revision of its key."""
        await self.resign()
        backoff = Backoff()
        while True:
            try:
                if fence := await self._try():
                    self._fence = fence
                    self._lost.clear()
                    self._task = asyncio.create_task(self._hold(fence), name="leadership")
                    return fence
                backoff.reset()
                wait_s = jittered(min(1.0, self._ttl_s / 4))
            except EtcdError as e:
                log.info("campaign for %s: %s", self._key.decode(), e)
                wait_s = backoff.next()
            await asyncio.sleep(wait_s)

    def still_leader(self, fence: int) -> bool:
        """By this machine's clock alone, without asking anybody. False for good once it was False."""
        if fence != self._fence or fence == 0 or self._lease is None:
            return False
        if self._lease.left_s <= self._margin_s:
            self._lose("its lease may run out")
            return False
        return True

    async def lost(self, fence: int) -> None:
        """Returns when `fence` leads no more."""
        while self.still_leader(fence):
            left_s = 0.0 if self._lease is None else self._lease.left_s - self._margin_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), max(0.01, left_s))

    async def write(self, fence: int, puts: list[Put]) -> bool:
        """Into etcd, if and only if `fence` is the leader there. False: it is not, and nothing was written."""
        if not self.still_leader(fence):
            return False
        done = await self._etcd.txn([Compare(self._key, "CREATE", fence)], puts)
        if not done.succeeded:
            self._lose("etcd knows another leader")
        return done.succeeded

    async def resign(self) -> None:
        """Another may lead at once. Does nothing where this one does not lead."""
        self._lose("it resigned")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._lease is not None:
            await self._lease.revoke()
            self._lease = None

    def _lose(self, why: str) -> None:
        if self._fence:
            log.info("%s leads %s no more: %s", self._owner, self._key.decode(), why)
        self._fence = 0
        self._lost.set()

    async def _try(self) -> int:
        """The fence where the key is free, else 0."""
        found = await self._etcd.range(self._key)
        if found.revision < self._newest:
            self._newest = found.revision
            log.warning("etcd has forgotten: the last leader may act for one more lease")
            await asyncio.sleep(self._ttl_s)
            return 0
        self._newest = found.revision
        if self._lease is not None and not (
            self._lease.left_s > self._ttl_s / 2 or await self._lease.renew()
        ):
            self._lease = None
        if found.kvs:
            if self._lease is not None and found.kvs[0].lease == self._lease.id:
                return found.kvs[
                    0
                ].create_revision  # an answer that was lost on its way said that it had worked
            return 0
        if self._lease is None:
            self._lease = await Lease.grant(self._etcd, math.ceil(self._ttl_s), self._clock)
        free = Compare(self._key, "CREATE", 0)
        done = await self._etcd.txn([free], [Put(self._key, self._owner.encode(), self._lease.id)])
        if not done.succeeded or self._lease.left_s <= self._margin_s:
            return 0
        self._newest = done.revision
        return done.revision

    async def _hold(self, fence: int) -> None:
        backoff = Backoff(most=self._ttl_s / 10)
        while self.still_leader(fence):
            assert self._lease is not None
            try:
                if not await self._lease.renew():
                    self._lose("its lease is gone")
                    return
                found = await self._etcd.range(self._key)
                if not found.kvs or found.kvs[0].create_revision != fence:
                    self._lose("its key is gone")
                    return
                self._newest = max(self._newest, found.revision)
                backoff.reset()
                wait_s = jittered(self._ttl_s / 4)
            except EtcdError as e:
                log.info("leader %s: %s", self._owner, e)
                wait_s = backoff.next()
            await asyncio.sleep(wait_s)
