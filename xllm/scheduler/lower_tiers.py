"""What scheduling does with KV tiers below the device: what becomes known to the prefix cache is saved there, and a waiting
request whose prefix lies there has it fetched before it runs.

A fetch takes device blocks, and the request stands aside until they are filled; others run meanwhile. Then the blocks
are in the prefix cache and the request waits again, to be admitted like any other with more cached. Whatever goes wrong
below means that it finds less there and computes the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.core.request import Phase, Request
from xllm.core.transfer import News, Order, TierStats
from xllm.kv.events import Origin
from xllm.kv.pool import BlockPool
from xllm.kv.tiers.offload import Arrived, Offload

SAVING_SHARE = 2  # one part in so many of the device's blocks may be held for saves


@dataclass(slots=True)
class _Fetch:
    request: Request
    cached: Sequence[int]  # device blocks that were there before
    fetched: Sequence[int]  # those that are being filled
    names: Sequence[bytes]
    origins: Sequence[Origin | None]
    trusted: bool = True  # False: the cache was forgotten meanwhile


class LowerTiers:
    """Holds the references on device blocks that bytes are moved from or to. Belongs to the scheduler's thread. Without an
    `offload` there are no such tiers: it is false, and nothing ever happens."""

    def __init__(self, offload: Offload | None, pool: BlockPool):
        self._offload = offload
        self._pool = pool
        self._fetches: dict[int, _Fetch] = {}
        self._saving = 0  # blocks held for that
        self._asked: set[str] = set()  # requests that have fetched, or need not, since they last ran

    def __bool__(self) -> bool:
        return self._offload is not None

    @property
    def num_fetching(self) -> int:
        """Requests that stand aside, those that ended meanwhile not among them."""
        return sum(fetch.request.phase is Phase.FETCHING for fetch in self._fetches.values())

    @property
    def busy(self) -> bool:
        """Something is under way: blocks will come back without a step."""
        return self._offload is not None and self._offload.busy

    def save(self, block: int, name: bytes, origin: Origin | None) -> None:
        """A block has just become known under its name. Where the mover cannot follow it is not saved: what waits for it
        must not take the pool from those who run."""
        assert self._offload is not None
        if self._saving < max(1, self._pool.num_blocks // SAVING_SHARE) and self._offload.save(
            name, block, origin
        ):
            self._saving += 1
            self._pool.share([block])

    def wanted(self, request: Request, cached: int, limit: int) -> int:
        """How many blocks behind the `cached` first should be fetched, of `limit` that may be; 0: none, let it run."""
        if self._offload is None or request.id in self._asked:
            return 0
        names = request.block_hashes[cached:limit]
        count = self._offload.find(names)
        on_disk = self._offload.on_disk(names[:count])
        if count and self._offload.worthwhile(count, self._pool.block_size, on_disk):
            return count
        self._asked.add(request.id)
        return 0

    def fetch(self, request: Request, cached: Sequence[int], count: int, origins: Sequence[Origin | None]) -> bool:  # fmt: skip
        """Start; the caller has seen to it that so many blocks are available. False where it could not be."""
        self._asked.add(request.id)
        pool, first = self._pool, len(cached)
        pool.share(cached)
        blocks = pool.allocate(count)
        assert blocks is not None, "a fetch was started without the memory for it"
        names = request.block_hashes[first : first + count]
        assert self._offload is not None, "only what is wanted is fetched"
        known = [origin for origin in origins if origin is not None]
        ticket, covered = self._offload.load(names, blocks, known or None)
        if covered < count:
            pool.release(blocks[covered:])
        if not covered:
            pool.release(cached)
            return False
        self._fetches[ticket] = _Fetch(request, cached, blocks[:covered], names[:covered], origins[:covered])
        request.phase = Phase.FETCHING
        return True

    def settle(self, request: Request) -> None:
        """It runs, or ended: should it ever wait again, it may fetch again."""
        self._asked.discard(request.id)

    def orders(self) -> tuple[list[int], list[Order]]:
        """Disk slots whose records are void, and what is to be moved: to be handed to the executor behind the steps
        submitted so far."""
        if self._offload is None:
            return [], []
        return self._offload.distrusted(), self._offload.orders()

    def take(self, news: Sequence[News]) -> list[Request]:
        """What the executor says. Returns the requests that wait again."""
        if self._offload is None:
            return []
        back: list[Request] = []
        for done in self._offload.take(news):
            if isinstance(done, Arrived):
                back += self._arrived(done.ticket, done.count)
            else:
                self._saving -= 1
                self._pool.release([done.block])
        return back

    def _arrived(self, ticket: int, count: int) -> list[Request]:
        fetch = self._fetches.pop(ticket)
        if fetch.trusted:
            for block, name, origin in zip(fetch.fetched[:count], fetch.names, fetch.origins, strict=False):
                self._pool.publish(block, name, origin)
        self._pool.release([*fetch.cached, *fetch.fetched])
        if fetch.request.phase is not Phase.FETCHING:
            return []
        fetch.request.phase = Phase.WAITING
        return [fetch.request]

    def used(self, request: Request) -> None:
        """It ended well: what it went through is the most recently used below, its beginning last of all to go."""
        if self._offload is not None:
            self._offload.touch(request.block_hashes)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of nothing but prompts took so long."""
        if self._offload is not None and seconds > 0:
            self._offload.cost.computed(tokens, seconds)

    def forget(self, names: Sequence[bytes]) -> None:
        """What they stand for is not to be trusted."""
        if self._offload is not None:
            self._offload.forget(names)

    def clear(self) -> None:
        """Forget everything, also what is under way."""
        if self._offload is not None:
            self._offload.clear()
        for fetch in self._fetches.values():
            fetch.trusted = False

    def stats(self) -> tuple[TierStats, ...]:
        """Nearest tier first."""
        return () if self._offload is None else tuple(self._offload.stats)

    def holders(self) -> list[Sequence[int]]:
        """Blocks with a reference from here, as the pool's audit wants them."""
        fetches = [[*fetch.cached, *fetch.fetched] for fetch in self._fetches.values()]
        saves = () if self._offload is None else self._offload.blocks_held()
        return [*fetches, *([block] for block in saves)]

    def audit(self) -> None:
        if self._offload is not None:
            self._offload.audit()
