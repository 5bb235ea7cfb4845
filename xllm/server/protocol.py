"""uvicorn's HTTP/1.1 protocol with the limits and the error bodies it leaves to others."""

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from xllm.server.errors import ErrorBody, ErrorDetail

MAX_HEADER_BYTES = 64 * 1024  # request line and all headers
HEADER_TIMEOUT_S = 30.0  # from the first byte of a request, or from connecting, to the end of its headers


class LimitedProtocol(HttpToolsProtocol):
    """Refuses endless and very slow headers; what is not HTTP gets an error body as every error does."""

    _in_headers = True
    _header_bytes = 0
    _too_large = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.access_log = False  # its lines hold whole URLs; `middleware` writes ours
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        counted = len(data) if self._in_headers else 0
        super().data_received(data)
        if self._in_headers and not self.transport.is_closing():
            self._header_bytes += counted
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0
        if self._deadline is None:
            self._set_deadline()

    def on_headers_complete(self) -> None:
        self._in_headers, self._header_bytes = False, 0
        self._clear_deadline()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES:
            self._too_large = True
            raise ValueError("headers too large")  # the parser stops, and `send_400_response` is called
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse_headers()
        else:
            self._refuse(400, "the request is not valid HTTP/1.1")

    def _refuse_headers(self) -> None:
        self._refuse(431, f"request line and headers are larger than {MAX_HEADER_BYTES // 1024} KiB")

    def _refuse(self, status: int, message: str) -> None:
        body = msgspec.json.encode(ErrorBody(ErrorDetail(message, "invalid_request_error", code="bad_http")))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._on_deadline)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._in_headers and not self.transport.is_closing():
            self.transport.close()
