"""Matrix products with plain weights: one row, a few and many take different kernels.

One row is a GEMV, up to 16 are a skinny product. On an H200, at the shapes of Qwen3, a step with them is 3 to 30 %
faster than with cuBLAS, partly because they overlap with their neighbours (`launch`). Up to 128 rows are a narrow product
where the weight is of a shape for it (`tiling.narrow`). Everything else is cuBLAS's.
"""

import torch
import torch.nn.functional as F

from xllm.ops.cuda import narrow
from xllm.ops.cuda.gemv import MAX_COLUMNS, gemv
from xllm.ops.cuda.skinny import skinny
from xllm.ops.cuda.tiling import SKINNY_TOKENS

ALIGNED = 8  # numbers of two bytes: 16 bytes, what the products' fast ways ask for


def linear(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    tokens, columns = x_TK.shape
    if narrow.fits(x_TK, weight):
        return narrow.narrow(x_TK, weight, bias_N)
    if not 1 <= tokens <= SKINNY_TOKENS or weight.dtype != x_TK.dtype or not weight.is_contiguous():
        return _by_cublas(x_TK, weight.to(x_TK.dtype), bias_N)
    x_TK = x_TK.contiguous()
    if tokens > 1 or columns > MAX_COLUMNS:
        return skinny(x_TK, weight, bias_N)
    y_TN = x_TK.new_empty((1, weight.shape[0]))
    gemv(x_TK, weight, bias_N, y_TN)
    return y_TN


def _by_cublas(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    rows, columns = weight.shape
    if bias_N is not None and (rows % ALIGNED or columns % ALIGNED):
        # For such shapes, which no known model has, cuBLAS adds the bias to a product that it has rounded.
        return F.linear(x_TK.float(), weight.float(), bias_N.float()).to(x_TK.dtype)
    return F.linear(x_TK, weight, bias_N)
