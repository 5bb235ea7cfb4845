"""Paged attention on a CPU (`attention.cpp`).

Batch invariance holds, bitwise: a query's result is the same alone or in a batch, in a decode step or in a prefill
chunk of any size, with any number of threads and for any block size.
"""

import torch

from xllm.ops.attention import AttentionInputs
from xllm.ops.cpu.library import require

LIBRARY = require()


def attention(
    q_TQD: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    tokens, q_heads, head_dim = q_TQD.shape
    _, _, _, block_size, kv_heads, _ = kv_cache.shape
    bfloat16 = kv_cache.dtype == torch.bfloat16
    out_TE = torch.empty((tokens, q_heads * head_dim), dtype=torch.float32)
    call = LIBRARY.xllm_attention_bfloat16 if bfloat16 else LIBRARY.xllm_attention_float32
    sequences, table_width = inputs.block_table.shape
    call(
        q_TQD.data_ptr(),
        q_TQD.stride(0),
        kv_cache.data_ptr() + layer * 2 * block_size * kv_heads * head_dim * (2 if bfloat16 else 4),
        kv_cache.stride(0),
        block_size,
        inputs.query_starts.data_ptr(),
        inputs.context_lens.data_ptr(),
        inputs.block_table.data_ptr(),
        sequences,
        inputs.block_table.stride(0) if sequences > 1 else table_width,
        scale,
        window or 0,
        q_heads,
        kv_heads,
        head_dim,
        out_TE.data_ptr(),
        torch.get_num_threads(),
    )
    return out_TE
