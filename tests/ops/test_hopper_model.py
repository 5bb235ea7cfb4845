"""The Hopper kernel's own source, run tile by tile in a model of the card: barriers, ring, masks and sums.

It needs neither a card nor Triton. `test_cuda_hopper_attention` is for the card.
"""

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.ops import gluon_model
from tests.ops.cases import paged, tiled
from xllm.ops import attention as reference
from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import LOG2_E, QUERY_TILE

SOURCE = Path(reference.__file__).parent / "cuda" / "hopper_kernel.py"
LAYER, SCALE = 1, 0.1


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    return gluon_model.read_kernel(SOURCE)


def step(
    queries: list[int], contexts: list[int], heads: int, group: int, head_dim: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, AttentionInputs]:
    torch.manual_seed(sum(contexts))
    cache, inputs = paged(
        queries, contexts, block_size=block_size, heads=heads, head_dim=head_dim, dtype=torch.bfloat16
    )
    q = (2 * torch.randn(sum(queries), heads * group, head_dim)).to(torch.bfloat16)
    return q, cache, tiled(inputs, QUERY_TILE)


def run(
    kernel: ModuleType, q: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs, *,
    programs: int | None = None, stages: int = 2, seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """[T, Q * D], rows of decodes left at zero. programs: None for one for each item."""
    assert inputs.tiles is not None
    _, layers, _, block_size, heads, head_dim = cache.shape
    tokens, q_heads, _ = q.shape
    group = q_heads // heads
    row_tiles = -(-min(QUERY_TILE, inputs.max_query_len) * group // 128)
    items = heads * row_tiles * inputs.tiles.shape[0]
    out = torch.zeros(tokens * q_heads * head_dim, dtype=q.dtype)
    pointers = (inputs.query_starts, inputs.context_lens, inputs.tiles.flatten(), out)
    programs = programs or items
    for index in range(programs):
        gluon_model.Program(index, programs, seed + index)
        kernel.attend(
            gluon_model.Pointer(q.flatten()), cache.view(-1, heads * head_dim),
            gluon_model.Pointer(inputs.block_table.flatten()), *map(gluon_model.Pointer, pointers),
            items, row_tiles, LAYER, inputs.block_table.stride(0),
            heads, group, head_dim, block_size, layers * 2, q_heads * head_dim, SCALE * LOG2_E,
            stages, 128 if block_size % 128 == 0 else 64,
        )  # fmt: skip
    return out.view(tokens, -1)


def check(given: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs) -> None:
    exact = reference.attention(q.double(), cache, LAYER, inputs, SCALE, None)[inputs.num_decodes :]
    error = (given[inputs.num_decodes :].double() - exact).abs().amax(1) / exact.abs().amax(1)
    assert float(error.nan_to_num(nan=torch.inf).max()) <= 2.0**-6


BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "prompts": ([5, 64, 130, 2], [5, 64, 130, 2]),
    "chunks": ([40, 129, 3], [300, 513, 640]),
    "one long": ([260], [700]),
    "behind decodes": ([1, 1, 70], [77, 300, 128]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(1, 64, 64), (2, 128, 64), (4, 64, 128), (8, 64, 64)]
)
def test_every_row(kernel: ModuleType, batch: str, group: int, head_dim: int, block_size: int) -> None:
    given = step(*BATCHES[batch], heads=2, group=group, head_dim=head_dim, block_size=block_size)
    check(run(kernel, *given), *given)


@pytest.mark.parametrize(("stages", "programs"), list(itertools.product((2, 3), (1, 3))))
def test_programs_of_many_items(kernel: ModuleType, stages: int, programs: int) -> None:
    """Counts go on from item to item, also past such that are void: the second tile of rows of three queries."""
    given = step([3, 200, 66], [300, 200, 450], heads=1, group=2, head_dim=64, block_size=64)
    for seed in range(3):
        out = run(kernel, *given, programs=programs, stages=stages, seed=seed)
        check(out, *given)


VALUES_READ = (
    "mixed_MD, weights_MP, weights_MN = warpgroup_mma_wait(0, deps=[mixed_MD, weights_MP, weights_MN])"
)
VALUES_FREE = "mbarrier.arrive(v_free.index(v_place))"


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("_new_barriers(STAGES, 2), _new_barriers", "_new_barriers(STAGES, 3), _new_barriers"),
        ("before = count // STAGES & 1 ^ 1", "before = count // STAGES & 1"),
        ("count & 1 ^ 1 - GROUP_INDEX", "count & 1"),
        ("mbarrier.wait(k_free.index(place), before)", "pass"),
        (f"{VALUES_READ}\n    {VALUES_FREE}", f"{VALUES_FREE}\n    {VALUES_READ}"),
        ("mask=token < context, other=0", "mask=token < 128, other=0"),
        ("if tiles * TILE > context:", "if tiles * TILE < context:"),
    ],
)
def test_the_model_notices_what_is_wrong(tmp_path: Path, found: str, instead: str) -> None:
    given = step([200], [1200], heads=1, group=2, head_dim=64, block_size=64)
    module = changed(tmp_path, found, instead)

    def several_times() -> None:
        for seed in range(10):
            check(run(module, *given, programs=1, seed=seed), *given)

    with pytest.raises((AssertionError, gluon_model.Stuck)):
        several_times()


def changed(folder: Path, found: str, instead: str) -> Any:
    source = SOURCE.read_text()
    assert found in source
    path = folder / "hopper_changed.py"
    path.write_text(source.replace(found, instead))
    return gluon_model.read_kernel(path)
