"""Maps and unmaps the segments of an elastic KV pool beside the steps: orders in, news out.

Which segments there are to be is decided elsewhere (`xllm.kv.elastic`). Here one thread carries the orders out, one
after the other as they came. Whatever fails becomes news; no error ends the thread.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Sequence

from xllm.core.segments import Grow, Grown, SegmentNews, SegmentOrder, Shrunk
from xllm.device.virtual import VirtualRange, whole_granules

log = logging.getLogger(__name__)

CLOSE_S = 5.0


def blocks_per_segment(block_bytes: int, granularity: int, wanted_bytes: int) -> int:
    """As many blocks as fill whole granules and fit into `wanted_bytes`; the fewest that fill whole granules where
    not even those fit."""
    least = granularity // math.gcd(block_bytes, granularity)
    return max(1, wanted_bytes // (least * block_bytes)) * least


class SegmentMapper:
    """Everybody may call everything. The range belongs to who reserved it, and is closed after this."""

    def __init__(self, memory: VirtualRange, block_bytes: int, blocks_per_segment: int, num_blocks: int):
        """Block `i` lies at byte `i * block_bytes` of `memory`. Segments are whole granules, but for one that is the
        last: ValueError otherwise."""
        nbytes = num_blocks * block_bytes
        if num_blocks < 1 or nbytes > memory.tensor.nbytes:
            raise ValueError(f"{num_blocks} blocks of {block_bytes} bytes in {memory.tensor.nbytes}")
        self._segment_bytes = blocks_per_segment * block_bytes
        self.num_segments = -(-num_blocks // blocks_per_segment)
        if self._segment_bytes % memory.granularity and self.num_segments > 1:
            raise ValueError(f"segments of {self._segment_bytes} bytes, granules of {memory.granularity}")
        self._end = whole_granules(nbytes, memory.granularity)
        self._memory = memory

        # under the lock of `_changed`
        self._changed = threading.Condition()
        self._orders: deque[SegmentOrder] = deque()
        self._news: list[SegmentNews] = []
        self._closing = False

        self._complaints: set[tuple[str, type]] = set()  # of the thread alone
        self._thread = threading.Thread(target=self._run, name="xllm-kv-segments", daemon=True)
        self._thread.start()

    def map_now(self, segments: Sequence[int]) -> None:
        """Without an order, and waited for. Raises as `VirtualRange.commit` does; then none of them is mapped."""
        mapped: list[int] = []
        try:
            for segment in segments:
                self._memory.commit(*self._place(segment))
                mapped.append(segment)
        except BaseException:
            for segment in mapped:
                self._memory.decommit(*self._place(segment))
            raise

    def start(self, orders: Sequence[SegmentOrder]) -> None:
        """Returns at once. Nothing that was submitted touches a segment that is to shrink."""
        with self._changed:
            if self._closing:
                self._news += [_left(order) for order in orders]
            else:
                self._orders += orders
            self._changed.notify_all()

    def news(self) -> list[SegmentNews]:
        """What has happened since the last call."""
        with self._changed:
            news, self._news = self._news, []
        return news

    def wait(self, seconds: float) -> bool:
        """Until there is news; False where there is none after so long."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._news), seconds)

    def close(self) -> bool:
        """Ends what is under way and leaves all other orders, each with its news. A second time does nothing. False
        where the device hangs: the thread is left alone after some seconds, and so should the range be."""
        with self._changed:
            self._closing = True
            self._news += [_left(order) for order in self._orders]
            self._orders.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("KV memory was still being mapped or unmapped after %.0f s", CLOSE_S)
            return False
        return True

    # the thread

    def _run(self) -> None:
        while (order := self._next()) is not None:
            news = self._grow(order.segment) if isinstance(order, Grow) else self._shrink(order.segment)
            with self._changed:
                self._news.append(news)
                self._changed.notify_all()

    def _next(self) -> SegmentOrder | None:
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._closing)
            return self._orders.popleft() if self._orders else None

    def _grow(self, segment: int) -> Grown:
        try:
            self._memory.commit(*self._place(segment))
        except Exception as e:
            if not isinstance(e, MemoryError):  # that one is ordinary: the memory is somebody else's for now
                self._complain("mapped", e)
            return Grown(segment, ok=False, error=str(e) or type(e).__name__)
        return Grown(segment)

    def _shrink(self, segment: int) -> Shrunk:
        """Memory that the device does not take back stays where it is, and the segment can grow no more."""
        try:
            self._memory.decommit(*self._place(segment))
        except Exception as e:
            self._complain("unmapped", e)
        return Shrunk(segment)

    def _place(self, segment: int) -> tuple[int, int]:
        """(offset, nbytes) in the range."""
        if not 0 <= segment < self.num_segments:
            raise ValueError(f"segment {segment} of {self.num_segments}")
        offset = segment * self._segment_bytes
        last = segment == self.num_segments - 1
        return offset, self._end - offset if last else self._segment_bytes

    def _complain(self, what: str, e: Exception) -> None:
        """Once per kind: a device that is lost fails with every order."""
        kind = (what, type(e))
        level = logging.DEBUG if kind in self._complaints else logging.WARNING
        self._complaints.add(kind)
        log.log(level, "a segment of the KV pool could not be %s: %s", what, e, exc_info=e)


def _left(order: SegmentOrder) -> SegmentNews:
    """News of an order that is not carried out any more. What shrinks goes with the range."""
    if isinstance(order, Grow):
        return Grown(order.segment, ok=False, error="the engine is being closed")
    return Shrunk(order.segment)
