"""The sampler: what a step's logits become, row by row independent of each other, with one token each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.core.plan import NewSequence, TokenLogprobs
from xllm.executor.sampling.batch import Batch, Group
from xllm.executor.sampling.choose import MAX_VOCAB, draw, draw_top_k, draw_top_p, weights
from xllm.executor.sampling.logprobs import Scores, score
from xllm.executor.sampling.random import uniforms
from xllm.executor.sampling.slots import OutputCounts, Slot, SlotTensors, Way

_UNUSABLE = "the logits of this sequence are not finite, or its parameters leave no token to choose"


@dataclass(frozen=True, slots=True)
class Sampled:
    """What `Sampler.sample` chose; on the device until one of the host views is asked for."""

    token_ids: Tensor  # [R] int64; 0 in rows without a usable distribution
    usable: Tensor  # [R] bool
    scores: list[tuple[list[int], Scores]]  # of rows that asked for logprobs, by how many they asked for

    @property
    def errors(self) -> dict[int, str]:
        """Row -> why it alone has no token. Waits for the device."""
        if bool(self.usable.all()):
            return {}
        return {row: _UNUSABLE for row, usable in enumerate(self.usable.tolist()) if not usable}

    def host_logprobs(self) -> dict[int, TokenLogprobs]:
        """Row -> log-probabilities, for the usable rows that asked. Waits for the device."""
        if not self.scores:
            return {}
        usable = self.usable.tolist()
        return {
            row: entry
            for rows, scores in self.scores
            for row, entry in zip(rows, scores.to_host(), strict=True)
            if usable[row]
        }


class Sampler:
    """Holds the parameters of every slot's sequence. `tokens` is the executor's buffer; it is only read.

    A row's token depends on its logits, parameters, tokens, seed and position, and on nothing else: not on
    the rows beside it, nor on how the sequence came to where it is.
    """

    def __init__(
        self, *, max_num_seqs: int, vocab_size: int, tokens: Tensor, device: torch.device | str = "cpu"
    ):
        """`tokens` [max_num_seqs, max_model_len] holds the tokens of each slot's sequence, prompt first.

        Those before a position must be there when it is sampled.
        """
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"sums over a vocabulary of {vocab_size} would not be exact")
        self._tokens = tokens
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._slots: list[Slot | None] = [None] * max_num_seqs
        self._counts = OutputCounts(vocab_size, self._device)
        self._tensors = SlotTensors(max_num_seqs, self._device)
        self._batch: Batch | None = None

    def admit(self, seq: NewSequence) -> None:
        """A slot gets a sequence, new or resumed; whatever it held is forgotten."""
        slot = Slot.of(seq, self._vocab_size)
        before = self._slots[seq.slot]
        if before is not None and before.count_row >= 0:
            self._counts.give(before.count_row)
        if slot.counted:
            output = torch.tensor(seq.token_ids[seq.prompt_len :], dtype=torch.int64, device=self._device)
            slot.count_row = self._counts.take(output)
        self._slots[seq.slot] = slot
        self._tensors.set(seq.slot, slot, seq.seed)
        self._batch = None

    def sample(self, logits_RV: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Sampled:
        """Row r of the float32 logits belongs to slot slots[r]; its token will stand at positions[r].

        Keeps the logits as they are. A row that has no usable distribution (NaN, +inf, nothing but -inf) is
        marked and gets token 0.
        """
        batch = self._batch_of(slots, positions)
        positions_R = torch.tensor(positions, dtype=torch.int64, device=self._device)
        edited = logits_RV
        if batch.edits:
            edited = logits_RV.clone()
            batch.edit(edited, self._tokens, positions_R, max(positions), self._counts.counts)
        if batch.all_greedy:
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
        """Of N tokens that were given, not chosen: logits row i predicted token target_ids[i]."""
        return score(logits_NV, target_ids_N.to(torch.int64), k).to_host()

    def _choose(self, logits_RV: Tensor, best_R: Tensor, batch: Batch, positions_R: Tensor) -> Tensor:
        token_ids = torch.empty_like(positions_R)
        for way, group in batch.groups.items():
            chosen = _go(way, group, group.of(logits_RV), group.of(best_R), group.of(positions_R))
            if group.rows is None:
                return chosen
            token_ids[group.rows] = chosen
        return token_ids

    def _batch_of(self, slots: Sequence[int], positions: Sequence[int]) -> Batch:
        """The plan for this composition; in steady decoding it is the last step's."""
        held: list[Slot] = []
        for slot in slots:
            entry = self._slots[slot]
            assert entry is not None, f"slot {slot} holds no sequence"
            held.append(entry)
        young = [entry.young(position) for entry, position in zip(held, positions, strict=True)]
        if self._batch is None or self._batch.key != (list(slots), young):
            self._batch = Batch(list(slots), held, young, self._tensors)
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
