"""Modelled instances in a process of their own: `python -m xllm.engine.modelled --help`.

With `--etcd` they register as `xllm serve` does, so routers cannot tell the difference. On standard output comes one
line of JSON for each when it is ready (its `InstanceInfo`), and at the end one for each of how well it kept time.
SIGTERM or SIGINT: they drain, leave etcd, and end.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import cast, get_args

import msgspec

from xllm.cluster.instance import InstanceInfo, LoadSummary, Role, check_name
from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import knob
from xllm.core.errors import ConfigError, XllmError
from xllm.engine.modelled import ModelledInstance, Shape
from xllm.engine.modelled_runner import Speed, Words
from xllm.kv.events import DEVICE

IDLE_S = 0.02  # between two looks at whether all that ran has ended


@dataclass(frozen=True, kw_only=True)
class ModelledOptions:
    """Instances without a model."""

    id: str = knob("modelled", "name of the instance; of several, followed by -0, -1 and so on")
    instances: int = knob(1, "so many in this process")
    etcd: tuple[str, ...] = knob(
        (), "URLs of the cluster's etcd (default: they do not register)", metavar="URL"
    )
    cluster: str = knob("default", "name of the cluster")
    listen: str = knob("tcp://127.0.0.1:*", "where routers reach them")
    model: str = knob("modelled", "name of the model they claim to have")
    role: str = knob(
        "both",
        "what routers send them: as with `xllm serve`; other than both with --fetch-us",
        choices=get_args(Role),
    )
    fetch_us: float | None = knob(
        None, "microseconds that a token's KV takes from another instance (default: none goes between them)"
    )
    base_ms: float = knob(8.0, "milliseconds of a step")
    token_us: float = knob(60.0, "microseconds for each token of a step")
    context_ns: float = knob(0.0, "nanoseconds for each token of KV that a step reads")
    num_blocks: int = knob(2048, "blocks of the KV cache")
    block_size: int = knob(16, "tokens of a block")
    max_num_seqs: int = knob(32, "sequences at once")
    max_num_batched_tokens: int = knob(1024, "tokens of a step at most")
    max_model_len: int = knob(16384, "tokens of a sequence at most")
    max_num_queued: int | None = knob(None, "requests beyond --max-num-seqs (default: as many as come)")
    vocab_size: int = knob(32768, "ids below that are sampled")
    ends_every: int = knob(0, "an answer ends about once in so many tokens; 0: never by itself")
    shutdown_timeout: float = knob(30.0, "seconds that requests may take to finish at the end")
    until_eof: bool = knob(
        False, "end when standard input does, so with the process that has started this one"
    )

    def __post_init__(self) -> None:
        check_name(self.id, "--id")
        if self.instances < 1:
            raise ConfigError("--instances must be at least 1")
        if self.fetch_us is None and self.role != "both":
            raise ConfigError(
                f"--role {self.role} is of no use without KV from or for others: give --fetch-us"
            )
        if self.fetch_us is not None and self.fetch_us < 0:
            raise ConfigError("--fetch-us cannot be less than 0")

    def make(self) -> list[ModelledInstance]:
        """Not started yet."""
        ids = [self.id] if self.instances == 1 else [f"{self.id}-{n}" for n in range(self.instances)]
        speed = Speed(self.base_ms / 1e3, self.token_us / 1e6, self.context_ns / 1e9)
        shape = Shape(
            self.num_blocks, self.block_size, self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len,
            self.max_num_queued,
        )  # fmt: skip
        words = Words(self.vocab_size, ends_every=self.ends_every)
        # as for `xllm serve`: a flag would be in the list of processes
        token = os.environ.get("XLLM_CLUSTER_TOKEN", "").strip() or None
        fetch_s = None if self.fetch_us is None else self.fetch_us / 1e6
        return [
            ModelledInstance(
                id, speed, shape, words, model=self.model, token=token, listen=self.listen,
                role=cast(Role, self.role), fetch_s=fetch_s,
            )
            for id in ids
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m xllm.engine.modelled", description=__doc__)
    add_flags(parser, ModelledOptions)
    try:
        asyncio.run(_run(from_namespace(ModelledOptions, parser.parse_args())))
    except XllmError as e:
        raise SystemExit(f"error: {e.message}") from None


async def _run(options: ModelledOptions) -> None:
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signal.SIGTERM, signal.SIGINT:
        loop.add_signal_handler(number, end.set)
    if options.until_eof:
        threading.Thread(target=_watch_input, args=(loop, end), daemon=True).start()
    instances = options.make()
    try:
        async with _membership(options, instances, end) as members:
            for instance in instances:
                _say(instance.info)
            await end.wait()
            members.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_idle(instances), options.shutdown_timeout)
    finally:
        for instance in instances:
            instance.stop()
    for instance in instances:
        _say({"id": instance.id, "lateness": asdict(instance.lateness)})


class _Members:
    """The registrations of all instances; none without etcd."""

    def __init__(self) -> None:
        from xllm.cluster.registration import Registration

        self.all: list[Registration] = []

    def drain(self) -> None:
        for one in self.all:
            one.update(msgspec.structs.replace(one.info, draining=True))

    async def superseded(self, end: asyncio.Event) -> None:
        """Somebody else has the id of one of them: none is to be there in vain."""
        await asyncio.wait(
            [asyncio.create_task(one.superseded.wait()) for one in self.all], return_when="FIRST_COMPLETED"
        )
        end.set()


class _Alone:
    def drain(self) -> None:
        """Nobody is told."""


@contextlib.asynccontextmanager
async def _membership(
    options: ModelledOptions, instances: list[ModelledInstance], end: asyncio.Event
) -> AsyncIterator[_Members | _Alone]:
    """Starts them, and registers them where there is an etcd."""
    if not options.etcd:
        for instance in instances:
            instance.start()
        yield _Alone()
        return
    from xllm.cluster.etcd import Etcd
    from xllm.cluster.instance import Keys
    from xllm.cluster.registration import Registration, next_epoch

    etcd, keys, members = Etcd(options.etcd), Keys(options.cluster), _Members()
    watcher: asyncio.Task[None] | None = None
    try:
        for instance in instances:
            instance.epoch = await next_epoch(etcd, keys, instance.id)
            instance.start()
            one = Registration(etcd, keys, instance.info, lambda instance=instance: _load(instance))  # type: ignore[misc]
            members.all.append(one)
            await one.start()
        watcher = asyncio.create_task(members.superseded(end))
        yield members
    finally:
        if watcher is not None:
            watcher.cancel()
        await asyncio.gather(*(one.close() for one in members.all))
        await etcd.aclose()


def _load(instance: ModelledInstance) -> LoadSummary:
    stats = instance.core.last_stats
    if stats is None:
        return LoadSummary(sequence=0)
    cached = {DEVICE: stats.cached_blocks or 0}
    return LoadSummary(0, stats.running, stats.waiting, stats.kv_usage, cached)


async def _idle(instances: list[ModelledInstance]) -> None:
    while any(instance.outstanding for instance in instances):  # noqa: ASYNC110 - other threads end them
        await asyncio.sleep(IDLE_S)


def _watch_input(loop: asyncio.AbstractEventLoop, end: asyncio.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop is over
        loop.call_soon_threadsafe(end.set)


def _say(what: InstanceInfo | dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(what).decode() + "\n")
    sys.stdout.flush()
