"""RELIABILITY 1: a client that leaves stops its work, streaming or not, wherever the request stands."""

import asyncio
import json
import random
import socket

import httpx
import pytest

from tests.server.live import Live, until


def raw_post(live: Live, path: str, body: dict) -> socket.socket:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    client = socket.create_connection(("127.0.0.1", live.port), timeout=5)
    client.sendall(head + data)
    return client


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["one", ["one", "two", "three"]])
def test_while_decoding(live, stream, prompt):
    live.fake.step_s = 0.01
    client = raw_post(
        live, "/v1/completions", {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    )
    until(lambda: live.fake.active == (1 if prompt == "one" else 3), "the request to run")
    if stream:
        assert b"200 OK" in client.recv(4096)
    client.close()
    until(live.idle, "the work to stop", timeout_s=1.0)
    assert len(live.fake.aborted) == len(live.fake.submitted)


@pytest.mark.parametrize("stream", [True, False])
def test_while_queued(live, stream):
    live.fake.held = True
    client = raw_post(
        live, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    )
    until(lambda: live.fake.active == 1, "the request to be queued")
    client.close()
    until(live.idle, "the work to stop", timeout_s=1.0)


def test_while_tokenising(live, monkeypatch):
    import threading

    asked, go_on = threading.Event(), threading.Event()
    encode = live.engine.tokenizer.encode

    def slow(text, add_special_tokens=True):
        if len(text) > 4096:
            asked.set()
            go_on.wait(10)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(live.engine.tokenizer, "encode", slow)
    client = raw_post(live, "/v1/completions", {"prompt": "x" * 5000, "truncate_prompt_tokens": 10})
    assert asked.wait(5)
    client.close()
    assert live.http.get("/health").status_code == 200  # and others are served meanwhile
    go_on.set()
    until(lambda: not live.server.server_state.tasks, "the request to end")
    assert live.fake.submitted == []


def test_in_the_middle_of_the_body(live):
    client = socket.create_connection(("127.0.0.1", live.port), timeout=5)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    until(lambda: bool(live.server.server_state.tasks), "the request to arrive")
    client.close()
    until(lambda: not live.server.server_state.tasks, "the request to end", timeout_s=1.0)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
async def test_many_at_random_moments(live, count):
    """`count` streaming and `count` plain clients; a canary beside them is not disturbed."""
    live.fake.step_s = 0.002
    chance = random.Random(count)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=live.url, timeout=30, limits=limits) as http:

        async def leave(stream: bool) -> None:
            body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": stream, "temperature": 0}
            try:
                async with asyncio.timeout(chance.uniform(0.0, 0.5)):
                    async with http.stream("POST", "/v1/completions", json=body) as response:
                        async for _ in response.aiter_bytes():
                            pass
            except TimeoutError:
                pass

        async def canary() -> str:
            return (await http.post("/v1/completions", json={"prompt": "c", "temperature": 0})).json()[
                "choices"
            ][0]["text"]

        alone = await canary()
        leaving = [leave(stream) for _ in range(count) for stream in (True, False)]
        *_, beside = await asyncio.gather(*leaving, canary())
        assert beside == alone
    until(live.idle, "everything to stop", timeout_s=1.0)
    stats = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(live.engine.stats(), live.loop))
    assert stats is not None
