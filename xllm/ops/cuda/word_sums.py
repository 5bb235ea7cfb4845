"""Sums of blocks of 32-bit words times the numbers of their places (`xllm.executor.block_sums`), read once.

Legend: N blocks that are asked for, R rows of a block, W words of a row, S rows of a program, P programs of a block.
"""

import torch
import triton
from triton import language as tl

from xllm.ops.cuda.launch import launch
from xllm.ops.cuda.tiling import padded, programs_for

ROWS = 16
WARPS = 8


def word_sums(
    words_BRW: torch.Tensor, numbers_N: torch.Tensor, rows_R: torch.Tensor, columns_W: torch.Tensor
) -> torch.Tensor:
    """int64 [N], modulo 2**64: of each block in `numbers_N` the words times `rows_R` times `columns_W`, all int64 but the
    int32 words, which are contiguous in a block."""
    _, rows, width = words_BRW.shape
    parts = programs_for(rows, ROWS)
    sums_NP = numbers_N.new_empty((len(numbers_N), parts))
    launch(
        _word_sums, (parts, len(numbers_N)), words_BRW, numbers_N, rows_R, columns_W, sums_NP, words_BRW.stride(0), rows,
        S=ROWS, W=width, PADDED=padded(width), num_warps=WARPS,
    )  # fmt: skip
    return sums_NP.sum(1)


@triton.jit(do_not_specialize=["block_stride", "rows"])
def _word_sums(
    words_ptr, numbers_ptr, rows_ptr, columns_ptr, sums_ptr, block_stride, rows,
    S: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    part, block = tl.program_id(0), tl.program_id(1)
    words_ptr += tl.load(numbers_ptr + block) * block_stride
    column = tl.arange(0, PADDED)
    in_row = column < W
    total = tl.zeros([PADDED], tl.int64)
    for i in range(S):
        row = part * S + i
        here = row < rows
        words = tl.load(words_ptr + row * W + column, mask=in_row & here, other=0)
        total += words.to(tl.int64) * tl.load(rows_ptr + row, mask=here, other=0)
    total *= tl.load(columns_ptr + column, mask=in_row, other=0)
    tl.store(sums_ptr + block * tl.num_programs(0) + part, tl.sum(total, 0))
