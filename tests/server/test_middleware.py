"""The last resort for errors, and doors that are not HTTP."""

import pytest

from xllm.server.middleware import Envelope, KeyCheck


async def nothing():
    raise AssertionError("nothing is received here")


def test_an_unexpected_exception_says_nothing_about_itself(http, live, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError(" ".join(["own", "words"]))  # not in one piece in a traceback's source lines

    monkeypatch.setattr(live.engine.tokenizer, "decode", broken)
    response = http.post("/detokenize", json={"tokens": [70]})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "internal_error"
    assert response.headers["x-request-id"]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("xllm")]
    assert any("RuntimeError" in line and "tokenize.py" in line for line in ours)
    assert not any("own words" in line for line in ours)
    assert http.get("/health").status_code == 200


async def test_an_exception_after_the_start_breaks_the_answer_off(caplog):
    async def half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("".join(["sec", "ret"]))

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [], "method": "GET", "client": ("1.2.3.4", 5)}
    with pytest.raises(ConnectionAbortedError):
        await Envelope(half, log_requests=False)(scope, nothing, send)
    assert len(sent) == 1
    assert "secret" not in caplog.text


async def test_websockets_need_a_key_too():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    sent = []

    async def send(message):
        sent.append(message)

    door = Envelope(KeyCheck(app, ["k"], ""), log_requests=True)
    await door({"type": "websocket", "headers": [], "raw_path": b"/health"}, nothing, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert reached == []
    await door({"type": "lifespan"}, nothing, send)
    await door({"type": "websocket", "headers": [(b"authorization", b"Bearer k")]}, nothing, send)
    assert reached == ["lifespan", "websocket"]
