"""Instances that give KV to each other, asked with prompts that are worth it, and their books."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.faults.load import Question
from tests.faults.rig import Router, until

TOKENS = 48  # of an answer, at most
REST_S = 15.0  # after the last request everybody is at rest
IDLE = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting", "kv_peer_fetching", "kv_peer_providing")  # fmt: skip
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.3, "seed": 7, "top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.3},
)


def prompts(seed: int, lengths: Iterable[int], shared: int = 0) -> list[list[int]]:
    """Of so many tokens; every second one begins with the same `shared` ones."""
    chance = random.Random(seed)
    beginning = _tokens(chance, shared)
    return [
        (beginning if i % 2 else [])[:length]
        + _tokens(chance, length - (min(shared, length) if i % 2 else 0))
        for i, length in enumerate(lengths)
    ]


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(300, 4000) for _ in range(count)]


def known(url: str, asked: Sequence[list[int]], tokens: int = TOKENS) -> list[Question]:
    """With what one instance answers that is asked directly."""

    def one(i: int) -> Question:
        body = {
            "prompt": asked[i], "ignore_eos": True, "return_token_ids": True, **SAMPLINGS[i % len(SAMPLINGS)],
        }  # fmt: skip
        whole = http.post(
            f"{url}/v1/completions", json={"model": "demo", **body, "max_tokens": tokens}
        ).json()
        return Question(body, whole["choices"][0]["token_ids"])

    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(len(asked))))


def metrics(url: str) -> dict[str, float]:
    """By name without prefix; of those with labels the sum."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if line.startswith("xllm:"):
            name, _, value = line.removeprefix("xllm:").rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return defaultdict(float, found)  # what has labels is not there before it has happened


def total(urls: Iterable[str], name: str) -> float:
    return sum(metrics(url)[name] for url in urls)


def until_at_rest(urls: Iterable[str]) -> None:
    """No instance holds a block for anybody, or works for anybody."""
    for url in urls:
        until(
            lambda url=url: not any(metrics(url)[name] for name in IDLE),  # type: ignore[misc]
            f"{url} is at rest",
            REST_S,
        )


def helped(router: Router, id: str) -> list[dict[str, Any]]:
    """What the stages of a request got from other instances."""
    stages = router.http.get(f"/v1/requests/{id}").json()["completions"][0]["stages"]
    return [stage["kv_from"] for stage in stages if stage["kv_from"] is not None]
