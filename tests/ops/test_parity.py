"""Every operator of every device agrees with its plain PyTorch reference. A table line without a case fails here."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import CASES, Pair
from xllm.ops.table import FEW, TABLE, is_available, load_ops

TOLERANCE = 3e-6  # of the largest exact number: float32 accumulation
BFLOAT16_STEP = 2.0**-8  # what a cache in bfloat16 may be off by, relative


@pytest.fixture(autouse=True)
def one_thread_for_pytorch() -> Iterator[None]:
    """Parallel sections of PyTorch crawl on a busy machine. That threads change nothing is `test_invariance.py`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on(device: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.gpu,) if device == "cuda" else ()


OPERATORS = [pytest.param(device, op, marks=on(device)) for device in TABLE for op in TABLE[device]]
OPERATORS += [
    pytest.param(device, op, marks=on(device)) for device in FEW for op in FEW[device] if op != "max_tokens"
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("device", "op"), OPERATORS)
def test_agrees_with_the_reference(device: str, op: str, dtype: torch.dtype) -> None:
    """Triton's interpreter (TRITON_INTERPRET=1) runs the kernels of "cuda" without a card. That of 3.6 multiplies the
    raw bits of bfloat16: -k float32 there."""
    if not is_available(device):
        pytest.skip(f"the fast operators of {device} cannot run on this machine")
    interpreted = device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
    torch.manual_seed(0)
    ops = load_ops(device, dtype)
    with torch.device("cuda" if device == "cuda" and not interpreted else "cpu"):
        check(CASES[op](ops, dtype, random.Random(0)), dtype)


def check(pairs: Iterator[Pair], dtype: torch.dtype) -> None:
    for number, (given, exact) in enumerate(pairs):
        assert given.shape == exact.shape, number
        assert given.dtype in (torch.float32, dtype), number
        close = TOLERANCE if given.dtype == torch.float32 else BFLOAT16_STEP
        error = (given.double() - exact).nan_to_num().abs().max() / exact.nan_to_num().abs().max()
        assert error <= close, number
        assert torch.equal(given.isnan(), exact.isnan()), number
