"""Looking up the weight's rows, a program per token. Contract in `xllm.ops.linear`. Legend: T tokens, K features."""

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import Kernel, trigger, uses_pdl, wait
from xllm.ops.cuda.tiling import norm_warps, padded


def embedding(token_ids_T: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tokens, columns = token_ids_T.shape[0], weight.shape[1]
    y_TK = torch.empty((tokens, columns), dtype=dtype, device=weight.device)
    if tokens:
        width = padded(columns)
        _kernel(
            tokens, token_ids_T, weight, y_TK,
            warps=norm_warps(columns), pdl=uses_pdl(), K=columns, WIDTH=width,
        )  # fmt: skip
    return y_TK


@triton.jit
def _look_up(ids_ptr, weight_ptr, y_ptr, K: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k_K = tl.arange(0, WIDTH)
    wait(PDL)
    trigger(PDL)
    row_K = tl.load(weight_ptr + tl.load(ids_ptr + row) * K + k_K, mask=k_K < K, other=0.0)
    tl.store(y_ptr + row * K + k_K, row_K.to(y_ptr.dtype.element_ty), mask=k_K < K)


_kernel = Kernel(_look_up)
