"""What an answer should take at most: routers choose by it, engines do not know of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; None: as it comes."""

    ttft_s: float | None = None  # to the first token
    tpot_s: float | None = None  # for each after it


NO_TARGETS = Targets()
