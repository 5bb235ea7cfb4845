"""One thread that carries out orders beside the steps, one after the other as they came: orders in, news out."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

CLOSE_S = 5.0
CLOSING = "the engine is being closed"

Order = TypeVar("Order")
News = TypeVar("News")


class OrderThread(ABC, Generic[Order, News]):
    """Every order brings exactly one piece of news. Everybody may call everything that is public. The thread begins with
    `__init__`, so whoever inherits calls that last."""

    def __init__(self, name: str, working: str):
        """`working` completes "... after 5 s": what is still under way when the thread is given up."""
        # under the lock of `_changed`
        self._changed = threading.Condition()
        self._orders: deque[Order] = deque()
        self._news: list[News] = []
        self._unanswered = 0  # orders whose news has not come
        self._closing = False

        self._working = working
        self._complaints: set[tuple[str, type]] = set()  # of the thread alone
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, orders: Sequence[Order]) -> None:
        """Returns at once."""
        with self._changed:
            if self._closing:
                self._news += [self._left(order) for order in orders]
            else:
                self._orders += orders
                self._unanswered += len(orders)
            self._changed.notify_all()

    def news(self) -> list[News]:
        """What has happened since the last call."""
        with self._changed:
            news, self._news = self._news, []
        return news

    @property
    def busy(self) -> bool:
        """Whether orders have not been carried out."""
        with self._changed:
            return self._unanswered > 0

    def wait(self, seconds: float) -> bool:
        """Until there is news; False where there is none after so long."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._news), seconds)

    def close(self) -> bool:
        """Ends what is under way and leaves all other orders, each with its news. A second time does nothing. False
        where the device hangs: the thread is left alone after some seconds, and so should its memory be."""
        with self._changed:
            self._closing = True
            self._news += [self._left(order) for order in self._orders]
            self._unanswered -= len(self._orders)
            self._orders.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s after %.0f s", self._working, CLOSE_S)
            return False
        return True

    # for who inherits

    @abstractmethod
    def _carry_out(self, orders: Sequence[Order]) -> Iterable[News]:
        """In the thread: news of each of the orders. Raises nothing: what fails is news."""

    @abstractmethod
    def _left(self, order: Order) -> News:
        """News of an order that is not carried out any more."""

    def _joins(self, order: Order, orders: Sequence[Order]) -> bool:
        """Whether `order` is carried out together with `orders`, the ones right before it. Short: start waits for it."""
        return False

    def _complain(self, what: str, e: Exception) -> None:
        """In the thread, and once per kind: a device that is lost fails with every order."""
        kind = (what, type(e))
        level = logging.DEBUG if kind in self._complaints else logging.WARNING
        self._complaints.add(kind)
        log.log(level, "%s: %s", what, e, exc_info=e)

    # the thread

    def _run(self) -> None:
        while orders := self._next():
            news = self._carry_out(orders)
            with self._changed:
                self._news += news
                self._unanswered -= len(orders)
                self._changed.notify_all()

    def _next(self) -> list[Order]:
        """The first order with all behind it that join it. Empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._closing)
            orders: list[Order] = []
            while self._orders and (not orders or self._joins(self._orders[0], orders)):
                orders.append(self._orders.popleft())
            return orders
