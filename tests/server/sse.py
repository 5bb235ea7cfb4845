"""Reading server-sent events, strictly: anything that is not the expected framing fails the test."""

import json
from collections.abc import Iterator
from typing import Any

import httpx


def parse(text: str) -> list[Any]:
    """Every event's JSON; the last event must be [DONE]."""
    assert text.endswith("\n\n")
    payloads = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: "), block
        assert "\n" not in block
        payloads.append(block[6:])
    assert payloads.pop() == "[DONE]"
    return [json.loads(payload) for payload in payloads]


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    return parse(response.text)


def deltas(chunks: list[Any], index: int = 0) -> Iterator[str]:
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                yield choice["delta"].get("content", "") if "delta" in choice else choice["text"]
