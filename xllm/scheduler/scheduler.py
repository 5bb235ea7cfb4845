"""Who runs next and how many tokens: the one place that writes requests and decides about slots, blocks and endings.

Pure: no I/O, no clock of its own, no torch. The engine feeds it events (`add`, `abort`, `apply`, `fail_all`) and asks it
for steps (`plan`); every request that `add` accepted ends with exactly one output that has `finish` set.
"""

from collections import deque
from collections.abc import Sequence

from xllm.config.decided import SchedulerConfig
from xllm.core.errors import EngineFault, InvalidRequest
from xllm.core.output import Finish, SequenceOutput
from xllm.core.peers import Fetched
from xllm.core.plan import StepPlan, StepResult, TokenLogprobs
from xllm.core.request import Phase, Request
from xllm.core.stats import SchedulerStats
from xllm.core.transfer import News
from xllm.kv.elastic import Elastic
from xllm.kv.pool import BlockPool
from xllm.kv.ranges import Ranges
from xllm.kv.tiers.offload import Offload
from xllm.scheduler import outcome, policies
from xllm.scheduler.batching import Load, Stage
from xllm.scheduler.entrance import Entrance
from xllm.scheduler.intake import check_config, check_request
from xllm.scheduler.lower_tiers import LowerTiers
from xllm.scheduler.peers import PeerFetches
from xllm.scheduler.provisions import Provisions, peer_stats
from xllm.scheduler.running import RunningSet
from xllm.scheduler.step import InFlight, StepBuilder
from xllm.scheduler.tables import NEVER, BlockTables
from xllm.scheduler.waiting import WaitingQueue


class Scheduler:
    """Continuous batching over `pool`, and the tiers below it if there are any. `ConfigError` where the configuration
    cannot work.

    A request waits, then runs: prefilling while known tokens are left to compute, then decoding. Steps in flight are
    remembered in order until their result is applied; any number may be.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        offload: Offload | None = None,
        elastic: Elastic | None = None,
        ranges: Ranges | None = None,
        *,
        peers: bool = False,
    ):
        """With `peers` requests may fetch KV from other engines."""
        check_config(config)
        self.config = config
        self.pool = pool
        self.elastic = elastic  # of the pool, where its memory comes and goes
        self.ranges = ranges  # of addresses, where requests have their own
        self._batching = policies.load("batching", policies.BATCHING, config.batching)
        self._order = policies.load("order", policies.ORDER, config.order)
        self._chunk = config.long_prefill_token_threshold or config.max_num_batched_tokens

        self._requests: dict[str, Request] = {}  # all that live
        self._running = RunningSet(config.max_num_seqs)
        self._tables = BlockTables(pool, ranges)
        self.lower = LowerTiers(offload, pool)
        if offload is not None:
            self._tables.on_published = self.lower.save
        self.peers = PeerFetches(pool, peers)
        self.peers.on_published = self._tables.on_published
        self.provisions = Provisions(pool)  # for other engines
        admission = policies.load("admission", policies.ADMISSION, config.admission)
        self._entrance = Entrance(
            config, admission, pool, self._tables, self._running, self.lower, self.peers, elastic, ranges
        )
        self._in_flight: deque[InFlight] = deque()

        self._step = 0  # number of the last plan
        self._arrivals = 0
        self._decode_starved = 0  # see Load
        self._prefill_starved = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._step_tokens = 0

    # events

    def add(self, request: Request) -> SequenceOutput | None:
        """Queue a request, new or begun elsewhere. `InvalidRequest` where it can never run here; the terminal output where
        what it has put out already ends it. Nothing is kept of it then."""
        if request.id in self._requests:
            raise InvalidRequest(f"a request called {request.id!r} is already here")
        check_request(request, self.config, self.pool)
        if request.output_token_ids and (ended := outcome.ended(request)) is not None:
            return ended
        self._arrivals += 1
        request.rank = (self._order(request), self._arrivals)
        self._requests[request.id] = request
        self._entrance.waiting.push(request)
        return None

    def abort(self, request_id: str) -> SequenceOutput | None:
        """End a request wherever it stands and return its terminal output; None where no such request lives (any more).

        Its results in flight will be dropped, its blocks freed once the steps in flight have run.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._unlist(request)
        return self._end(request, Finish.ABORT)

    def fail_all(self, reason: str) -> list[SequenceOutput]:
        """The executor failed as a whole: end every request with an error and forget what the cache holds.

        Steps in flight count as over; the caller sees to it that none still runs or is applied later.
        """
        self._in_flight.clear()
        self._tables.settle(self._step)
        self._entrance.waiting = WaitingQueue()
        self._running.clear()
        outputs = [self._end(request, Finish.ERROR, reason) for request in list(self._requests.values())]
        self._forget_cache()
        if self.ranges is not None:
            self.ranges.forget(unmapped=False)
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. What runs keeps its blocks and finishes, but publishes nothing more: after a change
        of weights, KV of before must not serve requests of after."""
        self._forget_cache()
        self.lower.leave()
        for request in self._running:
            request.num_published = NEVER

    def forget_device(self) -> None:
        """Nothing runs, and the device's memory goes away; tiers below it keep what they have."""
        self.pool.reset_cache(everywhere=False)
        if self.ranges is not None:
            self.ranges.forget(unmapped=True)

    def _forget_cache(self) -> None:
        self.peers.clear()
        self.provisions.end_all("the prefix cache was forgotten")
        self.lower.clear()  # first: the event of the other says that no tier has anything
        self.pool.reset_cache()
        if self.ranges is not None:
            self.ranges.cache_forgotten()

    # the next step

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None where nothing can run before a result is applied or a request added."""
        self.lower.clock(now)
        self.peers.now = now
        may_admit = self._make_room()
        builder = StepBuilder(self.config.max_num_batched_tokens, self._tables)
        load = Load(
            len(self._running.decoding), self.config.max_num_seqs, self._decode_starved, self._prefill_starved
        )
        begun: list[Request] = []  # their prompt ends in this step; they decode from the next
        stages = self._batching(load)
        for stage in stages:
            if stage is Stage.DECODE:
                self._decode(builder)
            else:
                self._prefill(builder, begun, may_admit, now)
        if not builder.requests and Stage.PREFILL not in stages:
            self._prefill(builder, begun, may_admit, now)
        self._running.decoding += begun
        if not builder.requests:
            return None
        return self._submit(builder)

    def _submit(self, builder: StepBuilder) -> StepPlan:
        prefilled = builder.num_prefill_tokens
        self._prefill_starved = (
            0
            if prefilled or not (self._running.prefilling or self._entrance.waiting)
            else self._prefill_starved + 1
        )
        self._prompt_tokens += prefilled
        self._step_tokens = self.config.max_num_batched_tokens - builder.budget
        self._step += 1
        self.lower.began(self._step)
        step = builder.build(self._step)
        self._in_flight.append(step)
        return step.plan

    def _decode(self, builder: StepBuilder) -> None:
        decoding = self._running.decoding
        turns = builder.decode(decoding)
        if turns < len(decoding):
            self._decode_starved += 1
            self._running.pass_turns(turns)
        else:
            self._decode_starved = 0

    def _prefill(self, builder: StepBuilder, begun: list[Request], may_admit: bool, now: float) -> None:
        """Spend the budget on prompts in order of rank, those already begun and those admitted now alike."""
        prefilling = self._running.prefilling
        i = 0
        while builder.budget > 0:
            request = prefilling[i] if i < len(prefilling) else None
            head = self._entrance.head() if may_admit else None
            if head is not None and (request is None or head.rank < request.rank):
                may_admit = self._entrance.admit(head, builder, now)
                if may_admit and builder.prefill(head, self._chunk):
                    begun.append(head)
                elif may_admit:
                    self._running.begin(head)
                    i += 1
            elif request is None:
                return
            elif builder.prefill(request, self._chunk):
                del prefilling[i]
                begun.append(request)
            else:
                i += 1

    def take(self, news: Sequence[News]) -> None:
        """What became of the orders of `lower`. Requests whose KV has come wait in the queue again."""
        for request in self.lower.take(news):
            self._entrance.waiting.push(request)
        for request in self.lower.brought():
            self.provisions.brought(request, self.pool.match(request.block_hashes))
            if not self._in_flight:
                self.provisions.confirm(self._step)

    def take_fetched(self, news: Sequence[Fetched], now: float) -> list[SequenceOutput]:
        """The same of the orders of `peers`. Some have got their first token with it."""
        outputs: list[SequenceOutput] = []
        for request, token in self.peers.take(news):
            output = None if token is None else self._open(request, token, now)
            if output is not None:
                outputs.append(output)
            if request.phase is Phase.WAITING:
                self._entrance.waiting.push(request)
        return outputs

    def _open(self, request: Request, token: int, now: float) -> SequenceOutput:
        """A peer has computed its prompt and sampled its first token: it goes on from there, as if it had been preempted."""
        request.first_scheduled = max(request.arrival, now - request.fetch_s)
        self.pool.count_lookup(request.num_known, request.num_cached_tokens)
        tokens, finish = outcome.accept(request, (token,))
        self._generation_tokens += 1
        output = outcome.news(request, tokens, finish, None, (), now)
        if finish is not None:
            self.lower.used(request)
            self._close(request)
        return output

    def provide(self, request: Request, first: int, compute: bool, opening: bool = False) -> bool:
        """Have the full blocks of a prompt from number `first` on ready for a peer (`provisions`, under the request's id),
        which may end at any time. True where the request is to compute them, or, if `opening`, the first token behind them:
        whoever ends the provision aborts it. `InvalidRequest` where it can never be computed here."""
        names = self._tables.names(request)
        cached = self.pool.match(names)
        found = cached[first:]
        computes = compute and (opening or len(found) < len(names) - first)
        if computes and self.add(request) is not None:
            raise InvalidRequest("a provision has no output")
        total = len(names) - first
        if not computes:
            total = max(0, len(cached) + self._entrance.bring_up(request, cached) - first)
        self.provisions.begin(
            request.id, request if computes else None, names, first, total, found,
            self._in_flight[-1].plan.step if self._in_flight else 0,
            coming=request if not computes and total > len(found) else None, opening=computes and opening,
        )  # fmt: skip
        if not self._in_flight:
            self.provisions.confirm(self._step)
        return computes

    # memory pressure

    def _make_room(self) -> bool:
        """Preempt, last in rank first, until the next decode step of everybody left has its blocks: now, or once the
        steps in flight have run. Nothing is planned yet, so nobody loses a place in this step.

        False where somebody has to wait for blocks: nobody new may take any then.
        """
        pool = self.pool
        if len(self._running.decoding) * self._tables.blocks_for(self._entrance.burst) <= pool.num_available:
            return True
        needed = self._tables.blocks_needed(self._running.decoding)
        while needed > pool.num_available + pool.num_returning:
            if self._entrance.comes_by_itself(needed - pool.num_returning):
                return False
            self._preempt(self._running.last())
            needed = self._tables.blocks_needed(self._running.decoding)
        return needed <= pool.num_available

    def _preempt(self, request: Request) -> None:
        """Back to the queue with its output so far. Tokens in flight are dropped and sampled again later: sampling depends
        on seed and position alone. Its published blocks stay in the cache while they can, so resuming is cheap."""
        self._unlist(request)
        self._vacate(request)
        request.phase = Phase.WAITING
        request.num_in_flight = 0
        request.num_preemptions += 1
        self._preemptions += 1
        self._entrance.waiting.push(request)

    # results

    def apply(self, result: StepResult, now: float) -> list[SequenceOutput]:
        """Take in the result of the oldest step in flight. `EngineFault` where it is of another step or shape.

        Several tokens per sequence are welcome while nothing later of that sequence is in flight; what of them has no
        KV yet is computed by the next step.
        """
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.plan.step != result.step or len(result.tokens) != len(step.requests):
            raise EngineFault(f"result of step {result.step} does not belong to the oldest step in flight")
        self._in_flight.popleft()
        self.lower.ended(result.step)
        self._tables.settle(result.step)
        if step.num_prefill_tokens == step.plan.num_tokens:
            self.lower.computed(step.num_prefill_tokens, result.seconds)
        if self.provisions:
            self.provisions.ran(step, result)
        outputs: list[SequenceOutput] = []
        ended = False
        for i, request in enumerate(step.requests):
            if request.num_preemptions != step.incarnations[i] or request.phase is not Phase.RUNNING:
                continue
            output = self._receive(request, step.plan, result, i, now)
            if output is not None:
                outputs.append(output)
                if output.finish is not None:
                    ended = True
                    self.lower.used(request)
                    self._close(request)
        if ended:
            self._running.drop_finished()
        if self.provisions:
            self.provisions.confirm(result.step)
        return outputs

    def _receive(
        self, request: Request, plan: StepPlan, result: StepResult, i: int, now: float
    ) -> SequenceOutput | None:
        """What entry `i` of a step's result means for its request; None where there is nothing to tell yet."""
        sampled = plan.samples[i]
        tokens = result.tokens[i]
        if result.errors or len(tokens) != sampled:
            error = result.errors.get(i)
            if error is None:
                error = outcome.mismatch(request, sampled, len(tokens))
            if error is not None:
                self._distrust(request)
                return outcome.terminal(request, Finish.ERROR, error)
            if len(tokens) > self._entrance.burst:
                self._entrance.burst = len(tokens)
                if self.ranges is not None:
                    self.ranges.expect(self._entrance.burst)
        prompt_logprobs: Sequence[TokenLogprobs] = ()
        if found := result.prompt_logprobs.get(i):
            prompt_logprobs = outcome.unsent_prompt_logprobs(request, plan.starts[i], found)
        if not sampled:
            return SequenceOutput(request.id, prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        request.num_in_flight -= 1
        tokens, finish = outcome.accept(request, tokens)
        self._generation_tokens += len(tokens)
        self._tables.publish(request)
        logprob = result.logprobs.get(i)
        return outcome.news(request, tokens, finish, logprob, prompt_logprobs, now)

    # endings

    def _distrust(self, request: Request) -> None:
        """It failed: what it computed shall serve nobody."""
        self.lower.forget(request.block_hashes[: len(request.blocks)])
        self._tables.withdraw(request)

    def _unlist(self, request: Request) -> None:
        """Take a live request out of the list it stands in; who fetches stands in none."""
        if request.phase is Phase.WAITING:
            self._entrance.waiting.remove(request)
        elif request.phase is Phase.RUNNING:
            self._running.remove(request)

    def _vacate(self, request: Request) -> None:
        """Give back what a running request holds: its blocks are free when the steps that may write them have run."""
        self._running.unseat(request)
        self._tables.release(request, self._in_flight[-1].plan.step if self._in_flight else None)

    def _close(self, request: Request) -> None:
        if request.phase is Phase.RUNNING:
            self._vacate(request)
        request.phase = Phase.FINISHED
        request.num_in_flight = 0
        self.lower.settle(request)
        if self.peers.busy:
            self.peers.settle(request)
        del self._requests[request.id]

    def _end(self, request: Request, finish: Finish, error: str | None = None) -> SequenceOutput:
        output = outcome.terminal(request, finish, error)
        self._close(request)
        return output

    # how it stands

    @property
    def num_running(self) -> int:
        return len(self._requests) - self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Those for whom KV is fetched among them."""
        return len(self._entrance.waiting) + self.lower.num_fetching + self.peers.num_fetching

    @property
    def steps_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """A request lives or a result is outstanding."""
        return bool(self._requests or self._in_flight)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=self.num_running,
            waiting=self.num_waiting,
            steps_in_flight=self.steps_in_flight,
            kv_usage=self.pool.usage,
            prefix_queried_tokens=self.pool.queried_tokens,
            prefix_hit_tokens=self.pool.hit_tokens,
            preemptions=self._preemptions,
            evictions=self.pool.evictions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            step_tokens=self._step_tokens,
            tiers=self.lower.stats(),
            segments=None if self.elastic is None else self.elastic.stats,
            peers=peer_stats(self.peers, self.provisions),
        )

    def audit(self) -> None:
        """Raise `AssertionError` with a sentence where books disagree: blocks, slots, lists. Cheap enough when idle."""
        running = list(self._running)
        others = [*self.lower.holders(), *self.peers.holders(), *self.provisions.holders()]
        self.pool.audit([*(request.blocks for request in running), *others])
        self._tables.audit(running)
        self.lower.audit()
        if len(running) + self.num_waiting != len(self._requests):
            raise AssertionError(
                f"{len(self._requests)} requests live, but {len(running)} run and {self.num_waiting} wait"
            )
        self._running.audit(self.config.max_num_seqs)
        if not self.has_work and not others and self.pool.usage > 0:
            raise AssertionError(f"nobody lives, but {self.pool.usage:.1%} of the blocks are held")
