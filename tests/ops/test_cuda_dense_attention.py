"""Long prompts that go through PyTorch: the same numbers, nobody else's memory, and no other step.

On a CPU PyTorch's own attention stands in for cuDNN's.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.ops.cases import paged, tiled
from xllm.ops import attention as reference
from xllm.ops.attention import AttentionInputs
from xllm.ops.cuda.attention_plan import QUERY_TILE

pytestmark = pytest.mark.gpu
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CLOSE = (
    2.0**-6 if INTERPRETED else 2.0**-7
)  # weights and results are in bfloat16; the interpreter cuts them off
STEP, FROM = 128, 256  # in these tests
HEADS, GROUP = 2, 2


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, for shorter prompts and wherever the tests run."""
    pytest.importorskip("triton")
    from xllm.ops.cuda import dense_attention

    monkeypatch.setattr(dense_attention, "STEP", STEP)
    monkeypatch.setattr(dense_attention, "FROM", FROM)
    if INTERPRETED:
        monkeypatch.setattr(dense_attention, "_is_offered", lambda *_: True)
    else:
        kv = torch.empty(2, HEADS, STEP, 64, dtype=torch.bfloat16, device="cuda")
        if not dense_attention._is_offered(kv[0].transpose(0, 1), kv):
            pytest.skip("cuDNN is not for this card")
    dense_attention.cudnn_runs.cache_clear()
    yield dense_attention
    dense_attention.cudnn_runs.cache_clear()


@pytest.fixture
def taken(dense: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the operator took this way, of calls that took any."""
    counts: list[int] = []
    compute = dense.dense_attention

    def counted(q_TQD: torch.Tensor, *others: Any) -> torch.Tensor:
        counts.append(q_TQD.shape[0])
        return compute(q_TQD, *others)

    monkeypatch.setattr(dense, "dense_attention", counted)
    return counts


def step(
    queries: list[int], contexts: list[int], *, head_dim: int = 64, block_size: int = 64,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, AttentionInputs]:  # fmt: skip
    """Queries, a cache with NaN wherever nobody has written, and the inputs."""
    torch.manual_seed(sum(queries))
    with torch.device("cpu" if INTERPRETED else "cuda"):
        cache, inputs = paged(
            queries, contexts, block_size=block_size, heads=HEADS, head_dim=head_dim, dtype=kv_dtype
        )
        q = (4 * torch.randn(sum(queries), HEADS * GROUP, head_dim)).to(torch.bfloat16)
        return q, cache, tiled(inputs, QUERY_TILE)


def check(q: torch.Tensor, cache: torch.Tensor, inputs: AttentionInputs, window: int | None = None) -> None:
    from xllm.ops.cuda.attention import attention

    given = attention(q, cache, 1, inputs, 0.1, window)
    exact = reference.attention(q.double(), cache, 1, inputs, 0.1, window)
    assert given.dtype == q.dtype and given.shape == exact.shape and given.is_contiguous()
    assert worst_row(given, exact) <= CLOSE


def worst_row(given_TE: torch.Tensor, exact_TE: torch.Tensor) -> float:
    """The greatest error relative to its row: late ones are small, as averages of many are."""
    error_T = (given_TE.double() - exact_TE).abs().amax(1) / exact_TE.abs().amax(1)
    return float(error_T.nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize(
    ("length", "expected"),
    [(128, []), (255, []), (256, [256]), (257, []), (384, [384]), (385, [])],
)
def test_a_long_prompt_alone_takes_it(taken: list[int], length: int, expected: list[int]) -> None:
    check(*step([length], [length]))
    assert taken == expected


@pytest.mark.parametrize(("head_dim", "block_size"), [(128, 64), (80, 64), (64, 16), (64, 48), (72, 128)])
def test_any_blocks_and_heads(taken: list[int], head_dim: int, block_size: int) -> None:
    check(*step([256], [256], head_dim=head_dim, block_size=block_size))
    assert taken == [256]


@pytest.mark.parametrize(
    ("queries", "contexts", "window"),
    [
        ([256], [257], None),  # one token is cached already
        ([256], [256], 100),
        ([1, 255], [40, 255], None),
        ([256, 256], [256, 256], None),
        ([255, 1], [255, 7], None),
        ([1], [256], None),
    ],
)
def test_other_steps_do_not(
    taken: list[int], queries: list[int], contexts: list[int], window: int | None
) -> None:
    check(*step(queries, contexts), window)
    assert taken == []


def test_other_dtypes_and_queries_with_gaps_do_not(dense: Any) -> None:
    q, cache, inputs = step([256], [256])
    assert dense.fits(q, cache, inputs, None)
    assert not dense.fits(q, cache.to(torch.float8_e4m3fn), inputs, None)
    assert not dense.fits(q.float(), cache, inputs, None)
    assert not dense.fits(q[:, :-HEADS], cache, inputs, None)


def test_no_captured_graph_does(dense: Any) -> None:
    """The greatest context of a graph of prompts is the model's, which may be as long as the graph has tokens. Graphs of
    decodes have one query a sequence, as a case above."""
    from xllm.executor.chunk_graphs import SEQUENCES

    q, cache, inputs = step([512] + [0] * (SEQUENCES + 1), [512] + [1] * (SEQUENCES + 1))
    assert inputs.max_query_len == inputs.max_context_len == len(q)
    assert not dense.fits(q, cache, inputs, None)


def test_what_it_is_built_on(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert dense.STEP % dense.TILE == 0  # the gather copies whole tiles
    assert dense.FROM % dense.STEP == 0


def test_keys_are_gathered_from_the_sequence_alone(dense: Any) -> None:
    _, cache, inputs = step([300], [300], block_size=48)
    kv = dense.gather(cache, 1, inputs.block_table, 256)
    blocks = inputs.block_table[0, :6].long()
    assert torch.equal(kv, cache[blocks, 1].transpose(0, 1).flatten(1, 2)[:, :256].transpose(1, 2))


def test_a_refusal_is_said_once_and_our_kernel_computes(
    taken: list[int], dense: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no execution plans support the graph")

    monkeypatch.setattr(dense.F, "scaled_dot_product_attention", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check(*step([256], [256]))
    assert taken == []
    assert [record.message for record in caplog.records] == [
        "attention of 256 queries at once is slower, cuDNN refuses it: no execution plans support the graph"
    ]


@pytest.mark.skipif(INTERPRETED, reason="takes a card")
@pytest.mark.parametrize("tokens", [8192, 9216])
def test_real_prompts_on_a_card(tokens: int) -> None:
    """Some rows of the size that engines meet, against float64."""
    from xllm.ops.cuda.attention import attention
    from xllm.ops.cuda.dense_attention import fits

    torch.manual_seed(0)
    with torch.device("cuda"):
        cache, inputs = paged([tokens], [tokens], block_size=64, heads=8, head_dim=128, dtype=torch.bfloat16)
        inputs = tiled(inputs, QUERY_TILE)
        q = (4 * torch.randn(tokens, 16, 128)).to(torch.bfloat16)  # so that a few keys matter, of thousands
        if not fits(q, cache, inputs, None):
            pytest.skip("cuDNN is not for this card")
        rows = torch.tensor([0, 1, 63, 127, 128, 4095, 4096, 8063, 8064, 8191, tokens - 1])
        single = dataclasses.replace(
            inputs,
            query_starts=torch.arange(len(rows) + 1),
            context_lens=rows + 1,
            block_table=inputs.block_table.expand(len(rows), -1),
        )
        given = attention(q, cache, 1, inputs, 128**-0.5, None)
        exact = reference.attention(q[rows].double(), cache, 1, single, 128**-0.5, None)
        assert not given.isnan().any()
        assert worst_row(given[rows], exact) <= CLOSE
