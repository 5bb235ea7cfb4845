"""Fresh random inputs for every operator, run on a device's operators and on the reference in float64.

`CASES[op](ops, dtype, rng)` yields (what the device gave, what is exact) pairs; both `test_parity.py` and whoever
brings a new device rely on nothing else. Tensors are made on PyTorch's current default device. Activations have the
dtype of the device's activations, and numbers that the weights' dtype holds exactly, so that a device which rounds
activations to it is exact too.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import torch

from xllm.ops import activation, attention, few, linear, norm, rotary
from xllm.ops.attention import AttentionInputs
from xllm.ops.inputs import decode_inputs
from xllm.ops.table import FEW, FewOps, Ops, resolve

Pair = tuple[torch.Tensor, torch.Tensor]
Case = Callable[[Ops, torch.dtype, random.Random], Iterator[Pair]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal float32 numbers that `dtype` holds exactly."""
    return torch.randn(shape).to(dtype).float()


def activations(ops: Ops, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that `dtype` holds exactly, in the dtype of the device's activations."""
    return torch.randn(shape).to(dtype).to(ops.activation_dtype)


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
        weight, bias = draw(rows, columns, dtype=dtype), activations(ops, rows)
        made = packed(ops, weight, dtype, pieces=min(rows, 3))
        for tokens in (1, 2, 5, 7, 12, 33, rng.randint(34, 300)):
            x = activations(ops, tokens, columns, dtype=dtype)
            given = bias if rng.random() < 0.5 else None
            exact = linear.linear(x.double(), weight.double(), wide(given))
            yield ops.linear(x, made, given), exact


def embedding_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for rows, columns in ((1, 1), (300, 65), (129, 64), (rng.randint(1, 999), rng.randint(1, 99))):
        weight = draw(rows, columns, dtype=dtype)
        made = packed(ops, weight, dtype, pieces=rng.randint(1, rows))
        for tokens in (1, 33, 500):
            ids = torch.randint(rows, (tokens,))
            yield (
                ops.embedding(ids, made, ops.activation_dtype),
                linear.embedding(ids, weight, torch.float64),
            )


def norm_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for tokens, width in ((1, 1), (3, 64), (33, 100), (1, 1024), (rng.randint(1, 99), rng.randint(1, 3000))):
        x, residual = activations(ops, tokens, width), activations(ops, tokens, width)
        weight = activations(ops, width)
        expected = residual.double()
        yield ops.rms_norm(x, weight, 1e-6), norm.rms_norm(x.double(), weight.double(), 1e-6)
        yield (
            ops.add_rms_norm(x, residual, weight, 1e-5),
            norm.add_rms_norm(x.double(), expected, weight.double(), 1e-5),
        )
        yield residual, expected


def silu_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for tokens, width in ((1, 1), (3, 64), (33, 100), (rng.randint(1, 99), rng.randint(1, 3000))):
        x = activations(ops, tokens, 2 * width) * 30  # far into both tails
        yield ops.silu_and_mul(x), activation.silu_and_mul(x.double())


def rope_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for head_dim in (8, 32, 72, 80, 128):
        kv_heads, group, block_size = rng.randint(1, 3), rng.randint(1, 8), rng.randint(8, 64)
        tokens, layers, layer = rng.choice((1, 33, 150)), 3, rng.randrange(3)
        rotated = rng.choice((head_dim, head_dim // 2))
        cos_sin = draw(512, rotated)
        q_norm, k_norm = (
            (activations(ops, head_dim), activations(ops, head_dim)) if rng.random() < 0.5 else (None, None)
        )
        cache = torch.zeros(
            -(-tokens // block_size) + 2, layers, 2, block_size, kv_heads, head_dim, dtype=dtype
        )
        slots = torch.randperm(cache.shape[0] * block_size)[:tokens]
        qkv = activations(ops, tokens, (group + 2) * kv_heads * head_dim)
        positions = torch.randint(512, (tokens,))
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
    yield attention_pair(ops, dtype, rng, "mixed", 1, 40, 16, sequences=5)
    for block_size, head_dim in itertools.product((16, 64, 128), (64, 128)):  # what engines use
        yield attention_pair(
            ops, dtype, rng, "mixed", 1, 4, head_dim, block_size=block_size, sequences=4, longest=1500
        )
    yield attention_pair(ops, dtype, rng, "decode", 1, 2, 256, sequences=1, longest=5000)
    yield attention_pair(ops, dtype, rng, "decode", 8, 1, 8, sequences=70, longest=100)
    if ops.query_tile:
        for queries, contexts, block_size, head_dim, window in SPLIT:
            yield split_pair(ops, dtype, rng, queries, contexts, block_size, head_dim, window)
    if ops.device == "cuda":
        for head_dim in (64, 72):
            yield attention_pair(
                ops,
                dtype,
                rng,
                "mixed",
                2,
                2,
                head_dim,
                block_size=64,
                sequences=4,
                kv_dtype=torch.float8_e4m3fn,
            )


def attention_pair(
    ops: Ops,
    dtype: torch.dtype,
    rng: random.Random,
    batch: str,
    kv_heads: int,
    group: int,
    head_dim: int,
    *,
    block_size: int = 0,
    sequences: int = 0,
    longest: int = 900,
    kv_dtype: torch.dtype | None = None,
) -> Pair:
    """block_size and sequences: 0 for any."""
    sequences = sequences or rng.choice((1, 2, 5, 33))
    queries = [
        1 if batch == "decode" or (batch == "mixed" and rng.random() < 0.5) else rng.randint(1, 90)
        for _ in range(sequences)
    ]
    contexts = [count + rng.choice((0, rng.randint(0, 40), rng.randint(0, longest))) for count in queries]
    cache, inputs = paged(
        queries,
        contexts,
        block_size=block_size or rng.randint(8, 64),
        heads=kv_heads,
        head_dim=head_dim,
        dtype=kv_dtype or dtype,
    )
    if ops.query_tile:
        inputs = tiled(inputs, ops.query_tile)
    # queries as they come: a view with gaps between the tokens
    q = activations(ops, sum(queries), kv_heads * group + 2, head_dim)[:, :-2]
    window = rng.choice((None, rng.randint(1, 100), 300))
    given = ops.attention(q, cache, 1, inputs, head_dim**-0.5, window)
    exact = attention.attention(q.double(), cache, 1, inputs, head_dim**-0.5, window)
    return given, exact


# few queries behind long contexts: queries and contexts of each sequence, block size, head size, window
SPLIT: tuple[tuple[list[int], list[int], int, int, int | None], ...] = (
    ([64], [2600], 64, 128, None),
    ([1, 40, 1, 33, 2], [1500, 70, 3001, 1100, 2], 16, 64, None),
    ([70, 1], [1090, 1024], 24, 80, None),
    ([64, 5], [2311, 1030], 64, 64, 1500),
    ([20, 1], [1100, 2000], 64, 128, 300),  # one part is enough for the keys in a window
)


def split_pair(
    ops: Ops,
    dtype: torch.dtype,
    rng: random.Random,
    queries: list[int],
    contexts: list[int],
    block_size: int,
    head_dim: int,
    window: int | None,
) -> Pair:
    kv_heads, group = rng.randint(1, 2), rng.choice((1, 2, 4, 5))
    cache, inputs = paged(
        queries, contexts, block_size=block_size, heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    inputs = in_parts(inputs)
    q = activations(ops, sum(queries), kv_heads * group + 2, head_dim)[:, :-2]
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


def tiled(inputs: AttentionInputs, tile: int) -> AttentionInputs:
    """What the executor adds for devices that want tiles: as many decodes at the front as there are."""
    query_lens = inputs.query_starts.diff().cpu().numpy()
    several = (query_lens > 1).nonzero()[0]
    decodes = int(several[0]) if len(several) else len(query_lens)
    tiles = torch.as_tensor(
        attention.query_tiles(query_lens, decodes, tile), device=inputs.query_starts.device
    )
    return dataclasses.replace(inputs, num_decodes=decodes, tiles=tiles)


def in_parts(inputs: AttentionInputs) -> AttentionInputs:
    """What the executor adds where a step's few queries have many keys to read."""
    query_lens = inputs.query_starts.diff().cpu().numpy()
    tiles = attention.query_tiles(query_lens, 0, attention.SPLIT_TILE)
    room = len(tiles) + attention.SPLIT_ENTRIES
    tiles, parts = attention.split_keys(tiles, query_lens, inputs.context_lens.cpu().numpy(), room)
    device = inputs.query_starts.device
    return dataclasses.replace(
        inputs, tiles=torch.as_tensor(tiles, device=device), parts=torch.as_tensor(parts, device=device)
    )


def few_weights(
    ops: Ops, dtype: torch.dtype, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
    """(rows [T, K], weight [N, K], bias [N] or None, norm [K], rows [T, N]) of the few-token operators; N is even."""
    for rows, columns in (
        (2, 1),
        (64, 64),
        (514, 96),
        (1024, 520),
        (2 * rng.randint(1, 350), rng.randint(1, 700)),
    ):
        weight = draw(rows, columns, dtype=dtype).to(dtype)
        for tokens in (1, 2, 5, 8):
            bias = activations(ops, rows) if rng.random() < 0.5 else None
            x, y = activations(ops, tokens, columns, dtype=dtype), activations(ops, tokens, rows, dtype=dtype)
            yield x, weight, bias, activations(ops, columns), y


def norm_linear_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    operators = few_of(ops)
    for x, weight, bias, gain, _ in few_weights(ops, dtype, rng):
        exact = few.norm_linear(x.double(), gain.double(), 1e-6, weight.double(), wide(bias))
        yield operators.norm_linear(x, gain, 1e-6, weight, bias), exact


def norm_gate_up_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    operators = few_of(ops)
    for x, weight, bias, gain, _ in few_weights(ops, dtype, rng):
        exact = few.norm_gate_up(x.double(), gain.double(), 1e-6, weight.double(), wide(bias))
        yield operators.norm_gate_up(x, gain, 1e-6, weight, bias), exact


def linear_add_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    operators = few_of(ops)
    for x, weight, bias, _, residual in few_weights(ops, dtype, rng):
        exact = residual.double()
        few.linear_add(x.double(), weight.double(), wide(bias), exact)
        operators.linear_add(x, weight, bias, residual)
        yield residual, exact


def few_attention_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    operators = few_of(ops)
    for head_dim, tokens in itertools.product((8, 64, 80, 128), (1, 2, 8)):
        kv_heads, group = rng.randint(1, 3), rng.choice((1, 2, 3, 4, 5, 7, 8))
        contexts = [rng.choice((1, 2, 63, 64, 65, 129, rng.randint(1, 2000))) for _ in range(tokens)]
        cache, inputs = paged(
            [1] * tokens,
            contexts,
            block_size=rng.choice((16, 32, 64)),
            heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        cache = cache.nan_to_num()  # this operator may read ahead of what is written: the contract
        positions = inputs.context_lens.long() - 1
        inputs = dataclasses.replace(inputs, kv_slots=slots_of(inputs, positions, cache.shape[3]))
        rotated = rng.choice((head_dim, head_dim // 2))
        cos_sin = draw(max(contexts), rotated)
        norms = (
            (activations(ops, head_dim), activations(ops, head_dim)) if rng.random() < 0.5 else (None, None)
        )
        qkv = activations(ops, tokens, (group + 2) * kv_heads * head_dim, dtype=dtype)
        window = rng.choice((None, rng.randint(1, 100), 300))
        # attention is of keys and values rounded to the cache's dtype, and of queries rounded as activations are
        exact_cache, scale = cache.clone(), head_dim**-0.5
        q = rotary.rope_and_cache(
            qkv.double(), positions, cos_sin, wide(norms[0]), wide(norms[1]), 1e-6, exact_cache, 1, inputs.kv_slots
        )  # fmt: skip
        exact = attention.attention(
            q.to(ops.activation_dtype).double(), exact_cache, 1, inputs, scale, window
        )
        given = operators.rope_cache_attention(
            qkv, positions, cos_sin, *norms, 1e-6, cache, 1, inputs, scale, window
        )
        yield given, exact
        yield cache, exact_cache


def slots_of(inputs: AttentionInputs, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """[S] int64: where the token at each sequence's position is kept."""
    blocks = inputs.block_table.gather(1, (positions // block_size)[:, None]).squeeze(1).long()
    return blocks * block_size + positions % block_size


def few_of(ops: Ops) -> FewOps:
    return ops.few or FewOps(**{op: resolve(at) for op, at in FEW[ops.device].items()})


def decode_inputs_case(ops: Ops, dtype: torch.dtype, rng: random.Random) -> Iterator[Pair]:
    for count, slots, length, block_size in (
        (1, 1, 1, 8),
        (3, 9, 100, 16),
        (64, 64, 5000, 64),
        (33, 200, 777, 32),
    ):
        width = -(-length // block_size)
        tokens = torch.randint(1000, (slots, length + 1))
        table = torch.randint(2**20, (slots, width), dtype=torch.int32)
        chosen, positions = torch.randint(slots, (count,)), torch.randint(length, (count,))
        exact = decode_inputs(chosen, positions, tokens, table, block_size)
        given = ops.decode_inputs(chosen, positions, tokens, table, block_size)
        for one, other in zip(given[:3], exact[:3], strict=True):
            assert one.dtype == other.dtype
            yield one.float(), other.float()
        used = torch.arange(width) <= (positions // block_size)[:, None]
        yield (given[3] * used).float(), (exact[3] * used).float()


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
    "decode_inputs": decode_inputs_case,
    "norm_linear": norm_linear_case,
    "norm_gate_up": norm_gate_up_case,
    "linear_add": linear_add_case,
    "rope_cache_attention": few_attention_case,
}
