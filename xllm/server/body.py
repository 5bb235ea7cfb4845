"""A request's bytes, within limits and time, and the typed value in them, or a 400 that names the field."""

import asyncio
import difflib
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from xllm.core.errors import InvalidRequest
from xllm.server.errors import TooLarge, TooSlow

MAX_BODY_BYTES = 32 * 2**20
IDLE_TIMEOUT_S = 30.0  # between two pieces of one body
DISCARD_TIMEOUT_S = 5.0

Body = TypeVar("Body", bound=msgspec.Struct)

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`$")


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. `TooLarge` as soon as it is known to exceed `limit`, announced or not."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        await _discard(request, 0 if int(announced) > 2 * limit else limit * 2)
        raise _too_large(limit)
    pieces, size = [], 0
    while True:
        message = await _next(request)
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            await _discard(request, limit)
            raise _too_large(limit)
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def read(request: Request, kind: type[Body]) -> Body:
    return parse(await read_body(request), kind)


def parse(data: bytes, kind: type[Body]) -> Body:
    """Raises `InvalidRequest` for whatever is not exactly a `kind` in JSON."""
    if not data:
        raise InvalidRequest("the request body is empty; send a JSON object", code="invalid_json")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        raise _explain(str(e), kind) from None
    except UnicodeDecodeError:
        raise InvalidRequest("the request body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the request body nests too deeply", code="invalid_json") from None
    except msgspec.DecodeError as e:
        raise InvalidRequest(f"the request body is not valid JSON: {e}", code="invalid_json") from None


def _explain(message: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    path = ""
    if found := _PATH.search(message):
        path, message = found[1], message[: found.start()]
    if unknown := _UNKNOWN.match(message):
        name = unknown[1][:100]
        hint = "" if path else _near(name, kind)
        return InvalidRequest(
            f"unknown field `{name}`: this server would have to ignore it{hint}",
            param=f"{path}.{name}" if path else name,
            code="unknown_field",
        )
    if missing := _MISSING.match(message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(f"the field `{name}` is required", param=name, code="missing_field")
    where = f"`{path}`: " if path else ""
    return InvalidRequest(f"{where}{message}", param=path or None, code="invalid_type")


def _near(name: str, kind: type[msgspec.Struct]) -> str:
    close = difflib.get_close_matches(name, kind.__struct_encode_fields__, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


async def _next(request: Request) -> Message:
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            message = await request.receive()
    except TimeoutError:
        raise TooSlow(f"no further piece of the request body came within {IDLE_TIMEOUT_S:.0f} s") from None
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


async def _discard(request: Request, limit: int) -> None:
    """Reads on for a while and keeps nothing, so that a client that writes first sees the answer."""
    size = 0
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while size < limit:
                message = await request.receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request body is larger than {limit // 2**20} MiB", code="request_too_large")
