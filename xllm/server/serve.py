"""`xllm serve MODEL`: engine and HTTP server from the command line to the last request."""

import argparse
import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Awaitable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from xllm.config.flags import add_flags, from_namespace
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError, XllmError
from xllm.server.cluster_options import JoinOptions
from xllm.server.options import ServerOptions

if TYPE_CHECKING:
    from xllm.server.console import Console
    from xllm.server.join import Join

T = TypeVar("T")

INTERRUPTED = 130
ENGINE_LOST = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM)
INSIST_S = 0.2
WITH_ETCD_ONLY = ("cluster", "instance_id", "listen", "advertise", "role", "kv_transport")


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("serve", help="serve a model over an OpenAI-compatible HTTP API")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="directory, hub id or demo (default: demo)")
    add_api_key(parser)
    add_flags(parser, ServerOptions, EngineOptions, JoinOptions)
    parser.set_defaults(run=run)


def add_api_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        action="append",
        default=argparse.SUPPRESS,
        metavar="KEY",
        help="key that requests must bring; may be given several times (default: XLLM_API_KEY, else no key)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Exit code 0 after an orderly end, also by a signal; 1 when the engine process died."""
    import uvloop

    asked, options = from_namespace(EngineOptions, namespace), from_namespace(ServerOptions, namespace)
    cluster = read_join(namespace)
    if cluster is not None and asked.enable_sleep_mode and cluster.kv_transport != "none":
        raise ConfigError(
            "--enable-sleep-mode: other instances may be reading the KV memory that sleep gives back; add --kv-transport none"
        )
    set_up_logging(options.log_level)
    from xllm.server.console import Console
    from xllm.server.listen import listen

    with (
        listen(options.host, options.port) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(serve(asked, options, listener, Console(), cluster))


def read_join(namespace: argparse.Namespace) -> JoinOptions | None:
    """None without --etcd. ConfigError where flags of an instance are given all the same."""
    options = from_namespace(JoinOptions, namespace)
    if options.etcd:
        return options
    given = vars(namespace) | (vars(namespace).get("config") or {})
    for name in WITH_ETCD_ONLY:
        if given.get(name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for an instance of a cluster: give --etcd URL too"
            )
    return None


async def serve(
    asked: EngineOptions, options: ServerOptions, listener: socket.socket, console: "Console",
    cluster: JoinOptions | None = None,
) -> int:  # fmt: skip
    from xllm.engine.async_llm import AsyncLLM

    begin = time.monotonic()
    join = None if cluster is None else _join(cluster, options, listener, console)
    console.start(asked.model)
    async with Startup() as startup:
        importing = asyncio.to_thread(import_module, "xllm.server.http_server")  # while the model loads
        listening = None if join is None else join.listening
        engine_starting = AsyncLLM.start(asked, on_event=console.on_event, listening=listening)
        starting = asyncio.gather(engine_starting, importing)
        started = await startup.run(starting)
    console.end_progress()
    if started is None:
        console.say("interrupted while starting")
        if join is not None:
            await join.close()
        return INTERRUPTED
    engine = started[0]
    try:
        from xllm.server.app import create_app
        from xllm.server.http_server import HttpServer

        server = HttpServer(create_app(engine, options, asked), options)
        url = address(options.host, listener)

        def on_started() -> None:
            console.ready(url, server.state, time.monotonic() - begin)
            if join is not None:
                join.begin(engine, server.stop)

        server.on_started = on_started
        if join is not None:
            server.on_stopping = join.drain
        gc.freeze()  # what is there stays: collections are to walk what requests leave behind, and nothing else
        lost = asyncio.create_task(engine.wait_lost())
        lost.add_done_callback(lambda task: None if task.cancelled() else server.stop())
        await server.run_until_stopped(listener)
        if lost.done():  # whoever supervises us starts a new one; this one can never serve again
            console.say(f"the engine is gone: {lost.result()}")
            return ENGINE_LOST
        lost.cancel()
    finally:
        if join is not None:  # first: who looks for an instance is not to find one that is about to end
            await join.close()
        await engine.shutdown()
    if join is not None and join.failed is not None:
        console.say(f"stopped: {join.failed}")
        return ENGINE_LOST
    console.say("stopped")
    return 0


def _join(
    cluster: JoinOptions, options: ServerOptions, listener: socket.socket, console: "Console"
) -> "Join":
    from xllm.server.join import Join

    return Join(cluster, options.host, listener.getsockname()[1], console.say)


class Startup:
    """While the engine starts, a signal ends the attempt: its process first, then who waits for it."""

    def __init__(self) -> None:
        self._interrupted = False
        self._task: asyncio.Future[Any] | None = None

    async def __aenter__(self) -> "Startup":
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._interrupt)
        return self

    async def __aexit__(self, *_: object) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def run(self, starting: Awaitable[T]) -> T | None:
        """None when a signal came first."""
        self._task = asyncio.ensure_future(starting)
        try:
            return await self._task
        except (XllmError, asyncio.CancelledError):
            if self._interrupted:
                return None
            raise

    def _interrupt(self) -> None:
        """The thread that waits for the process sees it gone and cleans up. Repeated: one may just be starting."""
        import psutil

        self._interrupted = True
        for child in psutil.Process().children(recursive=True):
            child.kill()
        if self._task is not None:
            self._task.cancel()
        asyncio.get_running_loop().call_later(INSIST_S, self._interrupt)


def set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("uvicorn.error", "httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
