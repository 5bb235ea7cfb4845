"""POST /sleep, POST /wake_up, GET /is_sleeping: a card's memory for somebody else for a while. With --enable-sleep-mode.

The names and the `level` parameter are those of vLLM. Level 1 keeps the weights in the host's memory.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from xllm.core.errors import InvalidRequest
from xllm.server import state as server_state

router = APIRouter()


@router.post("/sleep")
async def sleep(request: Request, level: str = "1") -> Response:
    if level != "1":
        raise InvalidRequest("level must be 1: weights rest in the host's memory", param="level")
    await server_state.of(request).engine.sleep()
    return JSONResponse({"is_sleeping": True})


@router.post("/wake_up")
async def wake_up(request: Request) -> Response:
    await server_state.of(request).engine.wake_up()
    return JSONResponse({"is_sleeping": False})


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    return JSONResponse({"is_sleeping": server_state.of(request).engine.asleep})
