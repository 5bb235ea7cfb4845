"""A long prefix is cached where there is no room: who answers instead gets it from there, and says the same."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.faults.pd import helped, known, metrics, prompts, until_at_rest
from tests.faults.rig import Router, cluster, until

PLACES = 4
PREFIX, TOKENS = 1200, 700
FLAGS = ("--max-num-seqs", str(PLACES), "--kv-cache-memory-bytes", str(128 << 20))


def blocks(router: Router, id: str) -> int:
    """That the router knows of, on the device."""
    return int(router.instances()[id]["cached_blocks"][0])


@pytest.mark.timeout(120)
def test_a_prefix_comes_from_the_one_that_has_it_and_is_busy():
    with cluster() as made:
        urls = made.real("a", "b", flags=FLAGS)
        router = made.router()
        router.until_serving("a", "b")
        questions = known(urls["b"], prompts(8, [PREFIX + 80] * (2 * PLACES + 2), PREFIX)[1::2], TOKENS)
        assert len(questions) == PLACES + 1
        salt = "seen"
        before = {id: blocks(router, id) for id in urls}
        first = router.complete(**questions[0].body, max_tokens=2, cache_salt=salt).json()
        (stage,) = router.http.get(f"/v1/requests/{first['id']}").json()["completions"][0]["stages"]
        there = stage["instance"]
        here = {"a": "b", "b": "a"}[there]
        until(lambda: blocks(router, there) > before[there] + PREFIX // 16, "the router knows of it")
        with httpx.Client(timeout=60) as direct, ThreadPoolExecutor(PLACES) as pool:
            running = [
                pool.submit(
                    direct.post,
                    f"{urls[there]}/v1/completions",
                    json={"model": "demo", **one.body, "max_tokens": TOKENS, "cache_salt": salt},
                )
                for one in questions[:PLACES]
            ]
            until(lambda: router.instances()[there]["running"] == PLACES, f"{there} is full")
            answer = router.complete(**questions[PLACES].body, max_tokens=TOKENS, cache_salt=salt).json()
        assert answer["choices"][0]["token_ids"] == questions[PLACES].tokens
        for one, question in zip(running, questions, strict=False):
            assert one.result().json()["choices"][0]["token_ids"] == question.tokens
        (got,) = helped(router, answer["id"])
        assert (got["instance"], got["computes"]) == (there, False)
        assert got["tokens"] >= PREFIX // 2
        until(
            lambda: metrics(urls[here])["kv_peer_fetched_blocks_total"] * 16 >= PREFIX // 2, "it is counted"
        )
        until_at_rest(urls.values())
