"""Whether the memory left is enough to let the next waiting request run. All numbers are blocks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    now: int  # to allocate for the tokens it has, after prefix hits
    at_worst: int  # to allocate until it ends, if it grows as long as it may
    available: int  # what the pool can hand out once the hits are shared
    margin: int  # what those who run may take in their next step
    promised: int  # what those may still ask for, if all grow as long as they may


def optimistic(demand: Demand) -> bool:
    """Enough for what it has now, and a next block for everybody who runs; who needs more preempts somebody later.

    The margin keeps a request from being admitted only to be preempted a step later. With nobody running there is none:
    a request that alone fits the pool is never refused for ever.
    """
    return demand.now + demand.margin <= demand.available


def no_eviction(demand: Demand) -> bool:
    """Enough for everybody's longest end, so that nobody is ever preempted. Later sharing only makes it easier."""
    return demand.at_worst + demand.promised <= demand.available
