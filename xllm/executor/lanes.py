"""Threads for calls that may never end. Whoever waits too long goes on without the answer, and leaves alone what the call
reads and writes until it has ended after all.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
NO_MEMORY = np.empty(0, dtype=np.uint8)


class Lane:
    """One such thread, with memory for its calls. It does not keep the process from ending."""

    def __init__(self, name: str, memory: np.ndarray = NO_MEMORY):
        self.memory = memory
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._last: Future[Any] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T], seconds: float) -> T:
        """What `work` returns or raises; TimeoutError after so long. One call at a time, the next once it has ended."""
        done: Future[T] = Future()
        self._last = done
        self._calls.put((work, done))
        return done.result(seconds)

    def when_free(self, then: Callable[[], None]) -> None:
        """`then` is called once no call is under way, perhaps at once, perhaps never."""
        if self._last is None:
            then()
        else:
            self._last.add_done_callback(lambda _: then())

    def close(self) -> None:
        """The thread ends, if it hangs in a call with that."""
        self._calls.put(None)
        if self._last is None or self._last.done():
            self._thread.join()

    def _run(self) -> None:
        while (one := self._calls.get()) is not None:
            work, done = one
            try:
                result = work()
            except BaseException as e:
                done.set_exception(e)
            else:
                done.set_result(result)
            del one, work, done


class Lanes:
    """Some of a kind. Those in which a call hangs are missing until it has ended."""

    def __init__(self, name: str, memories: Sequence[np.ndarray]):
        self._all = [Lane(name, memory) for memory in memories]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._all:
            self._free.put(lane)

    def take(self) -> Lane | None:
        """One that is free, to be given back."""
        try:
            return self._free.get_nowait()
        except Empty:
            return None

    def give(self, lane: Lane) -> None:
        lane.when_free(lambda: self._free.put(lane))

    def rest(self, until: float) -> bool:
        """Whether no call is under way any more by that time (of `time.monotonic`). Nobody else takes lanes meanwhile."""
        for _ in self._all:
            try:
                self._free.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                return False
        return True

    def close(self) -> None:
        for lane in self._all:
            lane.close()
