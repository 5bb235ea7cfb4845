"""The fetching side of KV between engines: for each peer a connection, in a thread of its own (`peer_link`).

Orders in, news out, and the engine's loop waits for neither. A peer that is slow, silent, dead or wrong costs a fetch its
time-out at most; then what has arrived and is sound counts, and the rest is computed here. The news of a fetch comes when
nothing can be written into its blocks any more.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

from xllm.core.peers import Fetch, Fetched, FetchOrder, KvFrom
from xllm.engine.fetches import Means
from xllm.engine.peer_link import PeerLink

CLOSE_S = 5.0


class Fetcher:
    """All calls belong to the engine's loop; `notify` is called by other threads when there is news."""

    def __init__(self, means: Means, notify: Callable[[], object] = lambda: None):
        self._means = means
        self._notify = notify
        self._links: dict[tuple[str, str, int], PeerLink] = {}
        self._by_ticket: dict[int, PeerLink] = {}
        self._news: deque[Fetched] = deque()

    def order(self, orders: Sequence[FetchOrder]) -> None:
        for order in orders:
            if isinstance(order, Fetch):
                self._begin(order)
            elif (link := self._by_ticket.get(order.ticket)) is not None:  # else its news has been taken
                link.put(order)

    def news(self) -> list[Fetched]:
        news = [self._news.popleft() for _ in range(len(self._news))]
        for one in news:
            del self._by_ticket[one.ticket]
        return news

    def close(self) -> None:
        """Ends all fetches."""
        for link in self._links.values():
            link.stop()
        until = time.monotonic() + CLOSE_S
        for link in self._links.values():
            link.join(max(0.0, until - time.monotonic()))

    def _begin(self, order: Fetch) -> None:
        key = order.peer.address, order.peer.instance, order.peer.epoch
        link = self._links.get(key)
        if link is None or not link.put(order):
            self._links = {key: one for key, one in self._links.items() if not one.ended}
            link = self._links[key] = self._link(order.peer)
            link.put(order)
        self._by_ticket[order.ticket] = link

    def _link(self, peer: KvFrom) -> PeerLink:
        link = PeerLink(peer, self._means, self._tell)
        link.start()
        return link

    def _tell(self, news: Fetched) -> None:
        self._news.append(news)
        self._notify()
