"""Attention over paged KV: the contract and the plain PyTorch reference.

Legend: T tokens of this step over all sequences, S sequences, Q query heads, H KV heads, G = Q / H, D head size,
B blocks, L layers, P tokens per block, C context of one sequence, N its tokens of this step, or entries of `tiles`.

The KV cache is one tensor `kv_BL2PHD` = [block, layer, k|v, token in block, kv head, head size]: all layers of a
block lie together, so moving a block anywhere is one contiguous copy.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch

# Where keys are split (`split_keys`). An entry is 8 programs on a card with 8 KV heads of 2 query heads each, 16 with 4;
# an H200 has room for two of them on each of its 132 multiprocessors, so that 32 entries fill it once or twice.
SPLIT_TOKENS = 256  # of a step, behind its decodes: more of them keep a card busy as they are
SPLIT_TILE = 32  # queries in a tile: few, so that single queries beside a chunk do not cost a large tile each
SPLIT_KEYS = 512  # of a part at least: a part costs as much as a hundred keys or two, to leave and to add up
SPLIT_ENTRIES = 32  # up to so many tiles and parts; of more tiles, half as many parts beside them
SPLIT_PLACES = 2 * SPLIT_ENTRIES  # all entries of tiles in parts are among so many first ones


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Where this step's tokens stand. Filled by the executor, same for every layer."""

    query_starts: torch.Tensor  # [S + 1] int32: sequence s owns tokens query_starts[s] : query_starts[s + 1]
    context_lens: torch.Tensor  # [S] int32: tokens of s in the cache once this step's are written
    # [S, W] int32, row-contiguous: block ids in sequence order; entries past the context are undefined
    block_table: torch.Tensor
    kv_slots: torch.Tensor  # [T] int64: block * P + offset, where each token's KV is written
    max_query_len: int
    max_context_len: int
    num_decodes: int = 0  # sequences at the front known to have one query each; the others may have one too
    tiles: torch.Tensor | None = None  # [N, 2] int32, see `query_tiles`; where the device asks for them
    parts: torch.Tensor | None = None  # [N, 2] int32, see `split_keys`; None: nobody shares a tile's keys


def query_tiles(query_lens_S: np.ndarray, num_decodes: int, tile: int) -> np.ndarray:
    """[N, 2] int32: (sequence, first query within it) of every tile of at most `tile` queries, of all sequences
    behind the first `num_decodes`. Tiles that see most come first, so that none of them is left for the end."""
    sequences = np.arange(num_decodes, len(query_lens_S))
    counts = -(-query_lens_S[num_decodes:] // tile)
    first = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    tiles = np.stack((np.repeat(sequences, counts), first * tile), axis=1).astype(np.int32)
    return np.ascontiguousarray(tiles[np.argsort(-tiles[:, 1], kind="stable")])


def split_keys(
    tiles_N2: np.ndarray, query_lens_S: np.ndarray, context_lens_S: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Several programs for tiles with many keys: a few queries behind a long context would leave most of a card idle.

    tiles: of at most SPLIT_TILE queries. Returns [M, 2] int32 tiles, those with most keys first and each of them once
    for each of its parts, and beside them [M, 2] int32 (part, parts) in order of the parts. A part has SPLIT_KEYS keys
    at least, fewer only where a window hides the others. M <= room, or N where there is no room for more.
    """
    sequence_N, first_N = tiles_N2.T
    later_N = np.maximum(query_lens_S[sequence_N] - first_N - SPLIT_TILE, 0)  # queries of the sequence
    keys_N = context_lens_S[sequence_N] - later_N
    order_N = np.argsort(-keys_N, kind="stable")
    keys = keys_N[order_N].tolist()
    parts = [1] * len(keys)
    spare = min(room - len(keys), max(SPLIT_ENTRIES - len(keys), SPLIT_ENTRIES // 2))
    longest = [(-count, i) for i, count in enumerate(keys) if count >= 2 * SPLIT_KEYS]  # sorted, so a heap
    while longest and spare > 0:
        i = heapq.heappop(longest)[1]
        parts[i] += 1
        spare -= 1
        if keys[i] >= (parts[i] + 1) * SPLIT_KEYS:
            heapq.heappush(longest, (-keys[i] / parts[i], i))
    parts_N = np.array(parts, dtype=np.int64)
    part_M = np.arange(parts_N.sum()) - np.repeat(parts_N.cumsum() - parts_N, parts_N)
    parts_M2 = np.stack((part_M, np.repeat(parts_N, parts_N)), axis=1).astype(np.int32)
    return np.repeat(tiles_N2[order_N], parts_N, axis=0), parts_M2


def attention(
    q_TQD: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of this step's queries over their sequences' cached KV.

    The keys and values of this step's tokens are already in the cache. Query i of a sequence with N queries and
    context C stands at position p = C - N + i and sees the positions j with j <= p and, where `window` is given,
    j > p - window. Each query head reads KV head `head // G`. Works for any mix of prefill chunks and decodes.

    q_TQD: [T, Q, D] activations, last two dimensions contiguous (the token stride may be larger). Returns
    [T, Q * D] in the dtype of q. Fast versions accumulate in float32.
    """
    num_tokens, num_heads, head_dim = q_TQD.shape
    group = num_heads // kv_cache.shape[4]
    out_TQD = torch.empty(num_tokens, num_heads, head_dim, dtype=q_TQD.dtype, device=q_TQD.device)
    starts, contexts = inputs.query_starts.tolist(), inputs.context_lens.tolist()
    for s, context in enumerate(contexts):
        first, last = starts[s], starts[s + 1]
        k_HCD, v_HCD = _gather(kv_cache, layer, inputs.block_table[s], context, q_TQD.dtype)
        q_QND = q_TQD[first:last].transpose(0, 1)
        scores_QNC = q_QND @ k_HCD.repeat_interleave(group, 0).transpose(1, 2) * scale
        scores_QNC.masked_fill_(~_visible(last - first, context, window, q_TQD.device), float("-inf"))
        out_QND = scores_QNC.softmax(-1) @ v_HCD.repeat_interleave(group, 0)
        out_TQD[first:last] = out_QND.transpose(0, 1)
    return out_TQD.view(num_tokens, num_heads * head_dim)


def _gather(
    kv_cache: torch.Tensor, layer: int, table_W: torch.Tensor, context: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's keys and values of one layer, each [H, C, D]."""
    block_size = kv_cache.shape[3]
    blocks = table_W[: -(-context // block_size)].long()
    kv_N2PHD = kv_cache[blocks, layer].to(dtype)
    kv_2CHD = kv_N2PHD.transpose(0, 1).flatten(1, 2)[:, :context]
    k_HCD, v_HCD = kv_2CHD.transpose(1, 2)
    return k_HCD, v_HCD


def _visible(num_queries: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[N, C] bool: which positions each query sees."""
    p_N1 = torch.arange(context - num_queries, context, device=device)[:, None]
    j_C = torch.arange(context, device=device)
    seen = j_C <= p_N1
    return seen if window is None else seen & (j_C > p_N1 - window)
