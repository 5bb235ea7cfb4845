"""Requests of public shape out of a seed, and traces as files.

A trace is lines of JSON in the form that Mooncake publishes: `timestamp` in ms, `input_length` and `output_length` in
tokens, and `hash_ids`, one for each block of 512 tokens, equal for equal blocks. What belongs to one session carries a
`session_id` as well, and from its second request on `delay`, the ms from the end of the answer before to this request.

What is public about lengths and arrivals, and used here:

- `conversation`: Azure's conversation trace of 2023 has a median prompt of 1020 tokens and a median answer of 129; its
  code trace (`code`) 1500 and 13 (Patel et al., Splitwise, ISCA 2024).
- `agents`: a step of Codex appends 886 tokens in the median and 8310 at the 90th percentile, and answers with 184 and
  939 (Zhu et al., TraceLab, 2026, where prompts are ten times as long as `--max-input` lets them grow by default).
- Gaps between requests are gamma distributed and burstier than a Poisson process (Wang et al., BurstGPT, 2024).

Lengths are log-normal. All else, such as how far lengths spread where no second quantile is given, how many turns a
session has, how long people think, and how many share a system prompt, is a choice made here.
"""

import bisect
import json
import math
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from xllm.bench.arrivals import arrival_times
from xllm.bench.datasets import TRACE_BLOCK
from xllm.bench.simulate_options import TraceOptions
from xllm.core.errors import ConfigError

P90 = 1.2815515594  # standard deviations from the median to the 90th percentile
SAMPLES = 400  # sessions that tell how many requests one has, and how long it takes
SECONDS_PER_TOKEN = 0.025  # of an answer, where the file says when the next turn comes if nothing is slower


class TraceRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: Sequence[int] = ()
    session_id: str | None = None
    delay: float | None = None  # ms from the end of the session's request before this one


@dataclass(frozen=True, slots=True)
class LogNormal:
    median: float
    sigma: float

    @classmethod
    def through(cls, median: float, p90: float) -> "LogNormal":
        return cls(median, math.log(p90 / median) / P90)

    def draw(self, rng: random.Random) -> int:
        return max(1, round(self.median * math.exp(rng.gauss(0.0, self.sigma))))


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of traffic. `turns` is the mean of a geometric distribution, think times are log-normal, in ms."""

    added: LogNormal  # tokens that a request adds to what came before
    output: LogNormal
    turns: float = 1.0
    think: LogNormal | None = None
    shares: bool = False  # sessions begin with a system prompt


SHAPES = {
    # of 1020 tokens in the median most are history, which the turns make
    "conversation": Shape(LogNormal(90, 1.0), LogNormal(129, 0.9), 3.0, LogNormal(8000, 0.8), shares=True),
    "agents": Shape(
        LogNormal.through(886, 8310), LogNormal.through(184, 939), 12.0, LogNormal(1500, 1.0), shares=True
    ),
    "code": Shape(LogNormal(1500, 0.8), LogNormal(13, 1.0)),
}


def generate(options: TraceOptions) -> list[TraceRequest]:
    """In order of time, the first at 0. The same options give the same trace.

    Sessions begin well before the trace does, so that some are under way as it begins and the rate is even.
    """
    shape, rng = SHAPES[options.kind], random.Random(f"trace {options.kind} {options.seed}")
    ids = iter(range(2**62))
    blocks = options.system_tokens // TRACE_BLOCK if shape.shares else 0
    systems = [[next(ids) for _ in range(blocks)] for _ in range(options.systems)] or [[]]

    def session(name: str, at_s: float, rng: random.Random) -> list[TraceRequest]:
        return list(_session(name, at_s * 1000, shape, rng.choice(systems), ids, options, rng))

    samples = [session("", 0.0, random.Random(f"sample {n}")) for n in range(SAMPLES)]
    turns = sum(map(len, samples)) / SAMPLES
    begin_ms = sorted(rows[-1].timestamp for rows in samples)[SAMPLES * 19 // 20]
    rows: list[TraceRequest] = []
    times: list[float] = []
    for number, at in enumerate(ARRIVING[options.arrivals](options, options.rate / turns, rng)):
        # a session that begins late enough cannot come before what is there already
        if len(times) >= options.requests and at * 1000 > times[options.requests - 1]:
            break
        kept = [row for row in session(str(number), at, rng) if row.timestamp >= begin_ms]
        if kept:
            rows += [msgspec.structs.replace(kept[0], delay=None), *kept[1:]]
        for row in kept:
            bisect.insort(times, row.timestamp)
    rows = sorted(rows, key=lambda row: row.timestamp)[: options.requests]
    first = rows[0].timestamp
    return [msgspec.structs.replace(row, timestamp=round(row.timestamp - first, 3)) for row in rows]


def _session(
    name: str, at_ms: float, shape: Shape, system: Sequence[int], ids: Iterator[int], options: TraceOptions,
    rng: random.Random,
) -> Iterator[TraceRequest]:  # fmt: skip
    """Its tokens are one stream, of which each request is the beginning: system prompt, then question and answer in turn."""
    stream, length, delay = list(system), len(system) * TRACE_BLOCK, None
    last = 1.0 - 1.0 / shape.turns
    while True:
        length = min(length + shape.added.draw(rng), options.max_input)
        output = min(shape.output.draw(rng), options.max_output)
        while len(stream) * TRACE_BLOCK < length:
            stream.append(next(ids))
        alone = shape.think is None
        yield TraceRequest(
            at_ms, length, output, tuple(stream), None if alone else name, None if alone else delay
        )
        length += output
        if shape.think is None or rng.random() >= last or length >= options.max_input:
            return
        delay = float(shape.think.draw(rng))
        at_ms += output * SECONDS_PER_TOKEN * 1000 + delay


# ---- when sessions begin: seconds from the start, for ever


def _gamma(o: TraceOptions, rate: float, rng: random.Random) -> Iterator[float]:
    return arrival_times(rate, o.burstiness, rng)


def _poisson(o: TraceOptions, rate: float, rng: random.Random) -> Iterator[float]:
    return arrival_times(rate, 1.0, rng)


def _mmpp(o: TraceOptions, rate: float, rng: random.Random) -> Iterator[float]:
    """A Poisson process whose rate switches: calm at half the mean rate, and every 60 s or so a busy time of 15 s or so at
    three times the mean."""
    now, busy, switch = 0.0, False, rng.expovariate(1 / 60)
    while True:
        gap = rng.expovariate(rate * (3.0 if busy else 0.5))
        if now + gap < switch:
            now += gap
            yield now
        else:  # without memory: what is left of the gap is drawn again
            now, busy = switch, not busy
            switch += rng.expovariate(1 / 15 if busy else 1 / 60)


def _diurnal(o: TraceOptions, rate: float, rng: random.Random) -> Iterator[float]:
    """A Poisson process whose rate goes up and down by 80 % of the mean over a period; it begins at the mean, rising."""
    now = 0.0
    while True:
        now += rng.expovariate(rate * 1.8)
        if rng.random() * 1.8 < 1 + 0.8 * math.sin(2 * math.pi * now / o.period):
            yield now


ARRIVING: dict[str, Callable[[TraceOptions, float, random.Random], Iterator[float]]] = {
    "poisson": _poisson,
    "gamma": _gamma,
    "mmpp": _mmpp,
    "diurnal": _diurnal,
}


# ---- files


def write(path: Path, rows: Sequence[TraceRequest]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in rows:
            file.write(msgspec.json.encode(row) + b"\n")


def read(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests in order of time, the first of them at 0. `ConfigError` naming the line that is none."""
    rows: list[TraceRequest] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise ConfigError(f"cannot read the trace {path}: {e.strerror}") from e
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = msgspec.json.decode(line, type=TraceRequest)
            except msgspec.MsgspecError as e:
                raise ConfigError(f"{path}, line {number}: {e}") from e
            if row.input_length < 1 or row.output_length < 0:
                raise ConfigError(f"{path}, line {number}: a request needs at least one token of input")
            rows.append(row)
    if not rows:
        raise ConfigError(f"{path} holds no request")
    rows.sort(key=lambda row: row.timestamp)
    begin = rows[0].timestamp
    return [msgspec.structs.replace(row, timestamp=row.timestamp - begin) for row in rows[:limit]]


_NOTHING = array("I")


class Prompts:
    """Token ids of requests, in the order of their sessions: blocks follow from their hash ids, and where a session goes on
    the answer before stands in the prompt. `answer(prompt, count)` says what it was."""

    def __init__(self, ids: range, answer: Callable[[Sequence[int], int], list[int]]):
        self._ids, self._answer = ids, answer
        self._blocks: dict[int, array[int]] = {}
        self._sessions: dict[str, array[int]] = {}  # the last prompt and its answer

    def of(self, row: TraceRequest, name: str) -> list[int]:
        """`name` makes what no hash id covers different from that of others."""
        tokens: list[int] = []
        for id in row.hash_ids:
            tokens += self._block(id)
        length = row.input_length
        tokens = tokens[:length]
        if len(tokens) < length:
            tokens += random.Random(name).choices(self._ids, k=length - len(tokens))
        if row.session_id is not None:
            before = self._sessions.get(row.session_id, _NOTHING)
            if len(before) < length:  # else it has been cut short
                tokens[: len(before)] = before
            self._sessions[row.session_id] = array("I", tokens + self._answer(tokens, row.output_length))
        return tokens

    def forget(self, session: str) -> None:
        """It does not go on."""
        self._sessions.pop(session, None)

    def _block(self, id: int) -> "array[int]":
        if (block := self._blocks.get(id)) is None:
            block = array("I", random.Random(id).choices(self._ids, k=TRACE_BLOCK))
            self._blocks[id] = block
        return block


def figures(rows: Sequence[TraceRequest]) -> dict[str, Any]:
    """What a trace is like. `shared`: the part of the prompts that came before, in blocks of its hash ids."""
    seen: set[int] = set()
    shared = total = 0
    for row in rows:
        shared += sum(id in seen for id in row.hash_ids)
        total += len(row.hash_ids)
        seen.update(row.hash_ids)
    seconds = (rows[-1].timestamp - rows[0].timestamp) / 1000
    inputs, outputs = sorted(r.input_length for r in rows), sorted(r.output_length for r in rows)
    return {
        "requests": len(rows),
        "sessions": len({r.session_id for r in rows if r.session_id is not None}),
        "seconds": round(seconds, 1),
        "rate": round(len(rows) / seconds, 2) if seconds else None,
        "input_p50": inputs[len(inputs) // 2],
        "input_p90": inputs[len(inputs) * 9 // 10],
        "output_p50": outputs[len(outputs) // 2],
        "output_p90": outputs[len(outputs) * 9 // 10],
        "shared": round(shared / total, 3) if total else 0.0,
    }


def run(options: TraceOptions) -> int:
    rows = generate(options)
    write(Path(options.out), rows)
    print(f"{options.out}: {json.dumps(figures(rows))}")
    return 0
