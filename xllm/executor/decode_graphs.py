"""Decode steps as device graphs: one step is one graph, from slots and positions to sampled tokens.

A graph has a fixed number of rows, its size; a step of fewer sequences fills it up with rows of the spare slot. For each
size there are two kinds: with the sampler inside, or ending with logits where a request needs more than the
sampler's numbers (penalties, logprobs and the like). The first kind leaves its own next inputs behind: as long as the
same sequences fill a graph, nothing has to be brought to the device between two steps.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from xllm.executor.graphs import GraphTable, Shape

# Steps of a size that take the next larger graph there is, before one of its own is captured while others wait: that takes
# tens of milliseconds, as long as rows that compute for nobody do in about so many steps.
PATIENCE = 500
# (slots [B] int64, positions [B] int64, whether to sample) -> the step's outputs; one that samples counts positions up
DecodeStep = Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, ...]]


class DecodeGraphs:
    """Belongs to the executor's thread."""

    def __init__(self, table: GraphTable, step: DecodeStep, *, sizes: Sequence[int], spare_slot: int):
        self._table = table
        self._step = step
        self._sizes = sorted(sizes)
        self._spare_slot = spare_slot
        self._missed: Counter[int] = Counter()  # steps of each size that took a larger graph

    @property
    def largest(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def run(
        self, slots: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray, sample: bool
    ) -> tuple[torch.Tensor, ...] | None:
        """The step's outputs, whose first len(slots) rows count, good until the next replay. None where there is no
        graph for it: then the step runs eagerly."""
        count = len(slots)
        if count > self.largest:
            return None
        size = self._size_for(count, sample)
        arrays = self._blank(size)
        arrays["slots"][:count] = slots
        arrays["positions"][:count] = positions
        return self._table.replay(self._shape(size, sample), arrays)

    def _size_for(self, count: int, sample: bool) -> int:
        """The next size, or a larger one up to twice that whose graph is there already."""
        at = bisect.bisect_left(self._sizes, count)
        best = self._sizes[at]
        if self._shape(best, sample).key in self._table or self._missed[best] >= PATIENCE:
            return best
        for size in self._sizes[at + 1 :]:
            if size > 2 * best:
                break
            if self._table.can_replay(self._shape(size, sample).key):
                self._missed[best] += 1
                return size
        return best

    def capture_one(self) -> bool:
        """Capture one graph that is missing, of a size that is met often first; False when there is none."""
        for size in _met_most_first(self._sizes):
            shape = self._shape(size, True)
            if shape.key not in self._table:
                self._table.capture(shape)
                return True
        return False

    def capture_largest(self) -> None:
        """Only that graph: how much memory graphs take, since all share what the largest needs."""
        if self._sizes:
            self._table.capture(self._shape(self.largest, True))

    def _blank(self, size: int) -> dict[str, np.ndarray]:
        return {
            "slots": np.full(size, self._spare_slot, dtype=np.int64),
            "positions": np.zeros(size, dtype=np.int64),
        }

    def _shape(self, size: int, sample: bool) -> Shape:
        return Shape(
            key=("decode", size, sample),
            what=f"steps of {size} sequences",
            blank=lambda: self._blank(size),
            step=lambda tensors: self._step(tensors["slots"], tensors["positions"], sample),
            counts_up=("positions",) if sample else (),
        )


def longest_first(positions: Sequence[int]) -> np.ndarray:
    """[B] int64: the order of rows in which attention over contexts of uneven length ends soonest. Programs start in the
    order of rows, and a long one that starts last runs alone."""
    return np.argsort(-np.asarray(positions), kind="stable")


def _met_most_first(sizes: Sequence[int]) -> Iterator[int]:
    """A lone user first, then powers of two, which leave no step of any size without a near graph; then the rest, the
    largest first."""
    yield from (size for size in sizes if size & (size - 1) == 0)
    yield from (size for size in reversed(sizes) if size & (size - 1) != 0)
