"""Rotary position embedding, fused with the norm before it and the KV write after it: contract and reference.

Legend: T tokens, Q query heads, H KV heads, D head size, R <= D rotated features, M positions in the table,
E = (Q + 2 H) * D, the width of a token's fused query, key and value.

The pairing is the one of GPT-NeoX and the Hugging Face checkpoints: feature i of the first R turns with feature
i + R / 2. Features from R on stay as they are (partial rotary).
"""

import torch

from xllm.ops.norm import rms_norm


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
    """Norm each query and key head (where norms are given), rotate them, write keys and values to the cache.

    qkv_TE: [T, E] contiguous activations, per token the query heads, then the key heads, then the value heads;
    **consumed**: its contents are undefined afterwards. positions_T: [T] int64. cos_sin_MR: [M, R] float32, cosines of
    the R / 2 angles of a position, then their sines. kv_cache: [blocks, layers, 2, block_size, H, D], written
    at [slot // block_size, layer, :, slot % block_size] in its own dtype. Returns the queries [T, Q, D], which may
    be a view into qkv_TE.
    """
    kv_heads, head_dim = kv_cache.shape[4:]
    q_heads = qkv_TE.shape[1] // head_dim - 2 * kv_heads
    q_TQD, k_THD, v_THD = qkv_TE.view(qkv_TE.shape[0], -1, head_dim).split([q_heads, kv_heads, kv_heads], 1)
    if q_norm_D is not None and k_norm_D is not None:
        q_TQD, k_THD = rms_norm(q_TQD, q_norm_D, eps), rms_norm(k_THD, k_norm_D, eps)
    cos_sin_TR = cos_sin_MR[positions_T].to(qkv_TE.dtype)
    write_kv(rotate(k_THD, cos_sin_TR), v_THD, kv_cache, layer, kv_slots_T)
    return rotate(q_TQD, cos_sin_TR)


def rotate(x_THD: torch.Tensor, cos_sin_TR: torch.Tensor) -> torch.Tensor:
    """Turn the first R features of each head by the angles of its token."""
    rotated = cos_sin_TR.shape[-1]
    cos_T1r, sin_T1r = cos_sin_TR[:, None].chunk(2, dim=-1)
    a_THr, b_THr = x_THD[..., :rotated].chunk(2, dim=-1)
    turned = (a_THr * cos_T1r - b_THr * sin_T1r, b_THr * cos_T1r + a_THr * sin_T1r)
    return torch.cat((*turned, x_THD[..., rotated:]), dim=-1)


def write_kv(
    k_THD: torch.Tensor, v_THD: torch.Tensor, kv_cache: torch.Tensor, layer: int, kv_slots_T: torch.Tensor
) -> None:
    """Put each token's key and value where its slot says, rounded to the dtype of the cache."""
    block_size = kv_cache.shape[3]
    where = (kv_slots_T // block_size, layer, slice(None), kv_slots_T % block_size)
    kv_cache[where] = torch.stack((k_THD, v_THD), dim=1).to(kv_cache.dtype)
