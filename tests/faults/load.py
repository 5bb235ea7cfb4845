"""Clients that ask a cluster without a pause and know the right answers."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.rig import VOCABULARY, Router, until
from xllm.engine.modelled_runner import Words, answer

TIMEOUT_S = 60.0
RETRY_S = 0.1  # clients pause before they ask again; who ends takes a moment for it


@dataclass(frozen=True)
class Question:
    body: dict[str, Any]
    tokens: list[int]  # of the right answer, as many as are ever asked for


def modelled_questions(number: int = 40, tokens: int = 400) -> list[Question]:
    prompts = [[20 + n, *range(100, 130 + n)] for n in range(number)]
    return [Question({"prompt": prompt}, answer(prompt, tokens, Words(VOCABULARY))) for prompt in prompts]


def answered(router: Router, questions: list[Question], tokens: int = 300) -> list[Question]:
    """The same prompts, with what the cluster says to them while nothing happens to it."""
    found = []
    for question in questions:
        answer = router.complete(**question.body, max_tokens=tokens).json()
        found.append(Question(question.body, answer["choices"][0]["token_ids"]))
    return found


@dataclass
class Seen:
    answered: Counter[str] = field(default_factory=Counter)  # "stream", "whole"
    refused: Counter[int] = field(default_factory=Counter)  # by status; with Retry-After
    retried: int = 0
    wrong: list[str] = field(default_factory=list)  # what must not be
    longest_pause_s: float = 0.0  # between two tokens of a stream


class Cut(Exception):
    """The connection has ended before the answer."""


class Load:
    """`clients` at once; half of what they ask is streamed. With several `urls` a client whose answer is cut asks once more,
    elsewhere. Of what a refusal says in Retry-After at most `hold_s` are waited for. What is cached of one of `salts` is
    not used for another: which one a question goes with is left to chance."""

    def __init__(
        self, urls: str | Sequence[str], questions: list[Question], clients: int = 8, *,
        most: int = 400, hold_s: float = 0.0, salts: Sequence[str] = ("",),
    ):  # fmt: skip
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        self.seen = Seen()
        self._questions, self._clients, self._most, self._hold_s = questions, clients, most, hold_s
        self._salts = salts
        self._ending = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Nobody asks any more; what was asked is answered."""
        self._ending = True
        self._thread.join()

    def until_answered(self, number: int, timeout_s: float = 30.0) -> None:
        """So many more than there are."""
        goal = self.seen.answered.total() + number
        until(
            lambda: self.seen.answered.total() >= goal or self.seen.wrong, f"{number} more answers", timeout_s
        )

    def check(self, least: int = 1) -> None:
        """0 lost, 0 wrong, 0 missing, 0 doubled, nobody turned away."""
        assert not self.seen.wrong, self.seen.wrong[:5]
        assert not self.seen.refused, self.seen.refused
        assert min(self.seen.answered["stream"], self.seen.answered["whole"]) >= least, self.seen

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self._clients)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while not self._ending:
            question = chance.choice(self._questions)
            count = chance.randint(1, min(self._most, len(question.tokens)))
            stream = chance.random() < 0.5
            first = chance.randrange(len(self.urls))
            body = {**question.body, "cache_salt": chance.choice(self._salts)}
            asked = Question(body, question.tokens)
            for url in (self.urls[first:] + self.urls[:first])[:2]:
                try:
                    await self._ask(http, url, asked, count, stream)
                    break
                except (Cut, httpx.HTTPError) as e:
                    why = f"{type(e).__name__}: {e}"
                    self.seen.retried += 1
                    await asyncio.sleep(RETRY_S)
            else:
                self.seen.wrong.append(f"lost, {'streamed' if stream else 'whole'}: {why}")

    async def _ask(
        self, http: httpx.AsyncClient, url: str, question: Question, count: int, stream: bool
    ) -> None:
        body = {
            "model": "demo", "temperature": 0, "ignore_eos": True, "return_token_ids": True, **question.body,
            "max_tokens": count, "stream": stream,
        }  # fmt: skip
        async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code in (429, 503) and "retry-after" in response.headers:
                self.seen.refused[response.status_code] += 1
                await asyncio.sleep(min(self._hold_s, float(response.headers["retry-after"])))
                return
            if response.status_code != 200:
                raise Cut(f"{response.status_code} {(await response.aread())[:200]!r}")
            if stream:
                tokens = await self._read(response)
            else:
                tokens = json.loads(await response.aread())["choices"][0]["token_ids"]
        if tokens == question.tokens[:count]:
            self.seen.answered["stream" if stream else "whole"] += 1
        else:
            at = next(
                (i for i, (a, b) in enumerate(zip(tokens, question.tokens, strict=False)) if a != b), -1
            )
            self.seen.wrong.append(
                f"{len(tokens)} tokens instead of {count}, the first wrong one: {at}, streamed: {stream}"
            )

    async def _read(self, response: httpx.Response) -> list[int]:
        tokens: list[int] = []
        last: float | None = None
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return tokens
            if not line:
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Cut(str(event["error"]))
            tokens += event["choices"][0].get("token_ids") or []
            now = time.monotonic()
            self.seen.longest_pause_s = max(self.seen.longest_pause_s, now - (last or now))
            last = now
        raise Cut(f"after {len(tokens)} tokens")
