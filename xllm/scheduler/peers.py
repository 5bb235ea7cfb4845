"""KV that requests fetch from other engines before they run: like a fetch from a lower tier (`lower_tiers`), over the network.

The request stands aside while blocks set aside for it are filled. Then those that came are in the prefix cache and it waits
again, to be admitted like any other with more cached. Whatever goes wrong on the way means that it computes the rest.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from xllm.core.peers import Fetch, Fetched, FetchOrder, GiveUp, Opening
from xllm.core.request import Phase, Request
from xllm.kv.events import Origin
from xllm.kv.pool import BlockPool


@dataclass(slots=True)
class _Fetch:
    request: Request
    cached: Sequence[int]  # device blocks that were there before
    fetched: Sequence[int]  # those that are being filled
    names: Sequence[bytes]
    origins: Sequence[Origin | None]
    trusted: bool = True  # False: the cache was forgotten meanwhile
    given_up: bool = False


class PeerFetches:
    """Holds the references on blocks that peers' KV is read into, until nothing writes there any more. Belongs to the
    scheduler's thread. Where there is no way to peers it is false, and nothing ever happens."""

    def __init__(self, pool: BlockPool, reachable: bool):
        self._pool = pool
        self._reachable = reachable and pool.prefix_caching
        self._fetches: dict[int, _Fetch] = {}
        self._orders: list[FetchOrder] = []
        self._tickets = count(1)
        self.on_published: Callable[[int, bytes, Origin | None], None] | None = None  # block, name, origin
        self.now = 0.0  # the scheduler's clock
        # counters
        self.ended = self.blocks = 0
        self.seconds = 0.0
        self.failures: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return self._reachable

    @property
    def num_fetching(self) -> int:
        """Requests that stand aside, those that ended meanwhile not among them."""
        return sum(fetch.request.phase is Phase.FETCHING for fetch in self._fetches.values())

    @property
    def busy(self) -> bool:
        """Something is under way: blocks will come back without a step."""
        return bool(self._fetches)

    def wanted(self, request: Request, cached: int, limit: int) -> int:
        """How many blocks behind the `cached` first should be fetched, of `limit` that may be; 0: none, let it run."""
        return max(0, limit - cached) if self._reachable and request.kv_from is not None else 0

    def opens(self, request: Request) -> bool:
        """Whether the peer samples the first token, too: it computes the prompt, and only the token is told of it."""
        params, peer = request.params, request.kv_from
        told_more = params.logprobs is not None or params.prompt_logprobs is not None
        return peer is not None and peer.compute and not request.output_token_ids and not told_more

    def fetch(self, request: Request, cached: Sequence[int], names: Sequence[bytes], origins: Sequence[Origin | None]) -> None:  # fmt: skip
        """Start, for the blocks called `names` behind the cached ones; the caller has seen to it that so many are
        available. A request is fetched for once: should it wait again, it has no peer any more."""
        opens = self.opens(request)
        peer, request.kv_from = request.kv_from, None
        assert peer is not None, "only what is wanted is fetched"
        pool, first = self._pool, len(cached)
        pool.share(cached)
        blocks = pool.allocate(len(names))
        assert blocks is not None, "a fetch was started without the memory for it"
        ticket = next(self._tickets)
        end = (first + len(names)) * pool.block_size
        tail = request.known_tokens(end, request.num_known) if opens else ()
        self._fetches[ticket] = _Fetch(request, cached, blocks, names, origins)
        self._orders.append(
            Fetch(
                ticket,
                peer,
                request.known_tokens(0, end),
                request.cache_salt,
                first,
                blocks,
                request.priority,
                None if request.deadline is None else request.deadline - self.now,
                Opening(tail, request.params, request.seed) if opens else None,
            )
        )
        request.phase = Phase.FETCHING

    def settle(self, request: Request) -> None:
        """It ended: nobody wants what is on its way for it."""
        for ticket, fetch in self._fetches.items():
            if fetch.request is request:
                self._give_up(ticket, fetch)

    def orders(self) -> list[FetchOrder]:
        orders, self._orders = self._orders, []
        return orders

    def take(self, news: Sequence[Fetched]) -> list[tuple[Request, int | None]]:
        """What became of the orders. Returns the requests that wait again, each with its first token where that has come."""
        back: list[tuple[Request, int | None]] = []
        for done in news:
            fetch = self._fetches.pop(done.ticket)
            self._count(done)
            if fetch.trusted:
                self._publish(fetch, done.count)
            self._pool.release([*fetch.cached, *fetch.fetched])
            request = fetch.request
            if request.phase is Phase.FETCHING:
                request.phase = Phase.WAITING
                request.fetched_tokens = done.count * self._pool.block_size if fetch.trusted else 0
                request.fetch_s = done.seconds
                request.num_cached_tokens = len(fetch.cached) * self._pool.block_size + request.fetched_tokens
                back.append((request, done.token if fetch.trusted else None))
        return back

    def clear(self) -> None:
        """The cache was forgotten: what is under way belongs to what was before."""
        for ticket, fetch in self._fetches.items():
            fetch.trusted = False
            self._give_up(ticket, fetch)

    def holders(self) -> list[Sequence[int]]:
        """Blocks with a reference from here, as the pool's audit wants them."""
        return [[*fetch.cached, *fetch.fetched] for fetch in self._fetches.values()]

    def _give_up(self, ticket: int, fetch: _Fetch) -> None:
        if not fetch.given_up:
            fetch.given_up = True
            self._orders.append(GiveUp(ticket))

    def _publish(self, fetch: _Fetch, count: int) -> None:
        for block, name, origin in zip(fetch.fetched[:count], fetch.names, fetch.origins, strict=False):
            if self._pool.publish(block, name, origin) and self.on_published is not None:
                self.on_published(block, name, origin)

    def _count(self, done: Fetched) -> None:
        self.ended += 1
        self.blocks += done.count
        self.seconds += done.seconds
        if done.failure is not None:
            self.failures[done.failure] += 1
