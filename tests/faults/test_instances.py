"""Instances with the demo model are killed, stopped and shut down at load: nothing is lost, wrong, missing or doubled."""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.faults.load import Load, Question
from tests.faults.rig import (
    NOTICED_S,
    Cluster,
    Router,
    cluster,
    go_on,
    kill,
    stop_the_world,
    until,
)

IDS = ("a", "b", "c")
LONG = 1900  # tokens
pytestmark = pytest.mark.timeout(180)
PROMPTS = ("Once upon a time", "What is xLLM?", "1 + 1 =", "日本語 🗼 und Grüße", "{")
SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.3, "seed": 7, "top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.3},
)


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    with cluster() as one:
        one.urls = one.real(*IDS, flags=("--shutdown-timeout", "20"))  # type: ignore[attr-defined]
        yield one


@pytest.fixture(scope="module")
def questions(made) -> list[Question]:
    """With what one instance answers that is asked directly."""
    found = []
    with httpx.Client(timeout=60) as http:
        for prompt in PROMPTS:
            for sampling in SAMPLINGS:
                body = {"prompt": prompt, "ignore_eos": True, "return_token_ids": True, **sampling}
                whole = http.post(f"{made.urls['a']}/v1/completions", json={**body, "max_tokens": 500}).json()
                found.append(Question(body, whole["choices"][0]["token_ids"]))
    return found


@pytest.fixture(scope="module")
def shared(made, questions) -> Router:
    return made.router()


@pytest.fixture
def router(made, shared) -> Router:
    """All instances serve."""
    for id, running in made.instances.items():
        if running.process.poll() is not None:
            made.restart(id)
    shared.until_serving(*IDS, timeout_s=60)
    return shared


def away(router: Router, id: str) -> bool:
    return id not in router.serving()


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "its engine only"])
def test_killed_at_load(made, router, questions, whole):
    with Load(router.url, questions) as load:
        load.until_answered(8)
        victim = made.instances["b"]
        if whole:
            kill(victim)
        else:
            (engine,) = victim.children()
            engine.kill()
        assert until(lambda: away(router, "b"), "it is noticed") < NOTICED_S
        load.until_answered(16)
    load.check(3)
    assert load.seen.longest_pause_s < NOTICED_S + 1
    assert victim.process.wait(20) != 0
    until(lambda: "b" not in router.instances(), "it is not a member any more", 25)


def test_stopped_at_load_and_continued(made, router, questions):
    victim = made.instances["c"]
    with Load(router.url, questions) as load:
        load.until_answered(8)
        stop_the_world(victim)
        assert until(lambda: away(router, "c"), "it is noticed") < NOTICED_S + 0.5  # and a poll
        load.until_answered(8)
        assert load.seen.longest_pause_s < NOTICED_S + 2
        go_on(victim)
        router.until_serving(*IDS)
        before = router.told()["counts"]["by_instance"]["c"]
        load.until_answered(8)
        until(lambda: router.told()["counts"]["by_instance"]["c"] > before, "it gets requests again")
    load.check(3)


def test_shut_down_at_load_it_finishes_what_runs(made, router, questions):
    victim = made.instances["a"]
    with Load(router.url, questions) as load:
        load.until_answered(8)
        victim.terminate()
        until(lambda: away(router, "a"), "it drains")
        assert victim.process.wait(25) == 0
        load.until_answered(8)
    load.check(3)


def test_shut_down_without_patience_what_runs_goes_elsewhere(made, router, questions):
    """One answer is so long that it cannot have ended by then."""
    body = {
        "prompt": "Once upon a time",
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
        "max_tokens": LONG,
    }
    whole = router.complete(**body).json()["choices"][0]["token_ids"]
    made.real("hasty", flags=("--shutdown-timeout", "0"))
    hasty = made.instances.pop("hasty")
    router.until_serving(*IDS, "hasty")
    with Load(router.url, questions, clients=12) as load, httpx.Client(timeout=60) as http:
        load.until_answered(8)
        while True:  # until one is there
            with http.stream("POST", f"{router.url}/v1/completions", json={**body, "stream": True}) as answer:
                if answer.headers["x-xllm-instance"] != "hasty":
                    continue
                before = router.told()["counts"]["moves"]
                hasty.terminate()
                got = [id for frame in frames(answer) for id in frame["choices"][0]["token_ids"]]
                break
        assert hasty.process.wait(25) == 0
        load.until_answered(8)
        assert router.told()["counts"]["moves"] > before
    assert got == whole
    load.check(3)


def frames(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_a_router_that_is_stopped_for_a_while_loses_nothing(made, router, questions):
    """Three seconds, and nobody takes its own absence for that of others. Seven, and instances have given it up: what it had
    there begins again, and until they have it back it turns others away."""
    with Load(router.url, questions, clients=4, hold_s=0.1) as load:
        load.until_answered(4)
        before = router.told()["counts"]["moves"]
        for stopped_s in (3.0, 7.0):
            os.kill(router.running.process.pid, signal.SIGSTOP)
            time.sleep(stopped_s)
            os.kill(router.running.process.pid, signal.SIGCONT)
            load.until_answered(4)
            if stopped_s == 3.0:
                assert router.told()["counts"]["moves"] == before and not load.seen.refused
        router.until_serving(*IDS)
        refused = dict(load.seen.refused)
        load.until_answered(8)
    assert not load.seen.wrong, load.seen.wrong[:5]
    assert dict(load.seen.refused) == refused and refused.keys() <= {503}
