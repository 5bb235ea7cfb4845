"""Maps pages where requests see them: as late as plans allow, while whoever orders must allow for at once."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from xllm.core.places import Place, PlaceOrder


@dataclass
class FakePlaces:
    first: int  # below it every place is its page's own
    pages: dict[int, int] = field(default_factory=dict)  # by place, as mapped
    ordered: dict[int, int | None] = field(default_factory=dict)  # by place, once all orders are carried out
    queue: deque[PlaceOrder] = field(default_factory=deque)
    done: int = 0

    def start(self, orders: Sequence[PlaceOrder], touched: Collection[int]) -> None:
        """`touched`: by steps in flight."""
        for order in orders:
            assert order.place >= self.first, "nobody maps over a home"
            assert order.place not in touched, "a place is changed while a step in flight touches it"
            self.ordered[order.place] = order.page if isinstance(order, Place) else None
        self.queue += orders

    def carry_out(self, until: int) -> None:
        assert until <= self.done + len(self.queue), "a step waits for an order that was never given"
        while self.done < until:
            order = self.queue.popleft()
            self.done += 1
            self.pages.pop(order.place, None)
            if isinstance(order, Place):
                self.pages[order.place] = order.page

    def page(self, place: int) -> int:
        """As a step finds it."""
        return place if place < self.first else self.pages[place]

    def page_ordered(self, place: int) -> int:
        if place < self.first:
            return place
        page = self.ordered[place]
        assert page is not None, "a step is to touch a bare place"
        return page
