"""Attention of tiles of queries over paged KV on Hopper cards: what to start. The kernel is in `hopper_kernel`.

Legend: as in `xllm.ops.attention`.
"""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import LOG2_E, QUERY_TILE, can_use_descriptors
from xllm.ops.cuda.decode_attention import multiprocessors
from xllm.ops.cuda.hopper_kernel import PANEL, ROWS, attend
from xllm.ops.cuda.launch import launch
from xllm.ops.cuda.prefill_attention import prefill_attention

STAGES = 2  # places of the ring: three are all that fit with heads of 128
TURNS = True  # see `hopper_kernel`
PERSISTENT = (
    True  # a program for each multiprocessor, which goes on to the next item, instead of one for each item
)


def fits(q_TQD: torch.Tensor, kv_cache: torch.Tensor, window: int | None) -> bool:
    """Whether the kernel is for this card and these tensors."""
    head_dim, (blocks, layers, _, block_size, _, _) = q_TQD.shape[2], kv_cache.shape
    if not q_TQD.is_cuda or torch.cuda.get_device_capability(q_TQD.device)[0] != 9 or window is not None:
        return False
    cache_rows = blocks * layers * 2 * block_size
    return can_use_descriptors(head_dim, block_size, 64, q_TQD.dtype, kv_cache.dtype, cache_rows)


def hopper_attention(
    q_TQD: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
    out_TE: torch.Tensor,
) -> None:
    """As `prefill_attention`, and by it where this kernel does not fit."""
    if not fits(q_TQD, kv_cache, window):
        prefill_attention(q_TQD, kv_cache, layer, inputs, scale, window, out_TE)
        return
    assert inputs.tiles is not None
    _, q_heads, head_dim = q_TQD.shape
    blocks, layers, _, block_size, kv_heads, _ = kv_cache.shape
    group, width = q_heads // kv_heads, kv_heads * head_dim
    row_tiles = -(-min(QUERY_TILE, inputs.max_query_len) * group // ROWS.value)
    items = kv_heads * row_tiles * inputs.tiles.shape[0]
    if not items:
        return
    box = 128 if block_size % 128 == 0 else 64
    layout = gl.NVMMASharedLayout(128, 16)
    cache_rows = blocks * layers * 2 * block_size
    kv = TensorDescriptor(kv_cache, [cache_rows, width], [width, 1], [box, PANEL.value], layout)
    launch(
        attend, (min(items, multiprocessors(q_TQD.device)) if PERSISTENT else items,),
        q_TQD, kv, inputs.block_table, inputs.query_starts, inputs.context_lens, inputs.tiles, out_TE,
        items, row_tiles, layer, inputs.block_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK=block_size, PLANES=layers * 2,
        Q_STRIDE=q_TQD.stride(0), SCALE=scale * LOG2_E, STAGES=STAGES, BOX=box, TURNS=TURNS, num_warps=4,
    )  # fmt: skip
