"""Which tokens a row may get when sums are rounded: every comparison closer than a relative `CLOSE` may go either way.

Written from the contract of `xllm.ops.sampling.sample`, in NumPy, and once more for one row at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from xllm.ops.sampling import SlotNumbers, uniforms

CLOSE = 1e-5


@dataclass(frozen=True)
class Row:
    """One row's float64 weights in the order of ids, and its tokens from the largest logit to the smallest."""

    logits: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    ends: np.ndarray  # lengths of heads of `order` that no tie crosses
    min_p: float
    top_p: float
    top_k: int
    start: int
    position: int

    @classmethod
    def of(cls, logits_V: torch.Tensor, numbers: SlotNumbers, slot: int, position: int) -> "Row":
        logits = logits_V.double().numpy()
        weights = np.exp((logits - logits.max()) * float(numbers.inv_temperature[slot]))
        order = np.argsort(-logits, kind="stable")
        falls = np.flatnonzero(logits[order][1:] != logits[order][:-1]) + 1
        return cls(
            logits, weights, order, np.append(falls, len(logits)), float(numbers.min_p[slot]),
            float(numbers.top_p[slot]), int(numbers.top_k[slot]), int(numbers.starts[slot]), position,
        )  # fmt: skip

    def kept(self, length: int) -> np.ndarray:
        """Weights of the `length` likeliest, 0 elsewhere."""
        kept = np.zeros_like(self.weights)
        kept[self.order[:length]] = self.weights[self.order[:length]]
        return kept

    def heads(self, values: np.ndarray, border: float) -> Iterator[int]:
        """Lengths of heads whose values, which fall, are at least the border, give or take."""
        surely, perhaps = (int((values >= border * (1 + sign * CLOSE)).sum()) for sign in (1, -1))
        yield from (int(end) for end in self.ends if surely <= end <= perhaps)

    def drawn(self, weights: np.ndarray, attempt: int = 0) -> np.ndarray:
        """The tokens at which the running sum may pass its target."""
        start, position = torch.tensor([self.start]), torch.tensor([self.position])
        running = weights.cumsum()
        target = float(uniforms(start, position, attempt)) * running[-1]
        slack = CLOSE * running[-1]
        found = (weights > 0) & (running - weights - slack <= target) & (target < running + slack)
        return np.flatnonzero(found)

    def by_rejection(self, weights: np.ndarray, allowed: float, attempt: int = 0) -> set[int]:
        found: set[int] = set()
        for token in self.drawn(weights, attempt):
            better = np.where(self.logits > self.logits[token], weights, 0)
            mass = better.sum()
            if mass < allowed * (1 + CLOSE):
                found.add(int(token))
            if mass >= allowed * (1 - CLOSE):
                found |= self.by_rejection(better, allowed, attempt + 1)
        return found

    def acceptable(self) -> set[int]:
        found: set[int] = set()
        for length in self.heads(self.weights[self.order], self.min_p) if self.min_p else [len(self.weights)]:
            if self.top_k:
                length = min(length, int(self.ends[np.searchsorted(self.ends, min(self.top_k, length))]))
            kept = self.kept(length)
            allowed = self.top_p * kept.sum()
            if self.top_p == 1:
                found |= set(self.drawn(kept).tolist())
            elif not self.top_k:
                found |= self.by_rejection(kept, allowed)
            else:
                # what stands before the ties of each token, negated so that it falls
                before = np.append(0, kept[self.order].cumsum())[np.append(0, self.ends[:-1])]
                before = np.repeat(before, np.diff(np.append(0, self.ends)))[:length]
                surely, perhaps = (int((before < allowed * (1 + sign * CLOSE)).sum()) for sign in (-1, 1))
                for end in self.ends[(self.ends >= surely) & (self.ends <= perhaps)]:
                    found |= set(self.drawn(self.kept(int(end))).tolist())
        return found


def acceptable(logits_V: torch.Tensor, numbers: SlotNumbers, slot: int, position: int) -> set[int]:
    if float(numbers.inv_temperature[slot]) == 0:
        return {int(np.flatnonzero(logits_V == logits_V.max())[0])}
    return Row.of(logits_V, numbers, slot, position).acceptable()
