"""Carries KV blocks between host memory and a store, and asks the store what it has, in threads of its own:

    asker       asks, one question after the other
    fetchers    bring records of the store into host slots
    sender      sends host slots, and takes out of the store what is not to be trusted

Part of the mover (`xllm.executor.mover`), which says whose turn it is and hears of every end.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from xllm.core.transfer import Disown, Look, News, Seen, Sent, Source
from xllm.executor.host_tier import HostTier
from xllm.executor.remote_tier import RemoteTier
from xllm.executor.turns import LoadUp, SendOut, Task

log = logging.getLogger(__name__)

QUEUED_SENDS = 256  # blocks, and at most a quarter of the host's slots, which they hold
FETCH_S = 10.0  # from the order of a load: what has not come by then is computed
LEAST_PAUSE_S = 0.1  # after a question without an answer


class Removal(NamedTuple):
    """What is to be taken out of the store."""

    names: Sequence[bytes]
    realm: str


class RemoteMover:
    """What is handed over here ends, well or not, in bounded time. Owns the tier."""

    def __init__(
        self, host: HostTier, tier: RemoteTier, *, answered: Callable[[Seen], None],
        brought: Callable[[LoadUp, int], None], finish: Callable[[Task, News], None], fetchers: int = 2,
    ):  # fmt: skip
        """`answered` hears of questions, `brought` of so many more sources that have come or will not, `finish` of sends;
        none of them is called under a lock of this object."""
        self._host = host
        self._tier = tier
        self._answered = answered
        self._brought = brought
        self._finish = finish
        self._fetchers = fetchers
        self._most_sends = max(1, min(QUEUED_SENDS, host.slots // 4))
        self._closing = False
        self._looks: SimpleQueue[tuple[Look, str, float] | None] = SimpleQueue()
        self._fetches: SimpleQueue[LoadUp | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._sends: deque[SendOut | Removal | None] = deque()  # under its lock
        runs = [
            ("look", self._run_asker),
            ("send", self._run_sender),
            *[("fetch", self._run_fetcher)] * fetchers,
        ]
        self._threads = [
            threading.Thread(target=run, name=f"xllm-kv-{name}", daemon=True) for name, run in runs
        ]
        for thread in self._threads:
            thread.start()

    # for the mover; returns at once

    @property
    def realm(self) -> str:
        """Where orders from here on are carried out."""
        return self._tier.realm

    def look(self, order: Look, begun: float) -> None:
        self._looks.put((order, self.realm, begun))

    def fetch(self, task: LoadUp) -> None:
        for _ in range(min(self._fetchers, len(task.to_fetch))):
            self._fetches.put(task)

    def send(self, task: SendOut) -> bool:
        """False where too many wait."""
        if self._closing or len(self._sends) >= self._most_sends:
            return False
        self._queue(task)
        return True

    def disown(self, order: Disown) -> None:
        if order.names is None:
            self._tier.leave()
        else:
            self._queue(Removal(order.names, self.realm))

    def end(self) -> None:
        """What waits, and what is handed over from here on, is left."""
        self._closing = True

    def close(self) -> None:
        """After `end`, once all tasks have ended."""
        if not self._threads:
            return
        self._looks.put(None)
        self._queue(None)
        for _ in range(self._fetchers):
            self._fetches.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._tier.close()

    def _queue(self, one: SendOut | Removal | None) -> None:
        with self._changed:
            self._sends.append(one)
            self._changed.notify()

    # threads

    def _run_asker(self) -> None:
        while (one := self._looks.get()) is not None:
            order, realm, begun = one
            count: int | None = None
            try:
                count = None if self._closing else self._tier.count(order.names, realm)
            except Exception as e:
                self._complain("looked for", e)
            pause = 0.0 if count is not None else max(self._tier.pause.left, LEAST_PAUSE_S)
            self._answered(Seen(order.ticket, count or 0, time.perf_counter() - begun, pause))

    def _run_fetcher(self) -> None:
        while (task := self._fetches.get()) is not None:
            while sources := _some(task, self._tier.at_once):
                try:
                    self._fetch(task, sources)
                except Exception as e:
                    self._complain("fetched", e)
                self._brought(task, len(sources))

    def _fetch(self, task: LoadUp, sources: Sequence[Source]) -> None:
        """Bring sources into their host slots, under a seal what is sound."""
        for source in sources:
            self._host.unseal(source.host_slot)
        if self._closing:
            return
        if time.perf_counter() - task.begun > FETCH_S:
            self._tier.pause.failed()  # it answers, but too slowly to be of use
            return
        wanted = [(source.name, self._host.array(source.host_slot)) for source in sources]
        for source, known in zip(sources, self._tier.get(wanted, task.realm), strict=True):
            if known is not None:
                self._host.seal(source.host_slot, source.name, known)

    def _run_sender(self) -> None:
        while work := self._next_sends():
            if isinstance(work, Removal):
                self._remove(work)
                continue
            stored = [False] * len(work)
            try:
                stored = self._send(work)
            except Exception as e:
                self._complain("sent", e)
            for task, there in zip(work, stored, strict=True):
                self._finish(task, Sent(task.order.ticket, there))

    def _next_sends(self) -> list[SendOut] | Removal | None:
        """As many as may go at once, in the order they came in. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._sends)
            first = self._sends.popleft()
            if not isinstance(first, SendOut):
                return first
            tasks = [first]
            while self._sends and len(tasks) < self._tier.at_once:
                task = self._sends[0]
                if not isinstance(task, SendOut) or task.realm != first.realm:
                    break
                tasks.append(task)
                self._sends.popleft()
            return tasks

    def _send(self, tasks: Sequence[SendOut]) -> list[bool]:
        if self._closing:
            return [False] * len(tasks)
        blocks: dict[int, tuple[bytes, np.ndarray, int]] = {}
        for i, task in enumerate(tasks):
            slot, name = task.order.host_slot, task.order.name
            known = self._host.sealed(slot, name)
            if known is not None:  # else it was not saved
                blocks[i] = name, self._host.array(slot), known
        stored = dict(zip(blocks, self._tier.put([*blocks.values()], tasks[0].realm), strict=True))
        return [stored.get(i, False) for i in range(len(tasks))]

    def _remove(self, removal: Removal) -> None:
        try:
            if not self._closing:
                self._tier.remove(removal.names, removal.realm)
        except Exception as e:
            self._complain("removed", e)

    def _complain(self, what: str, e: Exception) -> None:
        log.warning("a KV block could not be %s in the store: %s", what, e, exc_info=e)


def _some(task: LoadUp, most: int) -> list[Source]:
    """Sources that nobody fetches yet."""
    sources: list[Source] = []
    while len(sources) < most:
        try:
            sources.append(task.to_fetch.popleft())
        except IndexError:
            break
    return sources
