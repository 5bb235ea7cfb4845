"""`xllm serve` as a process over the pretended engine: what it says, how it ends."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.server.command import command, url_of
from tests.server.live import until
from tests.server.sse import deltas, parse


@pytest.fixture
def opened():
    """Closes at the end what it is given."""
    with ExitStack() as stack:
        yield stack.enter_context


SERVE = ("-m", "tests.server.fake_serve", "serve")


def test_says_what_it_does_and_ends_cleanly(tmp_path, opened):
    config = tmp_path / "c.yaml"
    config.write_text("port: 0\nserved-model-name: from-file\nlog-level: info\n")
    with command(*SERVE, "fake", "--config", str(config), "--api-key", "a", "--api-key", "b") as server:
        url = url_of(server)
        http = opened(httpx.Client(base_url=url, timeout=30))
        assert server.lines[0].startswith("xLLM ")
        assert "  KV cache 1 MiB: enough for a fake" in server.lines
        assert "  weights: 1.0 MB" in server.lines
        assert server.lines[-1].startswith(f"Ready: {url}/v1  model=from-file  (")
        assert server.wait_for("^Try: ")
        assert "$XLLM_API_KEY" in server.lines[-1]
        for key in "ab":
            models = http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).json()
            assert models["data"][0]["id"] == "from-file"
        assert http.get("/v1/models").status_code == 401
        server.terminate()
        assert server.end() == 0
        assert "GET /v1/models 200" in server.text
        assert server.lines[-1] == "stopped"
        assert "Traceback" not in server.text


@pytest.mark.parametrize("how", ["sigterm", "ctrl_c"])
def test_the_first_signal_lets_requests_finish(how, opened):
    with command(*SERVE, "steady", "--port", "0") as server, ThreadPoolExecutor(9) as pool:
        url = url_of(server)
        http = opened(httpx.Client(base_url=url, timeout=30))

        def ask(i):
            body = {
                "prompt": "p",
                "temperature": 0,
                "max_tokens": 60,
                "ignore_eos": True,
                "stream": bool(i % 2),
            }
            return http.post("/v1/completions", json=body)

        running = [pool.submit(ask, i) for i in range(8)]
        until(lambda: running_on(http) == 8, "eight to run")
        server.terminate() if how == "sigterm" else server.ctrl_c()
        until(lambda: http.get("/ready").status_code == 503, "not ready", timeout_s=1)
        refused = ask(0)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        answers = [answer.result() for answer in running]
        assert {answer.status_code for answer in answers} == {200}
        texts = {
            "".join(deltas(parse(a.text))) if i % 2 else a.json()["choices"][0]["text"]
            for i, a in enumerate(answers)
        }
        assert len(texts) == 1
        assert server.end() == 0
        assert "Traceback" not in server.text


def running_on(http):
    for line in http.get("/metrics").text.splitlines():
        if line.startswith("xllm:num_requests_running{"):
            return float(line.split()[-1])
    return None


def test_the_second_signal_ends_at_once(opened):
    with command(*SERVE, "steady", "--port", "0") as server, ThreadPoolExecutor(1) as pool:
        url = url_of(server)
        http = opened(httpx.Client(base_url=url, timeout=30))
        body = {"prompt": "p", "temperature": 0, "max_tokens": 500, "ignore_eos": True}
        running = pool.submit(http.post, "/v1/completions", json=body)
        until(lambda: running_on(http) == 1, "the request to run")
        server.ctrl_c()
        server.wait_for("shutting down: 1 ")
        server.ctrl_c()
        assert server.end(timeout_s=5) == 0
        assert running.exception() is not None or running.result().status_code >= 500


def test_shutdown_timeout_zero_waits_for_nobody(opened):
    with (
        command(*SERVE, "steady", "--port", "0", "--shutdown-timeout", "0") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        url = url_of(server)
        http = opened(httpx.Client(base_url=url, timeout=30))
        body = {"prompt": "p", "max_tokens": 500, "ignore_eos": True, "stream": True}
        running = pool.submit(http.post, "/v1/completions", json=body)
        until(lambda: running_on(http) == 1, "the request to run")
        server.terminate()
        assert server.end(timeout_s=10) == 0
        assert "error" in parse(running.result().text)[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting(number):
    with command(*SERVE, "slow", "--port", "0") as server:
        server.wait_for("weights")
        os.kill(server.process.pid, number)
        assert server.end(timeout_s=10) == 130
        assert server.lines[-1] == "interrupted while starting"
        assert "Traceback" not in server.text


def test_a_taken_port_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with command(*SERVE, "fake", "--port", str(port)) as server:
            assert server.end() == 1
            expected = f"xllm: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port"
            assert server.lines == [expected]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--port", "0"], "there is no model called nowhere"),
        (
            ["fake", "--port", "0", "--chat-template", "/nowhere.jinja"],
            "neither a readable file nor a Jinja template",
        ),
        (["fake", "--port", "0", "--chat-template", "{% if %}"], "chat template"),
        (["fake", "--port", "70000"], "--port must lie between 0 and 65535"),
        (["fake", "--api-key", ""], "--api-key must not be empty"),
        (["fake", "--root-path", "llm"], "--root-path starts with a slash"),
        (["fake", "--shutdown-timeout", "-1"], "--shutdown-timeout must lie"),
        (["fake", "--host", "nowhere.invalid", "--port", "0"], "cannot listen on nowhere.invalid"),
    ],
)
def test_what_cannot_work_is_one_sentence(arguments, sentence):
    with command(*SERVE, *arguments) as server:
        assert server.end() == (1 if "nowhere.invalid" in arguments else 2)
        assert sentence in server.lines[-1]
        assert server.lines[-1].startswith("xllm: ")
        assert "Traceback" not in server.text


def test_an_open_port_without_a_key_is_pointed_out():
    with command(*SERVE, "fake", "--host", "0.0.0.0", "--port", "0") as server:
        url = url_of(server)
        assert url.startswith("http://127.0.0.1:")
        assert any("no --api-key is set" in line for line in server.lines)
        server.terminate()
        assert server.end() == 0
