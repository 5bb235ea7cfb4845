"""Where requests' blocks lie in the address space of a `contiguous` pool: ranges of places, and the pages mapped there.

The pool hands out *pages* (its blocks), each of which has a place of its own, its *home*. Every running request has a
*range*: as many neighbouring *places* as the longest sequence has blocks. Block `j` of a request is seen at place `j` of its
range, where its page is mapped; pages of a cached prefix are mapped into several ranges at once or, where many come in one
step, seen at home. Which page lies where is decided here and carried out by the executor (`xllm.core.places`), in the order
of the orders; a plan says how many of them must have been carried out before it runs.

Mapping is a cache. What a request leaves stays mapped, so that the next one of about its size finds pages that need no
mapping: *ready* ranges show pages that are free, and one more of them is always being prepared; when all memory is cached,
the range of what is given up next is taken; for who shares a prefix one that shows it already, as for the next turn of a
conversation. A page that went to somebody else meanwhile may stay mapped in the old place: nobody looks there.

A place is changed only while no step in flight can touch it: its range is free again when the step after which its
request left has run, and a request grows into places that it has not had. Not thread-safe: the scheduler's thread.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import islice

from xllm.core.places import Clear, Place, PlaceOrder
from xllm.kv.pool import BlockPool
from xllm.kv.ready import ReadyRanges

READY = 4  # free ranges with free pages mapped that are kept for who comes
# pages of cached prefixes that are mapped for those who come in one step: mapping one takes 50 us, and many addresses of
# one page are slower to read than one
HITS_A_STEP = 8
BARE = -1  # where a range shows no page
LOOKED_AT = 64  # ranges that show a page, before the next request is given another one


class Ranges:
    """`num_ranges` of `per_range` places each, the first of which is place `first_place`, over a claimable pool.

    Of the places not more than `most_mapped` are mapped for long, where the system sets a limit. `ahead` tokens before a
    request needs its next block it gets it, so that the page is mapped by then. Of cached prefixes `hits_a_step` pages are
    mapped for all who come in one step.
    """

    def __init__(
        self, pool: BlockPool, num_ranges: int, per_range: int, first_place: int, *,
        most_mapped: int | None = None, ahead: int = 0, hits_a_step: int = HITS_A_STEP,
    ):  # fmt: skip
        if num_ranges < 1 or per_range < 1:
            raise ValueError(f"{num_ranges} ranges of {per_range} places")
        self.ahead = ahead
        self._pool = pool
        self._per_range = per_range
        self._first_place = first_place
        self._most_mapped = most_mapped
        self._mapped: list[list[int]] = [[] for _ in range(num_ranges)]  # pages from a range's first place on
        self._num_mapped = 0
        self._at_home: dict[
            int, int
        ] = {}  # by range that somebody has: blocks of a prefix that are seen at home
        self._hits_a_step = self._hits_left = hits_a_step
        self._shown_in: list[set[int]] = [
            set() for _ in range(pool.num_blocks)
        ]  # by page: ranges, all but a few of them
        self._bare = list(range(num_ranges - 1, -1, -1))  # nobody's, nothing mapped
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody's, least recently used first
        self._ready = ReadyRanges()  # of the idle ones
        self._own_from: dict[
            int, int
        ] = {}  # by range that somebody has: blocks of the cached prefix it began with
        self._leaving: deque[tuple[int, int]] = deque()  # (step, range), steps ascending
        self._usual = 1  # blocks that the last request without a cached prefix began with

        self._orders: list[PlaceOrder] = []
        self.ordered = 0  # orders ever made
        self._needed = 0  # so many must have been carried out before the next step
        self._later: list[tuple[int, int]] = []  # a heap: (step, so many must have been before it)
        self._step = 0  # the last one
        self._burst = 1  # tokens that a step brings a sequence at most

    # requests come, grow and go

    def take(self, hits: Sequence[int], count: int) -> tuple[int, list[int]]:
        """A range whose first places show `hits`, held already, and `count` pages behind them, held from now on. So many
        are available, and there is a range."""
        chosen = self._choose(hits, count)
        self._idle.pop(chosen, None)
        self._ready.discard(chosen)
        self._own_from[chosen] = len(hits)
        self._show(chosen, hits)
        if not hits:
            self._usual = count
        pages = self._fresh(chosen, len(hits), count)
        assert pages is not None, "the caller has seen to it that they are available"
        self._needed = self.ordered
        return chosen, pages

    def grow(self, taken: int, have: int, count: int, room: int) -> list[int] | None:
        """`count` pages more for who has `have`; None where the pool has not so many. The next step leaves `room` tokens
        before it would touch them; negative where it does touch them."""
        pages = self._fresh(taken, have, count)
        if pages is None:
            return None
        if room < 0:
            self._needed = self.ordered
        else:
            heappush(self._later, (self._step + 2 + room // self._burst, self.ordered))
        return pages

    def release(self, taken: int, after: int | None) -> None:
        """The range is free when step `after` has run (None: now). Its pages have been released before."""
        self._at_home.pop(taken, None)
        if after is None:
            self._rest(taken)
        else:
            self._leaving.append((after, taken))

    def settle(self, step: int) -> None:
        """Steps up to `step` have run. To be called after the pool's."""
        while self._leaving and self._leaving[0][0] <= step:
            self._rest(self._leaving.popleft()[1])

    def places(self, taken: int, blocks: Sequence[int], first: int = 0) -> list[int]:
        """Where to find a request's `blocks` from `first` on."""
        begin, at_home = self._first_place + taken * self._per_range, self._at_home.get(taken, 0)
        return [*blocks[first:at_home], *range(begin + max(first, at_home), begin + len(blocks))]

    @property
    def has_one(self) -> bool:
        """Whether a range is there to be taken."""
        return bool(self._bare or self._idle)

    # what the executor is to do

    def orders(self) -> list[PlaceOrder]:
        """What is to be mapped and has not been told, and something for who may come."""
        self._prepare()
        self._trim()
        orders, self._orders = self._orders, []
        return orders

    def due(self, step: int) -> int:
        """How many orders must have been carried out before this step, the next, touches memory."""
        self._step = step
        self._hits_left = self._hits_a_step
        while self._later and self._later[0][0] <= step:
            self._needed = max(self._needed, heappop(self._later)[1])
        return self._needed

    def expect(self, burst: int) -> None:
        """From now on a step may bring a sequence so many tokens, more than before."""
        self._burst = burst
        self._needed = self.ordered

    def cache_forgotten(self) -> None:
        """The pool has forgotten its cached prefixes: what free ranges show is free."""
        for idle in self._idle:
            self._make_ready(idle, next((j for j, page in enumerate(self._mapped[idle]) if page != BARE), 0))

    def forget(self, *, unmapped: bool) -> None:
        """No request runs, and what is mapped is not to be relied on; `unmapped`: it has gone by itself."""
        for taken, pages in enumerate(self._mapped):
            if pages and not unmapped:
                self._clear(taken)
            pages.clear()
        self._num_mapped = 0
        self._leaving.clear()
        self._at_home.clear()
        self._later.clear()
        self._idle.clear()
        self._ready.clear()
        self._own_from.clear()
        for ranges in self._shown_in:
            ranges.clear()
        self._bare = list(range(len(self._mapped) - 1, -1, -1))
        self._needed = self.ordered

    # choosing

    def _choose(self, hits: Sequence[int], count: int) -> int:
        """The range that needs least mapping."""
        if hits and (shows := self._idle_with(hits[-1], list(hits))) is not None:
            return shows
        if self._pool.num_free >= count:
            if (ready := self._ready.take(len(hits), count, self._is_ready)) is not None:
                return ready
        elif (oldest := self._pool.oldest) is not None and (shows := self._idle_with(oldest, [])) is not None:
            return shows
        if self._bare:
            return self._bare.pop()
        return next(iter(self._idle))

    def _idle_with(self, page: int, first: list[int]) -> int | None:
        """A free range that shows `page`, and at its beginning `first`."""
        for found in islice(self._shown_in[page], LOOKED_AT):
            if found in self._idle and self._mapped[found][: len(first)] == first:
                return found
        return None

    def _is_ready(self, idle: int, start: int) -> bool:
        page = self._mapped[idle][start] if start < len(self._mapped[idle]) else BARE
        return page != BARE and self._pool.is_free(page)

    def _show(self, taken: int, hits: Sequence[int]) -> None:
        """A cached prefix at the beginning of a range, where that is soon done."""
        mapped = self._mapped[taken]
        lacking = len(hits) - sum(a == b for a, b in zip(mapped, hits, strict=False))
        if lacking <= self._hits_left:
            self._hits_left -= lacking
            self._lay(taken, 0, hits)
        else:
            mapped += [BARE] * (len(hits) - len(mapped))
            self._at_home[taken] = len(hits)

    def _fresh(self, taken: int, first: int, count: int) -> list[int] | None:
        """`count` pages at the places from `first` on: what lies there already if it can be had, else others."""
        pool, mapped = self._pool, self._mapped[taken]
        if count > pool.num_available:
            return None
        cached = pool.num_free < count
        there = mapped[first : first + count]
        here = [page if page != BARE and pool.claim(page, cached=cached) else None for page in there]
        here += [None] * (count - len(here))
        others = pool.allocate(here.count(None))
        assert others is not None, "so many are available"
        others.reverse()
        pages = [others.pop() if page is None else page for page in here]
        self._lay(taken, first, pages)
        return pages

    def _lay(self, taken: int, first: int, pages: Sequence[int]) -> None:
        mapped, place = self._mapped[taken], self._first_place + taken * self._per_range
        for j, page in enumerate(pages, first):
            if j == len(mapped):
                mapped.append(BARE)
            before = mapped[j]
            if before == page:
                continue
            if before == BARE:
                self._num_mapped += 1
            else:
                self._shown_in[before].discard(taken)
            mapped[j] = page
            self._shown_in[page].add(taken)
            self._order(Place(place + j, page))

    def _rest(self, left: int) -> None:
        start = self._own_from.pop(left)
        if not self._mapped[left]:
            self._bare.append(left)
            return
        self._idle[left] = None
        self._make_ready(left, start)

    def _make_ready(self, idle: int, start: int) -> None:
        if self._is_ready(idle, start):
            self._ready.add(idle, start, len(self._mapped[idle]) - start)

    def _prepare(self) -> None:
        """One more free range with free pages, as many as the last request took, unless there are enough of them. They are
        those that the pool hands out last."""
        pool, usual = self._pool, min(self._usual, self._per_range)
        if not self._bare or pool.num_free < 4 * usual or self._ready.count(0) >= READY:
            return
        pages: list[int] = []
        for looked, page in enumerate(pool.free_blocks()):
            if len(pages) == usual or looked == 4 * usual:
                break
            if not any(shows in self._ready for shows in self._shown_in[page]):
                pages.append(page)
        if not pages:
            return
        prepared = self._bare.pop()
        self._lay(prepared, 0, pages)
        self._idle[prepared] = None
        self._make_ready(prepared, 0)

    def _trim(self) -> None:
        """Not more mapped than the system allows, as far as it is nobody's."""
        while self._most_mapped is not None and self._num_mapped > self._most_mapped and self._idle:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            self._ready.discard(oldest)
            self._clear(oldest)
            for page in self._mapped[oldest]:
                if page != BARE:
                    self._num_mapped -= 1
                    self._shown_in[page].discard(oldest)
            self._mapped[oldest].clear()
            self._bare.append(oldest)

    def _clear(self, idle: int) -> None:
        first = self._first_place + idle * self._per_range
        for j, page in enumerate(self._mapped[idle]):
            if page != BARE:
                self._order(Clear(first + j))

    def _order(self, order: PlaceOrder) -> None:
        self._orders.append(order)
        self.ordered += 1

    # integrity

    def audit(self, holders: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Raise `AssertionError` with a sentence on any inconsistency. `holders` are (range, blocks) of all that run."""
        holders = list(holders)
        held = [taken for taken, _ in holders]
        everybody = [*held, *self._bare, *self._idle, *(left for _, left in self._leaving)]
        if sorted(everybody) != list(range(len(self._mapped))):
            raise AssertionError("a range is lost, or two have it")
        for taken, blocks in holders:
            own = self._at_home.get(taken, 0)
            if self._mapped[taken][own : len(blocks)] != list(blocks[own:]):
                raise AssertionError(f"range {taken} does not show the blocks of who has it")
        if not self._at_home.keys() <= set(held):
            raise AssertionError("a prefix is seen at home by nobody")
        if sum(page != BARE for pages in self._mapped for page in pages) != self._num_mapped:
            raise AssertionError(f"{self._num_mapped} places are said to be mapped")
        if any(self._mapped[bare] for bare in self._bare):
            raise AssertionError("something is mapped in a bare range")
        self._ready.audit(self._idle.__contains__)

    @property
    def num_mapped(self) -> int:
        """Places where a page lies, or will."""
        return self._num_mapped
