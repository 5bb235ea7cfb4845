"""The requests that run: each in a slot, and on the list of those still in their prompt or of those that decode."""

from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter

from xllm.core.request import Phase, Request

_rank = attrgetter("rank")


class RunningSet:
    """`prefilling` is sorted by rank; `decoding` is in order of turns, which only matters where a step's budget is
    smaller than their number. A request that was seated stands on one of the lists by the end of the same plan."""

    __slots__ = ("_free_slots", "_slots", "decoding", "prefilling")

    def __init__(self, max_num_seqs: int):
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._slots = max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def __iter__(self) -> Iterator[Request]:
        return chain(self.prefilling, self.decoding)

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def num_seated(self) -> int:
        """Those on the lists, and during a plan those that will be."""
        return self._slots - len(self._free_slots)

    def seat(self, request: Request) -> None:
        request.slot = self._free_slots.pop()
        request.phase = Phase.RUNNING

    def unseat(self, request: Request) -> None:
        """The slot is free at once, even with steps in flight: steps run in order."""
        self._free_slots.append(request.slot)
        request.slot = -1

    def begin(self, request: Request) -> None:
        """Its prompt takes further steps."""
        insort(self.prefilling, request, key=_rank)

    def remove(self, request: Request) -> None:
        (self.prefilling if request in self.prefilling else self.decoding).remove(request)

    def drop_finished(self) -> None:
        self.prefilling = [request for request in self.prefilling if request.phase is Phase.RUNNING]
        self.decoding = [request for request in self.decoding if request.phase is Phase.RUNNING]

    def pass_turns(self, turns: int) -> None:
        """The first `turns` of the decoding have had theirs; next time the others come first."""
        self.decoding = self.decoding[turns:] + self.decoding[:turns]

    def last(self) -> Request:
        """Who is preempted first."""
        return max(self, key=_rank)

    def clear(self) -> None:
        self.prefilling.clear()
        self.decoding.clear()

    def audit(self, slots: int) -> None:
        """Raise `AssertionError` unless each of `slots` is free or one running request's."""
        taken: Sequence[int] = [request.slot for request in self]
        if sorted([*self._free_slots, *taken]) != list(range(slots)):
            raise AssertionError(f"of {slots} slots, {self._free_slots} are free and {taken} are taken")
