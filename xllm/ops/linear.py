"""Matrix products with weights, and looking up their rows: the contract and the plain PyTorch reference.

Legend: T tokens, N output features, K input features.

A device keeps weights in the layout it multiplies fastest, so a weight is opaque to the models: it is made by
`new_weight`, filled by `store_rows` and read by `linear` and `embedding` of the same device. Here it is the plain
[N, K] tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F

Weight = Any  # what `new_weight` of a device returns


def tensors_of(weight: Weight) -> list[torch.Tensor]:
    """The memory a weight consists of, whatever its layout."""
    if isinstance(weight, torch.Tensor):
        return [weight]
    parts = (getattr(weight, name) for name in type(weight).__slots__)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def new_weight(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """An unfilled weight of `rows` = N by `columns` = K."""
    return torch.empty(rows, columns, dtype=dtype)


def store_rows(weight: torch.Tensor, first_row: int, rows_NK: torch.Tensor) -> None:
    """Fill weight[first_row : first_row + len(rows_NK)]; rows come in any float dtype."""
    weight[first_row : first_row + rows_NK.shape[0]] = rows_NK


def linear(x_TK: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias -> [T, N] in the dtype of x, which is at least as wide as that of the weight.

    x has contiguous rows; bias has the dtype of x.
    """
    return F.linear(x_TK, weight.to(x_TK.dtype), bias_N)


def embedding(token_ids_T: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight, [T] int64 -> [T, K] in `dtype`."""
    return F.embedding(token_ids_T, weight).to(dtype)
