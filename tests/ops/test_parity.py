"""Every operator of every device agrees with its plain PyTorch reference. A table line without a case fails here."""

import random
from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import CASES
from xllm.ops.table import TABLE, is_available, load_ops

TOLERANCE = 3e-6  # of the largest exact number: float32 accumulation
BFLOAT16_STEP = 2.0**-8  # what a cache in bfloat16 may be off by, relative


@pytest.fixture(autouse=True)
def one_thread_for_pytorch() -> Iterator[None]:
    """Parallel sections of PyTorch crawl on a busy machine. That threads change nothing is `test_invariance.py`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("device", "op"), [(device, op) for device in TABLE for op in TABLE[device]])
def test_agrees_with_the_reference(device: str, op: str, dtype: torch.dtype) -> None:
    if not is_available(device):
        pytest.skip(f"the fast operators of {device} cannot run on this machine")
    torch.manual_seed(0)
    ops = load_ops(device, dtype)
    for number, (given, exact) in enumerate(CASES[op](ops, dtype, random.Random(0))):
        assert given.shape == exact.shape, number
        assert given.dtype in (torch.float32, dtype), number
        close = TOLERANCE if given.dtype == torch.float32 else BFLOAT16_STEP
        error = (given.double() - exact).nan_to_num().abs().max() / exact.nan_to_num().abs().max()
        assert error <= close, number
        assert torch.equal(given.isnan(), exact.isnan()), number
