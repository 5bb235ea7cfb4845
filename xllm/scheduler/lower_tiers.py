"""What scheduling does with KV tiers below the device: what becomes known to the prefix cache is saved there, and a waiting
request whose prefix lies there has it fetched before it runs. Where there is a store that others use as well, it is asked
first, and the request stands aside for that too.

A fetch takes device blocks, and the request stands aside until they are filled; others run meanwhile. Then the blocks
are in the prefix cache and the request waits again, to be admitted like any other with more cached. Whatever goes wrong
below means that it finds less there and computes the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.core.request import Phase, Request
from xllm.core.transfer import News, Order, TierStats
from xllm.kv.events import Origin
from xllm.kv.pool import BlockPool
from xllm.kv.tiers.loads import Answered, Arrived
from xllm.kv.tiers.offload import Offload, Released

SAVING_SHARE = 2  # one part in so many of the device's blocks may be held for saves


@dataclass(slots=True)
class _Fetch:
    request: Request
    cached: Sequence[int]  # device blocks that were there before
    fetched: Sequence[int]  # those that are being filled
    names: Sequence[bytes]
    origins: Sequence[Origin | None]
    trusted: bool = True  # False: the cache was forgotten meanwhile
    errand: bool = False  # nobody stands aside: a peer is to have it


@dataclass(slots=True)
class _Question:
    """To the store. Whoever would ask the same waits for the same answer."""

    first: bytes
    requests: list[Request] = field(default_factory=list)


class LowerTiers:
    """Holds the references on device blocks that bytes are moved from or to. Belongs to the scheduler's thread. Without an
    `offload` there are no such tiers: it is false, and nothing ever happens."""

    def __init__(self, offload: Offload | None, pool: BlockPool):
        self._offload = offload
        self._pool = pool
        self._fetches: dict[int, _Fetch] = {}
        self._questions: dict[int, _Question] = {}
        self._brought: list[Request] = []  # errands that have ended
        self._saving = 0  # blocks held for that
        self._begun = self._done = 0  # steps: the last submitted, the last whose result was taken in
        self._asked: set[str] = set()  # requests that have fetched, or need not, since they last ran
        self._looked: set[str] = set()  # those for whom the store was asked, or need not be

    def __bool__(self) -> bool:
        return self._offload is not None

    @property
    def num_fetching(self) -> int:
        """Requests that stand aside, those that ended meanwhile not among them."""
        fetching = [fetch.request for fetch in self._fetches.values()]
        asking = [request for question in self._questions.values() for request in question.requests]
        return sum(request.phase is Phase.FETCHING for request in (*fetching, *asking))

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

    def clock(self, now: float) -> None:
        """What is known of a store holds for some time only."""
        if self._offload is not None and self._offload.store is not None:
            self._offload.store.now = now

    def look(self, request: Request, cached: int, limit: int) -> bool:
        """Whether the request stands aside until the store has said what it has of the blocks behind the `cached` first."""
        if self._offload is None or self._offload.store is None or request.id in self._looked:
            return False
        self._looked.add(request.id)
        names = request.block_hashes[cached:limit]
        first = names[self._offload.find(names) :][:1]
        question = next((one for one in self._questions.values() if [one.first] == first), None)
        if question is None:
            ticket, asked = self._offload.look(names, self._pool.block_size)
            if not ticket:
                return False
            question = self._questions[ticket] = _Question(asked)
        question.requests.append(request)
        request.phase = Phase.FETCHING
        return True

    def wanted(self, request: Request, cached: int, limit: int) -> int:
        """How many blocks behind the `cached` first should be fetched, of `limit` that may be; 0: none, let it run."""
        if self._offload is None or request.id in self._asked:
            return 0
        count = self._offload.worthwhile(request.block_hashes[cached:limit], self._pool.block_size)
        if not count:
            self._asked.add(request.id)
        return count

    def fetch(self, request: Request, cached: Sequence[int], count: int, origins: Sequence[Origin | None], errand: bool = False) -> bool:  # fmt: skip
        """Start; the caller has seen to it that so many blocks are available. False where it could not be. The request stands
        aside, but for an `errand`: that is in `brought` at last."""
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
        self._fetches[ticket] = _Fetch(
            request, cached, blocks[:covered], names[:covered], origins[:covered], errand=errand
        )
        if not errand:
            request.phase = Phase.FETCHING
        return True

    def brought(self) -> list[Request]:
        """Errands that have ended since the last call: what came is in the prefix cache."""
        brought, self._brought = self._brought, []
        return brought

    def settle(self, request: Request) -> None:
        """It runs, or ended: should it ever wait again, it may ask and fetch again."""
        self._asked.discard(request.id)
        self._looked.discard(request.id)

    def orders(self) -> tuple[list[int], list[Order]]:
        """Disk slots whose records are void, and what is to be moved: to be handed to the executor behind the steps
        submitted so far."""
        if self._offload is None:
            return [], []
        return self._offload.distrusted(), self._offload.orders(self._begun, self._done)

    def take(self, news: Sequence[News]) -> list[Request]:
        """What the executor says. Returns the requests that wait again."""
        if self._offload is None:
            return []
        back: list[Request] = []
        for done in self._offload.take(news):
            match done:
                case Arrived():
                    back += self._arrived(done.ticket, done.count)
                case Answered():
                    back += self._answered(self._questions.pop(done.ticket))
                case Released():
                    self._saving -= 1
                    self._pool.release([done.block])
        return back

    def _answered(self, question: _Question) -> list[Request]:
        for joined in question.requests[1:]:  # their prompts may go on with what was not asked
            self._looked.discard(joined.id)
        return _waiting_again(question.requests)

    def _arrived(self, ticket: int, count: int) -> list[Request]:
        fetch = self._fetches.pop(ticket)
        if fetch.trusted:
            for block, name, origin in zip(fetch.fetched[:count], fetch.names, fetch.origins, strict=False):
                self._pool.publish(block, name, origin)
        self._pool.release([*fetch.cached, *fetch.fetched])
        if fetch.errand:
            self._asked.discard(fetch.request.id)
            self._brought.append(fetch.request)
        return _waiting_again([fetch.request])

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

    def began(self, step: int) -> None:
        """It was planned, and will be submitted before the next `orders`."""
        self._begun = step

    def ended(self, step: int) -> None:
        """Its result is here, and what is wrong with it is said before the next `orders`."""
        self._done = step

    def leave(self) -> None:
        """The cache was forgotten since it is of another model, as it were: so is what lies in a store."""
        if self._offload is not None:
            self._offload.leave()

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


def _waiting_again(requests: Sequence[Request]) -> list[Request]:
    """Those that still stand aside, and do so no longer."""
    back = [request for request in requests if request.phase is Phase.FETCHING]
    for request in back:
        request.phase = Phase.WAITING
    return back
