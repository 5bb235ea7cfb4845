"""The executor's persistent input buffers: one row (slot) per running sequence, and the Forward built from a plan.

The host writes block tables and prompts; the sampler writes sampled tokens into `tokens`. A step's input ids are
read from `tokens` by (slot, position), so a decode step finds its input there whether or not the host knows it yet.
"""

import numpy as np
import torch

from xllm.core.plan import StepPlan
from xllm.models.forward import Forward
from xllm.ops.attention import AttentionInputs


class InputBuffers:
    """Owned by the executor's thread; written only in plan order."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self.device = device
        width = -(-max_model_len // block_size)
        # tokens: +1 because the token sampled at the very last position is written too, though never computed
        self.tokens = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int64, device=device)
        self._block_table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)

    def admit(self, plan: StepPlan) -> None:
        """Take over what is new in a plan: whole sequences, then appended blocks."""
        for seq in plan.new:
            self.tokens[seq.slot, : len(seq.token_ids)] = torch.as_tensor(seq.token_ids, dtype=torch.int64)
            self._block_table[seq.slot, : len(seq.blocks)] = seq.blocks
            self._num_blocks[seq.slot] = len(seq.blocks)
        for slot, blocks in plan.appended:
            have = self._num_blocks[slot]
            self._block_table[slot, have : have + len(blocks)] = blocks
            self._num_blocks[slot] = have + len(blocks)

    def forward(self, plan: StepPlan, kv_cache: torch.Tensor, logits_rows: np.ndarray) -> Forward:
        slots = np.asarray(plan.slots, dtype=np.int64)
        starts = np.asarray(plan.starts, dtype=np.int64)
        counts = np.asarray(plan.counts, dtype=np.int64)
        query_starts = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_starts[1:])
        if len(slots) == query_starts[-1]:  # pure decode: one token a sequence, nothing to repeat
            slot_T, position_T = slots, starts
        else:
            slot_T = np.repeat(slots, counts)
            position_T = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], counts)
        context_lens = starts + counts
        width = -(-int(context_lens.max()) // self.block_size)
        block_T = self._block_table[slot_T, position_T // self.block_size]
        kv_slots = block_T.astype(np.int64) * self.block_size + position_T % self.block_size
        positions = self._to_device(position_T)
        return Forward(
            token_ids=self.tokens[self._to_device(slot_T), positions],
            positions=positions,
            attention=AttentionInputs(
                query_starts=self._to_device(query_starts),
                context_lens=self._to_device(context_lens.astype(np.int32)),
                block_table=self._to_device(np.ascontiguousarray(self._block_table[slots, :width])),
                kv_slots=self._to_device(kv_slots),
                max_query_len=int(counts.max()),
                max_context_len=int(context_lens.max()),
            ),
            kv_cache=kv_cache,
            logits_rows=self._to_device(logits_rows),
        )

    def feed_back(self, slots: list[int], positions: list[int], sampled: torch.Tensor) -> None:
        """Sampled tokens [R] become the input of later steps, on the device."""
        self.tokens[torch.tensor(slots), torch.tensor(positions)] = sampled

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
