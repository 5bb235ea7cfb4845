"""The listening side: a socket, uvicorn on it, and how it all ends when asked to."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from fastapi import FastAPI

from xllm.server import stats_log
from xllm.server.options import ServerOptions
from xllm.server.protocol import LimitedProtocol
from xllm.server.state import ServerState

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the pools of common clients and proxies keep an idle connection
FLUSH_S = 5  # at least so long may the last bytes of answers take


class HttpServer(uvicorn.Server):
    """Runs until a signal. The first asks for an orderly end, `stop`; the second ends it at once."""

    def __init__(self, app: FastAPI, options: ServerOptions):
        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                root_path=options.root_path,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_S,
            )
        )
        self.state: ServerState = app.state.server
        self.on_started: Callable[[], None] = lambda: None
        # called when an orderly end begins; what runs is waited for after it
        self.on_stopping: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
        self._stopping: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    async def run_until_stopped(self, *listeners: socket.socket) -> None:
        reporter = asyncio.create_task(stats_log.report(self.state))
        try:
            await self.serve(sockets=list(listeners))
        finally:
            reporter.cancel()
            self.state.close()
            for listener in listeners:
                listener.close()

    def stop(self) -> None:
        """Not ready from now on; what runs goes on for at most `shutdown_timeout`, then the server ends."""
        if self._stopping is None:
            self.state.draining = True
            self.state.engine.stop_accepting()
            self._stopping = asyncio.get_running_loop().create_task(self._drain(self.on_stopping()))

    async def _drain(self, told: Awaitable[None]) -> None:
        timeout_s = self.state.options.shutdown_timeout
        deadline = time.monotonic() + timeout_s
        running = self.state.engine.count()
        if running:
            log.info("shutting down: %d requests may finish within %.0f s", running, timeout_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(told, timeout_s)
        if not await self.state.engine.drain(max(0.0, deadline - time.monotonic())):
            log.warning("%d requests did not finish within %.0f s", self.state.engine.count(), timeout_s)
            await self.state.engine.shutdown()  # they end with an error that their clients still get to read
        # the engine is done; a slow reader may still have an answer coming
        self.config.timeout_graceful_shutdown = max(FLUSH_S, int(deadline - time.monotonic()))
        self.should_exit = True

    def stop_now(self) -> None:
        self.force_exit = self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's: it would close the port at once and afterwards die of the signal it got."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        try:
            for number in signals:
                loop.add_signal_handler(number, self._on_signal)
        except (ValueError, RuntimeError):  # not in the main thread: a test, or somebody else's program
            yield
            return
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping is None:
            self.stop()
        else:
            log.warning("ending at once")
            self.stop_now()
