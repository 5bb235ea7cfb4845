"""Fresh random inputs for every operator, run on a device's operators and on the reference in float64.

`CASES[op](ops, dtype, rng)` yields (what the device gave, what is exact) pairs; both `test_parity.py` and whoever
brings a new device rely on nothing else. Activations are drawn in bfloat16 where weights or KV are bfloat16, so that a
device which rounds activations to the weights' dtype is exact too.
"""

import random
from collections.abc import Callable, Iterator

import torch

from xllm.ops import activation, attention, linear, norm, rotary
from xllm.ops.attention import AttentionInputs
from xllm.ops.table import Ops

Pair = tuple[torch.Tensor, torch.Tensor]
Case = Callable[[Ops, torch.dtype, random.Random], Iterator[Pair]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal float32 numbers that `dtype` holds exactly."""
    return torch.randn(shape).to(dtype).float()


def wide(given: torch.Tensor | None) -> torch.Tensor | None:
    return None if given is None else given.double()


def packed(ops: Ops, weight: torch.Tensor, dtype: torch.dtype, pieces: int = 1) -> object:
    """The weight in the device's layout, stored in several pieces as a checkpoint brings it."""
    rows, columns = weight.shape
    made = ops.new_weight(rows, columns, dtype)
    row = 0
    for part in weight.to(dtype).tensor_split(pieces):
        ops.store_rows(made, row, part)
        row += part.shape[0]
    return made


def linear_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    shapes = [
        (64, 64),
        (1, 1),
        (3, 2),
        (513, 96),
        (200, 333),
        (1024, 520),
        (rng.randint(1, 700), rng.randint(1, 700)),
    ]
    for rows, columns in shapes:
        weight, bias = draw(rows, columns, dtype=dtype), draw(rows)
        made = packed(ops, weight, dtype, pieces=min(rows, 3))
        for tokens in (1, 2, 5, 7, 12, 33, rng.randint(34, 300)):
            x = draw(tokens, columns, dtype=dtype)
            given = bias if rng.random() < 0.5 else None
            exact = linear.linear(x.double(), weight.double(), wide(given))
            yield ops.linear(x, made, given), exact


def embedding_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for rows, columns in ((1, 1), (300, 65), (129, 64), (rng.randint(1, 999), rng.randint(1, 99))):
        weight = draw(rows, columns, dtype=dtype)
        made = packed(ops, weight, dtype, pieces=rng.randint(1, rows))
        for tokens in (1, 33, 500):
            ids = torch.randint(rows, (tokens,))
            yield ops.embedding(ids, made, torch.float32), linear.embedding(ids, weight, torch.float64)


def norm_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for tokens, width in ((1, 1), (3, 64), (33, 100), (1, 1024), (rng.randint(1, 99), rng.randint(1, 3000))):
        x, weight, residual = draw(tokens, width), draw(width), draw(tokens, width)
        expected = residual.double()
        yield ops.rms_norm(x, weight, 1e-6), norm.rms_norm(x.double(), weight.double(), 1e-6)
        yield (
            ops.add_rms_norm(x, residual, weight, 1e-5),
            norm.add_rms_norm(x.double(), expected, weight.double(), 1e-5),
        )
        yield residual, expected


def silu_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for tokens, width in ((1, 1), (3, 64), (33, 100), (rng.randint(1, 99), rng.randint(1, 3000))):
        x = draw(tokens, 2 * width) * 30  # far into both tails
        yield ops.silu_and_mul(x), activation.silu_and_mul(x.double())


def rope_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for head_dim in (8, 32, 72, 80, 128):
        kv_heads, group, block_size = rng.randint(1, 3), rng.randint(1, 8), rng.randint(8, 64)
        tokens, layers, layer = rng.choice((1, 33, 150)), 3, rng.randrange(3)
        rotated = rng.choice((head_dim, head_dim // 2))
        cos_sin = draw(512, rotated)
        q_norm, k_norm = (draw(head_dim), draw(head_dim)) if rng.random() < 0.5 else (None, None)
        cache = torch.zeros(
            -(-tokens // block_size) + 2, layers, 2, block_size, kv_heads, head_dim, dtype=dtype
        )
        slots = torch.randperm(cache.shape[0] * block_size)[:tokens]
        qkv, positions = draw(tokens, (group + 2) * kv_heads * head_dim), torch.randint(512, (tokens,))
        exact_cache = cache.double()
        exact = rotary.rope_and_cache(
            qkv.double(), positions, cos_sin, wide(q_norm), wide(k_norm), 1e-6, exact_cache, layer, slots
        )
        q = ops.rope_and_cache(qkv, positions, cos_sin, q_norm, k_norm, 1e-6, cache, layer, slots)
        yield q, exact
        yield cache, exact_cache


def attention_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for head_dim in (8, 32, 64, 72, 80, 96, 128):
        for batch in ("decode", "prefill", "mixed"):
            kv_heads, group = rng.randint(1, 3), rng.choice((1, 2, 3, 4, 5, 7, 8))
            yield attention_pair(ops, dtype, rng, batch, kv_heads, group, head_dim)
    yield attention_pair(ops, dtype, rng, "mixed", 1, 40, 16)


def attention_pair(
    ops: Ops, dtype: torch.dtype, rng: random.Random, batch: str, kv_heads: int, group: int, head_dim: int
) -> Pair:
    sequences = rng.choice((1, 2, 5, 33))
    queries = [
        1 if batch == "decode" or (batch == "mixed" and rng.random() < 0.5) else rng.randint(1, 90)
        for _ in range(sequences)
    ]
    contexts = [count + rng.choice((0, rng.randint(0, 40), rng.randint(0, 900))) for count in queries]
    cache, inputs = paged(
        queries, contexts, block_size=rng.randint(8, 64), heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    # queries as they come: a view with gaps between the tokens
    q = draw(sum(queries), kv_heads * group + 2, head_dim)[:, :-2]
    window = rng.choice((None, rng.randint(1, 100), 300))
    given = ops.attention(q, cache, 1, inputs, head_dim**-0.5, window)
    exact = attention.attention(q.double(), cache, 1, inputs, head_dim**-0.5, window)
    return given, exact


def paged(
    queries: list[int], contexts: list[int], *, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, AttentionInputs]:
    """A cache of two layers with filled contexts in shuffled blocks; what belongs to nobody is NaN."""
    needed = [-(-context // block_size) for context in contexts]
    cache = torch.full((sum(needed) + 1, 2, 2, block_size, heads, head_dim), float("nan"), dtype=dtype)
    blocks = iter((torch.randperm(sum(needed)) + 1).tolist())
    table = torch.full((len(contexts), max(needed) + 1), 2**30, dtype=torch.int32)
    for row, count, context in zip(table, needed, contexts, strict=True):
        for i in range(count):
            row[i] = next(blocks)
            filled = min(block_size, context - i * block_size)
            cache[row[i], :, :, :filled] = torch.randn(2, 2, filled, heads, head_dim).to(dtype)
    inputs = AttentionInputs(
        query_starts=torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=table,
        kv_slots=torch.empty(0, dtype=torch.int64),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )
    return cache, inputs


CASES: dict[str, Case] = {
    "new_weight": embedding_case,
    "store_rows": embedding_case,
    "embedding": embedding_case,
    "linear": linear_case,
    "rms_norm": norm_case,
    "add_rms_norm": norm_case,
    "silu_and_mul": silu_case,
    "rope_and_cache": rope_case,
    "attention": attention_case,
}
