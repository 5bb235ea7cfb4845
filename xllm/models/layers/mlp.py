"""The gated feed-forward half of a decoder layer. Legend: T tokens, K hidden, I intermediate."""

from dataclasses import dataclass

import torch

from xllm.ops.linear import Weight
from xllm.ops.table import Ops


@dataclass(frozen=True, slots=True)
class GatedMLP:
    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None
    ops: Ops

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        gate_up_T2I = self.ops.linear(x_TK, self.gate_up, self.gate_up_bias)
        return self.ops.linear(self.ops.silu_and_mul(gate_up_T2I), self.down, self.down_bias)
