"""A tiny OpenAI-style server on a real socket: known tokens, known delays, and ways to go wrong on demand."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

Write = Callable[[dict[str, Any] | str], Awaitable[None]]


class FakeApi:
    """Runs in a thread of its own while the `with` block lasts. `mode` says how completions end:

    ok, no_usage, http_error, error_frame, cut (closes mid-stream), garbage (not JSON), empty, hang, close (no keep-alive), ssh (not HTTP at all).
    """

    def __init__(self, mode: str = "ok", delay_s: float = 0.002, models: bool = True):
        self.mode, self.delay_s, self.models = mode, delay_s, models
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.traces = False  # whether it takes any
        self.profiles: list[tuple[str, int]] = []  # with how many requests had come
        self.connections = 0
        self.running = self.peak = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeApi":
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # sockets close one turn of the loop later

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is gone
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One exchange; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            found = path == "/v1/models" and self.models
            data = {"data": [{"id": "toy", "root": "/nowhere"}]} if found else {}
            await _whole(writer, 200 if found else 404, data)
            return True
        if path.endswith("_profile"):
            self.profiles.append((path, len(self.bodies)))
            await _whole(writer, 200 if self.traces else 404, {"trace": "/there/trace.json.gz"})
            return True
        self.bodies.append(json.loads(body))
        self.headers.append(headers)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._complete(path, self.bodies[-1], writer)
        finally:
            self.running -= 1

    async def _complete(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if self.mode == "http_error":
            await _whole(writer, 429, {"error": {"message": "too busy", "type": "rate_limit_error"}})
            return True
        if self.mode == "hang":
            await asyncio.sleep(3600)
        if self.mode == "ssh":
            writer.write(b"SSH-2.0-OpenSSH\r\n")
            await writer.drain()
            return False
        close = self.mode == "close"
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            + (b"connection: close\r\n" if close else b"")
            + b"\r\n"
        )
        if self.mode == "cut":
            await _chunk(writer, frame({"choices": [{"text": "a"}]}))
            return False
        for data in self._frames(body, chat=path.endswith("/chat/completions")):
            await asyncio.sleep(self.delay_s)
            await _chunk(writer, data)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return not close

    def _frames(self, body: dict[str, Any], *, chat: bool) -> list[bytes]:
        if self.mode == "garbage":
            return [b"data: {nonsense\n\n"]
        if self.mode == "empty":
            return [b"data: [DONE]\n\n"]
        frames = (
            [frame({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})]
            if chat
            else []
        )
        for i in range(body["max_tokens"]):
            text = f"t{i} "
            frames.append(
                frame(
                    {"choices": [{"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}]}
                )
            )
        if self.mode == "error_frame":
            return [*frames[:2], frame({"error": {"message": "the engine fell over"}})]
        if self.mode != "no_usage":
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            frames.append(frame({"choices": [], "usage": usage}))
        return [*frames, b"data: [DONE]\n\n"]


def frame(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def _whole(writer: asyncio.StreamWriter, status: int, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
