"""Who goes first: among those who wait, and (from the other end) among those whom memory pressure preempts.

An order is a number per request, in seconds on the scheduler's clock, fixed when the request arrives; the smallest
goes first and ties go by arrival. Being a time is what rules starvation out: later arrivals start from later times, so
a request is overtaken only by what arrives within a bounded time after it, however long the stream of better ones.
It also means that nothing is ever re-sorted: everybody ages at the same rate.
"""

import math

from xllm.core.errors import InvalidRequest
from xllm.core.request import Request

PRIORITY_STEP_S = 60.0  # one level of priority is worth this much waiting
MAX_PRIORITY = 2**31 - 1  # either way
DEFAULT_DEADLINE_S = 60.0  # after arrival, for a request that brings none
SECONDS_PER_TOKEN = 0.01  # "shortest": 1000 prompt tokens more let arrivals of the next 10 s go first


def fcfs(request: Request) -> float:
    """First come, first served."""
    return request.arrival


def priority(request: Request) -> float:
    """Lower `priority` first. A request overtakes those one level lower that came less than a minute before it."""
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must lie between -{MAX_PRIORITY} and {MAX_PRIORITY}", param="priority"
        )
    return request.arrival + PRIORITY_STEP_S * request.priority


def deadline(request: Request) -> float:
    """Earliest deadline first. One that has passed on arrival counts as due now, not as overdue since long ago."""
    if request.deadline is None:
        return request.arrival + DEFAULT_DEADLINE_S
    if not math.isfinite(request.deadline):
        raise InvalidRequest("deadline must be a finite time", param="deadline")
    return max(request.deadline, request.arrival)


def shortest(request: Request) -> float:
    """Shortest prompt first. Output lengths are unknown and `max_tokens` guesses them badly, so they do not count."""
    return request.arrival + SECONDS_PER_TOKEN * len(request.prompt_token_ids)
