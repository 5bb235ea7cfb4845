"""The same request gives the same bits alone, in chunks, and in a batch with others."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.harness import Sequence, load
from tests.models.test_checkpoint import QWEN3
from xllm.ops.table import is_available

pytestmark = pytest.mark.skipif(not is_available("cpu"), reason="there is no C++ compiler on this machine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bitwise_equal_however_it_is_scheduled(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | {"max_position_embeddings": 1024}))
    prompt = torch.randint(100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    driver = load(tmp_path, dtype=dtype, load_format="dummy", blocks=256)
    whole = driver.step([(Sequence(prompt), len(prompt))], every_token=True)

    chunked, others = Sequence(prompt), [Sequence(prompt[i:]) for i in range(1, 16)]
    rows = []
    for count in (1, 1, 7, 64, 1, 256, 70):
        logits = driver.step([*((other, 3) for other in others), (chunked, count)], every_token=True)
        rows.append(logits[-count:])
    assert torch.equal(torch.cat(rows), whole)
