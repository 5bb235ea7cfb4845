"""Root mean square norms, a program per token. Contracts in `xllm.ops.norm`. Legend: T tokens, K features.

The sum of residual and input is normed before it is rounded for the residual: one rounding less than the reference.
"""

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait
from xllm.ops.cuda.tiling import norm_warps, padded


def rms_norm(x_TK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    x_TK = x_TK.contiguous()
    return _norm(x_TK, x_TK, weight_K, eps, add=False)


def add_rms_norm(
    x_TK: torch.Tensor, residual_TK: torch.Tensor, weight_K: torch.Tensor, eps: float
) -> torch.Tensor:
    return _norm(x_TK, residual_TK, weight_K, eps, add=True)


def _norm(
    x_TK: torch.Tensor, residual_TK: torch.Tensor, weight_K: torch.Tensor, eps: float, *, add: bool
) -> torch.Tensor:
    y_TK = torch.empty_like(x_TK)
    tokens, columns = x_TK.shape
    _kernel(
        tokens,
        x_TK,
        residual_TK,
        weight_K,
        y_TK,
        warps=norm_warps(columns),
        pdl=uses_pdl(),
        K=columns,
        WIDTH=padded(columns),
        EPS=eps,
        ADD=add,
    )
    return y_TK


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr,
    K: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    k_K = tl.arange(0, WIDTH)
    at_K = tl.program_id(0).to(tl.int64) * K + k_K
    weight_K = tl.load(weight_ptr + k_K, mask=k_K < K, other=0.0).to(tl.float32)
    wait(PDL)
    trigger(PDL)
    x_K = tl.load(x_ptr + at_K, mask=k_K < K, other=0.0).to(tl.float32)
    if ADD:
        x_K += tl.load(residual_ptr + at_K, mask=k_K < K, other=0.0).to(tl.float32)
        tl.store(residual_ptr + at_K, x_K.to(residual_ptr.dtype.element_ty), mask=k_K < K)
    y_K = x_K * tl.rsqrt(tl.sum(x_K * x_K, axis=0) / K + EPS) * weight_K
    tl.store(y_ptr + at_K, y_K.to(y_ptr.dtype.element_ty), mask=k_K < K)


_kernel = Kernel(_rms_norm)
