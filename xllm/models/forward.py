"""What a model is given in one step, and what it must offer the executor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from xllm.ops.attention import AttentionInputs


@dataclass(frozen=True, slots=True)
class Forward:
    """A frozen view of the executor's buffers: T tokens of all scheduled sequences, packed one after the other.

    Always passed explicitly: two micro-batches, or a draft and a target, are two of these.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    attention: AttentionInputs
    kv_cache: torch.Tensor  # [blocks, layers, 2, block_size, kv_heads, head_dim], written in place
    # [R] int64: the tokens whose next-token logits somebody wants; None: all of them, in order
    logits_rows: torch.Tensor | None


class Model(Protocol):
    on_layer: Callable[[], None] | None  # called after each layer: liveness inside a long step

    def forward(self, fwd: Forward) -> torch.Tensor:
        """Write KV of all T tokens; return the final-normed hidden states [R, hidden] of `logits_rows`."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> [R, vocab] in the dtype of the device's activations."""
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """All parameters, in whatever form the device keeps them; one may come several times."""
        ...
