"""GET /v1/requests/{id} and /v1/instances: where a request went and why; who is there. Routers only."""

from typing import cast
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Request, Response

from xllm.cluster.client import ClusterClient
from xllm.core.errors import NotFound
from xllm.server.siblings import ASKED, Siblings

router = APIRouter()


def _cluster(request: Request) -> ClusterClient:
    return cast(ClusterClient, request.app.state.cluster)


@router.get("/v1/requests/{id}")
async def get_request(request: Request, id: str) -> Response:
    """Of the last some thousand requests: the `id` is the answer's own."""
    found = _cluster(request).decision(id)
    if found is not None:
        return _json(found)
    siblings: Siblings | None = request.app.state.siblings
    if siblings is not None and ASKED not in request.headers:
        for answer in await siblings.ask(
            f"/v1/requests/{quote(id, safe='')}", request.headers.get("authorization")
        ):
            if answer.status_code == 200:
                return Response(answer.content, media_type="application/json")
    raise NotFound(
        f"no request {id[:100]!r} is known; the last few thousand are kept", code="request_not_found"
    )


@router.get("/v1/instances")
async def get_instances(request: Request) -> Response:
    """As this router process sees them."""
    cluster = _cluster(request)
    return _json({
        "object": "list", "policy": cluster.policy, "counts": cluster.counts,
        "data": cluster.instances(),
    })  # fmt: skip


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
