"""The engine core: the one loop that every form of the engine runs, in this process or in its own."""

import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from xllm.core.clock import Clock, monotonic
from xllm.core.errors import DeviceLost
from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import StepPlan, StepResult
from xllm.core.stats import SchedulerStats
from xllm.engine.admission import Admission
from xllm.engine.kv_events import EventStream
from xllm.executor.executor import Executor, Outcome
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import Channel
from xllm.wire.messages import (
    Abort,
    FollowKv,
    LimitKv,
    Message,
    Outputs,
    Provide,
    Provided,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    StartTrace,
    StopTrace,
    Submit,
    SubmitMany,
    Taken,
    WakeUp,
)

if TYPE_CHECKING:
    from xllm.engine.peers import Peers  # brings torch

log = logging.getLogger(__name__)
IDLE_WAIT_S = 1.0
TRANSFER_WAIT_S = 0.005  # for KV on its way between tiers, before messages are looked for again


class EngineCore:
    """One brain: takes messages, plans, submits, applies. Everything here happens in one thread.

    `depth` steps may be in flight: 1 is synchronous; with 2 or more, step N+1 is planned and submitted while N runs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        inbox: Channel,
        admission: Admission,
        *,
        depth: int,
        clock: Clock = monotonic,
        events: EventStream | None = None,
        peers: "Peers | None" = None,
    ):
        self.scheduler = scheduler
        self.executor = executor
        self.inbox = inbox
        self.depth = depth
        self.clock = clock
        self.inflight: deque[tuple[StepPlan, Outcome[StepResult]]] = deque()
        self.stopping = False
        self._waits = 0  # for peers
        self.asleep = False  # the device's memory was given back
        self._kv_limit: int | None = None  # blocks of an elastic pool
        self.last_stats: SchedulerStats | None = None  # as of the last turn; other threads read it
        self._admission = admission
        self._peers = peers  # None: no KV comes from other engines or goes there
        self._events = events  # of the scheduler's pool; None where nobody wants them

    def run(self) -> None:
        """Until a Shutdown message."""
        while not self.stopping:
            self.turn(wait_s=IDLE_WAIT_S)

    def turn(self, *, wait_s: float | None) -> None:
        """One round of the loop. When there is nothing to do, waits up to `wait_s` for a message."""
        wait_s = self._patience(wait_s)
        outputs = self._drain(0.0 if self.busy or (not self.asleep and self.executor.improve()) else wait_s)
        outputs += self.step()
        if self._peers is not None:
            outputs = self._peers.hidden(outputs)
            self._peers.give()
        self.last_stats = msgspec.structs.replace(self.scheduler.stats(), executor=self.executor.stats)
        if self._peers is not None:
            self.last_stats = self._peers.completed(self.last_stats)
        if self._events is not None:
            self._tell(self._events)
            self.last_stats = msgspec.structs.replace(
                self.last_stats,
                kv_events=self._events.stats,
                cached_blocks=len(self.scheduler.pool.index),
            )
        if outputs:
            self.inbox.send(Outputs(outputs=outputs, stats=self.last_stats))

    def step(self) -> list[SequenceOutput]:
        self.scheduler.take(self.executor.news())
        if self._peers is not None and (opened := self._peers.take()):  # these wait for no step
            self.inbox.send(Outputs(outputs=opened, stats=self.last_stats or self.scheduler.stats()))
        self._resize()
        plan = self.scheduler.plan(self.clock())
        self._map()
        if plan:
            self.inflight.append((plan, self.executor.submit(plan)))
        self._move()
        if self._peers is not None:
            self._peers.give()
        self._resize()  # planning may have asked for memory
        if self.inflight and (len(self.inflight) >= self.depth or not plan):
            _, future = self.inflight.popleft()
            try:
                result = future.result()
            except DeviceLost:  # so is every later step; a new process may find the device well
                raise
            except Exception as e:  # the step as a whole: its requests fail, the engine lives
                return self._fail_all(e)
            return self.scheduler.apply(result, self.clock())
        if not plan and self.scheduler.has_work:
            if self.scheduler.lower.busy:
                self.executor.wait_for_news(TRANSFER_WAIT_S)
            elif self._peers is not None and self._peers.busy:
                self._peers.wait(TRANSFER_WAIT_S)
                self._waits += 1
            elif self.scheduler.elastic is not None:
                self.executor.wait_until_resized(TRANSFER_WAIT_S)
        return []

    def _patience(self, wait_s: float | None) -> float | None:
        """How long to wait for a message where nothing runs: less where something else is to be done meanwhile."""
        times = [] if wait_s is None else [wait_s]
        if self.scheduler.lower.busy or (self._peers is not None and self._peers.busy):
            times.append(TRANSFER_WAIT_S)  # blocks are held for it
        elastic = self.scheduler.elastic
        if elastic is not None and not self.asleep:
            if elastic.busy:
                times.append(TRANSFER_WAIT_S)
            elif elastic.wake_at is not None:
                times.append(max(0.0, elastic.wake_at - self.clock()))
        return min(times) if times else None

    def _resize(self) -> None:
        """Memory under the KV cache comes and goes as the scheduler decides."""
        elastic = self.scheduler.elastic
        if elastic is None or self.asleep:
            return
        elastic.take(self.executor.resized())
        elastic.in_use = self.scheduler.has_work
        if orders := elastic.orders(self.clock()):
            self.executor.resize(orders)

    def _map(self) -> None:
        """What requests see where, before the step that needs it is submitted."""
        if self.scheduler.ranges is None or self.asleep:
            return
        if orders := self.scheduler.ranges.orders():
            self.executor.map(orders)

    def _move(self) -> None:
        """What the plans so far have given to lower tiers, or want from there."""
        void, orders = self.scheduler.lower.orders()
        if void or orders:
            self.executor.move(orders, void)

    def close(self) -> None:
        """The loop has ended: give back the executor, and let subscribers have the last events."""
        if self._peers is not None:
            self._peers.close()
        self.executor.close()
        if self._events is not None:
            self._events.close()

    @property
    def kv_transport(self) -> str | None:
        """How KV comes from other engines and goes there; None: it does not."""
        return None if self._peers is None else self._peers.transport_name

    @property
    def progress(self) -> int:
        """Grows as long as work advances. Where all of it waits for KV from others, that they are slow is their fault and
        has a time-out of its own: while the loop turns this engine is well."""
        return self.executor.progress + self._waits

    @property
    def busy(self) -> bool:
        return bool(self.inflight) or self.scheduler.has_work

    def _drain(self, wait_s: float | None) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        message = self.inbox.receive(wait_s)
        while message is not None:
            outputs += self._handle(message)
            message = self.inbox.receive(0.0)
        return outputs

    def _handle(self, message: Message) -> list[SequenceOutput]:
        match message:
            case Submit():
                return self._submit([message])
            case SubmitMany(requests=requests):
                return self._submit(requests)
            case Abort(request_ids=ids):
                left = ids if self._peers is None else self._peers.without_ours(ids)
                return [output for id in left if (output := self.scheduler.abort(id))]
            case Provide() | Taken():
                self._exchange(message)
            case ResetPrefixCache(call_id=call_id):
                self.scheduler.reset_prefix_cache()
                self.inbox.send(Reply(call_id=call_id, value=True))
            case Sleep(call_id=call_id):
                self.inbox.send(Reply(call_id=call_id, refused=self._sleep()))
            case WakeUp(call_id=call_id):
                self.inbox.send(Reply(call_id=call_id, refused=self._wake_up()))
            case LimitKv(call_id=call_id, blocks=blocks):
                self.inbox.send(Reply(call_id=call_id, value=self._limit(blocks)))
            case FollowKv(call_id=call_id):
                self.inbox.send(self._follow(call_id))
            case StartTrace(call_id=call_id):
                self.inbox.send(Reply(call_id=call_id, refused=self._start_trace()))
            case StopTrace(call_id=call_id, directory=directory):
                self.inbox.send(self._stop_trace(call_id, directory))
            case Shutdown():
                self.stopping = True
        return []

    def _exchange(self, message: Provide | Taken) -> None:
        if self._peers is not None:
            self._peers.handle(message)
        elif isinstance(message, Provide):
            why = "this engine gives no KV to others"
            self.inbox.send(Provided(request_id=message.request_id, count=0, error=why))

    def _submit(self, requests: Sequence[Submit]) -> list[SequenceOutput]:
        if self.asleep:
            return [
                SequenceOutput(request_id=one.request_id, finish=Finish.ERROR, error="the engine sleeps")
                for one in requests
            ]
        now = self.clock()
        return [output for one in requests for output in self._admission.submit(one, now)]

    def _sleep(self) -> str | None:
        """None when done (or done before), else why not."""
        if self._peers is not None:
            return "the engine cannot sleep: peers may be reading its KV memory"
        if self.busy:
            return f"the engine cannot sleep while {self.scheduler.num_running + self.scheduler.num_waiting} sequences run or wait"
        if not self.asleep:
            while self.scheduler.lower.busy:  # what comes or goes needs the device's memory
                self._move()
                self.executor.wait_for_news(TRANSFER_WAIT_S)
                self.scheduler.take(self.executor.news())
            self.scheduler.forget_device()  # the blocks will hold nothing
            if (elastic := self.scheduler.elastic) is not None:
                elastic.set_limit(0)
                self._resize()
                while elastic.busy:
                    self.executor.wait_until_resized(TRANSFER_WAIT_S)
                    self._resize()
            self.executor.sleep()
            self.asleep = True
        return None

    def _wake_up(self) -> str | None:
        if self.asleep:
            try:
                self.executor.wake_up()
            except Exception as e:  # somebody else has the memory; it may be there later
                return f"the engine cannot wake up: {e}"
            self.asleep = False
            if self.scheduler.elastic is not None:
                self.scheduler.elastic.set_limit(self._kv_limit)
        return None

    def _limit(self, blocks: int | None) -> int:
        """-> blocks that have memory now."""
        elastic = self.scheduler.elastic
        assert elastic is not None, "only an elastic pool is asked"
        self._kv_limit = blocks
        if not self.asleep:
            elastic.set_limit(blocks)
        return self.scheduler.pool.num_mapped

    def _tell(self, events: EventStream) -> None:
        """What changed in the cache since the last time, to whoever wants to know."""
        if (changes := events.flush()) is not None:
            self.inbox.send(changes)

    def _follow(self, call_id: int) -> Reply:
        if self._events is None or self._events.cached is None:
            return Reply(call_id=call_id, refused="this engine tells its clients nothing of what it caches")
        self._tell(self._events)  # the earlier followers': the copy below has it already
        return Reply(call_id=call_id, value=self._events.follow())

    def _start_trace(self) -> str | None:
        if self.executor.tracing:
            return "a trace is being taken already"
        try:
            self.executor.start_trace()
        except RuntimeError as e:  # another profiler has the card
            return f"no trace can be taken: {e}"
        return None

    def _stop_trace(self, call_id: int, directory: str) -> Reply:
        if not self.executor.tracing:
            return Reply(call_id=call_id, refused="no trace is being taken")
        try:
            path, table = self.executor.stop_trace(Path(directory))
        except OSError as e:  # no room, no permission: the engine serves on
            return Reply(call_id=call_id, refused=f"the trace could not be written: {e}")
        log.info("trace written to %s\n%s", path, table)
        return Reply(call_id=call_id, value=str(path))

    def _fail_all(self, error: Exception) -> list[SequenceOutput]:
        """A step raised: no KV of it can be trusted. Later steps in flight run out and are forgotten."""
        log.error("a step failed; its requests end with an error", exc_info=error)
        for _, future in self.inflight:
            future.exception()
        self.inflight.clear()
        return self.scheduler.fail_all(f"the engine step failed: {type(error).__name__}")
