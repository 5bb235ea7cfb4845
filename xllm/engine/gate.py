"""Who gets in: the bound on what waits, and what a client that is turned away is told."""

import time
from collections import deque

from xllm.core.clock import Clock
from xllm.core.errors import Overloaded, Unavailable

WINDOW = 32  # ends of sequences over which the pace is measured
LONGEST_RETRY_S = 60


class Gate:
    """Counts sequences in flight against `limit`. Belongs to one thread."""

    def __init__(self, limit: int, clock: Clock = time.monotonic):
        self.limit = limit
        self.in_flight = 0
        self.closed_because: str | None = None
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=WINDOW)

    def enter(self, sequences: int) -> None:
        """Raises Unavailable when closed, Overloaded when that many more would exceed the limit."""
        if self.closed_because is not None:
            raise Unavailable(self.closed_because, retry_after_s=5)
        if self.in_flight + sequences > self.limit:
            raise Overloaded(
                f"{self.in_flight} sequences are running or waiting; at most {self.limit} are admitted",
                retry_after_s=self.retry_after_s(sequences),
            )
        self.in_flight += sequences

    def leave(self, sequences: int) -> None:
        self.in_flight -= sequences
        self._ends.extend([self._clock()] * sequences)

    def retry_after_s(self, sequences: int) -> int:
        """When room for so many may be expected, at the pace of the last ends."""
        excess = self.in_flight + sequences - self.limit
        if len(self._ends) < 2 or self._ends[-1] == self._ends[0]:
            return 1
        pace = (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
        return max(1, min(LONGEST_RETRY_S, round(excess / pace)))
