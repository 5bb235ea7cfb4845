"""Which rows of a batch go which way. Made once, and kept while the rows stay the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.executor.sampling.edits import Additions, AllowedTokens, Penalties
from xllm.executor.sampling.slots import Slot, SlotTensors, Way


@dataclass(frozen=True, slots=True)
class Group:
    """The A rows that go one way, with their parameters gathered from the slots."""

    rows: Tensor | None  # [A] int64; None where it is every row, so that nothing needs to be picked out
    starts: Tensor  # [A] int64, of the random numbers
    inv_temperature: Tensor  # [A] float32
    min_p: Tensor | None  # [A] float32, None where no row has one
    top_p: Tensor  # [A] float64
    top_k: Tensor  # [A] int64
    largest_k: int

    def of(self, values_R: Tensor) -> Tensor:
        return values_R if self.rows is None else values_R[self.rows]


class Batch:
    """`key` is what it was made for: slots in row order, and which may not end yet."""

    def __init__(self, slots: list[int], held: Sequence[Slot], young: list[bool], tensors: SlotTensors):
        device = tensors.starts.device
        self.key = (slots, young)
        self.slots_R = torch.tensor(slots, dtype=torch.int64, device=device)
        self.groups: dict[Way, Group] = {}
        for way in Way:
            if rows := [row for row, slot in enumerate(held) if slot.way is way]:
                self.groups[way] = _group(rows, held, self.slots_R, tensors)
        self.all_greedy = list(self.groups) == [Way.GREEDY]
        asked: dict[int, list[int]] = {}
        for row, slot in enumerate(held):
            if slot.params.logprobs is not None:
                asked.setdefault(slot.params.logprobs, []).append(row)
        # (number of logprobs, rows, the same on the device): one number at a time, so that ties do not fall
        # otherwise because somebody else asked for more
        self.scored = [(k, rows, torch.tensor(rows, device=device)) for k, rows in asked.items()]
        self._allowed = AllowedTokens(held, device)
        self._additions = Additions(held, young, device)
        self.penalties = Penalties(held, device)
        self.edits = bool(len(self._allowed) or len(self._additions) or len(self.penalties))

    def edit(
        self, logits_RV: Tensor, tokens_SL: Tensor, positions_R: Tensor, longest: int, counts: Tensor
    ) -> None:
        """Change the logits in place as the requests want them."""
        if len(self._allowed):
            self._allowed.apply(logits_RV)
        if len(self._additions):
            self._additions.apply(logits_RV, tokens_SL, self.slots_R, positions_R)
        if len(self.penalties):
            self.penalties.apply(logits_RV, tokens_SL, self.slots_R, positions_R, longest, counts)


def _group(rows: list[int], held: Sequence[Slot], slots_R: Tensor, tensors: SlotTensors) -> Group:
    index = torch.tensor(rows, dtype=torch.int64, device=slots_R.device)
    slots = slots_R[index]
    return Group(
        rows=None if len(rows) == len(held) else index,
        starts=tensors.starts[slots],
        inv_temperature=tensors.inv_temperature[slots],
        min_p=tensors.min_p[slots] if any(held[row].params.min_p > 0 for row in rows) else None,
        top_p=tensors.top_p[slots],
        top_k=tensors.top_k[slots],
        largest_k=max(held[row].top_k for row in rows),
    )
