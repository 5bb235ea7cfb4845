"""The Hopper kernel on such a card. What its barriers and masks do, step by step: `test_hopper_model`."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.ops.cases import paged, tiled
from xllm.ops import attention as reference
from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import QUERY_TILE

# A kernel that waits for ever holds the interpreter in a call, where only a thread can end the run.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60, method="thread")]
CLOSE = 2.0**-7  # of a row's greatest number: weights and results are in bfloat16
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "one row": ([2], [2]),
    "one tile": ([128], [128]),
    "prompts": ([5, 64, 130, 2, 333, 128], [5, 64, 130, 2, 333, 128]),
    "chunks": ([40, 129, 3, 256], [300, 513, 640, 4096]),
    "long": ([2500], [2500]),
    "behind decodes": ([1, 1, 1, 70, 400], [77, 1, 300, 128, 1000]),
    "many": ([37 * i % 300 + 2 for i in range(40)], [37 * i % 300 + 2 + 53 * i for i in range(40)]),
}


@pytest.fixture
def hopper() -> Any:
    pytest.importorskip("triton")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper cards")
    from xllm.ops.cuda import hopper_attention

    return hopper_attention


def step(
    batch: str, group: int, head_dim: int, *, heads: int = 2, block_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, AttentionInputs]:
    """Queries, a cache with NaN wherever nobody has written, and the inputs."""
    torch.manual_seed(len(batch))
    with torch.device("cuda"):
        cache, inputs = paged(
            *BATCHES[batch], block_size=block_size, heads=heads, head_dim=head_dim, dtype=torch.bfloat16
        )
        q = (2 * torch.randn(sum(BATCHES[batch][0]), heads * group, head_dim)).to(torch.bfloat16)
        return q, cache, tiled(inputs, QUERY_TILE)


def run(hopper: Any, q: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
    assert hopper.fits(q, cache, None)
    out = torch.full((q.shape[0], q.shape[1] * q.shape[2]), float("nan"), dtype=q.dtype, device=q.device)
    hopper.hopper_attention(q, cache, 1, inputs, 0.1, None, out)
    return out


def check(given: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs) -> None:
    exact = reference.attention(q.double(), cache, 1, inputs, 0.1, None)[inputs.num_decodes :]
    error = (given[inputs.num_decodes :].double() - exact).abs().amax(1) / exact.abs().amax(1)
    assert float(error.nan_to_num(nan=torch.inf).max()) <= CLOSE
    assert given[: inputs.num_decodes].isnan().all()  # not its rows


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(hopper: Any, batch: str) -> None:
    given = step(batch, 2, 128)
    check(run(hopper, *given), *given)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_heads(hopper: Any, group: int, head_dim: int) -> None:
    for batch in ("prompts", "chunks"):
        given = step(batch, group, head_dim)
        check(run(hopper, *given), *given)


@pytest.mark.parametrize("block_size", [64, 128, 192, 256])
def test_blocks(hopper: Any, block_size: int) -> None:
    given = step("chunks", 2, 128, block_size=block_size)
    check(run(hopper, *given), *given)


@pytest.mark.parametrize("stages", [2, 3])
def test_programs_of_many_items(hopper: Any, monkeypatch: pytest.MonkeyPatch, stages: int) -> None:
    monkeypatch.setattr(hopper, "STAGES", stages)
    given = step("many", 2, 128)
    check(run(hopper, *given), *given)


def test_queries_with_gaps(hopper: Any) -> None:
    q, cache, inputs = step("prompts", 2, 128)
    wide = torch.cat((q, q[:, :3]), dim=1)[:, : q.shape[1]]
    check(run(hopper, wide, cache, inputs), q, cache, inputs)


def test_two_runs_give_the_same_bits(hopper: Any) -> None:
    given = step("many", 4, 128)
    first = run(hopper, *given)
    for _ in range(20):
        assert torch.equal(run(hopper, *given).view(torch.int16), first.view(torch.int16))


def test_tiles_to_spare(hopper: Any) -> None:
    """As in a captured graph: they begin where no query is."""
    q, cache, inputs = step("chunks", 2, 128)
    assert inputs.tiles is not None
    spare = torch.tensor([[0, 2**20]] * 3, dtype=torch.int32, device=q.device)
    more = dataclasses.replace(inputs, tiles=torch.cat((spare, inputs.tiles, spare)))
    check(run(hopper, q, cache, more), q, cache, inputs)


def test_what_does_not_fit_goes_elsewhere(hopper: Any) -> None:
    q, cache, inputs = step("chunks", 2, 128)
    assert not hopper.fits(q, cache, 100)
    assert not hopper.fits(q.float(), cache, None)
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    hopper.hopper_attention(q, cache, 1, inputs, 0.1, 100, out)
    exact = reference.attention(q.double(), cache, 1, inputs, 0.1, 100)
    assert (out.double() - exact).abs().max() <= CLOSE * exact.abs().max()
