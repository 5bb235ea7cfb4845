"""GET / /health /ready /version: does it work, does it take requests, what is it."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from xllm.core.errors import Unavailable
from xllm.server import state as server_state
from xllm.server.errors import error_response
from xllm.server.version import version

router = APIRouter()


@router.get("/")
async def root(request: Request) -> Response:
    state = server_state.of(request)
    return JSONResponse(
        {
            "name": "xLLM",
            "version": version(),
            "model": state.model,
            "hint": "This is an OpenAI-compatible API: its base URL is this address with /v1 behind it.",
            "try": "POST /v1/chat/completions",
        }
    )


@router.get("/health")
async def health(request: Request) -> Response:
    """Alive means that the engine makes progress whenever it has work; draining is still healthy."""
    found = server_state.of(request).engine.health()
    if not found.ok:
        return error_response(Unavailable(found.reason, retry_after_s=5))
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether to send new requests here."""
    state = server_state.of(request)
    if state.draining:
        return error_response(Unavailable("the server is shutting down", retry_after_s=5))
    if missing := state.engine.missing():
        return error_response(Unavailable(missing, retry_after_s=5))
    return await health(request)


@router.get("/version")
async def get_version() -> Response:
    return JSONResponse({"version": version()})
