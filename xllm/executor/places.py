"""Maps the pages of a KV pool to the places of requests beside the steps: orders in, news out.

What is to lie where is decided elsewhere. Here one thread carries the orders out as they came, neighbours in one call.
Whatever fails becomes news; no error ends the thread.
"""

import time
from collections.abc import Sequence

from xllm.core.places import Clear, Cleared, Place, Placed, PlaceNews, PlaceOrder
from xllm.device.pages import PageSpace
from xllm.executor.order_thread import CLOSING, OrderThread

MOST_AT_ONCE = 256  # orders in one call, so that news of the first is not long in coming


class PageMapper(OrderThread[PlaceOrder, PlaceNews]):
    """The space belongs to who reserved it, and is closed after this."""

    def __init__(self, space: PageSpace):
        self._space = space
        self.seconds = 0.0  # spent in the space's `map` and `unmap`
        self.calls = 0  # of them
        super().__init__("xllm-kv-places", "KV pages were still being mapped or unmapped")

    # the thread

    def _joins(self, order: PlaceOrder, orders: Sequence[PlaceOrder]) -> bool:
        """Places one after the other, of all of which something is to lie there, or nothing."""
        first, count = orders[0], len(orders)
        return order.place == first.place + count and type(order) is type(first) and count < MOST_AT_ONCE

    def _carry_out(self, orders: Sequence[PlaceOrder]) -> list[PlaceNews]:
        try:
            self._try(orders)
        except Exception as e:
            if len(orders) > 1:  # some of them may be possible
                return [news for order in orders for news in self._carry_out([order])]
            return [self._failed(orders[0], e)]
        return [Placed(order.place) if isinstance(order, Place) else Cleared(order.place) for order in orders]

    def _try(self, orders: Sequence[PlaceOrder]) -> None:
        begun = time.perf_counter()
        place = orders[0].place
        try:
            if pages := [order.page for order in orders if isinstance(order, Place)]:
                self._space.map(place, pages, replace=True)
            else:
                self._space.unmap(place, len(orders), bare_ok=True)
        finally:
            self.seconds += time.perf_counter() - begun
            self.calls += 1

    def _failed(self, order: PlaceOrder, e: Exception) -> PlaceNews:
        if isinstance(order, Clear):
            self._complain("a page of the KV pool could not be unmapped", e)
            return Cleared(order.place)
        if not isinstance(e, MemoryError):  # that one is ordinary: the system has no more mappings for now
            self._complain("a page of the KV pool could not be mapped", e)
        return Placed(order.place, ok=False, error=str(e) or type(e).__name__)

    def _left(self, order: PlaceOrder) -> PlaceNews:
        """What is to be cleared goes with the space."""
        if isinstance(order, Clear):
            return Cleared(order.place)
        return Placed(order.place, ok=False, error=CLOSING)
