"""The ASGI application: routes, error answers and what surrounds them, over one engine."""

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from xllm.config.options import EngineOptions
from xllm.core.errors import XllmError
from xllm.engine.build import check_traceable
from xllm.server.engine import Engine
from xllm.server.errors import error_response
from xllm.server.metrics import Metrics
from xllm.server.middleware import Envelope, KeyCheck
from xllm.server.options import ServerOptions
from xllm.server.routes import kv_limit, profile, routers, sleep
from xllm.server.state import ServerState, served_name
from xllm.server.templates import choose_template

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the log does


def create_app(
    engine: Engine,
    options: ServerOptions | None = None,
    asked: EngineOptions | None = None,
    *,
    own: bool = True,
) -> FastAPI:
    """`app.state.server` is what the routes share. `own`: the engine is this server's own, to be put to sleep, limited and
    traced. Raises `ConfigError` for options that cannot work."""
    options, asked = options or ServerOptions(), asked or EngineOptions()
    cache = engine.config.cache
    metrics = Metrics(
        served_name(asked),
        {
            "block_size": str(cache.block_size),
            "num_gpu_blocks": str(cache.num_blocks),
            "enable_prefix_caching": str(cache.prefix_caching),
            "cache_dtype": engine.config.executor.dtype,
        },
    )
    # The documentation pages load their scripts from elsewhere: off is better than broken offline
    app = FastAPI(
        title="xLLM",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.server = ServerState(
        engine=engine,
        asked=asked,
        options=options,
        metrics=metrics,
        chat_template=choose_template(engine.tokenizer, options.chat_template),
    )
    for router in routers():
        app.include_router(router)
    if own and asked.enable_sleep_mode:
        app.include_router(sleep.router)
    if own and engine.config.cache.pool == "elastic":
        app.include_router(kv_limit.router)
    if options.profiler_dir is not None:
        check_traceable(engine.config, "--profiler-dir")
        app.include_router(profile.router)
    for kind in (XllmError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _answer)
    if keys := options.api_keys():
        app.add_middleware(KeyCheck, keys=keys, root_path=options.root_path)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-xllm-instance"],
        )
    app.add_middleware(Envelope, log_requests=not options.disable_log_requests)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return error_response(error)
