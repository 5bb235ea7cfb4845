"""What surrounds every request: its id, its log line, the last resort for errors, and the key to the door."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xllm.server.errors import Unauthorized, error_response, log_unexpected

access_log = logging.getLogger("xllm.access")

OPEN_PATHS = ("/health", "/ready")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")


class Envelope:
    """Outermost. Echoes `X-Request-Id` (or makes one up), writes the log line, and lets no exception out."""

    def __init__(self, app: ASGIApp, log_requests: bool):
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0
        header = (b"x-request-id", _request_id(scope))

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            pass
        except Exception as e:
            log_unexpected(e)
            if status:
                raise ConnectionAbortedError("answer broken off") from None  # half an answer cannot be mended
            await error_response(e)(scope, receive, tagged)
        finally:
            if self._log_requests:
                _log(scope, status, time.monotonic() - begin)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()


def _log(scope: Scope, status: int, seconds: float) -> None:
    """The route's own spelling rather than the path: a path can hold anything a caller likes."""
    route = getattr(scope.get("route"), "path", "(no route)")
    client = scope["client"][0] if scope.get("client") else "-"
    outcome = str(status) if status else "gone"
    access_log.info("%s %s %s %s %.0f ms", client, scope["method"][:16], route, outcome, seconds * 1000)


class KeyCheck:
    """Lets only the two probes, spelled exactly, through without a key: no spelling gets around it."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], root_path: str):
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open = {(root_path + path).encode() for path in OPEN_PATHS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            refused = Unauthorized(
                "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key"
            )
            await error_response(refused)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allowed(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope.get("raw_path") in self._open:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        matches = [
            hmac.compare_digest(key.strip(), known) for known in self._keys
        ]  # all of them: constant time
        return bool(scheme.lower() == b"bearer") and any(matches)
