"""Traces for `benchmarks.routing`, and a player that sends them to real servers and sees what comes back."""

import asyncio
import json
import math
import random
import time
from dataclasses import dataclass
from typing import Any

from xllm.bench.datasets import TRACE_BLOCK
from xllm.bench.http import HttpClient
from xllm.bench.sse import SseParser
from xllm.bench.trace import TraceRequest

MODEL, IDS = "demo", range(300, 3800)  # of its vocabulary
LONGEST = 1800  # tokens of a prompt
OUTPUT = 12
SYSTEMS, SYSTEM_BLOCKS = 12, 2  # system prompts of 1024 tokens; all of them are more than one cache holds
BEFORE_S = 20.0  # so long before the trace conversations begin, for the rate to be even


def shared(rng: random.Random, seconds: float, rate: float) -> list[TraceRequest]:
    """Conversations of four or so turns over one of the system prompts, `rate` requests per second."""
    rows: list[TraceRequest] = []
    ids = iter(range(10**6, 10**9))
    systems = [[n * SYSTEM_BLOCKS + k for k in range(SYSTEM_BLOCKS)] for n in range(SYSTEMS)]
    at, number = -BEFORE_S, 0
    while at < seconds:
        at += rng.expovariate(rate / 4)
        number += 1
        when, blocks, first = at, list(rng.choice(systems)), True
        length = len(blocks) * TRACE_BLOCK
        for _ in range(rng.randint(2, 6)):
            length += round(min(300, 70 * math.exp(rng.gauss(0, 0.6))))
            if length > LONGEST:
                break
            while len(blocks) * TRACE_BLOCK < length:
                blocks.append(next(ids))
            delay = rng.uniform(1500, 4500)
            if 0 <= when < seconds:
                rows.append(
                    TraceRequest(
                        when * 1000, length, OUTPUT, tuple(blocks), str(number), None if first else delay
                    )
                )
                first = False
            length += OUTPUT
            when += delay / 1000 + 0.2
    return sorted(rows, key=lambda row: row.timestamp)


def strangers(rng: random.Random, seconds: float, rate: float) -> list[TraceRequest]:
    rows, at, id = [], rng.expovariate(rate), 10**6
    while at < seconds:
        length = round(min(LONGEST, 350 * math.exp(rng.gauss(0, 0.7))))
        blocks = range(id, id + -(-length // TRACE_BLOCK))
        id += len(blocks)
        rows.append(TraceRequest(at * 1000, length, OUTPUT, tuple(blocks)))
        at += rng.expovariate(rate)
    return rows


TRACES = {"shared": shared, "strangers": strangers}


def reusable(rows: list[TraceRequest]) -> float:
    """The part of the prompts that came before, in a system prompt or a turn: what a cache without end would find."""
    seen: set[int] = set()
    last: dict[str, int] = {}
    found = 0
    for row in rows:
        known = TRACE_BLOCK * SYSTEM_BLOCKS if row.hash_ids[0] in seen else 0
        if row.session_id is not None:
            known = max(known, last.get(row.session_id, 0))
            last[row.session_id] = row.input_length + row.output_length
        seen.update(row.hash_ids)
        found += known
    return found / sum(row.input_length for row in rows)


# ---- real instances


@dataclass(slots=True)
class Answer:
    sent: float
    first: float = 0.0
    end: float = 0.0
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    error: str | None = None


class Player:
    """Sends the requests of a trace when they are due; a later turn so long after the answer before it."""

    def __init__(self, rows: list[TraceRequest], client: HttpClient, salt: str):
        self._rows, self._client, self._salt = rows, client, salt
        self._rng = random.Random("answers")
        self._blocks: dict[int, list[int]] = {}
        self._said: dict[str, list[int]] = {}  # by session: the last prompt and its answer
        self.answers: dict[TraceRequest, Answer] = {}

    async def play(self) -> float:
        """Seconds that it took."""
        self._begin = time.perf_counter()
        alone = [[row] for row in self._rows if row.session_id is None]
        sessions: dict[str, list[TraceRequest]] = {}
        for row in self._rows:
            if row.session_id is not None:
                sessions.setdefault(row.session_id, []).append(row)
        await asyncio.gather(*map(self._session, [*alone, *sessions.values()]))
        return time.perf_counter() - self._begin

    async def _session(self, rows: list[TraceRequest]) -> None:
        for row in rows:
            due = self._begin + row.timestamp / 1000
            await asyncio.sleep(due - time.perf_counter() if row.delay is None else row.delay / 1000)
            await self._ask(row)

    async def _ask(self, row: TraceRequest) -> None:
        prompt = self._prompt(row)
        asked = {
            "model": MODEL, "prompt": prompt, "max_tokens": row.output_length, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, "cache_salt": self._salt,
        }  # fmt: skip
        request = self._client.prepare("POST", "/v1/completions", json.dumps(asked).encode())
        answer, sse, tokens = Answer(time.perf_counter()), SseParser(), list[int]()
        self.answers[row] = answer

        def take(status: int, piece: bytes, now: float) -> None:
            if status != 200:
                answer.error = f"{status} {piece[:200].decode(errors='replace')}"
                return
            answer.first = answer.first or now
            for data in sse.feed(piece):
                if data != b"[DONE]":
                    _read(json.loads(data), answer, tokens)

        try:
            await self._client.stream(request, take)
        except OSError as e:
            answer.error = str(e)
        answer.end, answer.tokens = time.perf_counter(), len(tokens)
        if answer.error is None and len(tokens) != row.output_length:
            answer.error = f"{len(tokens)} tokens came, not {row.output_length}"
        if row.session_id is not None:
            self._said[row.session_id] = prompt + tokens

    def _prompt(self, row: TraceRequest) -> list[int]:
        tokens: list[int] = []
        for id in row.hash_ids:
            if id not in self._blocks:
                self._blocks[id] = random.Random(id).choices(IDS, k=TRACE_BLOCK)
            tokens += self._blocks[id]
        tokens = tokens[: row.input_length]
        before = self._said.get(row.session_id or "", [])
        tokens[: len(before)] = before
        return tokens


def _read(frame: dict[str, Any], answer: Answer, tokens: list[int]) -> None:
    if "error" in frame:
        answer.error = str(frame["error"])
    for choice in frame.get("choices", ()):
        tokens += choice.get("token_ids") or ()
    if usage := frame.get("usage"):
        answer.prompt = usage["prompt_tokens"]
        answer.cached = usage["prompt_tokens_details"]["cached_tokens"]


async def play(url: str, rows: list[TraceRequest], salt: str) -> dict[str, Any]:
    async with HttpClient(url) as client:
        player = Player(rows, client, salt)
        seconds = await player.play()
    answers = [player.answers[row] for row in rows]
    done = [answer for answer in answers if answer.error is None]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(done),
        "errors": sorted({answer.error for answer in answers if answer.error})[:3],
        "ttfts_ms": [None if a.error else (a.first - a.sent) * 1000 for a in answers],  # in the trace's order
        "hit_rate": sum(a.cached for a in done) / max(1, sum(a.prompt for a in done)),
        "tokens_s": sum(a.tokens for a in done) / seconds,
        "seconds": seconds,
    }
