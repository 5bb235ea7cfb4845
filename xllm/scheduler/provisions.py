"""KV that other engines read out of this one's blocks: what is being computed for them, what they may read, and for how long
it stays.

A provision is of neighbouring blocks of one prompt. What is cached of them is held as it is found, what is not is computed by
an ordinary request whose one token nobody sees, or, where the peer wants no more than what is there, comes up from a lower tier. A block is *offered* once the step that filled it has ended well, and held
until it was taken or the provision has ended. Whoever reads it checks what arrived, so that nothing here has to wait for a
reader that is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.core.peers import Offering, PeerStats
from xllm.core.plan import StepResult
from xllm.core.request import Phase, Request
from xllm.kv.pool import BlockPool
from xllm.scheduler.peers import PeerFetches
from xllm.scheduler.step import InFlight

HELD_SHARE = 2  # one part in so many of the pool's blocks may be held for peers


@dataclass(slots=True)
class Provision:
    id: str
    request: Request | None  # that computes; None: there is only what is cached
    names: Sequence[bytes]  # of all blocks of the prompt that are known, from the prompt's first on
    first: int  # in the prompt; everything below counts from there
    total: int
    sure_after: int  # the step by which what was cached at first is written
    coming: Request | None = None  # for which more comes up from a lower tier; then `total` is a hope
    held: list[int] = field(default_factory=list)  # blocks, those that were taken included
    found: int = 0  # so many of them were somebody else's making
    incarnation: int = -1  # of the request
    ready: int = 0
    taken: int = 0
    looked_at: int = 0  # offers whose checksums are being made
    opening: bool = False  # the first token behind the prompt is wanted, and not known yet
    over: bool = False

    @property
    def waits_for_peer(self) -> bool:
        return not self.over and self.taken < self.ready


class Provisions:
    """Holds the references on blocks that peers read. Belongs to the scheduler's thread. False while there are none."""

    def __init__(self, pool: BlockPool):
        self._pool = pool
        self._all: dict[str, Provision] = {}
        self._offers: list[Offering] = []
        self._ends: list[tuple[str, int, str | None]] = []  # id, blocks taken, what went wrong
        self.ended = self.failed = self.blocks = 0  # counters

    def __bool__(self) -> bool:
        return bool(self._all)

    def __len__(self) -> int:
        return sum(not one.over for one in self._all.values())

    def __contains__(self, id: str) -> bool:
        return id in self._all

    @property
    def waiting_for_peers(self) -> list[str]:
        return [one.id for one in self._all.values() if one.waits_for_peer]

    def begin(
        self, id: str, request: Request | None, names: Sequence[bytes], first: int, total: int, found: Sequence[int], sure_after: int,
        coming: Request | None = None, opening: bool = False,
    ) -> None:  # fmt: skip
        """`found` are the cached ones among its blocks, from the front; they are written once step `sure_after` has ended."""
        one = self._all[id] = Provision(id, request, names, first, total, sure_after, coming, opening=opening)
        if self._hold(one, found):
            one.found = len(found)
            self._finish(one)

    def opened(self, id: str) -> None:
        """The peer has been told the first token."""
        one = self._all.get(id)
        if one is not None and not one.over:
            one.opening = False
            self._finish(one)

    def brought(self, request: Request, cached: Sequence[int]) -> None:
        """What was to come up from a lower tier for it has, or as much as could be; its prompt has these blocks now."""
        one = self._all.get(request.id)
        if one is None or one.over or one.coming is not request:
            return
        one.coming = None
        if self._hold(one, cached[one.first + len(one.held) : one.first + one.total]):
            one.found = one.total = len(one.held)
            self._finish(one)

    # steps

    def ran(self, step: InFlight, result: StepResult) -> None:
        """A step has run, and its requests still have their blocks."""
        for i, request in enumerate(step.requests):
            one = self._all.get(request.id)
            if one is None or one.over or one.request is not request or i in result.errors:
                continue
            if request.num_preemptions != step.incarnations[i] or request.phase is not Phase.RUNNING:
                continue
            if one.incarnation != request.num_preemptions:  # its first step: what it began with was cached
                one.incarnation = request.num_preemptions
                one.found = max(len(one.held), step.plan.starts[i] // self._pool.block_size - one.first)
            full = (step.plan.starts[i] + step.plan.counts[i]) // self._pool.block_size
            self._hold(one, request.blocks[one.first + len(one.held) : min(full, one.first + one.total)])

    def confirm(self, step: int) -> None:
        """What went wrong in it is known and withdrawn: the rest may be read."""
        for one in list(self._all.values()):
            if one.over or one.sure_after > step or one.ready == len(one.held):
                continue
            sound = one.ready
            while sound < len(one.held) and self._is_sound(one, sound):
                sound += 1
            if sound > one.ready:
                self._offers.append(Offering(one.id, one.ready, one.held[one.ready : sound], one.total))
                one.ready = sound
                one.looked_at += 1
            if sound < len(one.held):
                self.end(one.id, "what was cached turned out not to be sound")

    def _is_sound(self, one: Provision, i: int) -> bool:
        """Computed for it in a step that ended well, or cached still."""
        return i >= one.found or self._pool.index.name_of(one.held[i]) == one.names[one.first + i]

    # peers

    def taken(self, id: str, upto: int) -> None:
        one = self._all.get(id)
        if one is None or one.over:
            return
        upto = min(upto, one.ready)
        if upto > one.taken:
            self.blocks += upto - one.taken
            self._pool.release(one.held[one.taken : upto])
            one.taken = upto
            self._finish(one)

    def end(self, id: str, why: str | None) -> Request | None:
        """Whoever asked for it is to be told; None: all was well. Returns the request that computes for it."""
        one = self._all.get(id)
        if one is None or one.over:
            return None
        one.over = True
        self.ended += 1
        self.failed += why is not None
        self._offers = [offer for offer in self._offers if offer.id != id or self._unlook(one)]
        self._ends.append((id, one.taken, why))
        self._drop(one)
        return one.request

    def looked(self, id: str) -> None:
        """The checksums of an offer are made, or never will be."""
        one = self._all[id]
        one.looked_at -= 1
        if one.over:
            self._drop(one)

    def end_all(self, why: str) -> None:
        for id in list(self._all):
            self.end(id, why)

    def offers(self) -> list[Offering]:
        offers, self._offers = self._offers, []
        return offers

    def ends(self) -> list[tuple[str, int, str | None]]:
        ends, self._ends = self._ends, []
        return ends

    def holders(self) -> list[Sequence[int]]:
        """Blocks with a reference from here, as the pool's audit wants them."""
        return [one.held[one.taken :] for one in self._all.values()]

    def _hold(self, one: Provision, blocks: Sequence[int]) -> bool:
        held = sum(len(other.held) - other.taken for other in self._all.values())
        if held + len(blocks) > max(1, self._pool.num_blocks // HELD_SHARE):
            self.end(one.id, "there is no room to hold blocks for others")
            return False
        self._pool.share(blocks)
        one.held += blocks
        return True

    def _finish(self, one: Provision) -> None:
        if one.taken == one.total and not one.opening and not one.over:
            self.end(one.id, None)

    def _unlook(self, one: Provision) -> bool:
        """An offer of it will not be made."""
        one.looked_at -= 1
        return False

    def _drop(self, one: Provision) -> None:
        """What it holds goes once nobody of this engine looks at it either."""
        if not one.looked_at:
            self._pool.release(one.held[one.taken :])
            del self._all[one.id]


def peer_stats(fetches: PeerFetches, provisions: Provisions) -> PeerStats:
    """As far as the scheduler knows."""
    if not fetches and not provisions.ended and not provisions:
        return PeerStats()
    return PeerStats(
        fetching=fetches.num_fetching,
        providing=len(provisions),
        fetches=fetches.ended,
        fetched_blocks=fetches.blocks,
        fetch_s=fetches.seconds,
        failures=dict(fetches.failures),
        provisions=provisions.ended,
        provided_blocks=provisions.blocks,
        provision_failures=provisions.failed,
    )
