"""`xllm router`: the HTTP API over the instances of a cluster."""

import argparse
import asyncio
import dataclasses
import gc
import logging
import secrets
import socket
import time
from importlib import import_module
from typing import TYPE_CHECKING

from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.server.cluster_options import RouterOptions
from xllm.server.options import ServerOptions
from xllm.server.serve import INTERRUPTED, Startup, add_api_key, address, set_up_logging

if TYPE_CHECKING:
    from xllm.cluster.client import ClusterClient
    from xllm.cluster.following import Fit
    from xllm.engine.async_llm import AsyncLLM
    from xllm.server.console import Console

log = logging.getLogger(__name__)
WAIT_S = 0.5  # between two looks whether an instance is ready
REMIND_S = 30.0  # while none is


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("router", help="serve the instances of a cluster as one")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS,
        help="directory, hub id or demo, as the instances call it (default: what the first instance serves)",
    )  # fmt: skip
    add_api_key(parser)
    add_flags(parser, RouterOptions, ServerOptions)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Exit code 0 after an orderly end, also by a signal."""
    import uvloop

    asked, options = from_namespace(RouterOptions, namespace), from_namespace(ServerOptions, namespace)
    model: str | None = getattr(namespace, "model", None)
    if not asked.etcd:
        raise ConfigError(
            "a router finds its instances in etcd: name it with --etcd http://HOST:2379 (or use `xllm up`)"
        )
    if options.profiler_dir is not None:
        raise ConfigError("--profiler-dir: a router runs no model; instances take traces of theirs")
    set_up_logging(options.log_level)
    if asked.processes > 1:
        from xllm.server.processes import run_processes

        return run_processes(options, asked.processes)
    from xllm.server.console import Console
    from xllm.server.processes import listener

    with (
        listener(options) as listening,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(route(model, asked, options, listening, Console()))


async def route(
    model: str | None,
    asked: RouterOptions,
    options: ServerOptions,
    listener: socket.socket,
    console: "Console",
) -> int:
    from xllm.cluster.client import ClusterClient
    from xllm.cluster.etcd import Etcd
    from xllm.cluster.following import Fit, follow
    from xllm.cluster.instance import Keys
    from xllm.cluster.membership import Membership

    begin = time.monotonic()
    console.say(f"router of cluster {asked.cluster}, {asked.routing_policy}", "bold")
    client = ClusterClient(
        asked.routing_policy, token=asked.token() or "", name=f"router on {socket.gethostname()}"
    )
    etcd = Etcd(asked.etcd)
    membership = Membership(etcd, Keys(asked.cluster))
    fit = Fit(asked.served_model_name or model)
    following: asyncio.Task[None] | None = None
    try:
        async with Startup() as startup:
            if not await membership.start():
                console.say(f"  etcd does not answer yet: {', '.join(asked.etcd)}", "yellow")
            following = asyncio.create_task(follow(membership, client, fit), name="following")
            importing = asyncio.to_thread(import_module, "xllm.server.http_server")
            waiting = asyncio.gather(_wait_for_one(client, fit, console), importing)
            if await startup.run(waiting) is None:
                console.say("interrupted while starting")
                return INTERRUPTED
        engine = await open_engine(client, asked, model, fit)
        return await _serve(engine, client, asked, options, listener, console, begin)
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await membership.close()
        await etcd.aclose()
        await asyncio.to_thread(client.close)


async def _wait_for_one(client: "ClusterClient", fit: "Fit", console: "Console") -> bool:
    """Until an instance is ready."""
    told_at = -REMIND_S
    while not await asyncio.to_thread(client.wait_ready, WAIT_S):
        if time.monotonic() - told_at >= REMIND_S:
            told_at = time.monotonic()
            what = f"of {fit.model}" if fit.model else "of any model"
            console.say(f"  waiting for an instance {what}: {client.missing()}", "dim")
    return True


async def open_engine(
    client: "ClusterClient", asked: RouterOptions, model: str | None, fit: "Fit"
) -> "AsyncLLM":
    """The front end over the cluster. The model's files are looked for here, under the name that was given."""
    from xllm.core.seeds import SeedSource
    from xllm.engine.async_llm import AsyncLLM
    from xllm.engine.checkpoint import open_tokenizer
    from xllm.models.source import locate

    config = client.config
    name = model or config.model.directory
    directory = await asyncio.to_thread(locate, name, asked.revision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, directory=str(directory)))
    options = EngineOptions(
        model=name, tokenizer=asked.tokenizer, revision=asked.revision, served_model_name=asked.served_model_name or fit.model,
        generation_config=asked.generation_config, max_logprobs=asked.max_logprobs,
    )  # fmt: skip
    tokenizer = await asyncio.to_thread(open_tokenizer, options, config)
    # routers must not draw the same numbers for different requests
    seeds = SeedSource(config.executor.seed, stream=secrets.randbits(64))
    return AsyncLLM(options, config, client, tokenizer, seeds=seeds, limit=asked.max_concurrent_requests)


async def _serve(
    engine: "AsyncLLM", client: "ClusterClient", asked: RouterOptions, options: ServerOptions,
    listener: socket.socket, console: "Console", begin: float,
) -> int:  # fmt: skip
    try:
        from xllm.server.http_server import HttpServer
        from xllm.server.routing import create_router_app
        from xllm.server.siblings import Siblings

        siblings = Siblings.from_environment()
        server = HttpServer(create_router_app(engine, client, asked, options, siblings), options)
        url = address(options.host, listener)
        server.on_started = lambda: console.ready(url, server.state, time.monotonic() - begin)
        gc.freeze()
        await server.run_until_stopped(listener, *(() if siblings is None else (siblings.listen(),)))
    finally:
        await engine.shutdown()
    console.say("stopped")
    return 0
