"""POST /kv_limit: how much memory an elastic KV cache may have from now on, so that another program can have the rest.

With --kv-pool elastic. What is free of what has to go is given back within milliseconds, the rest as requests end.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from xllm.config.memory import GIB
from xllm.core.errors import InvalidRequest
from xllm.server import state as server_state

router = APIRouter()


@router.post("/kv_limit")
async def kv_limit(request: Request, gib: str | None = None) -> Response:
    """`gib`: the limit; without it there is none but the card's. Answers with what is set and what is taken."""
    nbytes = None if gib is None else _bytes(gib)
    taken = await server_state.of(request).engine.limit_kv_memory(nbytes)
    return JSONResponse({"limit_bytes": nbytes, "taken_bytes": taken})


def _bytes(gib: str) -> int:
    try:
        return int(float(gib) * GIB)
    except (ValueError, OverflowError) as e:
        raise InvalidRequest(f"gib must be a number, not {gib!r}", param="gib") from e
