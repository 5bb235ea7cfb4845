"""Norms, gated activation, and norm + rotary + KV write on a CPU (`rows.cpp`). All are bitwise batch invariant."""

import torch

from xllm.ops.cpu.library import require

LIBRARY = require()


def rms_norm(x_TK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    x_TK = x_TK.contiguous()
    y_TK = torch.empty_like(x_TK)
    rows, width = x_TK.shape
    LIBRARY.xllm_rms_norm(
        x_TK.data_ptr(), weight_K.data_ptr(), eps, y_TK.data_ptr(), rows, width, torch.get_num_threads()
    )
    return y_TK


def add_rms_norm(
    x_TK: torch.Tensor, residual_TK: torch.Tensor, weight_K: torch.Tensor, eps: float
) -> torch.Tensor:
    y_TK = torch.empty_like(x_TK)
    rows, width = x_TK.shape
    LIBRARY.xllm_add_rms_norm(
        x_TK.data_ptr(),
        residual_TK.data_ptr(),
        weight_K.data_ptr(),
        eps,
        y_TK.data_ptr(),
        rows,
        width,
        torch.get_num_threads(),
    )
    return y_TK


def silu_and_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up_T2I.shape
    y_TI = torch.empty((rows, width // 2), dtype=torch.float32)
    LIBRARY.xllm_silu_and_mul(
        gate_up_T2I.data_ptr(), y_TI.data_ptr(), rows, width // 2, torch.get_num_threads()
    )
    return y_TI


def rope_and_cache(
    qkv_TE: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_MR: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    layer: int,
    kv_slots_T: torch.Tensor,
) -> torch.Tensor:
    tokens, width = qkv_TE.shape
    _, _, _, block_size, kv_heads, head_dim = kv_cache.shape
    q_heads = width // head_dim - 2 * kv_heads
    bfloat16 = kv_cache.dtype == torch.bfloat16
    call = LIBRARY.xllm_rope_and_cache_bfloat16 if bfloat16 else LIBRARY.xllm_rope_and_cache_float32
    call(
        qkv_TE.data_ptr(),
        positions_T.data_ptr(),
        cos_sin_MR.data_ptr(),
        None if q_norm_D is None else q_norm_D.data_ptr(),
        None if k_norm_D is None else k_norm_D.data_ptr(),
        eps,
        kv_cache.data_ptr() + layer * 2 * block_size * kv_heads * head_dim * (2 if bfloat16 else 4),
        kv_slots_T.data_ptr(),
        tokens,
        q_heads,
        kv_heads,
        head_dim,
        cos_sin_MR.shape[1],
        kv_cache.stride(0),
        block_size,
        torch.get_num_threads(),
    )
    return qkv_TE.as_strided((tokens, q_heads, head_dim), (width, head_dim, 1))
