"""The inputs of a decode step, found on the device from what lies there: contract and reference.

Legend: B sequences of the step, S slots, M tokens of the longest sequence, W blocks of its table.
"""

import torch


def decode_inputs(
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    tokens_SM: torch.Tensor,
    block_table_SW: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> token ids [B] int64, KV slots [B] int64, context lengths [B] int32, block tables [B, W] int32.

    slots_B and positions_B are int64: whose token, and where it stands. Entries of the block tables past the context
    are undefined. Everything is new memory, row-contiguous.
    """
    block_table_BW = block_table_SW[slots_B]
    block_B = block_table_BW.gather(1, (positions_B // block_size)[:, None]).squeeze(1).long()
    kv_slots_B = block_B * block_size + positions_B % block_size
    return tokens_SM[slots_B, positions_B], kv_slots_B, (positions_B + 1).to(torch.int32), block_table_BW
