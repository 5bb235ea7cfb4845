"""GET /v1/models and /v1/models/{id}: what is served here."""

import msgspec
from fastapi import APIRouter, Request, Response

from xllm.server import state as server_state
from xllm.server.state import ServerState

router = APIRouter()


class Model(msgspec.Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "xllm"
    parent: str | None = None


class ModelList(msgspec.Struct):
    data: list[Model]
    object: str = "list"


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    return _json(ModelList([_model(server_state.of(request))]))


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    state = server_state.of(request)
    state.check_model(name)
    return _json(_model(state))


def _model(state: ServerState) -> Model:
    return Model(state.model, state.created, state.asked.model, state.max_model_len)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
