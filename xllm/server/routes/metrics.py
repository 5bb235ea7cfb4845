"""GET /metrics: the Prometheus page. Answers even when the engine does not."""

import asyncio

from fastapi import APIRouter, Request, Response

from xllm.server import state as server_state
from xllm.server.metrics import CONTENT_TYPE

router = APIRouter()

STATS_TIMEOUT_S = 2.0


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state = server_state.of(request)
    try:
        stats = await asyncio.wait_for(state.engine.stats(), STATS_TIMEOUT_S)
    except TimeoutError:
        stats = None  # the last figures known
    return Response(state.metrics.text(stats), headers={"content-type": CONTENT_TYPE})
