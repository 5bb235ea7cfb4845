"""How many segments of an elastic block pool have memory: decided here, carried out by the executor.

Memory is mapped ahead of demand: as long as fewer than `reserve_blocks` blocks are available, reusable ones included,
the lowest missing segment is asked for. So cached prefixes are given up before memory is taken for others, and nobody
waits for memory while demand rises slowly; who needs much at once says so (`want`). Memory is given back late: one
segment at a time, the highest first, where for `idle_s` seconds nobody has held any of its blocks and at least twice
the reserve has been available without it. Between one and two reserves nothing happens at all, and what is only
needed at the peaks of demand stays, so that no segment comes and goes in turns.

Where there is no memory to be had, the next attempt waits: 0.1 s at first, twice as long after each failure up to 5 s,
and only one segment is asked for at a time until one comes.

The first segment stays for good: the address of the pool is that of memory, and block 0, which stands in tables where
nothing is, can be read.

`set_limit` may ask for less than there is. What is free of the segments that have to go leaves the pool at once, the
rest as its holders release it, and a segment is unmapped when its last block has left. Not thread-safe: it belongs to
the scheduler's thread.
"""

from collections.abc import Sequence
from enum import Enum
from heapq import heappop, heappush
from math import inf

from xllm.core.segments import Grow, Grown, SegmentNews, SegmentOrder, SegmentStats, Shrink
from xllm.kv.pool import BlockPool

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_DRAINED_AT_ONCE = 64  # segments that one call looks at: a lowered limit must not hold up the step
_LOOKED_AT_ONCE = 64  # the same, where idle ones are looked for
_BETWEEN_LOOKS_S = 0.25  # from the end of a look at all segments to the begin of the next, at least


class _State(Enum):
    ABSENT = "absent"
    GROWING = "growing"  # a Grow without news
    MAPPED = "mapped"  # its blocks are the pool's
    LEAVING = "leaving"  # mapped, but its blocks leave the pool because of the limit
    SHRINKING = "shrinking"  # a Shrink without news; its blocks have left the pool


class Elastic:
    """Decides on the segments of `pool`, an elastic one whose blocks are those of its first segments, at least one.

    `limit_blocks` is the most that may have memory, None for all; at least one segment always has. While `in_use` the
    reserve is `reserve_in_use` blocks, where that is more. Seconds are those of whatever clock `orders` is called with.
    """

    def __init__(
        self,
        pool: BlockPool,
        blocks_per_segment: int,
        reserve_blocks: int,
        limit_blocks: int | None = None,
        idle_s: float = 10.0,
        reserve_in_use: int = 0,
    ):
        if not pool.elastic:
            raise ValueError("the pool has all its blocks for good: it cannot grow or shrink")
        if blocks_per_segment < 1 or reserve_blocks < 0 or idle_s < 0:
            raise ValueError(
                f"no pool grows by {blocks_per_segment} blocks with {reserve_blocks} in reserve and {idle_s} s to idle"
            )
        capacity = -(-pool.num_blocks // blocks_per_segment)
        mapped = -(-pool.num_mapped // blocks_per_segment)
        if pool.num_mapped != min(mapped * blocks_per_segment, pool.num_blocks) or mapped == 0:
            raise ValueError(f"{pool.num_mapped} blocks are not whole segments of {blocks_per_segment}")
        self._pool = pool
        self._per_segment = blocks_per_segment
        self.in_use = False  # whoever calls `orders` says so: requests live
        self._reserves = reserve_blocks, max(reserve_blocks, reserve_in_use)
        self._idle_s = idle_s
        self._wanted = 0
        self._states = [_State.MAPPED] * mapped + [_State.ABSENT] * (capacity - mapped)
        self._absent = list(range(mapped, capacity))  # a heap
        self._num_mapped = mapped  # segments in that state
        self._leaving: list[int] = []  # segments in that state, the next to be looked at first
        self._kept = pool.num_mapped  # blocks of mapped and growing segments
        self._growing = 0  # of them, in growing segments
        self._orders: list[SegmentOrder] = []
        self._unanswered = 0
        self._now = 0.0  # of the last `orders`
        self._idle_at = [0.0] * capacity  # no mapped segment is idle before
        self._next_look: float | None = None  # none goes before; None before the first `orders`
        self._to_look_at = capacity - 1  # the next one, downwards; of a look that was begun
        self._soonest = inf  # that a segment seen in it may be idle
        self._retry_at = 0.0
        self._wait_s = 0.0  # how long after the last refusal; 0 where none came since a segment was mapped
        self._refused_now = False  # since the last `orders`
        self._present = self._most = mapped  # segments that have memory
        self._grown = self._shrunk = self._refused = 0
        self.set_limit(limit_blocks)

    # what others say

    def want(self, blocks: int) -> None:
        """Somebody waits until so many blocks are available; 0: nobody does any more. It holds until they are, or until
        another number is said, and comes on top of the reserve."""
        self._wanted = blocks

    def set_limit(self, blocks: int | None) -> None:
        """At most so many blocks may have memory from now on, None for all of them; see `limit_blocks`."""
        if blocks is not None and blocks < 0:
            raise ValueError(f"{blocks} blocks are no limit")
        self._limit = self._pool.num_blocks if blocks is None else blocks

    def take(self, news: Sequence[SegmentNews]) -> None:
        """What has become of orders, in any order. `ValueError` for news of what was not ordered."""
        for one in news:
            grown = isinstance(one, Grown)
            expected = _State.GROWING if grown else _State.SHRINKING
            if self._states[one.segment] is not expected:
                raise ValueError(f"{one} comes while the segment is {self._states[one.segment].value}")
            self._unanswered -= 1
            if isinstance(one, Grown):
                self._take_grown(one)
            else:
                self._make_absent(one.segment)
                self._present -= 1
                self._shrunk += 1

    # how it stands

    @property
    def can_grow(self) -> bool:
        """Whether another segment could come: there is one below the limit, and the last refusal is some time ago."""
        if self._refused_now or self._now < self._retry_at:
            return False
        if self._next_missing is not None:
            return True
        # What shrinks can come again afterwards.
        some_shrink = self._present > self._num_mapped + len(self._leaving)
        return some_shrink and not self._leaving and self._kept + self._per_segment <= self._limit

    @property
    def busy(self) -> bool:
        """Whether orders are without news."""
        return self._unanswered > 0

    @property
    def wake_at(self) -> float | None:
        """When `orders` may have something to say though nothing happens until then; None: not before something does."""
        if self._next_look is None or self._refused_now or self._over_limit:
            return self._now
        if self._leaving:
            return self._now + _FIRST_WAIT_S
        if self._ahead < self._reserve + self._wanted:
            waits = self._next_missing is None or (self._wait_s and self._growing)
            return None if waits else max(self._now, self._retry_at)
        return self._next_look if self._can_spare_one and not self.busy else None

    @property
    def stats(self) -> SegmentStats:
        return SegmentStats(
            len(self._states), self._present, self._most, self._grown, self._shrunk, self._refused
        )

    # deciding

    def orders(self, now: float) -> list[SegmentOrder]:
        """What is to be done next, given what the pool holds. To be called about once a step; cheap where nothing is."""
        self._now = self._pool.moment = now
        if self._next_look is None:
            self._idle_at = [now + self._idle_s] * len(self._states)
            self._next_look = now + self._idle_s
        if self._refused_now and now >= self._retry_at:  # further refusals during a wait do not lengthen it
            self._wait_s = min(2 * self._wait_s or _FIRST_WAIT_S, _LONGEST_WAIT_S)
            self._retry_at = now + self._wait_s
        self._refused_now = False
        self._keep_within_limit()
        if 0 < self._wanted <= self._pool.num_available:
            self._wanted = 0
            self._next_look = now + self._idle_s  # who waited is to find it here
        self._grow()
        self._shrink_idle()
        orders, self._orders = self._orders, []
        self._unanswered += len(orders)
        return orders

    def _grow(self) -> None:
        if self._now < self._retry_at:
            return
        while self._ahead < self._reserve + self._wanted:
            segment = self._next_missing
            if segment is None or (self._wait_s and self._growing):
                return
            heappop(self._absent)
            self._states[segment] = _State.GROWING
            self._kept += self._size(segment)
            self._growing += self._size(segment)
            self._orders.append(Grow(segment))

    def _shrink_idle(self) -> None:
        """One segment at most, and none while orders are without news."""
        soonest = self._now + self._idle_s
        if not self._can_spare_one:
            self._next_look = soonest
            return
        if self.busy or self._orders or (self._next_look is not None and self._now < self._next_look):
            return
        self._next_look = self._now
        for segment in range(self._to_look_at, max(0, self._to_look_at - _LOOKED_AT_ONCE), -1):
            self._to_look_at = segment - 1
            if self._states[segment] is not _State.MAPPED:
                continue
            if self._idle_at[segment] <= self._now:
                used = self._pool.last_used(*self._blocks(segment))
                # One that is held cannot have been idle for long any earlier than this.
                self._idle_at[segment] = (self._now if used is None else used) + self._idle_s
                if used is not None and self._idle_at[segment] <= self._now:
                    self._drop(segment)
                    return
            self._soonest = min(self._soonest, self._idle_at[segment])
        if self._to_look_at <= 0:
            self._next_look = max(min(self._soonest, soonest), self._now + _BETWEEN_LOOKS_S)
            self._to_look_at, self._soonest = len(self._states) - 1, inf

    def _keep_within_limit(self) -> None:
        self._call_back()
        if self._over_limit:
            self._send_away()
        for _ in range(min(len(self._leaving), _DRAINED_AT_ONCE)):
            segment = self._leaving.pop(0)
            if self._pool.drop_unheld(*self._blocks(segment)):
                self._leaving.append(segment)
            else:
                self._states[segment] = _State.SHRINKING
                self._orders.append(Shrink(segment))

    def _send_away(self) -> None:
        """Segments beyond the limit: those that nobody holds anything of go, the highest first, then those with the
        highest numbers leave, until one is left. Growing ones have their turn when they are mapped."""
        for unheld in (True, False):
            for segment in range(len(self._states) - 1, 0, -1):
                if not self._over_limit:
                    return
                if self._states[segment] is not _State.MAPPED:
                    continue
                if not unheld:
                    self._states[segment] = _State.LEAVING
                    self._leaving.append(segment)
                    self._num_mapped -= 1
                    self._kept -= self._size(segment)
                elif self._pool.last_used(*self._blocks(segment)) is not None:
                    self._drop(segment)

    def _call_back(self) -> None:
        """Leaving segments stay after all where the limit allows it: their blocks that have left exist again."""
        while self._leaving and self._kept < self._limit:
            segment = min(self._leaving)
            if self._kept + self._size(segment) > self._limit:
                return
            self._leaving.remove(segment)
            first, count = self._blocks(segment)
            for block in range(first, first + count):
                if not self._pool.exists(block):
                    self._pool.add(block, 1)
            self._make_mapped(segment)
            self._kept += count

    # between states

    def _take_grown(self, news: Grown) -> None:
        first, count = self._blocks(news.segment)
        self._growing -= count
        if news.ok:
            self._pool.add(first, count)
            self._make_mapped(news.segment)
            self._wait_s = 0.0
            self._grown += 1
            self._present += 1
            self._most = max(self._most, self._present)
            return
        self._make_absent(news.segment)
        self._kept -= count
        self._refused += 1
        self._refused_now = True

    def _make_mapped(self, segment: int) -> None:
        self._states[segment] = _State.MAPPED
        self._num_mapped += 1
        self._idle_at[segment] = self._now + self._idle_s

    def _make_absent(self, segment: int) -> None:
        self._states[segment] = _State.ABSENT
        heappush(self._absent, segment)

    def _drop(self, segment: int) -> None:
        """Shrink a mapped segment that nobody holds anything of."""
        if not self._pool.drop(*self._blocks(segment)):
            raise AssertionError(f"segment {segment} is to be given back, but blocks of it are held")
        self._states[segment] = _State.SHRINKING
        self._num_mapped -= 1
        self._kept -= self._size(segment)
        self._orders.append(Shrink(segment))

    # quantities

    @property
    def _reserve(self) -> int:
        return self._reserves[self.in_use]

    @property
    def _ahead(self) -> int:
        """Blocks that can be handed out now, or as soon as what grows is mapped."""
        return self._pool.num_available + self._growing

    @property
    def _next_missing(self) -> int | None:
        """The segment to grow next, None where the limit (or what it still drives away) forbids it or all are there."""
        if self._leaving or not self._absent:
            return None
        segment = self._absent[0]
        return segment if self._kept + self._size(segment) <= self._limit else None

    @property
    def _over_limit(self) -> bool:
        """Whether a segment has to go, and may."""
        return self._kept > self._limit and self._num_mapped > 1

    @property
    def _can_spare_one(self) -> bool:
        """Whether enough is available without one segment. The last one, which may be shorter, is no exception."""
        floor = max(2 * self._reserve, self._reserve + self._wanted)
        return self._num_mapped > 1 and self._pool.num_available - self._per_segment >= floor

    def _size(self, segment: int) -> int:
        return min(self._per_segment, self._pool.num_blocks - segment * self._per_segment)

    def _blocks(self, segment: int) -> tuple[int, int]:
        """Its first block and their number."""
        return segment * self._per_segment, self._size(segment)
