"""The sampler: what a step's logits become, row by row independent of each other, with one token each."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xllm.core.plan import NewSequence, TokenLogprobs
from xllm.device.cpu import CpuDevice
from xllm.device.table import Device
from xllm.executor.packing import upload_all
from xllm.executor.sampling.batch import Batch, Group
from xllm.executor.sampling.choose import MAX_VOCAB, draw, draw_top_k, draw_top_p, weights
from xllm.executor.sampling.logprobs import FetchedScores, score
from xllm.executor.sampling.random import uniforms
from xllm.executor.sampling.sampled import Sampled
from xllm.executor.sampling.slots import OutputCounts, Slot, SlotTensors, Way
from xllm.ops.table import Ops


class Sampler:
    """Holds the parameters of every slot's sequence. `tokens` is the executor's buffer; it is only read, but for
    `sample_plain`.

    A row's token depends on its logits, parameters, tokens, seed and position, and on nothing else: not on
    the rows beside it, nor on how the sequence came to where it is.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        vocab_size: int,
        tokens: Tensor,
        device: Device | None = None,
        ops: Ops | None = None,
    ):
        """`tokens` [max_num_seqs, max_model_len] holds the tokens of each slot's sequence, prompt first.

        Those before a position must be there when it is sampled. The device is the CPU if none is given. Where `ops`
        can sample, it chooses for all rows at once, otherwise PyTorch does for one kind of request after the other.
        """
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"sums over a vocabulary of {vocab_size} would not be exact")
        self._tokens = tokens
        self._device = device or CpuDevice()
        self._choose_all = None if ops is None else ops.sample
        self._vocab_size = vocab_size
        self._slots: list[Slot | None] = [None] * max_num_seqs
        self._special: set[int] = set()  # slots that are not known to be plain by now
        self._counts = OutputCounts(vocab_size, self._device.torch_device)
        self._tensors = SlotTensors(max_num_seqs, self._device.torch_device)
        self._batch: Batch | None = None

    def admit(self, seq: NewSequence) -> None:
        """A slot gets a sequence, new or resumed; whatever it held is forgotten."""
        slot = Slot.of(seq, self._vocab_size)
        before = self._slots[seq.slot]
        if before is not None and before.count_row >= 0:
            self._counts.give(before.count_row)
        if slot.counted:
            output = np.array(seq.token_ids[seq.prompt_len :], dtype=np.int64)
            slot.count_row = self._counts.take(*upload_all(self._device, output))
        self._slots[seq.slot] = slot
        self._tensors.set(seq.slot, slot, seq.seed)
        if slot.plain_from == 0:
            self._special.discard(seq.slot)
        else:
            self._special.add(seq.slot)
        self._batch = None

    def upload(self) -> None:
        """Bring what `admit` was told to the device; before every replay of a graph that holds `sample_plain`."""
        self._tensors.upload(self._device)

    def is_plain(self, slots: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether these rows need nothing but `sample_plain`, and the device has it."""
        if self._choose_all is None:
            return False
        if not self._special or self._special.isdisjoint(slots):
            return True
        for slot, position in zip(slots, positions, strict=True):
            if slot in self._special:
                entry = self._held(slot)
                if entry.plain_from is None or position < entry.plain_from:
                    return False
                self._special.discard(slot)  # it may end from here on
        return True

    def sample_plain(
        self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor, feed_SL: Tensor | None = None,
        *, advance: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """-> token ids [R] int64 and whether they are usable [R] bool, for rows that `is_plain`; a graph may capture it.

        slots_R and positions_R as in `sample`, int64 on the device; feed_SL[slot, position] becomes the token.
        `advance` as in `xllm.ops.sampling`.
        """
        assert self._choose_all is not None, "this device chooses one kind of request after the other"
        return self._choose_all(logits_RV, slots_R, positions_R, self._tensors.numbers, feed_SL, advance)

    def sample(self, logits_RV: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Sampled:
        """Row r of the logits belongs to slot slots[r]; its token will stand at positions[r].

        Keeps the logits as they are; they are float32, or bfloat16 where the device chooses for all rows at once. A
        row that has no usable distribution (NaN, +inf, nothing but -inf) is marked and gets token 0. Nothing here waits
        for such a device.
        """
        self.upload()
        batch = self._batch_of(slots, positions)
        (positions_R,) = upload_all(self._device, np.array(positions, dtype=np.int64))
        edited = logits_RV
        if batch.edits:
            edited = logits_RV.to(torch.float32, copy=True)
            batch.edit(edited, self._tokens, positions_R, max(positions), self._counts.counts)
        if self._choose_all is not None:
            token_ids, usable = self.sample_plain(edited, batch.slots_R, positions_R)
        elif batch.all_greedy:
            token_ids = edited.argmax(-1)
            usable = edited.gather(1, token_ids[:, None]).isfinite().squeeze(1)
        else:
            best_R = edited.amax(-1)
            usable = best_R.isfinite()
            token_ids = torch.where(usable, self._choose(edited, best_R, batch, positions_R), 0)
        batch.penalties.count(token_ids, self._counts.counts)
        scores = [(rows, score(logits_RV[at], token_ids[at], k)) for k, rows, at in batch.scored]
        return Sampled(token_ids, usable, scores)

    def prompt_logprobs(self, logits_NV: Tensor, target_ids_N: Tensor, k: int) -> list[TokenLogprobs]:
        """As `fetch_prompt_logprobs`; waits for the device."""
        fetched = self.fetch_prompt_logprobs(logits_NV, target_ids_N, k)
        self._device.mark().wait()
        return fetched.entries()

    def fetch_prompt_logprobs(self, logits_NV: Tensor, target_ids_N: Tensor, k: int) -> FetchedScores:
        """Of N tokens that were given, not chosen: logits row i predicted token target_ids[i]."""
        return score(logits_NV, target_ids_N.to(torch.int64), k).fetch(self._device)

    def _choose(self, logits_RV: Tensor, best_R: Tensor, batch: Batch, positions_R: Tensor) -> Tensor:
        token_ids = torch.empty_like(positions_R)
        for way, group in batch.groups.items():
            chosen = _go(way, group, group.of(logits_RV), group.of(best_R), group.of(positions_R))
            if group.rows is None:
                return chosen
            token_ids[group.rows] = chosen
        return token_ids

    def _held(self, slot: int) -> Slot:
        entry = self._slots[slot]
        assert entry is not None, f"slot {slot} holds no sequence"
        return entry

    def _batch_of(self, slots: Sequence[int], positions: Sequence[int]) -> Batch:
        """The plan for this composition; in steady decoding it is the last step's."""
        held = [self._held(slot) for slot in slots]
        young = [entry.young(position) for entry, position in zip(held, positions, strict=True)]
        if self._batch is None or self._batch.key != (list(slots), young):
            grouped = self._choose_all is None
            self._batch = Batch(list(slots), held, young, self._tensors, self._device, grouped=grouped)
        return self._batch


def _go(way: Way, group: Group, logits_AV: Tensor, best_A: Tensor, positions_A: Tensor) -> Tensor:
    """[A] int64: the tokens of a group, row by row of the arguments."""
    if way is Way.GREEDY:
        return logits_AV.argmax(-1)
    if way is Way.TOP_K:
        uniforms_A = uniforms(group.starts, positions_A)
        temperature, min_p = group.inv_temperature, group.min_p
        return draw_top_k(
            logits_AV, best_A, temperature, min_p, group.top_k, group.top_p, uniforms_A, group.largest_k
        )
    weights_AV = weights(logits_AV, best_A, group.inv_temperature, group.min_p)
    if way is Way.TOP_P:
        return draw_top_p(weights_AV, group.top_p, group.starts, positions_A)
    return draw(weights_AV, uniforms(group.starts, positions_A))[0]
