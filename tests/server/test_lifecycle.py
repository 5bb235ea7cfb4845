"""RELIABILITY 10, 12 and 13 over the pretended engine: health, back-pressure, and an orderly end."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.live import Live, serving, until
from tests.server.sse import deltas, parse
from xllm.server.options import ServerOptions

BODY = {"prompt": "p", "temperature": 0, "ignore_eos": True, "max_tokens": 100}


def ask(live: Live, **body: Any) -> httpx.Response:
    return live.http.post("/v1/completions", json={**BODY, **body})


def test_healthy_and_ready(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    assert "/v1" in http.get("/").json()["hint"]


def test_a_silent_engine_is_unhealthy_and_recovers(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.engine.health.SILENT_AFTER_S", 0.2)
    monkeypatch.setattr("xllm.engine.async_llm.WATCH_S", 0.02)
    with serving(tmp_path) as live:
        live.fake.frozen = True
        until(lambda: live.http.get("/health").status_code == 503, "the silence to be noticed")
        refused = live.http.get("/ready")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["type"] == "unavailable_error"
        live.fake.release()
        until(lambda: live.http.get("/ready").status_code == 200, "the recovery to be noticed")


def test_a_full_queue_is_429_with_retry_after(tmp_path):
    with serving(tmp_path, slots=2, queue=3) as live, ThreadPoolExecutor(8) as pool:
        live.fake.held = True
        running = [pool.submit(ask, live) for _ in range(5)]
        until(lambda: live.fake.active == 5, "slots and queue to fill")
        for body in ({}, {"stream": True}, {"n": 2, "temperature": 1}):
            refused = ask(live, **body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        live.fake.release()
        assert {answer.result().status_code for answer in running} == {200}
        assert ask(live).status_code == 200


@pytest.mark.parametrize("clients", [60])
def test_ten_times_capacity(tmp_path, clients):
    """Every answer is whole or a refusal with Retry-After, and afterwards there is room at once."""
    with serving(tmp_path, slots=2, queue=4) as live, ThreadPoolExecutor(clients) as pool:
        live.fake.step_s = 0.001
        answers = list(pool.map(lambda i: ask(live, stream=bool(i % 2), max_tokens=20), range(clients)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert answer.headers["retry-after"]
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert len("".join(deltas(parse(answer.text))).encode()) >= 18
        assert ask(live).status_code == 200


def test_draining_finishes_what_runs_and_takes_nothing_new(tmp_path):
    with serving(tmp_path) as live, ThreadPoolExecutor(8) as pool:
        live.fake.held = True
        running = [pool.submit(ask, live, stream=stream) for stream in (True, False) * 2]
        until(lambda: live.fake.active == 4, "the requests to run")
        live.call(live.server.stop)
        until(lambda: live.http.get("/ready").status_code == 503, "not ready")
        assert live.http.get("/health").status_code == 200
        refused = ask(live)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert ask(live, stream=True).status_code == 503
        live.fake.step_s = 0.003
        live.fake.release()
        streamed, whole = running[0].result(), running[1].result()
        assert "".join(deltas(parse(streamed.text))) == whole.json()["choices"][0]["text"]
        assert whole.json()["usage"]["completion_tokens"] == 100
        assert {answer.result().status_code for answer in running} == {200}
        until(lambda: live.fake.closed, "the server to end by itself")


def test_what_does_not_finish_in_time_ends_with_an_error(tmp_path):
    with serving(tmp_path, ServerOptions(shutdown_timeout=0.2)) as live, ThreadPoolExecutor(2) as pool:
        live.fake.step_s = 0.02
        streamed = pool.submit(ask, live, stream=True)
        whole = pool.submit(ask, live)
        until(lambda: live.fake.active == 2, "the requests to run")
        live.call(live.server.stop)
        assert "shutting down" in parse(streamed.result().text)[-1]["error"]["message"]
        assert whole.result().status_code in (500, 503)
        until(lambda: live.fake.closed, "the server to end by itself")


def test_stopping_twice_ends_at_once(tmp_path):
    with serving(tmp_path) as live:
        live.fake.held = True
        client = httpx.Client(base_url=live.url)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.post, "/v1/completions", json=BODY)
            until(lambda: live.fake.active == 1, "the request to run")
            live.call(live.server._on_signal)
            live.call(live.server._on_signal)
            until(lambda: live.fake.closed, "the server to end", timeout_s=3)
            assert running.exception() is not None or running.result().status_code >= 500
        client.close()


def test_an_idle_server_stops_quickly_with_open_connections(tmp_path):
    with serving(tmp_path) as live:
        live.http.get("/health")  # stays open in the pool
        live.call(live.server.stop)
        until(lambda: live.fake.closed, "the server to end", timeout_s=2)
