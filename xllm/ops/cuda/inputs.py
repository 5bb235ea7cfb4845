"""The inputs of a decode step in one launch: a graph begins with it."""

import torch
import triton
import triton.language as tl

from xllm.ops.cuda.launch import launch, trigger, uses_pdl, wait

WIDTH = 128  # block ids copied at once


@triton.jit
def _decode_inputs(
    slots_ptr, positions_ptr, tokens_ptr, table_ptr,
    ids_ptr, kv_slots_ptr, contexts_ptr, rows_ptr,
    tokens_stride, table_stride, width,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    trigger(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row)
    tl.store(ids_ptr + row, tl.load(tokens_ptr + slot * tokens_stride + position))
    tl.store(contexts_ptr + row, (position + 1).to(tl.int32))
    table = table_ptr + slot * table_stride
    last = position // BLOCK_SIZE
    block = tl.load(table + last).to(tl.int64)
    tl.store(kv_slots_ptr + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
    for first in tl.range(0, (last + 1).to(tl.int32), WIDTH):
        at = first + tl.arange(0, WIDTH)
        inside = at <= last
        ids = tl.load(table + at, mask=inside, other=0)
        tl.store(rows_ptr + row.to(tl.int64) * width + at, ids, mask=inside)


def decode_inputs(
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    tokens_SM: torch.Tensor,
    block_table_SW: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count, width = slots_B.shape[0], block_table_SW.shape[1]
    token_ids, kv_slots = torch.empty_like(slots_B), torch.empty_like(slots_B)
    contexts = torch.empty(count, dtype=torch.int32, device=slots_B.device)
    rows = torch.empty((count, width), dtype=torch.int32, device=slots_B.device)
    pdl = uses_pdl()
    launch(
        _decode_inputs, (count,),
        slots_B, positions_B, tokens_SM, block_table_SW,
        token_ids, kv_slots, contexts, rows,
        tokens_SM.stride(0), block_table_SW.stride(0), width,
        BLOCK_SIZE=block_size, WIDTH=WIDTH, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return token_ids, kv_slots, contexts, rows
