"""A small world to compare policies in: instances whose steps take modelled time, requests that arrive when told.

An instance takes what waits in order of arrival, computes prompts in chunks beside one token for each sequence that
decodes, and keeps blocks of prompts and answers in a least-recently-used cache. It publishes KV events and tells its
load twice a second, as real ones do; the router under test knows nothing else.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from xllm.cluster import policies
from xllm.cluster.fleet import Fleet
from xllm.cluster.kv_index import KvIndex
from xllm.cluster.view import Ask, Capacity, Load
from xllm.wire.kv_events import BlockRemoved, BlockStored, KVEventBatch

BLOCK = 16
REPORT_S = 0.5


@dataclass
class Call:
    """One request: its prompt as names of blocks, and how many tokens it answers with."""

    id: str
    at: float
    blocks: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    answer: tuple[int, ...] = ()  # blocks that prompt and answer have together, beyond the prompt's
    todo: int = 0  # prompt tokens to compute
    made: int = 0
    instance: str = ""
    cached: int = 0
    first: float = 0.0
    end: float = 0.0


@dataclass
class Instance:
    id: str
    slots: int = 16
    cache_blocks: int = 1200
    budget: int = 512
    base_s: float = 0.008
    token_s: float = 60e-6
    waiting: deque[Call] = field(default_factory=deque)
    running: list[Call] = field(default_factory=list)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    stepping: bool = False
    batches: int = 0
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0

    def plan(self) -> tuple[list[Call], list[Call], float]:
        """Begin a step: who gets a token by it, whose prompt is complete with it, and how long it takes."""
        while self.waiting and len(self.running) < self.slots:
            call = self.waiting.popleft()
            hit = next((i for i, name in enumerate(call.blocks) if name not in self.cache), len(call.blocks))
            call.cached = min(hit * BLOCK, call.prompt_tokens - 1)
            call.todo = call.prompt_tokens - call.cached
            self.running.append(call)
        gets = [call for call in self.running if not call.todo]
        left, done = self.budget - len(gets), list[Call]()
        for call in self.running:
            if call.todo and left > 0:
                chunk = min(call.todo, left)
                call.todo -= chunk
                left -= chunk
                if not call.todo:
                    done.append(call)
        tokens = self.budget - left
        seconds = self.base_s + self.token_s * tokens
        self.seconds, self.tokens, self.steps = (
            self.seconds + seconds,
            self.tokens + tokens,
            self.steps + 1,
        )
        return gets + done, done, seconds

    def keep(self, blocks: tuple[int, ...]) -> list[BlockStored | BlockRemoved]:
        """Blocks are in the cache from now on; what had to go for them."""
        new = [name for name in blocks if name not in self.cache]
        for name in reversed(blocks):
            self.cache[name] = None
            self.cache.move_to_end(name)
        gone = [self.cache.popitem(last=False)[0] for _ in range(len(self.cache) - self.cache_blocks)]
        events: list[BlockStored | BlockRemoved] = []
        if new:
            events.append(BlockStored(new, None, [], BLOCK, None, "GPU", None, epoch=1))
        if gone:
            events.append(BlockRemoved(gone, "GPU", epoch=1))
        return events


class World:
    """Runs calls through a policy. After `run` the calls hold what became of them."""

    def __init__(
        self,
        policy: str,
        instances: list[Instance],
        ttft_s: float | None = None,
        tpot_s: float | None = None,
    ):
        self.choose = policies.load(policy)
        self.fleet, self.index = Fleet(), KvIndex()
        self.instances = {instance.id: instance for instance in instances}
        for instance in instances:
            capacity = Capacity(instance.slots, instance.cache_blocks, BLOCK, step_budget=instance.budget)
            self.fleet.joined(instance.id, 1, capacity)
        self.ttft_s, self.tpot_s = ttft_s, tpot_s  # targets of every request
        self.now = 0.0
        self.shed = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def run(self, calls: list[Call]) -> None:
        for call in calls:
            self._later(call.at, partial(self._arrive, call))
        self._open = len(calls)
        self._later(0.0, self._report)
        while self._open and self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _later(self, at: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, event))

    def _arrive(self, call: Call) -> None:
        ask = Ask(
            call.id,
            call.prompt_tokens,
            call.blocks,
            call.output_tokens,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
        )
        choice = self.choose(ask, self.fleet, self.index, lambda: self.now)
        if choice is None:
            self.shed += 1
            self._open -= 1
            return
        self.fleet.sent(choice, ask, self.now)
        call.instance = choice.instance
        instance = self.instances[call.instance]
        instance.waiting.append(call)
        if not instance.stepping:
            self._step(instance)

    def _step(self, instance: Instance) -> None:
        gets, done, seconds = instance.plan()
        instance.stepping = bool(gets or instance.running)
        if instance.stepping:
            self._later(self.now + seconds, lambda: self._stepped(instance, gets, done))

    def _stepped(self, instance: Instance, gets: list[Call], done: list[Call]) -> None:
        events: list[BlockStored | BlockRemoved] = []
        for call in done:
            events += instance.keep(call.blocks)
        for call in gets:
            call.made += 1
            if call.made == 1:
                call.first = self.now
                self.fleet.first_token(instance.id, call.id, self.now)
            if call.made == call.output_tokens:
                call.end = self.now
                instance.running.remove(call)
                events += instance.keep(call.blocks + call.answer)
                self.fleet.ended(instance.id, call.id, self.now, call.made)
                self._open -= 1
        if events:
            assert self.index.apply(instance.id, instance.batches, KVEventBatch(self.now, events))
            instance.batches += 1
        self._step(instance)

    def _report(self) -> None:
        for i in self.instances.values():
            steps = max(i.steps, 1)
            held = sum(len(call.blocks) for call in i.running) / i.cache_blocks
            load = Load(len(i.running), len(i.waiting), min(held, 1.0), i.tokens / steps, i.seconds / steps)
            self.fleet.told(i.id, load, self.now)
            i.tokens, i.seconds, i.steps = 0, 0.0, 0
        self._later(self.now + REPORT_S, self._report)
