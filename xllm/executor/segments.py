"""Maps and unmaps the segments of an elastic KV pool beside the steps: orders in, news out.

Which segments there are to be is decided elsewhere (`xllm.kv.elastic`). Here one thread carries the orders out, one
after the other as they came. Whatever fails becomes news; no error ends the thread.
"""

import math
from collections.abc import Sequence

from xllm.core.segments import Grow, Grown, SegmentNews, SegmentOrder, Shrunk
from xllm.device.virtual import VirtualRange, whole_granules
from xllm.executor.order_thread import CLOSING, OrderThread


def blocks_per_segment(block_bytes: int, granularity: int, wanted_bytes: int) -> int:
    """As many blocks as fill whole granules and fit into `wanted_bytes`; the fewest that fill whole granules where
    not even those fit."""
    least = granularity // math.gcd(block_bytes, granularity)
    return max(1, wanted_bytes // (least * block_bytes)) * least


class SegmentMapper(OrderThread[SegmentOrder, SegmentNews]):
    """The range belongs to who reserved it, and is closed after this."""

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
        super().__init__("xllm-kv-segments", "KV memory was still being mapped or unmapped")

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

    # the thread

    def _carry_out(self, orders: Sequence[SegmentOrder]) -> list[SegmentNews]:
        return [self._grow(o.segment) if isinstance(o, Grow) else self._shrink(o.segment) for o in orders]

    def _grow(self, segment: int) -> Grown:
        try:
            self._memory.commit(*self._place(segment))
        except Exception as e:
            if not isinstance(e, MemoryError):  # that one is ordinary: the memory is somebody else's for now
                self._complain("a segment of the KV pool could not be mapped", e)
            return Grown(segment, ok=False, error=str(e) or type(e).__name__)
        return Grown(segment)

    def _shrink(self, segment: int) -> Shrunk:
        """Memory that the device does not take back stays where it is, and the segment can grow no more."""
        try:
            self._memory.decommit(*self._place(segment))
        except Exception as e:
            self._complain("a segment of the KV pool could not be unmapped", e)
        return Shrunk(segment)

    def _place(self, segment: int) -> tuple[int, int]:
        """(offset, nbytes) in the range."""
        if not 0 <= segment < self.num_segments:
            raise ValueError(f"segment {segment} of {self.num_segments}")
        offset = segment * self._segment_bytes
        last = segment == self.num_segments - 1
        return offset, self._end - offset if last else self._segment_bytes

    def _left(self, order: SegmentOrder) -> SegmentNews:
        """What shrinks goes with the range."""
        if isinstance(order, Grow):
            return Grown(order.segment, ok=False, error=CLOSING)
        return Shrunk(order.segment)
