"""A small HTTP/1.1 client on asyncio and httptools, so that the load generator is not what is measured.

Connections are kept alive and reused; every piece of a body is handed over with the clock reading at which it came.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httptools

# Servers close idle connections (uvicorn after 5 s); one idle for longer than this may be closing while we send.
IDLE_S = 3.0

OnBody = Callable[[int, bytes, float], None]  # status, piece, clock reading


class _Connection(asyncio.Protocol):
    """One socket; at most one exchange at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.alive = True
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[int] | None = None
        self._on_body: OnBody | None = None
        self._now = 0.0

    async def exchange(self, request: bytes, on_body: OnBody) -> int:
        """Send, stream the response into `on_body`, return its status. Raises `ConnectionError`."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._done = self._on_body = None

    def close(self) -> None:
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._done is None:
            self.close()  # bytes that nobody asked for
            return
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._fail(ConnectionError(f"not HTTP: {e}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self._fail(
            ConnectionError(f"the server closed the connection: {exc or 'before the response was complete'}")
        )

    # httptools callbacks

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None and self._parser is not None:
            self._on_body(self._parser.get_status_code(), body, self._now)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self.alive = self.alive and self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class HttpClient:
    """Requests to one origin. Use as `async with`, which closes its connections."""

    def __init__(self, base_url: str, headers: dict[str, str] | None = None, timeout_s: float = 3600.0):
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or url.hostname is None:
            raise ValueError(f"not an http(s) URL: {base_url}")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        self._headers = {"Host": url.netloc.rpartition("@")[2], "Accept": "*/*", **(headers or {})}
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()

    def prepare(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The request's bytes, so that nothing but a write is left to do when its time comes."""
        headers = dict(self._headers)
        if body is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")

    async def stream(self, request: bytes, on_body: OnBody) -> int:
        """Raises `ConnectionError` or `TimeoutError`; returns the status once the body has ended."""
        async with asyncio.timeout(self._timeout_s):
            connection = await self._connection()
            try:
                status = await connection.exchange(request, on_body)
            except BaseException:
                connection.close()
                self._all.discard(connection)
                raise
        if connection.alive:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
            self._all.discard(connection)
        return status

    async def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        pieces: list[bytes] = []
        status = await self.stream(
            self.prepare(method, path, body), lambda _, piece, __: pieces.append(piece)
        )
        return status, b"".join(pieces)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.alive and time.monotonic() - connection.idle_since < IDLE_S:
                return connection
            connection.close()
            self._all.discard(connection)
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except OSError as e:
            raise ConnectionError(f"cannot connect to {self._host}:{self._port}: {e.strerror or e}") from e
        self._all.add(connection)
        return connection
