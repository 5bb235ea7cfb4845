"""What `benchmarks.pd` sends: steady streams with bursts of long prompts beside them, and single prompts."""

import asyncio
import bisect
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xllm.bench.completion import Ask, Stream, request_body
from xllm.bench.datasets import TRACE_BLOCK
from xllm.bench.http import HttpClient
from xllm.bench.metrics import Record, percentile
from xllm.bench.simulate import Replay
from xllm.bench.trace import TraceRequest
from xllm.core.peers import KvFrom
from xllm.core.sampling import SamplingParams
from xllm.wire.dial import Dial
from xllm.wire.messages import Message, Outputs, Ready, Submit

ANSWER_S = 60.0
BEFORE_S = 1.5  # streams run so long before the first burst; what comes then does not count


@dataclass(frozen=True, slots=True)
class Load:
    """Lengths in tokens. A stream that has ended is followed by another one."""

    streams: int
    stream_prompt: int
    stream_output: int
    burst: int  # long prompts that come together
    every_s: float
    bursts: int
    long_prompt: int
    long_output: int = 4


@dataclass(frozen=True, slots=True)
class Target:
    url: str
    model: str
    ids: range  # of which prompts are made; no two prompts begin alike


class Player:
    def __init__(self, target: Target, load: Load, seed: str):
        self._target, self._load = target, load
        self._rng = random.Random(seed)
        self.streams: list[Record] = []
        self.long: list[Record] = []

    async def play(self) -> tuple[float, float]:
        """When the first burst came and when the last long prompt was answered."""
        async with HttpClient(self._target.url) as self._client:
            streams = [asyncio.create_task(self._stream()) for _ in range(self._load.streams)]
            await asyncio.sleep(BEFORE_S)
            begin = time.perf_counter()
            bursts = [asyncio.create_task(self._burst(begin, n)) for n in range(self._load.bursts)]
            await asyncio.gather(*bursts)
            end = time.perf_counter()
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        return begin, end

    async def _stream(self) -> None:
        while True:
            await self._ask(self.streams, self._load.stream_prompt, self._load.stream_output)

    async def _burst(self, begin: float, n: int) -> None:
        await asyncio.sleep(begin + n * self._load.every_s - time.perf_counter())
        one = self.long, self._load.long_prompt, self._load.long_output
        await asyncio.gather(*(self._ask(*one) for _ in range(self._load.burst)))

    async def _ask(self, records: list[Record], prompt: int, output: int) -> None:
        request, record = prepared(self._client, self._target, self._rng, prompt, output)
        records.append(record)
        await answered(self._client, request, record)


def prepared(
    client: HttpClient, target: Target, rng: random.Random, prompt: int, output: int
) -> tuple[bytes, Record]:
    ask = Ask(rng.choices(target.ids, k=prompt), prompt, output)
    body = request_body(ask, backend="openai", model=target.model, temperature=0.0, ignore_eos=True)
    request = client.prepare("POST", "/v1/completions", body)
    return request, Record(start=time.perf_counter(), prompt_tokens=prompt)


async def answered(client: HttpClient, request: bytes, record: Record) -> None:
    stream = Stream(record)
    record.start = time.perf_counter()
    try:
        stream.finish(await client.stream(request, stream.take), time.perf_counter())
    except OSError as e:
        record.error = str(e)
        await asyncio.sleep(0.1)


def play(target: Target, load: Load, seed: str) -> dict[str, Any]:
    """Milliseconds, and rates per second from the first burst to the last answer to a long prompt."""
    player = Player(target, load, seed)
    begin, end = asyncio.run(player.play())
    gaps = [
        (early, late)
        for one in player.streams
        for early, late in zip(one.arrivals, one.arrivals[1:], strict=False)
        if begin <= early and late <= end
    ]
    answered = [one for one in player.long if one.error is None]
    tokens = sum(begin <= at <= end for one in player.streams for at in one.arrivals)
    return {
        **gaps_of(gaps, [(one.start, one.arrivals[0]) for one in answered]),
        "ttfts_ms": [one.ttft * 1e3 for one in answered],
        "stream_tokens_s": tokens / (end - begin),
        "prompts_s": len(answered) / (end - begin),
        "failed": sum(one.error is not None for one in [*player.streams, *player.long]),
        "errors": sorted({one.error for one in [*player.streams, *player.long] if one.error})[:3],
        "seconds": end - begin,
    }


Span = tuple[float, float]


def gaps_of(gaps: Sequence[Span], waits: Sequence[Span], scale: float = 1.0) -> dict[str, float]:
    """Milliseconds between tokens, of all and of those that came while a long prompt `waits` for its first token."""
    busy = list[Span]()
    for first, last in sorted(waits):
        if busy and first <= busy[-1][1]:
            busy[-1] = busy[-1][0], max(last, busy[-1][1])
        else:
            busy.append((first, last))
    begins = [first for first, _ in busy]

    def beside(gap: Span) -> bool:
        n = bisect.bisect_left(begins, gap[1])
        return n > 0 and busy[n - 1][1] > gap[0]

    every = [(late - early) * 1e3 / scale for early, late in gaps]
    some = [(late - early) * 1e3 / scale for early, late in gaps if beside((early, late))]
    named = {f"itl_p{p}_ms": percentile(every, p) for p in (50, 90, 99)}
    return {
        **named, "itl_max_ms": max(every, default=0.0), "gaps": len(every),
        "beside_p99_ms": percentile(some, 99), "gaps_beside": len(some),
    }  # fmt: skip


class Direct:
    """An engine's own door: no router decides who helps."""

    def __init__(self, address: str):
        self._dial = Dial(address, name="benchmark")
        self.block_bytes = 0
        if not self._dial.wait_ready(ANSWER_S):
            raise SystemExit(f"{address}: {self._dial.reason}")
        while not self.block_bytes:
            if isinstance(message := self._receive(), Ready):
                self.block_bytes = message.config.cache.block_bytes

    def first_token(self, id: str, prompt: list[int], kv_from: KvFrom | None = None) -> dict[str, float]:
        """Of a request with a token of answer: milliseconds, tokens that came from `kv_from`, milliseconds that it waited for them."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        self._dial.send(Submit(request_id=id, prompt_token_ids=prompt, params=params, kv_from=kv_from))
        while True:
            message = self._receive()
            for output in message.outputs if isinstance(message, Outputs) else ():
                if output.request_id == id and output.finish is not None:
                    took = 1e3 * (time.perf_counter() - begin)
                    if output.error is not None:
                        raise SystemExit(output.error)
                    return {
                        "ttft_ms": took,
                        "fetched": output.fetched_tokens,
                        "fetch_ms": 1e3 * output.fetch_s,
                    }

    def _receive(self) -> Message:
        message = self._dial.receive(ANSWER_S)
        if message is None:
            raise SystemExit(f"nothing was heard for {ANSWER_S:g} s: {self._dial.reason}")
        return message

    def close(self) -> None:
        self._dial.close()


# ---- the same in the simulator


def trace_of(load: Load, step_ms: float) -> list[TraceRequest]:
    """Streams that last as long as bursts come, if steps take `step_ms`."""
    seconds = BEFORE_S + load.bursts * load.every_s
    output = round(seconds * 1e3 / step_ms)
    ids = iter(range(10**9))

    def row(at_s: float, prompt: int, output: int) -> TraceRequest:
        blocks = tuple(next(ids) for _ in range(-(-prompt // TRACE_BLOCK)))
        return TraceRequest(at_s * 1e3, prompt, output, blocks)

    rows = [row(0.0, load.stream_prompt, output) for _ in range(load.streams)]
    for n in range(load.bursts):
        at_s = BEFORE_S + n * load.every_s
        rows += [row(at_s, load.long_prompt, load.long_output) for _ in range(load.burst)]
    return rows


def simulated(done: Replay, load: Load) -> dict[str, Any]:
    """As `play`, in time of the trace; gaps of streams from the first burst to the last answer to a long prompt."""
    streams, long = done.calls[: load.streams], done.calls[load.streams :]
    begin = min(one.sent for one in long)
    end = max(one.end or 0.0 for one in long)
    gaps = list[Span]()
    for one in streams:
        at = one.first or 0.0
        for gap in one.gaps:
            if begin <= at and at + gap <= end:
                gaps.append((at, at + gap))
            at += gap
    ttfts = [(one.first - one.sent) * 1e3 / done.scale for one in long if one.first is not None]
    seconds = (end - begin) / done.scale
    return {
        **gaps_of(gaps, [(one.sent, one.first or one.sent) for one in long], done.scale),
        "ttfts_ms": ttfts,
        "stream_tokens_s": len(gaps) / seconds,
        "prompts_s": len(ttfts) / seconds,
        "failed": sum(one.error is not None for one in done.calls),
        "errors": sorted({one.error for one in done.calls if one.error})[:3],
        "seconds": seconds,
        "fetched": statistics.fmean(one.fetched / one.row.input_length for one in long),
    }
