"""POST /sleep, POST /wake_up, GET /is_sleeping: a card's memory for somebody else for a while. With --enable-sleep-mode.

The names and the `level` parameter are those of vLLM. Level 1 keeps the weights in the host's memory.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from xllm.core.errors import InvalidRequest
from xllm.server import state as server_state

router = APIRouter()
LONGEST_WAIT_S = 3600


@router.post("/sleep")
async def sleep(request: Request, level: str = "1", wait: str = "0") -> Response:
    """`wait`: so many seconds may pass until what runs has ended. Whoever comes meanwhile is told to come again."""
    if level != "1":
        raise InvalidRequest("level must be 1: weights rest in the host's memory", param="level")
    await server_state.of(request).engine.sleep(_seconds(wait))
    return JSONResponse({"is_sleeping": True})


@router.post("/wake_up")
async def wake_up(request: Request) -> Response:
    await server_state.of(request).engine.wake_up()
    return JSONResponse({"is_sleeping": False})


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    return JSONResponse({"is_sleeping": server_state.of(request).engine.asleep})


def _seconds(wait: str) -> float:
    try:
        seconds = float(wait)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT_S:
        raise InvalidRequest(f"wait must be seconds, {LONGEST_WAIT_S} at most, not {wait!r}", param="wait")
    return seconds
