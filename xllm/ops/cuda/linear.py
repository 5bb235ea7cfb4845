"""Matrix products with plain weights: one row, a few and many take different kernels.

One row is a GEMV, up to 16 are a skinny product. On an H200, at the shapes of Qwen3, a step with them is 3 to 30 %
faster than with cuBLAS, partly because they overlap with their neighbours (`launch`). More rows are cuBLAS's.
"""

import torch
import torch.nn.functional as F

from xllm.ops.cuda.gemv import MAX_COLUMNS, gemv
from xllm.ops.cuda.skinny import skinny
from xllm.ops.cuda.tiling import SKINNY_TOKENS


def linear(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    tokens, columns = x_TK.shape
    if not 1 <= tokens <= SKINNY_TOKENS or weight.dtype != x_TK.dtype or not weight.is_contiguous():
        return _by_cublas(x_TK, weight.to(x_TK.dtype), bias_N)
    x_TK = x_TK.contiguous()
    if tokens > 1 or columns > MAX_COLUMNS:
        return skinny(x_TK, weight, bias_N)
    y_TN = x_TK.new_empty((1, weight.shape[0]))
    gemv(x_TK, weight, bias_N, y_TN)
    return y_TN


def _by_cublas(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """The bias as a matrix, which is added before the one rounding. As a vector it would be the business of cuBLASLt, and
    that rounds the product first where it splits the columns (https://github.com/pytorch/pytorch/pull/180875)."""
    if bias_N is None:
        return F.linear(x_TK, weight)
    return torch.addmm(bias_N.expand(x_TK.shape[0], -1), x_TK, weight.T)
