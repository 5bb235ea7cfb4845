"""The attention half of a decoder layer. Legend: T tokens, K hidden, E fused width of query, key and value."""

from dataclasses import dataclass

import torch

from xllm.models.forward import Forward
from xllm.ops.linear import Weight
from xllm.ops.table import Ops


@dataclass(frozen=True, slots=True)
class Attention:
    layer: int
    scale: float
    window: int | None
    norm_eps: float
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    ops: Ops

    def forward(self, x_TK: torch.Tensor, fwd: Forward, cos_sin_MR: torch.Tensor) -> torch.Tensor:
        """Write this layer's KV of all T tokens and attend: [T, K] -> [T, K]."""
        ops = self.ops
        qkv_TE = ops.linear(x_TK, self.qkv, self.qkv_bias)
        q_TQD = ops.rope_and_cache(
            qkv_TE,
            fwd.positions,
            cos_sin_MR,
            self.q_norm,
            self.k_norm,
            self.norm_eps,
            fwd.kv_cache,
            self.layer,
            fwd.attention.kv_slots,
        )
        out_TE = ops.attention(q_TQD, fwd.kv_cache, self.layer, fwd.attention, self.scale, self.window)
        return ops.linear(out_TE, self.o, self.o_bias)
