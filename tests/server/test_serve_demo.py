"""`xllm serve` with a real engine in a process of its own: what other tests show over a pretended one.

With the demo model where the tree has it, else with a small random checkpoint.
"""

import asyncio
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.server.command import Command, command, url_of
from tests.server.fuzz import storm
from tests.server.live import until
from tests.server.sse import deltas, events, parse

MESSAGES: Any = [{"role": "user", "content": "What is xLLM?"}]
CLI = ("-m", "xllm.cli")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from xllm.core.errors import ConfigError
    from xllm.models.source import locate

    try:
        locate("demo", None)
        return "demo"
    except ConfigError:
        from tests.checkpoints import save_qwen3

        return str(save_qwen3(tmp_path_factory.mktemp("random") / "model", max_position=1024))


class Served:
    def __init__(self, running: Command, url: str, key: str = "none"):
        self.running = running
        self.url = url
        self.http = httpx.Client(
            base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"}
        )  # of any thread
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    def metric(self, name: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"xllm:{name}{{"):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def complete(self, **body: Any) -> httpx.Response:
        ask = {"prompt": "One day", "temperature": 0, "max_tokens": 20, "ignore_eos": True, **body}
        return self.http.post("/v1/completions", json=ask)

    @property
    def engine_process(self) -> psutil.Process:
        (child,) = self.running.children()
        return child


@contextmanager
def serving(model: str, *flags: str, key: str = "none") -> Iterator[Served]:
    with command(*CLI, "serve", model, "--port", "0", *flags) as running:
        one = Served(running, url_of(running, 120), key)
        try:
            yield one
        finally:
            one.http.close()


@pytest.fixture(scope="module")
def served(model) -> Iterator[Served]:
    with serving(model, "--served-model-name", "m") as one:
        yield one
        assert one.running.process.poll() is None, one.running.text


@pytest.fixture
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_streamed_equals_whole_and_repeats(client):
    ask: dict[str, Any] = {"model": "m", "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    assert text
    assert client.chat.completions.create(**ask).choices[0].message.content == text
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("prompt", ["Tell me a story", "日本語 🗼 und Grüße", "1 + 1 =", "\n\n", "{"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "n": 3}])
def test_streamed_equals_whole(served, prompt, sampling):
    body = {"prompt": prompt, "max_tokens": 40, "logprobs": 2, **sampling}
    whole = served.complete(**body).json()
    chunks = events(served.complete(**body, stream=True, stream_options={"include_usage": True}))
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [t for c in mine for t in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert {k: chunks[-1]["usage"][k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: whole["usage"][k] for k in ("prompt_tokens", "completion_tokens")
    }


def test_n_and_seeds(client):
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(
            model="m", prompt="Once", n=3, seed=seed, max_tokens=20, temperature=1.5
        )
        return [c.text for c in answer.choices]

    assert texts(1) == texts(1)
    assert len(set(texts(1)) | set(texts(2))) > 3


def test_a_seed_gives_the_same_whatever_runs_beside(served):
    body = {"temperature": 1.3, "seed": 42, "max_tokens": 30}
    alone = served.complete(**body).json()["choices"][0]["text"]
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(served.complete, prompt=f"other {i}", temperature=1.0) for i in range(11)]
        assert pool.submit(served.complete, **body).result().json()["choices"][0]["text"] == alone
        assert {other.result().status_code for other in others} == {200}


def test_stop_ends_before_its_string(served):
    free = served.complete(max_tokens=60).json()["choices"][0]["text"]
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    choice = served.complete(max_tokens=60, stop=[stop]).json()["choices"][0]
    assert choice["text"] == free[: free.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_logprobs_are_those_of_the_chosen_tokens(client):
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy takes the likeliest


def test_scored_prompts_agree_with_generation(served):
    made = served.complete(logprobs=1, max_tokens=8).json()["choices"][0]
    scored = served.complete(prompt="One day" + made["text"], logprobs=1, echo=True, max_tokens=0).json()[
        "choices"
    ][0]
    if (
        scored["logprobs"]["tokens"][-8:] == made["logprobs"]["tokens"]
    ):  # where the text tokenises the same way
        ours, theirs = scored["logprobs"]["token_logprobs"][-8:], made["logprobs"]["token_logprobs"]
        assert ours == pytest.approx(theirs, abs=0.05)


def test_cached_tokens_show_in_the_usage(client):
    ask: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "cache " * 30}],
        "max_tokens": 2,
    }
    client.chat.completions.create(**ask)
    usage = client.chat.completions.create(**ask).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_errors_are_the_clients_own_types(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=MESSAGES, top_p=2)
    assert bad.value.param == "top_p"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|at least"):
        client.completions.create(model="m", prompt="word " * 100_000)


async def test_the_async_client_sixteen_at_once(served):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            stream: Any = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"Say {i}"}],
                temperature=0,
                max_tokens=20,
                stream=True,
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        together = await asyncio.gather(*(one(i) for i in range(16)))
        assert together[3] == await one(3)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
async def test_clients_that_leave(served, count):
    """RELIABILITY 1."""
    chance = random.Random(count)
    async with httpx.AsyncClient(
        base_url=served.url, timeout=60, limits=httpx.Limits(max_connections=None)
    ) as http:

        async def leave(i: int, stream: bool) -> None:
            body = {
                "prompt": f"{i} " * chance.randrange(1, 80),
                "max_tokens": 300,
                "ignore_eos": True,
                "stream": stream,
            }
            try:
                async with asyncio.timeout(chance.uniform(0.0, 1.0)):
                    async with http.stream("POST", "/v1/completions", json=body) as response:
                        async for _ in response.aiter_bytes():
                            pass
            except TimeoutError:
                pass

        await asyncio.gather(*(leave(i, stream) for i in range(count) for stream in (True, False)))

    def at_rest() -> bool:
        return (
            served.metric("num_requests_running") == served.metric("num_requests_waiting") == 0
            and served.metric("kv_cache_usage_perc") == 0.0
        )

    until(at_rest, "the engine to be as before", timeout_s=1.0)


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
async def test_fuzz(served, count):
    """RELIABILITY 3."""
    engine = served.engine_process
    await storm(served.url, count, seed=7)
    assert engine.is_running()
    assert served.engine_process == engine
    until(lambda: served.metric("num_requests_running") == 0, "the engine to be idle")


def test_chat_command_over_http(served):
    with command(*CLI, "chat", "--url", served.url, "-q", "What is xLLM?", "--max-tokens", "20") as chat:
        assert chat.end() == 0
        assert "tok/s" in chat.text


@pytest.fixture(scope="module")
def small(model) -> Iterator[Served]:
    """A server with little room, and a key."""
    with serving(
        model, "--max-num-seqs", "2", "--max-num-queued-reqs", "4", "--api-key", "k", key="k"
    ) as one:
        yield one


def test_without_a_key_only_probes_answer(small):
    """RELIABILITY 7; the matrix of all routes is in test_auth.py."""
    paths = ("/health", "/ready", "/metrics", "/v1/models", "/")
    assert [httpx.get(small.url + path).status_code for path in paths] == [200, 200, 401, 401, 401]
    assert small.http.get("/metrics").status_code == 200


def test_ten_times_capacity(small):
    """RELIABILITY 12."""
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda i: small.complete(max_tokens=200, stream=bool(i % 2)), range(60)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
    assert len(_texts(a for a in answers if a.status_code == 200)) == 1
    assert small.complete().status_code == 200


# Far more than an engine can write while the machine does not let us stop it: some 200,000 tokens.
ENDLESS = {"prompt": "x", "max_tokens": 1600, "ignore_eos": True, "temperature": 1, "n": 128, "stream": True}


def test_a_frozen_engine(served):
    """RELIABILITY 10: unhealthy within 10 s, errors in flight within 15 s; and it may come back."""
    engine = served.engine_process
    with (
        ThreadPoolExecutor(1) as pool,
        served.http.stream("POST", "/v1/completions", json=ENDLESS) as streamed,
    ):
        lines = streamed.iter_lines()
        assert next(lines).startswith("data: ")
        engine.send_signal(signal.SIGSTOP)
        frozen = time.monotonic()
        whole = pool.submit(served.complete, max_tokens=9, prompt="x")
        until(lambda: served.http.get("/health").status_code == 503, "/health to notice", timeout_s=10)
        assert whole.result().status_code == 500
        assert '"error"' in [line for line in lines if line][-2]  # before [DONE]
        assert time.monotonic() - frozen < 15
        engine.send_signal(signal.SIGCONT)
        until(lambda: served.http.get("/ready").status_code == 200, "the recovery to be noticed")
        assert served.complete().status_code == 200


@pytest.mark.slow
def test_the_end_of_a_frozen_engine(model):
    with command(*CLI, "serve", model, "--port", "0") as running:
        url_of(running, 120)
        (engine,) = running.children()
        engine.send_signal(signal.SIGSTOP)
        running.ctrl_c()
        assert running.end(30) == 0
        assert not engine.is_running()


def test_an_engine_that_dies_ends_the_server_with_an_error(model):
    """A supervisor starts a new one; answering 503 for ever would hide it."""
    with serving(model) as served:
        engine = served.engine_process
        with served.http.stream("POST", "/v1/completions", json=ENDLESS) as streamed:
            lines = streamed.iter_lines()
            assert next(lines).startswith("data: ")
            engine.kill()
            assert '"error"' in [line for line in lines if line][-2]  # before [DONE]
        served.http.close()
        assert served.running.end(20) == 1
        assert "the engine is gone" in served.running.text


@pytest.mark.parametrize("how", ["sigterm", "ctrl_c"])
def test_the_end_under_load(model, how):
    """RELIABILITY 13, and no process, thread or file left behind."""
    started = threading.Semaphore(0)

    def stream(served: Served) -> str:
        ask = {"prompt": "One day", "temperature": 0, "max_tokens": 800, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=ask) as response:
            pieces = response.iter_text()
            first = next(pieces)
            started.release()
            return first + "".join(pieces)

    with serving(model) as served, ThreadPoolExecutor(8) as pool:
        running = served.running
        family = [psutil.Process(running.process.pid), *running.children()]
        plain = [pool.submit(served.complete, max_tokens=800) for _ in range(4)]
        streams = [pool.submit(stream, served) for _ in range(4)]
        assert all(started.acquire(timeout=60) for _ in streams)
        running.terminate() if how == "sigterm" else running.ctrl_c()
        until(lambda: _not_ready(served), "not ready", timeout_s=2)
        answers = [answer.result() for answer in plain]
        texts = {"".join(deltas(parse(stream.result()))) for stream in streams}
        served.http.close()  # an open connection is no reason to stay
        assert running.end(20) == 0
        assert all(a.status_code == 200 or a.headers["retry-after"] for a in answers)  # or it came too late
        assert len(texts | _texts(a for a in answers if a.status_code == 200)) == 1
        assert running.lines[-1] == "stopped"
        _, alive = psutil.wait_procs(family, timeout=2)
        assert not alive, alive
    assert "Traceback" not in running.text


def _texts(answers: Iterable[httpx.Response]) -> set[str]:
    return {
        "".join(deltas(parse(a.text)))
        if a.headers["content-type"].startswith("text/event-stream")
        else a.json()["choices"][0]["text"]
        for a in answers
    }


def _not_ready(served: Served) -> bool:
    try:
        return served.http.get("/ready").status_code == 503
    except httpx.TransportError:
        return True  # it has already ended


def test_an_interrupted_start_leaves_nothing(model, tmp_path):
    with command(*CLI, "serve", model, "--port", "0", env={"TMPDIR": str(tmp_path)}) as running:
        until(lambda: bool(running.children()), "the engine process to start")
        family = running.children()
        running.ctrl_c()
        assert running.end(20) in (0, 130)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    assert not list(Path(tmp_path).iterdir())


def test_the_demo_model_is_ready_soon(model):
    if model != "demo":
        pytest.skip("the tree has no demo model")
    begin = time.monotonic()
    with command(*CLI, "serve", "demo", "--port", "0") as running:
        url = url_of(running)
        assert time.monotonic() - begin < 8
        ask = {"model": "demo", "messages": MESSAGES, "temperature": 0}
        text = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).json()["choices"][0]["message"][
            "content"
        ]
        assert "LLM" in text
