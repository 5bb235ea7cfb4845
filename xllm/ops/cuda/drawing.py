"""What the sampling kernel is made of: parts that one program runs over one row of logits.

Legend: N chunks of a row, C tokens of a chunk, M chunks of a tile. `best` is the row's largest logit, `scale` turns
differences of logits into exponents of two. A token is *kept* whose logit is at least `floor` and above `bar`, and whose
exponent, relative to the best, is at least `least`.

Lists and masses go through a row's own scratch memory, between barriers: what one thread writes others read.
"""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def uniform(start, position, attempt):
    """As `xllm.ops.sampling.uniforms`."""
    x = mix(start.to(tl.uint64) + (position + 1).to(tl.uint64) * GOLDEN)
    x = tl.where(attempt > 0, mix(x + attempt.to(tl.uint64)), x)
    return (x >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def is_kept(logits, best, scale, floor, bar, least):
    return (logits >= floor) & (logits > bar) & ((logits - best) * scale >= least)


@triton.jit
def pick(weights, u, SIZE: tl.constexpr):
    """The first index whose running sum exceeds u x total, how far into its weight that lies (0 to 1), and the total.

    weights: [SIZE] float64, not all zero. Whatever rounding does at the ends, the index has weight.
    """
    index = tl.arange(0, SIZE)
    running = tl.cumsum(weights, 0)
    total = tl.max(running, 0)
    target = u * total
    first = tl.min(tl.where((running > target) & (weights > 0), index, SIZE), 0)
    last = tl.max(tl.where(weights > 0, index, 0), 0)
    chosen = tl.minimum(first, last)
    own = tl.sum(tl.where(index == chosen, weights, 0.0), 0)
    before = tl.sum(tl.where(index == chosen, running, 0.0), 0) - own
    share = (target - before) / tl.where(own > 0, own, 1.0)
    return chosen, tl.minimum(tl.maximum(share, 0.0), 1.0), total


@triton.jit
def list_chunks(listed_N, list_ptr, N: tl.constexpr):
    """Write the ids of the chunks wanted, rising; returns how many."""
    ones_N = listed_N.to(tl.int32)
    place_N = tl.cumsum(ones_N, 0) - 1
    tl.debug_barrier()  # others may still read what stands there
    tl.store(list_ptr + place_N, tl.arange(0, N), mask=listed_N)
    tl.debug_barrier()
    return tl.sum(ones_N, 0)


@triton.jit
def load_tile(row_ptr, list_ptr, first, count, vocab, M: tl.constexpr, C: tl.constexpr):
    """-> chunks [M], token ids and logits [M, C] float32, -inf where there is none."""
    at_M = first + tl.arange(0, M)
    chunk_M = tl.load(list_ptr + at_M, mask=at_M < count, other=0)
    ids_MC = chunk_M[:, None] * C + tl.arange(0, C)[None, :]
    inside_MC = (at_M < count)[:, None] & (ids_MC < vocab)
    logits_MC = tl.load(row_ptr + ids_MC, mask=inside_MC, other=float("-inf")).to(tl.float32)
    return chunk_M, ids_MC, logits_MC


@triton.jit
def masses_of(
    row_ptr, list_ptr, masses_ptr, listed_N, vocab, best, scale, floor, bar, least,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """[N] float64: what is kept of each chunk weighs, for the chunks listed; the others weigh nothing."""
    count = list_chunks(listed_N, list_ptr, N)
    first = 0
    while first < count:
        chunk_M, _, logits_MC = load_tile(row_ptr, list_ptr, first, count, vocab, M, C)
        top_M = tl.max(logits_MC, 1)
        top_M = tl.where(top_M > float("-inf"), top_M, best)  # no infinity minus infinity
        weights_MC = tl.exp2((logits_MC - top_M[:, None]) * scale)
        weights_MC = tl.where(is_kept(logits_MC, best, scale, floor, bar, least), weights_MC, 0.0)
        mass_M = tl.sum(weights_MC, 1) * tl.exp2((top_M - best) * scale)
        tl.store(masses_ptr + chunk_M, mass_M, mask=first + tl.arange(0, M) < count)
        first += M
    tl.debug_barrier()
    return tl.load(masses_ptr + tl.arange(0, N), mask=listed_N, other=0.0).to(tl.float64)


@triton.jit
def draw_inside(row_ptr, chunk, share, vocab, best, scale, floor, bar, least, C: tl.constexpr):
    """-> the token at `share` of the chunk's kept mass, and its logit."""
    column_C = tl.arange(0, C)
    ids_C = chunk * C + column_C
    logits_C = tl.load(row_ptr + ids_C, mask=ids_C < vocab, other=float("-inf")).to(tl.float32)
    weights_C = tl.exp2((logits_C - tl.max(logits_C, 0)) * scale)
    weights_C = tl.where(is_kept(logits_C, best, scale, floor, bar, least), weights_C, 0.0)
    place, _, _ = pick(weights_C.to(tl.float64), share, C)
    return chunk * C + place, tl.sum(tl.where(column_C == place, logits_C, 0.0), 0)


@triton.jit
def first_best(row_ptr, maxima_N, best, vocab, N: tl.constexpr, C: tl.constexpr):
    """The lowest id of the largest logit."""
    chunk = tl.min(tl.where(maxima_N == best, tl.arange(0, N), N), 0)
    ids_C = chunk * C + tl.arange(0, C)
    logits_C = tl.load(row_ptr + ids_C, mask=ids_C < vocab, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(logits_C == best, ids_C, vocab), 0)
