"""What arrives on the socket: sizes, broken HTTP, broken JSON. Always an answer in the one error shape."""

import json
import socket
import time
from contextlib import suppress

import httpx
import pytest

from tests.server.live import Live, until
from xllm.server import protocol
from xllm.server.body import MAX_BODY_BYTES, parse
from xllm.server.routes.completions import CompletionRequest


def talk(live: Live, data: bytes, *, timeout_s: float = 10.0) -> bytes:
    """Sends, and reads until the server closes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=timeout_s) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)
        received = b""
        with suppress(ConnectionResetError):
            while piece := client.recv(65536):
                received += piece
        return received


def error_of(answer: bytes) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(http, chunked):
    size = MAX_BODY_BYTES + 1024

    def pieces():
        for _ in range(0, size, 2**20):
            yield b"x" * 2**20

    content = pieces() if chunked else b"x" * size
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_an_absurd_length_is_refused_without_reading(live):
    answer = talk(live, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert error_of(answer)["code"] == "request_too_large"


def test_the_largest_body_is_read(http):
    body = b'{"prompt": "' + b"x" * (MAX_BODY_BYTES - 14) + b'"}'
    assert len(body) == MAX_BODY_BYTES
    response = http.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_that_stops_coming(live, monkeypatch):
    monkeypatch.setattr("xllm.server.body.IDLE_TIMEOUT_S", 0.1)
    answer = talk(live, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n"
        + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(80))
        + b"\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"y" * 2_000_000,
        b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_headers_that_are_too_large(live, head):
    answer = talk(live, head)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")  # a reset may overtake the answer
    assert live.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http(live, data):
    answer = talk(live, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert error_of(answer)["code"] == "bad_http"


def test_headers_that_never_end_are_given_up(live, monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.1)
    begin = time.monotonic()
    assert talk(live, b"GET /health HTTP/1.1\r\nHost:") == b""
    assert time.monotonic() - begin < 5
    assert talk(live, b"") == b""


def test_a_request_outlives_the_deadline_for_its_headers(live, monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.05)
    live.fake.step_s = 0.02
    with httpx.Client(base_url=live.url) as client:
        for _ in range(2):
            response = client.post(
                "/v1/completions", json={"prompt": "x", "ignore_eos": True, "max_tokens": 10}
            )
            assert response.status_code == 200


def test_pipelined_requests_are_answered_in_order(live):
    one = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = talk(live, one + one + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.rindex(b"HTTP/1.1 404 Not Found") > answer.rindex(b"HTTP/1.1 200 OK")


def test_a_target_that_is_no_path(live):
    answer = talk(live, b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"x"', b"null", b"{}", b'{"prompt": NaN}', b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "\\ud800"}', b'{"prompt": "\\ud800 tail"}',
        b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"prompt": "x"}', b'{"prompt": "x"} extra',
        b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", b'{"metadata": ' + b"[" * 100_000, b"\x00" * 100,
        b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", b'{"prompt": "x", "\\u0000": 1}', b"\x1f\x8b\x08",
    ],
)  # fmt: skip
def test_broken_json(http, content):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = http.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]


def test_deep_but_harmless_json_passes(http):
    deep = "[" * 300 + "]" * 300
    content = f'{{"prompt": "x", "temperature": 0, "metadata": {deep}}}'
    assert http.post("/v1/completions", content=content.encode()).status_code == 200


def test_deep_template_arguments_do_not_break_anything(http):
    deep = "[" * 300 + "]" * 300
    content = f'{{"messages": [{{"role": "user", "content": "x"}}], "chat_template_kwargs": {{"a": {deep}}}}}'
    assert http.post("/v1/chat/completions", content=content.encode()).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nope", 404, "not_found_error"),
        ("GET", "/v1/completions/", 404, "not_found_error"),
        ("GET", "/v1/completions", 405, "method_not_allowed_error"),
        ("DELETE", "/health", 405, "method_not_allowed_error"),
        ("POST", "/v1/models", 405, "method_not_allowed_error"),
        ("GET", "/v1/models/%ff%00", 404, "not_found_error"),
        ("GET", "/docs", 404, "not_found_error"),
        ("GET", "/openapi.json", 404, "not_found_error"),
    ],
)
def test_wrong_doors(http, method, path, status, kind):
    response = http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    if status == 405:
        assert response.headers["allow"]


def test_unknown_fields_name_their_neighbour():
    with pytest.raises(Exception, match="did you mean `temperature`"):
        parse(b'{"prompt": "x", "temprature": 1}', CompletionRequest)


def test_request_ids(http):
    assert (
        http.get("/health", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    )
    for bad in ("x" * 129, "a b", "a\tb", "é".encode("latin-1").decode("latin-1"), "<script>"):
        made = http.get("/health", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32


def test_one_request_id_twice_is_no_conflict(live):
    live.fake.held = True
    from concurrent.futures import ThreadPoolExecutor

    def ask(_):
        body = {"prompt": "x", "temperature": 0}
        return httpx.post(
            f"{live.url}/v1/completions", json=body, headers={"x-request-id": "same"}, timeout=20
        )

    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(ask, range(2))
        until(lambda: live.fake.active == 2, "both to run")
        live.fake.release()
        first, second = answers
    assert first.status_code == second.status_code == 200
    assert first.json()["id"] != second.json()["id"]
