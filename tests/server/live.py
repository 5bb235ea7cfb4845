"""A real server on a real socket, in a thread of its own, over the pretended engine."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import uvloop

from tests.server.fake_engine import FakeClient, client_of, make_engine
from xllm.engine.async_llm import AsyncLLM
from xllm.server.app import create_app
from xllm.server.http_server import HttpServer
from xllm.server.listen import listen
from xllm.server.options import ServerOptions

PATIENCE_S = 10.0


class Live:
    """Thread-safe handle. `call` runs a function in the server's event loop."""

    def __init__(self, url: str, engine: AsyncLLM, server: HttpServer, loop: asyncio.AbstractEventLoop):
        self.url = url
        self.engine = engine
        self.fake: FakeClient = client_of(engine)
        self.server = server
        self.loop = loop
        self.http = httpx.Client(base_url=url, timeout=2 * PATIENCE_S)  # of any thread

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 0

    def call(self, function: Callable[[], Any]) -> None:
        self.loop.call_soon_threadsafe(function)

    def idle(self) -> bool:
        return self.fake.active == 0 and self.engine.count() == 0


@contextmanager
def serving(directory: Path, options: ServerOptions | None = None, **engine: Any) -> Iterator[Live]:
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    ready: list[Live] = []
    failed: list[BaseException] = []

    async def main() -> None:
        made = make_engine(directory, **engine)
        app = create_app(made, options, made.options)
        server = HttpServer(app, options or ServerOptions())
        ready.append(Live(url, made, server, asyncio.get_running_loop()))
        await server.run_until_stopped(listener)
        await made.shutdown()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run, name="live-server")
    thread.start()
    until(lambda: bool(failed) or (bool(ready) and ready[0].server.started), "the server to start")
    if failed:
        raise failed[0]
    live = ready[0]
    try:
        yield live
    finally:
        live.http.close()
        live.fake.release()
        with suppress(RuntimeError):  # it may have ended by itself
            live.call(live.server.stop_now)
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not end"


def until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Waits for a condition that other threads bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
