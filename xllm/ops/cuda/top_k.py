"""Drawing among the k likeliest tokens of a row without sorting it, by one program.

So many chunks have their best at or above some logit that the k likeliest tokens must be among the tokens that reach
it. These candidates are few, as a rule, and are compared each with each: whoever has fewer than k betters is one
of the k (ties included), and the mass of its betters decides top-p. Where there are too many of them, bisection over the
logits finds both thresholds.

Legend: as in `xllm.ops.cuda.drawing`; K candidates, G groups of
8 tokens, J candidates compared at once, P keys tried at once.
"""

import triton
import triton.language as tl

from xllm.ops.cuda.drawing import is_kept, load_tile, masses_of, pick


@triton.jit
def to_key(x, SHIFT: tl.constexpr):
    """int64 in the order of the floats. SHIFT drops bits that are zero anyway: 16 of what was bfloat16."""
    bits = x.to(tl.int32, bitcast=True) >> SHIFT
    return (bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT))).to(tl.int64)


@triton.jit
def of_key(key, SHIFT: tl.constexpr):
    key = key.to(tl.int32)
    bits = key ^ ((key >> 31) & (0x7FFFFFFF >> SHIFT))
    return (bits << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def lower_bound(maxima_N, best, top_k, enough, SHIFT: tl.constexpr):
    """A logit that `top_k` tokens reach because so many chunks' best do; if possible not more than `enough` of them.
    Eight keys are tried at once."""
    some_N = maxima_N > float("-inf")
    many = tl.sum(some_N.to(tl.int32), 0)
    bound = float("-inf")
    if many >= top_k:
        low = to_key(tl.min(tl.where(some_N, maxima_N, best), 0), SHIFT)
        high = to_key(best, SHIFT) + 1
        while (high - low > 1) & (many > enough):
            step = (high - low + 8) // 9
            key_P = tl.minimum(low + step * (1 + tl.arange(0, 8)), high)
            reach_P = tl.sum((maxima_N[:, None] >= of_key(key_P, SHIFT)[None, :]).to(tl.int32), 0)
            fits_P = reach_P >= top_k  # of the lower keys
            many = tl.min(tl.where(fits_P, reach_P, many), 0)
            fitting = tl.sum(fits_P.to(tl.int32), 0)
            high = tl.minimum(low + step * (fitting + 1), high)
            low += step * fitting
        bound = of_key(low, SHIFT)
    return bound


@triton.jit
def collect(
    row_ptr, list_ptr, count, vocab, bound, groups_ptr, values_ptr, ids_ptr,
    M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Write logits and ids of the tokens of the listed chunks that reach `bound`, in the order of ids. Returns how many
    there are, or more than K as soon as that is clear.

    In two steps, because scattering takes registers: groups of 8 tokens that hold any, then their tokens.
    """
    groups, first = 0, 0
    while (first < count) & (groups <= K):
        at_M = first + tl.arange(0, M)
        chunk_M = tl.load(list_ptr + at_M, mask=at_M < count, other=0)
        group_MG = chunk_M[:, None] * (C // 8) + tl.arange(0, C // 8)[None, :]
        ids_MG8 = group_MG[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        inside_MG8 = (at_M < count)[:, None, None] & (ids_MG8 < vocab)
        logits_MG8 = tl.load(row_ptr + ids_MG8, mask=inside_MG8, other=float("-inf"))
        top_MG = tl.max(logits_MG8.to(tl.float32), 2)
        found_MG = (top_MG >= bound) & (top_MG > float("-inf"))
        ones_MG = found_MG.to(tl.int32)
        ones_M = tl.sum(ones_MG, 1)
        place_MG = (groups + tl.cumsum(ones_M, 0) - ones_M)[:, None] + tl.cumsum(ones_MG, 1) - ones_MG
        tl.store(groups_ptr + place_MG, group_MG, mask=found_MG & (place_MG < K))
        groups += tl.sum(ones_M, 0)
        first += M
    tl.debug_barrier()
    filled, first = 0, 0
    while (first < groups) & (filled <= K) & (groups <= K):
        at_G = first + tl.arange(0, G)
        group_G = tl.load(groups_ptr + at_G, mask=at_G < groups, other=0)
        ids_G8 = group_G[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside_G8 = (at_G < groups)[:, None] & (ids_G8 < vocab)
        logits_G8 = tl.load(row_ptr + ids_G8, mask=inside_G8, other=float("-inf")).to(tl.float32)
        found_G8 = (logits_G8 >= bound) & (logits_G8 > float("-inf"))
        ones_G8 = found_G8.to(tl.int32)
        ones_G = tl.sum(ones_G8, 1)
        place_G8 = (filled + tl.cumsum(ones_G, 0) - ones_G)[:, None] + tl.cumsum(ones_G8, 1) - ones_G8
        stored_G8 = found_G8 & (place_G8 < K)
        tl.store(values_ptr + place_G8, logits_G8, mask=stored_G8)
        tl.store(ids_ptr + place_G8, ids_G8, mask=stored_G8)
        filled += tl.sum(ones_G, 0)
        first += G
    tl.debug_barrier()
    return tl.maximum(filled, groups)


@triton.jit
def weigh(logits, best, scale, least):
    exponents = (logits - best) * scale
    return tl.where(exponents >= least, tl.exp2(exponents), 0.0)


@triton.jit
def among_candidates(
    values_ptr, ids_ptr, filled, best, scale, least, top_k, top_p, u, K: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The token drawn among what all filters leave of the candidates."""
    place_K = tl.arange(0, K)
    logits_K = tl.load(values_ptr + place_K, mask=place_K < filled, other=float("-inf"))
    betters_K = tl.zeros([K], tl.int32)
    mass_K = tl.zeros([K], tl.float64)
    first = 0
    while first < filled:
        place_J = first + tl.arange(0, J)
        logits_J = tl.load(values_ptr + place_J, mask=place_J < filled, other=float("-inf"))
        weights_J = weigh(logits_J, best, scale, least)
        better_KJ = logits_J[None, :] > logits_K[:, None]
        betters_K += tl.sum(better_KJ.to(tl.int32), 1)
        mass_K += tl.sum(tl.where(better_KJ, weights_J[None, :], 0.0), 1).to(tl.float64)
        first += J
    weights_K = tl.where(betters_K < top_k, weigh(logits_K, best, scale, least), 0.0).to(tl.float64)
    allowed = tl.where(top_p < 1, top_p, 2.0) * tl.sum(weights_K, 0)  # 1 refuses nobody, rounded sums might
    weights_K = tl.where(mass_K < allowed, weights_K, 0.0)
    place, _, _ = pick(weights_K, u, K)
    return tl.load(ids_ptr + place)


@triton.jit
def search(
    row_ptr, list_ptr, count, vocab, low, high, limit, by_mass, best, scale, least,
    SHIFT: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The largest key below `high` such that the tokens that reach it are at least `limit` in number, or `by_mass` weigh
    as much; `low` where there is none above it. Three keys are tried in a pass over the listed chunks."""
    while high - low > 1:
        quarter = (high - low + 3) >> 2
        key_1 = low + quarter
        key_2 = tl.minimum(low + 2 * quarter, high)
        key_3 = tl.minimum(low + 3 * quarter, high)
        logit_1, logit_2, logit_3 = of_key(key_1, SHIFT), of_key(key_2, SHIFT), of_key(key_3, SHIFT)
        sum_1_M = tl.zeros([M], tl.float32)
        sum_2_M = tl.zeros([M], tl.float32)
        sum_3_M = tl.zeros([M], tl.float32)
        first = 0
        while first < count:
            _, _, logits_MC = load_tile(row_ptr, list_ptr, first, count, vocab, M, C)
            if by_mass:
                weights_MC = weigh(logits_MC, best, scale, least)
            else:
                weights_MC = ((logits_MC - best) * scale >= least).to(tl.float32)
            sum_1_M += tl.sum(tl.where(logits_MC >= logit_1, weights_MC, 0.0), 1)
            sum_2_M += tl.sum(tl.where(logits_MC >= logit_2, weights_MC, 0.0), 1)
            sum_3_M += tl.sum(tl.where(logits_MC >= logit_3, weights_MC, 0.0), 1)
            first += M
        sum_1 = tl.sum(sum_1_M.to(tl.float64), 0)
        sum_2 = tl.sum(sum_2_M.to(tl.float64), 0)
        sum_3 = tl.sum(sum_3_M.to(tl.float64), 0)
        reach_1, reach_2, reach_3 = sum_1 >= limit, sum_2 >= limit, sum_3 >= limit
        high = tl.where(reach_3, high, tl.where(reach_2, key_3, tl.where(reach_1, key_2, key_1)))
        low = tl.where(reach_3, key_3, tl.where(reach_2, key_2, tl.where(reach_1, key_1, low)))
        # with exactly so many tokens, none lies between that key and the answer
        exact = (sum_1 == limit) | (sum_2 == limit) | (sum_3 == limit)
        high = tl.where(exact, low + 1, high)
    return low


@triton.jit
def threshold(
    row_ptr, list_ptr, masses_ptr, maxima_N, count, vocab, bound, best, scale, least, top_k, top_p,
    SHIFT: tl.constexpr, N: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """-> the logit that the tokens must reach that top-k and top-p leave, and what each chunk keeps, [N] float64. In
    several passes over the listed chunks, all of which hold a token that reaches `bound`, as the k likeliest do."""
    floor = bound
    masses_N = tl.zeros([N], tl.float64)
    low, high = to_key(bound, SHIFT), to_key(best, SHIFT) + 1
    limit = top_k.to(tl.float64)
    by_mass = False
    searching = True
    while searching:
        low = search(
            row_ptr, list_ptr, count, vocab, low, high, limit, by_mass, best, scale, least, SHIFT, M, C
        )
        floor = of_key(low, SHIFT)
        listed_N = is_kept(maxima_N, best, scale, floor, float("-inf"), least)
        masses_N = masses_of(
            row_ptr, list_ptr, masses_ptr, listed_N, vocab, best, scale, floor, float("-inf"), least, N, M, C
        )
        count = tl.sum(listed_N.to(tl.int32), 0)
        limit = top_p * tl.sum(masses_N, 0)
        searching = (top_p < 1) & (not by_mass)
        by_mass = searching
    return floor, masses_N
