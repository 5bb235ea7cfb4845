"""Matrix products with packed weights on a CPU (`linear.cpp`).

Batch invariance holds, bitwise: a row's result depends on neither the other rows nor their number nor the threads.
"""

import functools

import torch

from xllm.ops.cpu.library import require

LIBRARY = require()
PANEL = LIBRARY.xllm_panel_rows()
DOT_MARGIN = 1.2  # bfloat16 products round the activations too; that must be worth it


class PackedWeight:
    """A weight [rows, columns] in panels; `address` is that of its numbers."""

    __slots__ = ("address", "bfloat16", "columns", "numbers", "rows")

    def __init__(self, rows: int, columns: int, dtype: torch.dtype):
        self.rows = rows
        self.columns = columns
        self.bfloat16 = dtype == torch.bfloat16
        padded = columns + columns % 2 if self.bfloat16 else columns
        self.numbers = torch.empty(-(-rows // PANEL) * PANEL * padded, dtype=dtype)
        self.numbers[(rows // PANEL) * PANEL * padded :] = 0  # rows past the last are computed and cut off
        if padded > columns:
            self.numbers.zero_()
        self.address = self.numbers.data_ptr()


@functools.cache
def uses_dot() -> bool:
    """Whether bfloat16 weights are multiplied with the processor's bfloat16 dot product, activations rounded to
    bfloat16, or widened to float32. Measured, since processors differ by a factor of two in either direction; one
    answer per process, so results stay batch invariant."""
    return bool(LIBRARY.xllm_linear_gflops(2) > DOT_MARGIN * LIBRARY.xllm_linear_gflops(1))


def new_weight(rows: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight(rows, columns, dtype)


def store_rows(weight: PackedWeight, first_row: int, rows_NK: torch.Tensor) -> None:
    rows_NK = rows_NK.to(weight.numbers.dtype).contiguous()
    pack = LIBRARY.xllm_pack_bfloat16 if weight.bfloat16 else LIBRARY.xllm_pack_float32
    rows, columns = rows_NK.shape
    pack(weight.address, rows_NK.data_ptr(), first_row, rows, columns, torch.get_num_threads())


def linear(x_TK: torch.Tensor, weight: PackedWeight, bias_N: torch.Tensor | None) -> torch.Tensor:
    x_TK = x_TK.contiguous()
    rows = x_TK.shape[0]
    y_TN = torch.empty((rows, weight.rows), dtype=torch.float32)
    bias = None if bias_N is None else bias_N.data_ptr()
    call = (x_TK.data_ptr(), weight.address, bias, y_TN.data_ptr(), rows, weight.rows, weight.columns)
    if weight.bfloat16:
        LIBRARY.xllm_linear_bfloat16(*call, uses_dot(), torch.get_num_threads())
    else:
        LIBRARY.xllm_linear_float32(*call, torch.get_num_threads())
    return y_TN


def embedding(token_ids_T: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    rows = token_ids_T.shape[0]
    out_TK = torch.empty((rows, weight.columns), dtype=torch.float32)
    look_up = LIBRARY.xllm_embedding_bfloat16 if weight.bfloat16 else LIBRARY.xllm_embedding_float32
    look_up(
        token_ids_T.data_ptr(),
        weight.address,
        out_TK.data_ptr(),
        rows,
        weight.columns,
        torch.get_num_threads(),
    )
    return out_TK.to(dtype)
