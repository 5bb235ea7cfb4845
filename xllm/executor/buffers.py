"""The executor's persistent input buffers: one row (slot) per running sequence, and the Forward built from a plan.

The host writes block tables and prompts; the sampler writes sampled tokens into `tokens`. A step's input ids are
read from `tokens` by (slot, position), so a decode step finds its input there whether or not the host knows it yet.
"""

from collections.abc import Sequence

import numpy as np
import torch

from xllm.core.plan import StepPlan
from xllm.device.table import Device
from xllm.executor.packing import upload_all
from xllm.models.forward import Forward
from xllm.ops.attention import (
    SPLIT_ENTRIES,
    SPLIT_TILE,
    SPLIT_TOKENS,
    AttentionInputs,
    query_tiles,
    split_keys,
)
from xllm.ops.table import Ops


class InputBuffers:
    """Owned by the executor's thread; written only in plan order.

    On a device with graphs there is one slot more, `spare_slot`, with a block of its own, `spare_block`: the rows that
    fill a graph up to its size compute token 0 at position 0 there, like any other row, for nobody.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, device: Device, ops: Ops, spare_block: int = 0
    ):  # fmt: skip
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.device = device
        self.ops = ops
        self.spare_slot = max_num_seqs
        self.spare_block = spare_block
        slots = max_num_seqs + device.asynchronous
        width = -(-max_model_len // block_size)
        # tokens: +1 because the token sampled at the very last position is written too, though never computed
        self.tokens = torch.zeros((slots, max_model_len + 1), dtype=torch.int64, device=device.torch_device)
        self._block_table = np.zeros((slots, width), dtype=np.int32)
        self._num_blocks = np.zeros(slots, dtype=np.int64)
        # the same on the device, for graphs; its rows are right from a sequence's start to its end
        self.block_table: torch.Tensor | None = None
        if device.asynchronous:
            self._block_table[self.spare_slot, 0] = spare_block
            self.block_table = device.upload(self._block_table)
            self._one_each = device.upload(
                np.arange(slots + 1, dtype=np.int32)
            )  # query starts of a decode step

    def admit(self, plan: StepPlan) -> None:
        """Take over what is new in a plan: whole sequences, then appended blocks."""
        written: list[tuple[int, int, Sequence[int]]] = []  # slot, first entry, block ids
        for seq in plan.new:
            written.append((seq.slot, 0, seq.blocks))
            self._num_blocks[seq.slot] = len(seq.blocks)
        for slot, blocks in plan.appended:
            have = int(self._num_blocks[slot])
            written.append((slot, have, blocks))
            self._num_blocks[slot] = have + len(blocks)
        for slot, first, blocks in written:
            self._block_table[slot, first : first + len(blocks)] = blocks
        if plan.new:
            self._write(self.tokens, [(seq.slot, 0, seq.token_ids) for seq in plan.new])
        if written and self.block_table is not None:
            self._write(self.block_table, written)

    def _write(self, into: torch.Tensor, runs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Values of each run go to row `slot` from column `first` on; one upload for all."""
        width = into.shape[1]
        at = np.concatenate(
            [np.arange(len(values)) + (slot * width + first) for slot, first, values in runs]
        ).astype(np.int64)
        values = np.concatenate([np.asarray(values, dtype=np.int64) for _, _, values in runs])
        where, what = upload_all(self.device, at, values)
        into.view(-1).index_copy_(0, where, what.to(into.dtype))

    def forward(self, plan: StepPlan, kv_cache: torch.Tensor, logits_rows: np.ndarray) -> Forward:
        """Any mix of chunks and decodes, sized as it is."""
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
        arrays = [
            slot_T, position_T, kv_slots, logits_rows, query_starts, context_lens.astype(np.int32),
            np.ascontiguousarray(self._block_table[slots, :width]),
        ]  # fmt: skip
        num_decodes = 0
        if self.ops.query_tile:
            several = np.flatnonzero(counts > 1)
            num_decodes = int(several[0]) if len(several) else len(slots)
            arrays += self._tiles(counts, context_lens, num_decodes)
        slot, position, kv_slot, rows, first_query, context, table, *tiles = upload_all(self.device, *arrays)
        return Forward(
            token_ids=self.tokens[slot, position],
            positions=position,
            attention=AttentionInputs(
                query_starts=first_query,
                context_lens=context,
                block_table=table,
                kv_slots=kv_slot,
                max_query_len=int(counts.max()),
                max_context_len=int(context_lens.max()),
                num_decodes=num_decodes,
                tiles=tiles[0] if tiles else None,
                parts=tiles[1] if len(tiles) > 1 else None,
            ),
            kv_cache=kv_cache,
            logits_rows=rows,
        )

    def _tiles(self, counts: np.ndarray, context_lens: np.ndarray, num_decodes: int) -> list[np.ndarray]:
        """Tiles of queries, and their parts where few queries have many keys to read."""
        if 0 < counts[num_decodes:].sum() <= SPLIT_TOKENS:
            small = query_tiles(counts, num_decodes, SPLIT_TILE)
            tiles, parts = split_keys(small, counts, context_lens, len(small) + SPLIT_ENTRIES)
            if len(tiles) > len(small):
                return [tiles, parts]
        return [query_tiles(counts, num_decodes, self.ops.query_tile)]

    def decode_forward(
        self, slots_B: torch.Tensor, positions_B: torch.Tensor, kv_cache: torch.Tensor
    ) -> Forward:
        """One token each of B slots, found on the device alone: a graph may capture it. Any context may follow."""
        assert self.block_table is not None, "only a device with graphs keeps its block table there"
        count = slots_B.shape[0]
        token_ids, kv_slots, context_lens, block_table = self.ops.decode_inputs(
            slots_B, positions_B, self.tokens, self.block_table, self.block_size
        )
        return Forward(
            token_ids=token_ids,
            positions=positions_B,
            attention=AttentionInputs(
                query_starts=self._one_each[: count + 1],
                context_lens=context_lens,
                block_table=block_table,
                kv_slots=kv_slots,
                max_query_len=1,
                max_context_len=self.max_model_len,
                num_decodes=count,
            ),
            kv_cache=kv_cache,
            logits_rows=None,
        )

    def tables_of(self, slots: np.ndarray) -> np.ndarray:
        """[len(slots), W] int32, a copy: block tables at their full width."""
        return self._block_table[slots]

    def feed_back(self, slots: Sequence[int], positions: Sequence[int], sampled: torch.Tensor) -> None:
        """Sampled tokens [R] become the input of later steps, on the device."""
        slot, position = upload_all(
            self.device, np.asarray(slots, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        )
        self.tokens[slot, position] = sampled
