"""Attention over paged KV on a card: single queries and tiles of queries go through a kernel each; for tiles whose keys
nobody shares Hopper has one of its own.

A backend that does better for some shapes is one more branch in `attention`, in front of ours.
"""

import torch

from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import QUERY_TILE
from xllm.ops.cuda.decode_attention import decode_attention
from xllm.ops.cuda.hopper_attention import hopper_attention
from xllm.ops.cuda.prefill_attention import prefill_attention

__all__ = ["QUERY_TILE", "attention"]


def attention(
    q_TQD: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """The leading `inputs.num_decodes` sequences as decodes, the rest by `inputs.tiles`, made with QUERY_TILE,
    or with SPLIT_TILE where there are `inputs.parts`.

    kv_cache is contiguous. Raises ValueError where sequences behind the decodes come without tiles.
    """
    tokens, q_heads, head_dim = q_TQD.shape
    if inputs.tiles is None and inputs.num_decodes < inputs.context_lens.shape[0]:
        raise ValueError("attention on a card takes sequences of several queries by tiles: see query_tiles")
    out_TE = torch.empty((tokens, q_heads * head_dim), dtype=q_TQD.dtype, device=q_TQD.device)
    if inputs.num_decodes:
        decode_attention(q_TQD, kv_cache, layer, inputs, scale, window, out_TE)
    if inputs.tiles is not None and inputs.tiles.shape[0]:
        among_tiles = hopper_attention if inputs.parts is None else prefill_attention
        among_tiles(q_TQD, kv_cache, layer, inputs, scale, window, out_TE)
    return out_TE
