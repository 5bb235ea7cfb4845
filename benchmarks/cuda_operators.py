"""What of the operators for cards is timed inside a layer besides products: row by row, attention, a whole layer.

Legend: as in `xllm.ops`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.cuda_ends import embedding_cases, input_cases, sampling_cases
from benchmarks.cuda_products import (
    BLOCK,
    EPS,
    LONGEST,
    Case,
    Found,
    Scope,
    Way,
    always,
    constants,
    draw,
    half_layer_cases,
    linear_cases,
    neighbours,
    quantised_cases,
    without_pdl,
)
from xllm.ops import activation, attention, few, norm, rotary
from xllm.ops.attention import AttentionInputs, query_tiles
from xllm.ops.cuda import activation as activation_kernel
from xllm.ops.cuda import (
    attention_plan,
    decode_attention,
    few_attention,
    hopper_attention,
    prefill_attention,
)
from xllm.ops.cuda import norm as norm_kernel
from xllm.ops.cuda import rotary as rotary_kernel

DECODES = (
    (1, 512), (1, 4096), (8, 1024), (32, 512), (32, 4096), (48, 600), (64, 600), (128, 600), (256, 600), (512, 288),
)  # sequences, context  # fmt: skip
FEW_DECODES = ((1, 600), (1, 4096), (1, 16384), (2, 600), (4, 600), (8, 600))
PROMPTS = (
    (1, 8192, 8192), (1, 4096, 4096), (8, 1024, 1024), (1, 2048, 8192), (1, 512, 512),
    (64, 128, 128), (16, 128, 2176),
)  # sequences, queries of each, context  # fmt: skip
TRITON = (hopper_attention, "fits", lambda *_: False)  # by the kernel for all cards


def angles(positions: int, rotated: int) -> torch.Tensor:
    """[M, R]: cosines and sines, of whatever angles."""
    angle_MR = torch.rand(positions, rotated // 2) * 7
    return torch.cat((angle_MR.cos(), angle_MR.sin()), dim=1)


def row_cases(scope: Scope) -> Iterator[Case]:
    for tokens in scope.tokens(1, 256, 8192):
        yield from _norms(scope, tokens)
        yield _silu_and_mul(scope, tokens)
        yield _rope_and_cache(scope, tokens)


def _norms(scope: Scope, tokens: int) -> Iterator[Case]:
    ops, width = scope.ops, scope.model.hidden
    count = scope.sets(tokens * width * 4, most=8)
    x, residual, gain = draw(count, tokens, width), draw(count, tokens, width), draw(width)
    before = residual[0].clone()

    def found() -> Found:
        yield from without_pdl()
        for warps in (2, 4, 8, 16):
            yield f"warps {warps}", ((norm_kernel, "norm_warps", always(warps)),)

    def exact_sum() -> torch.Tensor:
        total = before.float()
        return torch.cat((norm.add_rms_norm(x[0].float(), total, gain.float(), EPS), total))

    way = Way("", lambda i: ops.rms_norm(x[i % count], gain, EPS))
    by_torch = Way("torch", lambda i: F.rms_norm(x[i % count], (width,), gain, EPS))
    yield Case(
        "rms_norm", f"{tokens} tokens", [way, by_torch, *scope.vary(way, found())],
        lambda: norm.rms_norm(x[0].float(), gain.float(), EPS), moved=4 * tokens * width, sets=count,
    )  # fmt: skip
    way = Way(
        "", lambda i: ops.add_rms_norm(x[i % count], residual[i % count], gain, EPS),
        read=lambda y: torch.cat((y, residual[0])),
    )  # fmt: skip
    yield Case(
        "add_rms_norm", f"{tokens} tokens", [way, *scope.vary(way, found())], exact_sum,
        moved=8 * tokens * width, sets=count, reset=lambda: residual[0].copy_(before),
    )  # fmt: skip


def _silu_and_mul(scope: Scope, tokens: int) -> Case:
    width = scope.model.intermediate
    count = scope.sets(tokens * width * 4, most=8)
    gate_up = draw(count, tokens, 2 * width)
    way = Way("", lambda i: scope.ops.silu_and_mul(gate_up[i % count]))
    found = chain(without_pdl(), constants(activation_kernel, TILE=(512, 2048)))
    return Case(
        "silu_and_mul", f"{tokens} tokens", [way, *scope.vary(way, found)],
        lambda: activation.silu_and_mul(gate_up[0].float()), moved=6 * tokens * width, sets=count,
    )  # fmt: skip


def _rope_and_cache(scope: Scope, tokens: int) -> Case:
    m = scope.model
    cache, (at, *_), positions = paged(scope, 1, tokens, tokens)
    count = scope.sets(tokens * m.width * 2, most=8)
    qkv, gains, cos_sin = draw(count, tokens, m.width), draw(2, m.head_dim), angles(tokens, m.head_dim)
    written = (at.kv_slots // BLOCK, 0, slice(None), at.kv_slots % BLOCK)

    def run(operator: Any, qkv: torch.Tensor, kv_cache: torch.Tensor, layer: int) -> torch.Tensor:
        q: torch.Tensor = operator(
            qkv, positions, cos_sin, *gains.to(qkv.dtype), EPS, kv_cache, layer, at.kv_slots
        )
        return q

    def exact() -> torch.Tensor:
        other = torch.zeros_like(cache[:, :1])
        q = run(rotary.rope_and_cache, qkv[0].float(), other, 0)
        return torch.cat((q.flatten(), other[written].flatten().float()))

    way = Way(
        "", lambda i: run(scope.ops.rope_and_cache, qkv[i % count], cache, i % m.layers),
        read=lambda q: torch.cat((q.flatten(), cache[written].flatten())),
    )  # fmt: skip
    found = chain(without_pdl(), constants(rotary_kernel, HEADS=(4, 16)))
    return Case(
        "rope_and_cache", f"{tokens} tokens", [way, *scope.vary(way, found)], exact,
        moved=tokens * 4 * (m.width + m.head_dim), sets=count,
        reset=lambda: cache.__setitem__(written, float("nan")),
    )  # fmt: skip


def paged(
    scope: Scope, sequences: int, queries: int, context: int
) -> tuple[torch.Tensor, list[AttentionInputs], torch.Tensor]:
    """A cache whose contexts lie in shuffled blocks, several sets of sequences in it, and the positions of their
    queries [T], the last of each context. Single queries come as in a graph: with tables of full width."""
    m, single = scope.model, queries == 1
    blocks = -(-context // BLOCK)
    count = scope.sets(4 * sequences * context * m.kv_heads * m.head_dim * m.layers)
    cache = draw(count * sequences * blocks, m.layers, 2, BLOCK, m.kv_heads, m.head_dim)
    tables = torch.zeros(count, sequences, LONGEST // BLOCK if single else blocks, dtype=torch.int32)
    tables[:, :, :blocks] = torch.randperm(len(cache), dtype=torch.int32).view(count, sequences, blocks)
    positions = torch.arange(context - queries, context)
    slots = (tables[:, :, positions // BLOCK].long() * BLOCK + positions % BLOCK).flatten(1)
    tiles = torch.from_numpy(query_tiles(np.full(sequences, queries), 0, scope.ops.query_tile))
    at = AttentionInputs(
        query_starts=torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_table=tables[0],
        kv_slots=slots[0],
        max_query_len=queries,
        max_context_len=LONGEST if single else context,
        num_decodes=sequences if single else 0,
        tiles=None if single else tiles.to(cache.device),
    )
    found = [replace(at, block_table=table, kv_slots=of) for table, of in zip(tables, slots, strict=True)]
    return cache, found, positions.repeat(sequences)


def _attention(scope: Scope, sequences: int, queries: int, context: int, variants: Found) -> Case:
    """The last queries of some sequences are checked."""
    m, scale = scope.model, scope.model.head_dim**-0.5
    cache, found, _ = paged(scope, sequences, queries, context)
    q = draw(sequences * queries, m.q_heads, m.head_dim)
    chosen, last = sorted({0, sequences // 2, sequences - 1}), min(queries, 64)
    rows = torch.cat([torch.arange((s + 1) * queries - last, (s + 1) * queries) for s in chosen])
    these = replace(
        found[0], query_starts=torch.arange(0, len(rows) + 1, last), context_lens=found[0].context_lens[chosen],
        block_table=found[0].block_table[chosen],
    )  # fmt: skip
    way = Way(
        "", lambda i: scope.ops.attention(q, cache, i % m.layers, found[i // m.layers % len(found)], scale, None),
        read=lambda out: out[rows],
    )  # fmt: skip
    peers, heads = [], m.q_heads * m.head_dim
    if queries == context:
        kv_SW2PHD = cache[found[0].block_table.long(), 0]
        k, v = kv_SW2PHD.permute(2, 0, 4, 1, 3, 5).flatten(3, 4)[:, :, :, :context]
        q_SQND = q.unflatten(0, (sequences, queries)).transpose(1, 2)
        dense = F.scaled_dot_product_attention
        contiguous = Way(
            "torch, contiguous", lambda _: dense(q_SQND, k, v, is_causal=True, scale=scale, enable_gqa=True),
            read=lambda out: out.transpose(1, 2).flatten(2).flatten(0, 1)[rows],
        )  # fmt: skip
        peers = [contiguous]
    if queries > 1:
        peers.append(replace(way, name="triton", settings=(TRITON,)))
    return Case(
        "attention", f"{sequences} x {queries} of {context}", [way, *peers, *scope.vary(way, variants)],
        lambda: attention.attention(q[rows].float(), cache, 0, these, scale, None),
        moved=4 * sequences * (context * m.kv_heads * m.head_dim + queries * heads),
        flops=4 * heads * sequences * (queries * context - queries * (queries - 1) / 2), sets=m.layers * len(found),
    )  # fmt: skip


def decode_cases(scope: Scope) -> Iterator[Case]:
    m = scope.model

    def variants(sequences: int, context: int) -> Found:
        yield from without_pdl()
        cut = attention_plan.decode_tiling(m.q_heads // m.kv_heads, m.head_dim, torch.bfloat16)
        for name, other in neighbours(cut, keys=(32, 64), stages=(2, 3, 4), warps=(2, 4, 8)):
            yield name, ((decode_attention, "decode_tiling", always(other)),)
        room = attention_plan.most_partial_results(decode_attention.multiprocessors(torch.tensor(0).device))
        for splits in (1, 2, 4, 8, 16, 32, 64):
            if splits == 1 or (splits <= context // cut.keys and sequences * m.kv_heads * splits <= room):
                yield f"splits {splits}", ((decode_attention, "count_splits", always(splits)),)

    for sequences, context in scope.cut(DECODES, 5, 150):
        yield _attention(scope, sequences, 1, context, variants(sequences, context))


def prompt_cases(scope: Scope) -> Iterator[Case]:
    """Variants are those of our kernel."""

    def variants() -> Found:
        pointers = (prefill_attention, "can_use_descriptors", always(False))
        yield "pointers", (TRITON, pointers)
        cut = attention_plan.prefill_tiling(scope.model.head_dim, torch.bfloat16)
        wide = replace(cut, rows=256, warps=8)
        others = neighbours(cut, stages=(2, 3, 4), warps=(4, 8), rows=(64, 128), keys=(32, 64))
        for name, other in chain(others, [("rows 256, warps 8", wide)]):
            setting = (prefill_attention, "prefill_tiling", always(other))
            yield name, (TRITON, setting)
            yield f"pointers, {name}", (TRITON, setting, pointers)

    for sequences, queries, context in scope.cut(PROMPTS, 3, 150, 150):
        yield _attention(scope, sequences, queries, context, variants())


def few_attention_cases(scope: Scope) -> Iterator[Case]:
    for sequences, context in scope.cut(FEW_DECODES, 3, 150):
        yield _few_attention(scope, sequences, context)


def _few_attention(scope: Scope, sequences: int, context: int) -> Case:
    m, ops, scale = scope.model, scope.ops, scope.model.head_dim**-0.5
    cache, found, positions = paged(scope, sequences, 1, context)
    qkv, gains, cos_sin = draw(sequences, m.width), draw(2, m.head_dim), angles(context, m.head_dim)

    def at(i: int) -> tuple[int, AttentionInputs]:
        return i % m.layers, found[i // m.layers % len(found)]

    def run(given: Any, qkv: torch.Tensor, i: int) -> torch.Tensor:
        out: torch.Tensor = given.rope_cache_attention(
            qkv, positions, cos_sin, *gains.to(qkv.dtype), EPS, cache, *at(i), scale, None
        )
        return out

    def single(i: int) -> torch.Tensor:
        layer, these = at(i)
        q = ops.rope_and_cache(qkv, positions, cos_sin, *gains, EPS, cache, layer, these.kv_slots)
        return ops.attention(q, cache, layer, these, scale, None)

    def variants() -> Found:
        yield from without_pdl()
        yield from constants(few_attention, MAX_SPLITS=(8, 16, 64))
        cut = attention_plan.decode_tiling(m.q_heads // m.kv_heads, m.head_dim, torch.bfloat16)
        narrow = ((f"keys 32, warps {warps}", replace(cut, keys=32, warps=warps)) for warps in (2, 4))
        for name, other in chain(neighbours(cut, stages=(2, 3), warps=(2, 4, 8)), narrow):
            yield name, ((few_attention, "decode_tiling", always(other)),)

    way = Way("", lambda i: run(scope.few, qkv, i))
    return Case(
        "rope_cache_attention", f"{sequences} x 1 of {context}",
        [way, Way("single operators", single), *scope.vary(way, variants())], lambda: run(few, qkv.float(), 0),
        moved=4 * sequences * context * m.kv_heads * m.head_dim,
        flops=4 * sequences * context * m.q_heads * m.head_dim, sets=m.layers * len(found),
    )  # fmt: skip


def layer_cases(scope: Scope) -> Iterator[Case]:
    """A layer of a decode step, by the operators for few tokens and by plain ones, as `models.layers.decoder` does."""
    m = scope.model
    size = sum(2 * rows * columns for rows, columns in m.weights.values())
    layers = [
        {name: draw(rows, columns, scale=columns**-0.5) for name, (rows, columns) in m.weights.items()}
        for _ in range(min(m.layers, 3 + scope.sets(size)))
    ]
    for tokens in scope.tokens(1, 2, 4, 8):
        yield _layer(scope, layers, size, tokens, 70 if scope.dry else 600)


def _layer(scope: Scope, layers: list[dict[str, torch.Tensor]], size: int, tokens: int, context: int) -> Case:
    m, ops, scale = scope.model, scope.ops, scope.model.head_dim**-0.5
    cache, (at, *_), positions = paged(scope, tokens, 1, context)
    gain, gains, cos_sin = draw(m.hidden), draw(2, m.head_dim), angles(context, m.head_dim)
    before = draw(tokens, m.hidden)
    residual, no_branch = before.clone(), torch.zeros_like(before)

    def by_few(given: Any, w: dict[str, torch.Tensor], i: int, residual: torch.Tensor) -> torch.Tensor:
        norm_K, norms = gain.to(residual.dtype), gains.to(residual.dtype)
        qkv = given.norm_linear(residual, norm_K, EPS, w["qkv"], None)
        out = given.rope_cache_attention(qkv, positions, cos_sin, *norms, EPS, cache, i, at, scale, None)
        given.linear_add(out, w["o"], None, residual)
        inner = given.norm_gate_up(residual, norm_K, EPS, w["gate_up"], None)
        given.linear_add(inner, w["down"], None, residual)
        return residual

    def plain(w: dict[str, torch.Tensor], i: int) -> torch.Tensor:
        x = ops.add_rms_norm(no_branch, residual, gain, EPS)
        qkv = ops.linear(x, w["qkv"], None)
        q = ops.rope_and_cache(qkv, positions, cos_sin, *gains, EPS, cache, i, at.kv_slots)
        branch = ops.linear(ops.attention(q, cache, i, at, scale, None), w["o"], None)
        x = ops.add_rms_norm(branch, residual, gain, EPS)
        return ops.linear(ops.silu_and_mul(ops.linear(x, w["gate_up"], None)), w["down"], None)

    count = len(layers)
    ways = [
        Way("few", lambda i: by_few(scope.few, layers[i % count], i % count, residual)),
        Way("plain", lambda i: plain(layers[i % count], i % count), read=lambda branch: residual + branch),
    ]
    if tokens > scope.few.max_tokens:
        ways.reverse()
    return Case(
        "layer", f"{tokens} x 1 of {context}, {ways[0].name}", [*ways, *scope.vary(ways[0], without_pdl())],
        lambda: by_few(few, {name: w.float() for name, w in layers[0].items()}, 0, before.float()),
        moved=size + 4 * tokens * context * m.kv_heads * m.head_dim, flops=size * tokens, sets=count,
        reset=lambda: residual.copy_(before), limit=4e-2,
    )  # fmt: skip


GROUPS: dict[str, Callable[[Scope], Iterator[Case]]] = {
    "linear": linear_cases,
    "half-layers": half_layer_cases,
    "layer": layer_cases,
    "few-attention": few_attention_cases,
    "decode": decode_cases,
    "prompts": prompt_cases,
    "rows": row_cases,
    "quantised": quantised_cases,
    "embedding": embedding_cases,
    "sampling": sampling_cases,
    "inputs": input_cases,
}
SAME_FOR_ALL = {"sampling", "inputs"}  # models
