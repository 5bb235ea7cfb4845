"""Server-sent events: sources merged into one response; a slow reader slows them, a lost one stops them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xllm.server.disconnect import cancel, gone
from xllm.server.errors import ErrorBody, ErrorDetail, describe, error_response, log_unexpected

DONE = b"data: [DONE]\n\n"
MAX_BUFFERED_BYTES = 256 * 1024  # beyond it the sources wait for the client; the socket holds some more

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_encoder = msgspec.json.Encoder()


def frame(event: Any) -> bytes:
    return b"data: " + _encoder.encode(event) + b"\n\n"


class EventStream(Response):
    """Starts its answer with the first frame, so an error before it is an ordinary error response.

    `sources` yield frames and run side by side; `tail` makes the frames after the last of them. Frames that
    come while the client is still being written to go out together in the next write.
    """

    media_type = "text/event-stream"

    def __init__(self, sources: Sequence[AsyncGenerator[bytes, None]], tail: Callable[[], bytes]):
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._sources = sources
        self._tail = tail
        self._ready: list[bytes] = []
        self._size = 0
        self._news = asyncio.Event()  # something for the writer: frames, an end, a failure
        self._room = asyncio.Event()
        self._room.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pumps = [asyncio.create_task(self._pump(source)) for source in self._sources]
        watch = asyncio.create_task(gone(receive))
        for task in (*pumps, watch):
            task.add_done_callback(lambda _: self._news.set())
        started = False
        try:
            while not watch.done():
                await self._news.wait()
                self._news.clear()
                failed = next((e for p in pumps if p.done() and (e := p.exception())), None)
                if failed is not None and not started and not self._ready:
                    await self._refuse(failed, scope, receive, send)
                    return
                ended = failed is not None or all(p.done() for p in pumps)
                data = self._take() + self._ending(failed) if ended else self._take()
                if data and not started and not watch.done():
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if data or ended:
                    await send({"type": "http.response.body", "body": data, "more_body": not ended})
                if ended:
                    return
        finally:
            await cancel(*pumps, watch)

    async def _pump(self, source: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(source) as pieces:
            async for piece in pieces:
                self._ready.append(piece)
                self._size += len(piece)
                self._news.set()
                if self._size > MAX_BUFFERED_BYTES:
                    self._room.clear()
                    await self._room.wait()

    def _take(self) -> bytes:
        ready, self._ready, self._size = self._ready, [], 0
        self._room.set()
        return ready[0] if len(ready) == 1 else b"".join(ready)

    def _ending(self, failed: BaseException | None) -> bytes:
        if failed is None:
            return self._tail()
        return frame(ErrorBody(_described(failed))) + DONE

    async def _refuse(self, failed: BaseException, scope: Scope, receive: Receive, send: Send) -> None:
        _described(failed)
        await error_response(_as_exception(failed))(scope, receive, send)


def _described(failed: BaseException) -> ErrorDetail:
    """What the client is told; the log is told the rest."""
    status, detail = describe(_as_exception(failed))
    if status == 500 and detail.type == "internal_error":
        log_unexpected(failed)
    return detail


def _as_exception(failed: BaseException) -> Exception:
    return failed if isinstance(failed, Exception) else RuntimeError(type(failed).__name__)
