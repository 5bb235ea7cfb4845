"""Exceptions to HTTP answers: one body shape for every error, with the status and headers clients act on."""

import logging
import traceback
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from xllm.core.errors import InvalidRequest, NotFound, Overloaded, Unavailable, XllmError

log = logging.getLogger(__name__)


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class TooLarge(InvalidRequest):
    """The request does not fit into what one request may occupy."""

    status = 413


class TooSlow(InvalidRequest):
    """The client stopped sending in the middle of its request."""

    status = 408


class Unauthorized(XllmError):
    status = 401
    type = "authentication_error"


_HTTP_TYPES = {404: "not_found_error", 405: "method_not_allowed_error"}


def describe(error: Exception) -> tuple[int, ErrorDetail]:
    """Status and public description. What we did not raise on purpose says nothing about its inside."""
    if isinstance(error, XllmError):
        return error.status, ErrorDetail(error.message, error.type, error.param, error.code)
    if isinstance(error, HTTPException):
        kind = _HTTP_TYPES.get(error.status_code, "invalid_request_error")
        return error.status_code, ErrorDetail(HTTPStatus(error.status_code).phrase, kind)
    return 500, ErrorDetail("The server had an internal error; its log says where.", "internal_error")


def error_response(error: Exception) -> Response:
    status, detail = describe(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, Overloaded | Unavailable):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, TooLarge | TooSlow):
        headers["connection"] = "close"  # the rest of its body may still be on the way
    body = msgspec.json.encode(ErrorBody(detail))
    return Response(body, status, headers=headers, media_type="application/json")


def log_unexpected(error: BaseException) -> None:
    """The stack without the exception's own text, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("unexpected %s while answering a request\n%s", type(error).__name__, frames)


def model_not_found(name: str) -> NotFound:
    return NotFound(f"The model `{name[:200]}` does not exist.", param="model", code="model_not_found")
