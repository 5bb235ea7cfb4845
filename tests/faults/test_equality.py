"""The same request gives the same answer directly, through a router, moved in its middle, and after all instances were restarted.

On a CPU in float32, where what is computed does not depend on what else is (`docs/decisions/moving.md`): equal to the bit."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.faults.rig import Cluster, Router, cluster, kill

pytestmark = pytest.mark.timeout(180)
TOKENS = 300
SAMPLED = {"temperature": 1.2, "seed": 11}
PENALTIES = {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
ASKS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "Once upon a time", "temperature": 0},
    "greedy, penalties, logprobs": {"prompt": "{", "temperature": 0, "logprobs": 3, **PENALTIES},
    "seeded": {"prompt": "What is xLLM?", **SAMPLED},
    "seeded, narrow": {"prompt": "1 + 1 =", **SAMPLED, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "seeded, penalties": {"prompt": "日本語 🗼 und Grüße", **SAMPLED, **PENALTIES, "logit_bias": {"300": 3}},
    "n=2, logprobs": {"prompt": "A list:", **SAMPLED, "n": 2, "logprobs": 2},
    "min_tokens": {"prompt": "\n\n", **SAMPLED, "min_tokens": 200, "ignore_eos": False},
}
Answer = dict[int, tuple[Any, ...]]  # by choice


class Stream:
    """A streamed answer, as far as it has come."""

    def __init__(self, url: str, ask: dict[str, Any]):
        self.events: list[dict[str, Any]] = []
        self.flows = threading.Event()
        body = {"model": "demo", "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, **ask}
        self._url, self._body = f"{url}/v1/completions", {**body, "stream": True}

    def read(self) -> Answer:
        done = False
        with httpx.stream("POST", self._url, json=self._body, timeout=90) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                done = done or line == "data: [DONE]"
                if line and not done:
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    if len(self.events) == 10:
                        self.flows.set()
        assert done, "cut short"
        return self.answer()

    @property
    def id(self) -> str:
        return str(self.events[0]["id"])

    def answer(self) -> Answer:
        choices = [choice for event in self.events for choice in event["choices"]]
        return {
            index: _whole([c for c in choices if c["index"] == index])
            for index in {c["index"] for c in choices}
        }


def _whole(parts: list[dict[str, Any]]) -> tuple[Any, ...]:
    logprobs = [part["logprobs"] for part in parts if part.get("logprobs")]
    return (
        "".join(part["text"] for part in parts),
        [id for part in parts for id in part.get("token_ids") or []],
        [[x for one in logprobs for x in one[key]] for key in ("tokens", "token_logprobs", "top_logprobs")],
        parts[-1]["finish_reason"],
        parts[-1]["stop_reason"],
    )


def ask_all(url: str, asks: dict[str, dict[str, Any]]) -> dict[str, Answer]:
    with ThreadPoolExecutor(len(asks)) as pool:
        return dict(zip(asks, pool.map(lambda ask: Stream(url, ask).read(), asks.values()), strict=True))


def stopped(answer: Answer) -> dict[str, Any]:
    """The same as was answered without, up to a string that comes late in it and not before."""
    text = answer[0][0]
    for at in range(len(text) * 2 // 3, len(text) - 8):
        if text.index(text[at : at + 6]) == at:
            return {"prompt": ASKS["seeded"]["prompt"], **SAMPLED, "stop": [text[at : at + 6]]}
    raise AssertionError("everything in it comes twice")


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    with cluster() as one:
        yield one


def moved(router: Router, asks: dict[str, dict[str, Any]], made: Cluster) -> dict[str, Answer]:
    """All are in the middle of their answer on `a`; it is killed, and `b` comes."""
    streams = {name: Stream(router.url, ask) for name, ask in asks.items()}
    with ThreadPoolExecutor(len(asks)) as pool:
        reading = {name: pool.submit(stream.read) for name, stream in streams.items()}
        for name, stream in streams.items():
            assert stream.flows.wait(30), name
        assert not any(one.done() for one in reading.values())
        kill(made.instances["a"])
        made.real("b")
        answers = {name: one.result() for name, one in reading.items()}
    for name, stream in streams.items():
        for completion in router.http.get(f"/v1/requests/{stream.id}").json()["completions"]:
            stages = [(one["instance"], one["tokens"] > 0) for one in completion["stages"]]
            assert stages == [("a", True), ("b", True)], name
    return answers


def test_equal_however_it_came_about(made):
    direct_url = made.real("a")["a"]
    router = made.router()
    router.until_serving("a")
    asks = dict(ASKS)
    direct = ask_all(direct_url, asks)
    asks["stop string"] = stopped(direct["seeded"])
    direct["stop string"] = Stream(direct_url, asks["stop string"]).read()
    assert direct["stop string"][0][3:] == ("stop", asks["stop string"]["stop"][0])
    assert len(direct["n=2, logprobs"]) == 2
    alone = {name: Stream(router.url, ask).read() for name, ask in asks.items()}
    assert alone == direct
    assert ask_all(router.url, asks) == direct
    assert moved(router, asks, made) == direct

    made.restart("a")
    router.until_serving("a", "b", timeout_s=60)
    before = router.instances()["b"]["epoch"]
    made.instances["b"].terminate()
    assert made.instances["b"].process.wait(40) == 0
    made.restart("b")
    router.until_restarted("b", before)
    router.until_serving("a", "b", timeout_s=60)
    assert ask_all(router.url, asks) == direct
