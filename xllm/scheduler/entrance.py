"""Who of those that wait may run: a slot, memory, KV that is better fetched first. The head of the queue decides for all."""

from collections.abc import Callable, Sequence

from xllm.config.decided import SchedulerConfig
from xllm.core.request import Request
from xllm.kv.elastic import Elastic
from xllm.kv.pool import BlockPool
from xllm.kv.ranges import Ranges
from xllm.scheduler.admission import Demand
from xllm.scheduler.lower_tiers import LowerTiers
from xllm.scheduler.peers import PeerFetches
from xllm.scheduler.running import RunningSet
from xllm.scheduler.step import StepBuilder
from xllm.scheduler.tables import BlockTables
from xllm.scheduler.waiting import WaitingQueue


class Entrance:
    """Between the queue and those that run. Part of the scheduler, whose lists these are."""

    def __init__(
        self, config: SchedulerConfig, admission: Callable[[Demand], bool], pool: BlockPool, tables: BlockTables,
        running: RunningSet, lower: LowerTiers, peers: PeerFetches, elastic: Elastic | None, ranges: Ranges | None,
    ):  # fmt: skip
        self.waiting = WaitingQueue()
        self.burst = 1  # most tokens one step has brought one sequence
        self._config = config
        self._admission = admission
        self._pool = pool
        self._tables = tables
        self._running = running
        self._lower = lower
        self._peers = peers
        self._elastic = elastic
        self._ranges = ranges

    def head(self) -> Request | None:
        """The first that waits, once those before it that have KV to fetch stand aside for it."""
        head = self.waiting.head
        while head is not None and self._fetch(head):
            head = self.waiting.head
        return head

    def admit(self, request: Request, builder: StepBuilder, now: float) -> bool:
        """Let the head of the queue run if a slot and memory are there. Nobody overtakes a head that has to wait."""
        if not self._running.has_slot or (self._ranges is not None and not self._ranges.has_one):
            return False
        tables, pool = self._tables, self._pool
        hits = tables.find(request)
        cached = len(hits) * pool.block_size
        if not self._config.chunked_prefill and request.num_known - cached > builder.budget:
            return False
        if tables.stands_aside(request, len(hits)):
            return False
        demand = self._demand(request, hits)
        if not self._admission(demand):
            hits_reusable = pool.num_available - demand.available
            self.comes_by_itself(demand.now + demand.margin + hits_reusable)
            return False
        self.waiting.pop()
        self._lower.settle(request)
        tables.take(request, hits)
        self._running.seat(request)
        if request.first_scheduled is None:
            request.first_scheduled = now
            if not request.output_token_ids:  # else told where it began
                request.num_cached_tokens = cached
            pool.count_lookup(request.num_known, cached)
        builder.introduce(request)
        return True

    def comes_by_itself(self, available: int) -> bool:
        """Whether there is memory to come, until so many blocks are available; asks for it."""
        if self._elastic is None or not (self._elastic.can_grow or self._elastic.busy):
            return False
        self._elastic.want(min(available, self._pool.num_blocks))
        return True

    def _fetch(self, request: Request) -> bool:
        """Whether it stands aside: a store is asked, or KV comes up from a lower tier or over from a peer."""
        lower, peers, tables = self._lower, self._peers, self._tables
        if not lower and (not peers or request.kv_from is None):
            return False
        if self._running.num_seated + lower.num_fetching + peers.num_fetching >= self._config.max_num_seqs:
            return False  # it could not run any sooner
        hits = tables.find(request)
        return self._fetch_up(request, hits) or self._fetch_over(request, hits)

    def _fetch_up(self, request: Request, hits: Sequence[int]) -> bool:
        lower, tables = self._lower, self._tables
        if lower.look(request, len(hits), tables.limit(request)):
            self.waiting.pop()
            return True
        count = lower.wanted(request, len(hits), tables.limit(request))
        if not count or not self._admission(self._demand(request, hits)):
            return False
        if not lower.fetch(request, hits, count, tables.origins(request, len(hits), count)):
            return False
        self.waiting.pop()
        return True

    def bring_up(self, request: Request, hits: Sequence[int]) -> int:
        """For a peer: how many blocks behind `hits` are on their way up from a lower tier now, or fewer. `request` has their
        names and does not run; `LowerTiers.brought` has it once they have come."""
        count = self._lower.wanted(request, len(hits), len(request.block_hashes))
        origins = self._tables.origins(request, len(hits), count)
        if not count or not self._admission(self._demand(request, hits)):
            count = 0
        if not count or not self._lower.fetch(request, hits, count, origins, errand=True):
            self._lower.settle(request)
            return 0
        return count

    def _fetch_over(self, request: Request, hits: Sequence[int]) -> bool:
        peers, tables = self._peers, self._tables
        first = len(hits)
        if not peers.wanted(request, first, tables.limit(request)):
            return False
        if not self._admission(self._demand(request, hits)):
            return False
        # whose first token comes with it need not compute any of its last block
        end = len(tables.names(request)) if peers.opens(request) else tables.limit(request)
        names = request.block_hashes[first:end]
        peers.fetch(request, hits, names, tables.origins(request, first, len(names)))
        self.waiting.pop()
        return True

    def _demand(self, request: Request, hits: Sequence[int]) -> Demand:
        tables, pool = self._tables, self._pool
        return Demand(
            now=tables.blocks_for(request.num_known) - len(hits),
            at_worst=tables.at_most(request) - len(hits),
            available=pool.num_available - pool.num_reusable(hits),
            margin=self._running.num_seated * tables.blocks_for(self.burst),
            promised=tables.promised,
        )
