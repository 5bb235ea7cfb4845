"""Attention of tiles of queries over paged KV on Hopper cards: what to start. The kernel is in `hopper_kernel`.

It is written in Gluon, which Triton calls experimental: where a Triton has none, or another one that does not compile
the kernel, `prefill_attention` does the work, and the log says so once.

Legend: as in `xllm.ops.attention`.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch

from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import LOG2_E, QUERY_TILE, can_use_descriptors
from xllm.ops.cuda.decode_attention import multiprocessors
from xllm.ops.cuda.launch import launch, only_compiling
from xllm.ops.cuda.prefill_attention import prefill_attention

log = logging.getLogger(__name__)

STAGES = 2  # places of the ring: three are all that fit with heads of 128


@dataclass(slots=True)
class Gluon:
    """What Triton has for the kernel."""

    kernel: Any  # the module
    descriptor: Any
    layout: Any
    compiles: bool | None = None  # None: not known before the first launch


@functools.cache
def gluon() -> Gluon | None:
    """None where Triton lacks something of it."""
    try:
        return Gluon(
            importlib.import_module("xllm.ops.cuda.hopper_kernel"),
            importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor,
            importlib.import_module("triton.experimental.gluon.language").NVMMASharedLayout,
        )
    except (ImportError, AttributeError) as error:
        _say(error)
        return None


def fits(q_TQD: torch.Tensor, kv_cache: torch.Tensor, window: int | None) -> bool:
    """Whether the kernel is for this card and these tensors."""
    head_dim, (blocks, layers, _, block_size, _, _) = q_TQD.shape[2], kv_cache.shape
    if not q_TQD.is_cuda or torch.cuda.get_device_capability(q_TQD.device)[0] != 9 or window is not None:
        return False
    found = gluon()
    if found is None or found.compiles is False:
        return False
    cache_rows = blocks * layers * 2 * block_size
    return kv_cache.is_contiguous() and can_use_descriptors(
        head_dim, block_size, 64, q_TQD.dtype, kv_cache.dtype, cache_rows
    )


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
    found = gluon() if fits(q_TQD, kv_cache, window) else None
    if found is None or not _launched(found, q_TQD, kv_cache, layer, inputs, scale, out_TE):
        prefill_attention(q_TQD, kv_cache, layer, inputs, scale, window, out_TE)


def _launched(found: Gluon, *arguments: Any) -> bool:
    """False where the kernel does not compile."""
    try:
        _launch(found, *arguments)
    except Exception as error:
        if found.compiles:
            raise  # then the card is what fails
        found.compiles = False
        _say(error)
        return False
    if not only_compiling():  # errors of compilations alone are not seen here
        found.compiles = True
    return True


def _say(error: Exception) -> None:
    log.warning("prompts take the slower kernel: this Triton does not make the one for Hopper: %s", error)


def _launch(
    found: Gluon, q_TQD: torch.Tensor, kv_cache: torch.Tensor, layer: int, inputs: AttentionInputs, scale: float,
    out_TE: torch.Tensor,
) -> None:  # fmt: skip
    assert inputs.tiles is not None
    kernel = found.kernel
    _, q_heads, head_dim = q_TQD.shape
    blocks, layers, _, block_size, kv_heads, _ = kv_cache.shape
    group, width = q_heads // kv_heads, kv_heads * head_dim
    row_tiles = -(-min(QUERY_TILE, inputs.max_query_len) * group // kernel.ROWS.value)
    items = kv_heads * row_tiles * inputs.tiles.shape[0]
    if not items:
        return
    box = 128 if block_size % 128 == 0 else 64
    cache_rows = blocks * layers * 2 * block_size
    panel = [box, kernel.PANEL.value]
    kv = found.descriptor(kv_cache, [cache_rows, width], [width, 1], panel, found.layout(128, 16))
    launch(
        kernel.attend, (min(items, multiprocessors(q_TQD.device)),),
        q_TQD, kv, inputs.block_table, inputs.query_starts, inputs.context_lens, inputs.tiles, out_TE,
        items, row_tiles, layer, inputs.block_table.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK=block_size, PLANES=layers * 2,
        Q_STRIDE=q_TQD.stride(0), SCALE=scale * LOG2_E, STAGES=STAGES, BOX=box, num_warps=4,
    )  # fmt: skip
