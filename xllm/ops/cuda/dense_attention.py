"""Attention of a long prompt by cuDNN, through PyTorch: faster there than our kernel over paged keys.

It is for a step of one sequence alone with nothing in front of it. What decides is known to the host, so
nothing waits for the card; and a captured graph never comes here, as it has places for more sequences or for
single queries.

cuDNN makes a plan for each length, which takes a tenth of a second or so, once per process. Therefore only whole
multiples of STEP come here, as the chunks of long prompts are where a step's tokens are many.

Legend: as in `xllm.ops.attention`; T tokens of this part, N tokens of a tile.
"""

import functools
import logging
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import triton
from torch.backends import cudnn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton import language as tl

from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import padded
from xllm.ops.cuda.key_tiles import load_blocks, load_tile, tile_pointers
from xllm.ops.cuda.launch import launch

log = logging.getLogger(__name__)

STEP = 1024
# Copying the keys costs a part of what cuDNN gains. On an H200, with 16 query and 8 KV heads of 128, 8192 queries take
# 517 us here and 579 by our kernel; 4096 take 159 and 151.
FROM = 8192
TILE = 64  # tokens that a program copies
CUDNN = 91501  # from this version on PyTorch itself prefers cuDNN on such cards; before there were errors


def fits(q_TQD: torch.Tensor, kv_cache: torch.Tensor, inputs: AttentionInputs, window: int | None) -> bool:
    """Whether `dense_attention` is for this step."""
    tokens, q_heads, head_dim = q_TQD.shape
    alone = inputs.context_lens.shape[0] == 1
    fresh = tokens == inputs.max_query_len == inputs.max_context_len
    if tokens < FROM or tokens % STEP or not alone or not fresh or window is not None:
        return False
    # contiguous: plans are for strides, too
    if q_TQD.dtype != kv_cache.dtype or not q_TQD.is_contiguous():
        return False
    return cudnn_runs(q_TQD.device, q_TQD.dtype, q_heads, kv_cache.shape[4], head_dim, tokens)


@functools.cache
def cudnn_runs(
    device: torch.device, dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int, queries: int
) -> bool:
    """Whether cuDNN takes so many queries of this shape. Found out once by doing it, over whatever memory holds:
    no request meets a refusal, and the plan is made."""
    began = time.monotonic()
    try:
        q_TQD = torch.empty((queries, q_heads, head_dim), dtype=dtype, device=device)
        kv_2HTD = torch.empty((2, kv_heads, queries, head_dim), dtype=dtype, device=device)
        if not _is_offered(q_TQD, kv_2HTD):
            log.info("attention of %d queries at once stays with our kernel: cuDNN has none here", queries)
            return False
        _causal(q_TQD, kv_2HTD, head_dim**-0.5)
    except RuntimeError as error:
        log.warning("attention of %d queries at once is slower, cuDNN refuses it: %s", queries, error)
        return False
    log.info(
        "attention of %d queries at once is cuDNN's; planning took %.2f s", queries, time.monotonic() - began
    )
    return True


def _is_offered(q_TQD: torch.Tensor, kv_2HTD: torch.Tensor) -> bool:
    """Whether this PyTorch has attention by cuDNN for the card and the shape, and nobody has turned it off."""
    if not q_TQD.is_cuda or torch.cuda.get_device_capability(q_TQD.device)[0] not in (9, 10):
        return False
    params = SDPAParams(q_TQD[None].transpose(1, 2), kv_2HTD[:1], kv_2HTD[1:], None, 0.0, True, True)
    return (cudnn.version() or 0) >= CUDNN and can_use_cudnn_attention(params)


def dense_attention(
    q_TQD: torch.Tensor, kv_cache: torch.Tensor, layer: int, block_table: torch.Tensor, scale: float
) -> torch.Tensor:
    """[T, Q * D]: causal attention of the sequence that is the block table's only row, all of whose tokens are queries.

    Keys and values are copied together first: per token 4 * H * D bytes are read and as many written. On a CPU
    PyTorch computes it by whatever it has.
    """
    kv_2HTD = gather(kv_cache, layer, block_table, q_TQD.shape[0])
    return _causal(q_TQD, kv_2HTD, scale)


def _causal(q_TQD: torch.Tensor, kv_2HTD: torch.Tensor, scale: float) -> torch.Tensor:
    """[T, Q * D]. What comes back is laid out as the queries are, so that the reshape copies nothing."""
    q_1QTD = q_TQD[None].transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q_TQD.is_cuda else nullcontext():
        out_1QTD = F.scaled_dot_product_attention(
            q_1QTD, kv_2HTD[:1], kv_2HTD[1:], is_causal=True, scale=scale, enable_gqa=True
        )
    return out_1QTD.transpose(1, 2).reshape(q_TQD.shape[0], -1)


def gather(kv_cache: torch.Tensor, layer: int, block_table: torch.Tensor, tokens: int) -> torch.Tensor:
    """[2, H, T, D]: one layer's keys and values of the first `tokens`, a multiple of TILE, of the table's only row."""
    assert tokens % TILE == 0
    block_size, kv_heads, head_dim = kv_cache.shape[3:]
    kv_2HTD = kv_cache.new_empty((2, kv_heads, tokens, head_dim))
    launch(
        _gather, (kv_heads, tokens // TILE, 2), kv_cache, block_table, kv_2HTD, layer,
        HEAD_DIM=head_dim, BLOCK=block_size, TOKEN=kv_heads * head_dim,
        BLOCK_STRIDE=kv_cache.stride(0), LAYER_STRIDE=kv_cache.stride(1), DIM=padded(head_dim), TILE=TILE,
    )  # fmt: skip
    return kv_2HTD


@triton.jit(do_not_specialize=["layer"])
def _gather(
    kv_ptr, table_ptr, out_ptr, layer,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TOKEN: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, LAYER_STRIDE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, tiles, keys and values): whole tiles, one beside the other."""
    head, first, values = tl.program_id(0), tl.program_id(1) * TILE, tl.program_id(2)
    tokens = tl.num_programs(1) * TILE
    kv_ptr += layer.to(tl.int64) * LAYER_STRIDE + values * (BLOCK * TOKEN) + head * HEAD_DIM
    blocks = load_blocks(table_ptr, first, tokens, BLOCK, TILE)
    tile_N = tile_pointers(kv_ptr, blocks, first, BLOCK_STRIDE, BLOCK, TOKEN, TILE)
    there_N = first + tl.arange(0, TILE) < tokens
    kv_ND = load_tile(tile_N, there_N, HEAD_DIM, DIM, out_ptr.dtype.element_ty)
    dims = tl.arange(0, DIM)
    token_N = (values * tl.num_programs(0) + head).to(tl.int64) * tokens + first + tl.arange(0, TILE)
    tl.store(out_ptr + token_N[:, None] * HEAD_DIM + dims[None, :], kv_ND, mask=(dims < HEAD_DIM)[None, :])
