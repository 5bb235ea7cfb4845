"""One streamed request to an OpenAI-style API, seen from the client."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from xllm.bench.http import HttpClient
from xllm.bench.metrics import Record
from xllm.bench.sse import SseParser


@dataclass(frozen=True, slots=True)
class Ask:
    """What to send: a prompt as text or as token ids, and how many tokens to ask for."""

    prompt: str | list[int]
    prompt_tokens: int  # as far as we know; the server's own count wins
    max_tokens: int
    at: float | None = None  # seconds from the start, where the data set brings its own times
    hang_up_after: int | None = None  # pieces of the answer after which the connection is closed


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def carries(self) -> bool:
        return bool(self.content or self.reasoning or self.reasoning_content or self.tool_calls)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Frame(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_frames = msgspec.json.Decoder(_Frame)


class Stream:
    """Collects one response. `take` is called with every piece of the body, `on_enough` once so many tokens are there."""

    def __init__(
        self, record: Record, enough: int | None = None, on_enough: Callable[[], object] = lambda: None
    ):
        self.record = record
        self._enough, self._on_enough = enough, on_enough
        self._sse = SseParser()
        self._failed = bytearray()
        self._text: list[str] = []

    def take(self, status: int, piece: bytes, now: float) -> None:
        if status != 200:
            self._failed += piece
            return
        for data in self._sse.feed(piece):
            self._frame(data, now)
        if self._enough is not None and len(self.record.arrivals) >= self._enough:
            self._on_enough()

    def finish(self, status: int, now: float) -> Record:
        record = self.record
        if status != 200:
            record.error = f"HTTP {status}: {_message(bytes(self._failed))}"
        for data in self._sse.close():
            self._frame(data, now)
        if record.error is None and not record.arrivals:
            record.error = "the response carried no tokens"
        record.text = "".join(self._text)
        record.output_tokens = record.output_tokens or len(record.arrivals)
        return record

    def _frame(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            return
        try:
            frame = _frames.decode(data)
        except msgspec.DecodeError as e:
            self.record.error = f"a frame is not what the API says: {e}"
            return
        if frame.error is not None:
            self.record.error = _message(data)
        if frame.usage is not None and frame.usage.completion_tokens is not None:
            self.record.output_tokens = frame.usage.completion_tokens
            self.record.prompt_tokens = frame.usage.prompt_tokens or self.record.prompt_tokens
        for choice in frame.choices:
            self._choice(choice, now)

    def _choice(self, choice: _Choice, now: float) -> None:
        if choice.delta is None:  # completions: a token may well have no text of its own
            self.record.arrivals.append(now)
            self._text.append(choice.text or "")
        elif choice.delta.carries or (choice.finish_reason and not self.record.arrivals):
            self.record.arrivals.append(now)  # chat: the chunk that only names the role is not a token
            self._text.append(choice.delta.content or "")


def request_body(ask: Ask, *, backend: str, model: str, temperature: float | None, ignore_eos: bool) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": ask.prompt}]
    else:
        body["prompt"] = ask.prompt
    if temperature is not None:
        body["temperature"] = temperature
    if ignore_eos:  # not in OpenAI's API, hence sent only when asked for
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


async def complete(client: HttpClient, request: bytes, ask: Ask) -> Record:
    """Never raises for what a server or a network does; the record's `error` says it."""
    record = Record(start=time.perf_counter(), prompt_tokens=ask.prompt_tokens)
    answered: asyncio.Task[int] | None = None

    def hang_up() -> None:
        assert answered is not None
        record.cancelled = answered.cancel()  # which closes the connection

    stream = Stream(record, ask.hang_up_after, hang_up)
    try:
        answered = asyncio.create_task(client.stream(request, stream.take))
        stream.finish(await answered, time.perf_counter())
    except asyncio.CancelledError:
        if not record.cancelled:
            raise
    except TimeoutError:
        record.error = "timed out"
    except OSError as e:
        record.error = str(e)
    record.end = time.perf_counter()
    return record


def _message(body: bytes) -> str:
    """The `error.message` of an OpenAI-style error body, or its first 200 characters."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
