"""An instance's place in its cluster: what `xllm serve --etcd URL` does besides serving."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import cast
from urllib.parse import urlsplit

from msgspec.structs import replace

from xllm.cluster.etcd import Etcd
from xllm.cluster.instance import InstanceInfo, Keys, KvFacts, LoadSummary, Role
from xllm.cluster.registration import Registration, Superseded, next_epoch
from xllm.core.stats import SchedulerStats
from xllm.engine.async_llm import AsyncLLM
from xllm.executor.fingerprint import fingerprint
from xllm.kv.events import DEVICE
from xllm.server.cluster_options import TOKEN_VARIABLE, JoinOptions
from xllm.server.state import served_name
from xllm.wire.doors import Listening

log = logging.getLogger(__name__)
TOLD_S = 2.0  # for etcd to take what is said last; it may be away
HEARD_S = 0.25  # for routers to hear it from etcd
WILDCARDS = ("0.0.0.0", "::", "*", "")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Join:
    """`begin` where the server takes requests, `drain` where it takes no more, `close` at the end. `ConfigError` where what was
    asked cannot work. etcd may be away at any time: the instance joins, and leaves, as soon as it is there.

    `port` is the HTTP server's, `host` where that listens.
    """

    def __init__(self, options: JoinOptions, host: str, port: int, say: Callable[[str], None]):
        self.id = options.instance_id or default_id(port)
        self._options = options
        self.listening = Listening(
            (options.listen,), options.token(), name=self.id,
            kv_transport=None if options.kv_transport == "none" else options.kv_transport,
            advertise=self._advertised(urlsplit(options.listen).hostname or ""),
        )  # fmt: skip
        self._http = (host, port)
        self._say = say
        self._etcd = Etcd(options.etcd)
        self._registration: Registration | None = None
        self._task: asyncio.Task[None] | None = None
        self.failed: str | None = None  # why it is no instance

    def begin(self, engine: AsyncLLM, stop: Callable[[], None]) -> None:
        """`stop` is called where the instance must not serve any longer."""
        self._task = asyncio.create_task(self._stay(engine, stop), name="join")

    def drain(self) -> Awaitable[None]:
        """Routers are told at once to send nothing here; what is returned waits until they have heard it, for a moment."""
        registration = self._registration
        if registration is None or registration.superseded.is_set():
            return asyncio.sleep(0)
        registration.update(replace(registration.info, draining=True))
        if not registration.registered.is_set():  # etcd is away: nobody would be waited for
            return asyncio.sleep(0)
        registration.registered.clear()  # until that stands there
        return self._told(registration)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._registration is not None:
            await self._registration.close()
        await self._etcd.aclose()

    async def _told(self, registration: Registration) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(registration.registered.wait(), TOLD_S)
            await asyncio.sleep(HEARD_S)

    async def _stay(self, engine: AsyncLLM, stop: Callable[[], None]) -> None:
        try:
            await self._register(engine)
            self._superseded(stop)
        except Superseded:
            self._superseded(stop)
        except Exception as e:  # it would serve on, and nobody would send it anything
            log.exception("instance %s cannot join its cluster", self.id)
            self.failed = f"it cannot join its cluster: {type(e).__name__}"
            stop()

    def _superseded(self, stop: Callable[[], None]) -> None:
        self._say(f"stopping: a newer process is instance {self.id}")
        stop()

    async def _register(self, engine: AsyncLLM) -> None:
        """As long as the id is ours; then it returns. `Superseded` where it is another's from the start."""
        keys = Keys(self._options.cluster)
        info = await self._describe(engine, await next_epoch(self._etcd, keys, self.id))
        self._registration = Registration(self._etcd, keys, info, lambda: summary(engine.last_stats))
        await self._registration.start()
        where = f"cluster {self._options.cluster} as {info.id}, at {info.address}"
        if not self._registration.registered.is_set():
            self._say(f"etcd does not answer: joins {where} when it does")
            await _either(self._registration.registered, self._registration.superseded)
        if self._registration.registered.is_set():
            self._say(f"joined {where}")
        await self._registration.superseded.wait()

    async def _describe(self, engine: AsyncLLM, epoch: int) -> InstanceInfo:
        config, cache, scheduler = engine.config, engine.config.cache, engine.config.scheduler
        bound = urlsplit(engine.addresses[0])
        host = self._advertised(bound.hostname or "")
        web = self._http[0] if self._http[0] not in WILDCARDS else host
        if host not in LOOPBACK and self.listening.token is None:
            self._say(f"note: other machines can reach the engine and {TOKEN_VARIABLE} is not set")
        return InstanceInfo(
            id=self.id,
            epoch=epoch,
            address=f"tcp://{_bracketed(host)}:{bound.port}",
            model=served_name(engine.options),
            kv=KvFacts(
                block_size=cache.block_size,
                kv_dtype=cache.kv_dtype,
                num_blocks=cache.num_blocks,
                fingerprint=(await asyncio.to_thread(fingerprint, config)).hex(),
            ),
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_queued=engine.options.max_num_queued_reqs,
            role=cast(Role, self._options.role),
            transport=engine.kv_transport,
            http=f"http://{_bracketed(web)}:{self._http[1]}",
        )

    def _advertised(self, bound: str) -> str:
        """The host that others connect to, where the engine listens at `bound`."""
        if self._options.advertise is not None:
            return self._options.advertise
        return bound if bound not in WILDCARDS else own_address(self._options.etcd[0])


def default_id(port: int) -> str:
    """Host name and port, of letters that an id may have."""
    host = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in socket.gethostname())
    return f"{host[:190] or 'host'}-{port}"


def own_address(peer_url: str) -> str:
    """Of this machine's addresses the one that packets to `peer_url` leave from. Nothing is sent."""
    peer = urlsplit(peer_url)
    try:
        found = socket.getaddrinfo(peer.hostname, peer.port or 2379, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:  # no way there yet; others may find us by name
        return socket.gethostname()


def summary(stats: SchedulerStats | None) -> LoadSummary:
    if stats is None:
        return LoadSummary(sequence=0)
    lower = {tier.medium: tier.used for tier in stats.tiers if tier.capacity}
    return LoadSummary(
        sequence=stats.kv_events.changes,
        running=stats.running,
        waiting=stats.waiting,
        kv_usage=stats.kv_usage,
        cached_blocks={DEVICE: stats.cached_blocks, **lower},
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _either(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
