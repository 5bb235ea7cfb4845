import asyncio
import time

import pytest

from tests.bench.fake_api import FakeApi
from xllm.bench import http
from xllm.bench.completion import Ask, complete, request_body
from xllm.bench.http import HttpClient

ASK = Ask("hello", 3, max_tokens=5)


def prepared(client: HttpClient, *, chat: bool = False, ask: Ask = ASK) -> bytes:
    backend = "openai-chat" if chat else "openai"
    body = request_body(ask, backend=backend, model="toy", temperature=0.0, ignore_eos=True)
    return client.prepare("POST", "/v1/chat/completions" if chat else "/v1/completions", body)


async def test_get(api):
    async with HttpClient(api.url) as client:
        status, body = await client.request("GET", "/v1/models")
        assert status == 200 and b"toy" in body
        assert (await client.request("GET", "/nothing"))[0] == 404


@pytest.mark.parametrize("chat", [False, True])
async def test_a_streamed_completion(api, chat):
    async with HttpClient(api.url) as client:
        before = time.perf_counter()
        record = await complete(client, prepared(client, chat=chat), ASK)
        after = time.perf_counter()
    assert record.error is None
    assert record.text == "t0 t1 t2 t3 t4 "
    assert (record.prompt_tokens, record.output_tokens) == (7, 5)
    assert len(record.arrivals) == 5  # the chat's role chunk is not a token
    assert before <= record.start < record.arrivals[0] <= record.arrivals[-1] <= record.end <= after
    body = api.bodies[0]
    assert (body["model"], body["max_tokens"], body["stream"], body["ignore_eos"]) == ("toy", 5, True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert ("messages" in body, "prompt" in body) == (chat, not chat)


async def test_connections_are_reused(api):
    async with HttpClient(api.url) as client:
        for _ in range(5):
            assert (await complete(client, prepared(client), ASK)).error is None
    assert api.connections == 1


async def test_a_connection_idle_for_long_is_not_trusted(api, monkeypatch):
    monkeypatch.setattr(http, "IDLE_S", 0.0)
    async with HttpClient(api.url) as client:
        for _ in range(2):
            assert (await complete(client, prepared(client), ASK)).error is None
    assert api.connections == 2


async def test_a_server_without_keep_alive():
    with FakeApi("close") as api:
        async with HttpClient(api.url) as client:
            for _ in range(3):
                assert (await complete(client, prepared(client), ASK)).error is None
        assert api.connections == 3


async def test_many_at_once(api):
    async with HttpClient(api.url) as client:
        records = await asyncio.gather(*(complete(client, prepared(client), ASK) for _ in range(50)))
    assert all(r.error is None and r.output_tokens == 5 for r in records)
    assert api.peak > 10


async def test_without_usage_pieces_are_counted():
    with FakeApi("no_usage") as api:
        async with HttpClient(api.url) as client:
            record = await complete(client, prepared(client), ASK)
    assert (record.prompt_tokens, record.output_tokens, record.error) == (3, 5, None)


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("http_error", "HTTP 429: too busy"),
        ("error_frame", "the engine fell over"),
        ("cut", "closed the connection"),
        ("garbage", "not what the API says"),
        ("empty", "no tokens"),
    ],
)
async def test_what_goes_wrong_is_said(mode, error):
    with FakeApi(mode) as api:
        async with HttpClient(api.url) as client:
            record = await complete(client, prepared(client), ASK)
    assert record.error is not None and error in record.error
    assert record.end > record.start


async def test_a_hanging_server_times_out():
    with FakeApi("hang") as api:
        async with HttpClient(api.url, timeout_s=0.05) as client:
            assert (await complete(client, prepared(client), ASK)).error == "timed out"


async def test_no_server():
    async with HttpClient("http://127.0.0.1:1") as client:
        record = await complete(client, prepared(client), ASK)
    assert record.error is not None and "cannot connect to 127.0.0.1:1" in record.error


async def test_what_is_not_http():
    with FakeApi("ssh") as api:
        async with HttpClient(api.url) as client:
            record = await complete(client, prepared(client), ASK)
    assert record.error is not None and "not HTTP" in record.error


def test_the_request_as_bytes():
    client = HttpClient("https://user@host.example:8443/llm/", {"Authorization": "Bearer k"})
    text = client.prepare("POST", "/v1/x", b"{}").decode()
    assert text.startswith("POST /llm/v1/x HTTP/1.1\r\nHost: host.example:8443\r\n")
    assert "Authorization: Bearer k\r\n" in text
    assert text.endswith("Content-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_not_a_url(url):
    with pytest.raises(ValueError, match="not an http"):
        HttpClient(url)
