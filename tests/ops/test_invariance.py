"""A row's result on the CPU does not depend, in a single bit, on what is computed beside it."""

import random
from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import draw, packed, paged
from xllm.ops.attention import AttentionInputs
from xllm.ops.table import is_available, load_ops

pytestmark = pytest.mark.skipif(not is_available("cpu"), reason="there is no C++ compiler on this machine")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@DTYPES
def test_linear(dtype: torch.dtype, threads: int) -> None:
    ops = load_ops("cpu", dtype)
    weight, bias, x = draw(700, 777), draw(700), draw(500, 777)
    made = packed(ops, weight, dtype)
    alone = torch.cat([ops.linear(row[None], made, bias) for row in x[:50]])
    for tokens in (2, 3, 6, 7, 20, 50, 500):
        together = ops.linear(x[:tokens], made, bias)
        assert torch.equal(together[:50], alone[:tokens])


def test_rows(threads: int) -> None:
    ops = load_ops("cpu", torch.float32)
    x, weight = draw(200, 1000), draw(1000)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6)[7:8], ops.rms_norm(x[7:8], weight, 1e-6))
    assert torch.equal(ops.silu_and_mul(x)[199:], ops.silu_and_mul(x[199:]))


@DTYPES
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 72), (2, 64), (5, 72), (4, 32)])
def test_attention(dtype: torch.dtype, group: int, head_dim: int, window: int | None, threads: int) -> None:
    """Whole, chunked, token by token, beside others, in other blocks: the same bits."""
    torch.manual_seed(group)
    ops = load_ops("cpu", dtype)
    length, heads = 600, 3
    cache, _ = paged([1], [length], block_size=length, heads=heads, head_dim=head_dim, dtype=dtype)
    kv = cache[1, :, :, :length]
    q = draw(length, heads * group, head_dim)

    def run(first: int, last: int, block_size: int) -> torch.Tensor:
        small, inputs = rearranged(kv, first, last, block_size)
        return ops.attention(q[first:last], small, 1, inputs, 0.1, window)

    whole = run(0, length, 16)
    for size in (7, 64, 250):
        chunks = [run(first, min(length, first + size), 32) for first in range(0, length, size)]
        assert torch.equal(torch.cat(chunks), whole)
    for position in random.Random(0).sample(range(length), 20):
        assert torch.equal(run(position, position + 1, 8)[0], whole[position])


def rearranged(
    kv: torch.Tensor, first: int, last: int, block_size: int
) -> tuple[torch.Tensor, AttentionInputs]:
    """The first `last` positions of kv [2 layers, 2, length, H, D] in a paged cache beside another sequence's."""
    heads, head_dim = kv.shape[3:]
    cache, inputs = paged(
        [last - first, 1], [last, 50], block_size=block_size, heads=heads, head_dim=head_dim, dtype=kv.dtype
    )
    for start in range(0, last, block_size):
        filled = min(block_size, last - start)
        cache[inputs.block_table[0, start // block_size], :, :, :filled] = kv[:, :, start : start + filled]
    mine = AttentionInputs(
        query_starts=inputs.query_starts[:2],
        context_lens=inputs.context_lens[:1],
        block_table=inputs.block_table[:1],
        kv_slots=inputs.kv_slots,
        max_query_len=last - first,
        max_context_len=last,
    )
    return cache, mine
