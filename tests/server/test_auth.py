"""RELIABILITY 7: without a key only the two probes answer, however the path is spelled."""

import re
import socket
from typing import Any

import pytest

from tests.server.live import Live, serving
from xllm.server.options import ServerOptions

KEY = "s3cret-key"


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("model"), ServerOptions(api_key=(KEY,))) as live:
        yield live


def routes(live: Live) -> list[tuple[str, str]]:
    app: Any = live.server.config.app
    return [
        (method, re.sub(r"\{[^}]*\}", "x", route.path))
        for route in _flat(app.routes)
        for method in route.methods
    ]


def _flat(items):
    for item in items:
        inner = getattr(item, "routes", None) or getattr(
            getattr(item, "original_router", None), "routes", None
        )
        if inner:
            yield from _flat(inner)
        elif hasattr(item, "methods"):
            yield item


def test_the_matrix_of_routes(locked):
    found = routes(locked)
    assert len(found) >= 11
    for method, path in found:
        status = locked.http.request(method, path).status_code
        assert (status != 401) == (path in ("/health", "/ready")), (method, path)
        assert (
            locked.http.request(method, path, headers={"authorization": f"Bearer {KEY}"}).status_code != 401
        )


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/v1//models", "/./v1/models", "/health/../v1/models", "/v1/../v1/models", "/%2e/v1/models",
        "/health/%2e%2e/v1/models", "/v1/%6dodels", "/%76%31/models", "http://x/v1/models", "http://x/health/../v1/models",
        "/health/", "/health%2f", "/health;v1/models", "//health", "/ready/..", "/HEALTH", "/%68ealth", "/", "/nope",
        "/metrics", "/v1/models?x=/health", "/v1/models#/health", "/health%00", "/docs", "/openapi.json", "/redoc",
    ],
)  # fmt: skip
def test_no_spelling_gets_around(locked, target):
    assert raw(locked, target).split(b" ")[1] in (b"401", b"400")


@pytest.mark.parametrize("target", ["/health", "/ready", "/health?x=1", "http://x/health"])
def test_the_probes_are_open(locked, target):
    assert raw(locked, target).split(b" ")[1] == b"200"


@pytest.mark.parametrize(
    "header",
    [
        "", "Authorization: Bearer", "Authorization: Bearer ", f"Authorization: {KEY}", f"Authorization: Basic {KEY}",
        f"Authorization: Bearer {KEY}x", f"Authorization: Bearer {KEY[:-1]}", f"Authorization: Bearer {KEY.upper()}",
        f"Authorization: Bearer wrong\r\nAuthorization: Bearer {KEY}", f"X-Api-Key: {KEY}", "Authorization: Bearer \xff",
    ],
)  # fmt: skip
def test_wrong_headers(locked, header):
    answer = raw(locked, "/v1/models", header)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b'"code":"invalid_api_key"' in answer
    assert b"www-authenticate: Bearer" in answer


def test_the_right_header(locked):
    assert raw(locked, "/v1/models", f"authorization: bearer {KEY}").startswith(b"HTTP/1.1 200")


def test_the_body_is_not_read_without_a_key(locked):
    answer = raw(locked, "/v1/completions", "Content-Length: 999999999", method="POST")
    assert answer.startswith(b"HTTP/1.1 401")


def test_keys_stay_out_of_the_log(locked, caplog):
    caplog.set_level("DEBUG")
    locked.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    locked.http.get(f"/v1/models/{KEY}", headers={"authorization": f"Bearer {KEY}"})
    locked.http.get(f"/{KEY}?q={KEY}")
    assert "/v1/models/{name:path}" in caplog.text
    assert KEY not in "\n".join(
        r.getMessage() for r in caplog.records if not r.name.startswith(("http", "asyncio"))
    )


def test_the_key_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLLM_API_KEY", "from-env")
    assert ServerOptions().api_keys() == ("from-env",)
    assert ServerOptions(api_key=("given",)).api_keys() == ("given",)
    with serving(tmp_path) as live:
        assert live.http.get("/v1/models").status_code == 401
        assert live.http.get("/v1/models", headers={"authorization": "Bearer from-env"}).status_code == 200


def test_cors_preflight_needs_no_key_and_the_request_does(tmp_path):
    options = ServerOptions(api_key=(KEY,), allowed_origins=("https://ui.example",))
    with serving(tmp_path, options) as live:
        ask = {"origin": "https://ui.example", "access-control-request-method": "POST"}
        allowed = live.http.options("/v1/chat/completions", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://ui.example"
        assert live.http.get("/v1/models", headers={"origin": "https://ui.example"}).status_code == 401
        assert (
            "access-control-allow-origin"
            not in live.http.get("/health", headers={"origin": "https://bad"}).headers
        )


def test_behind_a_proxy_with_a_path(tmp_path):
    with serving(tmp_path, ServerOptions(api_key=(KEY,), root_path="/llm")) as live:
        assert live.http.get("/health").status_code == 200
        assert live.http.get("/v1/models").status_code == 401
        assert live.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def raw(live: Live, target: str, header: str = "", method: str = "GET") -> bytes:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as client:
        lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *([header] if header else [])]
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        data = b""
        while piece := client.recv(65536):
            data += piece
        return data
