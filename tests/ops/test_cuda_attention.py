"""How attention on a card is cut, and what parity with the reference does not show."""

import dataclasses
import os
from typing import Any

import pytest
import torch

from tests.ops.cases import in_parts, paged, slots_of, tiled
from xllm.ops.attention import AttentionInputs
from xllm.ops.attention import attention as reference
from xllm.ops.cuda import attention_plan as plan

BFLOAT16_STEP = 2.0**-8
SMS = 132  # of an H200
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "max_context_len", "splits"),
    [
        (1, 8, 40960, 58),
        (1, 8, 600, 10),  # never finer than a tile of 64 tokens
        (1, 8, 1, 1),
        (1, 2, 40960, 64),  # the most there are
        (4, 8, 40960, 15),
        (16, 8, 40960, 4),
        (32, 8, 40960, 2),
        (33, 8, 40960, 2),
        (64, 8, 40960, 1),
        (512, 8, 40960, 1),
    ],
)
def test_splits_fill_the_card(sequences: int, kv_heads: int, max_context_len: int, splits: int) -> None:
    assert plan.count_splits(sequences, kv_heads, max_context_len, SMS, tile=64) == splits


@pytest.mark.parametrize("multiprocessors", [1, 20, SMS])
def test_partial_results_fit_the_workspace(multiprocessors: int) -> None:
    for pairs in range(1, 2000):
        splits = plan.count_splits(pairs, 1, 10**6, multiprocessors, tile=64)
        assert 1 <= splits <= plan.MAX_SPLITS
        assert splits == 1 or pairs * splits <= plan.most_partial_results(multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 128, 192, 256])
def test_tilings_are_what_matrix_products_take(head_dim: int, dtype: torch.dtype) -> None:
    prefill = plan.prefill_tiling(head_dim, dtype)
    assert prefill.rows & (prefill.rows - 1) == 0 and prefill.keys & (prefill.keys - 1) == 0
    for group in range(1, 41):
        tiling = plan.decode_tiling(group, head_dim, dtype)
        assert tiling.rows >= max(16, group) and tiling.rows & (tiling.rows - 1) == 0
        assert tiling.keys >= 16 and tiling.keys & (tiling.keys - 1) == 0
        passes = plan.splits_per_pass(group, head_dim)
        assert passes & (passes - 1) == 0 and (passes == 1 or passes * group * head_dim <= plan.COMBINED)


@pytest.mark.parametrize(
    ("changed", "usable"),
    [
        ({}, True),
        ({"head_dim": 64, "block_size": 128}, True),
        ({"head_dim": 80}, False),
        ({"head_dim": 256}, False),
        ({"block_size": 32}, False),
        ({"block_size": 96}, False),
        ({"kv_dtype": torch.float8_e4m3fn}, False),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, False),
        ({"cache_rows": 2**31}, False),
    ],
)
def test_when_the_copy_engine_fetches_keys(changed: dict[str, Any], usable: bool) -> None:
    ordinary: dict[str, Any] = {
        "head_dim": 128, "block_size": 64, "tile": 64, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16,
        "cache_rows": 10**6,
    }  # fmt: skip
    assert plan.can_use_descriptors(**(ordinary | changed)) is usable


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def batch(
    queries: list[int], contexts: list[int], head_dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor, AttentionInputs]:
    """Queries, a cache with NaN wherever nobody has written, and the inputs, of 2 KV heads with 4 query heads each."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    with torch.device("cpu" if interpreted() else "cuda"):
        cache, inputs = paged(
            queries, contexts, block_size=64, heads=2, head_dim=head_dim, dtype=torch.bfloat16
        )
        q = torch.randn(sum(queries), 8, head_dim).to(torch.bfloat16)
        return q, cache, tiled(inputs, plan.QUERY_TILE)


def split(
    queries: list[int], contexts: list[int], head_dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor, AttentionInputs]:
    q, cache, inputs = batch(queries, contexts, head_dim)
    return q, cache, in_parts(dataclasses.replace(inputs, num_decodes=0))


def entries(values: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check_split(q: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs, window: int | None) -> None:
    """Twice the same, right, and the counters are as they were."""
    from xllm.ops.cuda.attention import attention
    from xllm.ops.cuda.prefill_parts import places

    given, again = (attention(q, cache, 1, inputs, 0.125, window) for _ in range(2))
    exact = reference(q.double(), cache, 1, inputs, 0.125, window)
    assert torch.equal(given, again)
    steps = 3 if interpreted() else 1  # the interpreter cuts off where a card rounds
    assert (given - exact).abs().max() <= steps * BFLOAT16_STEP * exact.abs().max()
    rows = plan.prefill_tiling(q.shape[2], q.dtype, 0).rows
    assert not places(q.device, 2, 4, q.shape[2], rows).counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1100])
def test_parts_give_the_same_bits_and_leave_no_trace(window: int | None) -> None:
    q, cache, inputs = split([64, 1, 9], [2200, 1500, 30])
    assert inputs.parts is not None and inputs.parts[:, 1].max() > 2
    check_split(q, cache, inputs, window)


@pytest.mark.gpu
def test_what_a_graph_has_to_spare_does_nothing() -> None:
    """As in a graph of 64 tokens: sequences, one that fills it up, one without tokens, and its entries."""
    q, cache, inputs = batch([20, 1, 1, 42, 0], [1300, 1, 1601, 42, 1])
    inputs = in_parts(dataclasses.replace(inputs, num_decodes=0, max_query_len=64))
    assert inputs.tiles is not None and inputs.parts is not None
    spare, whole = (entries([pair] * 9, q.device) for pair in ((4, 0), (0, 1)))
    tiles, parts = torch.cat((inputs.tiles, spare)), torch.cat((inputs.parts, whole))
    check_split(q, cache, dataclasses.replace(inputs, tiles=tiles, parts=parts), None)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [40, 511, 1100, 3000])
def test_parts_without_keys_end_at_once(context: int) -> None:
    q, cache, inputs = batch([3, 40], [context, 60])
    tiles, parts = [(0, 0)] * 20 + [(1, 0), (1, 32)], [(part, 20) for part in range(20)] + [(0, 1)] * 2
    inputs = dataclasses.replace(
        inputs, num_decodes=0, tiles=entries(tiles, q.device), parts=entries(parts, q.device)
    )
    check_split(q, cache, inputs, None)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1500])
def test_descriptors_and_pointers_fetch_the_same_parts(window: int | None) -> None:
    q, cache, inputs = split([33, 1], [2050, 1031], 128)
    from xllm.ops.cuda.prefill_attention import prefill_attention

    given = [torch.zeros(q.shape[0], 8 * 128, dtype=q.dtype, device=q.device) for _ in range(2)]
    for descriptors, out in zip((True, False), given, strict=True):
        prefill_attention(q, cache, 1, inputs, 128**-0.5, window, out, descriptors=descriptors)
    by_descriptor, by_pointer = (out.float() for out in given)
    assert not by_pointer.isnan().any()
    assert (by_descriptor - by_pointer).abs().max() <= BFLOAT16_STEP * by_pointer.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_descriptors_and_pointers_fetch_the_same(head_dim: int, window: int | None) -> None:
    q, cache, inputs = batch([5, 64, 130, 200], [5, 100, 700, 200], head_dim)
    from xllm.ops.cuda.prefill_attention import prefill_attention

    given = [torch.zeros(q.shape[0], 8 * head_dim, dtype=q.dtype, device=q.device) for _ in range(2)]
    for descriptors, out in zip((True, False), given, strict=True):
        prefill_attention(q, cache, 1, inputs, head_dim**-0.5, window, out, descriptors=descriptors)
    by_descriptor, by_pointer = (out.float() for out in given)
    assert not by_pointer.isnan().any()
    assert (by_descriptor - by_pointer).abs().max() <= BFLOAT16_STEP * by_pointer.abs().max()


@pytest.mark.gpu
def test_two_calls_give_the_same_bits_and_leave_no_trace() -> None:
    q, cache, inputs = batch([1, 1, 1, 70], [1, 300, 2000, 90])
    from xllm.ops.cuda.attention import attention
    from xllm.ops.cuda.decode_attention import workspace

    first, second = (attention(q, cache, 1, inputs, 0.125, None) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.isnan().any()
    assert not workspace(q.device, 4, 64).counters.any()


@pytest.mark.gpu
def test_few_sequences_give_the_same_bits_and_leave_no_trace() -> None:
    _, cache, inputs = batch([1, 1], [64, 3000])
    from xllm.ops.cuda.decode_attention import workspace
    from xllm.ops.cuda.few_attention import rope_cache_attention

    positions = inputs.context_lens.long() - 1
    inputs = dataclasses.replace(inputs, kv_slots=slots_of(inputs, positions, 64))
    qkv = torch.randn(2, (8 + 2 * 2) * 64, device=cache.device).to(torch.bfloat16)
    cos_sin = torch.randn(3000, 64, device=cache.device)
    first, second = (
        rope_cache_attention(qkv.clone(), positions, cos_sin, None, None, 1e-6, cache, 1, inputs, 0.125, None)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not first.isnan().any()
    assert not workspace(cache.device, 4, 64).counters.any()


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no graphs")
def test_a_graph_for_any_context_serves_short_and_long_ones() -> None:
    q, cache, inputs = batch([1, 1, 1], [1, 300, 2000])
    from xllm.ops.cuda.attention import attention

    anything = dataclasses.replace(inputs, max_context_len=40960, tiles=None)
    attention(q, cache, 1, anything, 0.125, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = attention(q, cache, 1, anything, 0.125, None)
    for lengths in ([1, 300, 2000], [1, 5, 64], [1, 65, 1999]):
        inputs.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        exact = attention(q, cache, 1, dataclasses.replace(anything, max_context_len=2000), 0.125, None)
        assert (given.float() - exact.float()).abs().max() <= BFLOAT16_STEP * exact.float().abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no graphs")
def test_a_graph_takes_other_contexts_and_other_parts() -> None:
    q, cache, inputs = batch([64, 0], [3000, 1])
    from xllm.ops.cuda.attention import attention

    tiles, parts = (entries([pair] * 40, q.device) for pair in ((1, 0), (0, 1)))
    fixed = dataclasses.replace(inputs, num_decodes=0, tiles=tiles, parts=parts)
    attention(q, cache, 1, fixed, 0.125, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = attention(q, cache, 1, fixed, 0.125, None)
    for context in (3000, 1100, 64, 2999):
        inputs.context_lens[0] = context
        cut = in_parts(inputs)
        assert cut.tiles is not None and cut.parts is not None
        count = len(cut.tiles)
        tiles[:count], parts[:count] = cut.tiles, cut.parts
        tiles[count:], parts[count:] = entries([(1, 0)], q.device), entries([(0, 1)], q.device)
        graph.replay()
        exact = reference(q.double(), cache, 1, inputs, 0.125, None)
        assert (given - exact).abs().max() <= BFLOAT16_STEP * exact.abs().max()


@pytest.mark.gpu
def test_sequences_of_several_queries_need_tiles() -> None:
    q, cache, inputs = batch([1, 3], [1, 3])
    from xllm.ops.cuda.attention import attention

    with pytest.raises(ValueError, match="by tiles"):
        attention(q, cache, 1, dataclasses.replace(inputs, tiles=None), 0.125, None)
