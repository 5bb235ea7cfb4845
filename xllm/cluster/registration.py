"""An instance's side of the registry: it is there, with what it can do and how loaded it is, as long as it lives.

One task renews the lease and publishes the load. Every load goes out in a transaction that compares the revision at which
this incarnation wrote its entry, so the same call notices that etcd was wiped, that the lease had run out, and that a newer
incarnation has taken the id. The first two lead to registering again, the third ends the registration: `superseded` is
set and nothing of the newer one's is touched. etcd being away changes nothing here; it is tried again for as long as it takes.
"""

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Callable

import msgspec

from xllm.cluster.etcd import Etcd, EtcdError, EtcdUnavailable
from xllm.cluster.etcd_types import Compare, Put
from xllm.cluster.instance import (
    InstanceInfo,
    Keys,
    LoadSummary,
    RegistryError,
    check_name,
    decode,
    encode,
    epoch_now,
)
from xllm.cluster.lease import Backoff, Lease, jittered
from xllm.core.clock import Clock, monotonic
from xllm.core.errors import XllmError

log = logging.getLogger(__name__)

_RACES = 8  # transactions that somebody else got ahead of before it is called a failure


class Superseded(XllmError):
    """Another incarnation of this id is registered, and it is newer: this one must not take requests any more."""

    type = "superseded_error"

    def __init__(self, id: str, epoch: int, stored: int):
        super().__init__(f"instance {id} of epoch {epoch} is superseded by epoch {stored}")
        self.stored = stored


class _Epoch(msgspec.Struct, frozen=True):
    """Who had the id last; kept without a lease, so that an incarnation that wakes late is refused whether or not the newer
    one still runs. About 100 bytes for every id there ever was."""

    epoch: int
    owner: str


async def next_epoch(etcd: Etcd, keys: Keys, id: str) -> int:
    """For a process that starts as `id`. Without etcd the clock alone decides."""
    try:
        found = (await etcd.range(keys.epoch(id))).kvs
        return epoch_now(decode(found[0].value, _Epoch).epoch if found else 0)
    except (EtcdError, RegistryError):
        return epoch_now()


class Registration:
    """`start` returns at once where etcd is away; `registered` says whether the entry stood when last looked at."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        info: InstanceInfo,
        load: Callable[[], LoadSummary],
        *,
        ttl_s: int = 6,  # and etcd lets it live that long again when it has restarted
        load_s: float = 2.0,
        clock: Clock = monotonic,
    ):
        check_name(info.id, "an instance's id")
        self.info = info
        self.registered = asyncio.Event()
        self.superseded = asyncio.Event()
        self._etcd, self._keys, self._load = etcd, keys, load
        self._ttl_s, self._load_s, self._clock = ttl_s, load_s, clock
        self._owner = uuid.uuid4().hex
        self._lease: Lease | None = None
        self._revision = 0  # at which our entry was written; 0: it has to be written
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Tries once here, so that who starts an old incarnation hears `Superseded`; goes on in a task of its own."""
        try:
            await self._register()
        except Superseded:
            await self.close()
            raise
        except EtcdError as e:
            log.info("instance %s: %s", self.info.id, e)
        self._task = asyncio.create_task(self._run(), name=f"registration of {self.info.id}")

    def update(self, info: InstanceInfo) -> None:
        """Another role, draining, more blocks: is written soon. Id and epoch stay."""
        assert (info.id, info.epoch) == (self.info.id, self.info.epoch)
        self.info = info
        self._revision = 0
        self._wake.set()

    async def close(self) -> None:
        """Leaves. Returns within a few seconds whether or not etcd is there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self.registered.clear()
        if self._lease is not None:
            await self._lease.revoke()
            self._lease = None

    # ---- the task

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._turn()
                backoff.reset()
                wait_s = jittered(min(self._load_s, self._ttl_s / 3))
            except Superseded as e:
                log.warning("%s", e)
                self.registered.clear()
                self.superseded.set()
                return
            except EtcdError as e:
                log.info("instance %s: %s", self.info.id, e)
                wait_s = backoff.next()
            except Exception:  # such as one in `load`: the instance would leave the cluster for it
                log.exception("instance %s: registration", self.info.id)
                wait_s = backoff.next()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
            self._wake.clear()

    async def _turn(self) -> None:
        if (
            self._lease is not None
            and self._lease.left_s < self._ttl_s * 2 / 3
            and not await self._lease.renew()
        ):
            self._forget()
        if self._revision == 0 or not await self._publish():
            self.registered.clear()
            await self._register()

    def _forget(self) -> None:
        self._lease, self._revision = None, 0
        self.registered.clear()

    async def _publish(self) -> bool:
        """False when our entry is not what we wrote any more."""
        assert self._lease is not None
        id = self.info.id
        load = Put(self._keys.load(id), encode(self._load()), self._lease.id)
        try:
            done = await self._etcd.txn([Compare(self._keys.instance(id), "MOD", self._revision)], [load])
        except EtcdUnavailable:
            raise
        except EtcdError:  # the lease is gone
            self._forget()
            return False
        if not done.succeeded:
            self._revision = 0
        return done.succeeded

    async def _register(self) -> None:
        """Raises Superseded where the id is another's by now, EtcdError where it did not work."""
        if self._lease is None or not await self._lease.renew():
            self._lease = await Lease.grant(self._etcd, math.ceil(self._ttl_s), self._clock)
        info, keys = self.info, self._keys
        writes = [
            Put(keys.epoch(info.id), encode(_Epoch(info.epoch, self._owner))),
            Put(keys.instance(info.id), encode(info), self._lease.id),
            Put(keys.load(info.id), encode(self._load()), self._lease.id),
        ]
        seen = await self._seen()
        for _ in range(_RACES):
            ours = Compare(keys.epoch(info.id), "MOD", seen)
            done = await self._etcd.txn([ours], writes)
            if done.succeeded:
                if self.info is info:  # else `update` came in between
                    self._revision = done.revision
                self.registered.set()
                return
            seen = await self._seen()
        raise EtcdError(f"instance {info.id}: others register under this id all the time")

    async def _seen(self) -> int:
        """The revision of the id's epoch entry, 0 where there is none. Raises Superseded."""
        found = (await self._etcd.range(self._keys.epoch(self.info.id))).kvs
        if not found:
            return 0
        last = decode(found[0].value, _Epoch)
        other = last.epoch == self.info.epoch and last.owner != self._owner
        if last.epoch > self.info.epoch or other:
            raise Superseded(self.info.id, self.info.epoch, last.epoch)
        return found[0].mod_revision
