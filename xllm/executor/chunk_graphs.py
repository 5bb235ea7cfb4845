"""Short prompts, and few decodes beside them, as device graphs: their launches would take longer than their work.

A graph has a fixed number of tokens, its size. What a step has less is filled up by one more sequence, of the spare slot;
another sequence without tokens is there for tiles of attention that are not needed. All of it is ordinary work.

In a small size several programs share a tile's keys (`split_keys`): it takes contexts of any length, and what it has of
tiles to spare goes to long ones. A larger one takes the tiles as they are.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from xllm.core.plan import StepPlan
from xllm.executor.buffers import InputBuffers
from xllm.executor.graphs import GraphTable, Shape
from xllm.models.forward import Forward
from xllm.ops.attention import SPLIT_TILE, SPLIT_TOKENS, AttentionInputs, query_tiles, split_keys

SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024)  # tokens
# Of a step at most. Each more is a tile of attention that most steps do not need, and a row that most do not sample: in
# a size that splits keys a tile is one or two programs per KV head, in a larger one many more.
SEQUENCES = 64
SEQUENCES_UNSPLIT = 16
LONGEST_CONTEXT = 8192  # tokens before the chunk, where one program reads them all

NOBODY = StepPlan(step=0, new=(), slots=(), starts=(), counts=(), samples=(), appended=())

Tensors = Mapping[str, torch.Tensor]
# (forward, slots [N] int64, positions [N] int64 of the tokens to sample) -> the step's outputs; N sequences of the size
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
        if not self._sizes or plan.num_tokens > self._sizes[-1]:
            return False
        size = self._size(plan)
        far = size > SPLIT_TOKENS and max(plan.starts) > LONGEST_CONTEXT
        return len(plan.slots) <= most_sequences(size) and not far

    def run(self, plan: StepPlan) -> tuple[torch.Tensor, ...] | None:
        """The step's outputs: the first rows are those of the sequences that sample. None where there is no graph."""
        if not self.fits(plan):
            return None
        size = self._size(plan)
        return self._table.replay(self._shape(size), self._arrays(plan, size))

    def capture_one(self) -> bool:
        """Capture one graph that is missing; False when there is none."""
        for size in self._sizes:
            shape = self._shape(size)
            if shape.key not in self._table:
                self._table.capture(shape)
                return True
        return False

    def _size(self, plan: StepPlan) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, plan.num_tokens)]

    def _shape(self, size: int) -> Shape:
        return Shape(
            key=("chunk", size),
            what=f"prompt chunks of {size} tokens",
            blank=lambda: self._arrays(NOBODY, size),
            step=lambda tensors: self._run(tensors, size),
        )

    def _arrays(self, plan: StepPlan, size: int) -> dict[str, np.ndarray]:
        b = self._buffers
        most = most_sequences(size)
        real, filler = len(plan.slots), most  # the filler's place is behind the real sequences
        slots = _padded(plan.slots, b.spare_slot, most + 2)
        starts, counts = _padded(plan.starts, 0, most + 2), _padded(plan.counts, 0, most + 2)
        counts[filler] = size - plan.num_tokens
        query_starts = np.zeros(most + 3, dtype=np.int32)
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
            "rows": _padded(query_starts[sampling + 1] - 1, 0, most),
            "sample_slots": _padded(slots[sampling], b.spare_slot, most),
            "sample_positions": _padded((starts + counts)[sampling], 1, most),
            "query_starts": query_starts,
            "context_lens": np.maximum(starts + counts, 1).astype(np.int32),
            "block_table": tables,
        }
        if b.ops.query_tile:
            arrays |= _tiles(counts, starts + counts, size, b.ops.query_tile)
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
                parts=t.get("parts"),
            ),
            kv_cache=self._kv_cache,
            logits_rows=t["rows"],
        )
        return self._step(fwd, t["sample_slots"], t["sample_positions"])


def most_sequences(size: int) -> int:
    """Of a step that a graph of so many tokens takes."""
    return min(size, SEQUENCES if size <= SPLIT_TOKENS else SEQUENCES_UNSPLIT)


def _tiles(counts: np.ndarray, contexts: np.ndarray, size: int, tile: int) -> dict[str, np.ndarray]:
    """As many entries as any step of the size needs; what is to spare is of the last sequence, which has no tokens."""
    split = size <= SPLIT_TOKENS
    tile = SPLIT_TILE if split else tile
    empty = len(counts) - 1
    entries = np.zeros((-(-size // tile) + empty, 2), dtype=np.int32)
    entries[:, 0] = empty
    tiles = query_tiles(counts, 0, tile)
    arrays = {"tiles": entries}
    if split:
        tiles, parts = split_keys(tiles, counts, contexts, len(entries))
        arrays["parts"] = np.tile(np.array([0, 1], dtype=np.int32), (len(entries), 1))
        arrays["parts"][: len(parts)] = parts
    entries[: len(tiles)] = tiles
    return arrays


def _padded(values: Sequence[int] | np.ndarray, filler: int, length: int) -> np.ndarray:
    """[length] int64: the values, then the filler."""
    padded = np.full(length, filler, dtype=np.int64)
    padded[: len(values)] = values
    return padded
