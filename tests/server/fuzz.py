"""Requests that make sense and that do not, and the storm of them beside a canary."""

import asyncio
import json
import random
from typing import Any

import httpx

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, -1e308, 10**30, 2**63, -(2**63), "", "x", "é🗼", "\x00", "a" * 3000,
    [], [1], [[1]], ["a"], [None], {}, {"a": 1}, {"type": "text"}, [{"role": "user", "content": "hi"}], ["<|im_end|>"] * 3,
    [1, "a"], {"1": 1}, {"-1": 5}, {"99999": 1.0}, [10**12], [-5], [258, 0, 2],
]  # fmt: skip
RAW = [
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"01",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"",
]
SHARED = """model n temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty logit_bias
allowed_token_ids bad_words seed stop stop_token_ids include_stop_str_in_output ignore_eos max_tokens min_tokens
prompt_logprobs skip_special_tokens truncate_prompt_tokens add_special_tokens return_token_ids priority deadline_s
cache_salt stream stream_options user metadata store service_tier structured_outputs nonsense""".split()
DOORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "/v1/completions": ({"prompt": "hi", "max_tokens": 4}, [*SHARED, "prompt", "best_of", "echo", "logprobs", "suffix"]),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        [*SHARED, "messages", "tools", "tool_choice", "logprobs", "top_logprobs", "response_format",
         "chat_template_kwargs", "continue_final_message", "add_generation_prompt", "max_completion_tokens"],
    ),
    "/tokenize": ({"prompt": "hi"}, ["prompt", "messages", "add_special_tokens", "return_token_strs", "model"]),
    "/detokenize": ({"tokens": [70, 71]}, ["tokens", "model", "skip_special_tokens"]),
}  # fmt: skip


def request(chance: random.Random) -> tuple[str, bytes]:
    path = chance.choice(list(DOORS))
    base, fields = DOORS[path]
    body = dict(base)
    for name in chance.sample(fields, min(len(fields), chance.choice([0, 1, 1, 1, 2, 2, 5]))):
        body[name] = chance.choice(VALUES)
    data = json.dumps(body).encode()
    kind = chance.random()
    if kind < 0.05:
        field = json.dumps(chance.choice(fields)).encode()
        data = data[:-1] + b", " + field + b": " + chance.choice(RAW) + b"}"
    elif kind < 0.08:
        at = chance.randrange(len(data))
        data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    elif kind < 0.1:
        data = data[: chance.randrange(len(data))]
    return path, data


def check(response: httpx.Response, data: bytes) -> None:
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, (response.status_code, response.text, data[:500])
    error = json.loads(response.text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)


async def storm(url: str, count: int, *, seed: int, workers: int = 10) -> list[int]:
    """Sends `count` of them, `workers` at a time; returns the status codes. The canary must not change by a bit."""
    chance = random.Random(seed)
    canary = {"prompt": "canary", "temperature": 0, "max_tokens": 40, "logprobs": 2}
    jobs = [request(chance) for _ in range(count)]
    async with httpx.AsyncClient(
        base_url=url, timeout=60, limits=httpx.Limits(max_connections=2 * workers)
    ) as http:

        async def sing() -> str:
            answer = (await http.post("/v1/completions", json=canary)).json()
            return json.dumps(answer["choices"])

        async def worker() -> list[int]:
            codes = []
            while jobs:
                path, data = jobs.pop()
                response = await http.post(path, content=data, headers={"content-type": "application/json"})
                check(response, data)
                codes.append(response.status_code)
            return codes

        alone = await sing()
        running = asyncio.gather(*(worker() for _ in range(workers)))
        songs = 0
        while not running.done():
            assert await sing() == alone
            songs += 1
        codes = [code for part in await running for code in part]
    assert songs >= 2
    assert len(codes) == count
    assert 0.1 < codes.count(200) / count < 0.9  # both kinds were really sent
    return codes
