"""Half-layers of a few tokens as single kernels (`gemv`). Contracts in `xllm.ops.few`."""

import torch

from xllm.ops.cuda import gemv
from xllm.ops.cuda.activation import silu_and_mul
from xllm.ops.cuda.linear import linear
from xllm.ops.cuda.norm import rms_norm

# Steps of more tokens are faster operator by operator, where tensor cores share the weights between them: on an H200 a
# layer of Qwen3-0.6B takes 33 us instead of 31 with 2 tokens and 50 instead of 33 with 4, one of 8B 123 instead of 119
# and 170 instead of 121.
MAX_TOKENS = 1


def norm_linear(
    residual_TK: torch.Tensor,
    norm_K: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias_N: torch.Tensor | None,
) -> torch.Tensor:
    if not fits(residual_TK):
        return linear(rms_norm(residual_TK, norm_K, eps), weight, bias_N)
    y_TN = residual_TK.new_empty((residual_TK.shape[0], weight.shape[0]))
    gemv.gemv(residual_TK, weight, bias_N, y_TN, norm_K=norm_K, eps=eps)
    return y_TN


def linear_add(
    x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None, residual_TN: torch.Tensor
) -> None:
    if fits(x_TK):
        gemv.gemv(x_TK.contiguous(), weight, bias_N, residual_TN, add=True)
    else:
        residual_TN += linear(x_TK, weight, bias_N)


def norm_gate_up(
    residual_TK: torch.Tensor,
    norm_K: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias_2I: torch.Tensor | None,
) -> torch.Tensor:
    if not fits(residual_TK):
        return silu_and_mul(linear(rms_norm(residual_TK, norm_K, eps), weight, bias_2I))
    y_TI = residual_TK.new_empty((residual_TK.shape[0], weight.shape[0] // 2))
    gemv.gemv(residual_TK, weight, bias_2I, y_TI, norm_K=norm_K, eps=eps, gated=True)
    return y_TI


def fits(x_TK: torch.Tensor) -> bool:
    """Whether one kernel can do it."""
    return x_TK.shape[0] <= gemv.MAX_TOKENS and x_TK.shape[1] <= gemv.MAX_COLUMNS
