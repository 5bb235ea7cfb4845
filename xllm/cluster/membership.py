"""A router's side of the registry: which instances there are, kept through whatever happens to etcd.

It lists the cluster's keys, watches from the list's revision, and lists again whenever the watch ends for any reason
(connection, compaction, another endpoint, a wiped store): a list is small and right by construction, going on from an
old revision is neither after a wipe. Beside the watch a probe asks for the newest change every second, which notices an etcd
that hangs and a watch that lags behind.

Nobody leaves while etcd is away. When it is back, those who are not in it have `grace_s` to register again; leases that
run out within that time count as part of the absence.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from xllm.cluster.etcd import Compacted, Etcd, EtcdError, EtcdUnavailable, end_of
from xllm.cluster.etcd_types import KeyValue
from xllm.cluster.instance import InstanceInfo, Keys, LoadSummary, RegistryError, decode
from xllm.cluster.lease import Backoff, jittered
from xllm.core.clock import Clock, monotonic

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    info: InstanceInfo
    load: LoadSummary | None = None  # none yet


@dataclass(frozen=True, slots=True)
class Joined:
    member: Member


@dataclass(frozen=True, slots=True)
class Changed:
    """Its load, role or capacity; the incarnation is the same."""

    member: Member


@dataclass(frozen=True, slots=True)
class Left:
    """It is gone, or another incarnation of the same id has joined (which the next change says)."""

    member: Member


Change = Joined | Changed | Left


class Membership:
    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        *,
        grace_s: float = 8.0,
        probe_s: float = 1.0,
        clock: Clock = monotonic,
    ):
        self._etcd, self._keys, self._clock = etcd, keys, clock
        self._grace_s, self._probe_s = grace_s, probe_s
        self._members: dict[str, Member] = {}  # replaced, never changed
        self._infos: dict[str, InstanceInfo] = {}  # as they stand in etcd
        self._loads: dict[str, LoadSummary] = {}
        self._revision = 0  # up to which all of the above is known
        self._contact: float | None = None  # when etcd last answered
        self._away = True
        self._back = -math.inf  # when the last absence ended
        self._listed = asyncio.Event()
        self._news = asyncio.Event()  # set once, then replaced
        self._task: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float = 2.0) -> bool:
        """True when the first list is there; where it takes longer than `timeout_s` it comes in the background."""
        self._task = asyncio.create_task(self._run(), name="membership")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._listed.wait(), timeout_s)
        return self._listed.is_set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def snapshot(self) -> Mapping[str, Member]:
        """Members by id. Never changes after it was given out."""
        return self._members

    @property
    def stale_s(self) -> float:
        """0 while etcd answers; else how old what is known is. Infinite before the first list."""
        if self._contact is None:
            return math.inf
        return self._clock() - self._contact if self._away else 0.0

    async def changes(self) -> AsyncIterator[Change]:
        """For ever; begins with a `Joined` for everybody who is there. A reader that is slow misses states in between, never
        the last, and costs no memory."""
        seen: Mapping[str, Member] = {}
        while True:
            news, now = self._news, self._members
            for change in differences(seen, now):
                yield change
            seen = now
            await news.wait()

    # ---- the task

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._list()
                backoff.reset()
                await self._follow()
            except Compacted as e:
                log.info("membership: %s; listing again", e)
                wait_s = jittered(0.05)
            except EtcdError as e:
                if isinstance(e, EtcdUnavailable) and not self._away:
                    log.warning(
                        "membership: etcd is away, going on with %d instances: %s", len(self._members), e
                    )
                self._away = True
                wait_s = backoff.next()
            except Exception:  # whatever it is, a router without membership is worse
                log.exception("membership")
                self._away = True
                wait_s = backoff.next()
            else:
                wait_s = jittered(0.05)
            await asyncio.sleep(wait_s)

    async def _list(self) -> None:
        found = await self._etcd.list(self._keys.root)
        self._infos, self._loads = {}, {}
        for kv in found.kvs:
            self._take(kv)
        self._revision = found.revision
        now = self._clock()
        if self._away and self._contact is not None:
            self._back = now
        self._away = False
        self._contact = now
        self._settle()
        self._listed.set()

    async def _follow(self) -> None:
        """Until the watch or the probe ends. Raises what ended it; returns where only a fresh list is needed."""
        tasks = {asyncio.create_task(self._watch()), asyncio.create_task(self._probe())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        async for batch in self._etcd.watch(self._keys.root, self._revision + 1):
            for event in batch.events:
                if event.kind == "put":
                    self._take(event.kv)
                else:
                    self._drop(event.kv)
                self._revision = max(self._revision, event.kv.mod_revision)
            if batch.events:
                self._settle()

    async def _probe(self) -> None:
        """Asks etcd beside the watch, and lets time pass for those who are missing. Returns where the watch does not see
        what it should."""
        endpoint, newest = self._etcd.current, 0
        while True:
            await asyncio.sleep(jittered(self._probe_s))
            behind = self._revision < newest  # a change that the watch has had a whole turn to bring
            found = await self._etcd.range(self._keys.root, end_of(self._keys.root), newest_only=True)
            if behind or found.revision < self._revision or self._etcd.current != endpoint:
                return
            newest = found.kvs[0].mod_revision if found.kvs else 0
            self._contact = self._clock()
            self._settle()

    # ---- what is known

    def _take(self, kv: KeyValue) -> None:
        kind, id = self._keys.split(kv.key)
        try:
            if kind == "instances":
                self._infos[id] = decode(kv.value, InstanceInfo)
            elif kind == "load":
                self._loads[id] = decode(kv.value, LoadSummary)
        except RegistryError as e:
            log.warning("membership: %s of %s is passed over: %s", kind, id, e)

    def _drop(self, kv: KeyValue) -> None:
        kind, id = self._keys.split(kv.key)
        if kind == "instances":
            self._infos.pop(id, None)
        elif kind == "load":
            self._loads.pop(id, None)

    def _settle(self) -> None:
        """Makes members of what etcd says, what was known before, and the time that has passed."""
        forgiving = self._clock() < self._back + self._grace_s
        members: dict[str, Member] = {}
        for id, known in self._members.items():
            info = self._infos.get(id)
            # after a wipe an older incarnation may be the first to return
            if forgiving and (info is None or info.epoch < known.info.epoch):
                members[id] = known
        for id, info in self._infos.items():
            if id in members:
                continue
            load = self._loads.get(id)
            was = self._members.get(id)
            if load is None and was is not None and was.info.epoch == info.epoch:
                load = was.load
            members[id] = Member(info, load)
        if members != self._members:
            self._members = members
            news, self._news = self._news, asyncio.Event()
            news.set()


def differences(before: Mapping[str, Member], after: Mapping[str, Member]) -> list[Change]:
    """What happened between two snapshots; an id that changed hands leaves before it joins."""
    found: list[Change] = []
    for id, member in before.items():
        now = after.get(id)
        if now is None or now.info.epoch != member.info.epoch:
            found.append(Left(member))
    for id, member in after.items():
        was = before.get(id)
        if was is None or was.info.epoch != member.info.epoch:
            found.append(Joined(member))
        elif was != member:
            found.append(Changed(member))
    return found
