"""The queue of requests that hold no slot, always sorted by rank."""

from bisect import bisect_left, insort

from xllm.core.request import Request


class WaitingQueue:
    """Ranks are unique and do not change while a request lives, so that one is found by its own. Push and remove are a
    binary search and a memory move; who was preempted goes back where it came from: before all who rank after it."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: list[Request] = []  # last goes first, so that taking the head moves nothing

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def head(self) -> Request | None:
        return self._requests[-1] if self._requests else None

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=_descending)

    def pop(self) -> Request:
        return self._requests.pop()

    def remove(self, request: Request) -> None:
        i = bisect_left(self._requests, _descending(request), key=_descending)
        if i == len(self._requests) or self._requests[i] is not request:
            raise ValueError(f"request {request.id} does not wait")
        del self._requests[i]


def _descending(request: Request) -> tuple[float, int]:
    seconds, number = request.rank
    return -seconds, -number
