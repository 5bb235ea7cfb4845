"""Root mean square normalisation (Zhang and Sennrich 2019): the contract and the plain PyTorch reference.

Legend: T tokens, K features.
"""

import torch


def rms_norm(x_TK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; returns a new tensor like x."""
    return x_TK * torch.rsqrt(x_TK.square().mean(-1, keepdim=True) + eps) * weight_K


def add_rms_norm(
    x_TK: torch.Tensor, residual_TK: torch.Tensor, weight_K: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x **in place**, then the norm of the new residual as a new tensor. Both inputs contiguous."""
    residual_TK += x_TK
    return rms_norm(residual_TK, weight_K, eps)
