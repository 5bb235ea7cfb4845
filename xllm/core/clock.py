"""Time as a value that is passed in: the scheduler and its tests never look at the wall clock themselves."""

import time
from collections.abc import Callable

Clock = Callable[[], float]  # seconds, monotonic

monotonic: Clock = time.monotonic
