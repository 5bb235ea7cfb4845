"""`xllm bench simulate`: a trace, replayed over instances without a model, by one routing policy after the other.

Engines (all but the model), wire and router are the real ones; steps take modelled time, and an answer is known before it
comes, so that each one is checked. Where the host is too slow for that, `--time-scale` stretches arrivals and steps alike;
what is told is in seconds of the trace. Reports of load and time-outs are not stretched: they come in real time.
"""

import gc
import heapq
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from xllm.bench import simulate_report, trace
from xllm.bench.simulate_options import SimulateOptions
from xllm.bench.simulate_workers import Workers
from xllm.bench.trace import Prompts, TraceRequest
from xllm.cluster.client import ClusterClient
from xllm.cluster.instance import InstanceInfo
from xllm.cluster.status import InstanceStatus
from xllm.cluster.view import ROLES
from xllm.core.errors import ConfigError, XllmError
from xllm.core.output import SequenceOutput
from xllm.core.sampling import SamplingParams
from xllm.engine.modelled_runner import Words, answer
from xllm.wire.messages import Message, Outputs, Submit

READY_S = 60.0  # for all instances to be connected
SAMPLE_S = 1.0  # of the trace, between two looks at the queues
WORDS = Words()


class Client(Protocol):
    """What a replay needs of `ClusterClient`."""

    def send(self, message: Message) -> None: ...
    def receive(self, timeout_s: float) -> Message | None: ...
    def instances(self) -> list[InstanceStatus]: ...
    def instances_of(self, request: str) -> list[str]: ...


@dataclass(slots=True)
class Call:
    """One request of a replay. Times are readings of the clock."""

    row: TraceRequest
    due: float = 0.0
    sent: float = 0.0
    first: float | None = None
    last: float = 0.0
    gaps: "array[float]" = field(default_factory=lambda: array("d"))  # seconds between news of tokens
    end: float | None = None
    tokens: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)  # forgotten once it has come
    output: int = 0
    cached: int = 0  # tokens of the prompt, where it was sent
    fetched: int = 0  # that came there from another instance
    instance: str = ""
    moves: int = 0
    error: str | None = None


@dataclass
class Replay:
    """What came of it. `queues`: at each look when, then for each instance requests that run and wait there."""

    calls: list[Call]
    begin: float
    scale: float
    queues: list[tuple[float, dict[str, int]]] = field(default_factory=list)


class _Replayer:
    def __init__(self, rows: Sequence[TraceRequest], client: Client, scale: float, patience_s: float):
        self._client, self._scale, self._patience_s = client, scale, patience_s
        self._prompts = Prompts(
            range(WORDS.first, WORDS.vocab_size), lambda prompt, count: answer(prompt, count, WORDS)
        )
        self._due: list[tuple[float, int]] = []  # a heap: when, which
        self._after: dict[int, int] = {}  # the call that goes on with a session
        self._open: dict[str, int] = {}
        calls = [Call(row) for row in rows]
        self.replay = Replay(calls, time.perf_counter(), scale)
        last = self._last = dict[str, int]()  # of each session
        for n, row in enumerate(rows):
            before = None if row.session_id is None else last.get(row.session_id)
            if row.session_id is not None:
                last[row.session_id] = n
            if before is None or row.delay is None:
                self._later(n, self.replay.begin + row.timestamp / 1000 * scale)
            else:
                self._after[before] = n
        self._left = len(calls)

    def run(self) -> Replay:
        sample_at = news_at = self.replay.begin
        while self._left:
            now = time.perf_counter()
            if now >= sample_at:
                sample_at += SAMPLE_S * self._scale
                self._sample(now)
            while self._due and self._due[0][0] <= now:
                self._send(heapq.heappop(self._due)[1])
                now = news_at = time.perf_counter()
            wake = min(sample_at, self._due[0][0] if self._due else sample_at)
            message = self._client.receive(max(0.0, wake - now))
            now = time.perf_counter()
            if isinstance(message, Outputs):
                news_at = now
                for output in message.outputs:
                    self._take(output, now)
            elif self._open and now - news_at > self._patience_s * self._scale:
                for id in list(self._open):
                    self._end(id, now, "nothing was heard any more")
        return self.replay

    def _later(self, n: int, at: float) -> None:
        self.replay.calls[n].due = at
        heapq.heappush(self._due, (at, n))

    def _send(self, n: int) -> None:
        call, id = self.replay.calls[n], str(n)
        prompt, session = self._prompts.of(call.row, id), call.row.session_id
        if session is not None and self._last[session] == n:
            self._prompts.forget(session)
        call.expected = answer(prompt, call.row.output_length, WORDS)
        params = SamplingParams(max_tokens=call.row.output_length, temperature=0.0, ignore_eos=True)
        self._open[id] = n
        call.sent = time.perf_counter()
        try:
            self._client.send(Submit(request_id=id, prompt_token_ids=prompt, params=params))
        except XllmError as e:
            self._end(id, time.perf_counter(), e.message)

    def _take(self, output: SequenceOutput, now: float) -> None:
        n = self._open.get(output.request_id)
        if n is None:
            return
        call = self.replay.calls[n]
        if output.token_ids:
            call.tokens += output.token_ids
            if call.first is None:
                call.first, call.fetched = now, output.fetched_tokens
                call.cached = max(0, output.num_cached_tokens - output.fetched_tokens)
            else:
                call.gaps.append(now - call.last)
            call.last = now
        if output.finish is not None:
            error = output.error or (None if call.tokens == call.expected else "the answer is wrong")
            self._end(output.request_id, now, error)

    def _end(self, id: str, now: float, error: str | None) -> None:
        n = self._open.pop(id)
        call = self.replay.calls[n]
        been = self._client.instances_of(id)
        call.end, call.error, call.instance = now, error, been[-1] if been else ""
        call.moves, call.output = max(0, len(been) - 1), len(call.tokens)
        call.tokens, call.expected = [], []
        self._left -= 1
        if (then := self._after.get(n)) is not None:
            self._later(then, now + (self.replay.calls[then].row.delay or 0.0) / 1000 * self._scale)

    def _sample(self, now: float) -> None:
        active = {one.id: one.running + one.waiting for one in self._client.instances()}
        self.replay.queues.append(((now - self.replay.begin) / self._scale, active))


def replay(rows: Sequence[TraceRequest], client: Client, scale: float, patience_s: float) -> Replay:
    """Sends every request when it is due: at its time, or so long after the answer before it in its session."""
    return _Replayer(rows, client, scale, patience_s).run()


def run(path: str, options: SimulateOptions) -> int:
    rows = fitting(trace.read(Path(path), options.requests), options)
    simulate_report.check(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for policy in options.names:
        result = measure(policy, rows, options)
        results.append(result)
        print(simulate_report.line(result), flush=True)
    about = {"trace": path, "figures": trace.figures(rows), "options": simulate_report.plain(options)}
    (out / "result.json").write_text(json.dumps({**about, "policies": results}, indent=1) + "\n")
    print(f"report: {simulate_report.write(out, about, results)}")
    return 0 if all(result["failed"] == 0 for result in results) else 1


def fitting(rows: Sequence[TraceRequest], options: SimulateOptions) -> list[TraceRequest]:
    """`ConfigError` where an instance cannot hold a request of the trace. Requests without an answer get a token."""
    longest = max(row.input_length + max(1, row.output_length) for row in rows)
    if longest >= options.max_model_len:
        raise ConfigError(
            f"a request of the trace takes {longest} tokens, an instance holds {options.max_model_len}: "
            "give more --num-blocks, or make the trace with a smaller --max-input"
        )
    return [
        row if row.output_length else TraceRequest(row.timestamp, row.input_length, 1, row.hash_ids)
        for row in rows
    ]


def measure(policy: str, rows: Sequence[TraceRequest], options: SimulateOptions) -> dict[str, object]:
    """One policy's figures, see `simulate_report.summarise`."""
    return simulate_report.summarise(policy, *play(policy, rows, options))


def play(
    policy: str, rows: Sequence[TraceRequest], options: SimulateOptions
) -> tuple[Replay, list[str], list[dict[str, object]]]:
    """What came of it, the instances that answer requests, and how well each of all kept time."""
    with Workers(options) as workers:
        client = ClusterClient(policy, name="simulate")
        try:
            _connect(client, workers.infos)
            gc.collect()
            gc.freeze()  # what collections walk is held up, and requests with it
            done = replay(rows, client, options.time_scale, options.patience)
        finally:
            gc.unfreeze()
            client.close()
        lateness = workers.finish()
    return done, [info.id for info in workers.infos if info.role in ROLES], lateness


def _connect(client: ClusterClient, infos: Sequence[InstanceInfo]) -> None:
    for info in infos:
        client.joined(info)
    deadline = time.monotonic() + READY_S
    while any(one.state != "serving" for one in client.instances()):
        if time.monotonic() > deadline:
            raise ConfigError(f"the instances were not ready within {READY_S:g} s")
        client.receive(0.05)
