"""Sums of blocks on a card against those that PyTorch makes on the host. Triton's interpreter can run them, too."""

import os

import pytest
import torch

from xllm.executor.block_sums import WordSums

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("words", [7, 120, 4097, 8192, 17 * 4096])
def test_they_are_those_of_the_host(words):
    from xllm.ops.cuda.word_sums import word_sums

    generator = torch.Generator().manual_seed(words)
    memory = torch.randint(0, 256, (5, 4 * words), dtype=torch.uint8, generator=generator)
    host = WordSums(memory)
    numbers = torch.tensor([4, 0, 2, 2])
    found = word_sums(
        host._words_NRW.to(DEVICE), numbers.to(DEVICE), host._rows_R.to(DEVICE), host._columns_W.to(DEVICE)
    )
    assert torch.equal(found.cpu(), host._on_the_host(numbers))
