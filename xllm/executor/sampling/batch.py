"""Which rows of a batch go which way. Made once, and kept while the rows stay the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xllm.device.cpu import CpuDevice
from xllm.device.table import Device
from xllm.executor.packing import upload_all
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
    """`key` is what it was made for: slots in row order, and which may not end yet.

    Groups are made unless a device chooses for all rows at once.
    """

    def __init__(
        self,
        slots: list[int],
        held: Sequence[Slot],
        young: list[bool],
        tensors: SlotTensors,
        device: Device | None = None,
        *,
        grouped: bool = True,
    ):
        device = device or CpuDevice()
        self.key = (slots, young)
        asked: dict[int, list[int]] = {}
        for row, slot in enumerate(held):
            if slot.params.logprobs is not None:
                asked.setdefault(slot.params.logprobs, []).append(row)
        self.slots_R, *at = upload_all(
            device, *(np.array(rows, dtype=np.int64) for rows in (slots, *asked.values()))
        )
        # (number of logprobs, rows, the same on the device): one number at a time, so that ties do not fall
        # otherwise because somebody else asked for more
        self.scored = [(k, rows, rows_A) for (k, rows), rows_A in zip(asked.items(), at, strict=True)]
        self.groups = _groups(held, self.slots_R, tensors) if grouped else {}
        self.all_greedy = list(self.groups) == [Way.GREEDY]
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


def _groups(held: Sequence[Slot], slots_R: Tensor, tensors: SlotTensors) -> dict[Way, Group]:
    groups: dict[Way, Group] = {}
    for way in Way:
        if rows := [row for row, slot in enumerate(held) if slot.way is way]:
            groups[way] = _group(rows, held, slots_R, tensors)
    return groups


def _group(rows: list[int], held: Sequence[Slot], slots_R: Tensor, tensors: SlotTensors) -> Group:
    index = torch.tensor(rows, dtype=torch.int64, device=slots_R.device)
    slots, numbers = slots_R[index], tensors.numbers
    return Group(
        rows=None if len(rows) == len(held) else index,
        starts=numbers.starts[slots],
        inv_temperature=numbers.inv_temperature[slots],
        min_p=numbers.min_p[slots] if any(held[row].params.min_p > 0 for row in rows) else None,
        top_p=numbers.top_p[slots],
        top_k=numbers.top_k[slots],
        largest_k=max(held[row].top_k for row in rows),
    )
