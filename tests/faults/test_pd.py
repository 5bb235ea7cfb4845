"""One instance computes prompts, two answer; each is killed, stopped and shut down at load. Answers are those of one instance
that is asked directly, and nobody holds a block for a request that is gone."""

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.faults.load import Load, Question
from tests.faults.pd import TOKENS, helped, known, metrics, prompts, total, until_at_rest
from tests.faults.rig import (
    EAGER,
    NOTICED_S,
    Cluster,
    Router,
    cluster,
    go_on,
    kill,
    stop_the_world,
    until,
)
from tests.server.command import url_of

ROLES = {"p": "prefill", "d1": "decode", "d2": "decode"}
ROOMY = ("--kv-cache-memory-bytes", str(128 << 20), "--shutdown-timeout", "20")
LENGTHS = (20, 700, 1500, 1400, 900, 60, 1200, 950, 640, 1100, 1300, 800)
SHARED = 512  # tokens with which every second prompt begins
STOPPED_S = 8.0
pytestmark = pytest.mark.timeout(180)


class Pd:
    """A cluster with roles, and where its instances' own HTTP servers are."""

    def __init__(self, made: Cluster):
        self.made = made
        self.urls = made.real(*ROLES, flags=ROOMY, roles=ROLES)
        self.questions = known(self.urls["p"], prompts(1, LENGTHS, SHARED))
        self.plain: Router = made.router()
        self.router: Router = made.router(cli=EAGER)

    def load(self, name: str, clients: int = 8) -> Load:
        """Nothing of it is cached from before, and some of it is cached while it lasts."""
        salts = [f"{name} {i}" for i in range(6)]
        return Load(self.router.url, self.questions, clients, most=TOKENS, salts=salts)

    @property
    def long(self) -> list[Question]:
        return [one for one in self.questions if len(one.body["prompt"]) > 600]

    def ask(self, question: Question, salt: str) -> bool:
        """Whether the answer is right."""
        answer = self.router.complete(**question.body, max_tokens=TOKENS, cache_salt=salt).json()
        return bool(answer["choices"][0]["token_ids"] == question.tokens)

    def failures(self) -> float:
        return total([self.urls["d1"], self.urls["d2"]], "kv_peer_fetch_failures_total")

    def told(self, id: str, name: str) -> float:
        return metrics(self.urls[id])[name]

    def until_it_gives(self) -> None:
        """More than until now: routers send others there."""
        before = self.told("p", "kv_peer_provided_blocks_total")
        until(lambda: self.told("p", "kv_peer_provided_blocks_total") > before, "p gives KV")

    def restart(self, id: str) -> None:
        """It has ended."""
        self.made.restart(id)
        self.urls[id] = url_of(self.made.instances[id])
        self.router.until_serving(*ROLES, timeout_s=60)

    def until_at_rest(self) -> None:
        until_at_rest(self.urls.values())
        until(lambda: not any(one["requests"] for one in self.router.instances().values()), "the router is")


@pytest.fixture(scope="module")
def shared() -> Iterator[Pd]:
    with cluster() as made:
        yield Pd(made)


@pytest.fixture
def pd(shared) -> Pd:
    for id, running in shared.made.instances.items():
        if running.process.poll() is not None:
            shared.made.restart(id)
            shared.urls[id] = url_of(shared.made.instances[id])
    shared.router.until_serving(*ROLES, timeout_s=60)
    return shared


def test_equal_to_one_instance_that_is_asked_directly(pd):
    """First all is computed elsewhere, then some of it is cached here or there, then all of it here."""
    decode = [pd.urls["d1"], pd.urls["d2"]]
    names = "kv_peer_fetches_total", "kv_peer_fetched_blocks_total", "kv_peer_fetched_bytes_total"
    before = [total(decode, name) for name in names]

    def ask(question: Question) -> tuple[bool, list[dict[str, Any]]]:
        answer = pd.plain.complete(**question.body, max_tokens=TOKENS, cache_salt="equal").json()
        return answer["choices"][0]["token_ids"] == question.tokens, helped(pd.plain, answer["id"])

    found = [ask(question) for question in pd.questions]
    with ThreadPoolExecutor(4) as pool:
        found += pool.map(ask, pd.questions)
    assert all(equal for equal, _ in found)
    first = dict(zip(map(len, (one.body["prompt"] for one in pd.questions)), found, strict=False))
    long = [got for length, (_, got) in first.items() if length > 600]
    assert not any(got for length, (_, got) in first.items() if length < 100), "that is not worth it"
    came = [one for got in long for one in got if one["computes"]]
    assert len(came) >= len(long) / 2 and {one["instance"] for one in came} == {"p"}
    assert all(one["tokens"] >= 16 and one["waited_s"] > 0 for one in came)
    until(
        lambda: all(total(decode, name) > count for name, count in zip(names, before, strict=True)),
        "all of them have grown",
    )
    assert pd.told("p", "kv_peer_provided_blocks_total") > 0
    pd.until_at_rest()


def test_prefill_killed_while_it_computes_and_started_again(pd):
    with pd.load("killed") as load:
        load.until_answered(8)
        until(lambda: pd.told("p", "kv_peer_providing"), "it computes for somebody")
        epoch = pd.router.instances()["p"]["epoch"]
        kill(pd.made.instances["p"])
        until(lambda: "p" not in pd.router.serving(), "it is noticed", NOTICED_S)
        load.until_answered(8)  # alone
        pd.restart("p")
        assert pd.router.instances()["p"]["epoch"] > epoch
        pd.until_it_gives()
    load.check(3)
    pd.until_at_rest()


def test_prefill_stopped_and_continued(pd):
    """At first all that the others have to do is to wait for it: nobody takes that for a fault of theirs."""
    begin, moves = time.monotonic(), pd.router.told()["counts"]["moves"]
    stop_the_world(pd.made.instances["p"])
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(pd.ask, question, "stands") for question in pd.long[:4]]
        until(lambda: "p" not in pd.router.serving(), "it is noticed", NOTICED_S + 0.5)
        assert all(one.result() for one in asked)
    assert pd.router.told()["counts"]["moves"] == moves
    assert pd.failures() > 0
    with pd.load("stopped") as load:
        load.until_answered(16)
        time.sleep(max(0.0, begin + STOPPED_S - time.monotonic()))
        go_on(pd.made.instances["p"])
        pd.router.until_serving(*ROLES)
        pd.until_it_gives()
    load.check(3)
    pd.until_at_rest()


def test_decode_killed_while_it_fetches(pd):
    with pd.load("decode") as load:
        load.until_answered(8)
        moves = pd.router.told()["counts"]["moves"]
        stop_the_world(pd.made.instances["p"])  # else a fetch is over before anybody can see it
        until(lambda: pd.told("d1", "kv_peer_fetching"), "it fetches")
        kill(pd.made.instances["d1"])
        go_on(pd.made.instances["p"])
        until(lambda: pd.router.told()["counts"]["moves"] > moves, "the other one goes on")
        load.until_answered(16)
        pd.restart("d1")
        load.until_answered(8)
    load.check(3)
    pd.until_at_rest()


@pytest.mark.parametrize("stalled", [False, True], ids=["at any moment", "while the other side stands"])
def test_clients_that_go_while_their_kv_comes(pd, stalled):
    p = pd.made.instances["p"]
    gone_before = pd.router.told()["counts"]["paired"]
    if stalled:
        stop_the_world(p)
    try:
        asyncio.run(_ask_and_go(pd, 30, 0.0 if stalled else 0.25))
        until_at_rest([pd.urls["d1"], pd.urls["d2"]])
    finally:
        go_on(p)
    assert pd.router.told()["counts"]["paired"] > gone_before
    pd.until_at_rest()
    pd.router.until_serving(*ROLES)
    with pd.load(f"after {stalled}") as load:
        pd.until_it_gives()
        load.until_answered(8)
    load.check(1)


async def _ask_and_go(pd: Pd, number: int, most_s: float) -> None:
    """Connections are closed after a moment of chance, at most `most_s`; 0: once somebody fetches."""
    chance = random.Random(9)

    async def ask(http: httpx.AsyncClient, i: int) -> None:
        body = {"model": "demo", **pd.long[i % len(pd.long)].body, "max_tokens": 400, "cache_salt": f"gone {i} {most_s}"}  # fmt: skip
        await http.post(f"{pd.router.url}/v1/completions", json={**body, "stream": i % 2 == 0})

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:
        asked = [asyncio.create_task(ask(http, i)) for i in range(number)]
        if not most_s:
            await asyncio.to_thread(
                until, lambda: pd.told("d1", "kv_peer_fetching") or pd.told("d2", "kv_peer_fetching"), "it fetches"
            )  # fmt: skip
        for task in chance.sample(asked, number):
            await asyncio.sleep(chance.random() * 2 * most_s / number)
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def test_prefill_shut_down(pd):
    """What it computes for others ends well or is computed by them; nobody is sent there any more."""
    with pd.load("shut down") as load:
        load.until_answered(8)
        until(lambda: pd.told("p", "kv_peer_providing"), "it computes for somebody")
        pd.made.instances["p"].terminate()
        assert pd.made.instances["p"].process.wait(25) == 0
        load.until_answered(8)
    load.check(3)
    del pd.urls["p"]
    pd.until_at_rest()
