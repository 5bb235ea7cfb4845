"""Routers are killed at load; whoever takes their place knows as much."""

from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.faults.load import Load, modelled_questions
from tests.faults.rig import Cluster, Router, cluster, kill, until

pytestmark = pytest.mark.timeout(120)
IDS = ("a", "b", "c")
READY = r"Ready: http"


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    with cluster() as one:
        one.modelled(*IDS)
        yield one


def known(router: Router) -> dict[str, int]:
    return {id: one["cached_blocks"][0] for id, one in router.instances().items()}


def test_one_of_two_is_killed_and_a_fresh_one_knows_what_is_cached(made):
    first, second = made.router(), made.router()
    for router in (first, second):
        router.until_serving(*IDS)
    with Load([first.url, second.url], modelled_questions()) as load:
        load.until_answered(12)
        kill(first.running)
        load.until_answered(24)
    load.check(4)
    assert load.seen.retried >= 1

    prefix = [7, *range(300, 420)]
    holder = second.complete(prompt=prefix, max_tokens=4).headers["x-xllm-instance"]
    fresh = made.router()
    took_s = until(lambda: known(fresh) == known(second) and all(known(fresh).values()), "the same index", 10)
    assert took_s < 10
    for n in range(4):
        answer = fresh.complete(prompt=[*prefix, 30 + n], max_tokens=4)
        assert answer.headers["x-xllm-instance"] == holder
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 112


def processes(router: Router) -> list[psutil.Process]:
    """Those that answer; besides them there are such as wait for their end."""
    return [
        child for child in psutil.Process(router.running.process.pid).children() if "--processes" in child.cmdline()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def twofold(made) -> Router:
    """One of two processes. The first `Ready` is that of one of them."""
    router = made.router("--processes", "2")
    router.running.wait_for(READY)
    router.until_serving(*IDS)
    return router


def test_any_process_tells_where_a_request_went(twofold):
    answers = [twofold.complete(prompt=[50 + n], max_tokens=3) for n in range(4)]
    for answer in answers:
        id = answer.json()["id"]
        for _ in range(8):  # a connection each, so that both are asked
            told = httpx.get(f"{twofold.url}/v1/requests/{id}")
            assert told.status_code == 200, told.text
            (completion,) = told.json()["completions"]
            assert completion["stages"][0]["instance"] == answer.headers["x-xllm-instance"]
    assert httpx.get(f"{twofold.url}/v1/requests/nobody").status_code == 404


def test_one_process_of_a_router_is_killed_and_replaced(twofold):
    there = processes(twofold)
    assert len(there) == 2
    with Load([twofold.url, twofold.url], modelled_questions()) as load:
        load.until_answered(8)
        there[0].kill()
        load.until_answered(8)
        twofold.running.wait_for(READY)
        assert len(processes(twofold)) == 2 and there[0] not in processes(twofold)
        load.until_answered(8)
    load.check(3)
