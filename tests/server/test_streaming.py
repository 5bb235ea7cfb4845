"""RELIABILITY 6: streamed text equals whole text; framing, back-pressure and slow readers."""

import asyncio
import json
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.live import until
from tests.server.sse import deltas, events, parse
from xllm.core.errors import InvalidRequest
from xllm.server.sse import MAX_BUFFERED_BYTES, EventStream

TEXTS = st.text(st.sampled_from('aé東🗼\u200d👩🏽e\u0301 \n"\\</>&\x00'), min_size=1, max_size=24)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reply=TEXTS, limit=st.integers(1, 60), stops=st.lists(TEXTS, max_size=2))
def test_streamed_text_equals_whole_text(live, reply, limit, stops):
    live.fake.reply, live.fake.step_s = reply, 0.0
    body = {"temperature": 0, "max_tokens": limit, "stop": stops}
    chat = {**body, "messages": [{"role": "user", "content": "\U0001f5fc"}]}
    for path, ask in (("/v1/completions", {**body, "prompt": "p"}), ("/v1/chat/completions", chat)):
        whole = live.http.post(path, json=ask).json()
        chunks = events(
            live.http.post(path, json={**ask, "stream": True, "stream_options": {"include_usage": True}})
        )
        choice = whole["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert "".join(deltas(chunks)) == text
        last = [c for chunk in chunks for c in chunk["choices"]][-1]
        assert (last["finish_reason"], last["stop_reason"]) == (
            choice["finish_reason"],
            choice["stop_reason"],
        )
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-1]["choices"] == []
        assert not any("\ufffd" in piece for piece in deltas(chunks)) or "\ufffd" in text


def test_a_prompt_that_ends_inside_a_character_does_not_leak(http, live):
    euro = http.post("/tokenize", json={"prompt": "€"}).json()["tokens"]
    live.fake.reply = "abc"
    for body in ({}, {"stream": True}):
        response = http.post("/v1/completions", json={"prompt": euro[:2], "temperature": 0, **body})
        text = "".join(deltas(events(response))) if body else response.json()["choices"][0]["text"]
        assert text == "abc"


def test_several_prompts_stream_side_by_side(http, live):
    live.fake.step_s = 0.005
    body = {"prompt": ["a", "b", "c"], "temperature": 0, "max_tokens": 30, "stream": True}
    chunks = events(http.post("/v1/completions", json=body))
    order = [c["index"] for chunk in chunks for c in chunk["choices"]]
    assert set(order[:6]) == {0, 1, 2}
    assert len({"".join(deltas(chunks, i)) for i in range(3)}) == 1


def test_an_error_frame_ends_a_stream(http, live):
    live.fake.fail_after = 3
    response = http.post("/v1/completions", json={"prompt": "p", "stream": True})
    assert response.status_code == 200
    *chunks, error = parse(response.text)
    assert len(chunks) >= 1
    assert error == {
        "error": {"message": "a step failed", "type": "engine_error", "param": None, "code": None}
    }


def test_an_engine_that_dies_ends_streams_and_whole_answers(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from tests.server.live import serving

    with serving(tmp_path) as live, ThreadPoolExecutor(2) as pool:
        live.fake.step_s = 0.01
        body = {"prompt": "p", "ignore_eos": True, "max_tokens": 500}
        plain = pool.submit(live.http.post, "/v1/completions", json=body)
        streamed = pool.submit(
            httpx.post, f"{live.url}/v1/completions", json={**body, "stream": True}, timeout=20
        )
        until(lambda: live.fake.active == 2, "both to run")
        live.fake.fault = "signal SIGKILL"
        assert plain.result().status_code == 500
        assert "SIGKILL" in parse(streamed.result().text)[-1]["error"]["message"]
        assert live.http.get("/health").status_code == 503
        refused = live.http.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]


def test_a_reader_that_stalls_loses_nothing(live):
    live.fake.step_s = 0.0
    live.fake.reply = "z" * 480
    body = {"prompt": "p", "max_tokens": 500, "stream": True, "temperature": 0, "logprobs": 5}
    data = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", live.port))
    client.settimeout(10)
    client.sendall(
        f"POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    until(
        lambda: len(live.fake.submitted) == 1 and live.fake.active == 0, "the engine to finish"
    )  # it does not wait
    received = b""
    while piece := client.recv(65536):
        received += piece
    client.close()
    content = received.partition(b"\r\n\r\n")[2]
    text = b"".join(line.split(b"\r\n", 1)[0] if False else line for line in [content])
    if b"transfer-encoding: chunked" in received.lower():
        text = _dechunk(content)
    assert "".join(deltas(parse(text.decode()))) == "z" * 480


def _dechunk(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        out += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return out


class Wire:
    """An ASGI connection under a test's control."""

    def __init__(self):
        self.sent = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.left = asyncio.Event()

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.may_write.wait()
        self.sent.append(message)

    @property
    def body(self):
        return b"".join(m.get("body", b"") for m in self.sent)


async def test_frames_that_wait_go_out_in_one_write():
    async def source():
        for i in range(5):
            yield b"%d" % i

    wire = Wire()
    await EventStream([source()], lambda: b"end")({"type": "http"}, wire.receive, wire.send)
    assert wire.body == b"01234end"
    assert len(wire.sent) == 2  # the start, and one body


async def test_sources_wait_for_a_slow_reader():
    made = 0

    async def source():
        nonlocal made
        for _ in range(100):
            made += 1
            yield b"x" * (MAX_BUFFERED_BYTES // 4)
            await asyncio.sleep(0)

    wire = Wire()
    wire.may_write.clear()
    task = asyncio.create_task(
        EventStream([source()], lambda: b"")({"type": "http"}, wire.receive, wire.send)
    )
    for _ in range(50):
        await asyncio.sleep(0)
    assert made <= 6
    wire.may_write.set()
    await task
    assert made == 100
    assert len(wire.body) == 100 * (MAX_BUFFERED_BYTES // 4)


async def test_leaving_closes_a_source_that_waits_for_room():
    closed = False

    async def source():
        nonlocal closed
        try:
            while True:
                yield b"x" * MAX_BUFFERED_BYTES
        finally:
            closed = True

    wire = Wire()
    wire.may_write.clear()
    task = asyncio.create_task(
        EventStream([source()], lambda: b"")({"type": "http"}, wire.receive, wire.send)
    )
    for _ in range(10):
        await asyncio.sleep(0)
    wire.left.set()
    wire.may_write.set()
    await task
    assert closed


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequest("no", param="x"), 400), (RuntimeError("secret text"), 500)]
)
async def test_an_error_before_the_first_frame_is_a_response(error, status, caplog):
    async def source():
        raise error
        yield b""

    async def other():
        await asyncio.sleep(60)
        yield b""

    wire = Wire()
    await EventStream([other(), source()], lambda: b"")({"type": "http"}, wire.receive, wire.send)
    assert wire.sent[0]["status"] == status
    assert b"secret" not in wire.body
    assert "secret" not in caplog.text
    assert ("RuntimeError" in caplog.text) == (status == 500)
