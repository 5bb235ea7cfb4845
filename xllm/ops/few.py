"""Half-layers as single operators, for decode steps of a few tokens: contracts and plain PyTorch references.

With one row a step is bound by launches and by the ramp of each kernel, not by bytes or arithmetic; five kernels a
layer instead of nine is what that buys. Composed of the operators they fuse, whose contracts and legends hold here too.
Weights are plain [N, K] tensors of the activations' dtype; quantised ones go the ordinary way.
"""

import torch

from xllm.ops.activation import silu_and_mul
from xllm.ops.attention import AttentionInputs, attention
from xllm.ops.linear import linear
from xllm.ops.norm import rms_norm
from xllm.ops.rotary import rope_and_cache

MAX_TOKENS = 8


def norm_linear(
    residual_TK: torch.Tensor,
    norm_K: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias_N: torch.Tensor | None,
) -> torch.Tensor:
    """linear(rms_norm(residual)) -> [T, N]; the residual stays as it is."""
    return linear(rms_norm(residual_TK, norm_K, eps), weight, bias_N)


def linear_add(
    x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None, residual_TN: torch.Tensor
) -> None:
    """residual += linear(x) **in place**."""
    residual_TN += linear(x_TK, weight, bias_N)


def norm_gate_up(
    residual_TK: torch.Tensor,
    norm_K: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias_2I: torch.Tensor | None,
) -> torch.Tensor:
    """silu_and_mul(linear(rms_norm(residual))) -> [T, I]; the weight is [2I, K], gate above up."""
    return silu_and_mul(norm_linear(residual_TK, norm_K, eps, weight, bias_2I))


def rope_cache_attention(
    qkv_TE: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MR: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """rope_and_cache, then attention, of sequences with one token each -> [T, Q * D]. qkv is consumed."""
    q_TQD = rope_and_cache(
        qkv_TE, positions_T, cos_sin_MR, q_norm_D, k_norm_D, eps, kv_cache, layer, inputs.kv_slots
    )
    return attention(q_TQD, kv_cache, layer, inputs, scale, window)
