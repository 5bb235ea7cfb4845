"""POST /start_profile, POST /stop_profile: a trace of what the device does in between. With --profiler-dir.

The names are those of vLLM.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from xllm.server import state as server_state

router = APIRouter()


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    await server_state.of(request).engine.start_profile()
    return JSONResponse({"profiling": True})


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    state = server_state.of(request)
    assert state.options.profiler_dir is not None, "else there is no such route"
    path = await state.engine.stop_profile(state.options.profiler_dir)
    return JSONResponse({"profiling": False, "trace": path})
