"""Gated activations: the contract and the plain PyTorch reference. Legend: T tokens, I intermediate features."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate is the first half of the last dimension and up the second: [T, 2I] -> [T, I]."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI
