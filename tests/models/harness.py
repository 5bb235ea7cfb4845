"""Drives a Model by hand: makes Forwards over a KV cache whose blocks are deliberately out of order."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xllm.config.decided import ModelConfig
from xllm.models.checkpoint import read_model_config
from xllm.models.forward import Forward, Model
from xllm.models.loader import load_model
from xllm.ops.attention import AttentionInputs
from xllm.ops.table import load_ops


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class Driver:
    """A model, a KV cache and block tables; every call computes some tokens of some sequences."""

    def __init__(
        self, model: Model, config: ModelConfig, *, dtype: torch.dtype, block_size: int = 16, blocks: int = 64
    ):
        self.model = model
        self.block_size = block_size
        shape = (blocks, config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        self.kv_cache = torch.full(
            shape, float("nan"), dtype=dtype
        )  # whoever reads what nobody wrote shows it
        self.free = list(range(blocks))
        random.Random(0).shuffle(self.free)

    def step(self, work: list[tuple[Sequence, int]], *, every_token: bool = False) -> torch.Tensor:
        """Compute `count` further tokens of each sequence; logits [sequences or tokens, vocabulary]."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, contexts = [0], []
        for sequence, count in work:
            end = sequence.computed + count
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self.free.pop())
            here = range(sequence.computed, end)
            ids += sequence.tokens[sequence.computed : end]
            positions += here
            slots += [
                sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in here
            ]
            starts.append(len(ids))
            contexts.append(end)
            sequence.computed = end
        rows = list(range(len(ids))) if every_token else [start - 1 for start in starts[1:]]
        fwd = Forward(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            attention=AttentionInputs(
                query_starts=torch.tensor(starts, dtype=torch.int32),
                context_lens=torch.tensor(contexts, dtype=torch.int32),
                block_table=self._table([sequence for sequence, _ in work]),
                kv_slots=torch.tensor(slots),
                max_query_len=max(count for _, count in work),
                max_context_len=max(contexts),
            ),
            kv_cache=self.kv_cache,
            logits_rows=torch.tensor(rows),
        )
        return self.model.logits(self.model.forward(fwd))

    def _table(self, sequences: list[Sequence]) -> torch.Tensor:
        width = max(len(sequence.blocks) for sequence in sequences) + 2
        table = torch.full((len(sequences), width), 2**30, dtype=torch.int32)  # undefined past the context
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
        return table

    def greedy(self, prompt: list[int], count: int, *, chunk: int | None = None) -> list[int]:
        """`count` most likely tokens after the prompt, which is computed in chunks of `chunk` tokens."""
        sequence = Sequence(list(prompt))
        while True:
            left = len(sequence.tokens) - sequence.computed
            logits = self.step([(sequence, min(left, chunk or left))])
            if sequence.computed < len(sequence.tokens):
                continue
            if len(sequence.tokens) == len(prompt) + count:
                return sequence.tokens[len(prompt) :]
            sequence.tokens.append(int(logits[-1].argmax()))


def load(
    directory: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    load_format: str = "auto",
    overrides: dict[str, Any] | None = None,
    **cache: int,
) -> Driver:
    config = read_model_config(directory, overrides, load_format)
    model = load_model(config, dtype=dtype, device="cpu", ops=load_ops(device, dtype), seed=0)
    return Driver(model, config, dtype=dtype, **cache)
