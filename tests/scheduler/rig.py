"""A scheduler, a pool and a fake executor, with everything checked after every move."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tests.scheduler.fake_executor import FakeExecutor, alone
from tests.scheduler.fake_mover import FakeMover
from tests.scheduler.fake_places import FakePlaces
from xllm.config.decided import SchedulerConfig
from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import StepPlan
from xllm.core.request import Request
from xllm.core.sampling import SamplingParams
from xllm.core.segments import Grown, SegmentNews, SegmentOrder, Shrink, Shrunk
from xllm.kv import hashing
from xllm.kv.elastic import Elastic
from xllm.kv.events import DEVICE, DISK, HOST, Cleared, Event, EventLog, Removed, Stored
from xllm.kv.pool import BlockPool
from xllm.kv.ranges import Ranges
from xllm.kv.tiers.cost import Cost
from xllm.kv.tiers.offload import Offload
from xllm.kv.tiers.slots import SlotIndex
from xllm.kv.tiers.store import StoreView
from xllm.scheduler.scheduler import Scheduler

DEFAULTS: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "chunked_prefill": True,
    "long_prefill_token_threshold": 0,
    "batching": "chunked",
    "order": "fcfs",
    "admission": "optimistic",
    "depth": 2,
}


def config(**changes: Any) -> SchedulerConfig:
    return SchedulerConfig(**{**DEFAULTS, **changes})


def request(
    id: str,
    prompt: list[int],
    max_tokens: int | None = 4,
    *,
    arrival: float = 0.0,
    params: dict[str, Any] | None = None,
    **fields: Any,
) -> Request:
    fields.setdefault("max_total_tokens", 10**6)
    fields.setdefault("seed", 1)
    sampling = SamplingParams(max_tokens=max_tokens, **(params or {}))
    return Request(id=id, prompt_token_ids=prompt, params=sampling, arrival=arrival, **fields)


def begun_elsewhere(request: Request, count: int) -> Request:
    """So many of its tokens, or all, have been put out by another engine."""
    request.output_token_ids = alone(request)[0][:count]
    request.num_prompt_logprobs = len(request.prompt_token_ids) - 1 if request.output_token_ids else 0
    return request


class Mirror:
    """What somebody who applies the pool's events knows of its index. Doubts every event."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.log = EventLog()
        self.names: dict[str, set[bytes]] = defaultdict(set)  # by medium
        self.seen: list[Event] = []

    def follow(self) -> None:
        for event in self.log.drain():
            self.seen.append(event)
            match event:
                case Stored():
                    parent = hashing.root(event.salt) if event.parent is None else event.parent
                    assert event.names == hashing.chain(parent, event.token_ids, self.block_size)
                    assert not self.names[event.medium] & set(event.names)
                    self.names[event.medium] |= set(event.names)
                case Removed():
                    assert self.names[event.medium] >= set(event.names)
                    self.names[event.medium] -= set(event.names)
                case Cleared():
                    self.names.clear()


class Rig:
    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        prefix_caching: bool = True,
        burst: int = 1,
        step_s: float = 0.01,
        check_every: bool = True,
        recorded: bool = False,
        host_slots: int = 0,
        disk_slots: int = 0,
        stored: bool = False,
        blocks_per_segment: int = 0,
        spare_ranges: int = 0,
        most_mapped: int | None = None,
        hits_a_step: int = 32,
        peers: bool = False,
        **changes: Any,
    ):
        self.config = config(**changes)
        self.mirror = Mirror(block_size) if recorded else None
        log = self.mirror.log if self.mirror is not None else None
        self.pool = BlockPool(
            num_blocks, block_size, prefix_caching, log, mapped=min(blocks_per_segment, num_blocks) or None,
            claimable=spare_ranges > 0,
        )  # fmt: skip
        self.elastic = Elastic(self.pool, blocks_per_segment, 2, idle_s=1.0) if blocks_per_segment else None
        self.blocks_per_segment = blocks_per_segment
        self.segments: list[SegmentOrder] = []
        self.refused: Callable[[], bool] = lambda: False  # whether the next order to grow is
        self.offload = self._offload(host_slots, disk_slots, stored) if host_slots else None
        self.ranges = self._ranges(spare_ranges, most_mapped, hits_a_step) if spare_ranges else None
        self.scheduler = Scheduler(
            self.config, self.pool, self.offload, self.elastic, self.ranges, peers=peers
        )
        self.executor = FakeExecutor(block_size, burst)
        if spare_ranges:
            self.executor.places = FakePlaces(first=num_blocks + 1)
        self.mover = FakeMover(self.executor)
        self.now = 0.0
        self.step_s = step_s
        self.check_every = check_every  # move; else only at the end, for long runs
        self.added: dict[str, Request] = {}
        # what had been put out elsewhere, by request id: tokens, and of how many of the prompt logprobs
        self.given: dict[str, tuple[list[int], int]] = {}
        self.outputs: dict[str, list[SequenceOutput]] = defaultdict(list)
        self.plans: list[StepPlan] = []

    def _offload(self, host_slots: int, disk_slots: int, stored: bool) -> Offload:
        log = None if self.mirror is None else self.mirror.log
        disk = SlotIndex(disk_slots, DISK, log) if disk_slots else None
        return Offload(SlotIndex(host_slots, HOST, log), disk, Cost(), StoreView() if stored else None)

    def _ranges(self, spare: int, most_mapped: int | None, hits_a_step: int) -> Ranges:
        longest = -(-self.config.max_model_len // self.pool.block_size)
        several = self.config.max_num_seqs * (1 + self.config.depth) + spare
        return Ranges(
            self.pool, several, longest, self.pool.num_blocks + 1, most_mapped=most_mapped, ahead=self.pool.block_size // 2,
            hits_a_step=hits_a_step,
        )  # fmt: skip

    # moves

    def add(self, request: Request) -> Request:
        given = list(request.output_token_ids), request.num_prompt_logprobs
        ended = self.scheduler.add(request)
        self.added[request.id] = request
        self.given[request.id] = given
        self.executor.salts[request.id] = request.cache_salt
        self.take([ended] if ended else [])
        return request

    def plan(self) -> StepPlan | None:
        """Plan and submit one step, if there is one."""
        self.now += self.step_s
        self.scheduler.take(self.mover.news())
        plan = self.scheduler.plan(self.now)
        self.resize(carry_out=False)
        self.map()
        if plan is not None:
            self.check_plan(plan)
            self.executor.submit(plan)
            self.plans.append(plan)
        self.order()
        self.check()
        return plan

    def map(self) -> None:
        if self.ranges is not None and self.executor.places is not None:
            self.executor.places.start(self.ranges.orders(), self.executor.touches())

    def order(self) -> None:
        """Hand over what is to be moved."""
        void, orders = self.scheduler.lower.orders()
        self.mover.start(orders, void)

    def resize(self, carry_out: bool = True) -> None:
        """Orders about memory are given, and carried out if asked."""
        if self.elastic is None:
            return
        self.segments += self.elastic.orders(self.now)
        if carry_out:
            orders, self.segments = self.segments, []
            news = [self._resized(order) for order in orders]
            self.elastic.take(news)
            self.check()

    def _resized(self, order: SegmentOrder) -> SegmentNews:
        if isinstance(order, Shrink):
            assert self.elastic is not None
            each = self.blocks_per_segment
            for block in range(order.segment * each, min((order.segment + 1) * each, self.pool.num_blocks)):
                for offset in range(self.pool.block_size):
                    self.executor.memory.pop((block, offset), None)
            return Shrunk(order.segment)
        return Grown(order.segment, ok=False, error="taken") if self.refused() else Grown(order.segment)

    def move(self, most: int = 1) -> None:
        """So much of what is to be moved between tiers is moved."""
        for _ in range(most):
            if not self.mover.work():
                return

    def apply(self) -> list[SequenceOutput]:
        """Take in the result of the oldest step in flight, if there is one."""
        if not self.executor.queue:
            return []
        return self.take(self.scheduler.apply(self.executor.result(), self.now))

    def abort(self, request_id: str) -> SequenceOutput | None:
        output = self.scheduler.abort(request_id)
        self.take([output] if output else [])
        return output

    def fail_all(self, reason: str = "the device fell off the bus") -> list[SequenceOutput]:
        self.executor.steps_run += len(self.executor.queue)  # as far as they came
        self.executor.queue.clear()
        return self.take(self.scheduler.fail_all(reason))

    def turn(self) -> list[SequenceOutput]:
        """One turn of the engine's loop."""
        plan = self.plan() if len(self.executor.queue) < self.config.depth else None
        if self.executor.queue and (len(self.executor.queue) == self.config.depth or plan is None):
            return self.apply()
        self.move(4)
        self.resize()
        if self.elastic is not None and plan is None and self.scheduler.has_work:
            self.now += 0.5  # memory may come later
            return []
        moves = self.mover.told or self.mover.can_work or self.others_move()
        assert plan is not None or not self.scheduler.has_work or moves, (
            "requests live, but nothing runs or can be planned"
        )
        return []

    def drain(self, turns: int = 20_000) -> "Rig":
        while self.scheduler.has_work:
            turns -= 1
            assert turns > 0, "requests starve"
            self.turn()
        while self.scheduler.lower.busy:
            self.order()
            busy = self.scheduler.lower.busy  # where nothing is to be sent any more it is not
            assert self.mover.can_work or self.mover.told or not busy, "orders without news"
            self.move()
            self.scheduler.take(self.mover.news())
        self.end_others()
        self.scheduler.audit()
        assert self.pool.usage == 0
        return self

    def others_move(self) -> bool:
        """Whether something else may come that lets requests go on."""
        return False

    def end_others(self) -> None:
        """Nobody lives any more: what others hold is given back."""

    def run(self, *requests: Request) -> "Rig":
        for one in requests:
            self.add(one)
        return self.drain()

    # what came out

    def take(self, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        for output in outputs:
            so_far = self.outputs[output.request_id]
            assert output.request_id in self.added
            assert not so_far or so_far[-1].finish is None, "news after the end"
            so_far.append(output)
        self.check()
        return outputs

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def finish(self, request_id: str) -> Finish | None:
        return self.outputs[request_id][-1].finish if self.outputs[request_id] else None

    def check_outputs(self) -> None:
        """Every request ended once, with what it outputs alone (or the beginning of it, where it was cut short)."""
        for id, request in self.added.items():
            expected, finish = alone(request)
            given, tokens = self.given[id][0], self.tokens(id)
            assert expected[: len(given)] == given, "given is what would have been put out here"
            expected = expected[len(given) :]
            if self.finish(id) in (Finish.ABORT, Finish.ERROR):
                assert tokens == expected[: len(tokens)], id
            else:
                assert (tokens, self.finish(id)) == (expected, finish), id
            self._check_logprobs(request, tokens)
            assert (self.outputs[id][-1].error is not None) == (self.finish(id) is Finish.ERROR)

    def _check_logprobs(self, request: Request, tokens: list[int]) -> None:
        outputs = self.outputs[request.id]
        if request.params.logprobs is not None and self.executor.burst == 1:
            assert [row.token_ids[0] for output in outputs for row in output.logprobs] == tokens
        if request.params.prompt_logprobs is not None:
            found = [row.token_ids[0] for output in outputs for row in output.prompt_logprobs]
            expected = request.prompt_token_ids[1 + self.given[request.id][1] :]
            assert found == (expected if tokens else expected[: len(found)])
        else:
            assert not any(output.prompt_logprobs for output in outputs)

    # invariants

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(set(plan.slots)) == len(plan.slots) <= self.config.max_num_seqs
        assert all(0 <= slot < self.config.max_num_seqs for slot in plan.slots)
        assert len(plan.slots) == len(plan.starts) == len(plan.counts) == len(plan.samples)
        assert {new.slot for new in plan.new} <= set(plan.slots)
        assert not {new.slot for new in plan.new} & {slot for slot, _ in plan.appended}

    def check(self) -> None:
        scheduler = self.scheduler
        if not self.check_every and scheduler.has_work:
            return
        scheduler.audit()
        if self.mirror is not None:
            self.mirror.follow()
            named = (self.pool.index.name_of(block) for block in range(self.pool.num_blocks))
            assert self.mirror.names[DEVICE] == {name for name in named if name is not None}
            if self.offload is not None:
                host = self.offload.host
                held = (host.name_of(slot) for slot in range(host.capacity))
                assert self.mirror.names[HOST] == {
                    name for name in held if name is not None and host.find(name) is not None
                }
        assert scheduler.num_running <= self.config.max_num_seqs
        assert self.config.admission != "no_eviction" or scheduler.stats().preemptions == 0
        tables = {slot: list(row.blocks) for slot, row in self.executor.rows.items()}
        for plan in self.executor.queue:
            for new in plan.new:
                tables[new.slot] = list(new.blocks)
            for slot, blocks in plan.appended:
                tables[slot] += blocks
            for place in self.executor.writes(plan, tables):
                places = self.executor.places
                block = place if places is None else places.page_ordered(place)
                assert not self.pool.is_available(block), (
                    "a step in flight writes a block that may be handed out"
                )
