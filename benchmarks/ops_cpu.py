"""Each CPU operator beside PyTorch's own at the shapes of Qwen3-0.6B: `python -m benchmarks.ops_cpu [--threads 2]`.

Times are the best of short repeated runs, the two sides in turn, since machines are shared. Weights and KV are cycled
through more memory than the caches hold, as the layers of a model are.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.load import Load
from xllm.ops import activation, norm
from xllm.ops.attention import AttentionInputs
from xllm.ops.table import Ops, load_ops

HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 1024, 16, 8, 128, 3072, 151936
LINEARS = {
    "qkv": ((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, Q_HEADS * HEAD_DIM),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
BLOCK = 16
CYCLED = 128 << 20  # bytes


@dataclass
class Row:
    name: str
    ours: Callable[[], Any]
    torch: Callable[[], Any]
    amount: float  # of `unit` per call
    unit: str  # GB/s | GFLOP/s


def linear(ops: Ops, dtype: torch.dtype, tokens: int, name: str) -> Row:
    rows, columns = LINEARS[name]
    size = rows * columns * dtype.itemsize
    plain = [torch.randn(rows, columns).to(dtype) for _ in range(CYCLED // size + 1)]
    packed = [ops.new_weight(rows, columns, dtype) for _ in plain]
    for into, weight in zip(packed, plain, strict=True):
        ops.store_rows(into, 0, weight)
    x = torch.randn(tokens, columns)
    ours, theirs, narrow = itertools.cycle(packed), itertools.cycle(plain), x.to(dtype)
    many = tokens > 16
    return Row(
        f"linear {name} {rows}x{columns}",
        lambda: ops.linear(x, next(ours), None),
        lambda: F.linear(narrow, next(theirs)),
        (2 * tokens * rows * columns if many else size) / 1e9,
        "GFLOP/s" if many else "GB/s",
    )


def attention(ops: Ops, dtype: torch.dtype, sequences: int, queries: int, context: int) -> Row:
    blocks = -(-context // BLOCK)
    layers = max(2, CYCLED // (2 * sequences * context * KV_HEADS * HEAD_DIM * dtype.itemsize))
    cache = torch.randn(sequences * blocks, layers, 2, BLOCK, KV_HEADS, HEAD_DIM).to(dtype)
    tokens = sequences * queries
    inputs = AttentionInputs(
        query_starts=torch.arange(0, tokens + 1, queries, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_table=torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks),
        kv_slots=torch.empty(0, dtype=torch.int64),
        max_query_len=queries,
        max_context_len=context,
    )
    q = torch.randn(tokens, Q_HEADS, HEAD_DIM)
    q_SQND = q.view(sequences, queries, Q_HEADS, HEAD_DIM).transpose(1, 2).to(dtype)
    kv_S2HCD = torch.randn(layers, 2, sequences, KV_HEADS, context, HEAD_DIM).to(dtype)
    ours, theirs = itertools.cycle(range(layers)), itertools.cycle(kv_S2HCD)
    scale = HEAD_DIM**-0.5
    if queries == 1:
        amount, unit = 2 * sequences * context * KV_HEADS * HEAD_DIM * dtype.itemsize, "GB/s"
    else:
        amount, unit = 2 * sequences * queries * (2 * context - queries) * Q_HEADS * HEAD_DIM, "GFLOP/s"

    def sdpa() -> torch.Tensor:
        """On contiguous KV: PyTorch has no paged attention on a CPU, and gathering pages first would be slower still."""
        k, v = next(theirs)
        return F.scaled_dot_product_attention(
            q_SQND, k, v, is_causal=queries > 1, scale=scale, enable_gqa=True
        )

    name = f"attention {sequences} x {queries} of {context}"
    return Row(
        name, lambda: ops.attention(q, cache, next(ours), inputs, scale, None), sdpa, amount / 1e9, unit
    )


def rows(ops: Ops, tokens: int) -> Iterator[Row]:
    x, residual, weight = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN), torch.randn(HIDDEN)
    gate_up = torch.randn(tokens, 2 * INTERMEDIATE)
    yield Row(
        "add_rms_norm",
        lambda: ops.add_rms_norm(x, residual, weight, 1e-6),
        lambda: norm.add_rms_norm(x, residual, weight, 1e-6),
        x.nbytes * 4 / 1e9,
        "GB/s",
    )
    yield Row(
        "silu_and_mul",
        lambda: ops.silu_and_mul(gate_up),
        lambda: activation.silu_and_mul(gate_up),
        gate_up.nbytes * 1.5 / 1e9,
        "GB/s",
    )


def best_of(ours: Callable[[], Any], theirs: Callable[[], Any], seconds: float) -> tuple[float, float]:
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, call in enumerate((ours, theirs)):
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best[0], best[1]


def report(title: str, found: Iterable[Row], seconds: float) -> None:
    print(f"\n{title}\n{'':32}{'ours us':>10}{'torch us':>10}{'ratio':>8}{'ours':>9}")
    for row in found:
        with Load() as load:
            ours, theirs = best_of(row.ours, row.torch, seconds)
        times = f"{ours * 1e6:10.0f}{theirs * 1e6:10.0f}{theirs / ours:7.2f}x"
        busy = f"   (others used {load.foreign:.0%} of a core)" if load.foreign > 0.1 else ""
        print(f"{row.name:32}{times}{row.amount / ours:9.1f} {row.unit}{busy}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.5, help="per operator")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = getattr(torch, asked.dtype)
    ops = load_ops("cpu", dtype)
    for tokens, context in ((1, 512), (16, 256), (1024, 1024)):
        sequences, queries = (1, tokens) if tokens > 16 else (tokens, 1)
        everything = itertools.chain(
            (linear(ops, dtype, tokens, name) for name in LINEARS),
            (attention(ops, dtype, sequences, queries, context) for _ in range(1)),
            rows(ops, tokens),
        )
        report(f"{asked.dtype}, {asked.threads} threads, {tokens} tokens", everything, asked.seconds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
