"""The ASGI application of a router: that of one instance, and what can be asked of a cluster besides."""

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xllm.cluster.client import ClusterClient
from xllm.core.targets import Targets
from xllm.engine.async_llm import AsyncLLM
from xllm.server.app import create_app
from xllm.server.cluster_options import RouterOptions
from xllm.server.generation import JOBS
from xllm.server.options import ServerOptions
from xllm.server.router_metrics import RouterMetrics
from xllm.server.routes import cluster
from xllm.server.siblings import Siblings
from xllm.server.state import ServerState

INSTANCE_HEADER = "x-xllm-instance"


def create_router_app(
    engine: AsyncLLM, client: ClusterClient, asked: RouterOptions, options: ServerOptions,
    siblings: Siblings | None = None,
) -> FastAPI:  # fmt: skip
    app = create_app(engine, options, engine.options, own=False)
    state: ServerState = app.state.server
    if asked.routing_policy == "slo_aware":
        state.targets = Targets(_seconds(asked.ttft_slo_ms), _seconds(asked.tpot_slo_ms))
    app.state.cluster = client
    app.state.siblings = siblings
    app.include_router(cluster.router)
    state.metrics.add(RouterMetrics(client, state.model))
    app.add_middleware(Routed, client=client)
    return app


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


class Routed:
    """Says in a header of each answer which instances made it, as far as that is known when it begins."""

    def __init__(self, app: ASGIApp, client: ClusterClient):
        self._app = app
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        jobs: list[str] = []
        JOBS.set(jobs)

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start" and jobs:
                been = [id for job in jobs for id in self._client.instances_of(job)]
                if been:
                    MutableHeaders(scope=message)[INSTANCE_HEADER] = ", ".join(dict.fromkeys(been))
            await send(message)

        await self._app(scope, receive, tagged)
