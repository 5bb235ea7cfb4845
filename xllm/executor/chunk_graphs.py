"""Short prompts, and few decodes beside them, as device graphs: their launches would take longer than their work.

A graph has a fixed number of tokens, its size. What a step has less is filled up by one more sequence, of the spare slot;
another sequence without tokens is there for tiles of attention that are not needed. All of it is ordinary work.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from xllm.core.plan import StepPlan
from xllm.executor.buffers import InputBuffers
from xllm.executor.graphs import GraphTable, Shape
from xllm.models.forward import Forward
from xllm.ops.attention import AttentionInputs, query_tiles

SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024)  # tokens
SEQUENCES = 16  # of a step at most
LONGEST_CONTEXT = 8192  # tokens before the chunk: here one program reads them all, eager steps split them
FILLER, EMPTY = SEQUENCES, SEQUENCES + 1  # places behind the real sequences

NOBODY = StepPlan(step=0, new=(), slots=(), starts=(), counts=(), samples=(), appended=())

Tensors = Mapping[str, torch.Tensor]
# (forward, slots [SEQUENCES] int64, positions [SEQUENCES] int64 of the tokens to sample) -> the step's outputs
ChunkStep = Callable[[Forward, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


class ChunkGraphs:
    """Belongs to the executor's thread."""

    def __init__(
        self, table: GraphTable, step: ChunkStep, buffers: InputBuffers, kv_cache: torch.Tensor, *, enabled: bool
    ):  # fmt: skip
        self._table = table
        self._step = step
        self._buffers = buffers
        self._kv_cache = kv_cache
        self._sizes = [size for size in SIZES if size <= buffers.max_model_len] if enabled else []

    def fits(self, plan: StepPlan) -> bool:
        """Whether there is a size for the step."""
        return (
            bool(self._sizes)
            and len(plan.slots) <= SEQUENCES
            and plan.num_tokens <= self._sizes[-1]
            and max(plan.starts) <= LONGEST_CONTEXT
        )

    def run(self, plan: StepPlan) -> tuple[torch.Tensor, ...] | None:
        """The step's outputs: the first rows are those of the sequences that sample. None where there is no graph."""
        if not self.fits(plan):
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, plan.num_tokens)]
        return self._table.replay(self._shape(size), self._arrays(plan, size))

    def capture_one(self) -> bool:
        """Capture one graph that is missing; False when there is none."""
        for size in self._sizes:
            shape = self._shape(size)
            if shape.key not in self._table:
                self._table.capture(shape)
                return True
        return False

    def _shape(self, size: int) -> Shape:
        return Shape(
            key=("chunk", size),
            what=f"prompt chunks of {size} tokens",
            blank=lambda: self._arrays(NOBODY, size),
            step=lambda tensors: self._run(tensors, size),
        )

    def _arrays(self, plan: StepPlan, size: int) -> dict[str, np.ndarray]:
        b = self._buffers
        real, fill = len(plan.slots), size - plan.num_tokens
        slots = _padded(plan.slots, b.spare_slot)
        starts, counts = _padded(plan.starts, 0), _padded(plan.counts, 0)
        counts[FILLER] = fill
        query_starts = np.zeros(SEQUENCES + 3, dtype=np.int32)
        np.cumsum(counts, out=query_starts[1:])
        slot_T = np.repeat(slots, counts)
        position_T = np.arange(size) + np.repeat(starts - query_starts[:-1], counts)
        tables = b.tables_of(slots)
        tables[real:] = b.spare_block  # however long the filler is, it stays in its one block
        block_T = tables[np.repeat(np.arange(len(slots)), counts), position_T // b.block_size]
        sampling = np.flatnonzero(plan.samples)
        arrays = {
            "slots": slot_T,
            "positions": position_T,
            "kv_slots": block_T.astype(np.int64) * b.block_size + position_T % b.block_size,
            "rows": _padded(query_starts[sampling + 1] - 1, 0)[:SEQUENCES],
            "sample_slots": _padded(slots[sampling], b.spare_slot)[:SEQUENCES],
            "sample_positions": _padded((starts + counts)[sampling], 1)[:SEQUENCES],
            "query_starts": query_starts,
            "context_lens": np.maximum(starts + counts, 1).astype(np.int32),
            "block_table": tables,
        }
        if tile := b.ops.query_tile:
            tiles = np.zeros((-(-size // tile) + SEQUENCES + 1, 2), dtype=np.int32)
            tiles[:, 0] = EMPTY
            needed = query_tiles(counts, 0, tile)
            tiles[: len(needed)] = needed
            arrays["tiles"] = tiles
        return arrays

    def _run(self, t: Tensors, size: int) -> tuple[torch.Tensor, ...]:
        fwd = Forward(
            token_ids=self._buffers.tokens[t["slots"], t["positions"]],
            positions=t["positions"],
            attention=AttentionInputs(
                query_starts=t["query_starts"],
                context_lens=t["context_lens"],
                block_table=t["block_table"],
                kv_slots=t["kv_slots"],
                max_query_len=size,
                max_context_len=self._buffers.max_model_len,
                tiles=t.get("tiles"),
            ),
            kv_cache=self._kv_cache,
            logits_rows=t["rows"],
        )
        return self._step(fwd, t["sample_slots"], t["sample_positions"])


def _padded(values: Sequence[int] | np.ndarray, filler: int) -> np.ndarray:
    """[SEQUENCES + 2] int64: the plan's values, then the filler."""
    padded = np.full(SEQUENCES + 2, filler, dtype=np.int64)
    padded[: len(values)] = values
    return padded
