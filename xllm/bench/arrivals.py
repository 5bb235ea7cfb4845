"""When requests arrive."""

import math
import random
from collections.abc import Iterator


def arrival_times(rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """Seconds from the start, without end; the first request arrives at 0.

    Gaps are gamma distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more is more even. An infinite rate sends everything at once.
    """
    if rate <= 0 or burstiness <= 0:
        raise ValueError("request rate and burstiness must be positive")
    now = 0.0
    while True:
        yield now
        if not math.isinf(rate):
            now += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
